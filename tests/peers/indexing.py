"""Compares operators that pick, place and reorder elements with ONNX's reference evaluator in f64.

    python tests/peers/indexing.py [--qcompile PATH] [WORD ...]
    python tests/peers/indexing.py --write tests/indexing.zip

As operators.py does, whose cases these are like.
"""

import itertools

import numpy as np
from onnx import TensorProto

import operators
from operators import Case, draw, random

ints = lambda *values: np.array(values, np.int64)


def indices(*shape, below):
    """Indices that count from both ends."""
    return random.integers(-below, below, shape)


def of_type(dtype, *shape):
    if dtype == np.bool_:
        return random.random(shape) < 0.5
    return draw(*shape) if dtype == np.float32 else random.integers(0, 9, shape).astype(dtype)


def gather_elements(axis):
    def reference(x, at):
        cut = tuple(slice(None) if own == axis % x.ndim else slice(size) for own, size in enumerate(at.shape))
        return np.take_along_axis(x[cut], at % x.shape[axis], axis)

    return reference


def gathers():
    for axis in (0, 1, -1):
        yield Case(f"axis {axis}", "Gather", [draw(3, 4, 2), indices(2, 3, below=2)], axis=axis)
        yield Case(f"axis {axis}", "GatherElements", [draw(3, 4, 5), indices(3, 4, 5, below=3)], axis=axis)
        yield Case(f"fewer, axis {axis}", "GatherElements", [draw(3, 4, 5), indices(2, 2, 3, below=3)], reference=gather_elements(axis), axis=axis)
    for depth, shared in ((1, 0), (2, 0), (3, 0), (1, 1), (2, 1), (1, 2)):
        lead = (3, 4)[:shared] + (2,)
        yield Case(f"{depth} of batch {shared}", "GatherND", [draw(3, 4, 5), random.integers(0, 3, (*lead, depth))], batch_dims=shared)
    yield Case("integers", "GatherElements", [of_type(np.uint8, 3, 4), indices(3, 2, below=4)], axis=1)


def scatter(x, places, updates, reduction):
    """`x`, flattened to rows, after the updates in their order."""
    combine = {"none": lambda a, b: b, "add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}[reduction]
    y = x.copy()
    for place, update in zip(places, updates):
        y[place] = combine(y[place], update)
    return y


def scatter_elements(axis, reduction):
    def reference(x, at, updates):
        places = []
        for index in np.ndindex(*at.shape):
            place = list(index)
            place[axis] = at[index] % x.shape[axis]
            places.append(tuple(place))
        return scatter(x, places, updates.reshape(-1), reduction)

    return reference


def scatter_nd(reduction):
    def reference(x, at, updates):
        depth = at.shape[-1]
        tuples = [tuple(row % x.shape[: len(row)]) for row in at.reshape(-1, depth)]
        return scatter(x, tuples, updates.reshape(len(tuples), *x.shape[depth:]), reduction)

    return reference


def scatters():
    for reduction in ("none", "add", "mul", "max", "min"):
        for dtype in (np.float32, np.int64, np.int32, np.uint8):
            # The same place more than once: of "none", the last stays.
            elements = [of_type(dtype, 3, 4), indices(3, 3, below=4), of_type(dtype, 3, 3)]
            name = f"{reduction} {np.dtype(dtype)}"
            for axis, at in ((1, elements[1]), (0, indices(3, 3, below=3))):
                operands = [elements[0], at, elements[2]]
                yield Case(f"{name} axis {axis}", "ScatterElements", operands, reference=scatter_elements(axis, reduction), axis=axis, reduction=reduction)
            rows = [of_type(dtype, 3, 4), indices(5, 1, below=3), of_type(dtype, 5, 4)]
            yield Case(f"rows {name}", "ScatterND", rows, reference=scatter_nd(reduction), reduction=reduction)
            single = [of_type(dtype, 3, 4), indices(6, 2, below=3), of_type(dtype, 6)]
            yield Case(f"elements {name}", "ScatterND", single, reference=scatter_nd(reduction), reduction=reduction)
    factors = np.float32([2, 0, 3, 0, 0, 5])
    yield Case("mul, zeros", "ScatterElements", [np.float32([1, 2, 3]), ints(0, 0, 1, 2, 2, 1), factors], reference=scatter_elements(0, "mul"), reduction="mul")
    yield Case("opset 9", "Scatter", [draw(3, 4), ints(0, 2).reshape(1, 2), draw(1, 2)], opset=9, reference=scatter_elements(0, "none"))


def sorting():
    for axis, largest, k in itertools.product((0, -1), (0, 1), (1, 3)):
        yield Case(f"{k} axis {axis} largest {largest}", "TopK", [draw(3, 5), ints(k)], outputs=2, listed=(0,), axis=axis, largest=largest)
    yield Case("all", "TopK", [draw(2, 5), ints(5)], outputs=2, listed=(0,))
    yield Case("ties", "TopK", [np.float32([[1, 2, 2, 1, 2]]), ints(4)], outputs=2, gradient=False)
    yield Case("integers", "TopK", [of_type(np.int32, 3, 6), ints(2)], outputs=2)
    # What the axis was called, and how many, before they were operands.
    top = lambda x: (-np.sort(-x, axis=1)[:, :2], np.argsort(-x, axis=1, kind="stable")[:, :2].astype(np.int64))
    yield Case("opset 9", "TopK", [draw(3, 5)], opset=9, outputs=2, listed=(0,), reference=top, k=2, axis=1)
    for axis in (0, 1, -1):
        yield Case(f"axis {axis}", "OneHot", [random.integers(-6, 7, (2, 3)), np.int64(5), draw(2)], axis=axis)
    yield Case("axis 0", "Compress", [draw(3, 4), np.array([True, False, True])], axis=0)
    yield Case("flattened", "Compress", [draw(3, 4), np.array([False, True, True, False, True])])
    for time in (0, 1):
        yield Case(f"time {time}", "ReverseSequence", [draw(3, 3, 2), ints(1, 3, 2)], time_axis=time, batch_axis=1 - time)
    yield Case("", "NonZero", [np.float32([[0, 1], [2, 0]])], gradient=False)


def rearranged():
    for mode in ("DCR", "CRD"):
        yield Case(mode, "DepthToSpace", [draw(2, 8, 2, 3)], blocksize=2, mode=mode)
    yield Case("", "SpaceToDepth", [draw(2, 3, 4, 6)], blocksize=2)
    for upper, k in itertools.product((0, 1), (-1, 0, 2)):
        yield Case(f"upper {upper} from {k}", "Trilu", [draw(2, 3, 4), np.int64(k)], upper=upper)
    for k in (-1, 0, 2):
        yield Case(f"from {k}", "EyeLike", [draw(3, 4)], gradient=False, k=k, dtype=TensorProto.INT32)
    for mode in ("constant", "reflect", "edge", "wrap"):
        yield Case(mode, "Pad", [draw(3, 4), ints(1, 2, 2, 1)], mode=mode)
    yield Case("cuts", "Pad", [draw(3, 4), ints(-1, 2, 1, -2)], reference=lambda x, _: np.pad(x[1:, :2], ((0, 1), (2, 0))))
    yield Case("axes and value", "Pad", [draw(3, 4), ints(2, 1), np.float32(7.5), ints(-1)], fixed=(2,), reference=lambda x, *_: np.pad(x, ((0, 0), (2, 1)), constant_values=7.5))
    wide = np.int64(2**40 + 1)
    yield Case("a large value", "Pad", [np.int64([1, 2]), ints(1, 2), wide], reference=lambda x, *_: np.pad(x, (1, 2), constant_values=wide))
    for size in ((2, 6), (5, 3)):
        yield Case(f"{size}", "CenterCropPad", [draw(3, 4), ints(*size)])
    for name, bounds in {"back": (3, 0, -2), "from the ends": (-1, -100, -1), "beyond": (1, 2**62, 2), "nothing": (2, 2, 1)}.items():
        yield Case(name, "Slice", [draw(5, 2), *(ints(at) for at in bounds[:2]), ints(0), ints(bounds[2])])
    yield Case("twice", "Tile", [draw(2, 3), ints(2, 2)])
    yield Case("none", "Tile", [draw(2, 3), ints(1, 0)])
    yield Case("of axes", "Expand", [draw(3, 1), ints(2, 1, 4)])


EQUATIONS = {
    "ij,jk->ik": [(2, 3), (3, 4)], "bij,bjk": [(2, 3, 4), (2, 4, 2)], "ii->i": [(4, 4)], "ii": [(3, 3)], "iij->j": [(3, 3, 2)],
    "iji->j": [(3, 2, 3)], "...ij->...ji": [(2, 3, 4)], "b...i,...i->b...": [(2, 3, 4), (3, 4)], "i,j,k->kij": [(2,), (3,), (2,)],
    "ab,bc,cd->ad": [(2, 3), (3, 4), (4, 2)], "ij->": [(2, 3)], "ij,ij->": [(2, 3), (2, 3)], "bhid,bhjd->bhij": [(2, 2, 3, 4), (2, 2, 2, 4)],
    "bn,anm,bm->ba": [(2, 3), (2, 3, 4), (2, 4)], "aBb,Bc->acb": [(2, 3, 4), (3, 2)], "ij,kj->ik": [(1, 3), (2, 1)],
    "...,...": [(2, 3), (3,)],
}  # fmt: skip


def einsums():
    for equation, shapes in EQUATIONS.items():
        reference = lambda *operands, equation=equation: np.asarray(np.einsum(equation, *operands))
        yield Case(equation, "Einsum", [draw(*shape) for shape in shapes], reference=reference, equation=equation)
        whole = [random.integers(-5, 6, shape).astype(np.int32) for shape in shapes]
        yield Case(f"{equation} of integers", "Einsum", whole, reference=reference, equation=equation)


def attentions():
    q, k, v = draw(2, 4, 3, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 3)
    flat = [draw(2, 3, 8), draw(2, 5, 4), draw(2, 5, 6)]
    seen = random.random((3, 5)) < 0.7
    seen[1] = False
    options = {"plain": {}, "causal": {"is_causal": 1}, "softcap": {"softcap": 1.5}, "scale": {"scale": 0.3}, "causal and capped": {"is_causal": 1, "softcap": 0.5}}
    masks = {"": None, "a mask": draw(3, 5), "a mask of heads": draw(2, 4, 3, 5), "a condition": seen, "a short mask": draw(3, 4)}
    for (name, attributes), (masked, mask) in itertools.product(options.items(), masks.items()):
        operands = [q, k, v] if mask is None else [q, k, v, mask]
        yield Case(f"{name} {masked}".strip(), "Attention", operands, opset=23, **attributes)
    yield Case("3-D", "Attention", flat, opset=23, q_num_heads=4, kv_num_heads=2)
    past = [draw(2, 2, 3, 4), draw(2, 2, 3, 3)]
    yield Case("with a past", "Attention", [q, k, v, None, *past], opset=23, outputs=3, is_causal=1)
    for causal in (0, 1):
        yield Case(f"lengths, causal {causal}", "Attention", [q, k, v, None, None, None, ints(4, 2)], opset=24, is_causal=causal)
    for mode in range(4):
        yield Case(f"scores {mode}", "Attention", [q, k, v, seen], opset=24, outputs=4, listed=(0,), softcap=2.0 if mode else 0.0, qk_matmul_output_mode=mode)
    x, angles = draw(2, 3, 4, 8), (draw(2, 4, 4), draw(2, 4, 4))
    yield Case("", "RotaryEmbedding", [x, *angles], opset=23)
    yield Case("interleaved", "RotaryEmbedding", [x, *angles], opset=23, interleaved=1)
    yield Case("a part", "RotaryEmbedding", [x, draw(2, 4, 2), draw(2, 4, 2)], opset=23, rotary_embedding_dim=4)
    table = [draw(9, 4), draw(9, 4), random.integers(0, 9, (2, 4))]
    yield Case("positions, 3-D", "RotaryEmbedding", [draw(2, 4, 16), *table], opset=23, num_heads=2)


if __name__ == "__main__":
    operators.main((gathers, scatters, sorting, rearranged, einsums, attentions))
