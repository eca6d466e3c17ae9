"""`recover`: closed-form repair after removal, from unlabelled calibration rows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from graphopt.context import Context
from graphopt.model import Model
from graphopt.recovery import MODES, apply, named, repair_best
from graphopt.registry import register


@register("recover", needs_data=True, repairs=True)
def recover(model: Model, context: Context, *, mode: Literal["auto", "matched", "sequential", "local"] = "auto") -> int:
    """Every linear layer behind a removal is refitted, in order, to what it computed before; returns the number of weights changed.

    - mode: sequential fits on what reaches the layer now; matched then scales each output to the variance it had; local fits on
      what reached the layer before, and scales likewise. auto takes what brings the outputs nearest to the original's.

    Least squares from calibration rows (--calib), without labels or gradients, in seconds. A quarter of the rows is kept from the
    fits and chooses the strength of the ridge for each layer, and whether a layer, or the model, is better left alone. Comes
    after pruning or sparsify, in the same pipeline: the model before the first of these is what the layers aim at. Zeros of
    sparse weights stay zeros.
    """
    if context.baseline is None:
        context.facts["skipped"] = "nothing was removed before it in this pipeline, or the model is over 2 GB"
        return 0
    found = repair_best(model, context.baseline, context, MODES if mode == "auto" else (mode,))
    context.facts.update(
        {
            "mode": named(found.way) if found.way else None,
            "error_before": found.before,
            "error_after": found.errors[found.way] if found.way else found.before,
            "errors": {named(way): value for way, value in found.errors.items()},
            "layers": [asdict(layer) for layer in found.patch.layers],
        }
    )
    return apply(model, found.patch)
