"""`prune-heads`: remove whole attention heads."""

from __future__ import annotations

from typing import Literal

from graphopt.context import Context
from graphopt.model import Model
from graphopt.prune import Request, prune_groups
from graphopt.registry import register

NAME = "prune-heads"


@register(NAME)
def prune_heads(
    model: Model,
    context: Context,
    *,
    ratio: float | None = None,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | None = None,
    scope: Literal["uniform", "global", "sensitivity"] = "uniform",
    criterion: str = "l2",
    round_to: int = 1,
    minimum: int = 1,
    include: tuple[str, ...] = (),
    exclude: tuple[str, ...] = (),
    protect: tuple[str, ...] = (),
) -> int:
    """The least important heads of every attention block are cut out of all weights that hold them.

    - ratio, macs, params, bytes, latency: give exactly one. ratio: the share of heads to remove. The others: the share that is to
      stay of MACs, parameters, bytes of weights, or time in onnxruntime on this machine (one row, one thread; pruned copies are
      timed), by the least pruning that gets there.
    - scope: uniform takes the same share of every group, global ranks all heads together,
      sensitivity too, by what their removal does to the outputs on calibration rows.
    - criterion: how important a unit is. l1, l2: the size of its weights; bn-scale, bn-scale-shift: its BatchNormalization (use
      them before fold-bn); activation: its mean magnitude on calibration rows (--calib) times the weights reading it; fluctuation,
      first-order, fisher, obs: see docs/pruning.md and docs/recovery.md (they need --calib too); or a plugin's.
    - round_to: every weight's axis keeps a multiple of this many indices; a head is usually wide enough to need no rounding.
    - minimum: units that every group keeps.
    - include, exclude: patterns (* and ?) of names of weights and nodes; a group matches by any of its own.
    - protect: patterns of outputs that must not change at all: no group that they depend on is pruned.

    A head goes from the query, key and value projections, their biases and the output projection; with fewer key than query
    heads, a key head goes with all query heads that read it. Returns the number of heads removed. Not exact: evaluate the
    result. `graphopt groups MODEL` shows which groups are heads.
    """
    wanted = Request(
        NAME,
        kinds=("heads",),
        ratio=ratio,
        macs=macs,
        params=params,
        bytes=bytes,
        latency=latency,
        scope=scope,
        criterion=criterion,
        round_to=round_to,
        minimum=minimum,
        include=include,
        exclude=exclude,
        protect=protect,
    )
    return prune_groups(model, context, wanted)
