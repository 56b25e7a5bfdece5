"""What the comparisons share: finding the programs, running `qcompile`, and printing tables."""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "models"))


def require(*modules):
    """Imports the modules, or ends the script with one line and success when one is absent."""
    names = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "numpy": "NumPy", "onnx": "onnx", "torchvision": "torchvision"}
    for module in (*modules, "numpy", "onnx"):
        try:
            __import__(module)
        except ImportError:
            print(f"skipped: {names.get(module, module)} is not installed")
            sys.exit(0)


def arguments(description, models):
    """The parser every script starts from: --qcompile PATH, --onnx FOLDER and the models."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="MODEL", help=f"default: {' '.join(models)}")
    parser.add_argument("--qcompile", type=pathlib.Path, default=ROOT / "target" / "release" / "qcompile")
    parser.add_argument("--onnx", type=pathlib.Path, help="what export_benchmarks.py wrote; made when not given")
    return parser


def parse(parser, models):
    """Parses, checks the names, and makes the binary's path absolute."""
    values = parser.parse_args()
    values.names = values.names or list(models)
    unknown = [name for name in values.names if name not in models]
    if unknown:
        parser.error(f"no such model: {', '.join(unknown)}; there are {', '.join(models)}")
    values.qcompile = values.qcompile.resolve()
    if not values.qcompile.is_file():
        parser.error(f"{values.qcompile} is not there; build it, or pass --qcompile PATH")
    return values


class Workspace:
    """A temporary folder with the exported models in it."""

    def __init__(self, values):
        self.qcompile = values.qcompile
        self._folder = tempfile.TemporaryDirectory(prefix="peers.")
        self.path = pathlib.Path(self._folder.name)
        # qcompile runs in the temporary folder, so a relative path would not be found.
        self.onnx = values.onnx.resolve() if values.onnx else self.path

    def model(self, name, training=True):
        """The exported ONNX file of a benchmark; exported now when it is missing."""
        path = self.onnx / (f"{name}.train.onnx" if training else f"{name}.onnx")
        if not path.exists():
            from export_benchmarks import export

            export(name, path, training, dynamic=True)
        return path

    def samples(self, name, steps):
        """So many batches of a benchmark, as a file that `train` takes."""
        import numpy as np

        import benchmarks

        x, label = benchmarks.batch(name, benchmarks.BENCHMARKS[name].batch_size * steps)
        path = self.path / f"{name}.{steps}.npz"
        np.savez(path, x=x, label=label.reshape(len(x), -1) if len(label) > len(x) else label)
        return path

    def run(self, *words):
        """Runs qcompile and returns what it printed; a failure raises with its message."""
        command = [str(self.qcompile), *map(str, words)]
        done = subprocess.run(command, cwd=self.path, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failure(f"exit {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


class Failure(Exception):
    """qcompile ended with an error."""


def load_weights(net, path):
    """Copies the initializers of an exported training form into the network, by name."""
    import onnx
    import torch
    from onnx import numpy_helper

    stored = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    state = net.state_dict()
    with torch.no_grad():
        for name, tensor in state.items():
            if name in stored:
                tensor.copy_(torch.from_numpy(stored[name].copy()))
    missing = [name for name, _ in net.named_parameters() if name not in stored]
    if missing:
        raise Failure(f"{path}: no initializer for {missing[:3]}")


def json_lines(text):
    """The JSON objects of an output with one object a line."""
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def gradients(path):
    """The loss and the gradients that `qcompile run --gradients` wrote, in f64."""
    import numpy as np

    with np.load(path) as file:
        return {key: file[key].astype(np.float64) for key in file.files}


def median_ms(step, seconds):
    """The median time of as many calls as fit in the seconds, at least five."""
    times, end = [], time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def distance(got, wanted):
    """The largest error of a tensor: the L2 norm of the difference over that of what is wanted."""
    import numpy as np

    return max(np.linalg.norm(got[key] - tensor) / np.linalg.norm(tensor) for key, tensor in wanted.items())


def judge(name, error, change, good):
    """The row of a case of [case, error, what rounding changes, verdict], and its failure, if it is one."""
    failure = [] if good else [f"{name}: error {error:.2e}, where rounding changes {change:.2e}"]
    return [name, f"{error:.1e}", f"{change:.1e}", "ok" if good else "FAILED"], failure


def table(head, rows):
    """Prints aligned columns: the first to the left, the others to the right."""
    cells = [list(map(str, row)) for row in [head, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())


def finish(failures):
    """Prints the failures and ends with 1, or says that all is well."""
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(failures)} failed" if failures else "all passed")
    sys.exit(1 if failures else 0)
