"""Compares 8-bit optimizer state and weights in bf16 with PyTorch's optimizers in f32, on the digits.

    python tests/peers/state.py [--qcompile PATH]

Passes when the codes after a step are those of docs/quantization.md for PyTorch's moments, each
one of the two beside; when the mean loss of each of 5 epochs is within 3 % of PyTorch's; and when
weights in bf16 learn with a small learning rate as those in f32 do, where rounding to nearest does
not.
"""

import gzip
import json

import peer

peer.require("torch")

import numpy as np
import torch
import torch.nn.functional as F

MODEL = peer.ROOT / "models" / "digits_mlp.onnx"
BATCH, STEPS, EPOCHS = 32, 56, 5
WORDS = ["--loss", "cross-entropy", "--batch-size", BATCH, "--precision", "f32", "--no-shuffle", "--json"]


def network():
    net = torch.nn.Sequential()
    net.fc1, net.fc2 = torch.nn.Linear(64, 64), torch.nn.Linear(64, 10)
    net.forward = lambda x: net.fc2(torch.relu(net.fc1(x / 16)))
    peer.load_weights(net, MODEL)
    return net


def reference(optimizer, x, label, epochs, narrow=False):
    """PyTorch's mean loss of each epoch and the network; `narrow` keeps its weights in bf16."""
    net = network()
    update = optimizer(net.parameters())
    means = []
    for _ in range(epochs):
        losses = []
        for at in range(0, len(x), BATCH):
            update.zero_grad()
            loss = F.cross_entropy(net(x[at : at + BATCH]), label[at : at + BATCH])
            loss.backward()
            update.step()
            losses.append(loss.item())
            if narrow:
                with torch.no_grad():
                    for weight in (net.fc1.weight, net.fc2.weight):
                        weight.copy_(weight.bfloat16().float())
        means.append(np.mean(losses))
    return np.array(means), update, net


def tensors(path):
    """The tensors of a safetensors file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    types = {"F32": np.float32, "I8": np.int8, "U8": np.uint8, "I64": np.int64, "BF16": np.uint16}
    read = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            data = np.frombuffer(raw[8 + size + begin : 8 + size + end], types[entry["dtype"]])
            read[name] = data.reshape(entry["shape"])
    return read


def check_codes(work, data, x, label):
    """What does not fit after one step of Adam."""
    work.run("train", MODEL, "--data", data, "--epochs", 1, "--checkpoint", "one", "--optimizer", "adam", "--lr", 1e-3, "--quantize-ops", "update", *WORDS)
    got = tensors(work.path / "one" / "state.safetensors")
    _, update, net = reference(lambda p: torch.optim.Adam(p, lr=1e-3), x[:BATCH], label[:BATCH], 1)
    failures = []
    for name, weight in (("fc1.weight", net.fc1.weight), ("fc2.weight", net.fc2.weight)):
        for moment, limit, power in (("exp_avg", 127, 2), ("exp_avg_sq", 255, 4)):
            wanted = update.state[weight][moment].numpy().reshape(got[f"{name}.{moment}"].shape)
            amax = np.maximum(np.abs(wanted).max(1, keepdims=True), 1e-30)
            if not np.allclose(got[f"{name}.{moment}.amax"], amax, rtol=1e-4, atol=1e-12):
                failures.append(f"{name}.{moment}: the scales differ")
            place = np.sign(wanted) * limit * (np.abs(wanted) / amax) ** (1 / power)
            stored = got[f"{name}.{moment}"]
            if stored.dtype != (np.int8 if moment == "exp_avg" else np.uint8):
                failures.append(f"{name}.{moment}: the state is {stored.dtype}")
            codes = stored.astype(np.float64)
            if np.abs(codes - place).max() > 1.001:
                failures.append(f"{name}.{moment}: a code is {np.abs(codes - place).max():.2f} from its value")
            if moment == "exp_avg_sq" and ((codes == 0) & (wanted > 0)).any():
                failures.append(f"{name}.{moment}: a value above 0 became 0")
    return failures


def main():
    values = peer.parse(peer.arguments(__doc__.splitlines()[0], ("digits",)), ("digits",))
    work = peer.Workspace(values)
    with gzip.open(peer.ROOT / "models" / "data" / "digits.csv.gz", "rt") as lines:
        digits = np.loadtxt(lines, delimiter=",", dtype=np.float32)[: BATCH * STEPS]
    data, one = work.path / "digits.npz", work.path / "one.npz"
    np.savez(data, x=digits[:, :64], label=digits[:, 64].astype(np.int64))
    np.savez(one, x=digits[:BATCH, :64], label=digits[:BATCH, 64].astype(np.int64))
    x, label = torch.from_numpy(digits[:, :64]), torch.from_numpy(digits[:, 64].astype(np.int64))

    failures, rows = check_codes(work, one, x, label), []

    def run(*words):
        lines = peer.json_lines(work.run("train", MODEL, "--data", data, "--epochs", EPOCHS, "-o", "out.qplan", *WORDS, *words))
        return np.array([line["loss"] for line in lines if "epoch" in line])

    def compare(case, wanted, got, limit):
        error = np.abs(got - wanted) / wanted
        rows.append([case, f"{wanted[-1]:.4f}", f"{got[-1]:.4f}", f"{100 * error.max():.2f} %"])
        if not error.max() <= limit:
            failures.append(f"{case}: {got} is not {wanted}")

    optimizers = {
        "adam": (lambda p: torch.optim.Adam(p, lr=1e-3), ["--lr", 1e-3]),
        "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01), ["--lr", 1e-3, "--weight-decay", 0.01]),
        "momentum": (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9), ["--lr", 0.05]),
    }
    for name, (optimizer, words) in optimizers.items():
        wanted, _, _ = reference(optimizer, x, label, EPOCHS)
        got = run("--optimizer", name, "--quantize-ops", "update", *words)
        compare(f"{name}, 8-bit state", wanted, got, 0.03)
        got = run("--optimizer", name, "--quantize-ops", "mean,update", "--master-weights", "off", *words)
        compare(f"{name}, 8-bit state and mean, bf16 weights", wanted, got, 0.05)

    slow = lambda p: torch.optim.SGD(p, lr=5e-4)
    wanted, _, _ = reference(slow, x, label, EPOCHS)
    nearest, _, _ = reference(slow, x, label, EPOCHS, narrow=True)
    got = run("--optimizer", "sgd", "--lr", 5e-4, "--quantize-ops", "update", "--master-weights", "off")
    compare("sgd, lr 0.0005, bf16 weights", wanted, got, 0.01)
    lost = (nearest[-1] - wanted[-1]) / (wanted[0] - wanted[-1])
    rows.append(["  the same to nearest (PyTorch)", f"{wanted[-1]:.4f}", f"{nearest[-1]:.4f}", "-"])
    if lost < 0.1:
        failures.append(f"rounding to nearest loses only {100 * lost:.1f} %: the case shows nothing")
    peer.table(["case", "PyTorch f32", "qcompile", "largest error"], rows)
    peer.finish(failures)


main()
