"""Reports as files: a page where the name ends in .html, else JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from graphopt.audit_report import AuditReport
from graphopt.benchmark import BenchReport
from graphopt.evaluation import EvaluationReport
from graphopt.html_measured import audit_page, bench_page, evaluation_page, sweep_page
from graphopt.html_report import report_page
from graphopt.report import Report, SweepReport

_PAGES: Mapping[type[BaseModel], Callable[[Any], str]] = {
    Report: report_page,
    AuditReport: audit_page,
    BenchReport: bench_page,
    EvaluationReport: evaluation_page,
    SweepReport: sweep_page,
}


def rendered(report: BaseModel, path: Path) -> str:
    """What to write to the path."""
    if path.suffix.lower() not in (".html", ".htm"):
        return report.model_dump_json(indent=2) + "\n"
    return _PAGES[type(report)](report)
