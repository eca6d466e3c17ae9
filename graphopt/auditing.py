"""`graphopt audit`: which kernels really run, and why quantised nodes do not run in INT8."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_graphsurgeon as gs

from graphopt.audit_findings import explain, findings
from graphopt.audit_map import Placement, place
from graphopt.audit_profile import CONVERSIONS, Profile, profiles
from graphopt.audit_reasons import DQ, Q, breaks, is_op, meant_for_int8, why_float
from graphopt.audit_report import AuditReport, NodeAudit, OpTime
from graphopt.errors import CheckError, DataError, GraphoptError, ModelError, OptionError
from graphopt.float_twin import float_twin
from graphopt.gates import requirement
from graphopt.inspect import INTEGER_OPS
from graphopt.model import OWN, Model, from_proto, load
from graphopt.runtime import runnable

RUNS = 60
_LATENCY_SECONDS = 1.0
TWIN = "the same model in float"
REQUIREMENTS = ("int8", "speed", "fallbacks")


@dataclass(frozen=True)
class Audited:
    """One model, profiled and mapped."""

    model: Model
    profile: Profile
    placement: Placement
    us: Mapping[str, float]  # by node


def audit(
    model: str | Path,
    *,
    base: str | Path | Literal[False] | None = None,
    data: Any = None,
    batch: int = 1,
    threads: int = 1,
    runs: int = RUNS,
) -> AuditReport:
    """Profile a model in onnxruntime on this machine and say, node by node, what ran.

    base: a model whose nodes have the same names, as the one it was made from; None takes the same model in float where it is
    quantised with QuantizeLinear and DequantizeLinear; False compares with nothing. data: as for `graphopt optimize --calib`, else
    generated. Raises ModelError where the model does not load or run, with the reason where the graph shows one.
    """
    loaded = load(model)
    feed = _feed(loaded, data, batch)
    warnings: list[str] = []
    other, name = _base(loaded, base, warnings)
    with contextlib.ExitStack() as stack:
        contents = [Path(model) if _large(loaded) else stack.enter_context(runnable(loaded))]
        if other is not None:
            contents.append(stack.enter_context(runnable(other)))
        feeds = [feed, *([_feed(other, data, batch)] if other is not None else [])]
        try:
            found = profiles(contents, feeds, runs=runs, threads=threads)
        except ModelError as error:
            found, other, name = _alone(loaded, contents[0], feed, runs, threads, error, warnings), None, None
        speedup = _speedup(contents, feeds, threads) if other is not None else None
    first, *rest = [_audited(m, p) for m, p in zip((loaded, other), found, strict=False) if m is not None]
    return _report(str(model), first, rest[0] if rest else None, (name, speedup), (batch, threads, runs), warnings)


def audit_pair(
    models: tuple[Model, Model], contents: Sequence[bytes | Path], feed: Any, *, runs: int, speedup: float | None
) -> AuditReport:
    """A model and its base, which `contents` hold in this order, on one feed with one thread. `speedup`: as measured before.

    Raises ModelError where one does not load or run.
    """
    found = profiles(contents, [feed, feed], runs=runs, threads=1)
    mine, base = (_audited(m, p) for m, p in zip(models, found, strict=True))
    return _report("the result", mine, base, ("the original", speedup), (1, 1, runs), [])


def require(report: AuditReport, wanted: Sequence[str]) -> None:
    """Raise CheckError where the report falls short of `int8=0.9` (share of MACs, at least), `speed=1.2` (over the base, at least)
    or `fallbacks=0` (at most); OptionError where a requirement cannot be read."""
    short = []
    for text in wanted:
        key, limit = requirement(text, REQUIREMENTS)
        measured = {"int8": int8_share(report), "speed": report.speedup, "fallbacks": float(report.fallbacks)}[key]
        if measured is None:
            raise OptionError(f"--require {text}: there is nothing to compare with; give --base")
        if measured > limit if key == "fallbacks" else measured < limit:
            short.append(f"{key} is {measured:.3g}, required {'at most' if key == 'fallbacks' else 'at least'} {limit:g}")
    if short:
        raise CheckError(f"audit of {report.model}: {'; '.join(short)}")


def int8_share(report: AuditReport) -> float:
    """Of multiply-accumulates where they can be counted, else of the quantised nodes."""
    if report.int8_macs is not None:
        return report.int8_macs
    return report.int8 / report.quantized if report.quantized else 0.0


# ---- what is run


def _large(model: Model) -> bool:
    """Written once already, so that no second copy is needed."""
    from graphopt.external import LIMIT

    return model.weight_bytes() > LIMIT


def _feed(model: Model, data: Any, batch: int) -> Any:
    from graphopt.data import generated, open_dataset
    from graphopt.feeds import input_specs, padded, row_count

    specs = input_specs(model.interface())
    if not specs:
        raise DataError("the model has no inputs: there is nothing to run it on")
    dataset = generated(specs, batch) if data is None else open_dataset(data, specs)
    feed = next(iter(dataset.batches(batch)))
    return padded(feed, batch) if (row_count(feed) or batch) < batch else feed


def _base(model: Model, base: str | Path | Literal[False] | None, warnings: list[str]) -> tuple[Model | None, str | None]:
    if base is False:
        return None, None
    if base is not None:
        return load(base), str(base)
    if not any(is_op(n, DQ) for n in model.nodes()):
        return None, None
    try:
        twin = from_proto(model.proto())
        if float_twin(twin):
            return twin, TWIN
    except GraphoptError as error:
        warnings.append(f"not compared with {TWIN}: {error}")
    return None, None


def _alone(
    model: Model, content: bytes | Path, feed: Any, runs: int, threads: int, error: ModelError, warnings: list[str]
) -> list[Profile]:
    """Without the base, where that was what failed; else the reason why the model does not run, where the graph shows one."""
    try:
        found = profiles([content], [feed], runs=runs, threads=threads)
    except ModelError as own:
        broken = breaks(list(model.graph.nodes))
        if broken:
            node, reason = broken[0]
            raise ModelError(f"{own}; node '{node.name}' ({node.op}): {reason.why}; {reason.fix}") from own
        raise
    warnings.append(f"compared with nothing: the base does not run: {error}")
    return found


def _speedup(contents: Sequence[bytes | Path], feeds: Sequence[Any], threads: int) -> float | None:
    """The base's latency over the model's; None where they take different inputs."""
    from graphopt.measure import latency

    if feeds[0].keys() != feeds[1].keys():
        return None
    return 1 / latency(contents, feeds[0], threads=threads, seconds=_LATENCY_SECONDS)[1].speedup


def _audited(model: Model, profile: Profile) -> Audited:
    placement = place(model.graph.nodes, profile)
    owners: dict[str, list[gs.Node]] = defaultdict(list)
    for node in model.graph.nodes:
        placed = placement.nodes[node.name]
        if placed.kernel is not None:
            owners[placed.kernel.name].append(node)
    us: dict[str, float] = {}
    for name, nodes in owners.items():
        owner = min(nodes, key=lambda n: (is_op(n, Q) or is_op(n, DQ), placement.nodes[n.name].how != "own"))
        us[owner.name] = us.get(owner.name, 0.0) + profile.kernels[name].us
    return Audited(model, profile, placement, us)


# ---- what is said


def _report(
    path: str,
    found: Audited,
    base: Audited | None,
    named: tuple[str | None, float | None],
    run: tuple[int, int, int],
    warnings: list[str],
) -> AuditReport:
    from graphopt.gains import environment

    rows = _rows(found, base)
    asked = [r for r in rows if r.quantized]
    if found.profile.inner:
        warnings.append(f"{len(found.profile.inner)} nodes in bodies of If, Loop or Scan were not looked at")
    unknown = [r.name for r in asked if r.how == "merged"]
    if unknown:
        warnings.append(f"what became of {len(unknown)} quantised nodes is not known: {', '.join(unknown[:3])}")
    categories, said = explain(found, base, rows, named[1])
    return AuditReport(
        environment=environment(),
        model=path,
        operators=str(found.profile.operators),
        batch=run[0],
        threads=run[1],
        runs=run[2],
        us=found.profile.us,
        base=named[0],
        speedup=named[1],
        base_us=base.profile.us if base else None,
        quantized=len(asked),
        int8=sum(r.int8 for r in asked),
        int8_macs=_macs_share(rows, found),
        fallbacks=sum(r.reason is not None for r in rows),
        nodes=rows,
        by_op=_by_op(found.profile),
        base_by_op=_by_op(base.profile) if base else [],
        categories=categories,
        findings=findings(found, base, rows),
        explanation=said,
        warnings=warnings,
    )


def _rows(found: Audited, base: Audited | None) -> list[NodeAudit]:
    from graphopt.cost import costs

    macs = {n.name: n.macs for n in costs(found.model).nodes}
    outputs = frozenset(id(t) for t in found.model.graph.outputs)
    rows = []
    for node in found.model.graph.nodes:
        if is_op(node, Q) or is_op(node, DQ) or node.op == "Constant":
            continue
        placed = found.placement.nodes[node.name]
        asked, ran = _asked(node), placed.kernel is not None and placed.kernel.integer
        missed = asked and not ran and placed.kernel is not None
        reason = why_float(node, outputs) if missed and node.domain != OWN else None
        rows.append(
            NodeAudit(
                name=str(node.name),
                op=str(node.op),
                kernel=placed.kernel.op if placed.kernel else None,
                how=placed.how,  # type: ignore[arg-type]
                dtype=placed.kernel.dtype if placed.kernel else "",
                shape=list(placed.kernel.outputs[0][1]) if placed.kernel and placed.kernel.outputs else [],
                us=found.us.get(node.name, 0.0),
                base_us=_base_us(base, str(node.name)),
                macs=macs.get(node.name),
                quantized=asked,
                int8=ran,
                reason=reason.why if reason else None,
                fix=reason.fix if reason else None,
            )
        )
    return rows


def _base_us(base: Audited | None, name: str) -> float | None:
    if base is None:
        return None
    own = next((n for n in (name, name.removesuffix("_quant")) if n in base.placement.nodes), None)  # as QOperator models name them
    return None if own is None else base.us.get(own, 0.0)


def _asked(node: gs.Node) -> bool:
    """Whether the node is to run on integers: by what is around it, or by its own op."""
    if node.op in CONVERSIONS:
        return False
    key = f"{node.domain}::{node.op}" if node.domain else str(node.op)
    own = key in INTEGER_OPS or str(node.op).startswith(("QLinear", "QGemm", "QAttention", "QEmbed", "Int8Region"))
    return (own and "NBits" not in key and "Bnb4" not in key and "FpQ4" not in key) or meant_for_int8(node)


def _macs_share(rows: Sequence[NodeAudit], found: Audited) -> float | None:
    if any(n.domain == OWN for n in found.model.graph.nodes):
        return None  # a region's MACs are not those of one op
    total = sum(r.macs or 0 for r in rows)
    return sum(r.macs or 0 for r in rows if r.int8) / total if total else None


def _by_op(profile: Profile) -> list[OpTime]:
    count: Counter[tuple[str, str]] = Counter()
    us: dict[tuple[str, str], float] = defaultdict(float)
    for k in profile.kernels.values():
        count[k.op, k.dtype] += 1
        us[k.op, k.dtype] += k.us
    total = profile.us or 1.0
    made = [OpTime(op=op, dtype=dt, count=count[op, dt], us=t, share=t / total) for (op, dt), t in us.items()]
    return sorted(made, key=lambda o: -o.us)
