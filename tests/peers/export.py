"""Exports trained checkpoints and compares ONNX Runtime's results and speed with those from before.

    python tests/peers/export.py [--qcompile PATH] [--onnx FOLDER] [--steps N] [MODEL ...]

Each model trains a few steps on seeded noise. Its checkpoint goes out at several opsets; ONNX's checker must accept
every file, and ONNX Runtime's outputs must agree with `qcompile run` on that file to 1e-5 of their largest
magnitude, and its loss over all samples with `qcompile eval` on the checkpoint to 1e-4. The last
column is ONNX Runtime's time on the exported file over that on the model before training. A MODEL is
the stem of a committed file, or a benchmark's name when PyTorch is there to export it.
"""

import json
import time

import peer

peer.require("onnxruntime")

import numpy as np
import onnx
import onnxruntime

BENCHMARKS = ("mlp", "resnet18", "mobilenetv2", "bert", "gpt", "lstm", "gru")
OPSETS = (13, 17, 20, 23)
LIMIT, LOSS_LIMIT = 1e-5, 1e-4
SAMPLES, BATCH = 16, 8


def session(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def draw(path):
    """Seeded samples for the model's inputs, and a label for each row of its first output."""
    random = np.random.default_rng(0)
    model = session(path)
    arrays = {}
    for value in model.get_inputs():
        shape = [axis if isinstance(axis, int) else SAMPLES for axis in value.shape]
        if "int64" in value.type:
            # Below every vocabulary of the models here.
            arrays[value.name] = random.integers(0, 60, shape)
        else:
            arrays[value.name] = random.standard_normal(shape, dtype=np.float32)
    logits = model.run(None, arrays)[0]
    label = random.integers(0, logits.shape[-1], logits.size // logits.shape[-1])
    return arrays, label


def loss(logits, label):
    """Mean cross-entropy of rows of logits, in float64."""
    rows = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    rows = rows - rows.max(axis=1, keepdims=True)
    return float(np.mean(np.log(np.exp(rows).sum(axis=1)) - rows[np.arange(len(rows)), label]))


def milliseconds(sessions, arrays):
    """The median time of each session, measured in turns."""
    times = [[] for _ in sessions]
    for _ in range(15):
        for model, taken in zip(sessions, times):
            begin = time.perf_counter()
            model.run(None, arrays)
            taken.append(time.perf_counter() - begin)
    return [1e3 * float(np.median(taken)) for taken in times]


def check(work, name, path, before, epochs):
    """The rows of one model, and what failed."""
    arrays, label = draw(before)
    rows, failures = [], []
    shaped = label if len(label) == SAMPLES else label.reshape(SAMPLES, -1)
    np.savez(work.path / f"{name}.npz", **arrays, label=shaped)
    words = ["train", path, "--data", f"{name}.npz", "--epochs", epochs, "--batch-size", BATCH, "--precision", "f32"]
    work.run(*words, "--loss", "cross-entropy", "--lr", 1e-3, "--checkpoint", f"{name}.run", "-q")
    trained = json.loads(work.run("eval", f"{name}.run", "--data", f"{name}.npz", "--json"))["loss"]
    np.savez(work.path / "in.npz", **arrays)
    for opset in OPSETS:
        case, written = f"{name} {opset}", work.path / f"{name}.{opset}.onnx"
        answer = json.loads(work.run("export", f"{name}.run", "-o", written, "--opset", opset, "--json"))
        onnx.checker.check_model(str(written), full_check=True)
        model = session(written)
        got = dict(zip([value.name for value in model.get_outputs()], model.run(None, arrays)))
        work.run("run", written, "--precision", "f32", "--inputs", "in.npz", "--outputs", "out.npz")
        with np.load(work.path / "out.npz") as file:
            wanted = {key: file[key] for key in file.files}
        same = wanted.keys() == got.keys() and all(got[key].shape == wanted[key].shape for key in got)
        error = max(np.abs(got[key] - wanted[key]).max() / np.abs(wanted[key]).max() for key in got) if same else np.inf
        first = next(iter(got.values()))
        loss_error = abs(loss(first, label) - trained) / trained
        old, new = milliseconds([session(before), model], arrays)
        good = bool(error <= LIMIT and loss_error <= LOSS_LIMIT)
        if not good:
            failures.append(f"{case}: outputs differ by {error:.1e}, the loss by {loss_error:.1e}")
        nodes = [sum(node.op_type != "Constant" for node in onnx.load(before).graph.node), sum(answer["operators"].values())]
        rows.append([case, *nodes, f"{error:.1e}", f"{loss_error:.1e}", f"{old:.2f}", f"{new:.2f}", f"{new / old:.2f}", "ok" if good else "FAILED"])
    return rows, failures


def main():
    committed = {path.stem: path for path in sorted((peer.ROOT / "models").glob("*.onnx"))}
    names = [*committed, *BENCHMARKS]
    parser = peer.arguments(__doc__.splitlines()[0], names)
    parser.add_argument("--steps", type=int, default=4, help="training steps")
    values = peer.parse(parser, names)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        try:
            path = committed.get(name) or work.model(name, training=True)
            before = committed.get(name) or work.model(name, training=False)
        except ImportError:
            print(f"{name}: skipped, PyTorch is not installed")
            continue
        try:
            more, failed = check(work, name, path, before, max(1, values.steps * BATCH // SAMPLES))
        except (peer.Failure, onnx.checker.ValidationError) as failure:
            more, failed = [], [f"{name}: {failure}"]
        rows += more
        failures += failed
    head = ["model, opset", "nodes before", "after", "error", "loss error", "ms before", "after", "ratio", ""]
    peer.table(head, rows)
    peer.finish(failures)


main()
