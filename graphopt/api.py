"""`graphopt.optimize`: load, run the passes, check, measure, report. The command line is a thin shell around it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

from graphopt import emit
from graphopt.context import Context, Progress
from graphopt.errors import CheckError, ModelError, OptionError
from graphopt.model import OWN, Model, from_proto, load
from graphopt.pipeline import Hook, Step, StepResult, from_toml, parse, run, to_text

if TYPE_CHECKING:
    import numpy as np

    from graphopt.data import Dataset
    from graphopt.detail import Recorder
    from graphopt.hooks import NumericCheck
    from graphopt.report import PassRow, Report

DEFAULT_PASSES = "fold"
DEFAULT_TARGET = "ort-cpu"
Figures = tuple[int, int | None, int]  # parameters, MACs, bytes of weights
CHECK_ROWS = 4  # rows of data, or generated ones, on which passes are checked


def _silent(what: str, done: int, total: int) -> None:
    """No progress shown."""


@dataclass
class Settings:
    """All that `optimize` may be told, beside the model; see its docstring. `here`: the result is to run on this machine."""

    passes: str | Iterable[str | tuple[str, Mapping[str, Any]]] | None = None
    pipeline: str | Path | None = None
    calibration: Any = None
    evaluation: Any = None
    metric: str = "top1"
    target: str = DEFAULT_TARGET
    check: bool = False
    measure: bool = False
    hooks: Sequence[Hook] = ()
    progress: Progress = _silent
    here: bool = True
    detail: bool = False

    def steps(self) -> list[Step]:
        """The pipeline, parsed and checked."""
        if self.pipeline is not None and self.passes is not None:
            raise OptionError("give passes or a pipeline file, not both")
        if self.pipeline is not None:
            return from_toml(self.pipeline)
        return parse(DEFAULT_PASSES if self.passes is None else self.passes)


@dataclass
class Result:
    """The optimised model and the report. `failure` is set where a check failed: the model is then not to be trusted."""

    model: Model
    report: Report
    failure: CheckError | None = None

    def save(self, path: str | Path, *, overwrite: bool = False) -> list[Path]:
        """Write the model, atomically; returns the files written. Raises `failure` if there is one, and ModelError."""
        if self.failure is not None:
            raise self.failure
        return emit.save(self.model, path, overwrite=overwrite)

    def save_library(
        self, folder: str | Path, *, target: str | None = None, overwrite: bool = False, progress: Progress = _silent
    ) -> Path:
        """Write graphopt's operators as a library beside the model, for "x86-64" or "aarch64" (default: this machine's).

        Takes up to a minute the first time on a machine. The identical file is left as it is. Raises GraphoptError.
        """
        from graphopt.library import build, check_library, library_target, write_library

        chosen = library_target(target)
        content = build(chosen, progress)
        path = check_library(Path(folder), chosen, content, overwrite=overwrite)
        write_library(path, content)
        return path

    def __repr__(self) -> str:
        failed = f", failed: {self.failure}" if self.failure is not None else ""
        return f"Result({len(self.model.nodes())} nodes, pipeline {self.report.pipeline!r}{failed})"

    def proto(self) -> onnx.ModelProto:
        """The optimised model as protobuf."""
        return self.model.proto()


@dataclass
class PassRows:
    """A hook that makes the report's rows, with parameters, MACs and bytes after every change."""

    context: Context
    last: Figures
    rows: list[PassRow] = field(default_factory=list)

    def __call__(self, model: Model, step: Step, result: StepResult) -> None:
        from graphopt.report import PassRow, RejectionRow

        if result.changes:
            found = figures(model, self.context)
            compiled = found[1] is None and any(n.domain == OWN for n in model.nodes())
            self.last = (found[0], self.last[1], found[2]) if compiled else found  # a region multiplies what its nodes did
        self.rows.append(
            PassRow(
                name=result.name,
                options=dict(result.options),
                changes=result.changes,
                seconds=result.seconds,
                nodes=result.nodes,
                parameters=self.last[0],
                macs=self.last[1],
                weight_bytes=self.last[2],
                rejected=[RejectionRow(reason=r.reason, op=r.op, count=r.count, example=r.example) for r in result.rejected],
                facts=dict(result.facts),
            )
        )


def figures(model: Model, context: Context) -> Figures:
    """(parameters, MACs of one row or None where no shape is known, bytes of weights)."""
    from graphopt.cost import costs
    from graphopt.shapes import shapes

    found = costs(model, context.get(shapes, model))
    unknown = found.uncounted and not found.macs
    return found.parameters, None if unknown else found.macs, found.weight_bytes


def optimize(
    model: str | Path | onnx.ModelProto | Model,
    passes: str | Iterable[str | tuple[str, Mapping[str, Any]]] | None = None,
    *,
    pipeline: str | Path | None = None,
    calibration: Any = None,
    evaluation: Any = None,
    metric: str = "top1",
    target: str = DEFAULT_TARGET,
    check: bool = False,
    measure: bool = False,
    detail: bool = False,
    hooks: Sequence[Hook] = (),
    progress: Progress = _silent,
) -> Result:
    """Optimise a model and report what was gained and lost. The input is never changed.

    model: path, ModelProto, or a Model (which is copied).
    passes: as on the command line, `"cleanup, prune-channels ratio=0.3"`, or names and (name, options) pairs; default `fold`.
    calibration, evaluation: a path (.npz, folder, `module:function`), a dict of arrays, or an iterable of feeds; evaluation
    rows need `labels`. check: compare outputs before and after every exact pass. measure: latency and peak memory too.
    detail: `Result.report.detail` too, layer by layer and pass by pass.
    Raises GraphoptError; a failed check is returned in `Result.failure` with the model, so that it can be looked at.
    """
    settings = Settings(passes, pipeline, calibration, evaluation, metric, target, check, measure, hooks, progress, detail=detail)
    return optimize_with(model, settings)


def optimize_with(source: str | Path | onnx.ModelProto | Model, settings: Settings) -> Result:
    """`optimize` with its arguments as one object."""
    from graphopt.targets import find_target

    began = time.perf_counter()
    steps = settings.steps()  # every name and option is checked before any work
    target = find_target(settings.target)
    original = copied(source)
    work = copied(source)
    calibration = dataset_of(settings.calibration, original)
    evaluation = dataset_of(settings.evaluation, original)
    scored = score_original(original, evaluation, settings)
    context = Context(calibration, target, settings.progress, settings.here, settings.detail)
    start = figures(work, context)
    counter, failure, checked = PassRows(context, start), None, 0
    recorder = _recorder(settings, work)
    hooks: list[Hook] = [counter, *([recorder] if recorder else []), *settings.hooks]
    if settings.check:
        from graphopt.hooks import NumericCheck

        numeric = NumericCheck(check_feeds(original, calibration or evaluation, CHECK_ROWS))
        _start(numeric, work, calibration or evaluation)
        hooks.append(numeric)
    try:
        run(work, steps, context, hooks)
    except CheckError as error:
        failure = error
    if settings.check:
        checked = numeric.checked
    report = _report(settings, steps, (original, work), (start, counter.last), counter.rows, calibration)
    report.checked_passes = checked
    failure = failure or _runs(original, work, calibration or evaluation)
    if failure is None:
        from graphopt.gains import measure_gains

        measure_gains(report, original, work, calibration, evaluation, scored, settings, recorder.stages if recorder else ())
        if recorder is not None:
            from graphopt.detail import measure_detail

            report.detail = measure_detail(report, recorder, (original, work), (evaluation, calibration), scored, settings)
    report.seconds = time.perf_counter() - began
    return Result(work, report, failure)


def _recorder(settings: Settings, model: Model) -> Recorder | None:
    """What follows the passes for the report, where one is asked for."""
    if not settings.detail:
        return None
    from graphopt.detail import Recorder

    recorder = Recorder()
    recorder.lineage.start(model)
    return recorder


def copied(source: str | Path | onnx.ModelProto | Model) -> Model:
    """A model of its own: loaded, or a copy of the one given."""
    if not isinstance(source, Model):
        return load(source)
    copy = from_proto(source.proto())
    copy.path = source.path
    return copy


def dataset_of(source: Any, model: Model) -> Dataset | None:
    """Rows for the model's inputs, from whatever the user named; None for None."""
    if source is None:
        return None
    from graphopt.data import open_dataset
    from graphopt.feeds import input_specs

    return open_dataset(source, input_specs(model.interface()))


def score_original(original: Model, evaluation: Dataset | None, settings: Settings) -> np.ndarray | None:
    """The original's score of every row, taken first: rows, labels and metrics that do not fit are found before any work."""
    from graphopt.evaluate import metric, score
    from graphopt.runtime import runnable, session

    metric(settings.metric)
    if evaluation is None:
        return None
    with runnable(original) as content:
        try:
            runner = session(content, threads=0)
        except ModelError:  # its operators may live elsewhere; the report will say so
            return None
        return score(runner, evaluation, settings.metric, progress=settings.progress)


def check_feeds(model: Model, dataset: Dataset | None, rows: int) -> list[dict[str, np.ndarray]]:
    """A few feeds of one row each: the first of the dataset, or generated from the input types."""
    from graphopt.data import generated
    from graphopt.feeds import input_specs

    source = dataset or generated(input_specs(model.interface()), rows)
    return [feed for feed, _ in zip(source.batches(1), range(rows), strict=False)]


def _start(check: NumericCheck, model: Model, data: Dataset | None) -> None:
    """Run the original first; random inputs need not be ones it can take."""
    try:
        check.start(model)
    except ModelError as error:
        if data is not None:
            raise
        message = (
            f"the model does not run on random inputs, so nothing can be checked; give rows of real ones (--calib, --data): {error}"
        )
        raise ModelError(message) from error


def _runs(original: Model, work: Model, data: Dataset | None) -> CheckError | None:
    """A CheckError where onnxruntime loads the original, and runs it on a row of the data if there is any, and not the result."""
    try:
        _try(work, data)
    except ModelError as error:
        try:
            _try(original, data)
        except ModelError:  # its operators may live elsewhere; the report says that outputs were not compared, and why
            return None
        return CheckError(f"the result does not run although the original does: {error}")
    return None


def _try(model: Model, data: Dataset | None) -> None:
    """Load the model in onnxruntime, and run one row where there is data. ModelError where it cannot."""
    from graphopt.runtime import run as run_once
    from graphopt.runtime import runnable, session

    with runnable(model) as content:
        runner = session(content)
        if data is not None:
            run_once(runner, next(iter(data.batches(1))))


def _report(
    settings: Settings,
    steps: Sequence[Step],
    models: tuple[Model, Model],
    costs: tuple[Figures, Figures],
    passes: list[PassRow],
    calibration: Dataset | None,
) -> Report:
    from graphopt.gains import environment, model_row
    from graphopt.report import Report

    original, work = models
    return Report(
        environment=environment(),
        source=str(original.path) if original.path else None,
        source_sha256=file_digest(original.path) if original.path else None,
        target=settings.target,
        pipeline=_pipeline_text(settings, steps),
        calibration=f"{calibration.where}, sha256 {calibration.digest()}" if calibration is not None else None,
        seconds=0.0,
        passes=passes,
        before=model_row(original, costs[0]),
        after=model_row(work, costs[1]),
        warnings=list(dict.fromkeys([*original.notes, *work.notes, *_unused(calibration)])),
    )


def _pipeline_text(settings: Settings, steps: Sequence[Step]) -> str:
    """As it was written, presets by name, where it was written as text."""
    if settings.pipeline is None and settings.passes is None:
        return DEFAULT_PASSES
    return settings.passes if isinstance(settings.passes, str) else to_text(steps)


def _unused(data: Dataset | None) -> list[str]:
    names = ", ".join(f"'{name}'" for name in data.unused) if data is not None else ""
    return [f"calibration data: {names} are no inputs of the model and were not read"] if names else []


def file_digest(path: Path) -> str:
    """SHA-256 of the file, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bisect(
    model: str | Path | onnx.ModelProto | Model,
    passes: str | Iterable[str | tuple[str, Mapping[str, Any]]],
    *,
    calibration: Any = None,
    tolerance: float = 1e-4,
    target: str = DEFAULT_TARGET,
    progress: Progress = _silent,
) -> int:
    """Find the pass and node that move an output by more than `tolerance` of its scale, against the original model.

    Runs the pipeline and checks after every change, exact pass or not. Raises CheckError naming pass, output and node;
    returns the number of changes checked where nothing moves that far.
    """
    from graphopt.hooks import NumericCheck
    from graphopt.targets import find_target

    steps = parse(passes)
    work = copied(model)
    dataset = dataset_of(calibration, work)
    check = NumericCheck(check_feeds(work, dataset, CHECK_ROWS), tolerance, every=True)
    _start(check, work, dataset)
    run(work, steps, Context(dataset, find_target(target), progress), [check])
    return check.checked
