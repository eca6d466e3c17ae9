"""INT8 regions become one node each, which graphopt's library runs."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.context import Context
from graphopt.model import Model
from graphopt.quant import quantised_ops
from graphopt.region_emit import emit_region
from graphopt.region_find import Found, search
from graphopt.registry import register


@register("compile-int8", exact=True, after=("quantize",))
def compile_int8(model: Model, context: Context) -> int:
    """Each INT8 part of a QDQ graph becomes one node, as large as can be, which graphopt's library runs; returns their number.

    A part holds at least one convolution or matrix product and is convex: no path leaves it and comes back. Its node
    `graphopt.Int8Region<n>` carries the plan that the library runs, and a function of the same name holds the nodes that were
    there: without the library, onnxruntime computes what it did before. The library computes onnxruntime's integers bit for bit,
    but for exact halves in average pooling.
    """
    if not quantised_ops(model):
        return 0
    found = search(model, context)
    for node, reason in found.reasons:
        context.reject(node, reason)
    context.facts.update(_facts(found))
    for region in found.regions:
        emit_region(model, region)
    return len(found.regions)


def _facts(found: Found) -> dict[str, Any]:
    """For the report: what each region replaces, its share of the MACs, and what stays outside and why."""
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
    }
