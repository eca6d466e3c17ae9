"""How important a unit is: criteria by name, and the place where plugins add theirs.

A criterion is a function `(model, context, groups) -> scores`: for each group an array with one number >= 0 for each of its units;
higher stays. Only order and ratios within a group matter: `graphopt.allocate` makes groups comparable.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import erfc, pi, sqrt
from typing import NamedTuple

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.cost import Axis
from graphopt.dims import Group, Slice
from graphopt.edit import peek
from graphopt.errors import OptionError, PassError
from graphopt.model import Model
from graphopt.probes import mean_magnitudes
from graphopt.registry import REGISTRY, suggest

Scores = list[np.ndarray]
Criterion = Callable[[Model, Context, Sequence[Group]], Scores]
CRITERIA: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Decorator: make a function a criterion of that name. OptionError where another module already has the name."""

    def add(fn: Criterion) -> Criterion:
        known = CRITERIA.setdefault(name, fn)
        if known.__module__ != fn.__module__:
            raise OptionError(f"two criteria are named '{name}': one in {known.__module__}, one in {fn.__module__}; rename one")
        CRITERIA[name] = fn
        return fn

    return add


def find_criterion(name: str, owner: str = "prune-channels") -> Criterion:
    """The criterion of that name, built in or from a plugin; OptionError, of the pass `owner`, with the valid names."""
    from graphopt import criteria_data, surgeon  # noqa: F401 (they fill the table)

    if name not in CRITERIA:
        REGISTRY.load_entry_points()  # a packaged plugin may bring it
    if name not in CRITERIA:
        raise OptionError(f"{owner}: unknown criterion '{name}'; {suggest(name, CRITERIA)}")
    return CRITERIA[name]


def per_unit(group: Group, labels: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sum `values` (one an index of an axis with these labels) over the indices of each unit."""
    order = np.argsort(group.units)
    places = np.minimum(np.searchsorted(group.units, labels, sorter=order), len(order) - 1)
    units = order[places]
    mine = group.units[units] == labels
    return np.bincount(units[mine], weights=values[mine], minlength=len(group.units))


def matrices(tensors: Mapping[str, gs.Tensor], group: Group) -> list[tuple[gs.Constant, Slice]]:
    """The slices of floating-point weights of at least two axes: where the units are written and read.

    Depthwise filters (few elements, whose size says little) and vectors count only where the group has nothing better.
    """
    found = [(tensors[s.tensor], s) for s in group.slices if isinstance(tensors.get(s.tensor), gs.Constant)]
    floats = [(c, s) for c, s in found if np.dtype(c.dtype).kind == "f"]
    wide = [(c, s) for c, s in floats if len(c.shape) > 1]
    return [(c, s) for c, s in wide if all(n.attrs.get("group", 1) == 1 for n in c.outputs)] or wide or floats


def along(values: np.ndarray, axis: int, power: int) -> np.ndarray:
    """For each index of the axis, the sum of magnitudes (power 1) or squares (power 2) of all its elements, as float64.

    Infinite elements (masks) count as zero: they say nothing about the units.
    """
    flat = values.reshape(int(np.prod(values.shape[:axis])), values.shape[axis], -1)
    if power == 2:
        total = np.asarray(np.einsum("abc,abc->b", flat, flat, dtype=np.float64))
    else:
        total = np.asarray(np.abs(flat).sum((0, 2), dtype=np.float64))
    return total if np.isfinite(total).all() else along(np.where(np.isfinite(values), values, 0), axis, power)


def _magnitude(model: Model, groups: Sequence[Group], power: int) -> Scores:
    """Relative magnitudes, added over all tensors that hold the unit: each counts alike, whatever its scale."""
    scores, tensors = [], model.tensors()
    for group in groups:
        total = np.zeros(len(group.units))
        for constant, part in matrices(tensors, group):
            total += relative(per_unit(group, part.labels, along(peek(constant), part.axis, power)))
        scores.append(total ** (1 / power))
    return scores


def relative(values: np.ndarray) -> np.ndarray:
    """Divided by their mean; zeros stay zeros."""
    mean = values.mean()
    return values / mean if mean > 0 else np.zeros_like(values)


@criterion("l1")
def l1(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Sum of the magnitudes of a unit's weights (Li et al. 2017, arXiv:1608.08710), where it is written and where it is read."""
    return _magnitude(model, groups, 1)


@criterion("l2")
def l2(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Euclidean norm of a unit's weights, where it is written and where it is read."""
    return _magnitude(model, groups, 2)


@criterion("bn-scale")
def bn_scale(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Magnitude of the BatchNormalization scale (Liu et al. 2017, arXiv:1708.06519); groups without one fall back on l2."""
    return _normalised(model, context, groups, lambda scale, shift: np.abs(scale))


@criterion("bn-scale-shift")
def bn_scale_shift(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Root mean square of a unit behind BatchNormalization and ReLU, its values taken as normal with that scale and shift.

    A channel whose shift is far below zero is silent, whatever its scale. Groups without BatchNormalization fall back on l2.
    """

    def behind_relu(scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
        deviation = np.maximum(np.abs(scale.astype(np.float64)), 1e-12)
        ratio = shift / deviation
        below = np.array([0.5 * erfc(-r / sqrt(2)) for r in ratio])  # of the standard normal distribution
        density = np.exp(-0.5 * np.square(ratio)) / sqrt(2 * pi)
        found = (np.square(shift) + np.square(deviation)) * below + shift * deviation * density
        return np.asarray(np.sqrt(np.maximum(found, 0)))

    return _normalised(model, context, groups, behind_relu)


def _normalised(
    model: Model, context: Context, groups: Sequence[Group], size: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> Scores:
    """The size, by scale and shift of BatchNormalizations, relative to the rest of each; l2 where there is none."""
    nodes = {n.inputs[1].name: n for n in model.nodes() if n.op == "BatchNormalization" and len(n.inputs) > 2}
    tensors = model.tensors()
    scores = l2(model, context, groups)
    fallbacks = 0
    for i, group in enumerate(groups):
        pairs = [(s, tensors.get(s.tensor), nodes[s.tensor].inputs[2]) for s in group.slices if s.tensor in nodes]
        parts = [(s, a, b) for s, a, b in pairs if isinstance(a, gs.Constant) and isinstance(b, gs.Constant)]
        fallbacks += not parts
        if parts:
            shares = [relative(per_unit(group, s.labels, size(a.values, b.values))) for s, a, b in parts]
            scores[i] = np.sum(shares, axis=0)
    context.facts["groups_without_bn_scale"] = fallbacks
    return scores


@criterion("activation")
def activation(model: Model, context: Context, groups: Sequence[Group]) -> Scores:
    """Mean magnitude of a unit on calibration rows times the norm of the weights that read it (Sun et al. 2024, arXiv:2306.11695).

    Groups that no Conv, ConvTranspose, Gemm, MatMul or recurrent op reads fall back on l2. PassError without data.
    """
    need_data(context, "activation")
    return weigh_reads(model, context, groups, mean_magnitudes, 1)


def need_data(context: Context, name: str) -> None:
    """PassError where the criterion of that name has no calibration rows to look at."""
    if context.calibration is None:
        raise PassError("prune", f"criterion '{name}' needs calibration data: give --calib PATH (or calibration=...)")


def weigh_reads(
    model: Model,
    context: Context,
    groups: Sequence[Group],
    measure: Callable[[Model, Context, Collection[Axis]], Mapping[Axis, np.ndarray]],
    power: int,
) -> Scores:
    """What is measured of a unit times the norm, to that power, of the weights that read it; relative to each weight, and added.

    The root of that power of the sum. Groups that no weight reads, or of which nothing could be measured, fall back on l2.
    """
    tensors = model.tensors()
    found = [list(reads(tensors, group)) for group in groups]
    measured = measure(model, context, {(read.data.name, read.axis) for mine in found for read in mine})
    scores = l2(model, context, groups)
    fallbacks = 0
    for i, (group, mine) in enumerate(zip(groups, found, strict=True)):
        known = [(read, measured[read.data.name, read.axis]) for read in mine if (read.data.name, read.axis) in measured]
        fallbacks += not known
        if known:
            total = np.zeros(len(group.units))
            for read, values in known:
                norms = along(peek(read.weight), read.part.axis, 2) ** (power / 2)
                total += relative(per_unit(group, read.part.labels, norms * values))
            scores[i] = total ** (1 / power)
    context.facts["groups_without_activations"] = fallbacks
    return scores


class Read(NamedTuple):
    """A weight that reads units of a group: their indices in it, and where it meets them: an axis of the data input of a node."""

    weight: gs.Constant
    part: Slice
    node: gs.Node
    input: int
    axis: int

    @property
    def data(self) -> gs.Tensor:
        """The tensor that is read."""
        return self.node.inputs[self.input]


# op -> (data input, weight input, the weight's axis that meets the data, the data's axis), of a node and the weight's rank
READERS: dict[str, Callable[[gs.Node, int], tuple[int, int, int, int]]] = {
    "Conv": lambda node, rank: (0, 1, 1 if node.attrs.get("group", 1) == 1 else -1, 1),
    "ConvTranspose": lambda node, rank: (0, 1, 0, 1),
    "GRU": lambda node, rank: (0, 1, 2, 2),
    "Gemm": lambda node, rank: (0, 1, 1 if node.attrs.get("transB", 0) else 0, 0 if node.attrs.get("transA", 0) else 1),
    "LSTM": lambda node, rank: (0, 1, 2, 2),
    "MatMul": lambda node, rank: (0, 1, max(rank - 2, 0), -1),
    "RNN": lambda node, rank: (0, 1, 2, 2),
}


def reads(tensors: Mapping[str, gs.Tensor], group: Group) -> Iterator[Read]:
    """The weights that read the group's units."""
    for constant, part in matrices(tensors, group):
        for node in constant.outputs:
            if node.op in READERS and not node.domain:
                data, weight, axis, met = READERS[node.op](node, len(constant.shape))
                if node.inputs[weight] is constant and part.axis == axis:
                    yield Read(constant, part, node, data, met)
