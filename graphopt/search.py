"""Candidates for what to remove, each carried out and repaired on a copy, judged by the outputs on held-out calibration rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from graphopt.agreement import error, outputs_of
from graphopt.baseline import Baseline
from graphopt.context import Context
from graphopt.cost import costs
from graphopt.errors import PassError
from graphopt.model import Model, from_proto
from graphopt.prune import Request, Scope, cut, goal_of, has_streams, plan_groups, timed
from graphopt.recovery import MODES, Mode, apply, repair, targets
from graphopt.shapes import shapes
from graphopt.walk import mirrorable


@dataclass(frozen=True)
class Recipe:
    """How to choose: criterion, how groups are weighed, whether streams may shrink, and in how many steps with repair between."""

    criterion: str
    scope: Scope
    streams: bool
    steps: int = 1

    def __str__(self) -> str:
        streams = ", streams too" if self.streams else ""
        return f"{self.criterion} {self.scope}{streams}, {self.steps} step{'s' * (self.steps > 1)}"


# what won somewhere in our measurements (docs/recovery.md); none wins everywhere
RECIPES = (
    Recipe("obs", "sensitivity", False),
    Recipe("obs", "sensitivity", False, 4),
    Recipe("obs", "sensitivity", True),
    Recipe("obs", "global", False),
    Recipe("fisher", "global", True),
)


LARGE = 1e8  # MACs of a row from which recipes of several steps take too long to be tried


_MORE_ROWS = 1.05  # held-out rows are too few to tell errors this near apart; then the fit on twice as many rows is taken


@dataclass(frozen=True)
class Tried:
    """A recipe carried out: the pruned model, not repaired since its last step, and the error that repair left on held-out rows.

    `repaired` is the model after that repair; of the best candidate only.
    """

    recipe: Recipe
    mode: Mode
    mirrored: bool
    error: float
    model: Model
    baseline: Baseline
    units: int
    facts: dict[str, object]
    repaired: Model | None = None


def search(model: Model, context: Context, wanted: Request, recipes: Sequence[Recipe] = RECIPES) -> tuple[Tried, list[Tried]]:
    """The candidate that is nearest to the original's outputs once repaired, and all that were tried; the model is not touched.

    PassError without data, or where no candidate reaches the target.
    """
    goal_of(wanted)
    baseline = context.remember(model)
    if baseline is None or context.calibration is None:
        raise PassError(wanted.name, "needs calibration data: give --calib PATH (or calibration=...)")
    tried: list[Tried] = []
    best: Tried | None = None
    images = mirrorable(context.calibration)
    refused = ""
    for number, recipe in enumerate(recipes):
        if recipe.steps > 1 and len(recipes) > 1 and (wanted.latency is not None or context.get(macs, model) > LARGE):
            continue
        if recipe.streams and _alike(recipe, recipes) and not has_streams(model, context, wanted):
            continue  # what the same recipe without streams does
        try:
            best = _better(best, _judged(_carried_out(model, baseline, context, wanted, recipe), context, MODES[0], False), tried)
        except PassError as reason:  # out of reach for this recipe; another may get there
            refused = str(reason)
        context.progress("try candidates", number + 1, len(recipes))
    if best is None:
        raise PassError(wanted.name, f"no candidate reaches the target: {refused}")
    first = best
    for mode in MODES[1:]:
        best = _better(best, _judged(first, context, mode, False), tried)
    if images:
        best = _better(best, _judged(first, context, best.mode, True), tried, _MORE_ROWS)
    return best, tried


def _better(best: Tried | None, new: Tried, tried: list[Tried], favour: float = 1.0) -> Tried:
    """The better of both, which alone keeps its repaired model; the new one is noted."""
    tried.append(replace(new, repaired=None))
    return new if best is None or new.error < favour * best.error else best


def _alike(recipe: Recipe, recipes: Sequence[Recipe]) -> bool:
    return replace(recipe, streams=False) in recipes


def _carried_out(model: Model, baseline: Baseline, context: Context, wanted: Request, recipe: Recipe) -> Tried:
    """Prune a copy, in steps with a repair before each but the first; measurements of the model itself are shared."""
    asked = replace(wanted, criterion=recipe.criterion, scope=recipe.scope, streams=recipe.streams)
    asked, times = timed(model, context, asked)
    copy = from_proto(model.proto())
    own = Context(context.calibration, context.target, baseline=baseline.copy())
    whole = _size(model, context, wanted)
    units, total, facts, removed = 0, 0, dict[str, object](), dict[str, dict[str, Any]]()
    for step in range(1, recipe.steps + 1):
        first = step == 1
        if not first:
            images = mirrorable(own.calibration)
            apply(copy, repair(copy, _own(own), own, targets(copy, _own(own)), MODES[0], held_too=False, mirrored=images))
            own.drop()
        part = _part(asked, step / recipe.steps, whole / _size(copy, own, wanted), units, total)
        labels, facts = plan_groups(model if first else copy, context if first else own, part)
        if labels.size:
            cut(copy, own, labels)
            copy.sort()
            own.drop()
        _add(removed, facts["removed"])
        total = total or int(str(facts["units"]))
        units += len(labels)
    return Tried(
        recipe, MODES[0], False, float("inf"), copy, _own(own), units, {**facts, **times, "removed": list(removed.values())}
    )


def _add(removed: dict[str, dict[str, Any]], found: object) -> None:
    """Join a step's removals to those of the steps before, units counted as they were before the first."""
    for row in found if isinstance(found, list) else []:
        known = removed.setdefault(row["group"], {**row, "removed": [], "scores": []})
        alive = [i for i in range(known["units"]) if i not in set(known["removed"])]
        known["removed"] = known["removed"] + [alive[i] for i in row["removed"]]
        known["scores"] = known["scores"] + row["scores"]


def _own(context: Context) -> Baseline:
    assert context.baseline is not None
    return context.baseline


def macs(model: Model) -> int:
    """Of one row, as far as they are known."""
    return costs(model).counted_macs


def _size(model: Model, context: Context, wanted: Request) -> float:
    """What the target counts."""
    found = costs(model, context.get(shapes, model))
    sizes = {"params": found.parameters, "bytes": found.weight_bytes}
    return float(sizes.get(goal_of(wanted).kind, found.counted_macs))


def _part(wanted: Request, share: float, grown: float, gone: int, total: int) -> Request:
    """The target once this share of the way is gone. `grown`: by what the model was larger before the first step; `gone`, `total`:
    units removed so far, and those there were (0 before the first step).
    """
    if wanted.ratio is not None:
        goal = int(total * wanted.ratio * share + 1e-9)  # as `allocate.by_ratio` counts
        return replace(wanted, ratio=(goal - gone) / (total - gone) if total else wanted.ratio * share)
    aimed = goal_of(wanted)
    if share == 1 and grown == 1:
        return wanted
    changed: dict[str, Any] = {aimed.kind: min(1.0, (1 - (1 - aimed.value) * share) * grown)}
    return replace(wanted, **changed)


def _judged(candidate: Tried, context: Context, mode: Mode, mirrored: bool) -> Tried:
    """Repair a copy this way, without the held-out rows, and see how far its outputs are."""
    assert context.calibration is not None
    own = Context(context.calibration, context.target)
    model, baseline = candidate.model, candidate.baseline
    copy = from_proto(model.proto())
    apply(copy, repair(model, baseline, own, targets(model, baseline), mode, held_too=False, mirrored=mirrored))
    truth = baseline.held(context.calibration)
    return replace(candidate, mode=mode, mirrored=mirrored, error=error(truth, outputs_of(copy, truth)), repaired=copy)
