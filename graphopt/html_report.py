"""The reports of `optimize` and `audit` as one HTML page each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from graphopt.audit_report import AuditReport, NodeAudit
from graphopt.html_page import Bar, bars, items, page, paragraph, section, table
from graphopt.report import Environment, ModelRow, Report

_LAYERS = 60  # shown in a chart, in the order of the graph: the slowest of more


def report_page(report: Report) -> str:
    """What `optimize` did: figures side by side, what each pass did, how far outputs moved, warnings."""
    made = [(i, p) for i, p in enumerate(report.passes) if p.changes]
    charts = [
        section(
            "Nodes after each pass",
            bars([Bar(f"{i + 1}. {p.name}", float(p.nodes)) for i, p in made], "nodes", ("", "after the pass")),
        ),
        section(
            "Weights after each pass",
            bars([Bar(f"{i + 1}. {p.name}", p.weight_bytes / 1e3) for i, p in made], "kB", ("", "after the pass")),
        ),
    ]
    left = [(p.name, r.op, str(r.count), r.reason) for p in report.passes for r in p.rejected]
    quality = ""
    if (q := report.quality) is not None:
        quality = f"{q.metric} on {q.rows} rows: {q.lost} worse, {q.won} better (p = {q.p_value:.2g}, sign test)"
    speed = f"{report.speedup:.2f}x the original's speed, median of paired runs" if report.speedup is not None else ""
    outputs = [
        (
            o.name,
            "no error" if o.sqnr_db is None else f"{o.sqnr_db:.1f} dB",
            f"{o.max_error:.3g}",
            f"{o.scale:.3g}",
            f"{o.cosine:.6f}",
        )
        for o in report.outputs
    ]
    sections = [
        section("Before and after", _figures(report.before, report.after), paragraph(quality), paragraph(speed)),
        section("Warnings", items(report.warnings, bad=True)),
        section("Outputs", table(("output", "SQNR", "max error", "scale", "cosine"), outputs), paragraph(report.compared_on or "")),
        *charts,
        section("Passes", table(("pass", "options", "changes", "seconds", "nodes"), _passes(report), text=(1,))),
        section("Left alone", table(("pass", "op", "nodes", "reason"), left, text=(1, 3))),
        _how(report),
    ]
    return page(f"graphopt: {report.source or 'model'}", f"{report.pipeline}, for {report.target}", sections)


def rendered(report: Report | AuditReport, path: Path) -> str:
    """A page where the file's name ends in .html, else JSON."""
    if path.suffix not in (".html", ".htm"):
        return report.model_dump_json(indent=2) + "\n"
    return report_page(report) if isinstance(report, Report) else audit_page(report)


_FIGURES: tuple[tuple[str, Callable[[ModelRow], float | None], str], ...] = (
    ("quality", lambda r: r.quality, "{:.4f}"),
    ("latency p50, ms", lambda r: r.latency.p50_ms if r.latency else None, "{:.3f}"),
    ("latency p95, ms", lambda r: r.latency.p95_ms if r.latency else None, "{:.3f}"),
    ("parameters", lambda r: r.parameters, "{:,}"),
    ("MACs", lambda r: r.macs, "{:,}"),
    ("nodes", lambda r: r.nodes, "{:,}"),
    ("file, bytes", lambda r: r.file_bytes, "{:,}"),
    ("peak memory, bytes", lambda r: r.peak_memory_bytes, "{:,}"),
)


def _figures(before: ModelRow, after: ModelRow) -> str:
    rows = []
    for label, get, show in _FIGURES:
        a, b = get(before), get(after)
        if a is None and b is None:
            continue
        change = f"{100 * (b / a - 1):+.1f} %" if a and b is not None and label != "quality" else ""
        rows.append((label, *("-" if v is None else show.format(v) for v in (a, b)), change))
    return table(("", "original", "optimised", "change"), rows)


def _passes(report: Report) -> list[tuple[str, ...]]:
    return [
        (p.name, " ".join(f"{k}={v}" for k, v in p.options.items()), str(p.changes), f"{p.seconds:.2f}", str(p.nodes))
        for p in report.passes
    ]


def _how(report: Report) -> str:
    lines = [f"source: {report.source}, SHA-256 {report.source_sha256}"] if report.source else []
    lines += [f"calibration: {report.calibration}"] if report.calibration else []
    return section("How it was made", items([*lines, _environment(report.environment)]))


def _environment(e: Environment) -> str:
    features = ", ".join(e.cpu_features) or "no instruction sets of note"
    return f"graphopt {e.graphopt}, onnx {e.onnx}, onnxruntime {e.onnxruntime}, Python {e.python}, {e.cpu} ({features})"


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
    share = "" if report.int8_macs is None else f", {100 * report.int8_macs:.1f} % of the multiply-accumulates"
    summary = f"INT8: {report.int8} of {report.quantized} quantised nodes{share}"
    run = f"batch {report.batch}, {report.threads} threads, {report.runs} profiled runs"
    sections = [
        section("In short", items(report.explanation), paragraph(summary)),
        section("Warnings", items(report.warnings, bad=True)),
        section("By kind of node", bars([Bar(c.name, c.us, c.base_us) for c in report.categories], "us", names)),
        section("Findings", table(("kind", "nodes", "which", "why", "what to do"), found, text=(2, 3, 4))),
        section("By layer", bars([Bar(f"{n.name} ({n.kernel or n.how})", n.us, n.base_us) for n in layers], "us", names)),
        section("By kernel", table(("kernel", "type", "kernels", "us", "share"), kernels, text=(1,))),
        section("How it was measured", items([run, _environment(report.environment)])),
    ]
    return page(f"audit: {report.model}", f"{report.us:.0f} us a run, as profiled", sections)


def _slowest(rows: Sequence[NodeAudit]) -> list[NodeAudit]:
    kept = {n.name for n in sorted(rows, key=lambda n: -max(n.us, n.base_us or 0.0))[:_LAYERS]}
    return [n for n in rows if n.name in kept]
