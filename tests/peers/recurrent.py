"""Compares LSTM, GRU and RNN with ONNX's own test cases and with ONNX Runtime, over their attributes.

    python tests/peers/recurrent.py [--qcompile PATH] [WORD ...]

Runs the cases whose names contain a WORD: ONNX's node tests with the values that come with them, and
generated ones against ONNX Runtime. Each output must agree to 1e-4 of its largest magnitude (or of 1).
"""

import sys
import warnings

import peer

peer.require("onnxruntime")

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

LIMIT = 1e-4
STEPS, BATCH, INPUTS, HIDDEN = 5, 3, 4, 6
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = ("forward", "reverse", "bidirectional")


def node_tests():
    """ONNX's own cases: name, model, inputs and wanted outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    for test in tests:
        if any(f"_{op.lower()}_" in test.name for op in GATES):
            inputs, outputs = test.data_sets[0]
            fed = {value.name: array for value, array in zip(test.model.graph.input, inputs)}
            wanted = {value.name: array for value, array in zip(test.model.graph.output, outputs)}
            yield test.name, test.model, fed, wanted


def generated(op, opset, optional=(), hidden=HIDDEN, batch=BATCH, **attributes):
    """A model of one node with weights as initializers; `optional` names the optional inputs it gets."""
    random = np.random.default_rng(len(repr(attributes)) + len(optional) + hidden)
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    gates, layout = GATES[op], attributes.get("layout", 0)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32) * 0.7
    state = (batch, directions, hidden) if layout else (directions, batch, hidden)
    values = {
        "W": draw(directions, gates * hidden, INPUTS),
        "R": draw(directions, gates * hidden, hidden),
        "B": draw(directions, 2 * gates * hidden),
        "sequence_lens": random.integers(1, STEPS + 1, batch).astype(np.int32),
        "initial_h": draw(*state),
        "initial_c": draw(*state),
        "P": draw(directions, 3 * hidden),
    }
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h"] + (["initial_c", "P"] if op == "LSTM" else [])
    given = [name if name in ("X", "W", "R") or name in optional else "" for name in names]
    outputs = ["Y", "Y_h"] + (["Y_c"] if op == "LSTM" else [])
    node = helper.make_node(op, given, outputs, hidden_size=hidden, **attributes)
    shape = [batch, STEPS, INPUTS] if layout else [STEPS, batch, INPUTS]
    fed = {"X": draw(*shape)}
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, shape)]
    for name in ("sequence_lens", "initial_h"):
        if name in given:
            fed[name] = values[name]
            kind = helper.np_dtype_to_tensor_dtype(values[name].dtype)
            inputs.append(helper.make_tensor_value_info(name, kind, values[name].shape))
    weights = [numpy_helper.from_array(values[name], name) for name in given if name and name not in fed]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    graph = helper.make_graph([node], "g", inputs, results, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8), fed


def cases():
    """Generated cases by name."""
    for op in GATES:
        extras = ["B", "sequence_lens", "initial_h"] + (["initial_c", "P"] if op == "LSTM" else [])
        flags = {"LSTM": "input_forget", "GRU": "linear_before_reset"}.get(op)
        for direction in DIRECTIONS:
            for flag in (0, 1) if flags else (0,):
                attributes = {"direction": direction} | ({flags: flag} if flag else {})
                for clip in (None, 0.4):
                    attributes = attributes | ({"clip": clip} if clip else {})
                    for optional in ((), ("B",), tuple(extras)):
                        name = f"{op} {direction} flag={flag} clip={clip} {','.join(optional)}"
                        for opset in (7, 14, 22) if clip is None else (14,):
                            yield f"{name} opset {opset}", generated(op, opset, optional, **attributes)
        for size in (1, 31, 33, 70):
            yield f"{op} hidden {size}", generated(op, 14, ("B", "initial_h"), hidden=size, batch=21)
        count = {"LSTM": 3, "GRU": 2, "RNN": 1}[op]
        for names, alpha, beta in (
            (("Sigmoid", "Relu", "Tanh"), None, None),
            (("HardSigmoid", "Softsign", "LeakyRelu"), None, None),
            (("HardSigmoid", "Affine", "Elu"), [0.3, 0.8, 0.7], [0.4, 0.1]),
            (("HardSigmoid", "ScaledTanh", "ThresholdedRelu"), [0.25, 0.9, 0.2], [0.5, 1.1]),
            (("Sigmoid", "Softplus", "Softplus"), None, None),
            (("Tanh", "Sigmoid", "Sigmoid"), None, None),
        ):
            for chosen in ([names[:count]] if op != "RNN" else [[name] for name in names]):
                attributes = {"activations": list(chosen)}
                if alpha:
                    # Each function takes the next of those that it has.
                    places = [names.index(name) for name in chosen]
                    attributes["activation_alpha"] = [alpha[place] for place in places]
                    betas = [beta[place] for place in places if place < len(beta)]
                    attributes |= {"activation_beta": betas} if betas else {}
                yield f"{op} {' '.join(chosen)} {alpha}", generated(op, 14, ("B",), **attributes)


def main():
    parser = peer.arguments(__doc__.splitlines()[0], ())
    values = parser.parse_args()
    values.qcompile = values.qcompile.resolve()
    work = peer.Workspace(values)
    everything = list(node_tests())
    for name, (model, fed) in cases():
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        try:
            session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            wanted = dict(zip([value.name for value in session.get_outputs()], session.run(None, fed)))
        except Exception as error:
            print(f"{name}: not run by ONNX Runtime: {str(error).splitlines()[0][:120]}", file=sys.stderr)
            continue
        everything.append((name, model, fed, wanted))
    failures, worst, count = [], 0.0, 0
    for name, model, fed, wanted in everything:
        if values.names and not any(word in name for word in values.names):
            continue
        count += 1
        onnx.save(model, work.path / "model.onnx")
        np.savez(work.path / "in.npz", **fed)
        try:
            work.run("run", "model.onnx", "--precision", "f32", "--inputs", "in.npz", "--outputs", "out.npz")
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        with np.load(work.path / "out.npz") as file:
            got = {key: file[key] for key in file.files}
        for key, tensor in wanted.items():
            if key not in got or got[key].shape != tensor.shape:
                failures.append(f"{name}: output {key} is missing or of another shape")
                continue
            error = np.abs(got[key] - tensor).max(initial=0) / max(1, np.abs(tensor).max(initial=0))
            worst = max(worst, error)
            if not error <= LIMIT:
                failures.append(f"{name}: output {key} differs by {error:.1e}")
    print(f"{count} cases, worst error {worst:.1e}")
    peer.finish(failures)


main()
