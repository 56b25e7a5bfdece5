"""Compares single operators, their values and their gradients, with ONNX's reference evaluator in f64.

    python tests/peers/operators.py [--qcompile PATH] [WORD ...]
    python tests/peers/operators.py --write tests/operators.zip

Runs the generated cases whose names contain a WORD. Each output must agree to 2e-5 of its largest magnitude, integers
exactly; each gradient of a weighted sum of the outputs must agree with central differences to 2e-3 of its largest
magnitude. Operators that the reference lacks are compared with what is written here.
--write keeps the cases that pass for the test suite of the workspace instead.
"""

import io
import math
import pathlib
import zipfile

import peer

peer.require()

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

erf = np.vectorize(math.erf, otypes=[float])
LIMIT, GRADIENT_LIMIT, STEP = 2e-5, 2e-3, 1e-6
random = np.random.default_rng(7)


def draw(*shape, low=-2.0, high=2.0):
    """Floats that lie apart from one another and from the corners at whole and half numbers."""
    values = random.uniform(low, high, shape)
    return (np.round(values * 16) / 16 + random.uniform(0.011, 0.05, shape)).astype(np.float32)


class Case:
    """One operator over operands; None stands for one that is left out. `fixed` numbers operands that have no
    gradient; `listed` the outputs that are summed, by default all."""

    def __init__(self, name, op, operands, *, opset=21, domain="", outputs=1, listed=None, fixed=(), gradient=True, reference=None, nodes=None, derivative=None, **attributes):
        self.name, self.op, self.operands, self.opset, self.domain = f"{op} {name}".strip(), op, operands, opset, domain
        self.outputs, self.fixed, self.gradient, self.reference, self.attributes = outputs, fixed, gradient, reference, attributes
        self.listed = range(outputs) if listed is None else listed
        # Several nodes in place of one, and gradients that are not those of what is computed.
        self.several, self.derivative = nodes, derivative

    def trained(self, at):
        operand = self.operands[at]
        return operand is not None and operand.dtype == np.float32 and self.gradient and at not in self.fixed

    def node(self):
        inputs = ["" if operand is None else f"x{at}" for at, operand in enumerate(self.operands)]
        return helper.make_node(self.op, inputs, [f"y{at}" for at in range(self.outputs)], domain=self.domain, **self.attributes)

    def model(self, weightings):
        """Outputs `total`, if anything is weighted, and the operator's."""
        nodes, weights, inputs = self.several or [self.node()], [], []
        nodes = list(nodes)
        for at, operand in enumerate(self.operands):
            if operand is not None:
                weights.append(numpy_helper.from_array(operand, f"x{at}"))
        parts = []
        for at, weighting in weightings.items():
            inputs.append(helper.make_tensor_value_info(f"w{at}", TensorProto.FLOAT, weighting.shape))
            nodes.append(helper.make_node("Mul", [f"y{at}", f"w{at}"], [f"p{at}"]))
            nodes.append(helper.make_node("ReduceSum", [f"p{at}"], [f"t{at}"], keepdims=0))
            parts.append(f"t{at}")
        outputs = [helper.make_empty_tensor_value_info(f"y{at}") for at in range(self.outputs)]
        if parts:
            nodes.append(helper.make_node("Sum", parts, ["total"]))
            outputs.insert(0, helper.make_tensor_value_info("total", TensorProto.FLOAT, []))
        else:
            inputs.append(helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1]))
        graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", self.opset)]
        if self.domain:
            opsets.append(helper.make_opsetid(self.domain, 1))
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def evaluate(self, operands):
        """The outputs over operands in f64."""
        if self.reference is not None:
            results = self.reference(*operands)
            return list(results) if isinstance(results, tuple) else [results]
        names = {f"x{at}": operand for at, operand in enumerate(operands) if operand is not None}
        ports = lambda prefix, count: [helper.make_empty_tensor_value_info(f"{prefix}{at}") for at in range(count)]
        inputs = [helper.make_empty_tensor_value_info(name) for name in names]
        graph = helper.make_graph([self.node()], "g", inputs, ports("y", self.outputs))
        opsets = [helper.make_opsetid("", self.opset)] + ([helper.make_opsetid(self.domain, 1)] if self.domain else [])
        return ReferenceEvaluator(helper.make_model(graph, opset_imports=opsets, ir_version=10)).run(None, names)

    def wide(self):
        return [np.array(operand, np.float64) if operand is not None and operand.dtype == np.float32 else operand for operand in self.operands]

    def differences(self, weightings):
        """Central differences of the weighted sum by each operand that is trained."""
        operands = self.wide()
        if self.derivative is not None:
            yield from self.derivative(operands, weightings).items()
            return

        def total():
            results = self.evaluate(operands)
            return sum(float((results[at].astype(np.float64) * weighting).sum()) for at, weighting in weightings.items())

        for at in range(len(operands)):
            if not self.trained(at):
                continue
            gradient = np.zeros_like(operands[at])
            for place in np.ndindex(*operands[at].shape):
                kept = operands[at][place]
                sides = []
                for side in (kept + STEP, kept - STEP):
                    operands[at][place] = side
                    sides.append(total())
                operands[at][place] = kept
                gradient[place] = (sides[0] - sides[1]) / (2 * STEP)
            yield f"x{at}", gradient


def distance(got, wanted):
    """The largest difference over the largest magnitude (or 1)."""
    got, wanted = got.astype(np.float64), wanted.astype(np.float64)
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0, np.abs(got - wanted))
    size = np.abs(wanted[np.isfinite(wanted)]).max(initial=1)
    return np.nan_to_num(apart / size, nan=np.inf).max(initial=0)


def check(work, case):
    """What is wrong with a case."""
    wanted = case.evaluate(case.wide())
    floats = [at for at, value in enumerate(wanted) if at in case.listed and np.asarray(value).dtype.kind == "f"]
    trains = any(case.trained(at) for at in range(len(case.operands)))
    weightings = {at: random.uniform(0.5, 1.5, np.shape(wanted[at])).astype(np.float32) for at in floats} if trains else {}
    onnx.save(case.model(weightings), work.path / "model.onnx")
    fed = {f"w{at}": weighting for at, weighting in weightings.items()} or {"unused": np.zeros(1, np.float32)}
    np.savez(work.path / "in.npz", **fed)
    work.run("run", "model.onnx", "-q", "--inputs", "in.npz", "--outputs", "out.npz")
    with np.load(work.path / "out.npz") as file:
        for at, value in enumerate(wanted):
            got, value = file[f"y{at}"], np.asarray(value)
            with np.errstate(over="ignore"):
                value = value.astype(np.float32) if value.dtype == np.float64 else value
            if got.shape != value.shape or (got.dtype != value.dtype and value.dtype.kind != "f"):
                yield f"output {at} is {got.dtype}{list(got.shape)}, not {value.dtype}{list(value.shape)}"
            elif not (np.array_equal(got, value) if value.dtype.kind != "f" else distance(got, value) <= LIMIT):
                yield f"output {at} differs by {distance(got, value):.1e}"
    if not weightings:
        return
    work.run("run", "model.onnx", "-q", "--train", "*", "--loss", "output", "--inputs", "in.npz", "--gradients", "gradients.npz")
    with np.load(work.path / "gradients.npz") as file:
        for name, gradient in case.differences(weightings):
            if name not in file.files:
                if np.abs(gradient).max(initial=0) > GRADIENT_LIMIT:
                    yield f"{name} has no gradient"
            elif not distance(file[name], gradient) <= GRADIENT_LIMIT:
                yield f"the gradient of {name} differs by {distance(file[name], gradient):.1e}"


def packed(arrays):
    """The bytes of an npz."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    return content.getvalue()


def files(case):
    """The model with its inputs and outputs, and with its loss and gradients, by file name."""
    wanted = {}
    for at, value in enumerate(case.evaluate(case.wide())):
        value = np.asarray(value)
        with np.errstate(over="ignore"):
            wanted[at] = value.astype(np.float32) if value.dtype == np.float64 else value
    made = {"model.onnx": case.model({}).SerializeToString(deterministic=True)}
    made["in.npz"] = packed({"unused": np.zeros(1, np.float32)})
    made["out.npz"] = packed({f"y{at}": value for at, value in wanted.items()})
    if any(case.trained(at) for at in range(len(case.operands))):
        floats = [at for at, value in wanted.items() if at in case.listed and value.dtype.kind == "f"]
        weightings = {at: random.uniform(0.5, 1.5, wanted[at].shape).astype(np.float32) for at in floats}
        made["loss.onnx"] = case.model(weightings).SerializeToString(deterministic=True)
        made["rest.npz"] = packed({f"w{at}": weighting for at, weighting in weightings.items()})
        made["gradients.npz"] = packed({name: np.float32(array) for name, array in case.differences(weightings)})
    return made


def functions():
    inside = draw(3, 8, low=-0.9, high=0.9)
    gelu = lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2)))
    yield Case("", "Gelu", [draw(3, 8)], reference=gelu)
    yield Case("", "Erf", [draw(3, 8)], reference=erf)
    for op, x in {
        "Acos": inside, "Acosh": draw(3, 8, low=1.1, high=9), "Asin": inside, "Asinh": draw(3, 8, low=-40, high=40), "Atan": draw(3, 8),
        "Atanh": inside, "Cosh": draw(3, 8), "Sinh": draw(3, 8), "Tan": draw(3, 8, low=-1.2, high=1.2), "Celu": draw(3, 8), "Elu": draw(3, 8),
        "HardSigmoid": draw(3, 8), "HardSwish": draw(3, 8), "Mish": draw(3, 8), "Selu": draw(3, 8), "Softplus": draw(3, 8),
        "Softsign": draw(3, 8), "ThresholdedRelu": draw(3, 8), "Shrink": draw(3, 8),
    }.items():
        yield Case("", op, [x])
    zero = np.zeros(1, np.float32)
    for op in ("Asin", "Asinh", "Atan", "Atanh", "Sinh", "Tan", "Cosh", "Acos"):
        yield Case("at 0", op, [zero])
    tiny = np.float32([1e-30, -1e-20, 1e-9, -1e-5, 1e-3])
    for op in ("Asin", "Asinh", "Atan", "Atanh", "Sinh", "Tan"):
        yield Case("near 0, scaled", op, [tiny], reference=lambda x, f=getattr(np, {"Asin": "arcsin", "Asinh": "arcsinh", "Atan": "arctan", "Atanh": "arctanh"}.get(op, op.lower())): f(x))
    border = np.float32([1, -1, np.nan, 2])
    yield Case("at the ends", "Asin", [border], gradient=False)
    yield Case("at the ends", "Acos", [border], gradient=False)
    yield Case("at the ends", "Atanh", [border], gradient=False)
    yield Case("at the ends", "Acosh", [np.float32([1, 1.0000001, 1.5, 1e20, 1e38, np.inf, 0.5, np.nan])], gradient=False)
    yield Case("far out", "Asinh", [np.float32([1e10, -1e20, 3e38, np.inf, -np.inf, np.nan])], gradient=False)
    yield Case("far out", "Cosh", [np.float32([88.9, -89.3, 95, np.inf, np.nan])], gradient=False)
    yield Case("far out", "Sinh", [np.float32([88.9, -89.3, 95, np.inf, -np.inf, np.nan])], gradient=False)
    yield Case("", "Swish", [draw(3, 8)], opset=24, alpha=1.5)
    yield Case("tanh", "Gelu", [draw(3, 8)], approximate="tanh")
    yield Case("both", "Shrink", [draw(3, 8)], lambd=1.0, bias=0.5)
    yield Case("of integers", "Shrink", [np.arange(-5, 5, dtype=np.int32)], lambd=1.5, bias=1.0)
    special = np.float32([np.inf, -np.inf, np.nan, 0, 1])
    yield Case("", "IsNaN", [special], gradient=False)
    for negative in (0, 1):
        for positive in (0, 1):
            yield Case(f"{negative}{positive}", "IsInf", [special], gradient=False, detect_negative=negative, detect_positive=positive)


def arithmetic():
    a, b = draw(4, 6, low=-9, high=9), draw(6, low=1, high=3)
    yield Case("floats", "Mod", [a, b], fmod=1)
    yield Case("floats, negative divisors", "Mod", [a, -b], fmod=1)
    yield Case("infinite divisor", "Mod", [np.float32([1.5, -3]), np.float32([np.inf, np.inf])], fmod=1, gradient=False)
    for dtype in (np.int8, np.uint8, np.int32, np.int64):
        low = 0 if dtype is np.uint8 else -50
        a = random.integers(low, 50, (5, 7)).astype(dtype)
        b = random.integers(1, 9, (7,)).astype(dtype)
        signed = b if dtype is np.uint8 else b * np.where(np.arange(7) % 2, 1, -1).astype(dtype)
        name = np.dtype(dtype).name
        yield Case(name, "Mod", [a, signed])
        yield Case(f"{name} fmod", "Mod", [a, signed], fmod=1)
        for op in ("Max", "Min", "Add", "Sub", "Mul"):
            yield Case(name, op, [a, b])
        yield Case(name, "Clip", [a, dtype(3), dtype(20)])
        yield Case(name, "Clip", [a, None, dtype(20)], opset=13)
        yield Case(f"{name} cubed", "Pow", [random.integers(0, 5, (5, 7)).astype(dtype) if low else b, dtype(3)] if dtype in (np.int32, np.int64) else [draw(3, low=1, high=2), random.integers(0, 4, 3).astype(np.int64)])
        for op in ("BitwiseAnd", "BitwiseOr", "BitwiseXor"):
            yield Case(name, op, [a, b])
        yield Case(name, "BitwiseNot", [a])
    for direction in ("LEFT", "RIGHT"):
        yield Case(direction, "BitShift", [np.uint8([255, 3, 128, 7]), np.uint8([1, 0, 7, 8])], direction=direction, reference=lambda a, b, left=direction == "LEFT": (a.astype(np.int64) << b if left else a.astype(np.int64) >> b).astype(np.uint8))
    yield Case("float to integer", "Pow", [draw(3, 4), np.int64([2, 3, 0, 1])])
    yield Case("integer to float", "Pow", [np.int32([1, 2, 3]), np.float32([2, 3, 0.5])], gradient=False, reference=lambda a, b: np.power(a, b).astype(np.int32))
    yield Case("integers", "MatMul", [random.integers(-9, 9, (2, 3, 4)).astype(np.int32), random.integers(-9, 9, (4, 5)).astype(np.int32)])


def reductions():
    x = draw(3, 4, 5)
    positive = draw(3, 4, 5, low=0.5)
    for op in ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"):
        operand = positive if op == "LogSum" else x
        for keep in (0, 1):
            for axes in ([1], [0, -1], None):
                opset = 11
                attributes = {} if axes is None else {"axes": axes}
                # The reference has the sum from opset 13 on only.
                yield Case(f"opset {opset} {axes} {keep}", f"Reduce{op}", [operand], opset=opset, keepdims=keep, **attributes)
                yield Case(f"{axes} {keep}", f"Reduce{op}", [operand] + ([] if axes is None else [np.int64(axes)]), keepdims=keep)
        yield Case("of none", f"Reduce{op}", [operand, np.int64([])], noop_with_empty_axes=1)
        if op not in ("LogSum", "LogSumExp", "L2", "Mean"):
            for dtype in (np.int32, np.int64):
                square = {"reference": lambda x, axes: (x * x).sum(1, keepdims=True).astype(x.dtype)} if op == "SumSquare" else {}
                yield Case(np.dtype(dtype).name, f"Reduce{op}", [random.integers(-6, 6, (3, 4)).astype(dtype), np.int64([1])], **square)
    yield Case("with zeros", "ReduceProd", [np.float32([[0, 2, 3], [0, 0, 3], [1, 2, 3]]), np.int64([1])])
    yield Case("of zeros", "ReduceL2", [np.float32([[0, 0], [3, 4]]), np.int64([1])], reference=lambda x, axes: np.sqrt((x * x).sum(1, keepdims=True)), gradient=False)
    yield Case("infinities", "ReduceLogSumExp", [np.float32([[-np.inf, -np.inf], [np.inf, 1]]), np.int64([1])], gradient=False, reference=lambda x, axes: np.logaddexp(x[:, :1], x[:, 1:]))
    for op in ("Max", "Min"):
        for dtype in (np.int8, np.uint8):
            yield Case(np.dtype(dtype).name, f"Reduce{op}", [random.integers(0, 99, (3, 4)).astype(dtype), np.int64([1])])
        yield Case("bool", f"Reduce{op}", [np.array([[True, False], [True, True], [False, False]]), np.int64([1])])
        yield Case("empty", f"Reduce{op}", [np.zeros((2, 0), np.float32), np.int64([1])], gradient=False)
    for op in ("ArgMax", "ArgMin"):
        for dtype in (np.float32, np.int32, np.int64, np.uint8, np.int8):
            x = random.integers(0, 4, (3, 6, 2)).astype(dtype)
            for last in (0, 1):
                for axis, keep in ((1, 1), (-1, 0), (0, 1)):
                    yield Case(f"{np.dtype(dtype).name} {axis} {last}", op, [x], opset=13, gradient=False, axis=axis, keepdims=keep, select_last_index=last)
    yield Case("", "Hardmax", [random.integers(0, 4, (3, 6, 2)).astype(np.float32)], gradient=False, axis=1)
    flat = lambda x: (np.arange(12) == x.reshape(3, 12).argmax(1)[:, None]).reshape(x.shape).astype(np.float64)
    yield Case("opset 11", "Hardmax", [random.integers(0, 4, (3, 6, 2)).astype(np.float32)], opset=11, gradient=False, reference=flat)
    soft = lambda x: (np.exp(x.reshape(3, 12)) / np.exp(x.reshape(3, 12)).sum(1, keepdims=True)).reshape(x.shape)
    yield Case("opset 11", "Softmax", [draw(3, 6, 2)], opset=11, reference=soft)
    yield Case("opset 11", "LogSoftmax", [draw(3, 6, 2)], opset=11, reference=lambda x: np.log(soft(x)))
    for size in (1, 2, 5, 8):
        for exclusive in (0, 1):
            for reverse in (0, 1):
                yield Case(f"{size} {exclusive}{reverse}", "CumSum", [draw(3, size), np.int64(1)], exclusive=exclusive, reverse=reverse)
    yield Case("integers", "CumSum", [random.integers(-5, 5, (3, 4)).astype(np.int32), np.int32(0)])


def normalizations():
    x = draw(3, 4, 2, 3)
    channel = lambda: draw(4, low=0.5)
    for opset in (7, 9, 15):
        yield Case(f"opset {opset}", "BatchNormalization", [x, channel(), channel(), channel(), channel()], opset=opset, fixed=(3, 4), reference=batch_norm)
    yield Case("one axis", "BatchNormalization", [draw(5), draw(1), draw(1), draw(1), draw(1, low=0.5)], opset=15, fixed=(3, 4), reference=lambda x, s, b, m, v: (x - m) / np.sqrt(v + 1e-5) * s + b)
    places = lambda: draw(4, 2, 3, low=0.5)
    yield Case("per place", "BatchNormalization", [x, places(), places(), places(), places()], opset=7, fixed=(3, 4), spatial=0, reference=lambda x, s, b, m, v: (x - m) / np.sqrt(v + 1e-5) * s + b)
    for opset, count in ((7, 5), (9, 5), (14, 3), (15, 3)):
        attributes = {"training_mode": 1} if opset >= 14 else {}
        yield Case(f"training {opset}", "BatchNormalization", [x, channel(), channel(), channel(), channel()], opset=opset, fixed=(3, 4), outputs=count, listed=(0,), momentum=0.7, reference=lambda *v, count=count: trained_batch_norm(*v)[:count], **attributes)
    yield Case("", "InstanceNormalization", [x, channel(), channel()], epsilon=1e-3)
    yield Case("", "GroupNormalization", [x, channel(), channel()], num_groups=2, reference=lambda x, s, b: group_norm(x, s, b))
    yield Case("opset 18", "GroupNormalization", [x, draw(2), draw(2)], opset=18, num_groups=2, reference=lambda x, s, b: group_norm(x, np.repeat(s, 2), np.repeat(b, 2)))
    for axis in (-1, 2, 1):
        shape = x.shape[axis:]
        yield Case(f"{axis}", "LayerNormalization", [x, draw(*shape), draw(*shape)], outputs=3, axis=axis)
        yield Case(f"{axis} no bias", "LayerNormalization", [x, draw(*shape)], axis=axis)
    yield Case("", "RMSNormalization", [x, draw(3)], opset=23, reference=lambda x, s: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * s)
    for p in (1, 2):
        for axis in (0, -1):
            norm = lambda x, p=p, axis=axis: x / (np.abs(x) ** p).sum(axis, keepdims=True) ** (1 / p)
            yield Case(f"{p} {axis}", "LpNormalization", [x], opset=22, p=p, axis=axis, reference=norm)
    zeros = np.zeros((2, 3), np.float32)
    yield Case("of zeros", "LpNormalization", [zeros], opset=22, reference=lambda x: x * 0, gradient=False)
    for size in (1, 2, 3, 4, 9):
        yield Case(f"{size}", "LRN", [x], opset=13, size=size, alpha=0.5, beta=0.75, bias=1.5, reference=lambda x, size=size: local_norm(x, size))
    whitened = lambda x, axes: (x - x.mean(axes, keepdims=True)) / (x.std(axes, keepdims=True) + 1e-9)
    yield Case("", "MeanVarianceNormalization", [x], opset=13, reference=lambda x: whitened(x, (0, 2, 3)))
    yield Case("axes", "MeanVarianceNormalization", [draw(3, 4)], opset=13, axes=[1], reference=lambda x: whitened(x, (1,)))


def batch_norm(x, s, b, m, v):
    s, b, m, v = (value.reshape(-1, 1, 1) for value in (s, b, m, v))
    return (x - m) / np.sqrt(v + 1e-5) * s + b


def trained_batch_norm(x, s, b, m, v):
    """Also opset 7's further results."""
    mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
    running = (0.7 * m + 0.3 * mean, 0.7 * v + 0.3 * variance)
    return (batch_norm(x, s, b, mean, variance), *running, mean, variance)


def local_norm(x, size):
    """Over channels near by."""
    low, high = (size - 1) // 2, size // 2
    windows = [x[:, max(0, c - low) : c + high + 1] for c in range(x.shape[1])]
    squares = np.stack([(window**2).sum(1) for window in windows], 1)
    return x / (1.5 + 0.5 / size * squares) ** 0.75


def group_norm(x, s, b):
    grouped = x.reshape(x.shape[0], 2, -1)
    grouped = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
    return grouped.reshape(x.shape) * s.reshape(-1, 1, 1) + b.reshape(-1, 1, 1)


def losses():
    for shape in ((5, 4), (3, 4, 2), (2, 4, 2, 3)):
        labels = random.integers(0, 4, (shape[0], *shape[2:])).astype(np.int64)
        for reduction in ("none", "mean", "sum"):
            for weighted in (0, 1):
                for ignored in (None, 1, -5):
                    given = np.where(random.random(labels.shape) < 0.3, ignored, labels).astype(np.int64) if ignored else labels
                    given.flat[0] = 0
                    attributes = {"reduction": reduction} | ({} if ignored is None else {"ignore_index": ignored})
                    extra = [draw(4, low=0.5)] if weighted else []
                    name = f"{len(shape)} {reduction} {weighted} {ignored}"
                    scores = draw(*shape)
                    yield Case(name, "NegativeLogLikelihoodLoss", [scores, given, *extra], opset=13, fixed=(2,), **attributes)
                    yield Case(name, "SoftmaxCrossEntropyLoss", [scores, given, *extra], opset=13, fixed=(2,), outputs=1 + weighted, **attributes)


def quantized():
    x = draw(4, 6, low=-3, high=3)
    for dtype in (np.int8, np.uint8):
        name = np.dtype(dtype).name
        yield Case(f"{name}", "QuantizeLinear", [x, np.float32(0.02), dtype(7)], gradient=False)
        yield Case(f"{name} by axis", "QuantizeLinear", [x, draw(6, low=0.01, high=0.05), random.integers(0, 9, 6).astype(dtype)], gradient=False, axis=-1)
        q = random.integers(0, 99, (4, 6)).astype(dtype)
        yield Case(f"{name}", "DequantizeLinear", [q, np.float32(0.02), dtype(7)], fixed=(1,))
        yield Case(f"{name} by axis", "DequantizeLinear", [q, draw(4, low=0.01, high=0.05), random.integers(0, 9, 4).astype(dtype)], fixed=(1,), axis=0)
        yield Case(f"{name} in blocks", "DequantizeLinear", [q, draw(4, 3, low=0.01, high=0.05), random.integers(0, 9, (4, 3)).astype(dtype)], fixed=(1,), axis=1, block_size=2)
        pair = [helper.make_node("QuantizeLinear", ["x0", "x1", "x2"], ["q"]), helper.make_node("DequantizeLinear", ["q", "x1", "x2"], ["y0"])]
        low, high = np.iinfo(dtype).min - 7, np.iinfo(dtype).max - 7
        yield Case(f"{name}, and back", "QuantizeLinear", [x, np.float32(0.013), dtype(7)], fixed=(1,), nodes=pair, reference=lambda x, s, z, low=low, high=high: np.clip(np.round(x / s), low, high) * s, derivative=lambda v, w, low=low, high=high: {"x0": w[0] * ((v[0] / v[1] > low - 0.5) & (v[0] / v[1] < high + 0.5))})
    dynamic = [helper.make_node("DynamicQuantizeLinear", ["x0"], ["q", "s", "z"]), helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y0"])]
    yield Case("and back", "DynamicQuantizeLinear", [x], nodes=dynamic, reference=dynamically, derivative=lambda v, w: {"x0": w[0]})
    yield Case("int32", "DequantizeLinear", [random.integers(-999, 999, (4, 6)).astype(np.int32), np.float32(0.02)], fixed=(1,))
    yield Case("without zero point", "QuantizeLinear", [x, np.float32(0.02)], gradient=False, output_dtype=TensorProto.INT8)
    yield Case("in blocks", "QuantizeLinear", [x, draw(4, 2, low=0.01, high=0.05), np.zeros((4, 2), np.int8)], gradient=False, axis=1, block_size=3)
    yield Case("", "DynamicQuantizeLinear", [x], outputs=3, gradient=False)
    for depth in (3, 256, 257, 1500):
        a, b = random.integers(0, 256, (2, 3, depth)).astype(np.uint8), random.integers(-128, 128, (depth, 4)).astype(np.int8)
        exact = lambda a, b, p, q: (a.astype(np.int64) - p) @ (b.astype(np.int64) - q)
        yield Case(f"{depth}", "MatMulInteger", [a, b, np.uint8(12), np.int8(-3)], reference=lambda *v, exact=exact: exact(*v).astype(np.int32))
        yield Case(f"{depth} vector", "MatMulInteger", [a[0, 0], b], reference=lambda a, b, exact=exact: exact(a, b, 0, 0).astype(np.int32))
    yield Case("by rows", "MatMulInteger", [a[0], b, np.uint8([1, 2, 3]), np.int8([1, 2, 3, 4])], reference=lambda a, b, p, q: ((a.astype(np.int64) - p[:, None]) @ (b.astype(np.int64) - q)).astype(np.int32))
    one = np.float32(0.01)
    yield Case("", "QLinearMatMul", [a[0], one, np.uint8(100), b, np.float32(0.02), np.int8(3), np.float32(0.9), np.uint8(120)], fixed=(1, 4, 6), gradient=False)
    for channels, group in ((3, 1), (70, 1), (140, 2)):
        x = random.integers(0, 256, (2, channels, 5, 6)).astype(np.uint8)
        w = random.integers(-128, 128, (4, channels // group, 3, 2)).astype(np.int8)
        yield Case(f"{channels} {group}", "ConvInteger", [x, w, np.uint8(7)], group=group, pads=[1, 0, 1, 1], strides=[1, 2], reference=lambda x, w, p, group=group: convolved(x.astype(np.int64) - p, w.astype(np.int64), group).astype(np.int32))
        scales = draw(4, low=0.001, high=0.06)
        bias = random.integers(-999, 999, 4).astype(np.int32)
        yield Case(f"{channels} {group}", "QLinearConv", [x, one, np.uint8(7), w, scales, np.zeros(4, np.int8), np.float32(3), np.uint8(100), bias], gradient=False, group=group, pads=[1, 0, 1, 1], strides=[1, 2], reference=lambda x, xs, p, w, ws, wp, ys, yp, b, group=group: np.clip(np.round((convolved(x.astype(np.int64) - p, w.astype(np.int64), group) + b.reshape(-1, 1, 1)) * np.float32(np.float32(xs) * ws.astype(np.float32) / np.float32(ys)).reshape(-1, 1, 1)) + float(yp), 0, 255).astype(np.uint8))


def dynamically(x):
    """Quantized and back."""
    scale = (x.max() - x.min()) / 255
    zero = np.round(-x.min() / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale


def convolved(x, w, group):
    """Padded by (1, 0, 1, 1), with strides (1, 2)."""
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 1)))
    n, c, h, width = x.shape
    o, part, kh, kw = w.shape
    out = np.zeros((n, o, h - kh + 1, (width - kw) // 2 + 1), x.dtype)
    for filter_ in range(o):
        first = filter_ // (o // group) * part
        for i, j in np.ndindex(*out.shape[2:]):
            out[:, filter_, i, j] = (x[:, first : first + part, i : i + kh, 2 * j : 2 * j + kw] * w[filter_]).sum((1, 2, 3))
    return out


def others():
    ml, ms, training = "ai.onnx.ml", "com.microsoft", "ai.onnx.preview.training"
    x = draw(5, 3)
    yield Case("", "Scaler", [x], domain=ml, offset=[1.0, 2.0, 3.0], scale=[0.5, 2.0, 1.5])
    yield Case("one number, integers", "Scaler", [np.int64([[1, 2], [3, 4]])], domain=ml, offset=[1.0], scale=[0.5], reference=lambda x: (x - 1) * 0.5)
    coefficients = [0.3, -0.6, 0.2, 0.4, 0.8, -0.1]
    matrix = np.float64(np.float32(coefficients)).reshape(2, 3)
    yield Case("", "LinearRegressor", [x], domain=ml, targets=2, coefficients=coefficients, intercepts=[0.5, -0.5], reference=lambda x: x @ matrix.T + [0.5, -0.5])
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    for name, f in {"NONE": lambda z: z, "SOFTMAX": softmax, "LOGISTIC": lambda z: 1 / (1 + np.exp(-z))}.items():
        scores = lambda x: x @ matrix.T + [0.5, -0.5]
        yield Case(name, "LinearClassifier", [x], domain=ml, outputs=2, coefficients=coefficients, intercepts=[0.5, -0.5], classlabels_ints=[7, 9], post_transform=name, reference=lambda x, f=f, scores=scores: (np.int64([7, 9])[scores(x).argmax(1)], f(scores(x))))
    gelu = lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2)))
    fast = lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    norm = lambda x, s, b, e: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + e) * s + b
    rms = lambda x, s, e: x / np.sqrt((x * x).mean(-1, keepdims=True) + e) * s
    a, b = draw(2, 5, 3), draw(3)
    yield Case("", "Gelu", [a], domain=ms, reference=gelu)
    yield Case("", "BiasGelu", [a, b], domain=ms, reference=lambda a, b: gelu(a + b))
    yield Case("", "FastGelu", [a, b], domain=ms, reference=lambda a, b: fast(a + b))
    yield Case("", "QuickGelu", [a], domain=ms, alpha=1.5, reference=lambda a: a / (1 + np.exp(-1.5 * a)))
    yield Case("", "FusedMatMul", [draw(2, 3, 4), draw(2, 5, 3)], domain=ms, alpha=0.5, transA=1, transB=1, reference=lambda a, b: 0.5 * a.swapaxes(1, 2) @ b.swapaxes(1, 2))
    yield Case("", "SkipLayerNormalization", [a, draw(2, 5, 3), b, draw(3), draw(3)], domain=ms, epsilon=1e-3, reference=lambda a, s, g, b, c: norm(a + s + c, g, b, 1e-3))
    yield Case("", "SkipSimplifiedLayerNormalization", [a, draw(2, 5, 3), b, draw(3)], domain=ms, epsilon=1e-3, reference=lambda a, s, g, c: rms(a + s + c, g, 1e-3))
    yield Case("", "SimplifiedLayerNormalization", [a, b], epsilon=1e-3, reference=lambda a, g: rms(a, g, 1e-3))
    yield Case("", "FusedGemm", [draw(4, 3), draw(3, 2), draw(2)], domain=ms, activation="LeakyRelu", activation_alpha=0.3, reference=lambda a, b, c: (lambda z: np.where(z > 0, z, 0.3 * z))(a @ b + c))
    yield Case("", "FusedConv", [draw(2, 3, 4), draw(2, 3, 1), draw(2)], domain=ms, activation="Tanh", reference=lambda x, w, b: np.tanh(np.einsum("ncl,oc->nol", x, w[:, :, 0]) + b[:, None]))
    rate, count = np.float32(0.1), np.int64(3)
    tensors = [draw(3, low=0.5), draw(2, low=0.5)]
    for op, kinds, attributes in (("Adagrad", 2, {"decay_factor": 0.1, "epsilon": 1e-3}), ("Adam", 3, {"epsilon": 1e-3, "norm_coefficient_post": 0.1})):
        lists = tensors + [draw(*value.shape, low=0.5) for _ in range(kinds) for value in tensors]
        yield Case("", op, [rate, count, *lists], domain=training, outputs=2 * kinds, gradient=False, norm_coefficient=0.01, **attributes)
    for mode in ("standard", "nesterov"):
        lists = tensors + [draw(*value.shape, low=0.5) for _ in range(2) for value in tensors]
        attributes = {"alpha": 0.9, "beta": 0.5, "mode": mode, "norm_coefficient": 0.01}
        for steps in (0, 3):
            yield Case(f"{mode} {steps}", "Momentum", [rate, np.int64(steps), *lists], domain=training, outputs=4, fixed=(0,), reference=momentum(mode), **attributes)


def momentum(mode):
    def step(rate, count, *lists):
        results = []
        for x, g, v in zip(lists[:2], lists[2:4], lists[4:]):
            g = 0.01 * x + g
            v = 0.9 * v + (0.5 if count > 0 else 1) * g
            results.append((x - rate * (v if mode == "standard" else g + 0.9 * v), v))
        return tuple(x for x, _ in results) + tuple(v for _, v in results)

    return step


FAMILIES = (functions, arithmetic, reductions, normalizations, losses, quantized, others)


def main(families=FAMILIES):
    parser = peer.arguments(__doc__.splitlines()[0], ())
    parser.add_argument("--write", type=pathlib.Path, metavar="FILE", help="keep the cases that pass, for the test suite")
    values = parser.parse_args()
    values.qcompile = values.qcompile.resolve()
    work = peer.Workspace(values)
    failures, count, kept = [], 0, {}
    for family in families:
        for case in family():
            if values.names and not any(word in case.name for word in values.names):
                continue
            count += 1
            try:
                found = [f"{case.name}: {text}" for text in check(work, case)]
                failures += found
                if values.write and not found:
                    kept[case.name] = files(case)
            except peer.Failure as failure:
                failures.append(f"{case.name}: {failure}")
            except Exception as error:
                failures.append(f"{case.name}: the reference fails: {type(error).__name__}: {str(error)[:200]}")
    print(f"{count} cases")
    if values.write:
        with zipfile.ZipFile(values.write, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for name, contents in kept.items():
                for file, content in contents.items():
                    # A fixed date, so that the same cases make the same bytes.
                    entry = zipfile.ZipInfo(f"{name.replace('/', '-')}/{file}", (2020, 1, 1, 0, 0, 0))
                    archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
        print(f"{len(kept)} of them in {values.write}")
    peer.finish(failures)


if __name__ == "__main__":
    main()
