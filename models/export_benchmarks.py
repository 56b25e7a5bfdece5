"""Exports the benchmark networks to ONNX with PyTorch's exporter.

    python models/export_benchmarks.py OUT [--fixed] [NAME ...]

Writes OUT/NAME.train.onnx (training form: nothing folded, BatchNormalization with
training_mode=1, initializers named like PyTorch's parameters) and OUT/NAME.onnx
(inference form, folded). Input `x`, output `logits`, a symbolic batch axis (`--fixed`:
the training form gets the benchmark's own batch size instead).
"""

import argparse
import pathlib
import sys
import warnings

warnings.filterwarnings("ignore")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import onnx
import torch

import benchmarks


def export(name, path, training, dynamic):
    """Writes one network in one form and returns the number of nodes of each kind."""
    mode = torch.onnx.TrainingMode
    net = benchmarks.build(name).train(training)
    x = torch.from_numpy(benchmarks.batch(name)[0])
    torch.onnx.export(
        net,
        (x,),
        str(path),
        # The tracing exporter keeps the parameters' names and writes one file.
        dynamo=False,
        do_constant_folding=not training,
        input_names=["x"],
        output_names=["logits"],
        opset_version=17,
        dynamic_axes={"x": {0: "batch"}, "logits": {0: "rows"}} if dynamic else None,
        training=mode.TRAINING if training else mode.EVAL,
    )
    counts = {}
    for node in onnx.load(path).graph.node:
        counts[node.op_type] = counts.get(node.op_type, 0) + 1
    return dict(sorted(counts.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--fixed", action="store_true", help="training form with a fixed batch size")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - set(benchmarks.BENCHMARKS)
    if unknown:
        parser.error(f"no such network: {', '.join(sorted(unknown))}; there are {', '.join(benchmarks.BENCHMARKS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or benchmarks.BENCHMARKS:
        for training in (False, True):
            path = arguments.out / (name + (".train.onnx" if training else ".onnx"))
            counts = export(name, path, training, dynamic=not (training and arguments.fixed))
            print(path.name, path.stat().st_size, counts, flush=True)


if __name__ == "__main__":
    main()
