"""`sparsify`: the least important weights become zero, one by one or in patterns that kernels like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.errors import OptionError, PassError
from graphopt.layers import find_layers as linear_layers
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.registry import register
from graphopt.shapes import shapes
from graphopt.sparse_layers import Layer, Site, find_layers
from graphopt.sparsify_data import Work, sensitive_ratios, write_fits
from graphopt.sparsity import MEASURED, Pattern, Task, find_criterion, global_ratios, parse_pattern, sparse

NAME = "sparsify"
OPSET = 13  # DequantizeLinear with an axis
SMALLEST = 1e-30  # weights of an output below are all zero in INT8
THIN = 4  # input channels of a group up to which a layer is left dense: stems and depthwise filters have few weights, all of use


@register(NAME)
def sparsify(
    model: Model,
    context: Context,
    *,
    ratio: float | None = None,
    pattern: str = "unstructured",
    scope: Literal["uniform", "global", "sensitivity"] = "uniform",
    criterion: str = "magnitude",
    thin: bool = False,
    values: Literal["float32", "int8"] = "float32",
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> int:
    """The least important weights of convolutions, Gemm and MatMul become zero; returns their number.

    - ratio: the share of weights to remove; n:m patterns have their own.
    - pattern: unstructured; blocks of outputs x inputs that go as one, as 4x1, 1x4, 4x4, 16x1; or n:m, as 2:4: of four inputs side
      by side two stay. Inputs are those of the flattened weight [outputs, inputs x kernel].
    - scope: uniform takes the same share of every layer, global ranks all together (LAMP), sensitivity takes more where measured
      errors at the outputs grow least.
    - criterion: magnitude; with calibration rows (--calib, no labels) wanda, sparsegpt or alps; or a plugin's. sparsegpt and alps
      refit each layer, and its bias, to the original's outputs, given what the layers before it, already sparse, make.
    - thin: also layers with at most four input channels a group (first convolutions of images, depthwise ones).
    - values: int8 rounds the weights that stay to INT8 with a scale for each output, behind a DequantizeLinear; activations stay
      float32. For layers of few rows, which wait for weights (opset 13 or later).
    - include, exclude: patterns (* and ?) of names of weights and nodes.

    Not exact: evaluate the result. The model gets smaller and faster by compile-sparse. Run the preset fold first.
    """
    if values == "int8" and model.opset < OPSET:
        raise PassError(NAME, f"values=int8 needs opset {OPSET} or later, the model has {model.opset}: convert it first")
    cut = parse_pattern(pattern)
    share = _asked(cut, pattern, ratio)
    work = Work(model, context, find_criterion(criterion), criterion in MEASURED, cut)
    if context.calibration is None and (work.measured or scope == "sensitivity"):
        what = f"criterion={criterion}" if work.measured else f"scope={scope}"
        raise PassError(NAME, f"{what} needs calibration data: give --calib PATH (or calibration=...)")
    layers = _choose(model, context, cut, thin, include, exclude)
    if work.measured or scope == "sensitivity":
        layers = _measurable(model, context, layers)
    before = [_finite(layer) for layer in layers]
    shares = _SHARES["uniform" if cut.of or not layers else scope](work, layers, share)
    context.remember(model)
    fits = _write(work, layers, [Task(layer.name, cut, part) for layer, part in zip(layers, shares, strict=True)])
    rows, changed = [], 0
    for layer, old in zip(layers, before, strict=True):
        new = layer.matrix()
        gone = int(np.count_nonzero(old) - np.count_nonzero(new))
        changed += max(gone, int(not np.array_equal(old, new)))  # 0 promises an untouched model
        density = round(float(np.count_nonzero(new) / new.size), 4)
        rows.append({"layer": layer.name, "density": density, **fits.get(layer.name, {})})
    if values == "int8":
        changed += _round(model, layers)
    context.facts.update({"pattern": str(cut), "criterion": criterion, "layers": rows, "weights_removed": changed})
    return changed


def _asked(cut: Pattern, pattern: str, ratio: float | None) -> float:
    """The share of weights to remove; OptionError."""
    if (ratio is None) != bool(cut.of):
        raise OptionError(f"{NAME}: pattern={pattern} {'has its own ratio' if cut.of else 'needs ratio='}")
    share = 1 - cut.keep / cut.of if cut.of else float(ratio or 0)
    if not 0 <= share < 1:
        raise OptionError(f"{NAME}: ratio={share:g} is the share of weights to remove: at least 0, below 1")
    return share


def _global(work: Work, layers: Sequence[Layer], share: float) -> list[float]:
    return global_ratios([layer.matrix() for layer in layers], work.pattern, share)


_SHARES: dict[str, Callable[[Work, Sequence[Layer], float], list[float]]] = {
    "uniform": lambda work, layers, share: [share] * len(layers),
    "global": _global,
    "sensitivity": sensitive_ratios,
}


def _choose(
    model: Model, context: Context, cut: Pattern, thin: bool, include: tuple[str, ...], exclude: tuple[str, ...]
) -> list[Layer]:
    """The layers to treat; why the others are not is recorded."""
    found = find_layers(Site(model, context.get(shapes, model), model.wiring()))
    for node, reason in found.reasons:
        context.reject(node, reason)
    chosen = []
    for layer in found.layers:
        names = (layer.name, layer.weight.name)
        matrix = (layer.outputs, int(np.prod(layer.weight.shape)) // layer.outputs)
        checks = {
            "not included": bool(include) and not any(fnmatchcase(n, p) for p in include for n in names),
            "its weight is quantised already": layer.scales is not None,
            "excluded": any(fnmatchcase(n, p) for p in exclude for n in names),
            f"at most {THIN} input channels a group": not thin and layer.inputs // layer.window.groups <= THIN,
            cut.misfit(matrix): bool(cut.misfit(matrix)),
        }
        against = [reason for reason, applies in checks.items() if applies]
        if against:
            context.reject(layer.node, against[0])
        else:
            chosen.append(layer)
    return chosen


def _measurable(model: Model, context: Context, layers: list[Layer]) -> list[Layer]:
    """Those of which repair knows inputs and outputs as matrices; why others are left dense is recorded."""
    known = {layer.node for layer in linear_layers(model)[0] if layer.groups == 1}
    for layer in layers:
        if layer.name not in known:
            context.reject(layer.node, "what it reads cannot be measured: channels in groups, or a computed or shared bias")
    return [layer for layer in layers if layer.name in known]


def _round(model: Model, layers: Sequence[Layer]) -> int:
    """Make the weights int8, scaled by the largest of each output; returns how many numbers that moves, at least one a layer."""
    names, moved = Names(model), 0
    for layer in layers:
        matrix = layer.matrix()
        largest = np.abs(matrix).max(1)
        scales = np.where(largest > SMALLEST, largest / np.float32(127), np.float32(1)).astype(np.float32)
        levels = np.rint(matrix / scales[:, None]).astype(np.int8)
        moved += max(1, int(np.count_nonzero(levels * scales[:, None] != matrix)))
        stored = np.ascontiguousarray(levels.T) if layer.transposed else levels.reshape(layer.weight.shape)
        inputs = [names.constant(f"{layer.weight.name}_s8", stored), names.constant(f"{layer.weight.name}_scale", scales)]
        made = gs.Variable(names.fresh(f"{layer.weight.name}_float"), np.float32, list(layer.weight.shape))
        node = gs.Node("DequantizeLinear", names.fresh(f"{layer.weight.name}_DQ"), {"axis": int(layer.transposed)}, inputs, [made])
        model.graph.nodes.append(node)
        layer.node.inputs[1] = made
    model.sort()
    return moved


def _finite(layer: Layer) -> np.ndarray:
    values: np.ndarray = layer.matrix().copy()
    if not np.isfinite(values).all():
        raise PassError(NAME, f"'{layer.name}': its weight '{layer.weight.name}' has NaN or infinite values")
    return values


def _write(work: Work, layers: Sequence[Layer], tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """Make the layers sparse; of measured criteria, the errors of each."""
    if work.measured:
        return write_fits(work, {task.name: task for task in tasks})
    for number, (layer, task) in enumerate(zip(layers, tasks, strict=True)):
        old = layer.matrix()
        new = sparse(old, work.judge, task).astype(np.float32)
        if not np.array_equal(new, old):
            layer.weight.values = np.ascontiguousarray(new.T) if layer.transposed else new.reshape(layer.weight.shape)
        work.context.progress("sparsify", number + 1, len(layers))
    return {}
