"""INT8 regions become one node each, which graphopt's library runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.context import Context
from graphopt.measure import paired
from graphopt.model import Model
from graphopt.quant import quantised_ops
from graphopt.region_choose import Boundaries, Choice, Timer, choose
from graphopt.region_emit import emit_region
from graphopt.region_find import Found
from graphopt.registry import register


@register("compile-int8", exact=True, after=("quantize",))
def compile_int8(model: Model, context: Context, *, boundaries: Boundaries = "auto", exclude: tuple[str, ...] = ()) -> int:
    """Each INT8 part of a QDQ graph becomes one node, as large as can be, which graphopt's library runs; returns their number.

    A part holds at least one convolution or matrix product and is convex: no path leaves it and comes back. Its node
    `graphopt.Int8Region<n>` carries the plan that the library runs, and a function of the same name holds the nodes that were
    there: without the library, onnxruntime computes what it did before. The library computes onnxruntime's integers bit for bit,
    but for exact halves in average pooling.

    - boundaries: what is left to onnxruntime because its own INT8 is faster. measured: each part is timed here, with both; a part
      that onnxruntime runs faster is left to it if the outputs are the same. estimated: by a table of speeds; always the same
      answer. all: nothing is left. auto: measured where the target is onnxruntime on this machine, else estimated.
    - exclude: patterns (* and ?) of names of nodes, or of parts as the report calls them (Int8Region3), left to onnxruntime.

    What was measured depends on the machine and its load; `recipe` in the facts of the pass names the options that make the same
    model again.
    """
    return compile_regions(model, context, boundaries, exclude)


def compile_regions(
    model: Model, context: Context, boundaries: Boundaries, exclude: tuple[str, ...] = (), timer: Timer = paired
) -> int:
    """`compile_int8`; `timer` is what times two sessions against each other."""
    if not quantised_ops(model):
        return 0
    found, choice = choose(model, context, boundaries, exclude, timer)
    for node, reason in found.reasons:
        context.reject(node, reason)
    context.facts.update(_facts(found, choice))
    for region in found.regions:
        emit_region(model, region)
    return len(found.regions)


def _facts(found: Found, choice: Choice) -> dict[str, Any]:
    """For the report: what each region replaces, its share of the MACs, what stays outside and why, and how that was chosen."""
    whole = found.macs or sum(r.macs for r in found.regions)
    left = Counter((node.op, reason) for node, reason in found.reasons)
    return {
        "regions": [
            {
                "name": r.name,
                "nodes": dict(r.ops()),
                "macs": r.macs,
                "share": round(r.macs / whole, 4) if whole else 0.0,
            }
            for r in found.regions
        ],
        "share": round(sum(r.macs for r in found.regions) / whole, 4) if whole else 0.0,
        "outside": [{"op": op, "count": n, "reason": why} for (op, why), n in left.most_common()],
        "boundaries": choice.facts(),
    }
