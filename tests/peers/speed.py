"""Measures one training step against PyTorch's, with the same number of threads.

    python tests/peers/speed.py [--qcompile PATH] [--onnx FOLDER] [--rounds N] [--precisions f32,bf16] [MODEL ...]

Rounds alternate between `qcompile bench` in each precision and PyTorch eager in f32 and under
bf16 autocast, each contiguous and (the networks with convolutions) channels-last, so that a
slow moment of the machine meets all of them. Medians are compared: f32 with PyTorch's best
f32, other precisions with PyTorch's best of any. "First step" is the wall time of a whole
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

import torch
import torch.nn.functional as F

import benchmarks

MODELS = benchmarks.BENCHMARKS
# The least speed against PyTorch (f32, then other precisions), and the longest time to the end of
# the first step in seconds.
F32 = {"resnet20": 1.5, "mobilenetv2": 1.5}
LOW = {"mlp": 1.6, "resnet20": 1.6, "mobilenetv2": 1.6, "gpt": 1.6}
SPEED = 1.2
FIRST = {"mlp": 1.0, "resnet20": 1.0, "bert": 1.0}
FIRST_OTHERS = 2.0
MEMORY = 0.5
ADAMW = ("bert", "gpt")


class Step:
    """One PyTorch training step on a fixed batch: AdamW for transformers, else momentum SGD."""

    def __init__(self, name, channels_last=False, bf16=False):
        self.bf16 = bf16
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self.net = benchmarks.build(name).train().to(memory_format=layout)
        x, label = benchmarks.batch(name)
        self.x, self.label = torch.from_numpy(x), torch.from_numpy(label)
        if channels_last:
            self.x = self.x.contiguous(memory_format=layout)
        parameters = self.net.parameters()
        if name in ADAMW:
            self.update = torch.optim.AdamW(parameters, lr=1e-4)
        else:
            self.update = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)

    def __call__(self):
        self.update.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = F.cross_entropy(self.net(self.x).float(), self.label)
        loss.backward()
        self.update.step()


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


def optimizer(name):
    return "adamw" if name in ADAMW else "momentum"


def processes(work, name, path, precision, values):
    """Median seconds to the first step and peak MiB, ours then PyTorch's."""
    threads, rounds = values.threads, values.rounds
    size = benchmarks.BENCHMARKS[name].batch_size
    results = {}
    for steps in (1, 5):
        data = work.samples(name, steps)
        ours = [work.qcompile, "train", path, "--data", data, "--epochs", 1, "--batch-size", size, "--threads", threads]
        ours += ["--precision", precision, "--loss", "cross-entropy", "--optimizer", optimizer(name), "--lr", 1e-3]
        torchs = [sys.executable, __file__, "--child", name, steps, threads, precision]
        pairs = [
            [measure_process(command) for command in (ours, torchs)]
            for _ in range(rounds if steps == 1 else 1)
        ]
        results[steps] = [tuple(statistics.median(pair[side][i] for pair in pairs) for i in (0, 1)) for side in (0, 1)]
    return [(results[1][side][0], results[5][side][1]) for side in (0, 1)]


def steps(work, name, path, values):
    """Median step times in ms over the rounds: ours by precision, then PyTorch's best f32 and best of any."""
    size = benchmarks.BENCHMARKS[name].batch_size
    words = ["--batch-size", size, "--loss", "cross-entropy", "--optimizer", optimizer(name), "--no-measure"]
    ours = {}
    for precision in values.precisions:
        plan = work.path / f"{name}.{precision}.qplan"
        work.run(path, "-o", plan, "--precision", precision, *words)
        ours[plan] = []
    layouts = [False, True] if benchmarks.BENCHMARKS[name].convolutional else [False]
    theirs = {(bf16, layout): [] for bf16 in (False, True) for layout in layouts}
    made = {(bf16, layout): Step(name, layout, bf16) for bf16, layout in theirs}
    for _ in range(values.rounds):
        for plan, times in ours.items():
            document = json.loads(work.run("bench", plan, "--threads", values.threads, "--json"))
            times.append(document["step_ms"]["median"])
        for key, times in theirs.items():
            made[key]()
            times.append(peer.median_ms(made[key], values.seconds))
    median = {key: statistics.median(times) for key, times in theirs.items()}
    f32 = min(time for (bf16, _), time in median.items() if not bf16)
    return [statistics.median(times) for times in ours.values()], f32, min(median.values())


def child(name, count, threads, precision):
    """The process that PyTorch's start and memory are measured with."""
    torch.set_num_threads(int(threads))
    step = Step(name, bf16=precision != "f32")
    for _ in range(int(count)):
        step()


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of PyTorch steps in each round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["f32", "bf16"])
    parser.add_argument("--steps-only", action="store_true", help="neither start nor memory")
    values = peer.parse(parser, MODELS)
    torch.set_num_threads(values.threads)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        try:
            times, their_f32, their_best = steps(work, name, path, values)
            for precision, our_ms in zip(values.precisions, times):
                their_ms = their_f32 if precision == "f32" else their_best
                wanted = (F32 if precision == "f32" else LOW).get(name, SPEED)
                speed = their_ms / our_ms
                row = [name, precision, f"{our_ms:.2f}", f"{their_ms:.2f}", f"{speed:.2f}x", f"{wanted:.2f}x"]
                if speed < wanted:
                    failures.append(f"{name} {precision}: {speed:.2f}x PyTorch's speed, {wanted:.2f}x wanted")
                if not values.steps_only:
                    (first, peak), (their_first, their_peak) = processes(work, name, path, precision, values)
                    row += [f"{first:.2f}", f"{their_first:.2f}", f"{peak:.0f}", f"{their_peak:.0f}"]
                    longest = FIRST.get(name, FIRST_OTHERS)
                    if first > longest:
                        failures.append(f"{name} {precision}: first step after {first:.2f} s, {longest:.2f} s wanted")
                    if peak > MEMORY * their_peak:
                        most = MEMORY * their_peak
                        failures.append(f"{name} {precision}: peak {peak:.0f} MiB, at most {most:.0f} MiB wanted")
                rows.append(row)
                print(" ".join(row), file=sys.stderr, flush=True)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
    head = ["model", "precision", "step ms", "PyTorch", "speed", "wanted"]
    if not values.steps_only:
        head += ["first step s", "PyTorch", "peak MiB", "PyTorch"]
    peer.table(head, rows)
    peer.finish(failures)


if sys.argv[1:2] == ["--child"]:
    child(*sys.argv[2:])
else:
    main()
