"""Evaluates ONNX models in PyTorch, in float64 unless asked, so that autograd gives the gradient of any initializer.

Only the operators and forms that the public models of `real.py` have; anything else is a KeyError or an assertion.
"""

import math

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper


def tensor(array):
    """An array as a tensor, floats in the type of all floats."""
    value = torch.from_numpy(np.array(array))
    return value.to(torch.get_default_dtype()) if value.is_floating_point() else value


def ints(value):
    return [int(element) for element in (value if isinstance(value, list) else value.reshape(-1).tolist())]


class Reference:
    """A model, and its initializers and constants as leaves of the tape."""

    def __init__(self, path, dtype=torch.float64):
        torch.set_default_dtype(dtype)
        self.graph = onnx.load(path).graph
        self.weights = {item.name: tensor(numpy_helper.to_array(item)) for item in self.graph.initializer}
        for node in self.graph.node:
            if node.op_type == "Constant":
                self.weights[node.output[0]] = tensor(numpy_helper.to_array(node.attribute[0].t))

    def outputs(self, inputs):
        """Every output, by name."""
        values = {"": None, **self.weights, **{name: tensor(array) for name, array in inputs.items()}}
        for node in self.graph.node:
            if node.op_type == "Constant":
                continue
            attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
            results = OPERATORS[node.op_type](*(values[name] for name in node.input), **attributes)
            results = results if isinstance(results, tuple) else (results,)
            values.update(zip(node.output, results))
        return {output.name: values[output.name] for output in self.graph.output}

    def gradients(self, inputs, label, names):
        """The mean squared error of the first output, and its gradients."""
        for name in names:
            self.weights[name].requires_grad_(True)
        first = next(iter(self.outputs(inputs).values()))
        loss = torch.mean((first - tensor(label)) ** 2)
        found = torch.autograd.grad(loss, [self.weights[name] for name in names], allow_unused=True)
        zeros = (np.zeros(tuple(self.weights[name].shape)) for name in names)
        return loss.item(), {name: zero if g is None else g.double().numpy() for name, zero, g in zip(names, zeros, found)}


def padded(x, pads, value=0.0):
    """Begins and ends of the last axes, as ONNX lists them."""
    count = len(pads) // 2
    pairs = [int(pad) for axis in reversed(range(count)) for pad in (pads[axis], pads[axis + count])]
    return F.pad(x, pairs, value=value)


def conv(x, w, b=None, *, strides=None, pads=None, dilations=None, group=1, auto_pad=b"NOTSET", kernel_shape=None):
    rank = x.dim() - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    if auto_pad == b"SAME_UPPER":
        needed = [
            max((math.ceil(n / s) - 1) * s + (k - 1) * d + 1 - n, 0)
            for n, k, s, d in zip(x.shape[2:], w.shape[2:], strides, dilations)
        ]
        pads = [n // 2 for n in needed] + [n - n // 2 for n in needed]
    elif auto_pad == b"VALID":
        pads = None
    x = padded(x, pads or [0] * 2 * rank)
    return (F.conv1d, F.conv2d)[rank - 1](x, w, b, stride=strides, dilation=dilations, groups=group)


def conv_transpose(x, w, b=None, *, strides=(1, 1), pads=(0, 0, 0, 0), group=1, dilations=(1, 1), auto_pad=b"NOTSET", kernel_shape=None):
    assert auto_pad == b"NOTSET" and list(pads[:2]) == list(pads[2:])
    return F.conv_transpose2d(x, w, b, stride=strides, padding=pads[:2], groups=group, dilation=dilations)


def max_pool(x, *, kernel_shape, strides, pads=(0, 0, 0, 0), ceil_mode=0, auto_pad=b"NOTSET"):
    return F.max_pool2d(padded(x, pads, -math.inf), kernel_shape, strides, ceil_mode=bool(ceil_mode))


def slice_(x, starts=None, ends=None, axes=None, steps=None, **attributes):
    lists = [attributes.get(key) if at is None else ints(at) for key, at in zip(("starts", "ends", "axes"), (starts, ends, axes))]
    starts, ends, axes = lists[0], lists[1], lists[2] or range(len(lists[0]))
    for start, end, axis, step in zip(starts, ends, axes, ints(steps) if steps is not None else [1] * len(starts)):
        size = x.shape[axis]
        start, end, step = slice(start, end, step).indices(size) if step > 0 else slice(start, None if end < -size else end, step).indices(size)
        x = x.index_select(axis, torch.arange(start, end, step))
    return x


def pad(x, pads, value=None, *, mode=b"constant"):
    amounts = ints(pads)
    if mode == b"reflect":
        for axis in range(x.dim()):
            before, after, size = amounts[axis], amounts[axis + x.dim()], x.shape[axis]
            index = torch.cat([torch.arange(before, 0, -1), torch.arange(size), torch.arange(size - 2, size - 2 - after, -1)])
            x = x.index_select(axis, index)
        return x
    return padded(x, amounts, 0.0 if value is None else value.item())


def squeeze(x, axes=None, **attributes):
    axes = attributes.get("axes") if axes is None else ints(axes)
    axes = {axis % x.dim() for axis in axes} if axes else {axis for axis, size in enumerate(x.shape) if size == 1}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in axes])


def unsqueeze(x, axes=None, **attributes):
    axes = attributes["axes"] if axes is None else ints(axes)
    rank = x.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def reduce(function):
    def run(x, axes=None, *, keepdims=1, noop_with_empty_axes=0, **attributes):
        axes = attributes.get("axes") if axes is None else ints(axes)
        return function(x, axes or list(range(x.dim())), bool(keepdims))

    return run


def reshape(x, shape, *, allowzero=0):
    sizes = [x.shape[at] if size == 0 else size for at, size in enumerate(ints(shape))]
    return x.reshape(sizes)


def batch_normalization(x, scale, bias, mean, variance, *, epsilon=1e-5, momentum=0.9, **_):
    shape = [1, -1] + [1] * (x.dim() - 2)
    scale, bias, mean, variance = (value.reshape(shape) for value in (scale, bias, mean, variance))
    return (x - mean) / torch.sqrt(variance + epsilon) * scale + bias


def clip(x, low=None, high=None, **attributes):
    low, high = attributes.get("min", low), attributes.get("max", high)
    x = x if low is None else torch.maximum(x, torch.as_tensor(low, dtype=x.dtype))
    return x if high is None else torch.minimum(x, torch.as_tensor(high, dtype=x.dtype))


def resize(x, roi=None, scales=None, sizes=None, *, mode=b"nearest", coordinate_transformation_mode=b"half_pixel", nearest_mode=b"round_prefer_floor", cubic_coeff_a=-0.75, **_):
    assert mode == b"nearest" and coordinate_transformation_mode == b"asymmetric" and nearest_mode == b"floor"
    for axis, scale in enumerate(scales.tolist()):
        if scale != 1:
            index = torch.floor(torch.arange(int(x.shape[axis] * scale)) / scale).long()
            x = x.index_select(axis, index)
    return x


def directions(x, w, r, step, states, hidden):
    """Runs a recurrent cell over the steps of each direction: the outputs, and the last states."""
    outputs, last = [], []
    for at in range(w.shape[0]):
        state = [value[at] for value in states]
        rows = list(range(x.shape[0]))
        each = {}
        for row in reversed(rows) if at else rows:
            state = step(at, x[row], state)
            each[row] = state[0]
        outputs.append(torch.stack([each[row] for row in rows]))
        last.append(state)
    return torch.stack(outputs, 1), tuple(torch.stack(values) for values in zip(*last))


def biases(b, w, hidden, gates):
    return w.new_zeros(w.shape[0], 2 * gates * hidden) if b is None else b


def lstm(x, w, r, b=None, lengths=None, h=None, c=None, peepholes=None, *, hidden_size, direction=b"forward", layout=0, input_forget=0, activations=None):
    assert lengths is None and not layout and direction != b"reverse"
    assert not activations or set(activations) <= {b"Sigmoid", b"Tanh"}
    b = biases(b, w, hidden_size, 4)
    start = x.new_zeros(w.shape[0], x.shape[1], hidden_size)

    def step(at, x, state):
        gates = x @ w[at].T + state[0] @ r[at].T + b[at, : 4 * hidden_size] + b[at, 4 * hidden_size :]
        i, o, f, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        return [torch.sigmoid(o) * torch.tanh(c), c]

    y, (h, c) = directions(x, w, r, step, [start if h is None else h, start if c is None else c], hidden_size)
    return y, h, c


def gru(x, w, r, b=None, lengths=None, h=None, *, hidden_size, direction=b"forward", linear_before_reset=0, layout=0, activations=None):
    assert lengths is None and not layout and direction != b"reverse"
    assert not activations or set(activations) <= {b"Sigmoid", b"Tanh"}
    b = biases(b, w, hidden_size, 3)
    size = hidden_size

    def step(at, x, state):
        wx = x @ w[at].T + b[at, : 3 * size]
        rb, hidden = b[at, 3 * size :], state[0]
        z = torch.sigmoid(wx[:, :size] + hidden @ r[at, :size].T + rb[:size])
        reset = torch.sigmoid(wx[:, size : 2 * size] + hidden @ r[at, size : 2 * size].T + rb[size : 2 * size])
        last = r[at, 2 * size :].T
        inner = reset * (hidden @ last + rb[2 * size :]) if linear_before_reset else (reset * hidden) @ last + rb[2 * size :]
        return [(1 - z) * torch.tanh(wx[:, 2 * size :] + inner) + z * hidden]

    start = x.new_zeros(w.shape[0], x.shape[1], size)
    y, (h,) = directions(x, w, r, step, [start if h is None else h], size)
    return y, h


def gemm(a, b, c=None, *, alpha=1.0, beta=1.0, transA=0, transB=0):
    product = alpha * (a.T if transA else a) @ (b.T if transB else b)
    return product if c is None else product + beta * c


def cast(x, *, to):
    dtype = tensor(np.zeros(1, onnx.helper.tensor_dtype_to_np_dtype(to))).dtype
    return x.to(dtype)


def gather(x, index, *, axis=0):
    axis, index = axis % x.dim(), torch.where(index < 0, index + x.shape[axis], index)
    flat = x.index_select(axis, index.reshape(-1).long())
    return flat.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]])


def div(a, b):
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def filled(shape, *, value=None):
    value = torch.zeros(1) if value is None else tensor(numpy_helper.to_array(value))
    return value.reshape(-1)[0].expand(ints(shape)).clone()


OPERATORS = {
    "Add": torch.add,
    "BatchNormalization": batch_normalization,
    "Cast": cast,
    "Clip": clip,
    "Concat": lambda *values, axis: torch.cat(values, axis),
    "ConstantOfShape": filled,
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Div": div,
    "Equal": torch.eq,
    "Exp": torch.exp,
    "Expand": lambda x, shape: x.expand(torch.broadcast_shapes(tuple(x.shape), tuple(ints(shape)))),
    "GRU": gru,
    "Gather": gather,
    "Gemm": gemm,
    "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": lambda x, alpha=0.2, beta=0.5: torch.clamp(alpha * x + beta, 0, 1),
    "Identity": lambda x: x,
    "LSTM": lstm,
    "Log": torch.log,
    "LogSoftmax": lambda x, axis=-1: torch.log_softmax(x, axis),
    "MatMul": torch.matmul,
    "Max": lambda *values: torch.stack(torch.broadcast_tensors(*values)).amax(0),
    "MaxPool": max_pool,
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Pad": pad,
    "Pow": lambda a, b: torch.pow(a, b.to(a.dtype)),
    "Reciprocal": torch.reciprocal,
    "ReduceMax": reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "ReduceSum": reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "Relu": torch.relu,
    "Reshape": reshape,
    "Resize": resize,
    "Scaler": lambda x, offset, scale: (x - torch.tensor(offset)) * torch.tensor(scale),
    "Shape": lambda x: torch.tensor(x.shape),
    "Sigmoid": torch.sigmoid,
    "Slice": slice_,
    "Softmax": lambda x, axis=-1: torch.softmax(x, axis),
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm=None: x.permute(perm or list(reversed(range(x.dim())))),
    "Unsqueeze": unsqueeze,
    "Where": torch.where,
}
