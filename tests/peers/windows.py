"""Compares convolutions, pools and Resize with ONNX Runtime, over their attributes and one to three spatial axes.

    python tests/peers/windows.py [--qcompile PATH] [WORD ...]

Runs the generated cases whose names contain a WORD. Each output must agree to 1e-4 of its largest magnitude, and the
derivative of a weighted sum of it along a random direction of all weights to 1e-3 with ONNX Runtime's differences.
"""

import itertools
import sys

import peer

peer.require("onnxruntime")

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3
SIZES = {1: (11,), 2: (8, 7), 3: (5, 4, 6)}


class Case:
    """A model of one node whose float operands are weights; `step` is how far differences go."""

    def __init__(self, op, opset, operands, step=0.1, outputs=("Y",), **attributes):
        self.opset, self.operands, self.step = opset, operands, step
        self.weights = [name for name, value in operands.items() if value is not None and value.dtype == np.float32]
        self.weights = [name for name in self.weights if name not in ("scales", "roi")]
        names = [name if value is not None else "" for name, value in operands.items()]
        self.node = helper.make_node(op, names, list(outputs), **attributes)

    def model(self, operands, shape=None):
        """The node's results; with the shape of Y, also the sum of Y times the input `weighting`."""
        tensors = [numpy_helper.from_array(value, name) for name, value in operands.items() if value is not None]
        outputs = [onnx.ValueInfoProto(name=name) for name in self.node.output]
        inputs, nodes = [], [self.node]
        if shape is not None:
            inputs = [helper.make_tensor_value_info("weighting", TensorProto.FLOAT, shape)]
            nodes += [
                helper.make_node("Mul", ["Y", "weighting"], ["weighted"]),
                helper.make_node("ReduceSum", ["weighted"], ["total"], keepdims=0),
            ]
            outputs.insert(0, helper.make_tensor_value_info("total", TensorProto.FLOAT, []))
        graph = helper.make_graph(nodes, "g", inputs, outputs, tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)

    def wanted(self, operands):
        """What ONNX Runtime computes."""
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        data = self.model(operands).SerializeToString()
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        return session.run(None, {})


def spread(random, *shape):
    """Values that all differ by more than the differences go."""
    count = int(np.prod(shape))
    return ((random.permutation(count) - count // 2) / 8 + 0.0625).reshape(shape).astype(np.float32)


def apart(random, *shape):
    """Values whose signs do not change by the differences."""
    values = random.standard_normal(shape).astype(np.float32)
    return values + np.sign(values)


def convolutions(random):
    """Conv and ConvTranspose by name."""
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    for axes, sizes in SIZES.items():
        for stride, dilation, groups, bias in itertools.product((1, 2), (1, 2), (1, 2), (False, True)):
            kernel = (3, 2, 2)[:axes]
            shared = {"strides": [stride, 1, 2][:axes], "dilations": [1, dilation, 1][-axes:], "group": groups}
            for padding in ("none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"):
                pads = {"pads": [1, 0, 1][:axes] + [0, 2, 1][:axes]} if padding == "pads" else {}
                pads = {"auto_pad": padding} if padding.isupper() else pads
                if padding.startswith("SAME") and dilation > 1:
                    continue  # ONNX Runtime pads for the kernel without its dilation in some of these.
                operands = {"X": draw(2, 4, *sizes), "W": draw(6, 4 // groups, *kernel), "B": draw(6) if bias else None}
                name = f"{axes}-D stride={stride} dilation={dilation} group={groups} bias={bias} {padding}"
                yield f"Conv {name}", Case("Conv", 11, operands, **shared, **pads)
                operands = {"X": draw(2, 4, *sizes), "W": draw(4, 6 // groups, *kernel), "B": draw(6) if bias else None}
                yield f"ConvTranspose {name}", Case("ConvTranspose", 11, operands, **shared, **pads)
                if padding in ("none", "pads") and stride == 2:
                    extra = {"output_padding": [1, 0, 1][:axes]}
                    case = Case("ConvTranspose", 11, operands, **shared, **pads, **extra)
                    yield f"ConvTranspose {name} output_padding", case
                if padding == "none":
                    reach = [(k - 1) * d + 1 for k, d in zip(kernel, shared["dilations"])]
                    whole = [s * (n - 1) + r for s, n, r in zip(shared["strides"], sizes, reach)]
                    for change in (-1, 1):
                        extra = {"output_shape": [size + change for size in whole]}
                        case = Case("ConvTranspose", 11, operands, **shared, **extra)
                        yield f"ConvTranspose {name} output_shape{change:+}", case


def pools(random):
    """Pools by name."""
    for axes, sizes in SIZES.items():
        kernel = (3, 2, 3)[:axes]
        for stride, dilation, ceil, padded in itertools.product((1, 2, 3), (1, 2), (0, 1), (False, True)):
            operands = lambda: {"X": spread(random, 2, 3, *sizes)}
            shared = {"kernel_shape": kernel, "strides": [stride, 2, 1][:axes], "dilations": [dilation, 1, 1][:axes]}
            shared |= {"ceil_mode": ceil} | ({"pads": [1, 0, 1][:axes] + [1, 1, 0][:axes]} if padded else {})
            name = f"{axes}-D stride={stride} dilation={dilation} ceil={ceil} padded={padded}"
            yield f"MaxPool {name}", Case("MaxPool", 12, operands(), 0.01, **shared)
            for order in (0, 1):
                case = Case("MaxPool", 12, operands(), 0.01, ("Y", "I"), storage_order=order, **shared)
                yield f"MaxPool {name} indices order={order}", case
            for count in (0, 1):
                case = Case("AveragePool", 19, {"X": apart(random, 2, 3, *sizes)}, count_include_pad=count, **shared)
                yield f"AveragePool {name} count={count}", case
            for p in (1, 2, 3):
                yield f"LpPool {name} p={p}", Case("LpPool", 18, {"X": apart(random, 2, 3, *sizes)}, 0.02, p=p, **shared)
        for op, pad in itertools.product(("MaxPool", "AveragePool", "LpPool"), ("SAME_UPPER", "SAME_LOWER", "VALID")):
            attributes = {"kernel_shape": kernel, "strides": [2] * axes, "auto_pad": pad}
            values, step = (spread, 0.01) if op == "MaxPool" else (apart, 0.03)
            case = Case(op, 11, {"X": values(random, 2, 3, *sizes)}, step, **attributes)
            yield f"{op} {axes}-D {pad}", case
        for op in ("GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"):
            values, step = (spread, 0.01) if op == "GlobalMaxPool" else (apart, 0.03)
            yield f"{op} {axes}-D", Case(op, 7, {"X": values(random, 2, 3, *sizes)}, step)


def resizes(random):
    """Resize and Upsample by name."""
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)
    transformations = ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric")
    grids = [((5, 6), grid) for grid in ([2, 2], [3, 1], [0.5, 0.5], [1.5, 2.5], [0.7, 1.3], [4, 0.4])]
    grids += [((7,), [2]), ((7,), [0.6]), ((4, 3, 5), [2, 2, 2])]
    for (sizes, grid), transformation in itertools.product(grids, transformations):
        if transformation == "align_corners" and any(n * s % 1 for n, s in zip(sizes, grid)):
            continue  # The new length, of which the corners are, is a fraction to ONNX and rounded to ONNX Runtime.
        opset = 19 if transformation == "half_pixel_symmetric" else 13
        shared = {"coordinate_transformation_mode": transformation}
        operands = lambda: {"X": draw(2, 3, *sizes), "roi": None, "scales": np.array([1, 1, *grid], np.float32)}
        name = f"{grid} {transformation}"
        for nearest in ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil"):
            case = Case("Resize", opset, operands(), mode="nearest", nearest_mode=nearest, **shared)
            yield f"Resize nearest {nearest} {name}", case
        yield f"Resize linear {name}", Case("Resize", opset, operands(), mode="linear", **shared)
        if len(sizes) == 2:
            for exclude in (0, 1):
                attributes = {"cubic_coeff_a": -0.5, "exclude_outside": exclude, **shared}
                yield f"Resize cubic exclude={exclude} {name}", Case("Resize", opset, operands(), mode="cubic", **attributes)
            for mode in ("linear", "cubic"):
                case = Case("Resize", max(opset, 18), operands(), mode=mode, antialias=1, **shared)
                yield f"Resize {mode} antialias {name}", case
        size = np.array([2, 3, *(max(1, int(n * s)) for n, s in zip(sizes, grid))], np.int64)
        case = Case("Resize", opset, {"X": draw(2, 3, *sizes), "roi": None, "none": None, "sizes": size}, mode="linear", **shared)
        yield f"Resize linear to {size} {transformation}", case
    for mode, policy in itertools.product(("nearest", "linear"), ("not_larger", "not_smaller")):
        operands = {"X": draw(2, 3, 5, 6), "roi": None, "none": None, "sizes": np.array([8, 14], np.int64)}
        attributes = {"axes": [2, 3], "keep_aspect_ratio_policy": policy}
        yield f"Resize {mode} {policy}", Case("Resize", 18, operands, mode=mode, **attributes)
    for mode in ("nearest", "linear", "cubic"):
        for edges in ([0.1, 0.2, 0.9, 0.8], [-0.2, 0.3, 0.7, 1.4], [0.9, 0, 0.1, 1]):
            roi = np.array([0, 0, *edges[:2], 1, 1, *edges[2:]], np.float32)
            operands = {"X": draw(2, 3, 5, 6), "roi": roi, "none": None, "sizes": np.array([2, 3, 4, 7], np.int64)}
            attributes = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 3.5}
            yield f"Resize {mode} region {edges}", Case("Resize", 13, operands, mode=mode, **attributes)
    for mode, grid in itertools.product(("nearest", "linear"), ([2, 2], [1, 3], [1.6, 2.4])):
        operands = {"X": draw(2, 3, 5, 6), "scales": np.array([1, 1, *grid], np.float32)}
        yield f"Resize-10 {mode} {grid}", Case("Resize", 10, operands, mode=mode)
        yield f"Upsample-9 {mode} {grid}", Case("Upsample", 9, operands, mode=mode)
        attributes = {"scales": [1.0, 1.0, *map(float, grid)]}
        yield f"Upsample-7 {mode} {grid}", Case("Upsample", 7, {"X": draw(2, 3, 5, 6)}, mode=mode, **attributes)


def check(work, case, random):
    """The worst errors of outputs and of the gradient; a failure raises."""
    wanted = case.wanted(case.operands)
    weighting = random.standard_normal(wanted[0].shape).astype(np.float32)
    onnx.save(case.model(case.operands, wanted[0].shape), work.path / "model.onnx")
    np.savez(work.path / "in.npz", weighting=weighting)
    words = ("run", "model.onnx", "--precision", "f32", "--inputs", "in.npz")
    work.run(*words, "--outputs", "out.npz")
    work.run(*words, "--train", "*", "--loss", "output", "--gradients", "g.npz")
    with np.load(work.path / "out.npz") as file:
        got = [file[name] for name in case.node.output]
    error = 0.0
    for tensor, other in zip(wanted, got):
        if tensor.shape != other.shape or tensor.dtype != other.dtype:
            raise peer.Failure(f"{other.dtype}{other.shape}, not {tensor.dtype}{tensor.shape}")
        error = max(error, np.abs(tensor - other).max(initial=0) / max(1, np.abs(tensor).max(initial=0)))
    directions = {name: random.standard_normal(case.operands[name].shape).astype(np.float32) for name in case.weights}
    values = []
    for sign in (1, -1):
        moved = {name: case.operands[name] + np.float32(sign * case.step) * way for name, way in directions.items()}
        values.append(float((case.wanted(case.operands | moved)[0].astype(np.float64) * weighting).sum()))
    difference = (values[0] - values[1]) / (2 * case.step)
    with np.load(work.path / "g.npz") as file:
        gradients = {name: file[name].astype(np.float64) for name in case.weights}
    along = sum((gradients[name] * way).sum() for name, way in directions.items())
    size = np.sqrt(sum((gradient**2).sum() for gradient in gradients.values()))
    return error, abs(along - difference) / max(size, 1e-3)


def main():
    parser = peer.arguments(__doc__.splitlines()[0], ())
    values = parser.parse_args()
    values.qcompile = values.qcompile.resolve()
    work = peer.Workspace(values)
    random = np.random.default_rng(1)
    failures, worst, count, skipped = [], [0.0, 0.0], 0, 0
    for name, case in itertools.chain(convolutions(random), pools(random), resizes(random)):
        if values.names and not any(word in name for word in values.names):
            continue
        try:
            errors = check(work, case, random)
        except peer.Failure as failure:
            failures.append(f"{name}: {failure}")
            continue
        except Exception as error:
            # ONNX Runtime's kernels lack some variants.
            skipped += 1
            print(f"{name}: not run by ONNX Runtime: {str(error).splitlines()[0][-120:]}", file=sys.stderr)
            continue
        count += 1
        worst = [max(pair) for pair in zip(worst, errors)]
        if not (errors[0] <= LIMIT and errors[1] <= GRADIENT_LIMIT):
            failures.append(f"{name}: outputs differ by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
    print(f"{count} cases, worst error {worst[0]:.1e}, of gradients {worst[1]:.1e}; {skipped} not run by ONNX Runtime")
    peer.finish(failures)


main()
