"""Compares the forward pass with ONNX Runtime, on the committed models and the benchmarks.

    python tests/peers/forward.py [--qcompile PATH] [--onnx FOLDER] [MODEL ...]

Each output must agree to 1e-4 of its largest magnitude. A MODEL is the stem of a committed
file, or a benchmark's name when PyTorch is there to export it (or --onnx names its folder).
"""

import peer

peer.require("onnxruntime")

import numpy as np
import onnxruntime

BENCHMARKS = ("mlp", "resnet18", "mobilenetv2", "bert", "gpt", "lstm", "gru")
LIMIT, SAMPLES = 1e-4, 3


def draw(session, seed=0):
    """A seeded array for each input; symbolic axes become SAMPLES."""
    random = np.random.default_rng(seed)
    arrays = {}
    for value in session.get_inputs():
        shape = [axis if isinstance(axis, int) else SAMPLES for axis in value.shape]
        if "int64" in value.type:
            # Below every vocabulary of the models here.
            arrays[value.name] = random.integers(0, 60, shape)
        else:
            arrays[value.name] = random.standard_normal(shape, dtype=np.float32)
    return arrays


def main():
    committed = {path.stem: path for path in sorted((peer.ROOT / "models").glob("*.onnx"))}
    names = [*committed, *BENCHMARKS]
    parser = peer.arguments(__doc__.splitlines()[0], names)
    values = peer.parse(parser, names)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        try:
            path = committed.get(name) or work.model(name, training=False)
        except ImportError:
            print(f"{name}: skipped, PyTorch is not installed")
            continue
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Optimized, it normalizes 8 channels by other statistics than those of the batch, which NumPy and it itself give
        # unoptimized.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        arrays = draw(session)
        wanted = dict(zip([value.name for value in session.get_outputs()], session.run(None, arrays)))
        np.savez(work.path / "in.npz", **arrays)
        try:
            work.run("run", path, "--precision", "f32", "--inputs", "in.npz", "--outputs", "out.npz")
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        with np.load(work.path / "out.npz") as file:
            got = {key: file[key] for key in file.files}
        for key, tensor in wanted.items():
            same = key in got and got[key].shape == tensor.shape and got[key].dtype == tensor.dtype
            error = np.abs(got[key] - tensor).max() / np.abs(tensor).max() if same else np.inf
            good = bool(error <= LIMIT)
            if not good:
                failures.append(f"{name}: output {key} differs" if same else f"{name}: output {key} is missing or has another type")
            rows.append([name, key, "x".join(map(str, tensor.shape)), f"{error:.1e}", "ok" if good else "FAILED"])
    peer.table(["model", "output", "shape", "error", ""], rows)
    peer.finish(failures)


main()
