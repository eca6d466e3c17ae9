"""`graphopt.sweep`: one pipeline with several targets, in one run that shares data, folding, analyses and timing."""

from __future__ import annotations

import contextlib
import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt import emit
from graphopt.agreement import Answers, answers, error, outputs_of, scores
from graphopt.api import (
    DEFAULT_TARGET,
    Figures,
    PassRows,
    Settings,
    check_feeds,
    copied,
    dataset_of,
    figures,
    file_digest,
    score_original,
)
from graphopt.context import Context, Progress
from graphopt.data import Dataset
from graphopt.errors import ModelError, OptionError, PassError
from graphopt.evaluate import paired, score
from graphopt.gains import environment, latency_row, model_row, quality_row
from graphopt.knee import knees
from graphopt.measure import Latency, latency
from graphopt.model import Model, from_proto
from graphopt.pipeline import Step, parse, run, to_text
from graphopt.proportion import explain, out_of_step
from graphopt.report import PointRow, SweepReport
from graphopt.runtime import Feed, runnable, session
from graphopt.targets import find_target

PASSES = {"macs": "fold, prune-search macs={}, cleanup", "params": "fold, prune-search params={}, cleanup"}
LOSS = 0.01  # of quality, that a user may not mind
_SECONDS = 1.0  # of timing a model


@dataclass(frozen=True)
class Target:
    """One point: the number put in, the pipeline as text and parsed."""

    keep: float
    recipe: str
    steps: tuple[Step, ...]


@dataclass
class Sweep:
    """The report, and the models' files by target."""

    report: SweepReport
    files: dict[float, bytes]
    stem: str

    def names(self) -> dict[float, str]:
        """What `save` calls the files."""
        return {keep: file_name(self.stem, keep) for keep in self.files}

    def save(self, folder: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write every model into the folder, which is made if it is not there; each file is written whole or not at all."""
        found = Path(folder)
        check_folder(found, list(self.names().values()), overwrite=overwrite)
        found.mkdir(exist_ok=True)
        paths = {keep: found / name for keep, name in self.names().items()}
        for keep, path in paths.items():
            emit.write_bytes(path, self.files[keep])
        self.report.points = [
            p.model_copy(update={"path": str(paths[p.keep])}) if p.keep in paths else p for p in self.report.points
        ]
        return list(paths.values())

    def plot(self) -> str:
        """The curve as one self-contained SVG."""
        from graphopt.sweep_plot import plot

        return plot(self.report)


def file_name(stem: str, keep: float) -> str:
    """`resnet20.keep-0.8.onnx`."""
    return f"{stem}.keep-{keep:g}.onnx"


def check_folder(folder: Path, names: Sequence[str], *, overwrite: bool) -> None:
    """Raise before any work where the models could not be written."""
    if folder.is_dir():
        for name in names:
            emit.check_target(folder / name, overwrite=overwrite)
    else:
        emit.check_target(folder, overwrite=False)


def plan(keep: Iterable[float], template: str) -> list[Target]:
    """The pipelines, largest target first. OptionError for targets and templates that make no sense."""
    values = sorted({float(f"{float(k):.6g}") for k in keep}, reverse=True)
    wrong = next((v for v in values if not 0 < v <= 1), None)
    if not values or wrong is not None:
        found = "none" if wrong is None else f"{wrong:g}"
        raise OptionError(f"sweep: keep names the shares that stay, as 0.9,0.7,0.5, each above 0 and at most 1, not {found}")
    if "{}" not in template and "{gone}" not in template:
        raise OptionError(
            f"sweep: the pipeline '{template}' has no place for the target: write {{}} for the share that stays, as macs={{}}, "
            "or {gone} for the share that goes, as ratio={gone}"
        )
    if re.search(r"\bratio=['\"]?\{\}", template):
        raise OptionError("sweep: ratio= is the share that goes, and keep names the shares that stay: write ratio={gone}")
    texts = {v: template.replace("{}", f"{v:g}").replace("{gone}", f"{1 - v:g}") for v in values}
    return [Target(v, text, tuple(parse(text))) for v, text in texts.items()]


def shared_steps(targets: Sequence[Target]) -> int:
    """How many passes at the start are the same for all targets, and so need to run only once."""
    if len(targets) < 2:
        return 0
    count = 0
    for steps in zip(*(t.steps for t in targets), strict=True):
        if any(s != steps[0] for s in steps):
            break
        count += 1
    return count


def sweep(
    model: str | Path | onnx.ModelProto | Model,
    keep: Iterable[float],
    passes: str = PASSES["macs"],
    *,
    calibration: Any = None,
    evaluation: Any = None,
    metric: str = "top1",
    target: str = DEFAULT_TARGET,
    loss: float = LOSS,
    measure: bool = True,
    progress: Progress | None = None,
) -> Sweep:
    """Run one pipeline for several targets: quality, errors, size and latency of each against the original. The input stays.

    keep: the shares that stay. passes: the pipeline, with {} where the target goes ({gone}: one minus it). The other arguments are
    as for `optimize`; loss: how much quality may go, in the metric's unit, for the rule that names the smallest model within it.
    A target out of reach is reported as such, and the others go on. Raises GraphoptError; PassError where none is reached.
    """
    began = time.perf_counter()
    if loss < 0:
        raise OptionError(f"sweep: loss={loss:g} is how much quality may go: at least 0")
    targets = plan(keep, passes)
    settings = Settings(metric=metric, target=target, measure=measure)
    settings.progress = progress or settings.progress
    scene = _scene(copied(model), calibration, evaluation, settings, targets)
    made = [_point(scene, t, f"{t.keep:g} ({i} of {len(targets)})") for i, t in enumerate(targets, 1)]
    files = {m.row.keep: m.content for m in made if m.content is not None}
    if not files:
        raise PassError("sweep", f"no target is reached: {made[0].row.failed}")
    report = _report(scene, passes, [m.row for m in made])
    if measure:
        settings.progress("measure latency", 0, 0)
        _latencies(report, scene, made)
    report.knees = knees(report, loss)
    report.seconds = time.perf_counter() - began
    stem = scene.original.path.stem if scene.original.path else "model"
    return Sweep(report, files, stem)


@dataclass
class _Scene:
    """What all points share: the original and its answers, the model after the passes that come first, and analyses of it."""

    original: Model
    start: Figures
    settings: Settings
    calibration: Dataset | None
    evaluation: Dataset | None
    scored: np.ndarray | None
    truth: Answers | None
    stem: Model
    context: Context
    rows: PassRows
    shared: int
    shared_text: str
    warnings: list[str]


def _scene(original: Model, calibration: Any, evaluation: Any, settings: Settings, targets: Sequence[Target]) -> _Scene:
    data, labelled = dataset_of(calibration, original), dataset_of(evaluation, original)
    scored = score_original(original, labelled, settings)
    warnings: list[str] = []
    truth = None
    try:
        truth = answers(original, data, held=True) if data is not None else None
    except ModelError as reason:
        warnings.append(f"errors at the outputs were not measured: {reason}")
    stem = copied(original)
    context = Context(data, find_target(settings.target), settings.progress, settings.here)
    start = figures(stem, context)
    rows = PassRows(context, start)
    shared, steps = shared_steps(targets), targets[0].steps
    run(stem, steps[:shared], context, [rows], later=steps[shared:])
    text = to_text(steps[:shared])
    return _Scene(original, start, settings, data, labelled, scored, truth, stem, context, rows, shared, text, warnings)


@dataclass(frozen=True)
class _Made:
    """A row without latency, and the model's file; no file: out of reach."""

    row: PointRow
    content: bytes | None = None


def _point(scene: _Scene, target: Target, label: str) -> _Made:
    """Run what is not shared, and measure the result."""
    began = time.perf_counter()
    progress = scene.settings.progress
    progress(label, 0, 0)
    work, context = copied(scene.stem), scene.context.fork()
    context.progress = lambda what, done, total: progress(f"{label}: {what}", done, total)
    rows = PassRows(context, scene.rows.last, list(scene.rows.rows))
    try:
        run(work, target.steps[scene.shared :], context, [rows])
    except PassError as reason:
        return _Made(PointRow(keep=target.keep, recipe=target.recipe, failed=str(reason), seconds=time.perf_counter() - began))
    content = emit.serialized(work.proto())
    parameters, macs, _ = rows.last
    row = PointRow(
        keep=target.keep,
        recipe=target.recipe,
        sha256=hashlib.sha256(content).hexdigest(),
        nodes=len(work.nodes()),
        parameters=parameters,
        macs=macs,
        file_bytes=len(content),
        macs_ratio=macs / scene.start[1] if macs is not None and scene.start[1] else None,
        quality=_quality(scene, content),
        held_out_error=next((r.facts["error_after"] for r in reversed(rows.rows) if "error_after" in r.facts), None),
        error=_error(scene.truth, work),
        seconds=time.perf_counter() - began,
        passes=rows.rows,
    )
    return _Made(row, content)


def _quality(scene: _Scene, content: bytes) -> Any:
    if scene.evaluation is None or scene.scored is None:
        return None
    settings = scene.settings
    found = score(session(content, threads=0), scene.evaluation, settings.metric, progress=settings.progress)
    return quality_row(settings.metric, paired(scene.scored, found))


def _error(truth: Answers | None, work: Model) -> float | None:
    """At the outputs, against the original's; None where the two cannot be compared, as one has a Softmax and the other not."""
    if truth is None:
        return None
    mine = scores(work)
    if [s.logits for s in mine] != [s.logits for s in truth.scored]:
        return None
    return error(truth, outputs_of(work, replace(truth, scored=mine)))


def _report(scene: _Scene, template: str, points: list[PointRow]) -> SweepReport:
    original, data = scene.original, scene.calibration
    row = model_row(original, scene.start)
    quality = float(np.mean(scene.scored)) if scene.scored is not None else None
    size = row.file_bytes if row.file_bytes is not None else len(emit.serialized(original.proto()))
    return SweepReport(
        environment=environment(),
        source=str(original.path) if original.path else None,
        source_sha256=file_digest(original.path) if original.path else None,
        target=scene.settings.target,
        template=template,
        shared=scene.shared_text,
        calibration=f"{data.where}, sha256 {data.digest()}" if data is not None else None,
        metric=scene.settings.metric if quality is not None else None,
        seconds=0.0,
        original=row.model_copy(update={"quality": quality, "file_bytes": size}),
        points=points,
        warnings=list(dict.fromkeys([*original.notes, *scene.stem.notes, *scene.warnings])),
    )


def _latencies(report: SweepReport, scene: _Scene, made: Sequence[_Made]) -> None:
    """Time the original and all points in turn, round by round, in this process."""
    data = scene.evaluation or scene.calibration
    feed = check_feeds(scene.original, data, 1)[0]
    reached = [m for m in made if m.content is not None]
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(runnable(scene.original))
        try:
            timed = latency([first, *(m.content for m in reached if m.content)], feed, seconds=_SECONDS * (1 + len(reached)))
        except ModelError as reason:
            if data is not None:
                raise
            report.warnings.append(f"latency was not measured, for lack of real inputs (--calib): {reason}")
            return
    report.original = report.original.model_copy(update={"latency": latency_row(timed[0])})
    found = {m.row.keep: _timed(scene, m, t, feed) for m, t in zip(reached, timed[1:], strict=True)}
    report.points = [found.get(p.keep, p) for p in report.points]


def _timed(scene: _Scene, made: _Made, found: Latency, feed: Feed) -> PointRow:
    macs, ratio, said = made.row.macs_ratio, 1 / found.speedup, list[str]()
    if macs is not None and out_of_step(macs, ratio) and find_target(scene.settings.target).onnxruntime:
        work = from_proto(onnx.load_from_string(made.content or b""))
        said.append(explain(macs, ratio, scene.original, work, feed))
    return made.row.model_copy(update={"latency": latency_row(found), "latency_ratio": ratio, "warnings": said})
