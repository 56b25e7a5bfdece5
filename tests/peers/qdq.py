"""Quantizes trained networks, and compares what ONNX Runtime makes of the QDQ models with what qcompile does.

    python tests/peers/qdq.py --data FOLDER [--qcompile PATH] [--onnx FOLDER] [--samples N] [MODEL ...]

FOLDER holds Fashion-MNIST (`models/fetch.sh FOLDER fashion-mnist`). Each model trains a few epochs on the first
samples; then, for each way to round it:

- the file passes ONNX's checker, and ONNX Runtime's top-1 on the test set is that of qcompile within 0.2 points, for
  int8 weights within 1 point of f32, without a convolution or Gemm left in f32;
- with int4 weights, ONNX's reference evaluator agrees with ONNX Runtime on the class of 99 % of some samples, and
  training with the roundings (--qat) is better than rounding after it;
- a trained plan goes out with its scales: `qcompile eval` and ONNX Runtime agree within 0.2 points.

Ranges are compared with those of ONNX Runtime's calibrators (min-max, percentile) and with pytorch-quantization's
entropy in numpy. At last the speed: ResNet-18 in int8 must be 1.5 times as fast as in f32, where PyTorch is there to
export it (`--onnx` takes it from a folder).
"""

import collections
import contextlib
import gzip
import io
import json
import time

import peer

peer.require("onnxruntime")

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from onnxruntime.quantization.calibrate import CalibrationDataReader, CalibrationMethod, create_calibrator

#: Each with the epochs and the learning rate of training, and the learning rate of --qat.
MODELS = {"mnist_cnn": (3, 0.05, 0.01), "resnet8": (3, 0.1, 0.02), "resnet20": (3, 0.1, 0.02)}
POINTS, DROP, SPEED = 0.2, 1.0, 1.5
WAYS = [
    ("int8", []),
    ("int8, percentile", ["--calibration", "percentile=99.99"]),
    ("int8, mse", ["--calibration", "mse"]),
    ("int8, symmetric", ["--activations", "int8"]),
    ("int4", ["--weights", "int4"]),
    ("int4, blocks", ["--weights", "int4", "--block-size", "16"]),
]


def read(path, offset):
    return np.frombuffer(gzip.open(path).read(), np.uint8, offset=offset)


def fashion(folder, part, model, count):
    """Pictures as the model takes them, normalized, and their classes."""
    pictures = read(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)[:count]
    x = (pictures.astype(np.float32) / 255 - 0.2860) / 0.3530
    if model != "mnist_cnn":
        x = np.pad(np.repeat(x, 3, 1), ((0, 0), (0, 0), (2, 2), (2, 2)), constant_values=x.min())
    return x, read(folder / f"{part}-labels-idx1-ubyte.gz", 8)[:count].astype(np.int64)


def session(path, optimized=None):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if optimized:
        options.optimized_model_filepath = str(optimized)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def top1(logits, label):
    return 100 * float((logits.argmax(1) == label).mean())


def compare(work, path, x, label):
    """Top-1 of ONNX Runtime and of qcompile on a file, and the operators that ONNX Runtime runs."""
    onnx.checker.check_model(str(path), full_check=True)
    optimized = work.path / "optimized.onnx"
    runtime = session(path, optimized).run(None, {"x": x})[0]
    np.savez(work.path / "in.npz", x=x)
    work.run("run", path, "--precision", "f32", "--inputs", "in.npz", "--outputs", "out.npz")
    with np.load(work.path / "out.npz") as file:
        own = file[file.files[0]]
    operators = collections.Counter(node.op_type for node in onnx.load(optimized).graph.node)
    return top1(runtime, label), top1(own, label), operators


def check(work, values, name):
    epochs, rate, fine = MODELS[name]
    x, label = fashion(values.data, "train", name, values.samples)
    test_x, test = fashion(values.data, "t10k", name, 10000)
    np.savez(work.path / "train.npz", x=x, label=label)
    np.savez(work.path / "test.npz", x=test_x, label=test)
    model = peer.ROOT / "models" / f"{name}.onnx"
    flags = ["--data", "train.npz", "--loss", "cross-entropy", "-q"]
    work.run("train", model, *flags, "--epochs", epochs, "--precision", "f32", "--lr", rate, "--checkpoint", f"{name}.run")
    plain = work.path / f"{name}.onnx"
    work.run("export", f"{name}.run", "-o", plain)
    f32 = top1(session(plain).run(None, {"x": test_x})[0], test)
    rows, failures, after = [], [], {}

    def judge(way, path, eight, trained=None):
        runtime, own, operators = compare(work, path, test_x, test)
        own = own if trained is None else trained
        good = abs(runtime - own) <= POINTS
        if eight:
            good &= runtime >= f32 - DROP
        if eight and "symmetric" not in way:
            good &= not operators.keys() & {"Conv", "FusedConv", "Gemm", "MatMul"}
        if not good:
            failures.append(f"{name}, {way}: {runtime:.2f} %, qcompile {own:.2f} %, f32 {f32:.2f} %, {dict(operators)}")
        rows.append([name, way, f"{f32:.2f}", f"{own:.2f}", f"{runtime:.2f}", "ok" if good else "FAILED"])
        return runtime

    for way, more in WAYS:
        path = work.path / "qdq.onnx"
        work.run("export", f"{name}.run", "--format", "qdq-onnx", "-o", path, "--data", "train.npz", *more)
        after[way] = judge(way, path, "int8" in way)
        if way == "int4":
            reference = ReferenceEvaluator(onnx.load(path)).run(None, {"x": test_x[:100]})[0]
            runtime = session(path).run(None, {"x": test_x[:100]})[0]
            if (reference.argmax(1) == runtime.argmax(1)).mean() < 0.99:
                failures.append(f"{name}, {way}: ONNX's reference evaluator gives other classes")
    for weights, how in (("int8", []), ("int4", []), ("int8", ["--calibration", "lsq"]), ("int4", ["--calibration", "lsq"])):
        more = ["--qat", "--weights", weights, *how, "--batch-norm", "train", "--epochs", 1, "--lr", fine]
        way = " ".join([weights, *how[1:]])
        work.run("train", plain, *flags, *more, "--checkpoint", f"{name}.{way}")
        trained = json.loads(work.run("eval", f"{name}.{way}", "--data", "test.npz", "--json"))["accuracy"]
        path = work.path / "qat.onnx"
        work.run("export", f"{name}.{way}", "--format", "qdq-onnx", "-o", path)
        runtime = judge(f"{way}, trained", path, weights == "int8", 100 * trained)
        if runtime <= after[weights] and weights == "int4":
            failures.append(f"{name}: {way} is {runtime:.2f} % after training with it, {after[weights]:.2f} % without")
    return rows, failures, plain, x


class Samples(CalibrationDataReader):
    def __init__(self, x):
        self.batches = [x]

    def get_next(self):
        return {"x": self.batches.pop()} if self.batches else None


def entropy(values, symmetric):
    """The range that pytorch-quantization's `_compute_amax_entropy` takes, over 2048 bins of magnitudes."""
    counts, edges = np.histogram(np.abs(values), bins=2048, range=(0, np.abs(values).max()))
    counts[0] = counts[1]
    levels = 128 if symmetric or values.min() < 0 else 256
    best, chosen = np.inf, len(counts)
    for end in range(128, len(counts) + 1):
        level = np.arange(end) * levels // end
        occupied = counts[:end] > 0
        sums = np.bincount(level[occupied], counts[:end][occupied], levels)
        sizes = np.bincount(level[occupied], minlength=levels)
        q = np.where(occupied, sums[level] / np.maximum(sizes[level], 1), 0)
        p = counts[:end].astype(np.float64)
        p[-1] += counts[end:].sum()
        if (q[p > 0] == 0).any():
            continue
        p, q = p / p.sum(), q / q.sum()
        divergence = float(np.sum(p[p > 0] * np.log(p[p > 0] / q[p > 0])))
        if divergence <= best:
            best, chosen = divergence, end
    return max(-edges[chosen], min(values.min(), 0)), min(edges[chosen], max(values.max(), 0))


def ranges(work, plain, x):
    """The scales of activations beside those of other calibrators on the same samples."""
    x = x[:256]
    np.savez(work.path / "some.npz", x=x)
    values = onnx.load(plain)
    names = [output for node in values.graph.node for output in node.output]
    values.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names[:-1])
    shown = onnxruntime.InferenceSession(values.SerializeToString(), providers=["CPUExecutionProvider"])
    results = dict(zip([output.name for output in shown.get_outputs()], shown.run(None, {"x": x})))
    results["x"] = x
    percentile = {"symmetric": False, "num_bins": 4096}
    rows, failures = [], []
    for method, flags, kind, options, limit in [
        ("min-max", [], CalibrationMethod.MinMax, {}, 1e-5),
        ("percentile=99.9", [], CalibrationMethod.Percentile, percentile | {"percentile": 99.9}, 5e-3),
        ("percentile=99.99", [], CalibrationMethod.Percentile, percentile | {"percentile": 99.99}, 5e-3),
        ("entropy", [], None, {}, 5e-3),
        ("entropy", ["--activations", "int8"], None, {}, 5e-3),
    ]:
        written = work.path / "ranges.onnx"
        more = ["--data", "some.npz", "--calibration", method, *flags]
        work.run("export", plain, "--format", "qdq-onnx", "-o", written, *more)
        own = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(written).graph.initializer}
        if kind is None:
            others = {name: entropy(value, bool(flags)) for name, value in results.items() if f"{name}.scale" in own}
        else:
            with contextlib.redirect_stdout(io.StringIO()):
                calibrator = create_calibrator(plain, None, str(work.path / "augmented.onnx"), kind, extra_options=options)
                calibrator.set_execution_providers()
                calibrator.collect_data(Samples(x))
                others = {name: data.range_value for name, data in calibrator.compute_data().data.items()}
        errors = []
        for name, (low, high) in others.items():
            if f"{name}.scale" in own and name in results:
                low, high = min(np.ravel(low)[0].item(), 0), max(np.ravel(high)[0].item(), 0)
                scale = max(-low, high) / 127 if flags else (high - low) / 255
                errors.append(abs(own[f"{name}.scale"].item() / scale - 1))
        good = len(errors) > 2 and max(errors) <= limit
        if not good:
            failures.append(f"{method}: scales differ by {errors}")
        rows.append([method, " ".join(flags), len(errors), f"{max(errors, default=np.inf):.1e}", "ok" if good else "FAILED"])
    return rows, failures


def speed(work):
    """ResNet-18 on noise, in f32 and on integers, in turns."""
    before, after = work.model("resnet18", training=False), work.path / "resnet18.qdq.onnx"
    x = np.random.default_rng(0).standard_normal((8, 3, 224, 224), dtype=np.float32)
    np.savez(work.path / "noise.npz", x=x)
    work.run("export", before, "--format", "qdq-onnx", "-o", after, "--data", "noise.npz", "--batch-size", 8)
    onnx.checker.check_model(str(after), full_check=True)
    sessions, times = [session(before), session(after)], [[], []]
    for _ in range(15):
        for model, taken in zip(sessions, times):
            begin = time.perf_counter()
            model.run(None, {"x": x[:1]})
            taken.append(time.perf_counter() - begin)
    old, new = (1e3 * float(np.median(taken)) for taken in times)
    failures = [] if old >= SPEED * new else [f"resnet18: {old:.1f} ms in f32, {new:.1f} ms on integers"]
    return [["resnet18", f"{old:.1f}", f"{new:.1f}", f"{old / new:.2f}", "FAILED" if failures else "ok"]], failures


def main():
    parser = peer.arguments(__doc__.splitlines()[0], MODELS)
    parser.add_argument("--data", type=peer.pathlib.Path, required=True, help="the folder of Fashion-MNIST")
    parser.add_argument("--samples", type=int, default=6000, help="to train on")
    values = peer.parse(parser, MODELS)
    if (values.data / "fashion-mnist").is_dir():
        values.data = values.data / "fashion-mnist"
    work = peer.Workspace(values)
    rows, failures = [], []
    for name in values.names:
        more, failed, plain, x = check(work, values, name)
        rows, failures = rows + more, failures + failed
    peer.table(["model", "rounded to", "f32", "qcompile", "ONNX Runtime", ""], rows)
    rows, failed = ranges(work, plain, x)
    failures += failed
    peer.table(["ranges by", "", "values", "error of scales", ""], rows)
    try:
        rows, failed = speed(work)
        failures += failed
        peer.table(["speed", "ms in f32", "on integers", "ratio", ""], rows)
    except ImportError:
        print("resnet18: skipped, PyTorch is not installed")
    peer.finish(failures)


main()
