"""Measures one f32 training step against PyTorch's, with the same number of threads.

    python tests/peers/speed.py [--qcompile PATH] [--onnx FOLDER] [--rounds N] [MODEL ...]

Rounds alternate between `qcompile bench`, PyTorch eager and PyTorch channels-last (the
networks with convolutions), so that a slow moment of the machine meets all of them; the
medians are compared, PyTorch by its better layout. "First step" is the wall time of a whole
process that starts, compiles and makes one step; "peak" is that process's resident memory
after five steps. Fails when a target (column "wanted") is missed.
"""

import peer

peer.require("torch", "torchvision")

import json
import pathlib
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F

import benchmarks

MODELS = benchmarks.BENCHMARKS
# The least speed against PyTorch, and the longest time to the end of the first step in seconds.
SPEED = {"mlp": 1.0, "resnet20": 1.0, "lstm": 1.0, "gru": 1.0}
FIRST = {"mlp": 1.0}
MEMORY = 0.5


class Step:
    """One PyTorch training step: momentum SGD on a fixed batch."""

    def __init__(self, name, channels_last=False):
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = benchmarks.build(name).train().to(memory_format=layout)
        x, label = benchmarks.batch(name)
        self.x, self.label = torch.from_numpy(x), torch.from_numpy(label)
        if channels_last:
            self.x = self.x.contiguous(memory_format=layout)
        self.update = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)

    def __call__(self):
        self.update.zero_grad()
        F.cross_entropy(self.net(self.x), self.label).backward()
        self.update.step()

    def median_ms(self, seconds):
        """The median of as many steps as fit in the time, at least five."""
        self()
        times, end = [], time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            self()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)


# Linux counts what a process was before its exec into its peak, so the measured one is
# started from a small process, not from this one with PyTorch in it.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss / 1024, file=sys.stderr)
sys.exit(1 if status else 0)
"""


def measure_process(command):
    """Runs a process to its end; returns its seconds and its peak resident memory in MiB."""
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *map(str, command)]
    done = subprocess.run(launcher, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise peer.Failure(f"{pathlib.Path(command[0]).name} failed: {done.stderr.strip()[-500:]}")
    seconds, peak = done.stderr.split()[-2:]
    return float(seconds), float(peak)


def processes(work, name, path, threads, rounds):
    """Median seconds to the first step and peak MiB, ours then PyTorch's."""
    size = benchmarks.BENCHMARKS[name].batch_size
    results = {}
    for steps in (1, 5):
        x, label = benchmarks.batch(name, size * steps)
        data = work.path / f"{name}.{steps}.npz"
        np.savez(data, x=x, label=label.reshape(len(x), -1) if len(label) > len(x) else label)
        ours = [work.qcompile, "train", path, "--data", data, "--epochs", 1, "--batch-size", size, "--threads", threads]
        ours += ["--precision", "f32", "--loss", "cross-entropy", "--optimizer", "momentum", "--lr", 1e-3]
        torchs = [sys.executable, __file__, "--child", name, steps, threads]
        pairs = [
            [measure_process(command) for command in (ours, torchs)]
            for _ in range(rounds if steps == 1 else 1)
        ]
        results[steps] = [tuple(statistics.median(pair[side][i] for pair in pairs) for i in (0, 1)) for side in (0, 1)]
    return [(results[1][side][0], results[5][side][1]) for side in (0, 1)]


def steps(work, name, path, values):
    """Median step times in ms over the rounds: ours, then PyTorch's better layout."""
    plan = work.path / f"{name}.qplan"
    size = benchmarks.BENCHMARKS[name].batch_size
    words = ["--batch-size", size, "--precision", "f32", "--loss", "cross-entropy", "--optimizer", "momentum"]
    work.run(path, "-o", plan, *words)
    layouts = [Step(name)]
    if benchmarks.BENCHMARKS[name].convolutional:
        layouts.append(Step(name, channels_last=True))
    ours, theirs = [], [[] for _ in layouts]
    for _ in range(values.rounds):
        document = json.loads(work.run("bench", plan, "--threads", values.threads, "--json"))
        ours.append(document["step_ms"]["median"])
        for times, layout in zip(theirs, layouts):
            times.append(layout.median_ms(values.seconds))
    return statistics.median(ours), min(statistics.median(times) for times in theirs)


def child(name, count, threads):
    """The process that PyTorch's start and memory are measured with."""
    torch.set_num_threads(int(threads))
    step = Step(name)
    for _ in range(int(count)):
        step()


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of PyTorch steps in each round")
    parser.add_argument("--threads", type=int, default=2)
    values = peer.parse(parser, MODELS)
    torch.set_num_threads(values.threads)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        try:
            our_ms, their_ms = steps(work, name, path, values)
            (our_first, our_peak), (their_first, their_peak) = processes(work, name, path, values.threads, values.rounds)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        speed, wanted = their_ms / our_ms, SPEED.get(name)
        if wanted and speed < wanted:
            failures.append(f"{name}: {speed:.2f}x PyTorch's speed, {wanted:.2f}x wanted")
        if name in FIRST and our_first > FIRST[name]:
            failures.append(f"{name}: first step after {our_first:.2f} s, {FIRST[name]:.2f} s wanted")
        if our_peak > MEMORY * their_peak:
            failures.append(f"{name}: peak {our_peak:.0f} MiB, at most {MEMORY * their_peak:.0f} MiB wanted")
        rows.append(
            [name, f"{our_ms:.2f}", f"{their_ms:.2f}", f"{speed:.2f}x", f"{wanted:.2f}x" if wanted else "-"]
            + [f"{our_first:.2f}", f"{their_first:.2f}", f"{our_peak:.0f}", f"{their_peak:.0f}"]
        )
    head = ["model", "step ms", "PyTorch", "speed", "wanted", "first step s", "PyTorch", "peak MiB", "PyTorch"]
    peer.table(head, rows)
    peer.finish(failures)


if sys.argv[1:2] == ["--child"]:
    child(*sys.argv[2:])
else:
    main()
