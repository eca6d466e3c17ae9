"""`sparsify`: the least important weights become zero, one by one or in patterns that kernels like."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

import numpy as np

from graphopt.context import Context
from graphopt.errors import OptionError, PassError
from graphopt.model import Model
from graphopt.registry import register
from graphopt.shapes import shapes
from graphopt.sparse_layers import Layer, Site, find_layers
from graphopt.sparsity import Criterion, Pattern, Task, find_criterion, global_ratios, parse_pattern

NAME = "sparsify"
THIN = 4  # input channels of a group up to which a layer is left dense: stems and depthwise filters have few weights, all of use


@register(NAME)
def sparsify(
    model: Model,
    context: Context,
    *,
    ratio: float | None = None,
    pattern: str = "unstructured",
    scope: Literal["uniform", "global"] = "uniform",
    criterion: str = "magnitude",
    thin: bool = False,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
) -> int:
    """The least important weights of convolutions, Gemm and MatMul become zero; returns their number.

    - ratio: the share of weights to remove; n:m patterns have their own.
    - pattern: unstructured; blocks of outputs x inputs that go as one, as 4x1, 1x4, 4x4, 16x1; or n:m, as 2:4: of four inputs side
      by side two stay. Inputs are those of the flattened weight [outputs, inputs x kernel].
    - scope: uniform takes the same share of every layer, global ranks all together (LAMP).
    - criterion: magnitude, or a plugin's.
    - thin: also layers with at most four input channels a group (first convolutions of images, depthwise ones).
    - include, exclude: patterns (* and ?) of names of weights and nodes.

    Not exact: evaluate the result. The model gets smaller and faster by compile-sparse. Run the preset fold first.
    """
    cut = parse_pattern(pattern)
    if (ratio is None) != bool(cut.of):
        raise OptionError(f"{NAME}: pattern={pattern} {'has its own ratio' if cut.of else 'needs ratio='}")
    share = 1 - cut.keep / cut.of if cut.of else float(ratio or 0)
    if not 0 <= share < 1:
        raise OptionError(f"{NAME}: ratio={share:g} is the share of weights to remove: at least 0, below 1")
    judge = find_criterion(criterion)
    layers = _choose(model, context, cut, thin, include, exclude)
    shares = [share] * len(layers)
    if scope == "global" and not cut.of and layers:
        shares = global_ratios([layer.matrix() for layer in layers], cut, share)
    rows, changed = [], 0
    for number, (layer, part) in enumerate(zip(layers, shares, strict=True)):
        gone, density = _apply(layer, judge, Task(layer.name, cut, part))
        changed += gone
        rows.append({"layer": layer.name, "density": round(float(density), 4)})
        context.progress("sparsify", number + 1, len(layers))
    context.facts.update({"pattern": str(cut), "criterion": criterion, "layers": rows, "weights_removed": changed})
    return changed


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


def _apply(layer: Layer, judge: Criterion, task: Task) -> tuple[int, float]:
    """Write the layer's new weights; how many became zero, and the density."""
    before = layer.matrix()
    if not np.isfinite(before).all():
        raise PassError(NAME, f"'{layer.name}': its weight '{layer.weight.name}' has NaN or infinite values")
    mask, after = judge(before, task)
    if mask.shape != before.shape or after.shape != before.shape or not np.isfinite(after).all():
        raise PassError(NAME, f"'{layer.name}': the criterion did not give a mask and finite weights of shape {before.shape}")
    values = np.where(mask, after, 0).astype(np.float32)
    gone = int(np.count_nonzero(before) - np.count_nonzero(values))
    if not np.array_equal(values, before):
        gone = max(gone, 1)  # 0 promises an untouched model
        layer.weight.values = np.ascontiguousarray(values.T) if layer.transposed else values.reshape(layer.weight.shape)
    return gone, np.count_nonzero(values) / values.size
