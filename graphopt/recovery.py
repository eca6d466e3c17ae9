"""Closed-form repair: each linear layer is refitted, in order, to what it computed before units were removed.

Inputs come from the model as repaired so far, targets from the model before; where the output of a layer is added to something, the
target is what the sum was, minus what that something has become. No labels, no gradients: means and covariances of sampled rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.agreement import error, outputs_of
from graphopt.baseline import Baseline
from graphopt.context import Context
from graphopt.cost import costs
from graphopt.edit import peek, set_input
from graphopt.errors import PassError
from graphopt.gram import Fit, Gram, Moments, inputs_at, outputs_at, spread
from graphopt.layers import Layer, find_layers, from_matrix, to_matrix
from graphopt.model import Model, from_proto
from graphopt.operands import Names
from graphopt.sampling import Batch, chosen_rows, fill
from graphopt.shapes import shapes
from graphopt.walk import Store, Values, Walk, finite, mirrorable

Mode = Literal["sequential", "matched", "local"]
Way = tuple[Mode, bool]  # and whether mirrored images take part
MODES: tuple[Mode, ...] = ("matched", "sequential", "local")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1)
_EFFORT = 5e11  # MACs of a pass over the rows from which only one way of repair is tried
_SPARSE = 0.2  # share of zeros from which a weight counts as sparse, and keeps its zeros


@dataclass(frozen=True)
class Target:
    """A layer to repair: as it is and as it was, how many such layers lie before it, and what is added that is final by then."""

    now: Layer
    was: Layer
    level: int
    other: str | None


@dataclass(frozen=True)
class Repaired:
    """What was fitted to a layer: squared errors on held-out rows, relative to the variance of the target."""

    layer: str
    op: str
    method: str
    before: float
    after: float


@dataclass
class Patch:
    """New weights by name, biases to be added by node, and how each layer fared."""

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    added: dict[str, np.ndarray] = field(default_factory=dict)
    layers: list[Repaired] = field(default_factory=list)


# ---- what to repair


def targets(model: Model, baseline: Baseline, changing: Collection[str] = ()) -> list[Target]:
    """The layers whose inputs are not what they were, in order; the baseline must have them too.

    `changing`: nodes of layers that will be changed, and so count as well.
    """
    was = {layer.node: layer for layer in find_layers(baseline.model)[0]}
    now = {layer.node: layer for layer in find_layers(model)[0] if layer.node in was}
    moved = _moved(model, baseline)
    read = {n.name: [t.name for t in n.inputs] for n in baseline.model.graph.nodes}
    depth: dict[str, int] = {}
    wrong: set[str] = set()
    found: list[tuple[Layer, int]] = []
    for node in model.graph.nodes:
        reads = [t.name for t in node.inputs if t.name]
        level = max((depth.get(name, 0) for name in reads), default=0)
        layer = now.get(node.name)
        rewired = [t.name for t in node.inputs if not isinstance(t, gs.Constant) and t.name not in read.get(node.name, ())]
        stale = bool(rewired) or any(name in wrong for name in reads)
        if layer is not None:
            lost = baseline.indices(layer.weight, layer.in_axis) is not None and layer.groups == 1
            stale = stale or lost or layer.weight in moved or node.name in changing
            if stale:
                level += 1
                found.append((layer, level))
        else:
            stale = stale or any(name in moved or name in baseline.kept for name in reads)
        for out in node.outputs:
            depth[out.name] = level
            if stale:
                wrong.add(out.name)
    return [Target(n, was[n.node], level, _addend(n, was[n.node], level, depth)) for n, level in found]


def _moved(model: Model, baseline: Baseline) -> set[str]:
    """Constants whose values are not those of the baseline, beside what was removed."""
    before = {c.name: c for c in baseline.model.constants()}
    found = set()
    for constant in model.constants():
        old = before.get(constant.name)
        if old is None:
            found.add(constant.name)
        elif not np.array_equal(peek(constant), _cut(baseline, constant.name, peek(old))):
            found.add(constant.name)
    return found


def _cut(baseline: Baseline, name: str, values: np.ndarray) -> np.ndarray:
    """The part of a baseline's array that is still there."""
    for axis, indices in baseline.kept.get(name, {}).items():
        values = np.take(values, indices, axis)
    return values


def _addend(now: Layer, was: Layer, level: int, depth: dict[str, int]) -> str | None:
    same = now.other is not None and now.other == was.other
    return now.other if same and depth.get(now.other or "", 0) < level else None


# ---- the rows of one batch


@dataclass
class _Rows:
    """Sums of one layer: what it reads now, and what it read before (for local fits), fitted and held rows apart."""

    fit: Gram = field(default_factory=Gram)
    held: Gram = field(default_factory=Gram)
    local: Gram = field(default_factory=Gram)


class _Collector:
    """Adds the rows of one level's layers, batch by batch."""

    def __init__(self, level: Sequence[Target], baseline: Baseline, total: int, local: bool) -> None:
        self.rows = {target.now.node: _Rows() for target in level}
        self.level, self.baseline, self.total, self.local = level, baseline, total, local

    def add(self, number: int, batch: Batch, was: Values, now: Values) -> None:
        for order, target in enumerate(self.level):
            layer, kept = target.now, self.baseline
            y = _narrowed(was[target.was.y], kept.indices(target.was.weight, target.was.out_axis), layer.channel_axis)
            x = now[layer.x]
            features = x.shape[layer.channel_axis] if layer.groups == 1 else 1
            features *= int(np.prod(layer.window.kernel)) if layer.window else 1
            at, held = chosen_rows(layer, y.shape, batch, self.total, features, (target.level * 1000 + order) * 10007 + number)
            out = spread(layer, y.shape)
            wanted = outputs_at(layer, y, at)
            rows = self.rows[layer.node]
            if self.local:
                before = _narrowed(was[target.was.x], kept.indices(target.was.weight, target.was.in_axis), layer.channel_axis)
                rows.local.add(inputs_at(layer, before, out, at), wanted)
            if target.other is not None and was[target.other].shape == was[target.was.y].shape:
                shifted = _narrowed(was[target.other], kept.indices(target.was.weight, target.was.out_axis), layer.channel_axis)
                wanted = wanted + outputs_at(layer, shifted, at) - outputs_at(layer, now[target.other], at)
            found = inputs_at(layer, x, out, at)
            rows.fit.add(found[~held], wanted[~held])
            rows.held.add(found[held], wanted[held])


def _narrowed(values: np.ndarray, indices: np.ndarray | None, axis: int) -> np.ndarray:
    return values if indices is None else np.take(values, indices, axis)


# ---- fitting


def _biased(layer: Layer) -> bool:
    return layer.bias is not None or layer.addable


def _moments(gram: Gram, layer: Layer) -> Moments:
    return gram.moments() if _biased(layer) else gram.moments().about_zero()


def _fitted(rows: _Rows, layer: Layer, old: Fit, mode: Mode, held_too: bool) -> tuple[Fit, str, float, float]:
    """The fit that is best on held rows, made again with them if `held_too`; how it was made, and held errors before and after."""
    fit, held, start = _moments(rows.fit, layer), _moments(rows.held, layer), old[0]
    whole = fit.joined(held) if held_too else fit
    sparse = layer.groups == 1 and float((start == 0).mean()) > _SPARSE
    makers: dict[str, Callable[[Moments], Fit]] = {"none": lambda m: old}
    if _biased(layer):
        makers["bias"] = lambda m: m.centred(old)
    for alpha in ALPHAS:
        makers[f"ridge {alpha:g}"] = (lambda a: lambda m: (m.supported if sparse else m.ridge)(start, a))(alpha)
    if rows.local.count and not sparse:
        before = _moments(rows.local, layer)
        for alpha in ALPHAS[1:]:
            makers[f"local {alpha:g}"] = (lambda a: lambda m: m.centred(before.ridge(start, a)))(alpha)
    errors = {name: held.error(make(fit)) for name, make in makers.items()}
    pool = [n for n in makers if not n.startswith("ridge")] if mode == "local" else list(makers)
    best = min(pool, key=lambda n: errors[n])
    chosen = makers[best](whole)
    if mode != "sequential" and best != "none":
        chosen = whole.matched(chosen)
    return chosen, best, errors["none"], errors[best]


# of moments of fitted and of held rows, and the fit there was: the new fit, how it was made, held errors before and after
Fitter = Callable[[Moments, Moments, Fit], tuple[Fit, str, float, float]]


@dataclass
class _Run:
    """One repair in progress."""

    walk: Walk
    patch: Patch
    weights: dict[str, np.ndarray]
    held_too: bool
    fitters: Mapping[str, Fitter]

    def finish(self, target: Target, rows: _Rows, mode: Mode) -> None:
        layer = target.now
        weight = self.weights[layer.weight]
        start = to_matrix(layer, weight).astype(np.float64)
        bias = self.weights[layer.bias].astype(np.float64) if layer.bias else np.zeros(start.shape[0] * start.shape[2])
        if not rows.fit.count or not rows.held.count:
            return
        old = (start, bias.reshape(start.shape[0], -1))
        fitter = self.fitters.get(layer.node)
        if fitter is not None:
            new, method, before, after = fitter(_moments(rows.fit, layer), _moments(rows.held, layer), old)
        else:
            new, method, before, after = _fitted(rows, layer, old, mode, self.held_too)
        self.patch.layers.append(Repaired(layer.node, layer.op, method, before, after))
        if method == "none":
            return
        values = from_matrix(layer, new[0], weight)
        self.patch.weights[layer.weight] = values
        self.walk.set_weight(layer.weight, values)
        flat: np.ndarray = new[1].ravel().astype(np.float32)
        if layer.bias:
            flat = flat.reshape(self.weights[layer.bias].shape)
            self.patch.weights[layer.bias] = flat
            self.walk.set_weight(layer.bias, flat)
        elif layer.addable:
            self.patch.added[layer.node] = flat
            self.walk.set_weight(f"{layer.node}/bias", flat)
            self.walk.set_input(layer.node, 2, f"{layer.node}/bias")


def repair(
    model: Model,
    baseline: Baseline,
    context: Context,
    found: Sequence[Target],
    mode: Mode,
    *,
    held_too: bool = True,
    mirrored: bool = False,
    fitters: Mapping[str, Fitter] = MappingProxyType({}),
) -> Patch:
    """New weights for these layers (`targets`); the model is not touched. `fitters`: of nodes that have their own.

    sequential: least squares on what reaches the layer. matched: then scaled to the variance there was. local: on what reached
    the layer before, scaled likewise. `held_too`: held rows choose, and then take part in the fit. DataError where an
    activation is not finite.
    """
    if context.calibration is None:
        raise PassError("recover", "needs calibration data: give --calib PATH (or calibration=...)")
    levels = [[t for t in found if t.level == level] for level in range(1, max((t.level for t in found), default=0) + 1)]
    local = mode == "local"
    ours = [sorted({n for t in level for n in (t.now.x, t.other) if n}) for level in levels]
    theirs = [sorted({n for t in level for n in (t.was.y, t.other, t.was.x if local else None) if n}) for level in levels]
    patch = Patch()
    with Store() as before, Store() as after:
        batches = fill(context.calibration, [before, after], mirror=mirrored)
        was = Walk(baseline.model, shapes(baseline.model).dtypes, theirs, before)
        now = Walk(model, context.get(shapes, model).dtypes, ours, after)
        used = {n for t in found for n in (t.now.weight, t.now.bias) if n}
        run = _Run(now, patch, {c.name: peek(c) for c in model.constants() if c.name in used}, held_too, fitters)
        total = sum(b.rows for b in batches)
        for stage, level in enumerate(levels):
            collector = _Collector(level, baseline, total, local)
            for number, batch in enumerate(batches):
                old, new = (finite(walk.run(stage, number), "recover: ") for walk in (was, now))
                collector.add(number, batch, old, new)
            for target in level:
                run.finish(target, collector.rows[target.now.node], mode)
            context.progress("repair", stage + 1, len(levels))
    return patch


def named(way: Way) -> str:
    """For reports."""
    return f"{way[0]}, mirrored rows too" if way[1] else way[0]


@dataclass(frozen=True)
class Outcome:
    """Ways of repair judged: the error at the outputs on held-out rows without one, and by way; the best way, and its model.

    None where no way is better than none. The model has been fitted without the held-out rows; but where there was only one way,
    on all rows at once, by `patch`.
    """

    way: Way | None
    before: float
    errors: dict[Way, float]
    model: Model | None
    patch: Patch | None = None


def affordable(model: Model, context: Context) -> tuple[Mode, ...]:
    """The modes to try: all, or one where every pass over the calibration rows takes minutes."""
    rows = (context.calibration.rows if context.calibration is not None else None) or 0
    return MODES if costs(model, context.get(shapes, model)).counted_macs * rows < _EFFORT else ("sequential",)


def judge(model: Model, baseline: Baseline, context: Context, found: Sequence[Target], modes: Sequence[Mode] = MODES) -> Outcome:
    """Of these modes, with and without mirrored rows, and no repair: what brings the outputs nearest to the baseline's."""
    if context.calibration is None:
        raise PassError("recover", "needs calibration data: give --calib PATH (or calibration=...)")
    truth = baseline.held(context.calibration)
    before = error(truth, outputs_of(model, truth))
    errors: dict[Way, float] = {}
    ways = [(mode, mirror) for mode in modes for mirror in sorted({False, mirrorable(context.calibration)})] if found else []
    best = Outcome(None, before, errors, None)
    for way in ways:
        copy = from_proto(model.proto())
        patch = repair(model, baseline, context, found, way[0], held_too=len(ways) == 1, mirrored=way[1])
        apply(copy, patch)
        errors[way] = error(truth, outputs_of(copy, truth))
        if errors[way] < (before if best.way is None else errors[best.way]):
            best = Outcome(way, before, errors, copy, patch if len(ways) == 1 else None)
    return best


def apply(model: Model, patch: Patch) -> int:
    """Put the new weights in; returns the number of constants changed or added."""
    constants = {c.name: c for c in model.constants()}
    names = Names(model)
    for name, values in patch.weights.items():
        constants[name].values = values
    nodes: dict[str, Any] = {n.name: n for n in model.graph.nodes}
    for node, values in patch.added.items():
        if node not in nodes:
            raise PassError("recover", f"node '{node}' is gone")
        set_input(nodes[node], 2, gs.Constant(names.fresh(f"{node}/bias"), values))
    return len(patch.weights) + len(patch.added)
