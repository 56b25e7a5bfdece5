"""Follows PyTorch's loss for 50 steps from the same weights on the same batches, in f32.

    python tests/peers/losses.py [--qcompile PATH] [--onnx FOLDER] [MODEL ...]

Passes when every step's loss is within 1e-3 of PyTorch's, relatively. ResNet-20's batch
statistics amplify rounding: it is held to 1e-3 for 20 steps and to 1e-2 after them, at a tenth
of the others' learning rates (at theirs, PyTorch's own f32 losses are 7e-3 from its f64 ones
within 20 steps, and 4e-2 within 50).
"""

import peer

peer.require("torch")

import numpy as np
import torch
import torch.nn.functional as F

import benchmarks

MODELS = ("mlp", "resnet20", "bert", "lstm", "gru")
OPTIMIZERS = {"momentum": 1e-2, "adamw": 1e-3}
# Factor of the learning rate.
SLOWER = {"resnet20": 0.1}
STEPS = 50
# Small batches keep the run short; the arithmetic is the same.
SAMPLES = {"mlp": 32, "resnet20": 16, "bert": 4, "lstm": 8, "gru": 8}


def reference(name, path, optimizer, rate, x, label):
    """PyTorch's loss before each update, over consecutive slices of the data."""
    net = benchmarks.build(name).train()
    peer.load_weights(net, path)
    if optimizer == "adamw":
        update = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    else:
        update = torch.optim.SGD(net.parameters(), lr=rate, momentum=0.9)
    losses, rows = [], len(label) // STEPS
    samples = len(x) // STEPS
    for step in range(STEPS):
        update.zero_grad()
        logits = net(torch.from_numpy(x[step * samples : (step + 1) * samples]))
        loss = F.cross_entropy(logits, torch.from_numpy(label[step * rows : (step + 1) * rows]))
        loss.backward()
        update.step()
        losses.append(loss.item())
    return np.array(losses)


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], MODELS), MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        samples = SAMPLES[name]
        x, label = benchmarks.batch(name, samples * STEPS)
        data = work.path / f"{name}.npz"
        np.savez(data, x=x, label=label if len(label) == len(x) else label.reshape(len(x), -1))
        for optimizer, rate in OPTIMIZERS.items():
            rate = rate * SLOWER.get(name, 1)
            wanted = reference(name, path, optimizer, rate, x, label)
            words = ["train", path, "--data", data, "--epochs", 1, "--batch-size", samples, "--precision", "f32"]
            words += ["--loss", "cross-entropy", "--optimizer", optimizer, "--lr", rate]
            words += ["--momentum", 0.9] if optimizer == "momentum" else ["--weight-decay", 0.01]
            words += ["--no-shuffle", "--log-every", 1, "--json"]
            case = f"{name} {optimizer}"
            try:
                steps = [line for line in peer.json_lines(work.run(*words)) if "step" in line and "samples_per_s" not in line]
            except peer.Failure as failure:
                failures.append(f"{case}: {failure}")
                continue
            got = np.array([line["loss"] for line in steps])
            if got.shape != wanted.shape:
                failures.append(f"{case}: {len(got)} steps were logged, {STEPS} expected")
                continue
            error = np.abs(got - wanted) / np.abs(wanted)
            limit = np.full(STEPS, 1e-3)
            if name == "resnet20":
                limit[20:] = 1e-2
            good = bool(np.all(error <= limit))
            if not good:
                step = int(np.argmax(error / limit))
                failures.append(f"{case}: step {step}: loss {got[step]:.6f}, PyTorch {wanted[step]:.6f}")
            rows.append(
                [case, f"{wanted[0]:.4f}", f"{wanted[-1]:.4f}", f"{got[-1]:.4f}"]
                + [f"{error[:20].max():.1e}", f"{error[20:].max():.1e}", "ok" if good else "FAILED"]
            )
    peer.table(["model, optimizer", "first", "last, PyTorch", "last, qcompile", "worst 1-20", "worst 21-50", ""], rows)
    peer.finish(failures)


main()
