"""Measures one training step against ONNX Runtime's on-device training, the last that it had (1.19.2).

    python tests/peers/ort_training.py --onnx FOLDER [--qcompile PATH] [--rounds N] [MODEL ...]

Runs in an environment of its own (`requirements-ort-training.txt`); `models/export_benchmarks.py`, from the other one,
writes FOLDER. Rounds alternate between `qcompile bench` in f32 and ONNX Runtime, which has no other type, and
medians are compared. Where the model trains with momentum, ONNX Runtime updates without, as it has none. "First step"
is the wall time until one step is done, artifacts and a first compilation included. Fails when a target (column
"wanted") is missed.
"""

import peer

peer.require("onnxruntime.training")

import json
import pathlib
import statistics
import tempfile
import time

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime import SessionOptions
from onnxruntime.training import api, artifacts

import benchmarks

WANTED = {"resnet20": 3.0, "resnet18": 3.0, "mobilenetv2": 3.0, "lstm": 3.0}
WANTED_OTHERS = 1.3
ADAMW = ("bert", "gpt")


def with_statistics(model):
    """Gives each LayerNormalization the bias and the outputs that ONNX Runtime's gradient of it reads; names the biases."""
    zeros = {}
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "LayerNormalization":
            continue
        if len(node.input) < 3 or not node.input[2]:
            shape = shapes[node.input[1]]
            bias = f"zero_bias_{'x'.join(map(str, shape))}"
            zeros[bias] = np.zeros(shape, np.float32)
            inputs = [*node.input[:2], bias]
            del node.input[:]
            node.input.extend(inputs)
        result = node.output[0]
        del node.output[1:]
        node.output.extend([f"{result}_mean", f"{result}_inverse_deviation"])
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in zeros.items())
    return set(zeros)


class Step:
    """One step of ONNX Runtime on a fixed batch: AdamW for transformers, else SGD without momentum."""

    def __init__(self, name, path, threads, folder):
        model = onnx.load(path)
        zeros = with_statistics(model)
        real = [t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
        trained = [name for name in real if "running_" not in name and name not in zeros]
        optimizer = artifacts.OptimType.AdamW if name in ADAMW else artifacts.OptimType.SGD
        artifacts.generate_artifacts(
            model,
            requires_grad=trained,
            frozen_params=[t.name for t in model.graph.initializer if t.name not in trained],
            loss=artifacts.LossType.CrossEntropyLoss,
            optimizer=optimizer,
            artifact_directory=folder,
        )
        options = SessionOptions()
        options.intra_op_num_threads = threads
        state = api.CheckpointState.load_checkpoint(f"{folder}/checkpoint")
        # An evaluation model would be refused: batch normalisation is in its training form.
        self.module = api.Module(f"{folder}/training_model.onnx", state, None, session_options=options)
        self.update = api.Optimizer(f"{folder}/optimizer_model.onnx", self.module)
        self.update.set_learning_rate(1e-4 if name in ADAMW else 1e-3)
        self.module.train()
        self.batch = benchmarks.batch(name)

    def __call__(self):
        self.module(*self.batch)
        self.update.step()
        self.module.lazy_reset_grad()


def compare(work, name, values):
    """Median step times in ms and seconds to the first step, ours then ONNX Runtime's."""
    path = work.model(name)
    size = benchmarks.BENCHMARKS[name].batch_size
    plan = work.path / f"{name}.qplan"
    optimizer = "adamw" if name in ADAMW else "momentum"
    words = ["--precision", "f32", "--batch-size", size, "--loss", "cross-entropy", "--optimizer", optimizer]
    x, label = benchmarks.batch(name, size)
    data = work.path / f"{name}.npz"
    np.savez(data, x=x, label=label.reshape(len(x), -1) if len(label) > len(x) else label)
    start = time.perf_counter()
    work.run("train", path, *words, "--data", data, "--epochs", 1, "--lr", 1e-3, "--threads", values.threads)
    first = [time.perf_counter() - start]
    work.run(path, "-o", plan, *words, "--no-measure")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        theirs = Step(name, path, values.threads, folder)
        theirs()
        first.append(time.perf_counter() - start)
        ours_ms, theirs_ms = [], []
        for _ in range(values.rounds):
            document = json.loads(work.run("bench", plan, "--threads", values.threads, "--json"))
            ours_ms.append(document["step_ms"]["median"])
            theirs_ms.append(peer.median_ms(theirs, values.seconds))
    return statistics.median(ours_ms), statistics.median(theirs_ms), first


def main():
    parser = peer.arguments(__doc__.splitlines()[0], benchmarks.BENCHMARKS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of ONNX Runtime's steps in each round")
    parser.add_argument("--threads", type=int, default=2)
    values = peer.parse(parser, benchmarks.BENCHMARKS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        try:
            ours, theirs, first = compare(work, name, values)
        except Exception as failure:  # noqa: BLE001: ONNX Runtime raises what it likes.
            failures.append(f"{name}: {str(failure).splitlines()[0]}")
            continue
        wanted = WANTED.get(name, WANTED_OTHERS)
        rows.append([name, f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}x", f"{wanted:.2f}x"])
        rows[-1] += [f"{seconds:.2f}" for seconds in first]
        if theirs / ours < wanted:
            failures.append(f"{name}: {theirs / ours:.2f}x ONNX Runtime's speed, {wanted:.2f}x wanted")
    peer.table(["model", "step ms", "ONNX Runtime", "speed", "wanted", "first step s", "ONNX Runtime"], rows)
    peer.finish(failures)


main()
