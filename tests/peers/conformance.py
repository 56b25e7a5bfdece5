"""Runs ONNX's own test cases through `qcompile run` and counts them by operator.

    python tests/peers/conformance.py [--qcompile PATH] [--data FOLDER] [--gradients] [--onnxruntime] [--list] [WORD ...]
    python tests/peers/conformance.py --write tests/conformance.zip

The cases come with the package `onnx`; --data FOLDER takes those of Debian's libonnx-testdata instead (FOLDER/node and
its siblings). Only cases whose name contains a WORD are run, if one is given. A case passes when every output has the
shape, the element type and the values that ONNX wants (rtol 1e-3, atol 1e-7, as its own runner has it). Cases with
sequences, optionals, strings or element types that numpy lacks are left out and counted. A crash (exit code 70, or by
a signal) is always a failure of this script; --onnxruntime says how many ONNX Runtime passes, --gradients compares the
gradients of all float inputs with differences of ONNX's reference evaluator in float64. --write keeps the small cases
that pass, with their gradients, for the test suite of the workspace.
"""

import argparse
import concurrent.futures
import io
import pathlib
import subprocess
import tempfile
import warnings
import zipfile
from collections import Counter, defaultdict

import peer

peer.require()

import numpy as np
import onnx
from derivatives import gradient_case
from onnx import numpy_helper

FAMILIES = ("node", "simple", "pytorch-converted", "pytorch-operator")
RTOL, ATOL, SECONDS = 1e-3, 1e-7, 120
# A gradient's error relative to the largest of its case and absolutely (1 - tanh² of large values cancels), and most
# bytes of a case that is kept.
GRADIENT, NOISE, KEPT = 1e-3, 1e-5, 6_000
# Operators that the importer is meant to take; the share that passes is counted over their cases.
WANTED = set(
    """
    Abs Acos Acosh Add AffineGrid And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization Cast CastLike Ceil
    BlackmanWindow HammingWindow HannWindow Celu Clip Concat Constant ConstantOfShape Conv ConvInteger ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear
    Div Dropout DynamicQuantizeLinear Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements
    GatherND Gelu Gemm GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish
    Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less LessOrEqual Log
    LogSoftmax Loop LpNormalization LpPool MatMul MatMulInteger Max MaxPool Mean MeanVarianceNormalization Min Mish Mod
    Mul Neg NegativeLogLikelihoodLoss Not OneHot Or PRelu Pad Pow QLinearConv QLinearMatMul QuantizeLinear RMSNormalization
    RNN Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
    ReduceSumSquare Relu Reshape Resize RotaryEmbedding Round Scan ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign
    Sin Sinh Size Slice Softmax SoftmaxCrossEntropyLoss Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Swish Tan
    Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
    ai.onnx.ml:Scaler ai.onnx.ml:LinearRegressor ai.onnx.ml:LinearClassifier
    ai.onnx.preview.training:Adam ai.onnx.preview.training:Adagrad ai.onnx.preview.training:Momentum
    """.split()
)


class Case:
    """One test: the bytes of its model and what goes in and out."""

    def __init__(self, family, name, model, inputs, outputs):
        self.family, self.name, self.model = family, name, model
        self.inputs, self.outputs = inputs, outputs

    def operators(self):
        for node in self.model.graph.node:
            yield f"{node.domain}:{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type

    def operator(self):
        """What it is a case of: its only node, or its family."""
        names = list(self.operators())
        return names[0] if len(names) == 1 else f"({self.family})"

    def wanted(self):
        return all(name in WANTED for name in self.operators())


def dense(value):
    """The array, or None for what an npz cannot hold."""
    if isinstance(value, onnx.TensorProto):
        try:
            value = numpy_helper.to_array(value)
        except Exception:
            return None
    if not isinstance(value, np.ndarray) and not np.isscalar(value):
        return None
    value = np.asarray(value)
    return value if value.dtype.isbuiltin == 1 and value.dtype.kind in "fiub" else None


def named(values, given):
    """Arrays by the names of the ports; None if one is not dense."""
    arrays = {}
    for port, value in zip(values, given):
        array = dense(value)
        if array is None:
            return None
        arrays[port.name] = array
    return arrays


def packaged():
    """The cases that come with the package."""
    from onnx.backend.test.loader import load_model_tests

    for family in FAMILIES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tests = load_model_tests(kind=family)
        for test in tests:
            if test.model_dir is not None:
                yield from in_folder(family, pathlib.Path(test.model_dir))
            elif test.model is not None and test.data_sets:
                inputs, outputs = test.data_sets[0]
                yield made(family, test.name, test.model, inputs, outputs)


def made(family, name, model, inputs, outputs):
    graph = model.graph
    return Case(family, name, model, named(graph.input, inputs), named(graph.output, outputs))


def in_folder(family, folder):
    """The case in a folder of ONNX's layout."""
    model = onnx.load(folder / "model.onnx")

    def read(prefix, ports):
        values = []
        for at, port in enumerate(ports):
            path = folder / "test_data_set_0" / f"{prefix}_{at}.pb"
            if port.type.WhichOneof("value") != "tensor_type" or not path.exists():
                return [None]
            values.append(onnx.TensorProto.FromString(path.read_bytes()))
        return values

    if (folder / "test_data_set_0").is_dir():
        graph = model.graph
        yield made(family, folder.name, model, read("input", graph.input), read("output", graph.output))


def unpacked(data):
    for family in FAMILIES:
        for folder in sorted((data / family).glob("*/")):
            yield from in_folder(family, folder)


def compare(wanted, got):
    """What is wrong with the outputs; None if nothing."""
    for name, array in wanted.items():
        if name not in got:
            return f"output {name} is missing"
        other = got[name]
        if other.dtype.kind == "V" and array.dtype == np.uint16:
            # The words of bfloat16, which numpy does not know.
            other = other.view(np.uint16)
        if other.shape != array.shape or other.dtype != array.dtype:
            return f"output {name} is {other.dtype}{list(other.shape)}, not {array.dtype}{list(array.shape)}"
        if array.dtype.kind == "f":
            good = np.allclose(other.astype(np.float64), array.astype(np.float64), RTOL, ATOL, equal_nan=True)
        else:
            good = np.array_equal(other, array)
        if not good:
            return f"output {name} differs"
    return None


def run(program, case):
    """The outcome (pass, unsupported, wrong, refused, crash) and what was said."""
    with tempfile.TemporaryDirectory(prefix="conformance.") as folder:
        path = pathlib.Path(folder)
        onnx.save(case.model, path / "model.onnx")
        np.savez(path / "in.npz", **case.inputs)
        command = [program, "run", "model.onnx", "-q", "--inputs", "in.npz", "--outputs", "out.npz"]
        try:
            done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return "crash", f"no answer after {SECONDS} s"
        said = done.stderr.strip()
        if done.returncode < 0 or done.returncode in (70, 101):
            return "crash", f"exit {done.returncode}: {said}"
        if done.returncode:
            return ("unsupported" if "not supported" in said else "refused"), said
        with np.load(path / "out.npz") as file:
            wrong = compare(case.outputs, {name: file[name] for name in file.files})
        return ("wrong", wrong) if wrong else ("pass", "")


def derive(program, made):
    """The outcome for the gradients of a case and what was said."""
    model, inputs, wanted = made
    with tempfile.TemporaryDirectory(prefix="conformance.") as folder:
        path = pathlib.Path(folder)
        onnx.save(model, path / "model.onnx")
        np.savez(path / "in.npz", **inputs)
        command = [program, "run", "model.onnx", "-q", "--train", "*", "--loss", "output", "--inputs", "in.npz", "--gradients", "out.npz"]
        done = subprocess.run(command, cwd=path, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            return "refused", done.stderr.strip()
        with np.load(path / "out.npz") as file:
            got = {name: file[name] for name in file.files}
    largest = max(np.abs(np.nan_to_num(array)).max() for array in wanted.values())
    for name, array in wanted.items():
        known = ~np.isnan(array)
        other = got.get(name, np.zeros_like(array))
        error = np.abs(other - array)[known]
        if error.size and not error.max() <= GRADIENT * largest + NOISE:
            return "wrong", f"gradient of {name} differs by {error.max() / largest:.1e} of the largest"
    return "pass", ""


def packed(arrays):
    """The bytes of an npz, the same for the same arrays."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def small(case):
    """Whether it is kept for the test suite."""
    arrays = [*case.inputs.values(), *case.outputs.values()]
    return case.model.ByteSize() + sum(array.nbytes for array in arrays) <= KEPT


def write(path, cases):
    """The archive of the test suite: for each case the model, its inputs and outputs, and its gradients."""
    derived = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for case, made in sorted(cases, key=lambda pair: (pair[0].family, pair[0].name)):
            model = case.model.SerializeToString(deterministic=True)
            files = {"model.onnx": model, "in.npz": packed(case.inputs), "out.npz": packed(case.outputs)}
            if made is not None:
                model, inputs, gradients = made
                files["loss.onnx"] = model.SerializeToString(deterministic=True)
                files["rest.npz"], files["gradients.npz"] = packed(inputs), packed(gradients)
                derived += 1
            for name, content in files.items():
                # A fixed date, so that the same cases make the same bytes.
                archive.writestr(zipfile.ZipInfo(f"{case.family}/{case.name}/{name}", (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    print(f"{len(cases)} cases, {derived} of them with gradients, in {path}")


def crashes(program, case):
    """A case that is left out must not crash either."""
    with tempfile.TemporaryDirectory(prefix="conformance.") as folder:
        onnx.save(case.model, pathlib.Path(folder) / "model.onnx")
        command = [program, "inspect", "model.onnx", "-q"]
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"no answer after {SECONDS} s"
        bad = done.returncode < 0 or done.returncode in (70, 101)
        return f"exit {done.returncode}: {done.stderr.strip()}" if bad else None


def runtime_passes(case):
    """Whether ONNX Runtime passes it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(case.model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        return compare(case.outputs, dict(zip(names, session.run(None, case.inputs)))) is None
    except Exception:
        return False


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*", metavar="WORD")
    parser.add_argument("--qcompile", type=pathlib.Path, default=peer.ROOT / "target" / "release" / "qcompile")
    parser.add_argument("--data", type=pathlib.Path)
    parser.add_argument("--onnxruntime", action="store_true")
    parser.add_argument("--list", action="store_true", help="also name the cases of operators that are not meant to be taken")
    parser.add_argument("--gradients", action="store_true", help="compare gradients, too")
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="keep the small cases that pass, for the test suite")
    values = parser.parse_args()
    program = str(values.qcompile.resolve())
    cases = list(unpacked(values.data) if values.data else packaged())
    cases = [case for case in cases if not values.words or any(word in case.name for word in values.words)]
    numeric = [case for case in cases if case.inputs is not None and case.outputs is not None]
    others = [case for case in cases if case.inputs is None or case.outputs is None]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda case: run(program, case), numeric))
        crashed = list(pool.map(lambda case: crashes(program, case), others))

    by_operator, failures, reasons = defaultdict(Counter), [], []
    for case, (outcome, said) in zip(numeric, outcomes):
        by_operator[case.operator()][outcome] += 1
        if outcome == "crash":
            failures.append(f"{case.name}: {said}")
        elif outcome != "pass" and (case.wanted() or values.list):
            reasons.append(f"{outcome:11} {case.name}: {' '.join(said.split())[:200]}")
    failures += [f"{case.name}: {said}" for case, said in zip(others, crashed) if said]
    rows = [[name, sum(n.values()), n["pass"], n["wrong"], n["unsupported"], n["refused"], n["crash"]] for name, n in sorted(by_operator.items())]
    peer.table(["operator", "cases", "pass", "wrong", "unsupported", "refused", "crash"], rows)
    print(*reasons, sep="\n")
    wanted = [outcome for case, (outcome, _) in zip(numeric, outcomes) if case.wanted()]
    passed = sum(outcome == "pass" for outcome in wanted)
    everything = sum(outcome == "pass" for outcome, _ in outcomes)
    print(f"{len(cases)} cases, {len(others)} of them not dense and numeric")
    print(f"of the operators that are meant to be taken: {passed} of {len(wanted)} pass ({passed / max(len(wanted), 1):.1%})")
    print(f"of all: {everything} of {len(numeric)}")
    good = [case for case, (outcome, _) in zip(numeric, outcomes) if outcome == "pass" and case.wanted()]
    if values.gradients or values.write:
        good = good if values.gradients else list(filter(small, good))
        with concurrent.futures.ProcessPoolExecutor(2) as pool:
            good = list(zip(good, pool.map(gradient_case, good)))
    if values.gradients:
        derived = [(case, derive(program, made)) for case, made in good if made is not None]
        right = sum(outcome == "pass" for _, (outcome, _) in derived)
        print(f"gradients: {right} of {len(derived)} agree with differences in float64")
        failures += [f"{case.name}: {outcome}: {' '.join(said.split())[:200]}" for case, (outcome, said) in derived if outcome != "pass"]
    if values.write:
        write(values.write, [(case, made) for case, made in good if small(case)])
    if values.onnxruntime:
        verdicts = [runtime_passes(case) for case in numeric]
        theirs = sum(good for case, good in zip(numeric, verdicts) if case.wanted())
        print(f"ONNX Runtime passes {theirs} of {len(wanted)}, and {sum(verdicts)} of all")
    peer.finish(failures)


if __name__ == "__main__":
    main()
