"""Compares quantized steps of a small MLP with the same formulas written in PyTorch.

    python tests/peers/int8.py [--qcompile PATH] [CASE ...]

Every case compiles `models/digits_mlp.onnx` with its flags and compares loss and gradients of the plan
with an emulation: rounding as `docs/quantization.md` states it, products in f64. A value that falls
between two codes may round to either side, so the error of a gradient (L2 norm of the difference over
that of the emulation) must be at most LIMIT; what the flags change is far above that, which is checked
against the unquantized step. Stochastic rounding is judged by the mean over seeds, delayed scaling by
the parameters after two steps.
"""

import peer

peer.require("torch")

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

LIMIT, SEEDS, STEP = 1e-3, 24, 0.5
MODEL = peer.ROOT / "models" / "digits_mlp.onnx"
USUAL = dict(weight="int8", activation="int8", gradient="int8", granularity="channel", grad_weight="auto", base="f32")
W4A8G4 = dict(weight="int4", activation="int8", gradient="int4")
FLOAT8 = dict(weight="f8e4m3", activation="f8e4m3", gradient="f8e5m2")


def types(weight, activation, gradient):
    return ["--operand-types", f"weight={weight},activation={activation},gradient={gradient}"]


INT8 = ["--precision", "int8"]
WITHIN_BF16 = ["--precision", "bf16+int8", "--threshold", "1e30"]
CASES = {
    "int8": (INT8, {}),
    "granularity-tensor": ([*INT8, "--granularity", "tensor"], dict(granularity="tensor")),
    "granularity-row": ([*INT8, "--granularity", "row"], dict(granularity="row")),
    "grad-weight-int8": ([*INT8, "--grad-weight", "int8"], dict(grad_weight="int8")),
    "grad-weight-int8-row": ([*INT8, "--grad-weight", "int8", "--granularity", "row"], dict(grad_weight="int8", granularity="row")),
    "grad-weight-bf16": ([*INT8, "--grad-weight", "bf16"], dict(grad_weight="bf16")),
    "int4": ([*INT8, *types(**W4A8G4)], W4A8G4),
    "float8": ([*INT8, *types(**FLOAT8)], FLOAT8),
    "within-bf16": (WITHIN_BF16, dict(base="bf16")),
    "within-bf16-int8": ([*WITHIN_BF16, "--grad-weight", "int8"], dict(base="bf16", grad_weight="int8")),
    "forward-only": ([*INT8, "--quantize-ops", "forward"], dict(gradient=None)),
    "delayed": ([*INT8, "--scaling", "delayed"], {}),
    "stochastic": ([*INT8, "--rounding", "stochastic", *types("int8", "int8", "int4")], dict(gradient="int4")),
}


def bf16(x):
    return x.to(torch.bfloat16).to(torch.float32)


class Codes:
    """Rounds by the scale of the largest magnitude: of the tensor, or of each index of axis 0."""

    LARGEST = {"int8": 127.0, "int4": 7.0, "f8e4m3": 448.0, "f8e5m2": 57344.0}
    FLOATS = {"f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}

    def __init__(self):
        self.history = None
        self.seen = {}
        self.limit = {}

    def scale(self, name, x, kind, axis):
        magnitude = x.abs().amax(dim=1, keepdim=True) if axis == 0 else x.abs().amax()
        if self.history is not None and name:
            before = self.history.get(name, [])
            self.seen[name] = float(magnitude)
            magnitude = torch.tensor(max(before)) if before else magnitude
        return torch.clamp(magnitude / self.LARGEST[kind], min=1e-30)

    def __call__(self, name, x, kind, axis=None):
        scale, largest = self.scale(name, x, kind, axis), self.LARGEST[kind]
        self.limit[name] = (largest + 0.5) * scale
        codes = torch.clamp(x / scale, -largest, largest)
        if kind in self.FLOATS:
            codes = codes.to(self.FLOATS[kind]).to(torch.float32)
        return torch.round(codes) * scale if kind not in self.FLOATS else codes * scale

    def advance(self):
        """The end of a step."""
        for name, magnitude in self.seen.items():
            self.history[name] = [magnitude, *self.history.get(name, [])][:16]


def step(weights, x, label, how, codes):
    """The loss and the gradients of one step; `how` is None for one that rounds nothing."""
    exact = how is None
    how = {**USUAL, **(how or {})}
    stored = bf16 if how["base"] == "bf16" else (lambda x: x)
    rows = 0 if how["granularity"] == "row" else None
    channels = None if how["granularity"] == "tensor" else 0
    product = lambda a, b: (a.double() @ b.double()).float()
    # Forward.
    layers, value = ["fc1", "fc2"], stored(x * 0.0625)
    inputs, read, gate = {}, {}, {}
    for layer in layers:
        inputs[layer], weight = value, weights[f"{layer}.weight"]
        rounded = (value, weight)
        if not exact:
            rounded = (codes(f"{layer}.x", value, how["activation"], rows), codes(None, weight, how["weight"], channels))
        read[layer] = rounded[0]
        value = product(rounded[0], rounded[1].T) + weights[f"{layer}.bias"]
        if layer == "fc1":
            value = stored(torch.relu(value))
    logits = value.double().requires_grad_()
    loss = F.cross_entropy(logits, label)
    loss.backward()
    # Backward.
    dy, gradients = logits.grad.float(), {}
    for layer in reversed(layers):
        gradients[f"{layer}.bias"] = dy.sum(dim=0)
        dy = stored(dy)
        quantized = not exact and how["gradient"] is not None
        data, incoming = read[layer], dy
        if quantized and how["grad_weight"] == "int8":
            data = codes(f"{layer}.x", inputs[layer], how["activation"])
            incoming = codes(f"{layer}.dy", dy, how["gradient"])
        elif how["grad_weight"] == "bf16" or how["base"] == "bf16":
            data, incoming = bf16(inputs[layer]), bf16(dy)
        gradients[f"{layer}.weight"] = product(incoming.T, data)
        if layer == "fc2":
            weight = weights["fc2.weight"]
            if quantized:
                dy = codes(f"{layer}.dy", dy, how["gradient"], rows)
                weight = codes(None, weight, how["weight"])
            elif not exact:
                weight = codes(None, weight, how["weight"], channels)
            dy = stored(product(dy, weight)) * (inputs["fc2"] > 0)
            if not exact and codes.history is not None:
                # What was clamped has no gradient.
                dy = dy * (inputs["fc2"] <= codes.limit["fc2.x"])
    return loss.item(), {key: value.double().numpy() for key, value in gradients.items()}


def gradients(work, plan):
    work.run("run", plan, "--loss", "cross-entropy", "--inputs", "batch.npz", "--gradients", "gradients.npz")
    return peer.gradients(work.path / "gradients.npz")


def trained(work, plan, epochs, seed=0):
    """The parameters after this many steps of plain gradient descent on the whole batch."""
    folder, weights = f"{plan}.run{seed}", f"{plan}.{seed}.npz"
    rate = ["--lr", STEP, "--seed", seed, "--checkpoint", folder, "--batch-size", 64, "-q"]
    work.run("train", plan, "--data", "batch.npz", "--epochs", epochs, *rate)
    work.run("export", folder, "--format", "npz", "-o", weights)
    with np.load(work.path / weights) as file:
        return {key: file[key].astype(np.float64) for key in file.files if key.startswith("fc")}


def main():
    parser = peer.arguments(__doc__.splitlines()[0], CASES)
    values = peer.parse(parser, CASES)
    work = peer.Workspace(values)
    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(MODEL).graph.initializer}
    weights = {key: torch.from_numpy(value.copy()) for key, value in stored.items()}
    random = np.random.default_rng(7)
    x, label = random.uniform(0, 16, (64, 64)).astype(np.float32), random.integers(0, 10, 64)
    np.savez(work.path / "batch.npz", x=x, label=label)
    x, label = torch.from_numpy(x), torch.from_numpy(label)
    _, exact = step(weights, x, label, None, Codes())
    rows, failures = [], []
    for name in values.names:
        flags, how = CASES[name]
        plan = f"{name}.qplan"
        try:
            words = ["--loss", "cross-entropy", "--optimizer", "sgd", "--no-measure", "-q", "-o", plan]
            work.run(MODEL, *flags, *words)
            if name == "stochastic":
                check = stochastic
            else:
                check = delayed if name == "delayed" else nearest
            error, change = check(work, plan, weights, x, label, how, exact)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        limit = LIMIT if name != "stochastic" else 0.4
        good = error <= limit and change > 2 * LIMIT
        row, failed = peer.judge(name, error, change, good)
        rows, failures = [*rows, row], failures + failed
    peer.table(["case", "error", "rounding", ""], rows)
    peer.finish(failures)


def nearest(work, plan, weights, x, label, how, exact):
    """The error of a step, and how far that is from one that rounds nothing."""
    loss, wanted = step(weights, x, label, how, Codes())
    got = gradients(work, plan)
    error = max(peer.distance(got, wanted), abs(float(got["loss"]) - loss) / loss)
    return error, peer.distance(wanted, exact)


def delayed(work, plan, weights, x, label, how, exact):
    """Of the parameters after two steps, of which the second rounds by the scales of the first."""
    def two(history):
        codes, now = Codes(), dict(weights)
        codes.history = {} if history else None
        for _ in range(2):
            _, found = step(now, x, label, how, codes)
            now = {key: (value.double() - STEP * torch.from_numpy(found[key])).float() for key, value in now.items()}
            if history:
                codes.advance()
        return {key: value.double().numpy() - weights[key].double().numpy() for key, value in now.items()}
    got = trained(work, plan, epochs=2)
    moved = {key: value - weights[key].double().numpy() for key, value in got.items()}
    wanted = two(history=True)
    return peer.distance(moved, wanted), peer.distance(two(history=False), wanted)


def stochastic(work, plan, weights, x, label, how, exact):
    """The error of the mean over seeds relative to that of a single one, against activations and weights as they are
    rounded and gradients that are not; and the latter."""
    _, wanted = step(weights, x, label, {**how, "gradient": None}, Codes())
    wanted = {key: value for key, value in wanted.items() if key == "fc1.weight"}
    drawn = []
    for seed in range(SEEDS):
        after = trained(work, plan, epochs=1, seed=seed)
        drawn.append({key: (weights[key].double().numpy() - after[key]) / STEP for key in wanted})
    single = np.mean([peer.distance(one, wanted) for one in drawn])
    mean = {key: np.mean([one[key] for one in drawn], axis=0) for key in wanted}
    return peer.distance(mean, wanted) / single, single


main()
