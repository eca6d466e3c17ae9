"""What each report has to plot: its models, with quality or error, latency and size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from graphopt.benchmark import BenchReport
from graphopt.evaluation import EvaluationReport
from graphopt.html_charts import Value, Variant, percent, variants
from graphopt.html_page import figure, paragraph, size
from graphopt.knee import shown_error
from graphopt.report import ModelRow, PointRow, Report, SweepReport

_SHARES = frozenset({"top1", "top5", "binary", "exact", "f1", "auc"})  # metrics that are shares of 1


@dataclass(frozen=True)
class Plotted:
    """The models of a report, what their values are, and what else is told of each."""

    rows: Sequence[Variant]
    value: Value
    header: tuple[str, ...] = ()
    lead: str = ""

    def markup(self) -> str:
        """Nothing where there is nothing to compare."""
        return paragraph(self.lead, soft=True) + variants(self.rows, self.value, self.header) if len(self.rows) > 1 else ""


def value_of(metric: str, *, higher: bool = True) -> Value:
    """The axis of a metric."""
    return Value(f"quality ({metric})", higher, percent if metric in _SHARES else figure)


def of_optimize(report: Report) -> Plotted:
    """The original and each stage; without stages the result."""
    value = value_of(report.quality.metric) if report.quality else Value("RMS error at the outputs", False, percent)
    before, after = report.before, report.after
    rows = [Variant("original", before.quality if report.quality else 0.0, *_costs(before), ("1.00x", macs(before.macs)))]
    stages = report.detail.stages if report.detail else []
    for i, s in enumerate(stages):
        found = (s.quality.optimized if s.quality else None) if report.quality else s.error
        cells = ("-" if s.speedup is None else f"{s.speedup:.2f}x", macs(s.macs))
        latency = s.latency.p50_ms if s.latency else None
        rows.append(Variant(s.name if i == 0 else f"then {s.name}", found, latency, s.file_bytes, cells))
    if not stages and report.quality:
        speed = "-" if report.speedup is None else f"{report.speedup:.2f}x"
        rows.append(Variant("result", after.quality, *_costs(after), (speed, macs(after.macs))))
    lead = "The original, and the model after each step that can change its answers." if stages else ""
    return Plotted(rows, value, ("speed", "MACs"), lead)


def of_sweep(report: SweepReport) -> Plotted:
    """The original and the points that were reached."""
    first = report.original
    by_quality = first.quality is not None
    value = value_of(report.metric or "") if by_quality else Value("error at the outputs", False, percent)
    cells = ("1.00", macs(first.macs), f"{first.parameters:,}", "-")
    rows = [Variant("original", first.quality if by_quality else 0.0, *_costs(first), cells)]
    rows += [_point(p, by_quality=by_quality) for p in report.points if p.failed is None]
    return Plotted(rows, value, ("time", "MACs", "parameters", "lost/won"))


def _point(p: PointRow, *, by_quality: bool) -> Variant:
    y = (p.quality.optimized if p.quality else None) if by_quality else shown_error(p)
    cells = (
        "-" if p.latency_ratio is None else f"{p.latency_ratio:.2f}",
        macs(p.macs),
        "-" if p.parameters is None else f"{p.parameters:,}",
        "-" if p.quality is None else f"{p.quality.lost}/{p.quality.won}",
    )
    return Variant(f"keep {p.keep:g}", y, p.latency.p50_ms if p.latency else None, p.file_bytes, cells)


def of_bench(report: BenchReport) -> Plotted:
    """Quality over cost where there is quality, else size over time; times are those of the first batch and thread count."""
    sizes = {m.model: m.file_bytes for m in report.memory}
    times = {t.model: t.p50_ms for t in reversed(report.timings)}
    if not report.quality:
        rows = [Variant(name, float(sizes[name]), ms, None) for name, ms in times.items() if name in sizes]
        return Plotted(rows, Value("file size", False, size), lead="Quality was not measured (--eval): file size over time.")
    found = []
    for q in report.quality:
        cells = ("-" if q.lost is None else f"{q.lost}/{q.won}", "-" if q.p_value is None else f"{q.p_value:.2g}")
        found.append(Variant(q.model, q.value, times.get(q.model), sizes.get(q.model), cells))
    return Plotted(found, value_of(report.quality[0].metric, higher=report.quality[0].higher_is_better), ("lost/won", "p"))


def of_evaluate(report: EvaluationReport) -> Plotted:
    """The model, behind its base if there is one."""
    main = report.evaluation
    rows = [Variant(Path(report.model).name, main.value, None, report.file_bytes)]
    if main.paired is not None:
        rows.insert(0, Variant(Path(main.paired.base).name, main.paired.value, None, report.base_file_bytes))
    return Plotted(rows, value_of(report.metric, higher=report.higher_is_better))


PLOTTED: Mapping[type[BaseModel], Callable[[Any], Plotted]] = {
    Report: of_optimize,
    SweepReport: of_sweep,
    BenchReport: of_bench,
    EvaluationReport: of_evaluate,
}


def _costs(row: ModelRow) -> tuple[float | None, int | None]:
    """Latency and file size."""
    return row.latency.p50_ms if row.latency else None, row.file_bytes


def macs(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.2f} M"
