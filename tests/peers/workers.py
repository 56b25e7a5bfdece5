"""Two workers of one process beside one, each with one thread and as many samples: samples a second.

    python tests/peers/workers.py [--qcompile PATH] [--onnx FOLDER] [--rounds N] [--precisions f32,bf16] [MODEL ...]

Both train on the same samples, twice over; counted is the second time, since the first step of a process touches all of its memory.
"""

import peer

peer.require()

import numpy as np

import benchmarks

MODELS = benchmarks.BENCHMARKS
# Steps of one worker on all samples.
STEPS = {"mlp": 400, "resnet20": 32, "resnet18": 12, "mobilenetv2": 16, "bert": 32, "gpt": 12, "lstm": 32, "gru": 32}
WANTED = 1.8


def rate(work, plan, data, size, workers):
    """Samples a second in the second epoch."""
    words = ["train", plan, "--data", data, "--epochs", 2, "--batch-size", size * workers, "--lr", 1e-3]
    lines = peer.json_lines(work.run(*words, "--workers", workers, "--threads", workers, "--json"))
    return [line["samples_per_s"] for line in lines if "epoch" in line][1]


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["f32", "bf16"])
    values = peer.parse(parser, MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path, size = work.model(name), benchmarks.BENCHMARKS[name].batch_size
        data = work.samples(name, STEPS[name])
        for precision in values.precisions:
            plan = work.path / f"{name}.{precision}.qplan"
            words = ["--batch-size", size, "--loss", "cross-entropy", "--optimizer", "momentum", "--no-measure"]
            try:
                work.run(path, "-o", plan, "--precision", precision, *words)
                rates = [[rate(work, plan, data, size, workers) for workers in (1, 2)] for _ in range(values.rounds)]
            except peer.Failure as failure:
                failures.append(f"{name} {precision}: {failure}")
                continue
            one, two = np.median(rates, axis=0)
            if two < WANTED * one:
                failures.append(f"{name} {precision}: {two / one:.2f} times, {WANTED} wanted")
            rows.append([name, precision, f"{one:.1f}", f"{two:.1f}", f"{two / one:.2f}"])
            print(" ".join(rows[-1]), flush=True)
        data.unlink()
    peer.table(["model", "precision", "one worker", "two workers", "times"], rows)
    peer.finish(failures)


main()
