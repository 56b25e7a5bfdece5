"""Compares the gradients of bf16 plans with PyTorch's, by what bf16 autocast itself loses.

    python tests/peers/bf16.py [--qcompile PATH] [--onnx FOLDER] [MODEL ...]

The error of a tensor is the L2 norm of its difference from PyTorch's f64 gradient over the
norm of that (or over 1e-5 of the model's largest, where the gradient is all but zero). In bf16 it is large where activations change sides of a ReLU, for PyTorch as
well; so the median over the tensors must be at most 1.25 times that of PyTorch under bf16
autocast (plus 1e-3), and so must their ninth decile. The loss must agree to 1 %.
"""

import peer

peer.require("torch", "torchvision")

import numpy as np
import torch
import torch.nn.functional as F

import benchmarks

MODELS = benchmarks.BENCHMARKS
RATIO, SLACK, LOSS_LIMIT, FLOOR = 1.25, 1e-3, 1e-2, 1e-5
SAMPLES = {"mlp": 128, "resnet20": 64, "resnet18": 8, "mobilenetv2": 8, "bert": 8, "gpt": 4, "lstm": 16, "gru": 16}


def reference(name, path, x, label, double):
    """PyTorch's loss and gradients: in f64, or in f32 under bf16 autocast."""
    net = benchmarks.build(name).train()
    peer.load_weights(net, path)
    inputs = torch.from_numpy(x)
    if double:
        net = net.double()
        inputs = inputs.double() if inputs.is_floating_point() else inputs
    with torch.autocast("cpu", torch.bfloat16, enabled=not double):
        logits = net(inputs)
        loss = F.cross_entropy(logits if double else logits.float(), torch.from_numpy(label))
    loss.backward()
    return loss.item(), {key: value.grad.double().numpy() for key, value in net.named_parameters()}


def errors(got, wanted):
    """Median and ninth decile of the tensors' errors; infinite if one is missing or not finite."""
    floor = FLOOR * max(np.linalg.norm(tensor) for tensor in wanted.values())
    found = []
    for key, tensor in wanted.items():
        if key not in got or got[key].shape != tensor.shape:
            return np.inf, np.inf
        found.append(np.linalg.norm(got[key] - tensor) / max(np.linalg.norm(tensor), floor))
    return (np.median(found), np.quantile(found, 0.9)) if np.isfinite(found).all() else (np.inf, np.inf)


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], MODELS), MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        x, label = benchmarks.batch(name, SAMPLES[name])
        loss, wanted = reference(name, path, x, label, double=True)
        _, theirs = reference(name, path, x, label, double=False)
        np.savez(work.path / "batch.npz", x=x, label=label)
        try:
            words = ["run", path, "--precision", "bf16", "--loss", "cross-entropy"]
            work.run(*words, "--inputs", "batch.npz", "--gradients", "gradients.npz")
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        with np.load(work.path / "gradients.npz") as file:
            got = {key: file[key] for key in file.files}
        loss_error = abs(float(got["loss"]) - loss) / abs(loss)
        ours, peers = errors(got, wanted), errors(theirs, wanted)
        near = all(our <= RATIO * their + SLACK for our, their in zip(ours, peers))
        good = near and loss_error <= LOSS_LIMIT
        if not good:
            failures.append(f"{name}: errors {ours[0]:.2e}, {ours[1]:.2e}; PyTorch's {peers[0]:.2e}, {peers[1]:.2e}")
        cells = [f"{error:.2e}" for pair in zip(ours, peers) for error in pair]
        rows.append([name, f"{loss_error:.1e}", *cells, "ok" if good else "FAILED"])
    peer.table(["model", "loss error", "median", "PyTorch", "9th decile", "PyTorch", ""], rows)
    peer.finish(failures)


main()
