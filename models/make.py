"""Makes the small ONNX models of this folder, with seeded weights and reproducible bytes.

    python models/make.py                 write the committed models beside this script
    python models/make.py --check         exit 1 when a committed model differs
    python models/make.py --large OUT     write the benchmark-sized ones (not committed) to OUT

Needs `onnx` and `numpy`. Weights are drawn uniformly (He et al. 2015) from numpy's legacy
generator, whose stream is frozen, with arithmetic that is exact on every platform.
"""

import argparse
import pathlib
import sys
import zlib

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HERE = pathlib.Path(__file__).resolve().parent


class Model:
    """A graph under construction: each method adds nodes and returns the name of their value."""

    def __init__(self, name, shape, dtype=TensorProto.FLOAT, opset=17, ir_version=8):
        self.name = name
        self.opset, self.ir_version = opset, ir_version
        self.random = np.random.RandomState(zlib.crc32(name.encode()))
        self.nodes, self.initializers, self.counts = [], [], {}
        self.inputs = [helper.make_tensor_value_info("x", dtype, shape)]

    def parameter(self, name, array):
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def uniform(self, name, shape, fan_in, gain=6.0):
        """He-uniform weights; gain 6 before a ReLU, 3 where nothing halves the variance."""
        bound = np.sqrt(gain / fan_in)
        return self.parameter(name, ((self.random.random_sample(shape) * 2 - 1) * bound).astype(np.float32))

    def constant(self, array, dtype=np.int64):
        """A Constant node, as PyTorch's exporter writes shapes and scalars."""
        return self.node("Constant", [], value=numpy_helper.from_array(np.array(array, dtype)))

    def node(self, op, inputs, name=None, outputs=1, **attributes):
        if name is None:
            index = self.counts.get(op, 0)
            self.counts[op] = index + 1
            name = f"{op}_{index}"
        names = [f"{name}_output_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def linear(self, x, name, width_in, width_out, gain=6.0):
        """Gemm on a [rows, features] value, weight stored [out, in]."""
        weight = self.uniform(f"{name}.weight", (width_out, width_in), width_in, gain)
        bias = self.parameter(f"{name}.bias", np.zeros(width_out, np.float32))
        return self.node("Gemm", [x, weight, bias], name, transB=1)

    def project(self, x, name, width_in, width_out, bias=True, std=None):
        """MatMul (and Add) on a [batch, length, features] value, weight stored [in, out]."""
        bound = np.sqrt(3.0) * (std or 1 / np.sqrt(width_in))
        draw = (self.random.random_sample((width_in, width_out)) * 2 - 1) * bound
        x = self.node("MatMul", [x, self.parameter(f"{name}.weight", draw.astype(np.float32))], f"{name}/MatMul")
        if bias:
            x = self.node("Add", [x, self.parameter(f"{name}.bias", np.zeros(width_out, np.float32))], f"{name}/Add")
        return x

    def conv(self, x, name, channels_in, channels_out, kernel, stride=1, groups=1, bias=False, pad=None):
        per_group = channels_in // groups
        weight = self.uniform(f"{name}.weight", (channels_out, per_group, kernel, kernel), per_group * kernel**2)
        inputs = [x, weight]
        if bias:
            inputs.append(self.parameter(f"{name}.bias", np.zeros(channels_out, np.float32)))
        pad = kernel // 2 if pad is None else pad
        return self.node(
            "Conv", inputs, name, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4, group=groups
        )

    def batch_norm(self, x, name, channels):
        """Training form: the batch's own statistics, and running ones as further outputs."""
        parameters = [
            self.parameter(f"{name}.{key}", np.full(channels, value, np.float32))
            for key, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1))
        ]
        return self.node("BatchNormalization", [x, *parameters], name, 3, epsilon=1e-5, momentum=0.9, training_mode=1)[0]

    def layer_norm(self, x, name, width, bias=True):
        inputs = [x, self.parameter(f"{name}.weight", np.ones(width, np.float32))]
        if bias:
            inputs.append(self.parameter(f"{name}.bias", np.zeros(width, np.float32)))
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=1e-5)

    def relu(self, x):
        return self.node("Relu", [x])

    def gelu(self, x):
        """0.5 x (1 + erf(x / sqrt 2)), decomposed as the exporter does up to opset 19."""
        erf = self.node("Erf", [self.node("Div", [x, self.constant(2.0**0.5, np.float32)])])
        y = self.node("Mul", [x, self.node("Add", [erf, self.constant(1.0, np.float32)])])
        return self.node("Mul", [y, self.constant(0.5, np.float32)])

    def max_pool(self, x, kernel, stride, pad=0):
        return self.node("MaxPool", [x], kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4)

    def transpose(self, x, *perm):
        return self.node("Transpose", [x], perm=list(perm))

    def bytes(self, last, shape):
        """The finished file; `last` becomes the graph's output `logits`."""
        self.nodes[-1].output[0] = "logits"
        assert last == f"{self.nodes[-1].name}_output_0"
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        graph = helper.make_graph(self.nodes, self.name, self.inputs, [logits], self.initializers)
        model = helper.make_model(
            graph,
            producer_name="models/make.py",
            opset_imports=[helper.make_opsetid("", self.opset)],
            ir_version=self.ir_version,
        )
        onnx.checker.check_model(model, full_check=True)
        return model.SerializeToString(deterministic=True)


def mlp(name, widths):
    model = Model(name, ["batch", widths[0]])
    x = "x"
    for i, (width_in, width_out) in enumerate(zip(widths, widths[1:])):
        last = i == len(widths) - 2
        x = model.linear(x, f"fc{i + 1}", width_in, width_out, 3.0 if last else 6.0)
        x = x if last else model.relu(x)
    return model.bytes(x, ["batch", widths[-1]])


def mnist_cnn(name):
    """Two convolutions and two linear layers, 106 k parameters."""
    model = Model(name, ["N", 1, 28, 28])
    x = model.max_pool(model.relu(model.conv("x", "conv1", 1, 16, 5, bias=True)), 2, 2)
    x = model.max_pool(model.relu(model.conv(x, "conv2", 16, 32, 3, bias=True)), 2, 2)
    x = model.node("Flatten", [x], axis=1)
    x = model.relu(model.linear(x, "fc1", 32 * 7 * 7, 64))
    return model.bytes(model.linear(x, "fc2", 64, 10, 3.0), ["N", 10])


def digits_mlp(name):
    """For scikit-learn's digits, whose pixels are 0 to 16: the model scales them itself."""
    model = Model(name, ["N", 64], opset=13, ir_version=7)
    x = model.node("Mul", ["x", model.constant(1 / 16, np.float32)])
    x = model.relu(model.linear(x, "fc1", 64, 64))
    return model.bytes(model.linear(x, "fc2", 64, 10, 3.0), ["N", 10])


def digits_cnn(name):
    model = Model(name, ["N", 1, 8, 8], opset=13, ir_version=7)
    x = model.node("Mul", ["x", model.constant(1 / 16, np.float32)])
    x = model.relu(model.conv(x, "conv1", 1, 8, 3, bias=True))
    x = model.relu(model.conv(x, "conv2", 8, 16, 3, stride=2, bias=True))
    x = model.node("AveragePool", [x], kernel_shape=[2, 2], strides=[2, 2])
    x = model.node("Flatten", [x], axis=1)
    return model.bytes(model.linear(x, "fc", 16 * 2 * 2, 10, 3.0), ["N", 10])


def cifar_resnet(name, blocks, widths):
    """He et al. 2016 for 3x32x32 pictures, parameter-free shortcuts (option A), training form."""
    model = Model(name, ["batch", 3, 32, 32])
    x = model.relu(model.batch_norm(model.conv("x", "conv1", 3, widths[0], 3), "bn1", widths[0]))
    channels = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            prefix = f"layer{stage + 1}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = model.batch_norm(model.conv(x, f"{prefix}.conv1", channels, width, 3, stride), f"{prefix}.bn1", width)
            y = model.batch_norm(model.conv(model.relu(y), f"{prefix}.conv2", width, width, 3), f"{prefix}.bn2", width)
            if stride == 2:
                last = np.iinfo(np.int64).max
                starts, ends, axes, steps = (model.constant([v, v]) for v in (0, last, 0, 2))
                axes = model.constant([2, 3])
                x = model.node("Slice", [x, starts, ends, axes, steps])
                extra = (width - channels) // 2
                pads = model.constant([0, extra, 0, 0, 0, extra, 0, 0])
                x = model.node("Pad", [x, pads, model.constant(0, np.float32)], mode="constant")
            x = model.relu(model.node("Add", [y, x]))
            channels = width
    x = model.node("ReduceMean", [x], axes=[2, 3], keepdims=0)
    return model.bytes(model.linear(x, "fc", channels, 10, 3.0), ["batch", 10])


def imagenet_resnet(name, blocks, bottleneck):
    """ResNet-18 or ResNet-50 for 3x224x224 pictures, training form."""
    model = Model(name, ["batch", 3, 224, 224])

    def unit(x, prefix, channels_in, channels_out, kernel, stride=1):
        return model.batch_norm(
            model.conv(x, f"{prefix}.conv", channels_in, channels_out, kernel, stride), f"{prefix}.bn", channels_out
        )

    x = model.max_pool(model.relu(unit("x", "stem", 3, 64, 7, 2)), 3, 2, 1)
    channels = 64
    for stage, count in enumerate(blocks):
        width = 64 << stage
        out = width * (4 if bottleneck else 1)
        for block in range(count):
            prefix = f"layer{stage + 1}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            if bottleneck:
                y = model.relu(unit(x, f"{prefix}.1", channels, width, 1))
                y = model.relu(unit(y, f"{prefix}.2", width, width, 3, stride))
                y = unit(y, f"{prefix}.3", width, out, 1)
            else:
                y = model.relu(unit(x, f"{prefix}.1", channels, width, 3, stride))
                y = unit(y, f"{prefix}.2", width, out, 3)
            if stride != 1 or channels != out:
                x = unit(x, f"{prefix}.shortcut", channels, out, 1, stride)
            x = model.relu(model.node("Add", [y, x]))
            channels = out
    x = model.node("Flatten", [model.node("GlobalAveragePool", [x])], axis=1)
    return model.bytes(model.linear(x, "fc", channels, 1000, 3.0), ["batch", 1000])


def tiny_mobilenet(name):
    """Inverted residuals of Sandler et al. 2018: depthwise convolutions and ReLU6."""
    model = Model(name, ["N", 3, 32, 32], opset=20, ir_version=9)

    def unit(x, prefix, channels_in, channels_out, kernel, stride=1, groups=1, clip=True):
        x = model.conv(x, f"{prefix}.conv", channels_in, channels_out, kernel, stride, groups)
        x = model.batch_norm(x, f"{prefix}.bn", channels_out)
        return model.node("Clip", [x, model.constant(0, np.float32), model.constant(6, np.float32)]) if clip else x

    x = unit("x", "stem", 3, 8, 3, 2)
    for i, (channels_in, channels_out, stride) in enumerate(((8, 12, 2), (12, 12, 1), (12, 16, 2))):
        hidden = channels_in * 3
        y = unit(x, f"block{i}.expand", channels_in, hidden, 1)
        y = unit(y, f"block{i}.depthwise", hidden, hidden, 3, stride, groups=hidden)
        y = unit(y, f"block{i}.project", hidden, channels_out, 1, clip=False)
        x = model.node("Add", [x, y]) if stride == 1 and channels_in == channels_out else y
    x = unit(x, "head", 16, 32, 1)
    x = model.node("Flatten", [model.node("GlobalAveragePool", [x])], axis=1)
    return model.bytes(model.linear(x, "fc", 32, 10, 3.0), ["N", 10])


def embed(model, vocabulary, length, width):
    """Token plus position embedding."""
    draw = lambda rows: ((model.random.random_sample((rows, width)) * 2 - 1) * 0.1).astype(np.float32)
    tokens = model.node("Gather", [model.parameter("tok.weight", draw(vocabulary)), "x"], "tok/Gather")
    return model.node("Add", [tokens, model.parameter("pos.weight", draw(length))], "pos/Add")


def attention(model, x, prefix, length, width, heads, mask=None, bias=True):
    """Self-attention in the exporter's op pattern; `mask` is added to the scores."""
    head = width // heads
    qkv = model.project(x, f"{prefix}.qkv", width, 3 * width, bias)
    if mask is None:
        parts = model.node("Split", [qkv, model.constant([width] * 3)], outputs=3, axis=2)
        shape, merged = model.constant([0, 0, heads, head]), model.constant([0, 0, width])
    else:
        # The other habits of exporters: slices for the three parts, and the batch read from a Shape.
        bounds = [model.constant([i * width]) for i in range(4)]
        axis = model.constant([2])
        parts = [model.node("Slice", [qkv, bounds[i], bounds[i + 1], axis]) for i in range(3)]
        batch = model.node("Gather", [model.node("Shape", [x]), model.constant(0)], axis=0)
        batch = model.node("Unsqueeze", [batch, model.constant([0])])
        dims = [model.constant([v]) for v in (length, heads, head, width)]
        shape = model.node("Concat", [batch, *dims[:3]], axis=0)
        merged = model.node("Concat", [batch, dims[0], dims[3]], axis=0)
    query, key, value = (model.node("Reshape", [part, shape]) for part in parts)
    query, key, value = model.transpose(query, 0, 2, 1, 3), model.transpose(key, 0, 2, 3, 1), model.transpose(value, 0, 2, 1, 3)
    scores = model.node("MatMul", [query, key])
    scores = model.node("Mul", [scores, model.constant(1 / np.sqrt(head), np.float32)])
    if mask is not None:
        scores = model.node("Add", [scores, mask])
    mixed = model.node("MatMul", [model.node("Softmax", [scores], axis=-1), value])
    mixed = model.node("Reshape", [model.transpose(mixed, 0, 2, 1, 3), merged])
    return model.project(mixed, f"{prefix}.proj", width, width, bias)


def bert(name, vocabulary, width, heads, hidden, layers, length, labels):
    """Token classifier, normalisation after each block; logits [batch * length, labels]."""
    model = Model(name, ["batch", length], TensorProto.INT64)
    x = model.layer_norm(embed(model, vocabulary, length, width), "ln", width)
    for i in range(layers):
        y = attention(model, x, f"layers.{i}.attn", length, width, heads)
        x = model.layer_norm(model.node("Add", [x, y]), f"layers.{i}.ln1", width)
        y = model.gelu(model.project(x, f"layers.{i}.fc1", width, hidden))
        y = model.project(y, f"layers.{i}.fc2", hidden, width)
        x = model.layer_norm(model.node("Add", [x, y]), f"layers.{i}.ln2", width)
    x = model.project(x, "head", width, labels)
    return model.bytes(model.node("Reshape", [x, model.constant([-1, labels])]), ["rows", labels])


def gpt(name, vocabulary, width, heads, layers, length):
    """Next-token predictor, normalisation before each block, no biases, tied head."""
    model = Model(name, ["batch", length], TensorProto.INT64)
    x = embed(model, vocabulary, length, width)
    ones = model.node("Expand", [model.constant([1.0], np.float32), model.constant([length, length])])
    hidden = model.node("Equal", [model.node("Trilu", [ones], upper=0), model.constant([0.0], np.float32)])
    mask = model.node("Where", [hidden, model.constant([-np.inf], np.float32), model.constant([0.0], np.float32)])
    for i in range(layers):
        y = model.layer_norm(x, f"layers.{i}.ln1", width, bias=False)
        x = model.node("Add", [x, attention(model, y, f"layers.{i}.attn", length, width, heads, mask, bias=False)])
        y = model.layer_norm(x, f"layers.{i}.ln2", width, bias=False)
        y = model.gelu(model.project(y, f"layers.{i}.fc1", width, 4 * width, bias=False))
        x = model.node("Add", [x, model.project(y, f"layers.{i}.fc2", 4 * width, width, bias=False)])
    x = model.layer_norm(x, "ln", width, bias=False)
    x = model.node("MatMul", [x, model.transpose("tok.weight", 1, 0)], "head/MatMul")
    return model.bytes(model.node("Reshape", [x, model.constant([-1, vocabulary])]), ["rows", vocabulary])


def recurrent(model, op, x, prefix, width, hidden, directions=1, extra=(), outputs=1, **attributes):
    """One recurrent layer; `extra` are names and shapes of inputs after the three weights, none for one left out."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op] * hidden
    shapes = [("w", (directions, gates, width)), ("r", (directions, gates, hidden)), ("b", (directions, 2 * gates)), *extra]
    inputs = [x, *(model.uniform(f"{prefix}.{part[0]}", part[1], hidden, 1.0) if part else "" for part in shapes)]
    return model.node(op, inputs, prefix, outputs, hidden_size=hidden, **attributes)


def tiny_rnn(name):
    """One layer of each kind over 12 tokens, classified by the last state; logits [batch, 4]."""
    model = Model(name, ["batch", 12], TensorProto.INT64)
    x = model.transpose(embed(model, 64, 12, 12), 1, 0, 2)
    extra = (None, None, None, ("p", (2, 24)))
    x = recurrent(model, "LSTM", x, "lstm", 12, 8, 2, extra, direction="bidirectional")
    x = model.node("Reshape", [model.transpose(x, 0, 2, 1, 3), model.constant([0, 0, 16])])
    x = recurrent(model, "GRU", x, "gru", 16, 20, linear_before_reset=1, direction="reverse")
    x = model.node("Squeeze", [x, model.constant([1])])
    _, x = recurrent(model, "RNN", x, "rnn", 20, 10, outputs=2)
    x = model.node("Squeeze", [x, model.constant([0])])
    return model.bytes(model.linear(x, "fc", 10, 4, 3.0), ["batch", 4])


COMMITTED = {
    "digits_cnn": digits_cnn,
    "digits_mlp": digits_mlp,
    "mnist_cnn": mnist_cnn,
    "mnist_mlp": lambda name: mlp(name, (784, 128, 64, 10)),
    "resnet8": lambda name: cifar_resnet(name, 1, (8, 16, 32)),
    "resnet20": lambda name: cifar_resnet(name, 3, (16, 32, 64)),
    "tiny_bert": lambda name: bert(name, 64, 32, 2, 64, 2, 16, 4),
    "tiny_gpt": lambda name: gpt(name, 65, 32, 2, 2, 32),
    "tiny_mobilenet": tiny_mobilenet,
    "tiny_rnn": tiny_rnn,
}

LARGE = {
    "mlp": lambda name: mlp(name, (784, 1024, 1024, 10)),
    "resnet18": lambda name: imagenet_resnet(name, (2, 2, 2, 2), False),
    "resnet50": lambda name: imagenet_resnet(name, (3, 4, 6, 3), True),
    "bert": lambda name: bert(name, 8192, 256, 4, 1024, 4, 128, 16),
    "gpt": lambda name: gpt(name, 65, 384, 6, 6, 256),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with the committed files, write nothing")
    parser.add_argument("--large", type=pathlib.Path, metavar="OUT", help="write the benchmark-sized models to OUT")
    arguments = parser.parse_args()
    folder, models = (arguments.large, LARGE) if arguments.large else (HERE, COMMITTED)
    folder.mkdir(parents=True, exist_ok=True)
    differing = 0
    for name, make in models.items():
        data, path = make(name), folder / f"{name}.onnx"
        if arguments.check:
            same = path.exists() and path.read_bytes() == data
            differing += not same
            print(f"{path.name}: {'same' if same else 'differs'}")
        else:
            path.write_bytes(data)
            print(f"{path.name}: {len(data)} bytes")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
