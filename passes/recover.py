"""`recover`: closed-form repair after removal, from unlabelled calibration rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from graphopt.context import Context
from graphopt.model import Model
from graphopt.recovery import affordable, apply, judge, named, repair, targets
from graphopt.registry import register
from graphopt.tuning import retune, tune


@register("recover", needs_data=True, repairs=True)
def recover(model: Model, context: Context, *, mode: Literal["auto", "matched", "sequential", "local"] = "auto") -> int:
    """Every linear layer behind a removal is refitted, in order, to what it computed before; returns the number of weights changed.

    - mode: sequential fits on what reaches the layer now; matched then scales each output to the variance it had; local fits on
      what reached the layer before, and scales likewise. auto takes what brings the outputs nearest to the original's; of models
      that need minutes for the rows it tries sequential alone.

    Last, every channel gets a scale and a shift by one damped Gauss-Newton step on the outputs, where that helps held-out rows.

    Least squares from calibration rows (--calib), without labels or training, in seconds. A quarter of the rows is kept from the
    fits and chooses the strength of the ridge for each layer, and whether a layer, or the model, is better left alone. Comes
    after pruning or sparsify, in the same pipeline: the model before the first of these is what the layers aim at. Zeros of
    sparse weights stay zeros.
    """
    if context.baseline is None:
        context.facts["skipped"] = "nothing was removed before it in this pipeline, or the model is over 2 GB"
        return 0
    found = targets(model, context.baseline)
    outcome = judge(model, context.baseline, context, found, affordable(model, context) if mode == "auto" else (mode,))
    errors = {named(way): value for way, value in outcome.errors.items()}
    context.facts.update(
        {"mode": None, "error_before": outcome.before, "error_after": outcome.before, "errors": errors, "layers": []}
    )
    if outcome.way is None or outcome.model is None:
        return 0
    tuned = tune(outcome.model, context.baseline, context)
    patch = outcome.patch
    if patch is None:
        patch = repair(model, context.baseline, context, found, outcome.way[0], mirrored=outcome.way[1])
    count = apply(model, patch)
    retune(model, context.baseline, context, tuned)
    context.facts.update({"mode": named(outcome.way), "layers": [asdict(layer) for layer in patch.layers], **tuned.facts()})
    return count
