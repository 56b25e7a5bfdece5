"""Compares a step of one attention layer in bf16 and in int8 with the same formulas written in PyTorch.

    python tests/peers/attention.py [--qcompile PATH] [CASE ...]

`docs/quantization.md` states what is rounded where. Products are summed in f64 here; a value that falls between two
neighbours may round to either side, so the error of a gradient (L2 norm of the difference over that of the emulation)
must be at most LIMIT, and less than half of what rounding changes.
"""

import peer

peer.require("torch")

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

LIMIT = 4e-3
BATCH, LENGTH, HEADS, WIDTH, CLASSES = 8, 80, 2, 16, 5
# Queries whose gradients are summed in i32.
BLOCK = 64
SIZE = HEADS * WIDTH
KEPT = ["--keep", "f32=qkv*", "--keep", "f32=head*"]
CASES = {
    "bf16": ["--precision", "bf16"],
    "int8": ["--precision", "int8", *KEPT],
    "causal-bf16": ["--precision", "bf16"],
    "causal-int8": ["--precision", "int8", *KEPT],
    "forward-int8": ["--precision", "int8", "--quantize-ops", "forward", *KEPT],
    "backward-int8": ["--precision", "int8", "--quantize-ops", "backward", *KEPT],
    "products-int8": ["--precision", "int8", *KEPT],
}


def model(path, weights, name):
    """Queries, keys and values of one product, their attention, and a linear layer. A mask that is trained leaves
    attention as its products."""
    nodes, constants = [], dict(weights)

    def node(op, inputs, output, **attributes):
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))

    constants["parts"] = np.array([0, LENGTH, 3, HEADS, WIDTH], np.int64)
    constants["flat"] = np.array([0, LENGTH * SIZE], np.int64)
    constants["scale"] = np.array(WIDTH**-0.5, np.float32)
    for index in range(3):
        constants[str(index)] = np.array(index, np.int64)
    node("MatMul", ["x", "qkv.weight"], "qkv")
    node("Reshape", ["qkv", "parts"], "by_head")
    for index, part in enumerate("qkv"):
        node("Gather", ["by_head", str(index)], f"{part}_part", axis=2)
        node("Transpose", [f"{part}_part"], f"{part}_heads", perm=[0, 2, 3, 1] if part == "k" else [0, 2, 1, 3])
    node("MatMul", ["q_heads", "k_heads"], "scores")
    node("Mul", ["scores", "scale"], "scaled")
    last = "scaled"
    if name.startswith("causal"):
        constants["seen"] = np.tril(np.ones((1, 1, LENGTH, LENGTH), bool))
        constants["hidden"] = np.array(-np.inf, np.float32)
        node("Where", ["seen", "scaled", "hidden"], "masked")
        last = "masked"
    if name.startswith("products"):
        constants["mask"] = np.zeros((1, 1, LENGTH, LENGTH), np.float32)
        node("Add", ["scaled", "mask"], "masked")
        last = "masked"
    node("Softmax", [last], "p", axis=-1)
    node("MatMul", ["p", "v_heads"], "mixed")
    node("Transpose", ["mixed"], "rows", perm=[0, 2, 1, 3])
    node("Reshape", ["rows", "flat"], "together")
    node("MatMul", ["together", "head.weight"], "head")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", LENGTH, SIZE])]
    outputs = [helper.make_tensor_value_info("head", TensorProto.FLOAT, ["N", CLASSES])]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)


def bf16(x):
    return x.float().to(torch.bfloat16).double()


def codes(x):
    scale = max(float(x.abs().max()) / 127, 1e-30)
    return torch.round(x / scale) * scale


def same(x):
    return x


def along(x, dim, steps=127):
    """Codes of a scale for each index but those of `dim`, and the scales."""
    scale = torch.clamp(x.abs().amax(dim=dim, keepdim=True) / steps, min=1e-30)
    return torch.round(x / scale), scale


def coded_gradients(q, k, v, e, dy):
    """Those of queries, keys and values in int8."""
    total = e.sum(dim=-1, keepdim=True)
    first, scale = along(dy, -1)
    rest = torch.round((dy - first * scale) / (scale / 254)) * (scale / 254)
    dp = (first * scale + rest) @ v.transpose(2, 3)
    p = e / total
    slopes, steps = along(p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * WIDTH**-0.5, -1)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    for rows in torch.arange(LENGTH).split(BLOCK):
        right, scale = along((steps * q)[:, :, rows], -2)
        dk += slopes[:, :, rows].transpose(2, 3) @ (right * scale)
        right, scale = along((dy / total)[:, :, rows], -2)
        dv += torch.round(e * 127)[:, :, rows].transpose(2, 3) / 127 @ (right * scale)
    return [slopes * steps @ k, dk, dv]


def exponentials(q, k, causal):
    scores = q @ k.transpose(2, 3) * WIDTH**-0.5
    if causal:
        scores = scores + torch.triu(torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64), 1)
    return torch.exp(scores - scores.amax(dim=-1, keepdim=True))


def step(weights, x, label, name, kind):
    """The loss and the gradients of one step."""
    causal, products = name.startswith("causal"), name.startswith("products")
    low = bf16 if kind == "bf16" else same
    forward, backward = (kind == "int8" and not name.startswith(other) for other in ("backward", "forward"))
    product = codes if forward else low
    narrow = (lambda e: torch.round(e * 127) / 127) if forward else low
    w, head = low(weights["qkv.weight"]), low(weights["head.weight"])
    x = low(x)
    qkv = low(x @ w).reshape(-1, LENGTH, 3, HEADS, WIDTH)
    q, k, v = (product(qkv[:, :, part].transpose(1, 2)) for part in range(3))
    e = exponentials(q, k, causal)
    total = e.sum(dim=-1, keepdim=True)
    p = e / total
    read, mixed = (product(p), product(p) @ v) if products else (low(p), narrow(e) @ v / total)
    y = low(mixed.transpose(1, 2).reshape(-1, LENGTH * SIZE))
    logits = (y @ head).requires_grad_()
    loss = F.cross_entropy(logits, label)
    loss.backward()
    dlogits = low(logits.grad)
    dy = low(dlogits @ head.T).reshape(-1, LENGTH, HEADS, WIDTH).transpose(1, 2)
    if backward and not products:
        parts = coded_gradients(codes(q), codes(k), codes(v), e if forward else exponentials(codes(q), codes(k), causal), dy)
    else:
        rounded = codes if backward else low
        dy = rounded(dy)
        dp = dy @ v.transpose(2, 3)
        ds = rounded(p * (dp - (p * dp).sum(dim=-1, keepdim=True)) * WIDTH**-0.5)
        parts = [ds @ k, ds.transpose(2, 3) @ q, read.transpose(2, 3) @ dy]
    dqkv = low(torch.stack([part.transpose(1, 2) for part in parts], dim=2)).reshape(-1, 3 * SIZE)
    gradients = {"qkv.weight": x.reshape(-1, SIZE).T @ dqkv, "head.weight": y.T @ dlogits}
    return loss.item(), {key: value.detach().numpy() for key, value in gradients.items()}


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], CASES), CASES)
    work = peer.Workspace(values)
    random = np.random.default_rng(11)
    weights = {
        "qkv.weight": random.normal(0, 0.4, (SIZE, 3 * SIZE)).astype(np.float32),
        "head.weight": random.normal(0, 0.05, (LENGTH * SIZE, CLASSES)).astype(np.float32),
    }
    x, label = random.normal(0, 1, (BATCH, LENGTH, SIZE)).astype(np.float32), random.integers(0, CLASSES, BATCH)
    np.savez(work.path / "batch.npz", x=x, label=label)
    x, label = torch.from_numpy(x).double(), torch.from_numpy(label)
    real = {key: torch.from_numpy(value).double() for key, value in weights.items()}
    rows, failures = [], []
    for name in values.names:
        model(work.path / "attention.onnx", weights, name)
        loss, wanted = step(real, x, label, name, name.split("-")[-1])
        _, exact = step(real, x, label, name, "f32")
        try:
            words = ["--loss", "cross-entropy", "--optimizer", "sgd", "--no-measure", "-q", "-o", "attention.qplan"]
            work.run("attention.onnx", *CASES[name], *words)
            words = ["--loss", "cross-entropy", "--inputs", "batch.npz", "--gradients", "gradients.npz"]
            work.run("run", "attention.qplan", *words)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        got = peer.gradients(work.path / "gradients.npz")
        error = max(peer.distance(got, wanted), abs(float(got["loss"]) - loss) / loss)
        change = peer.distance(wanted, exact)
        good = error <= LIMIT and error < change / 2
        row, failed = peer.judge(name, error, change, good)
        rows, failures = [*rows, row], failures + failed
    peer.table(["case", "error", "rounding", ""], rows)
    peer.finish(failures)


main()
