"""Compares the gradients of one batch with PyTorch's, every parameter of the networks.

    python tests/peers/gradients.py [--qcompile PATH] [--onnx FOLDER] [MODEL ...]

The error of a tensor is the L2 norm of the difference over the L2 norm of PyTorch's
gradient (or over 1e-5 of the model's largest, where the gradient is all but zero);
it must be at most 1e-3, and the loss must agree to 1e-4.

With millions of activations in each layer, some lie so near to a ReLU's corner that
rounding alone decides their side, and each that changes sides moves the gradient by far
more than rounding does: PyTorch's own f32 gradients of the two large convolutional networks
differ from its f64 ones by up to 0.15. So these two are compared with the affine parameters of their
normalisations set to keep activations off the corners: half of the channels mostly
above, half mostly below.
"""

import peer

peer.require("torch", "torchvision")

import numpy as np
import onnx
import torch
import torch.nn.functional as F

import benchmarks

MODELS = benchmarks.BENCHMARKS
LIMIT, LOSS_LIMIT, FLOOR = 1e-3, 1e-4, 1e-5
STEADIED = {"resnet18", "mobilenetv2"}
SAMPLES = {"mlp": 32, "resnet20": 16, "resnet18": 4, "mobilenetv2": 4, "bert": 4, "gpt": 2, "lstm": 8, "gru": 8}


def steadied(name, path, out):
    """Writes the model with every normalised activation drawn from N(+-1.5, 0.35), by channel."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for prefix, module in benchmarks.build(name).named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            channels = module.num_features
            weight = np.full(channels, 0.35, np.float32)
            bias = np.where(np.arange(channels) % 2, -1.5, 1.5).astype(np.float32)
            for key, array in (("weight", weight), ("bias", bias)):
                tensor = f"{prefix}.{key}"
                stored[tensor].CopyFrom(onnx.numpy_helper.from_array(array, tensor))
    onnx.save(model, out)
    return out


def reference(name, path, x, label):
    """PyTorch's loss and gradients, computed in f64 so that its own rounding does not count."""
    net = benchmarks.build(name).train()
    peer.load_weights(net, path)
    net = net.double()
    inputs = torch.from_numpy(x)
    loss = F.cross_entropy(net(inputs.double() if inputs.is_floating_point() else inputs), torch.from_numpy(label))
    loss.backward()
    return loss.item(), {key: value.grad.numpy() for key, value in net.named_parameters()}


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], MODELS), MODELS)
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        path = work.model(name)
        if name in STEADIED:
            path = steadied(name, path, work.path / f"{name}.steadied.onnx")
        x, label = benchmarks.batch(name, SAMPLES[name])
        loss, wanted = reference(name, path, x, label)
        np.savez(work.path / "batch.npz", x=x, label=label)
        try:
            words = ["run", path, "--precision", "f32", "--loss", "cross-entropy"]
            work.run(*words, "--inputs", "batch.npz", "--gradients", "gradients.npz")
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        with np.load(work.path / "gradients.npz") as file:
            got = {key: file[key] for key in file.files}
        loss_error = abs(float(got["loss"]) - loss) / abs(loss)
        floor = FLOOR * max(np.linalg.norm(tensor) for tensor in wanted.values())
        errors = {}
        for key, tensor in wanted.items():
            if key in got and got[key].shape == tensor.shape:
                errors[key] = np.linalg.norm(got[key] - tensor) / max(np.linalg.norm(tensor), floor)
            else:
                errors[key] = np.inf
        # A NaN must not pass as the smallest error.
        worst = max(errors, key=lambda key: np.inf if np.isnan(errors[key]) else errors[key])
        good = errors[worst] <= LIMIT and loss_error <= LOSS_LIMIT
        if not good:
            bad = sum(not error <= LIMIT for error in errors.values())
            failures.append(f"{name}: {bad} of {len(errors)} gradients differ, the worst is {worst}")
        rows.append([name, len(errors), f"{loss_error:.1e}", f"{errors[worst]:.1e}", worst, "ok" if good else "FAILED"])
    peer.table(["model", "tensors", "loss error", "worst error", "of", ""], rows)
    peer.finish(failures)


main()
