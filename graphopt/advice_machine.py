"""What this machine can do at most, and how near a model comes: whether arithmetic, memory or neither is what it waits for.

The roofline model (Williams, Waterman, Patterson, "Roofline: An Insightful Visual Performance Model for Multicore Architectures",
2009) with both roofs measured, by onnxruntime's own float32 product on one thread: of square matrices that stay in the cache, and
of one row with a matrix that does not fit.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from pydantic import Field

from graphopt.audit_findings import category
from graphopt.audit_report import NodeAudit
from graphopt.feeds import Feed
from graphopt.model import Model
from graphopt.report import Row
from graphopt.runtime import run, session

_SQUARE, _ROWS, _COLUMNS = 512, 4096, 8192  # the second matrix: 128 MiB, more than caches of one core hold
_TRIES, _SECONDS = 5, 0.2  # at least, and at most where more tries fit
_CACHE = Path("/sys/devices/system/cpu/cpu0/cache")
_UNKNOWN_CACHE = 32 << 20
MOST = 0.5  # of the time, from which on the model is called bound by something


@dataclass(frozen=True)
class Machine:
    """Measured: GMAC a second, and GB a second read from memory, of one thread. `cache`: bytes of the last level."""

    gmacs: float
    gbytes: float
    cache: int


class KindRow(Row):
    """Nodes of one kind, as profiled after cleanup."""

    kind: str
    nodes: int
    us: float
    share: float = Field(description="of the model's time")
    gmacs_per_second: float | None = Field(description="null: no multiply-accumulates, or not known")
    of_peak: float | None = Field(description="share of what this machine's float32 product reaches")


class Situation(Row):
    """Where the time of the model goes on this machine."""

    latency_ms: float
    gmacs_per_second: float = Field(description="roof of arithmetic: onnxruntime's float32 product here, one thread")
    gbytes_per_second: float = Field(description="roof of memory: one row times a matrix larger than the cache")
    cache_bytes: int
    weight_bytes: int = Field(description="of nodes that multiply")
    arithmetic: float = Field(description="share of the time in nodes that multiply and do not wait for their weights")
    weights: float = Field(description="share of the time that reading weights takes, if they do not fit into the cache")
    other: float = Field(description="share of the time in nodes without multiply-accumulates")
    bound: str = Field(description="what most of the time goes into: arithmetic, weights, or neither")
    kinds: list[KindRow]


def machine() -> Machine:
    """Measure both roofs: half a second."""
    info = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("MatMul", ["a", "b"], ["c"])
    graph = onnx.helper.make_graph([node], "roof", [info("a", 1, ["m", "k"]), info("b", 1, ["k", "n"])], [info("c", 1, ["m", "n"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    runner = session(model)
    square = np.ones((_SQUARE, _SQUARE), np.float32)
    best = _fastest(runner, {"a": square, "b": square})
    wide = np.ones((_ROWS, _COLUMNS), np.float32)
    slowest = _fastest(runner, {"a": np.ones((1, _ROWS), np.float32), "b": wide})
    return Machine(_SQUARE**3 / best / 1e9, wide.nbytes / slowest / 1e9, _cache())


def _fastest(runner: object, feed: Mapping[str, np.ndarray]) -> float:
    taken: list[float] = []
    while len(taken) < _TRIES or sum(taken) < _SECONDS:  # what else the machine does only adds
        began = time.perf_counter()
        run(runner, feed)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _cache() -> int:
    """Of the last level, where the system says it."""
    sizes = []
    for file in sorted(_CACHE.glob("index*/size")):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes += [int(digits) * unit] if digits.isdigit() else []
    return max(sizes, default=_UNKNOWN_CACHE)


def situation(model: Model, audited: Sequence[NodeAudit], here: Machine, latency_ms: float, feed: Feed) -> Situation:
    """Of the audit's nodes, run on `feed`; shares are of the sum of their times.

    A kind of nodes that is faster than the roof of arithmetic was measured to be lifts it: it was measured on a busy machine.
    """
    nodes = {str(n.name): n for n in model.graph.nodes}
    macs = _macs(model, feed)
    rows = [r.model_copy(update={"macs": macs.get(r.name)}) for r in audited]
    heavy = [r for r in rows if r.macs]
    kinds = _kinds(nodes, rows)
    here = replace(here, gmacs=max([here.gmacs, *(k.gmacs_per_second or 0.0 for k in kinds)]))
    sizes = {r.name: weight_bytes(nodes[r.name]) for r in heavy if r.name in nodes}
    total, held = sum(r.us for r in rows) or 1.0, sum(sizes.values())
    waiting = sum(min(r.us, sizes.get(r.name, 0) / here.gbytes / 1e3) for r in heavy) if held > here.cache else 0.0
    shares = {
        "arithmetic": (sum(r.us for r in heavy) - waiting) / total,
        "weights": waiting / total,
        "other": 1 - sum(r.us for r in heavy) / total,
    }
    most = max(shares, key=lambda k: shares[k])
    named = {"arithmetic": "arithmetic", "weights": "reading weights", "other": "operators that do not multiply"}
    return Situation(
        latency_ms=latency_ms,
        gmacs_per_second=here.gmacs,
        gbytes_per_second=here.gbytes,
        cache_bytes=here.cache,
        weight_bytes=held,
        **shares,
        bound=named[most] if shares[most] >= MOST else "nothing alone",
        kinds=[_placed(k, here) for k in kinds],
    )


def weight_bytes(node: gs.Node) -> int:
    """Of the constants that a node reads, but for vectors and scalars."""
    constants = [t for t in node.inputs if isinstance(t, gs.Constant) and len(t.shape) > 1]
    return sum(prod(t.shape) * np.dtype(t.dtype).itemsize for t in constants)


def _macs(model: Model, feed: Feed) -> dict[str, int]:
    """Of each node, with the sizes of the feed."""
    from graphopt.cost import costs

    sizes = {f"{name}[{axis}]": size for name, value in feed.items() for axis, size in enumerate(value.shape)}
    return {n.name: n.macs for n in costs(model, sizes=sizes).nodes}


def _kinds(nodes: Mapping[str, gs.Node], rows: Sequence[NodeAudit]) -> list[KindRow]:
    """The most time first; without shares of the peak."""
    groups: dict[str, list[NodeAudit]] = defaultdict(list)
    for row in rows:
        if row.us and row.name in nodes:
            groups[category(nodes[row.name])].append(row)
    made, total = [], sum(r.us for r in rows) or 1.0
    for kind, members in groups.items():
        us, macs = sum(r.us for r in members), sum(r.macs or 0 for r in members)
        speed = macs / us / 1e3 if macs else None
        made.append(KindRow(kind=kind, nodes=len(members), us=us, share=us / total, gmacs_per_second=speed, of_peak=None))
    return sorted(made, key=lambda k: -k.us)


def _placed(kind: KindRow, here: Machine) -> KindRow:
    speed = kind.gmacs_per_second
    return kind if speed is None else kind.model_copy(update={"of_peak": speed / here.gmacs})
