"""The reports of `audit`, `bench`, `evaluate` and `sweep` as pages."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from graphopt.audit_report import AuditReport, NodeAudit
from graphopt.benchmark import BenchReport, Timing
from graphopt.evaluation import EvaluationReport, GroupRow, SetRow
from graphopt.gold import GoldRow
from graphopt.html_charts import Value, percent
from graphopt.html_graph import passes_of
from graphopt.html_page import (
    Bar,
    Html,
    Tile,
    bars,
    code,
    details,
    items,
    many,
    page,
    paragraph,
    size,
    table,
    tiles,
)
from graphopt.html_report import SURE, environment_text
from graphopt.html_variants import of_bench, of_evaluate, of_sweep, value_of
from graphopt.knee import shown_error
from graphopt.report import Environment, PointRow, SweepReport

_LAYERS = 60  # shown in a chart, in the order of the graph: the slowest of more
_ROWS = 40  # lost and won rows that are named


def _warned(warnings: Sequence[str]) -> str:
    return items([f"Warning: {w}" for w in warnings], tone="warn")


def _measured(environment: Environment, *lines: str) -> tuple[str, str]:
    return "How it was measured", items([*lines, environment_text(environment)])


# ---- audit


def audit_page(report: AuditReport) -> str:
    """What an audit found: where the time goes, layer by layer, beside the base."""
    layers = _slowest([n for n in report.nodes if n.us or n.base_us])
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for f in report.findings:
        grouped.setdefault((f.kind, f.why, f.fix), []).extend(f.nodes)
    found = [
        (kind, str(len(names)), ", ".join(names[:4]) + " …" * (len(names) > 4), why, fix)
        for (kind, why, fix), names in grouped.items()
    ]
    kernels = [(o.op, o.dtype, str(o.count), f"{o.us:.0f}", f"{100 * o.share:.1f} %") for o in report.by_op]
    names = (report.base or "", "this model")
    share = "" if report.int8_macs is None else f"{100 * report.int8_macs:.1f} % of the multiply-accumulates"
    answers = [Tile("Does it run in INT8?", f"{report.int8} of {report.quantized}", f"quantised nodes; {share}".rstrip("; "))]
    if report.speedup is not None:
        tone = "good" if report.speedup > 1 else "bad"
        answers.append(Tile("Is it faster?", f"{report.speedup:.2f}x", f"than {report.base}", tone))
    answers.append(Tile("What fell back to float?", many(report.fallbacks, "node"), "", "bad" if report.fallbacks else "good"))
    run = f"batch {report.batch}, {many(report.threads, 'thread')}, {report.runs} profiled runs; each kernel is timed by itself"
    sections = [
        ("In short", tiles(answers) + items(report.explanation) + _warned(report.warnings)),
        ("By kind of node", bars([Bar(c.name, c.us, c.base_us) for c in report.categories], "us", names)),
        ("Findings", table(("kind", "nodes", "which", "why", "what to do"), found, text_columns=(2, 3, 4))),
        ("By layer", bars([Bar(f"{n.name} ({n.kernel or n.how})", n.us, n.base_us) for n in layers], "us", names)),
        ("By kernel", table(("kernel", "type", "kernels", "us", "share"), kernels, text_columns=(1,))),
        _measured(report.environment, run),
    ]
    return page(
        f"audit: {Path(report.model).name}",
        f"{report.model}: {report.us:.0f} us a run, as profiled",
        sections,
        report.model_dump_json(),
    )


def _slowest(rows: Sequence[NodeAudit]) -> list[NodeAudit]:
    kept = {n.name for n in sorted(rows, key=lambda n: -max(n.us, n.base_us or 0.0))[:_LAYERS]}
    return [n for n in rows if n.name in kept]


# ---- bench


def bench_page(report: BenchReport) -> str:
    """Models side by side: quality where it was measured, latency, size, memory, and what noise is worth."""
    first = report.timings[0] if report.timings else None
    header = ("batch", "threads", "p50", "p95", "p99", "rows/s", "speed", "95 % interval", "load")
    joules = any(t.joules is not None for t in report.timings)
    rows = [_timing(t) + ((f"{1e3 * t.joules:.3f} mJ" if t.joules is not None else "-",) if joules else ()) for t in report.timings]
    memory = [
        (m.model, *("-" if v is None else size(v) for v in (m.file_bytes, m.load_bytes, m.run_bytes, m.peak_bytes)))
        for m in report.memory
    ]
    noise = [
        f"the first model against itself, batch {c.batch}, {_threads(c.threads)}: {c.speedup:.3f}x ({c.low:.3f} to {c.high:.3f})"
        for c in report.control
    ]
    sections = [
        ("In short", tiles(_faster(report)) + _warned(report.warnings)),
        ("Variants", of_bench(report).markup()),
        ("Latency p50", bars([Bar(_run(t), t.p50_ms) for t in report.timings], "ms", ("", ""))),
        ("Timings", table(("model", *header, *(("energy",) if joules else ())), rows)),
        ("Memory", table(("model", "file", "after loading", "after running", "peak"), memory)),
        _measured(report.environment, *noise, report.energy),
    ]
    against = f"against {first.model}" if first else ""
    return page("bench", f"{many(len(report.memory), 'model')} {against}", sections, report.model_dump_json())


def _timing(t: Timing) -> tuple[str, ...]:
    times = [f"{v:.3f} ms" for v in (t.p50_ms, t.p95_ms, t.p99_ms)]
    ratio = (f"{t.speedup:.2f}x", f"{t.low:.2f} to {t.high:.2f}", f"{t.load_ms:.1f} ms")
    return (_of(t), str(t.batch), str(t.threads or "all"), *times, f"{t.rows_per_second:,.0f}", *ratio)


def _of(t: Timing) -> str:
    return t.model if t.provider == "CPUExecutionProvider" else f"{t.model} ({t.provider})"


def _run(t: Timing) -> str:
    return f"{_of(t)}, batch {t.batch}, {_threads(t.threads)}"


def _threads(count: int) -> str:
    return many(count, "thread") if count else "all cores"


def _faster(report: BenchReport) -> list[Tile]:
    """One answer for each model but the first, with its first batch size and thread count."""
    first = report.timings[0] if report.timings else None
    rest = {t.model: t for t in reversed(report.timings) if first and (t.model, t.provider) != (first.model, first.provider)}
    found = []
    for t in reversed(rest.values()):
        tone = "good" if t.low > 1 else "bad" if t.high < 1 else "warn"
        verdict = {"good": "faster", "bad": "SLOWER", "warn": "no difference that these runs can show"}[tone]
        found.append(
            Tile(
                f"{_of(t)} against {first.model if first else ''}",
                f"{t.speedup:.2f}x",
                f"{t.low:.2f} to {t.high:.2f}: {verdict}",
                tone,
            )
        )
    return found


# ---- evaluate


def evaluation_page(report: EvaluationReport) -> str:
    """One model on labelled rows, beside its base."""
    main = report.evaluation
    value = value_of(report.metric, higher=report.higher_is_better)
    sections = [
        ("In short", tiles(_evaluated(report, value)) + _warned(report.warnings)),
        ("Variants", of_evaluate(report).markup()),
        ("Rows lost and won", _rows(main)),
        ("Groups", _groups(main, value)),
        (
            "Classes",
            bars(
                [Bar(f"{g.group} ({many(g.rows, 'row')})", g.value, g.base) for g in _by_drop(main.classes)],
                "",
                ("base", "this model"),
            ),
        ),
        ("Hard set", _hard(report.hard, value) if report.hard else ""),
        ("Gold set", _gold(report.gold) if report.gold else ""),
        _measured(
            report.environment,
            f"rows: {main.data}, SHA-256 {main.digest}",
            f"preprocessing: {main.preprocessing or 'none declared: rows are given as they are'}",
        ),
    ]
    return page(
        f"evaluate: {Path(report.model).name}",
        f"{report.model}: {report.metric} on {many(main.rows, 'row')}",
        sections,
        report.model_dump_json(),
    )


def _evaluated(report: EvaluationReport, value: Value) -> list[Tile]:
    main = report.evaluation
    found = [Tile(value.name, value.show(main.value), many(main.rows, "row"))]
    if (p := main.paired) is not None:
        worse = (p.difference < 0) == report.higher_is_better and p.difference != 0
        sure = p.p_value is not None and p.p_value < SURE
        note = "" if p.low is None or p.high is None else f"95 % interval {p.low:+.4f} to {p.high:+.4f}"
        tone = "good" if not worse else "bad" if sure else "warn"
        found.append(Tile("Is it good enough?", f"{p.difference:+.4f}", f"against {p.base}; {note}".rstrip("; "), tone))
    if main.worst is not None:
        found.append(Tile("Worst group", value.show(main.worst.value), f"{main.worst.group}, {many(main.worst.rows, 'row')}"))
    if report.hard is not None:
        found.append(Tile("Hard set", value.show(report.hard.value), many(report.hard.rows, "row")))
    return found


def _rows(found: SetRow) -> str:
    p = found.paired
    if p is None or p.lost is None or p.won is None:
        return ""
    said = f"{many(len(p.lost), 'row')} lost, {len(p.won)} won; p = {p.p_value:.2g} (exact sign test)."
    named = [
        f"{what}: {', '.join(map(str, rows[:_ROWS]))}{' …' * (len(rows) > _ROWS)}"
        for what, rows in (("lost", p.lost), ("won", p.won))
        if rows
    ]
    return paragraph(said) + items(named)


def _groups(found: SetRow, value: Value) -> str:
    rows = [
        (g.group, str(g.rows), value.show(g.value), "-" if g.base is None else value.show(g.base)) for g in _by_drop(found.groups)
    ]
    return table(("group", "rows", "this model", "base"), rows)


def _by_drop(groups: Sequence[GroupRow]) -> list[GroupRow]:
    """Those first that lost most against the base, else the lowest."""
    return sorted(groups, key=lambda g: g.value - (g.base or 0.0))


def _hard(found: SetRow, value: Value) -> str:
    base = "" if found.paired is None else f", the base {value.show(found.paired.value)}"
    return paragraph(f"{value.show(found.value)} on {many(found.rows, 'row')} of {found.data}{base}") + _rows(found)


def _gold(found: GoldRow) -> str:
    same = "" if found.argmax_agreement is None else f", the same argmax on {percent(found.argmax_agreement)}"
    return paragraph(f"{many(found.rows, 'row')}: error {found.relative_error:.3g} of the scale, cosine {found.cosine:.6f}{same}")


# ---- sweep


def sweep_page(report: SweepReport) -> str:
    """The curve from which a user picks a point, with the recipe of each."""
    reached = [p for p in report.points if p.failed is None]
    plotted = of_sweep(report)
    knees = [(k.rule, "-" if k.keep is None else f"{k.keep:g}", k.why) for k in report.knees]
    failed = [f"{p.keep:g} was not reached: {p.failed}" for p in report.points if p.failed is not None]
    warnings = [*(f"{p.keep:g}: {w}" for p in reached for w in p.warnings), *report.warnings]
    sections = [
        ("In short", tiles(_picked(report, plotted.value)) + _warned([*failed, *warnings])),
        ("Variants", plotted.markup()),
        ("Where to stop", table(("rule", "keep", "why"), knees, text_columns=(2,))),
        ("Make one of them", _recipes(report, reached)),
        ("What was done for each", "".join(details(f"{p.keep:g}", passes_of(p.passes)) for p in reached)),
        (
            "How it was made",
            items(
                [
                    f"source: {report.source}, SHA-256 {report.source_sha256}",
                    *([f"calibration: {report.calibration}"] if report.calibration else []),
                    f"{report.seconds:.1f} seconds in all",
                    environment_text(report.environment),
                ]
            ),
        ),
    ]
    return page(
        f"sweep: {Path(report.source).name if report.source else 'model'}",
        f"{report.template}, for {report.target}",
        sections,
        report.model_dump_json(),
    )


def _picked(report: SweepReport, value: Value) -> list[Tile]:
    """What each rule picks."""
    points = {p.keep: p for p in report.points}
    found = []
    for knee in report.knees:
        point = points.get(knee.keep) if knee.keep is not None else None
        if point is None:
            found.append(Tile(knee.rule, "no point", knee.why, "warn"))
            continue
        y = point.quality.optimized if point.quality else shown_error(point)
        faster = "" if point.latency_ratio is None else f"{1 / point.latency_ratio:.2f}x the speed, "
        size_ = "" if point.file_bytes is None else size(point.file_bytes)
        told = "" if y is None else f"{value.name} {value.show(y)}, "
        found.append(Tile(f"{knee.rule}: {knee.why}", f"keep {point.keep:g}", f"{told}{faster}{size_}".rstrip(", ")))
    return found


def _recipes(report: SweepReport, reached: Sequence[PointRow]) -> str:
    source, given = shlex.quote(report.source or "MODEL"), " --calib ROWS" if report.calibration else ""
    return items(
        [Html(f"{p.keep:g}: {code(f'graphopt optimize {source} --passes {shlex.quote(p.recipe)}{given}')}") for p in reached]
    )
