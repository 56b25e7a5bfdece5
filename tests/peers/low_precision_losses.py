"""Trains every benchmark in lower precision and in f32 on the same batches; their losses must stay together.

    python tests/peers/low_precision_losses.py [--qcompile PATH] [--onnx FOLDER] [--precisions bf16,bf16+int8] [MODEL ...]

The tasks can be learned but for a fifth of the labels, which are random, so that no loss goes to 0: pictures with a pattern of
their class in noise, tokens that follow one another by a table, and for BERT a function of each token.
Compared are the means of the last 20 of 200 steps, which must be within 2 %. Batch statistics amplify rounding: the networks with
convolutions are run in f32 on AVX2, too, whose sums are in another order, and the loss must be within 2 % of what lies between
(MobileNetV2 ends at 1.60 on AVX-512, at 1.42 on AVX2, both f32).
"""

import peer

peer.require("torch", "torchvision")

import numpy as np

import benchmarks

MODELS = benchmarks.BENCHMARKS
STEPS, LAST, LIMIT = 200, 20, 0.02
SAMPLES = {"mlp": 64, "resnet20": 64, "resnet18": 8, "mobilenetv2": 8, "bert": 8, "gpt": 4, "lstm": 16, "gru": 16}
OPTIMIZERS = {"bert": ("adamw", 3e-4), "gpt": ("adamw", 3e-4), "lstm": ("adamw", 3e-3), "gru": ("adamw", 3e-3)}
VOCABULARY = {"bert": 8192, "gpt": 65, "lstm": 96, "gru": 96}


def task(name, count):
    """Inputs and labels of so many samples."""
    random = np.random.default_rng(7)
    x, label = benchmarks.batch(name, count)
    noise = lambda size: random.random(size) < 0.2
    if name not in VOCABULARY:
        label = random.integers(0, 10, count)
        patterns = random.standard_normal((10, *x.shape[1:]), dtype=np.float32)
        if x.ndim == 4:
            # Of one value for each eighth of the picture, so that pooling keeps it.
            coarse = random.standard_normal((10, x.shape[1], 8, 8), dtype=np.float32)
            patterns = np.kron(coarse, np.ones((1, 1, x.shape[2] // 8, x.shape[3] // 8), np.float32))
        x = x + 0.5 * patterns[label]
        return x, np.where(noise(count), random.integers(0, 10, count), label)
    vocabulary, length = VOCABULARY[name], x.shape[1]
    if name == "bert":
        x = random.integers(0, 64, x.shape)
        label = x % 16
        label = np.where(noise(label.shape), random.integers(0, 16, label.shape), label)
        return x, label
    table = random.permutation(vocabulary)
    tokens = random.integers(0, vocabulary, (count, length + 1))
    for at in range(length):
        tokens[:, at + 1] = np.where(noise(count), tokens[:, at + 1], table[tokens[:, at]])
    return tokens[:, :-1], tokens[:, 1:]


def losses(work, name, path, data, precision, *more):
    """The loss of every step; `more` goes to `train`."""
    optimizer, rate = OPTIMIZERS.get(name, ("momentum", 1e-2))
    plan = work.path / "low.qplan"
    words = ["--batch-size", SAMPLES[name], "--loss", "cross-entropy", "--optimizer", optimizer, "--no-measure"]
    if "+" in precision:
        words += ["--metric", "weight-sqnr", "--max-loss-increase", 1e9, "--samples", 16]
    work.run(path, "-o", plan, "--precision", precision, *words)
    words = ["train", plan, "--data", data, "--epochs", 1, "--batch-size", SAMPLES[name], "--lr", rate]
    lines = peer.json_lines(work.run(*words, "--no-shuffle", "--log-every", 1, "--json", *more))
    steps = np.array([line["loss"] for line in lines if "step" in line and "samples_per_s" not in line])
    if len(steps) != STEPS:
        raise peer.Failure(f"{len(steps)} steps were logged, {STEPS} expected")
    return steps


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16"])
    values = peer.parse(parser, MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        x, label = task(name, SAMPLES[name] * STEPS)
        data = work.path / f"{name}.npz"
        np.savez(data, x=x, label=label)
        try:
            f32 = losses(work, name, path, data, "f32")
            ends = [f32[-LAST:].mean()]
            if benchmarks.BENCHMARKS[name].convolutional:
                ends.append(losses(work, name, path, data, "f32", "--tier", "avx2")[-LAST:].mean())
            for precision in values.precisions:
                got = losses(work, name, path, data, precision)[-LAST:].mean()
                if not min(ends) * (1 - LIMIT) <= got <= max(ends) * (1 + LIMIT):
                    failures.append(f"{name} {precision}: loss {got:.4f}, {ends[0]:.4f} in f32")
                other = f"{ends[1]:.4f}" if ends[1:] else ""
                row = [name, precision, f"{f32[0]:.4f}", f"{ends[0]:.4f}", other, f"{got:.4f}"]
                rows.append([*row, f"{100 * (got - ends[0]) / ends[0]:+.2f} %"])
                print(" ".join(rows[-1]), flush=True)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
    peer.table(["model", "precision", "first loss", "f32, last", "on AVX2", "low, last", "difference"], rows)
    peer.finish(failures)


main()
