"""The report of `optimize` as a page: is it good enough, is it faster and why, what was done, how to go back."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from graphopt.html_charts import histogram, percent
from graphopt.html_graph import graph_section, passes_section
from graphopt.html_page import (
    Bar,
    Html,
    Tile,
    bar,
    bars,
    code,
    details,
    figure,
    heading,
    items,
    key,
    many,
    page,
    paragraph,
    size,
    table,
    text,
    tiles,
)
from graphopt.html_variants import macs, of_optimize, value_of
from graphopt.lineage import names_of
from graphopt.report import Detail, Environment, LayerRow, ModelRow, Report

_LAYERS = 40  # shown at once: of more, those that take longest or are worst
_HISTOGRAMS = 12
_BETTER, _WORSE = 1.03, 0.97  # of a speed-up
SURE = 0.05  # significance


def report_page(report: Report) -> str:
    """The whole page."""
    names = names_of(report.passes)
    d = report.detail
    sections = [
        ("In short", tiles(_answers(report)) + items([f"Warning: {w}" for w in report.warnings], tone="warn")),
        ("Before and after", _figures(report.before, report.after) + _measured_on(report)),
        ("Variants", of_optimize(report).markup()),
        ("Where the time goes", _time(d) if d else ""),
        ("Layer by layer", _layers(d) if d else ""),
        ("Ranges", _ranges(d) if d else ""),
        ("Outputs", _outputs(report)),
        ("What each pass did", passes_section(report, names)),
        ("The graph, before and after", graph_section(d.nodes, names) if d else ""),
        ("How to go back", items(_back(report))),
        ("How it was made", _how(report)),
    ]
    title = Path(report.source).name if report.source else "model"
    return page(f"graphopt: {title}", f"{report.pipeline}, for {report.target}", sections, report.model_dump_json())


# ---- the answers


def _answers(report: Report) -> list[Tile]:
    before, after = report.before, report.after
    found = [_good(report)]
    if report.speedup is not None and before.latency and after.latency:
        tone = "good" if report.speedup >= _BETTER else "bad" if report.speedup < _WORSE else "warn"
        run = f"batch {after.latency.batch}, {many(after.latency.threads, 'thread')}"
        said = f"p50 {before.latency.p50_ms:.3f} → {after.latency.p50_ms:.3f} ms, {run}"
        found.append(Tile("Is it faster?", f"{report.speedup:.2f}x the original", said, tone))
    if before.file_bytes and after.file_bytes:
        change = after.file_bytes / before.file_bytes - 1
        tone = "good" if change < 0 else "warn"
        found.append(
            Tile("Is it smaller?", f"{100 * change:+.1f} %", f"{size(before.file_bytes)} → {size(after.file_bytes)}", tone)
        )
    did, ran = (list(dict.fromkeys(p.name for p in report.passes if p.changes or every)) for every in (False, True))
    said = ", ".join(did) or "no pass found anything to change"
    found.append(Tile("What was done?", f"{len(did)} of {len(ran)} passes changed it", said))
    return found


def _good(report: Report) -> Tile:
    """Quality where it was measured, else how far the outputs moved."""
    question = "Is it good enough?"
    if (q := report.quality) is not None:
        show = value_of(q.metric).show
        sure = q.p_value < SURE
        verdict = "the difference is significant" if sure else "no difference that these rows can show"
        note = f"{q.metric} on {many(q.rows, 'row')}: {q.lost} worse, {q.won} better (p = {q.p_value:.2g}); {verdict}"
        worse = q.optimized < q.original
        return Tile(
            question,
            f"{show(q.original)} → {show(q.optimized)}",
            note,
            "bad" if sure and worse else "good" if not worse else "warn",
        )
    if not report.outputs:
        return Tile(question, "not known", "outputs were not compared", "warn")
    worst = min(report.outputs, key=lambda o: float("inf") if o.sqnr_db is None else o.sqnr_db)
    answer = "the same outputs" if worst.sqnr_db is None else f"outputs: {worst.sqnr_db:.1f} dB SQNR"
    return Tile(question, answer, f"quality was not measured (--eval); outputs compared on {report.compared_on}", "warn")


_FIGURES: tuple[tuple[str, Callable[[ModelRow], float | None], Callable[[float], str]], ...] = (
    ("latency p50", lambda r: r.latency.p50_ms if r.latency else None, lambda v: f"{v:.3f} ms"),
    ("latency p95", lambda r: r.latency.p95_ms if r.latency else None, lambda v: f"{v:.3f} ms"),
    ("parameters", lambda r: r.parameters, lambda v: f"{v:,}"),
    ("MACs", lambda r: r.macs, lambda v: macs(int(v))),
    ("nodes", lambda r: r.nodes, lambda v: f"{v:,}"),
    ("weights", lambda r: r.weight_bytes, size),
    ("file", lambda r: r.file_bytes, size),
    ("peak memory", lambda r: r.peak_memory_bytes, size),
)


def _figures(before: ModelRow, after: ModelRow) -> str:
    rows: list[tuple[str, ...]] = []
    if before.quality is not None and after.quality is not None:
        rows.append(("quality", f"{before.quality:.4f}", f"{after.quality:.4f}", f"{after.quality - before.quality:+.4f}"))
    for label, get, show in _FIGURES:
        a, b = get(before), get(after)
        if a is not None or b is not None:
            change = f"{100 * (b / a - 1):+.1f} %" if a and b is not None else ""
            rows.append((label, *("-" if v is None else show(v) for v in (a, b)), change))
    return table(("", "original", "result", "change"), rows)


def _measured_on(report: Report) -> str:
    said = []
    if report.after.latency is not None and report.speedup is not None:
        said.append(
            f"latencies: {many(report.after.latency.runs, 'run')} of each model, in turns; the speed is the median of their ratios"
        )
    if any(p.name == "quantize" and p.changes for p in report.passes):
        said.append("nodes: QuantizeLinear and DequantizeLinear are counted; they vanish where the runtime computes in INT8")
    return items(said)


# ---- time and layers


def _time(d: Detail) -> str:
    if d.us is None or d.base_us is None:
        return items(d.notes)
    kinds = bars([Bar(c.name, c.us, c.base_us) for c in d.categories], "us", ("original", "result"))
    note = (
        "As onnxruntime's profiler has it, in whole microseconds; small kernels seem slower there. The speed above is without it."
    )
    return items(d.explanation) + kinds + heading("Precision", _precision(d)) + paragraph(note, soft=True) + items(d.notes)


def _precision(d: Detail) -> str:
    """By type that kernels compute on: layers, share of MACs and of time."""
    kinds: dict[str, list[LayerRow]] = {}
    for layer in d.layers:
        kinds.setdefault(layer.dtype or "no kernel of its own", []).append(layer)
    macs, us = (sum(getattr(r, f) or 0 for r in d.layers) for f in ("macs", "us"))
    rows = []
    for dtype, layers in sorted(kinds.items(), key=lambda k: -sum(r.us or 0 for r in k[1])):
        mine = [sum(getattr(r, f) or 0 for r in layers) for f in ("macs", "us")]
        shares = [
            Html(bar(m, whole, f"{100 * m / whole:.1f} %")) if whole else "" for m, whole in zip(mine, (macs, us), strict=True)
        ]
        rows.append((f"{dtype}: {many(len(layers), 'layer')}", *shares))
    fell = [f"{r.name}: {r.reason}" for r in d.layers if r.reason]
    missed = details(f"{many(len(fell), 'quantised layer')} ran in float", items(fell)) if fell else ""
    return table(("computed on", "share of MACs", "share of time"), rows, fixed=True) + missed


def _layers(d: Detail) -> str:
    """Time, error and zeros of each layer, in the order of the graph."""
    if not d.layers:
        return ""
    most = {
        "us": max([v for r in d.layers for v in (r.us, r.base_us) if v is not None], default=0.0),
        "error": max([r.error for r in d.layers if r.error is not None], default=0.0),
    }
    loud = {id(r) for r in sorted(d.layers, key=lambda r: -_weight(r, most))[:_LAYERS]}
    columns = _columns(d, most)
    shown = [r for r in d.layers if id(r) in loud]
    rest = [r for r in d.layers if id(r) not in loud]
    more = details(f"and {many(len(rest), 'smaller layer')}", _layer_table(rest, columns)) if rest else ""
    notes = [
        "error: root mean square of the difference in what a layer writes, over that of the original's; errors before it are in it"
    ]
    notes += [
        "compared with the original after the exact passes that come first, both computed as their graphs are written: what the "
        "runtime's kernels add, such as saturation on CPUs without INT8 dot products, is in the outputs only"
    ]
    bases = sorted({r.error_from for r in d.layers if r.error_from})
    notes += [
        f"where units were removed, tensors cannot be compared with the original's: they are compared with the model after {b}"
        for b in bases
    ]
    return key(("a", "original"), ("b", "result")) + _layer_table(shown, columns) + more + items(notes if most["error"] else [])


def _weight(row: LayerRow, most: dict[str, float]) -> float:
    """What makes a layer worth showing: time or error."""
    times = max(row.us or 0.0, row.base_us or 0.0) / (most["us"] or 1.0)
    return max(times, (row.error or 0.0) / (most["error"] or 1.0))


Column = tuple[str, Callable[[LayerRow], str]]


def _columns(d: Detail, most: dict[str, float]) -> list[Column]:
    """Those of time, error and zeros for which something is known."""

    def time(r: LayerRow) -> str:
        parts = (bar(r.base_us, most["us"], _us(r.base_us), "fa"), bar(r.us, most["us"], _us(r.us)))
        return "".join(parts) if r.us or r.base_us else ""

    def error(r: LayerRow) -> str:
        return bar(r.error, most["error"], _share(r.error))

    def zeros(r: LayerRow) -> str:
        old = bar(r.base_zeros, 1.0, _share(r.base_zeros), "fa") if r.base_zeros else ""
        return old + bar(r.zeros, 1.0, _share(r.zeros))

    columns: list[Column] = [("time", time)] if most["us"] else []
    columns += [("error", error)] if most["error"] else []
    return columns + ([("zero weights", zeros)] if any(r.zeros or r.base_zeros for r in d.layers) else [])


def _share(value: float | None) -> str:
    shown = 100 * (value or 0.0)
    return f"{shown:.0f} %" if shown >= 10 or not shown else f"{shown:.2g} %"


def _us(value: float | None) -> str:
    return "-" if value is None else f"{figure(value)} us"


def _layer_table(layers: Sequence[LayerRow], columns: Sequence[Column]) -> str:
    rows = [(_named(r), *(Html(show(r)) for _, show in columns)) for r in layers]
    return table(("layer", *(name for name, _ in columns)), rows, fixed=True)


def _named(row: LayerRow) -> Html:
    kind = "badge fast" if row.int8 else "badge bad" if row.reason else "badge"
    badge = f'<span class="{kind}">{text(row.dtype)}</span>' if row.dtype else ""
    return Html(f'{text(row.name)} <span class="soft">{text(row.op)}</span>{badge}')


# ---- ranges, outputs


def _ranges(d: Detail) -> str:
    if not d.ranges:
        return ""
    ranked = sorted(d.ranges, key=lambda r: -r.saturated)
    cut = [r for r in ranked if r.saturated]
    lead = (
        f"{many(len(ranked), 'tensor')} on the calibration rows; {len(cut)} have values outside the range that was chosen, which "
        "are cut off (red). Heights are square roots, so that tails can be seen; lines are the ends of the range."
    )
    first, rest = ranked[:_HISTOGRAMS], ranked[_HISTOGRAMS:]
    more = details(f"and {many(len(rest), 'more tensor')}", _grid([histogram(r) for r in rest])) if rest else ""
    return paragraph(lead, soft=True) + _grid([histogram(r) for r in first]) + more


def _grid(figures: Sequence[str]) -> str:
    return f'<div class="hists">{"".join(figures)}</div>'


def _outputs(report: Report) -> str:
    rows = [
        (
            o.name,
            "no error" if o.sqnr_db is None else f"{o.sqnr_db:.1f} dB",
            f"{o.max_error:.3g}",
            f"{o.scale:.3g}",
            f"{o.cosine:.6f}",
            "-" if o.argmax_agreement is None else percent(o.argmax_agreement),
        )
        for o in report.outputs
    ]
    said = f"Against the original's, on {report.compared_on}." if report.compared_on else ""
    return table(("output", "SQNR", "max error", "scale", "cosine", "same argmax"), rows) + paragraph(said, soft=True)


# ---- how


def _back(report: Report) -> list[str]:
    """What a reader types to undo this, wholly or in part, and to make it again."""
    source = shlex.quote(report.source) if report.source else "MODEL"
    given = " --calib ROWS" if report.calibration else ""
    again = f"graphopt optimize {source} --passes {shlex.quote(report.pipeline)} --target {report.target}{given}"
    digest = f", SHA-256 {report.source_sha256}" if report.source_sha256 else ""
    lines = [f"The original was not changed: {report.source or 'the model given'}{digest}. To go back, use it."]
    if report.detail and len(report.detail.stages) > 1:
        lines.append(
            "To go back one step, leave the last pass out of --passes; the table of variants says what each step is worth."
        )
    lines.append(Html(f"To make the same again: {code(again)}"))
    lines.append(
        Html(f"With a registry ({code('graphopt release')}), {code('graphopt rollback REGISTRY')} returns to the version before.")
    )
    return lines


def _how(report: Report) -> str:
    lines = [f"calibration: {report.calibration}"] if report.calibration else []
    lines += (
        [f"{many(report.checked_passes, 'exact change')} checked: outputs stayed but for rounding"] if report.checked_passes else []
    )
    return items([*lines, f"{report.seconds:.1f} seconds in all, measuring included", environment_text(report.environment)])


def environment_text(e: Environment) -> str:
    features = ", ".join(e.cpu_features) or "no instruction sets of note"
    return f"graphopt {e.graphopt}, onnx {e.onnx}, onnxruntime {e.onnxruntime}, Python {e.python}, {e.cpu} ({features})"
