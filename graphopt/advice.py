"""`graphopt advise`: what each technique would gain on this machine, tried where it can be, and what would not pay."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.advice_judge import original, timed
from graphopt.advice_machine import Situation, machine, situation
from graphopt.advice_report import AdviceReport, Figure
from graphopt.advice_rows import Rows, rows_for
from graphopt.advice_trials import GRAPHOPT, TECHNIQUES, Case, Made, Technique, attempt, saved
from graphopt.context import Context, Progress
from graphopt.errors import DataError, GraphoptError, OptionError
from graphopt.feeds import Feed, input_specs
from graphopt.model import Model, from_proto, load
from graphopt.pipeline import parse, run
from graphopt.targets import Target, find_target

SECONDS = 30.0
SLACK = 0.01
_TRYING, _JUDGING = 0.6, 0.1  # shares of the seconds: after the first nothing more is tried, the second bounds rows to judge by
_LEAST_TIMING, _MOST_TIMING = 2.0, 8.0  # seconds


@dataclass(frozen=True)
class AdviceSettings:
    """See `advise`."""

    data: Any = None
    evaluation: Any = None
    metric: str = "top1"
    target: str = GRAPHOPT
    slack: float = SLACK
    seconds: float = SECONDS
    progress: Progress = lambda what, done, total: None


@dataclass
class Tried:
    """One technique: what it made and how fast that is, or why it made nothing; `late`: there was no time for it."""

    technique: Technique
    made: list[Made] = field(default_factory=list)
    problem: str = ""
    late: bool = False
    speeds: list[Figure | None] = field(default_factory=list)


def advise(model: str | Path, **options: Any) -> AdviceReport:
    """Try every technique on the model, time what it makes, and say what pays; options are the fields of `AdviceSettings`.

    data: rows as for `graphopt optimize --calib`; with `labels` quality is scored too, on rows held back from calibration.
    evaluation: labelled rows to judge by, so that all of `data` may calibrate. target: where the model is to run, by default
    onnxruntime here with graphopt's library. slack: quality that may be lost. seconds: about what all may take, but for the
    library, which is built once a machine; what there is no time for is estimated.
    Raises ModelError where the model does not load or run, DataError for rows that do not fit.
    """
    settings = AdviceSettings(**options)
    if not 0 <= settings.slack < 1:
        raise OptionError(f"slack={settings.slack:g}: the share of quality that may be lost: at least 0, below 1")
    loaded, target = load(model), find_target(settings.target)
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        return _advise(Path(model), loaded, target, Path(folder), settings)


def _advise(path: Path, model: Model, target: Target, folder: Path, settings: AdviceSettings) -> AdviceReport:
    from graphopt.advice_say import Asked, ranked
    from graphopt.gains import environment

    here, warnings = environment(), list[str]()
    specs = input_specs(model.interface())
    if not specs:
        raise DataError("the model has no inputs: there is nothing to run it on")
    problem = _operators(folder, target, settings.progress)
    began = time.perf_counter()
    feed, latency = _measured(path, specs, settings)
    rows = rows_for(settings.data, settings.evaluation, specs, int(_JUDGING * settings.seconds / latency))
    known = None if rows.judged is None else original(path, rows.judged, settings.metric)
    folded = from_proto(model.proto())
    changes = sum(s.changes for s in run(folded, parse("fold"), Context(progress=settings.progress)))
    case = Case(model, folded, folder, rows.calibration, target, problem, here.cpu_features, settings.progress, changes=changes)
    found = _situation(case, feed, latency, warnings)
    deadline = began + _TRYING * settings.seconds
    tried = [_try(case, technique, number, deadline) for number, technique in enumerate(TECHNIQUES)]
    settings.progress("time what was made", 0, 0)
    left = min(max(_LEAST_TIMING, settings.seconds - (time.perf_counter() - began)), _MOST_TIMING)
    noise = _time(path, tried, feed, left) if case.here else None
    return AdviceReport(
        environment=here,
        model=str(path),
        target=target.name,
        here=case.here,
        data=rows.said,
        slack=settings.slack,
        situation=found,
        noise=noise,
        advice=ranked(Asked(path, case, rows, known, feed, settings), tried),
        seconds=time.perf_counter() - began,
        warnings=[*warnings, *_doubts(case, rows, noise, settings)],
    )


# ---- what is measured before anything is tried


def _operators(folder: Path, target: Target, progress: Progress) -> str:
    """Put graphopt's library beside the trials; why it cannot be had, or ""."""
    from graphopt.library import build, library_target, write_library
    from graphopt.operators import OperatorError, library_name

    if not target.onnxruntime:
        return ""
    try:
        write_library(folder / library_name(), build(library_target(), progress))
    except OperatorError as error:
        return str(error)
    return ""


def _measured(path: Path, specs: Any, settings: AdviceSettings) -> tuple[Feed, float]:
    """One row, and the seconds that the original takes for it, the best of three. ModelError where it does not run."""
    from graphopt.data import generated, open_dataset
    from graphopt.runtime import run as run_once
    from graphopt.runtime import session

    source = settings.data if settings.data is not None else settings.evaluation
    feed = next(iter((generated(specs, 1) if source is None else open_dataset(source, specs)).batches(1)))
    runner, taken = session(path), []
    for _ in range(3):
        began = time.perf_counter()
        run_once(runner, feed)
        taken.append(time.perf_counter() - began)
    return feed, max(min(taken), 1e-5)


def _situation(case: Case, feed: Feed, latency: float, warnings: list[str]) -> Situation | None:
    """Where the time goes; the profile stays in the case."""
    from graphopt.auditing import audit

    case.progress("profile", 0, 0)
    try:
        path = saved(case, case.folded, "profiled", "").path
        runs = int(min(60, max(4, 0.5 / latency)))
        case.profile = audit(path, base=False, data=feed, runs=runs).nodes
        return situation(case.folded, case.profile, machine(), 1e3 * latency, feed)
    except GraphoptError as error:
        warnings.append(f"the model was not profiled: {error}")
        return None


# ---- trials


def _try(case: Case, technique: Technique, number: int, deadline: float) -> Tried:
    case.progress(f"try {technique.name}", number, len(TECHNIQUES))
    if time.perf_counter() > deadline and not technique.exact:
        return Tried(technique, late=True, problem="there was no time to try it")
    made, problem = attempt(case, technique)
    return Tried(technique, made, problem)


def _time(path: Path, tried: Sequence[Tried], feed: Feed, seconds: float) -> Figure | None:
    """Fill in the speeds of all that was made; the original against itself."""
    every = [made.path for t in tried for made in t.made]
    found = timed([path, *every], feed, seconds)
    by_path = dict(zip(every, found[1:], strict=True))
    for t in tried:
        t.speeds = [by_path[m.path] for m in t.made]
    return found[0]


def _doubts(case: Case, rows: Rows, noise: Figure | None, settings: AdviceSettings) -> list[str]:
    """What the figures do not say."""
    said = []
    if noise is not None and not (0.95 <= noise.low <= 1 <= noise.high <= 1.05):
        said.append(
            f"the machine is noisy: the original against itself is {noise.low:.2f} to {noise.high:.2f}; stop what else runs, "
            "or give more --seconds"
        )
    if not case.here:
        said.append(f"{case.target.name} is not this machine's onnxruntime: nothing that runs here says how fast it will be there")
    if case.here and case.target.dot_products and case.features:
        from graphopt.gains import DOT_PRODUCTS

        if not DOT_PRODUCTS & set(case.features):
            said.append(f"this CPU has no INT8 dot products, which {case.target.name} relies on: its INT8 figures are this CPU's")
    if settings.data is None and settings.evaluation is None:
        said.append("no rows were given (--data): ranges and shapes are those of generated rows, and quality was not measured")
    elif not rows.labelled:
        said.append("the rows have no labels: quality was not measured, only how far the outputs move")
    return said
