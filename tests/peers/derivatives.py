"""Gradients of ONNX's test cases, by central differences of ONNX's reference evaluator in float64."""

import copy
import warnings

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

# Elements of one input that are looked at, and the step of the differences.
ELEMENTS, STEP = 24, 1e-5
# Where differences to both sides and of several steps disagree by more, the function has a corner, or the reference
# rounds to float32; beyond JUMP it has a step.
CORNER, JUMP = 1e-4, 1e3
# What draws random numbers, or whose gradient is not that of what it computes (straight through a rounding; the reference
# takes LpNormalization's p = 1 for a sum without magnitudes).
LEFT_OUT = {"LpNormalization", "Dropout", "Bernoulli", "RandomNormalLike", "RandomUniformLike", "QuantizeLinear", "DequantizeLinear"}


# Inputs from this one on are settings and statistics, which are not trained.
SETTINGS = {"BatchNormalization": 3, "Clip": 1, "Pad": 1, "Resize": 1, "Range": 0}
SETTINGS |= {"NegativeLogLikelihoodLoss": 2, "SoftmaxCrossEntropyLoss": 2}


def settings(case):
    """Names of the inputs that are not trained."""
    return {name for node in case.model.graph.node for name in node.input[SETTINGS.get(node.op_type, len(node.input)) :]}


def gradient_case(case):
    """`(model, inputs, gradients)`: the case with its float inputs as initializers and a scalar loss as its output, its
    other inputs, and the gradient of each initializer (NaN where it is not known). None if there is nothing to derive.
    """
    fixed = settings(case)
    floats = [name for name, array in case.inputs.items() if array.dtype == np.float32 and array.size and name not in fixed]
    results = [name for name, array in case.outputs.items() if array.dtype == np.float32 and array.size]
    opset = next((entry.version for entry in case.model.opset_import if entry.domain == ""), 0)
    if not floats or not results or opset < 7 or LEFT_OUT & set(case.operators()):
        return None
    random = np.random.default_rng(len(case.name))
    weights = {name: random.uniform(0.5, 1.5, case.outputs[name].shape).astype(np.float32) for name in results}
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        gradients = differences(case, floats, results, weights)
    if gradients is None or all(not np.nan_to_num(array).any() for array in gradients.values()):
        return None
    rest = {name: array for name, array in case.inputs.items() if name not in floats}
    return with_loss(case, floats, weights), rest, gradients


def with_loss(case, floats, weights):
    """The model whose first output is the weighted sum of its float outputs, and whose float inputs are initializers."""
    model = copy.deepcopy(case.model)
    graph = model.graph
    graph.initializer.extend(numpy_helper.from_array(case.inputs[name], name) for name in floats)
    kept = [value for value in graph.input if value.name not in floats]
    del graph.input[:], graph.output[:]
    graph.input.extend(kept)
    terms = []
    for name, array in weights.items():
        graph.initializer.append(numpy_helper.from_array(array, f"{name}.weights"))
        graph.node.append(helper.make_node("Mul", [name, f"{name}.weights"], [f"{name}.weighted"]))
        graph.node.append(helper.make_node("ReduceSum", [f"{name}.weighted"], [f"{name}.sum"], keepdims=0))
        terms.append(f"{name}.sum")
    graph.node.append(helper.make_node("Sum", terms, ["derivatives.loss"]))
    graph.output.append(helper.make_tensor_value_info("derivatives.loss", TensorProto.FLOAT, []))
    if not any(entry.domain == "" for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid("", 17))
    return model


def differences(case, floats, results, weights):
    """The gradients; None if the reference does not compute the case in float64 as ONNX wants it."""
    try:
        reference = ReferenceEvaluator(case.model)
        order = [value.name for value in case.model.graph.output]
        exact = {name: array.astype(np.float64) if name in floats else array for name, array in case.inputs.items()}

        def loss(inputs, base=None):
            outputs = dict(zip(order, reference.run(None, inputs)))
            if any(outputs[name].dtype != np.float64 for name in results):
                raise TypeError("not computed in float64")
            if base is not None:
                # Some operators of the reference round to float32 on the way; what changes then is only such numbers.
                changed = [outputs[name][outputs[name] != base[name]] for name in results]
                if any(array.size for array in changed) and all((a == a.astype(np.float32)).all() for a in changed):
                    raise TypeError("not computed in float64")
            return sum((outputs[name] * weights[name]).sum() for name in results), outputs

        base, outputs = loss(exact)
        if not all(np.allclose(outputs[name], case.outputs[name], 1e-3, 1e-6) for name in results) or not np.isfinite(base):
            return None
    except Exception:
        return None
    random = np.random.default_rng(7)
    gradients = {}
    for name in floats:
        gradient = np.full(case.inputs[name].size, np.nan, np.float32)
        for at in random.permutation(gradient.size)[:ELEMENTS]:
            sides = []
            for step in (STEP, -STEP, 3 * STEP, -7 * STEP):
                moved = dict(exact)
                moved[name] = exact[name].copy()
                moved[name].reshape(-1)[at] += step
                try:
                    sides.append((loss(moved, outputs)[0] - base) / step)
                except Exception:
                    break
            smooth = len(sides) == 4 and np.ptp(sides) <= CORNER * max(1, abs(sides[0]))
            if smooth and abs(sides[0]) < JUMP:
                gradient[at] = (sides[0] + sides[1]) / 2
        gradients[name] = gradient.reshape(case.inputs[name].shape)
    return gradients
