"""Removing the least important units of coupled dimensions: the body of `prune-channels`, `prune-heads` and `prune-neurons`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import ceil
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.allocate import Candidate, Plan, by_budget, by_ratio, candidate, meter
from graphopt.context import Context
from graphopt.cost import Axis, Costs, costs
from graphopt.criteria import find_criterion
from graphopt.dims import Dims, Group, couple, groups
from graphopt.errors import OptionError, PassError
from graphopt.groups_view import names_of, nodes_of, pinned, summarized
from graphopt.inspect import is_quantized, quantization
from graphopt.kinds import KINDS, Kind, kind_of
from graphopt.layers import Layer, find_layers
from graphopt.model import Model, from_proto
from graphopt.proto import subgraphs, walk
from graphopt.registry import suggest
from graphopt.removal import kept_masks, remove
from graphopt.shapes import shapes
from graphopt.time_goal import aim, time_terms
from graphopt.units import Freed, Holds, holdings, mac_terms, step_of, weight_terms
from graphopt.worth import ABSOLUTE, Priority, by_score, measured, per_unit_freed

Scope = Literal["uniform", "global", "sensitivity"]


GOALS = ("ratio", "macs", "params", "bytes", "latency")


@dataclass(frozen=True)
class _Goal:
    """One of: a share of units to remove; a share of MACs, parameters, bytes of weights or milliseconds to keep."""

    kind: str  # of GOALS
    value: float


@dataclass(frozen=True)
class _Scene:
    """The chosen groups as costs see them."""

    holds: list[Holds]
    freed: Mapping[str, Freed]  # by kind of goal
    costs: Costs


@dataclass(frozen=True)
class Request:
    """What a pass was asked to do; `name` is the pass, for messages, the rest is told in docs/pruning.md.

    `least`: the share of its units that every group keeps, beside `minimum`. `streams`: also units that several layers write, as
    the channels that run past residual blocks.
    """

    name: str
    kinds: tuple[Kind, ...] = KINDS
    ratio: float | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: float | None = None
    scope: Scope = "uniform"
    criterion: str = "l2"
    round_to: int = 8
    minimum: int = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    protect: tuple[str, ...] = ()
    streams: bool = True
    least: float = 0.0


def prune_groups(model: Model, context: Context, wanted: Request) -> int:
    """Cut the least important units of the groups of the wanted kinds out of all weights that hold them; returns how many.

    Raises OptionError for options that make no sense, PassError for a quantised model or a target out of reach.
    """
    wanted, measured_facts = timed(model, context, wanted)
    labels, facts = plan_groups(model, context, wanted)
    context.facts.update({**facts, **measured_facts})
    if labels.size:
        cut(model, context, labels, _dims(model, context, wanted))
    return len(labels)


def timed(model: Model, context: Context, wanted: Request) -> tuple[Request, dict[str, object]]:
    """A target in milliseconds as the share of the planned time that reaches it, by timing pruned copies; and what to report."""
    if wanted.latency is None:
        return wanted, {}
    goal_of(wanted)

    def made(planned: float) -> Model:
        copy = from_proto(model.proto())
        labels, _ = plan_groups(model, context, replace(wanted, latency=planned))
        if labels.size:
            cut(copy, Context(), labels, _dims(copy, Context(), wanted))
        copy.sort()
        return copy

    planned, taken = aim(wanted.latency, made, model, context, wanted.name)
    return replace(wanted, latency=planned), {"latency": {"asked": wanted.latency, "planned": planned, "measured": taken}}


def couple_streams(model: Model) -> Dims:
    """`couple` with the features under a LayerNormalization free."""
    return couple(model, residual=True)


def _dims(model: Model, context: Context, wanted: Request) -> Dims:
    return context.get(couple_streams if "residual" in wanted.kinds else couple, model)


def cut(model: Model, context: Context, labels: np.ndarray, dims: Dims | None = None) -> None:
    """Remove these units, and remember what the model was and what of it is left, for repair."""
    dims = dims or context.get(couple, model)
    baseline = context.remember(model)
    if baseline is not None:
        baseline.narrow(kept_masks(dims, labels))
    remove(model, dims, labels)


def plan_groups(model: Model, context: Context, wanted: Request) -> tuple[np.ndarray, dict[str, object]]:
    """The units to remove, and what the report should say; the model is not touched. Raises as `prune_groups`."""
    goal = goal_of(wanted)
    if wanted.round_to < 1 or wanted.minimum < 1:
        raise OptionError(f"{wanted.name}: round_to and minimum must be at least 1, not {wanted.round_to} and {wanted.minimum}")
    score = find_criterion(wanted.criterion, wanted.name)
    _refuse_quantized(model, wanted.name)
    dims = _dims(model, context, wanted)
    chosen = _choose(model, context, dims, wanted)
    scene = _scene(model, context, dims, chosen, goal)
    scores = score(model, context, chosen) if chosen else []
    worth = _worth(model, context, scene, chosen, scores, goal, wanted)
    candidates = _candidates(scene, chosen, scores, worth, wanted)
    plan = _plan(scene, candidates, goal, wanted)
    loose = [replace(c, step=1) for c in candidates]
    facts = _facts(model, dims, scene, candidates, plan, _plan(scene, loose, goal, wanted))
    facts["removed"] = removed = _removed(model, dims, chosen, candidates, scores, plan)
    if "residual" in wanted.kinds:
        facts["approximate"] = [row["group"] for row in removed if row["kind"] == "residual"]
    labels = [g.units[c.order[:k]] for g, c, k in zip(chosen, candidates, plan, strict=True) if k]
    return np.concatenate([np.empty(0, np.int64), *labels]), facts


def _worth(
    model: Model,
    context: Context,
    scene: _Scene,
    chosen: Sequence[Group],
    scores: Sequence[np.ndarray],
    goal: _Goal,
    wanted: Request,
) -> list[Priority | None]:
    """What makes units of different groups comparable; None: LAMP, or for measured sensitivity that the group stays."""
    if wanted.scope == "uniform" or not chosen:
        return [None] * len(chosen)
    freed = scene.freed.get(goal.kind, scene.freed["macs"])
    each = {i: per_unit_freed(freed, holds) for i, holds in enumerate(scene.holds)}
    if wanted.scope == "sensitivity":
        return measured(model, context, chosen, each, float(scene.freed["macs"].total))
    if wanted.criterion in ABSOLUTE:
        return [by_score(score, each[i]) for i, score in enumerate(scores)]
    return [None] * len(chosen)


def goal_of(wanted: Request) -> _Goal:
    """What is asked for; OptionError unless it is exactly one thing that makes sense."""
    values = ((kind, getattr(wanted, kind)) for kind in GOALS)
    given = [_Goal(kind, value) for kind, value in values if value is not None]
    if len(given) != 1:
        raise OptionError(f"{wanted.name}: give exactly one of {'=, '.join(GOALS[:-1])}= and {GOALS[-1]}=, not {len(given)}")
    goal = given[0]
    if goal.kind == "ratio" and not 0 <= goal.value < 1:
        raise OptionError(f"{wanted.name}: ratio={goal.value:g} is the share of units to remove: at least 0, below 1")
    if goal.kind != "ratio" and not 0 < goal.value <= 1:
        raise OptionError(f"{wanted.name}: {goal.kind}={goal.value:g} is the share that stays: above 0, at most 1")
    return goal


def _refuse_quantized(model: Model, name: str) -> None:
    found = quantization(model)
    if "QDQ nodes" in found:
        raise PassError(
            name, f"the model is already quantised ({found['QDQ nodes']} QDQ nodes): prune the float model, then quantise"
        )


def _choose(model: Model, context: Context, dims: Dims, wanted: Request) -> list[Group]:
    """The groups that may be pruned; why the others may not is recorded with the first of their nodes."""
    upstream = _upstream(model, wanted)
    tensors = model.tensors()
    writers = [] if wanted.streams else [layer for layer in find_layers(model)[0] if layer.groups == 1]
    chosen = []
    for group in groups(model, dims):
        if kind_of(group, dims, tensors) not in wanted.kinds:
            continue
        nodes = nodes_of(group, tensors)
        held = [tensors[s.tensor] for s in group.slices if s.tensor in tensors]
        names = [*(t.name for t in held), *(n.name for n in nodes)]
        checks = {
            "several layers write it": not wanted.streams and _writers(group, dims, writers) > 1,
            "not included": bool(wanted.include) and not _matches(names, wanted.include),
            "excluded": _matches(names, wanted.exclude),
            "a protected output depends on it": any(id(n) in upstream for n in nodes),
            "its weights are already quantised": any(isinstance(t, gs.Constant) and is_quantized(t) for t in held),
        }
        reason = next((reason for reason, applies in checks.items() if applies), None)
        if reason is None:
            chosen.append(group)
        elif nodes:
            context.reject(nodes[0], reason)
    return chosen


def has_streams(model: Model, context: Context, wanted: Request) -> bool:
    """Whether some group that may be pruned is written by several layers."""
    dims = context.get(couple, model)
    everything = {g.index for g in _choose(model, context, dims, replace(wanted, streams=True))}
    return everything != {g.index for g in _choose(model, context, dims, replace(wanted, streams=False))}


def _writers(group: Group, dims: Dims, layers: Sequence[Layer]) -> int:
    """How many distinct inputs the layers that write the group's units have: query, key and value of a head count as one."""
    labels = {layer: dims.labels(layer.weight) for layer in layers}
    return len({layer.x for layer, axes in labels.items() if axes and np.isin(group.units, axes[layer.out_axis]).any()})


def _matches(names: Sequence[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in names)


def _upstream(model: Model, wanted: Request) -> set[int]:
    """id() of every node that an output matching a pattern depends on. OptionError for a pattern that no output matches."""
    outputs = {t.name: t for t in model.graph.outputs}
    for pattern in wanted.protect:
        if not _matches(list(outputs), [pattern]):
            raise OptionError(f"{wanted.name}: protect={pattern} matches no output; {suggest(pattern, outputs)}")
    stack = [t for name, t in outputs.items() if _matches([name], wanted.protect)]
    seen: set[int] = set()
    while stack:
        for node in stack.pop().inputs:
            if id(node) not in seen:
                seen.add(id(node))
                stack.extend(node.inputs)
                inner = [n for graph in subgraphs(node) for body in walk(graph) for n in body.nodes]
                seen.update(id(n) for n in inner)
                stack.extend(t for n in inner for t in n.inputs)
    return seen


def _scene(model: Model, context: Context, dims: Dims, chosen: Sequence[Group], goal: _Goal) -> _Scene:
    counted = costs(model, context.get(shapes, model))
    weights, wide, sizes = weight_terms(model)
    holds = holdings(chosen, dims, {**sizes, **counted.sizes})
    freed = {"params": Freed(weights, sizes), "bytes": Freed(wide, sizes), "macs": Freed(mac_terms(counted), counted.sizes)}
    if goal.kind == "latency":
        freed["latency"] = Freed(time_terms(model, context, counted), counted.sizes)
    return _Scene(holds, freed, counted)


def _candidates(
    scene: _Scene, chosen: Sequence[Group], scores: Sequence[np.ndarray], worth: Sequence[Priority | None], wanted: Request
) -> list[Candidate]:
    candidates = []
    for group, score, holds, priority in zip(chosen, scores, scene.holds, worth, strict=True):
        if score.shape != group.units.shape or not np.isfinite(score).all() or (score < 0).any():
            where = group.slices[0].tensor if group.slices else str(group.index)
            raise PassError(
                wanted.name, f"group of '{where}': the criterion did not give {len(group.units)} finite numbers of at least 0"
            )
        step = step_of(holds, scene.freed["params"].sizes, wanted.round_to)
        size = len(group.units)
        stays = wanted.scope == "sensitivity" and priority is None
        minimum = size if stays else max(wanted.minimum, ceil(wanted.least * size))
        candidates.append(candidate(score, holds, step=step, minimum=minimum, priority=priority))
    return candidates


def _plan(scene: _Scene, candidates: Sequence[Candidate], goal: _Goal, wanted: Request) -> Plan:
    if not candidates:
        if goal.kind != "ratio" and goal.value < 1:
            raise PassError(
                wanted.name, f"{goal.kind}={goal.value:g} cannot be reached: no group can be pruned; see `graphopt groups`"
            )
        return ()
    if goal.kind == "ratio":
        return by_ratio(candidates, goal.value, scope=_levels(wanted.scope))
    freed = scene.freed[goal.kind]
    if not freed.total:
        raise PassError(wanted.name, f"{goal.kind}={goal.value:g} cannot be aimed at: none could be counted; use ratio= or params=")
    gauge = meter(freed.terms, freed.sizes, candidates)
    plan = by_budget(candidates, gauge, goal.value * freed.total, scope=_levels(wanted.scope))
    if plan is None:
        least = gauge.read(candidates, [c.removable(len(c.order)) for c in candidates]) / freed.total
        raise PassError(
            wanted.name, f"{goal.kind}={goal.value:g} cannot be reached: with every group at its least, {least:.3g} stay"
        )
    return plan


def _levels(scope: Scope) -> str:
    """How `allocate` names it: measured sensitivity is a way to rank all units together."""
    return "uniform" if scope == "uniform" else "global"


def _facts(
    model: Model, dims: Dims, scene: _Scene, candidates: Sequence[Candidate], plan: Plan, unrounded: Plan
) -> dict[str, object]:
    """For the report: before and after, what rounding kept, and what is pinned."""

    def lost(of: Plan) -> dict[Axis, int]:
        gone: Counter[Axis] = Counter()
        for choice, removed in zip(candidates, of, strict=True):
            gone.update({axis: int(counts[removed]) for axis, counts in choice.lost.items()})
        return gone

    mine, exact = lost(plan), lost(unrounded)
    parameters, macs = scene.freed["params"], scene.freed["macs"]
    return {
        "groups": len(candidates),
        "groups_pruned": sum(k > 0 for k in plan),
        "units": sum(len(c.order) for c in candidates),
        "units_removed": sum(plan),
        "parameters": [parameters.total, parameters.total - parameters.by(mine)],
        "macs": [macs.total, macs.total - macs.by(mine)],
        "macs_uncounted_nodes": len(scene.costs.uncounted),
        "without_rounding": {
            "units_removed": sum(unrounded),
            "parameters": parameters.total - parameters.by(exact),
            "macs": macs.total - macs.by(exact),
        },
        "pinned": summarized(pinned(model, dims)),
    }


def _removed(
    model: Model, dims: Dims, chosen: Sequence[Group], candidates: Sequence[Candidate], scores: Sequence[np.ndarray], plan: Plan
) -> list[dict[str, object]]:
    """For the report, of each group that shrinks: its kind, and which units go (index, the weakest first), and their scores."""
    tensors = model.tensors()
    return [
        {
            "group": names_of(group, tensors)[0],
            "kind": kind_of(group, dims, tensors),
            "units": len(group.units),
            "removed": choice.order[:count].tolist(),
            "scores": [float(f"{s:.4g}") for s in score[choice.order[:count]]],
        }
        for group, choice, score, count in zip(chosen, candidates, scores, plan, strict=True)
        if count
    ]
