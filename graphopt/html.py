"""Reports as files: a page where the name ends in .html, else JSON; and the models of several reports on one page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from graphopt.audit_report import AuditReport
from graphopt.benchmark import BenchReport
from graphopt.errors import DataError
from graphopt.evaluation import EvaluationReport
from graphopt.html_measured import audit_page, bench_page, evaluation_page, sweep_page
from graphopt.html_page import page, paragraph
from graphopt.html_report import report_page
from graphopt.html_variants import PLOTTED, Plotted
from graphopt.report import Report, SweepReport

_PAGES: Mapping[type[BaseModel], Callable[[Any], str]] = {
    Report: report_page,
    AuditReport: audit_page,
    BenchReport: bench_page,
    EvaluationReport: evaluation_page,
    SweepReport: sweep_page,
}
_HELD = re.compile(r'<script type="application/json" id="report">(.*?)</script>', re.DOTALL)
SUFFIXES = (".html", ".htm")


def rendered(report: BaseModel, path: Path) -> str:
    """What to write to the path."""
    if path.suffix.lower() not in SUFFIXES:
        return report.model_dump_json(indent=2) + "\n"
    return _PAGES[type(report)](report)


def read_report(path: Path) -> BaseModel:
    """A report from its JSON, or from the page that holds it. DataError where the file is something else."""
    try:
        content = path.read_text("utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the report {path}: {getattr(error, 'strerror', None) or error}") from error
    held = _HELD.search(content)
    for kind in _PAGES:
        try:
            return kind.model_validate_json(held[1] if held else content)
        except ValidationError:
            continue
    raise DataError(f"{path} is no report of optimize, sweep, bench, evaluate or audit of this version; write it with --report")


def combined(paths: Sequence[Path]) -> str:
    """A page of the models of all reports, one plot for each measure of quality. DataError where there is nothing to plot."""
    reports = {path: read_report(path) for path in paths}
    plots: dict[str, Plotted] = {}
    for path, report in reports.items():
        if type(report) not in PLOTTED:
            continue
        plotted = PLOTTED[type(report)](report)
        known = plots.setdefault(plotted.value.name, Plotted([], plotted.value, ("report",)))
        rows = [replace(row, cells=(path.name,)) for row in plotted.rows]
        plots[plotted.value.name] = replace(known, rows=[*known.rows, *rows])
    sections = [(name, plot.markup()) for name, plot in plots.items()]
    if not any(content for _, content in sections):
        raise DataError(f"there are no two models to compare in {', '.join(map(str, paths))}")
    note = "Latencies of different reports were measured at different times, perhaps on other machines: compare within a report."
    data = json.dumps({str(path): report.model_dump(mode="json") for path, report in reports.items()})
    return page("graphopt: variants", ", ".join(map(str, paths)), [*sections, ("How to read it", paragraph(note))], data)
