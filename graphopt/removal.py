"""Removing classes of labels from a model, and what it means: zeroing them.

Removal slices every constant by its own labels and corrects the operators that store a size or a position (`repair_rules`). Zeroing
sets the same slices to zero. For every removable class the two models compute the same, which the tests check on every model.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.dim_labels import Dims
from graphopt.dim_rules import zeroable
from graphopt.errors import ModelError
from graphopt.model import Model
from graphopt.repair_rules import REPAIR, Cut
from graphopt.symbols import monomial


def remove(model: Model, dims: Dims, labels: Collection[int] | np.ndarray) -> int:
    """Remove the classes of these root labels (`Group.units`); returns the number of constants sliced.

    `dims` must be `couple(model)` of the model as it is, and is stale afterwards. At least one unit of each group must stay.
    Shapes of intermediate tensors follow; nodes that only computed a size that is now constant are left dead. Raises ModelError
    where a label is pinned or a tensor would become empty.
    """
    kept = kept_masks(dims, labels)
    if not kept:
        return 0
    tensors = model.tensors()
    cut = Cut(model, dims, kept)
    for node in model.nodes():
        if op_key(node) in REPAIR and any(t.name in kept for t in (*node.inputs, *node.outputs)):
            REPAIR[op_key(node)](node, cut)
    changed = 0
    for name, axes in kept.items():
        tensor = tensors.get(name)
        if isinstance(tensor, gs.Constant):
            tensor.values = _sliced(np.asarray(tensor.values), axes)
            changed += 1
        elif tensor is not None and tensor.shape is not None:
            tensor.shape = [_shrunk(size, axes[i]) if i in axes else size for i, size in enumerate(tensor.shape)]
    if cut.insert():
        model.sort()
    return changed


def _shrunk(size: int | str | None, mask: np.ndarray) -> int | str | None:
    """A size with what is left: 12 is 9, 12*batch is 9*batch."""
    if isinstance(size, int):
        return int(mask.sum())
    number, names = monomial(size)
    factor = number * int(mask.sum()) // mask.size
    return None if number % mask.size else "*".join([*([str(factor)] if factor != 1 else []), *names])


def zero(model: Model, dims: Dims, labels: Collection[int] | np.ndarray) -> int:
    """Set the slices of all constants with these root labels to zero; returns the number of constants changed.

    The weights that read the units are among them, so it does not matter what value a unit takes: of a Sigmoid it is 0.5.
    """
    changed = 0
    kept = kept_masks(dims, labels)
    for constant in model.constants():
        if constant.name not in kept or not zeroable(constant):
            continue
        values = np.array(constant.values)
        for axis, mask in kept[constant.name].items():
            values[(slice(None),) * axis + (~mask,)] = 0
        constant.values = values
        changed += 1
    return changed


def kept_masks(dims: Dims, labels: Collection[int] | np.ndarray) -> dict[str, dict[int, np.ndarray]]:
    """Tensor -> axis -> which indices stay, of those that lose some. Raises ModelError where nothing would stay."""
    chosen = np.asarray(list(labels), np.int64)
    if chosen.size and (chosen.min() < 1 or chosen.max() >= dims.root_count()):
        raise ModelError("removal: a label is pinned or not one of this model's; take labels from the units of its groups")
    gone = np.zeros(dims.root_count(), bool)
    gone[chosen] = True
    found: dict[str, dict[int, np.ndarray]] = {}
    for name in dims.axes:
        for axis, roots in enumerate(dims.labels(name) or ()):
            if roots.size > 1 and roots.strides != (0,) and (lost := gone[roots]).any():
                if lost.all():
                    raise ModelError(f"removal: axis {axis} of '{name}' would become empty; keep at least one unit of each group")
                found.setdefault(name, {})[axis] = ~lost
    return found


def _sliced(values: np.ndarray, axes: dict[int, np.ndarray]) -> np.ndarray:
    for axis, mask in axes.items():
        values = np.compress(mask, values, axis)
    return np.ascontiguousarray(values)
