"""Compares quantized ONNX graphs: results with ONNX Runtime's, gradients with those of PyTorch's fake quantization and
of learned step sizes (LSQ, Esser et al. 2020) as PyTorch computes them.

    python tests/peers/quantized.py [--qcompile PATH] [CASE ...]

A code may differ by one from ONNX Runtime's, where rounding of f32 decides, in at most one place in two hundred. The error of a gradient
is the L2 norm of the difference over the L2 norm of PyTorch's; it must be at most 1e-3, and the loss must agree to 1e-4.
"""

import peer

peer.require("torch", "onnxruntime")

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper

random = np.random.default_rng(7)
LIMIT, LOSS_LIMIT, ODD = 1e-3, 1e-4, 1 / 200
TYPES = {"i8": TensorProto.INT8, "u8": TensorProto.UINT8, "i4": TensorProto.INT4, "u4": TensorProto.UINT4}
RANGE = {"i8": (-128, 127), "u8": (0, 255), "i4": (-8, 7), "u4": (0, 15)}


def model(nodes, inputs, outputs, initializers=(), opset=21, microsoft=False):
    graph = helper.make_graph(nodes, "quantized", inputs, outputs, list(initializers))
    opsets = [helper.make_opsetid("", opset)] + ([helper.make_opsetid("com.microsoft", 1)] if microsoft else [])
    made = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return made


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs, outputs, **attributes)


def constant(name, array, kind=None):
    if kind in ("i4", "u4"):
        return helper.make_tensor(name, TYPES[kind], array.shape, array.astype(np.int8).flatten().tolist())
    return numpy_helper.from_array(np.asarray(array), name)


def ported(name, kind, shape):
    return helper.make_tensor_value_info(name, kind, shape)


# ---- results


def forward_cases():
    """Name, model, inputs, and whether results are codes."""
    x = random.normal(size=(4, 6)).astype(np.float32)
    f32, batch = TensorProto.FLOAT, ["N", 6]
    for kind, onnx_kind in TYPES.items():
        low, high = RANGE[kind]
        for way, scale, axis in (
            ("tensor", np.float32(0.02 if kind[1] == "8" else 0.3), 1),
            ("channel", random.uniform(0.01, 0.3, 6).astype(np.float32), 1),
        ):
            zero = np.full(scale.shape, 3 if low == 0 else -2, np.int8)
            zero = zero if kind[1] == "4" else zero.astype(np.int8 if kind == "i8" else np.uint8)
            pair = [
                node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=axis),
                node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=axis),
            ]
            constants = [constant("s", scale), constant("z", zero, kind)]
            made = model(pair, [ported("x", f32, batch)], [ported("y", f32, batch)], constants)
            yield f"{kind} by {way}", made, {"x": x}, float(np.max(scale))
        codes = random.integers(low, high + 1, (8, 12))
        codes = codes if kind[1] == "4" else codes.astype(np.int8 if kind == "i8" else np.uint8)
        for axis, block in ((0, 4), (1, 3), (1, 5)):
            blocks = list(codes.shape)
            blocks[axis] = -(-blocks[axis] // block)
            scale = random.uniform(0.01, 0.3, blocks).astype(np.float32)
            constants = [constant("q", codes, kind), constant("s", scale)]
            nodes = [
                node("DequantizeLinear", ["q", "s"], ["w"], axis=axis, block_size=block),
                node("MatMul", ["x", "w"], ["y"]),
            ]
            made = model(nodes, [ported("x", f32, ["N", 8])], [ported("y", f32, ["N", 12])], constants)
            yield f"{kind} weight, blocks of {block} along {axis}", made, {"x": random.normal(size=(3, 8)).astype(np.float32)}, 1e-4
    for name, kind in (("float8e4m3fn", TensorProto.FLOAT8E4M3FN), ("float8e5m2", TensorProto.FLOAT8E5M2)):
        zero = helper.make_tensor("z", kind, [], [0.0])
        pair = [node("QuantizeLinear", ["x", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])]
        made = model(pair, [ported("x", f32, batch)], [ported("y", f32, batch)], [constant("s", np.float32(0.01)), zero])
        yield name, made, {"x": x * 3}, 1e-6
    yield from microsoft_cases()


def microsoft_cases():
    for kind in (np.uint8, np.int8):
        low, high = (0, 256) if kind == np.uint8 else (-128, 128)
        tensor_kind = TensorProto.UINT8 if kind == np.uint8 else TensorProto.INT8
        a, b = (random.integers(low, high, (2, 4, 5, 5)).astype(kind) for _ in range(2))
        zero = lambda value: kind(value if kind == np.uint8 else value - 128)
        parameters = {"as": np.float32(0.02), "az": zero(120), "bs": np.float32(0.03), "bz": zero(130), "ys": np.float32(0.0471), "yz": zero(110)}
        constants = [constant(name, value) for name, value in parameters.items()]
        ports = [ported("a", tensor_kind, ["N", 4, 5, 5]), ported("b", tensor_kind, ["N", 4, 5, 5])]
        first, second, last = ["a", "as", "az"], ["b", "bs", "bz"], ["ys", "yz"]
        for op, inputs, attributes in (
            ("QLinearAdd", first + second + last, {}),
            ("QLinearMul", first + second + last, {}),
            ("QLinearSigmoid", first + last, {}),
            ("QLinearLeakyRelu", first + last, {"alpha": 0.1}),
            ("QLinearGlobalAveragePool", first + last, {}),
            ("QLinearAveragePool", first + last, {"kernel_shape": [2, 2], "strides": [2, 2]}),
            ("QLinearConcat", last + first + second, {"axis": 1}),
            ("QLinearSoftmax", first + ["ss", "sz"], {"axis": -1, "opset": 13}),
        ):
            more = [constant("ss", np.float32(1 / 256)), constant("sz", zero(0))]
            used = [port for port in ports if port.name in inputs]
            made = model([node(op, inputs, ["y"], domain="com.microsoft", **attributes)], used, [ported("y", tensor_kind, None)], constants + more, microsoft=True)
            yield f"{op} of {np.dtype(kind)}", made, {"a": a, "b": b}, None
        weight = random.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8)
        scales = random.uniform(0.002, 0.01, 6).astype(np.float32)
        conv = [constant("w", weight), constant("ws", scales), constant("wz", np.zeros(6, np.int8)), constant("c", random.integers(-900, 900, 6).astype(np.int32)), constant("cs", np.float32(0.1)), constant("cz", zero(100))]
        made = model([node("QLinearConv", first + ["w", "ws", "wz", "cs", "cz", "c"], ["y"], pads=[1, 1, 1, 1])], ports[:1], [ported("y", tensor_kind, None)], constants + conv)
        yield f"QLinearConv of {np.dtype(kind)}", made, {"a": a, "b": b}, None
        matrix = random.integers(-127, 128, (7, 5)).astype(np.int8)
        gemm = [constant("w", matrix), constant("ws", random.uniform(0.002, 0.01, 7).astype(np.float32)), constant("wz", np.zeros(7, np.int8)), constant("c", random.integers(-900, 900, 7).astype(np.int32))]
        rows = ported("a", tensor_kind, ["N", 5])
        made = model([node("QGemm", first + ["w", "ws", "wz", "c"] + last, ["y"], domain="com.microsoft", transB=1)], [rows], [ported("y", tensor_kind, None)], constants + gemm, microsoft=True)
        yield f"QGemm of {np.dtype(kind)}", made, {"a": a[:, 0, 0]}, None
        made = model([node("QGemm", first + ["w", "ws", "wz", "c"] + last, ["y"], domain="com.microsoft", transB=1, alpha=0.5)], [rows], [ported("y", tensor_kind, None)], constants + gemm, microsoft=True)
        yield f"QGemm of {np.dtype(kind)}, half of the product", made, {"a": a[:, 0, 0]}, None
        columns = [constant("w", matrix.T.copy()), *gemm[1:3]]
        made = model([node("QLinearMatMul", first + ["w", "ws", "wz"] + last, ["y"])], [rows], [ported("y", tensor_kind, None)], constants + columns)
        yield f"QLinearMatMul of {np.dtype(kind)}", made, {"a": a[:, 0, 0]}, None
        made = model([node("MatMulIntegerToFloat", ["a", "w", "as", "ws", "az", "wz"], ["y"], domain="com.microsoft")], [rows], [ported("y", TensorProto.FLOAT, None)], constants + [constant("w", matrix.T.copy()), *gemm[1:3]], microsoft=True)
        yield f"MatMulIntegerToFloat of {np.dtype(kind)}", made, {"a": a[:, 0, 0]}, 1e-4
    made = model([node("DynamicQuantizeMatMul", ["x", "w", "ws", "wz"], ["y"], domain="com.microsoft")], [ported("x", TensorProto.FLOAT, ["N", 5])], [ported("y", TensorProto.FLOAT, None)], [constant("w", matrix.T.copy()), *gemm[1:3]], microsoft=True)
    yield "DynamicQuantizeMatMul", made, {"x": random.normal(size=(3, 5)).astype(np.float32)}, 1e-2


def check_forward(work, name, made, inputs, tolerance):
    onnx.save(made, work.path / "model.onnx")
    used = {port.name for port in made.graph.input}
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(made.SerializeToString(), options)
    wanted = session.run(None, {key: value for key, value in inputs.items() if key in used})
    np.savez(work.path / "inputs.npz", **{key: value for key, value in inputs.items() if key in used})
    work.run("run", "model.onnx", "--inputs", "inputs.npz", "--outputs", "outputs.npz")
    with np.load(work.path / "outputs.npz") as file:
        got = [file[port.name] for port in made.graph.output]
    worst = 0.0
    for a, b in zip(got, wanted):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{a.dtype}{a.shape}, not {b.dtype}{b.shape}", np.inf
        difference = np.abs(a.astype(np.float64) - b.astype(np.float64))
        worst = max(worst, difference.max(initial=0.0))
        if tolerance is None:
            if difference.max(initial=0) > 1 or np.mean(difference > 0) > ODD:
                return f"codes differ by up to {difference.max()}, {np.mean(difference > 0):.1%} of them", worst
        elif np.mean(difference > 1e-5 + 1e-5 * np.abs(b)) > (ODD if tolerance > 1e-3 else 0) or difference.max(initial=0) > tolerance * 1.01:
            return f"values differ by up to {difference.max()}", worst
    return None, worst


# ---- gradients


class Rounded(torch.autograd.Function):
    """LSQ: the gradient of the value is straight through, that of the step size as the paper has it."""

    @staticmethod
    def forward(ctx, x, scale, low, high, zero, axis, count):
        shape = [1] * x.dim()
        if axis is not None:
            shape[axis] = -1
        s, z = scale.view(shape), torch.as_tensor(zero).view(shape if np.ndim(zero) else [1] * x.dim())
        ctx.save_for_backward(x, s, z)
        ctx.low, ctx.high, ctx.axis, ctx.shape, ctx.count = low, high, axis, scale.shape, count
        return (torch.clamp(torch.round(x / s) + z, low, high) - z) * s

    @staticmethod
    def backward(ctx, dy):
        x, s, z = ctx.saved_tensors
        ratio = x / s
        inside = (ratio + z >= ctx.low - 0.5) & (ratio + z <= ctx.high + 0.5)
        codes = torch.clamp(torch.round(ratio) + z, ctx.low, ctx.high) - z
        slope = codes - torch.where(inside, ratio, torch.zeros_like(ratio))
        dims = [at for at in range(x.dim()) if at != ctx.axis]
        gradient = (dy * slope).sum(dims) / (ctx.count * (ctx.high - z)) ** 0.5
        return torch.where(inside, dy, torch.zeros_like(dy)), gradient.view(ctx.shape), None, None, None, None, None


class Network:
    """A quantized network of `shape` operators: its model, and what PyTorch makes of the same numbers."""

    def __init__(self, learned):
        self.learned = learned
        self.nodes, self.constants, self.parameters = [], [], {}
        rng = np.random.default_rng(11)
        self.weights = {
            "conv": rng.integers(-127, 128, (6, 3, 3, 3)).astype(np.int8),
            "fc": rng.integers(-127, 128, (5, 54)).astype(np.int8),
        }
        self.scales = {
            "conv": rng.uniform(0.003, 0.008, 6).astype(np.float32),
            "fc": np.float32(0.002),
            "x": np.float32(0.02),
            "a": np.float32(0.015),
        }
        self.bias = rng.integers(-2000, 2000, 6).astype(np.int32)

    def floats(self, name):
        weight = self.weights[name]
        noise = np.random.default_rng(5).uniform(-0.6, 0.6, weight.shape) if self.learned else 0
        scale = self.scales[name].reshape([-1] + [1] * (weight.ndim - 1)) if np.ndim(self.scales[name]) else self.scales[name]
        return ((weight + noise) * scale).astype(np.float32)

    def build(self, moves):
        add = lambda *words, **attributes: self.nodes.append(node(*words, **attributes))
        for name in ("conv", "fc"):
            scale = self.scales[name]
            self.constants += [constant(f"{name}.s", scale), constant(f"{name}.z", np.zeros_like(scale, dtype=np.int8))]
            if self.learned:
                # Weights that lie on their codes say nothing of their scale.
                self.constants.append(constant(f"{name}.q", self.floats(name)))
                add("QuantizeLinear", [f"{name}.q", f"{name}.s", f"{name}.z"], [f"{name}.codes"], axis=0)
                add("DequantizeLinear", [f"{name}.codes", f"{name}.s", f"{name}.z"], [f"{name}.w"], axis=0)
                continue
            self.constants.append(constant(f"{name}.q", self.weights[name]))
            add("DequantizeLinear", [f"{name}.q", f"{name}.s", f"{name}.z"], [f"{name}.w"], axis=0)
        self.constants += [constant("x.s", self.scales["x"]), constant("x.z", np.uint8(128)), constant("a.s", self.scales["a"]), constant("a.z", np.uint8(0))]
        self.constants += [constant("b.q", self.bias), constant("b.s", self.scales["conv"] * self.scales["x"]), constant("shape", np.array([0, -1]))]
        add("DequantizeLinear", ["b.q", "b.s"], ["b"], axis=0)
        add("QuantizeLinear", ["x", "x.s", "x.z"], ["x.q"])
        add("DequantizeLinear", ["x.q", "x.s", "x.z"], ["x.d"])
        add("Conv", ["x.d", "conv.w", "b"], ["c"], pads=[1, 1, 1, 1])
        add("QuantizeLinear", ["c", "a.s", "a.z"], ["c.q"])
        if moves:
            # All that may stand between the two, on codes.
            add("MaxPool", ["c.q"], ["m"], kernel_shape=[2, 2], strides=[2, 2])
            add("Transpose", ["m"], ["t"], perm=[0, 2, 3, 1])
            add("Split", ["t"], ["left", "right"], axis=3, num_outputs=2)
            add("Concat", ["right", "left"], ["j"], axis=3)
            add("Reshape", ["j", "shape"], ["flat"])
            add("DequantizeLinear", ["flat", "a.s", "a.z"], ["f"])
        else:
            add("DequantizeLinear", ["c.q", "a.s", "a.z"], ["c.d"])
            add("MaxPool", ["c.d"], ["m"], kernel_shape=[2, 2], strides=[2, 2])
            add("Transpose", ["m"], ["t"], perm=[0, 2, 3, 1])
            add("Split", ["t"], ["left", "right"], axis=3, num_outputs=2)
            add("Concat", ["right", "left"], ["j"], axis=3)
            add("Reshape", ["j", "shape"], ["f"])
        add("Gemm", ["f", "fc.w"], ["y"], transB=1)
        ports = [ported("x", TensorProto.FLOAT, ["N", 3, 6, 6])]
        return model(self.nodes, ports, [ported("y", TensorProto.FLOAT, ["N", 5])], self.constants)

    def reference(self, x, label):
        leaf = lambda array: torch.tensor(np.asarray(array, np.float64), requires_grad=True)
        leaves = {"conv.q": leaf(self.floats("conv")), "fc.q": leaf(self.floats("fc"))}
        leaves["b.q"] = leaf((self.bias * (self.scales["conv"] * self.scales["x"])).astype(np.float32))
        scales = {f"{name}.s": leaf(scale) for name, scale in self.scales.items()}
        if self.learned:
            leaves.update(scales)
        low = -128 if self.learned else -127
        steps = {"x": (128, 0, 255, None, 3 * 36), "a": (0, 0, 255, None, 6 * 36), "conv": (0, low, 127, 0, 27), "fc": (0, low, 127, None, 270)}

        def rounded(value, name):
            zero, low, high, axis, count = steps[name]
            scale = scales[f"{name}.s"]
            if self.learned:
                return Rounded.apply(value, scale, low, high, zero, axis, count)
            if axis is None:
                return torch.fake_quantize_per_tensor_affine(value.float(), scale.item(), zero, low, high).double()
            zeros = torch.zeros(len(scale), dtype=torch.int32)
            return torch.fake_quantize_per_channel_affine(value.float(), scale.detach().float(), zeros, axis, low, high).double()

        h = rounded(torch.tensor(x, dtype=torch.float64), "x")
        h = rounded(F.conv2d(h, rounded(leaves["conv.q"], "conv"), leaves["b.q"], padding=1), "a")
        h = F.max_pool2d(h, 2).permute(0, 2, 3, 1)
        h = torch.cat([h[..., 3:], h[..., :3]], 3).flatten(1)
        loss = F.cross_entropy(h @ rounded(leaves["fc.q"], "fc").T, torch.from_numpy(label))
        loss.backward()
        return loss.item(), {name: value.grad.numpy() for name, value in leaves.items()}


def check_gradients(work, learned, moves):
    network = Network(learned)
    onnx.save(network.build(moves), work.path / "model.onnx")
    x = random.normal(size=(16, 3, 6, 6)).astype(np.float32)
    label = random.integers(0, 5, 16)
    loss, wanted = network.reference(x, label)
    np.savez(work.path / "batch.npz", x=x, label=label)
    words = ["run", "model.onnx", "--precision", "f32", "--loss", "cross-entropy", "--inputs", "batch.npz", "--gradients", "gradients.npz"]
    if learned:
        words += [word for name in wanted for word in ("--train", name)]
    work.run(*words)
    with np.load(work.path / "gradients.npz") as file:
        got = {key: file[key] for key in file.files}
    errors = {"loss": abs(float(got["loss"]) - loss) / abs(loss) * LIMIT / LOSS_LIMIT}
    for key, tensor in wanted.items():
        fits = key in got and got[key].shape == tensor.shape
        errors[key] = np.linalg.norm(got[key] - tensor) / np.linalg.norm(tensor) if fits else np.inf
    worst = max(errors, key=lambda key: np.inf if np.isnan(errors[key]) else errors[key])
    return (None if errors[worst] <= LIMIT else f"{worst} differs by {errors[worst]:.1e}"), errors[worst]


def dynamic_network():
    """A convolution and a product as ONNX Runtime's dynamic quantization writes them."""
    nodes, constants = [], []
    rng = np.random.default_rng(13)
    conv, fc = (rng.integers(-127, 128, shape).astype(np.int8) for shape in ((6, 3, 3, 3), (150, 5)))
    scales = {"conv": np.float32(0.004), "fc": rng.uniform(0.001, 0.003, 5).astype(np.float32)}
    for name, weight in (("conv", conv), ("fc", fc)):
        constants += [constant(name, weight), constant(f"{name}.s", scales[name]), constant(f"{name}.z", np.zeros_like(scales[name], dtype=np.int8))]
    for name, op, given, result in (("conv", "ConvInteger", "x", "c"), ("fc", "MatMulInteger", "r", "y")):
        nodes.append(node("DynamicQuantizeLinear", [given], [f"{given}.q", f"{given}.s", f"{given}.z"]))
        nodes.append(node("Mul", [f"{given}.s", f"{name}.s"], [f"{name}.scales"]))
        nodes.append(node(op, [f"{given}.q", name, f"{given}.z", f"{name}.z"], [f"{name}.i"]))
        nodes.append(node("Cast", [f"{name}.i"], [f"{name}.f"], to=TensorProto.FLOAT))
        nodes.append(node("Mul", [f"{name}.f", f"{name}.scales"], [result]))
        if name == "conv":
            nodes += [node("Relu", ["c"], ["a"]), node("Flatten", ["a"], ["r"])]
    made = model(nodes, [ported("x", TensorProto.FLOAT, ["N", 3, 7, 7])], [ported("y", TensorProto.FLOAT, ["N", 5])], constants)
    return made, {"conv": conv * scales["conv"], "fc": fc * scales["fc"]}, scales


def check_dynamic(work):
    """Results against ONNX Runtime, gradients against PyTorch with the ranges of the batch."""
    made, weights, scales = dynamic_network()
    x = random.normal(size=(16, 3, 7, 7)).astype(np.float32)
    label = random.integers(0, 5, 16)
    reason, worst = check_forward(work, "dynamic", made, {"x": x}, 1e-4)
    if reason:
        return reason, worst
    leaves = {name: torch.tensor(weight, requires_grad=True) for name, weight in weights.items()}

    def rounded(value):
        low, high = min(value.min().item(), 0.0), max(value.max().item(), 0.0)
        scale = np.float32(high - low) / np.float32(255)
        return torch.fake_quantize_per_tensor_affine(value, scale.item(), round(-low / scale), 0, 255)

    conv = torch.fake_quantize_per_tensor_affine(leaves["conv"], scales["conv"].item(), 0, -127, 127)
    fc = torch.fake_quantize_per_channel_affine(leaves["fc"], torch.from_numpy(scales["fc"]), torch.zeros(5, dtype=torch.int32), 1, -127, 127)
    hidden = torch.relu(F.conv2d(rounded(torch.from_numpy(x)), conv)).flatten(1)
    loss = F.cross_entropy(rounded(hidden) @ fc, torch.from_numpy(label))
    loss.backward()
    np.savez(work.path / "batch.npz", x=x, label=label)
    work.run("run", "model.onnx", "--precision", "f32", "--loss", "cross-entropy", "--inputs", "batch.npz", "--gradients", "gradients.npz")
    with np.load(work.path / "gradients.npz") as file:
        got = {key: file[key] for key in file.files}
    error = {name: np.linalg.norm(got[name] - leaf.grad.numpy()) / np.linalg.norm(leaf.grad.numpy()) for name, leaf in leaves.items()}
    error["loss"] = abs(float(got["loss"]) - loss.item()) / loss.item()
    worst = max(error, key=error.get)
    return (None if error[worst] <= LIMIT else f"{worst} differs by {error[worst]:.1e}"), error[worst]


GRADIENTS = {
    "gradients": (False, False),
    "gradients, codes moved": (False, True),
    "step sizes": (True, False),
    "step sizes, codes moved": (True, True),
}


def main():
    parser = peer.arguments(__doc__.splitlines()[0], ["every case"])
    values = parser.parse_args()
    values.qcompile = values.qcompile.resolve()
    work = peer.Workspace(values)
    rows, failures = [], []
    cases = [(name, lambda name=name, case=case: check_forward(work, name, *case)) for name, *case in forward_cases()]
    cases += [(name, lambda case=case: check_gradients(work, *case)) for name, case in GRADIENTS.items()]
    cases.append(("dynamic quantization", lambda: check_dynamic(work)))
    for name, check in cases:
        if values.names and not any(word in name for word in values.names):
            continue
        try:
            reason, worst = check()
        except peer.Failure as failure:
            reason, worst = str(failure), np.inf
        if reason:
            failures.append(f"{name}: {reason}")
        rows.append([name, f"{worst:.1e}", "FAILED" if reason else "ok"])
    if not rows:
        failures.append(f"no case is called {' or '.join(values.names)}")
    peer.table(["case", "worst", ""], rows)
    peer.finish(failures)


main()
