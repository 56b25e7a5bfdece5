"""Compares steps of LSTM, GRU and RNN in bf16 and int8 with the same formulas written in PyTorch.

    python tests/peers/recurrent_precision.py [--qcompile PATH] [CASE ...]

Every case compiles a small model whose recurrent products alone are of low precision (all other layers are
kept in f32) and compares loss and gradients with an emulation: operands rounded as
`docs/quantization.md` states it, sums in f64. A value between two numbers may round to either side, so the
error of a gradient (L2 norm of the difference over that of the emulation) must be at most LIMIT; what
rounding changes is far above that, which is checked against the step that rounds nothing.
"""

import peer

peer.require("torch")

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

LIMIT = 3e-4
STEPS, BATCH, INPUTS, HIDDEN, CLASSES = 7, 24, 5, 40, 6
# The operator of each cell, its gates and its attributes.
CELLS = {
    "lstm": ("LSTM", 4, {}),
    "gru": ("GRU", 3, {}),
    "linear-gru": ("GRU", 3, {"linear_before_reset": 1}),
    "rnn": ("RNN", 1, {}),
}
# Flags, and what the products read forward, on the way back, and for the gradient of R.
PRECISIONS = {
    "bf16": (["--precision", "bf16"], "bf16", "bf16", "bf16"),
    "bf16-forward": (["--precision", "bf16", "--quantize-ops", "forward"], "bf16", None, None),
    "int8": (["--precision", "int8"], "int8", "int8", None),
    "int8-forward": (["--precision", "int8", "--quantize-ops", "forward"], "int8", None, None),
    "int8-backward": (["--precision", "int8", "--quantize-ops", "backward"], None, "int8", None),
    "int8-within-bf16": (["--precision", "bf16+int8", "--threshold", "1e30"], "int8", "int8", "bf16"),
}
CASES = [f"{cell}-{precision}" for cell in CELLS for precision in PRECISIONS]


def bf16(x):
    return x.to(torch.bfloat16).to(x.dtype)


def codes(x, scale):
    return torch.clamp(torch.round(x.float() / scale), -127, 127).double() * scale.double()


def along(x, dim):
    """Codes of a scale for each index but those of `dim`."""
    scale = torch.clamp(x.float().abs().amax(dim=dim, keepdim=True) / 127, min=1e-30)
    return codes(x, scale)


class Product(torch.autograd.Function):
    """`h Rᵀ`, with the operands of each of the three products rounded."""

    @staticmethod
    def forward(context, h, r, forward, backward, weight):
        context.save_for_backward(h, r)
        context.precisions = backward, weight
        if forward == "bf16":
            h, r = bf16(h), bf16(r)
        elif forward == "int8":
            h, r = codes(h, torch.tensor(1 / 127)), along(r, 1)
        return h @ r.T

    @staticmethod
    def backward(context, d):
        h, r = context.saved_tensors
        backward, weight = context.precisions
        dr = bf16(d).T @ bf16(h) if weight == "bf16" else d.T @ h
        if backward == "bf16":
            d, r = bf16(d), bf16(r)
        elif backward == "int8":
            # Each gate by itself: a scale for each row of its gradient, and one for each column of R.
            d = along(d.reshape(len(d), -1, HIDDEN), 2).reshape(d.shape)
            r = along(r.reshape(-1, HIDDEN, HIDDEN), 1).reshape(r.shape)
        return d @ r, dr, None, None, None


def step(cell, weights, x, label, *precisions):
    """The loss and the gradients of one step."""
    weights = {key: torch.from_numpy(value).double().requires_grad_() for key, value in weights.items()}
    w, r, b, v = weights["W"][0], weights["R"][0], weights["B"][0], weights["V"]
    rows = HIDDEN * CELLS[cell][1]
    product = lambda h, r: Product.apply(h, r, *precisions)
    h = c = torch.zeros(BATCH, HIDDEN, dtype=torch.float64)
    outside, inner = b[:rows], b[rows:]
    gate = lambda values, at: values[..., at * HIDDEN : (at + 1) * HIDDEN]
    of = lambda at: r[at * HIDDEN : (at + 1) * HIDDEN]
    for at in x.double().unbind(1):
        given = at @ w.T + outside
        if cell == "rnn":
            h = torch.tanh(given + inner + product(h, r))
        elif cell == "lstm":
            i, o, f, g = torch.split(given + inner + product(h, r), HIDDEN, dim=1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        else:
            z, reset = (torch.sigmoid(gate(given, k) + gate(inner, k) + product(h, of(k))) for k in (0, 1))
            if cell == "gru":
                n = gate(given, 2) + gate(inner, 2) + product(reset * h, of(2))
            else:
                n = gate(given, 2) + reset * (product(h, of(2)) + gate(inner, 2))
            h = (1 - z) * torch.tanh(n) + z * h
    loss = F.cross_entropy(h @ v, label)
    loss.backward()
    return loss.item(), {key: value.grad.numpy() for key, value in weights.items()}


def model(cell, weights):
    op, _, attributes = CELLS[cell]
    outputs = ["Y", "last"]
    nodes = [
        helper.make_node(op, ["x", "W", "R", "B"], outputs, name="layer", hidden_size=HIDDEN, layout=1, **attributes),
        helper.make_node("Squeeze", ["last", "axes"], ["h"]),
        helper.make_node("MatMul", ["h", "V"], ["logits"], name="head"),
    ]
    initializers = [numpy_helper.from_array(value, key) for key, value in weights.items()]
    initializers.append(numpy_helper.from_array(np.array([1], np.int64), "axes"))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", STEPS, INPUTS])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    graph = helper.make_graph(nodes, "g", [x], [logits], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], CASES), CASES)
    work = peer.Workspace(values)
    # Of these numbers none comes to lie so near to a border that it is rounded to the other side.
    random = np.random.default_rng(5)
    draw = lambda *shape: (random.standard_normal(shape) * 0.4).astype(np.float32)
    x, label = draw(BATCH, STEPS, INPUTS) * 3, random.integers(0, CLASSES, BATCH)
    np.savez(work.path / "batch.npz", x=x, label=label)
    layers = {}
    for cell, (_, gates, _) in CELLS.items():
        layers[cell] = {
            "W": draw(1, gates * HIDDEN, INPUTS),
            "R": draw(1, gates * HIDDEN, HIDDEN),
            "B": draw(1, 2 * gates * HIDDEN),
            "V": draw(HIDDEN, CLASSES),
        }
    rows, failures = [], []
    for name in values.names:
        cell, _, precision = name.partition("-") if not name.startswith("linear-gru") else ("linear-gru", "", name[11:])
        weights = layers[cell]
        onnx.save(model(cell, weights), work.path / "model.onnx")
        flags, *precisions = PRECISIONS[precision]
        given = (cell, weights, torch.from_numpy(x), torch.from_numpy(label))
        loss, wanted = step(*given, *precisions)
        _, exact = step(*given, None, None, None)
        try:
            keep = ["--keep", "f32=*.matmul", "--keep", "f32=head", "--loss", "cross-entropy", "--optimizer", "sgd"]
            work.run("model.onnx", *flags, *keep, "--no-measure", "-q", "-o", "model.qplan")
            work.run("run", "model.qplan", "--loss", "cross-entropy", "--inputs", "batch.npz", "--gradients", "out.npz")
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        got = peer.gradients(work.path / "out.npz")
        error, change = peer.distance(got, wanted), peer.distance(exact, wanted)
        error = max(error, abs(float(got["loss"]) - loss) / loss)
        good = error <= LIMIT and change > 2 * LIMIT
        row, failed = peer.judge(name, error, change, good)
        rows, failures = [*rows, row], failures + failed
    peer.table(["case", "error", "rounding", ""], rows)
    peer.finish(failures)


main()
