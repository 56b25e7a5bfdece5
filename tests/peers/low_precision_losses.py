"""Trains every benchmark in lower precision and in f32 on the same batches; their losses must stay together.

    python tests/peers/low_precision_losses.py [--qcompile PATH] [--onnx FOLDER] [--precisions bf16,bf16+int8] [MODEL ...]

The tasks can be learned but for a fifth of the labels, which are random, so that no loss goes to 0: pictures with a pattern of
their class in noise, tokens that follow one another by a table, and for BERT a function of each token.
Compared are the means of the last 20 of 200 steps, which must be within 2 %.
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


def losses(work, name, path, data, precision):
    """The loss of every step."""
    optimizer, rate = OPTIMIZERS.get(name, ("momentum", 1e-2))
    plan = work.path / "low.qplan"
    words = ["--batch-size", SAMPLES[name], "--loss", "cross-entropy", "--optimizer", optimizer, "--no-measure"]
    if "+" in precision:
        words += ["--metric", "weight-sqnr", "--max-loss-increase", 1e9, "--samples", 16]
    work.run(path, "-o", plan, "--precision", precision, *words)
    words = ["train", plan, "--data", data, "--epochs", 1, "--batch-size", SAMPLES[name], "--lr", rate]
    lines = peer.json_lines(work.run(*words, "--no-shuffle", "--log-every", 1, "--json"))
    return np.array([line["loss"] for line in lines if "step" in line and "samples_per_s" not in line])


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
            for precision in values.precisions:
                low = losses(work, name, path, data, precision)
                if len(low) != STEPS or len(f32) != STEPS:
                    raise peer.Failure(f"{len(low)} and {len(f32)} steps were logged, {STEPS} expected")
                wanted, got = f32[-LAST:].mean(), low[-LAST:].mean()
                error = abs(got - wanted) / wanted
                if not error <= LIMIT:
                    failures.append(f"{name} {precision}: loss {got:.4f}, {wanted:.4f} in f32")
                row = [name, precision, f"{f32[0]:.4f}", f"{wanted:.4f}", f"{got:.4f}", f"{100 * (got - wanted) / wanted:+.2f} %"]
                rows.append(row)
                print(" ".join(row), flush=True)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
    peer.table(["model", "precision", "first loss", "f32, last", "low, last", "difference"], rows)
    peer.finish(failures)


main()
