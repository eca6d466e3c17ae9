"""`prune-search`: remove channels, neurons and heads by what measurements on calibration rows favour, and repair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from graphopt.context import Context
from graphopt.cost import costs
from graphopt.kinds import KINDS, Kind
from graphopt.model import Model
from graphopt.prune import Request
from graphopt.recovery import Patch, apply, named, repair, targets
from graphopt.registry import register
from graphopt.search import Tried, search
from graphopt.shapes import shapes
from graphopt.tuning import retune, tune

NAME = "prune-search"


@register(NAME, needs_data=True, repairs=True)
def prune_search(
    model: Model,
    context: Context,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    kinds: tuple[Kind, ...] = KINDS,
    round_to: int = 8,
    minimum: int = 1,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    protect: tuple[str, ...] = (),
) -> int:
    """Units are removed by several recipes, each repaired in closed form; what stays nearest to the original's outputs is taken.

    - ratio, macs, params, bytes, latency: give exactly one, as for prune-channels: the share of units to remove, or the share of
      MACs, parameters, bytes or time on this machine to keep.
    - kinds: what may go: heads, neurons, channels; all where nothing is said.
    - round_to, minimum, include, exclude, protect: as for prune-channels.

    Recipes differ in criterion, in how groups are weighed against each other, and in whether channels that run past residual
    blocks may shrink; none is best everywhere, so calibration rows (--calib, no labels) that no fit has seen decide. The report
    lists all of them. Returns the number of units removed.
    """
    wanted = Request(
        NAME,
        kinds=kinds,
        ratio=ratio,
        macs=macs,
        params=params,
        bytes=bytes,
        latency=latency,
        round_to=round_to,
        minimum=minimum,
        include=include,
        exclude=exclude,
        protect=protect,
        least=0.1,
    )
    before = costs(model, context.get(shapes, model))
    best, tried = search(model, context, wanted)
    own = Context(context.calibration, context.target, context.progress)
    assert best.repaired is not None
    tuned = tune(best.repaired, best.baseline, own)
    patch = repair(best.model, best.baseline, own, targets(best.model, best.baseline), best.mode, mirrored=best.mirrored)
    apply(best.model, patch)
    retune(best.model, best.baseline, own, tuned)
    after = costs(best.model)
    sizes = {"parameters": [before.parameters, after.parameters], "macs": [before.macs, after.macs]}
    context.facts.update({**best.facts, **sizes, **_facts(best, tried, patch), **tuned.facts()})
    model.graph, model.leftovers = best.model.graph, best.model.leftovers
    context.baseline = best.baseline
    return best.units


def _facts(best: Tried, tried: Sequence[Tried], patch: Patch) -> dict[str, object]:
    """For the report: what was chosen among what, and how each layer fared."""
    return {
        "recipe": str(best.recipe),
        "mode": named((best.mode, best.mirrored)),
        "candidates": [
            {"recipe": str(t.recipe), "mode": named((t.mode, t.mirrored)), "error": t.error, "units": t.units} for t in tried
        ],
        "repaired_by": dict(Counter(layer.method.split()[0] for layer in patch.layers)),
        "layers": [asdict(layer) for layer in patch.layers],
    }
