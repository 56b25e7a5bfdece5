"""The eight benchmark networks in plain PyTorch, with seeded random weights and batches.

Every forward returns logits of shape [rows, classes], so that one softmax cross-entropy
over int64 labels [rows] serves all of them, here and in the exported ONNX files.
"""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SEED = 1234


class Mlp(nn.Module):
    """784-1024-1024-10."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10)
        )

    def forward(self, x):
        return self.net(x)


class CifarBlock(nn.Module):
    """Basic block of He et al. 2016 for CIFAR, with the parameter-free shortcut (option A)."""

    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.stride = stride
        self.pad = (channels_out - channels_in) // 2

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(y + x)


class ResNet20(nn.Module):
    """Three stages of three basic blocks, 16-32-64 channels, for 32x32 pictures."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        blocks = []
        channels_in = 16
        for channels_out, stride in ((16, 1), (32, 2), (64, 2)):
            for i in range(3):
                blocks.append(CifarBlock(channels_in, channels_out, stride if i == 0 else 1))
                channels_in = channels_out
        self.layers = nn.Sequential(*blocks)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.layers(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for query, key and value."""

    def __init__(self, width, heads, causal, bias):
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width, bias=bias)

    def forward(self, x):
        batch, length, width = x.shape
        parts = self.qkv(x).split(width, dim=2)
        query, key, value = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2) for part in parts
        )
        y = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


class BertLayer(nn.Module):
    """Encoder layer with the normalisation after each block."""

    def __init__(self, width, heads, hidden):
        super().__init__()
        self.attn = Attention(width, heads, causal=False, bias=True)
        self.ln1, self.ln2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        x = self.ln1(x + self.attn(x))
        return self.ln2(x + self.fc2(F.gelu(self.fc1(x))))


class Bert(nn.Module):
    """BERT-like token classifier: 4 layers, width 256, 4 heads, 128 tokens, 16 labels."""

    def __init__(self, vocabulary=8192, width=256, heads=4, hidden=1024, layers=4, length=128, labels=16):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.ln = nn.LayerNorm(width)
        self.layers = nn.ModuleList(BertLayer(width, heads, hidden) for _ in range(layers))
        self.head = nn.Linear(width, labels)
        self.labels = labels

    def forward(self, ids):
        x = self.ln(self.tok(ids) + self.pos.weight)
        for layer in self.layers:
            x = layer(x)
        return self.head(x).reshape(-1, self.labels)


class GptLayer(nn.Module):
    """Decoder layer with the normalisation before each block and no biases."""

    def __init__(self, width, heads):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.attn = Attention(width, heads, causal=True, bias=False)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class Gpt(nn.Module):
    """GPT-like character model: 6 layers, width 384, 6 heads, 256 characters, tied head."""

    def __init__(self, vocabulary=65, width=384, heads=6, layers=6, length=256):
        super().__init__()
        self.tok, self.pos = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(GptLayer(width, heads) for _ in range(layers))
        self.ln = nn.LayerNorm(width, bias=False)
        self.vocabulary = vocabulary
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids):
        x = self.tok(ids) + self.pos.weight
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.ln(x), self.tok.weight).reshape(-1, self.vocabulary)


class Rnn(nn.Module):
    """Recurrent character model: 2 layers of LSTM or GRU, width 256, 64 characters."""

    def __init__(self, kind, vocabulary=96, width=256, layers=2):
        super().__init__()
        self.tok = nn.Embedding(vocabulary, width)
        self.rnn = getattr(nn, kind)(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, vocabulary)
        self.vocabulary = vocabulary

    def forward(self, ids):
        y, _ = self.rnn(self.tok(ids))
        return self.head(y).reshape(-1, self.vocabulary)


def resnet18():
    """torchvision's ResNet-18."""
    import torchvision

    return torchvision.models.resnet18(weights=None)


def mobilenetv2():
    """torchvision's MobileNetV2 without its dropout, which has no counterpart to compare with."""
    import torchvision

    net = torchvision.models.mobilenet_v2(weights=None, dropout=0.0)
    net.classifier[0] = nn.Identity()
    return net


def _pictures(channels, size, classes):
    return lambda r, n: (r.standard_normal((n, channels, size, size), dtype=np.float32), r.integers(0, classes, n))


def _tokens(vocabulary, length, classes):
    return lambda r, n: (r.integers(0, vocabulary, (n, length)), r.integers(0, classes, n * length))


@dataclass(frozen=True)
class Benchmark:
    """A network, the batch size it is measured with, and how a random batch of it is drawn."""

    make: Callable[[], nn.Module]
    batch_size: int
    draw: Callable
    convolutional: bool = False


BENCHMARKS = {
    "mlp": Benchmark(Mlp, 128, lambda r, n: (r.standard_normal((n, 784), dtype=np.float32), r.integers(0, 10, n))),
    "resnet20": Benchmark(ResNet20, 128, _pictures(3, 32, 10), True),
    "resnet18": Benchmark(resnet18, 16, _pictures(3, 224, 1000), True),
    "mobilenetv2": Benchmark(mobilenetv2, 16, _pictures(3, 224, 1000), True),
    "bert": Benchmark(Bert, 16, _tokens(8192, 128, 16)),
    "gpt": Benchmark(Gpt, 8, _tokens(65, 256, 65)),
    "lstm": Benchmark(lambda: Rnn("LSTM"), 64, _tokens(96, 64, 96)),
    "gru": Benchmark(lambda: Rnn("GRU"), 64, _tokens(96, 64, 96)),
}


def build(name):
    """The named network with its seeded weights."""
    torch.manual_seed(SEED)
    return BENCHMARKS[name].make()


def batch(name, samples=None, seed=0):
    """One (x, label) pair of numpy arrays; `samples` overrides the batch size."""
    benchmark = BENCHMARKS[name]
    return benchmark.draw(np.random.default_rng(seed), samples or benchmark.batch_size)
