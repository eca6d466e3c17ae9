"""What a report shows beyond the figures of the whole: layer by layer, pass by pass. Measured only where a report is asked for."""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.audit_reasons import DQ, Q, is_op
from graphopt.compare import OutputDifference, differences, inner_differences, shared_tensors
from graphopt.edit import peek
from graphopt.errors import DataError, ModelError
from graphopt.external import LIMIT
from graphopt.lineage import Lineage
from graphopt.measure import Latency
from graphopt.model import Model
from graphopt.pipeline import Step, StepResult
from graphopt.report import Detail, LayerRow, RangeRow, Report, StageRow
from graphopt.runtime import run, runnable, session

if TYPE_CHECKING:
    from graphopt.api import Settings
    from graphopt.audit_report import AuditReport, NodeAudit
    from graphopt.data import Dataset

LARGE = 512 << 20  # bytes of weights over which copies of the model are not kept, and tensors inside not compared
ERROR_ROWS = 8  # on which errors of layers and stages are measured
_BUDGET = 64 << 20  # bytes of activations that are compared at a time
_UNKNOWN = 4 << 20  # what a tensor of unknown size is taken for
_SECONDS = 60.0  # in which comparing tensors inside must be done: what is left then is left out
_PROFILE_MS = 1500.0  # of profiled runs of each model
_FEWEST, _MOST = 4, 40  # such runs
_OWN_WEIGHTS: tuple[str, ...] = ("f2", "f4", "f8", "i1")  # dtypes of weights that a node reads itself
_BYTES: tuple[str, ...] = ("i1", "u1")  # and through DequantizeLinear
_MATRIX = 2  # axes of a constant from which it counts as weights


@dataclass
class Stage:
    """The model after the first `runs` runs of passes, as a file."""

    name: str
    runs: int
    path: Path
    exact: bool = False
    latency: Latency | None = None


@dataclass
class Recorder:
    """A hook that follows every node, and keeps the model after each pass that may change results, in a temporary folder.

    What exact passes do belongs to the stage before them.
    """

    lineage: Lineage = field(default_factory=Lineage)
    stages: list[Stage] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folded: set[int] = field(default_factory=set)  # runs of exact passes that changed nodes
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="graphopt-")))

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)

    def __call__(self, model: Model, step: Step, result: StepResult) -> None:
        self.lineage(model, step, result)
        edit = self.lineage.edits[-1] if self.lineage.edits else None
        if step.entry.exact and edit is not None and edit.run == self.lineage.runs - 1 and edit.changed:
            self.folded.add(edit.run)
        if not result.changes:
            return
        if model.weight_bytes() > LARGE:
            self.stages.clear()
            self.notes[:] = ["stages were not measured one by one: the model is too large to keep copies"]
            return
        if not self.stages or not step.entry.exact:
            name = "exact passes" if step.entry.exact else str(step)
            self.stages.append(Stage(name, 0, self.folder / f"{len(self.stages)}.onnx", step.entry.exact))
        stage = self.stages[-1]
        stage.runs = self.lineage.runs
        with runnable(model) as content:
            if isinstance(content, bytes):
                stage.path.write_bytes(content)

    def comparable(self, runs: int) -> bool:
        """Whether tensors mean what they meant after so many runs. An exact pass that changes nodes may fold layers into others, or
        move factors across them; what is not exact changes what tensors hold as little as it can."""
        return not any(run >= runs for run in self.folded)


def measure_detail(
    report: Report,
    recorder: Recorder,
    models: tuple[Model, Model],
    data: tuple[Dataset | None, Dataset | None],
    scored: np.ndarray | None,
    settings: Settings,
) -> Detail:
    """Measure what `report.detail` holds. `models`: the original and the result; `data`: evaluation and calibration rows.

    What cannot be measured is left out, with the reason in the notes.
    """
    from graphopt.api import check_feeds

    settings.progress("measure layers", 0, 0)
    evaluation, calibration = data
    notes = list(recorder.notes)
    feeds = check_feeds(models[0], evaluation or calibration, ERROR_ROWS)
    audited = _tried(notes, "layers were not timed", lambda: _profiled(report, models, feeds[0])) if settings.measure else None
    errors = _tried(notes, "errors of layers were not measured", lambda: _errors(models, recorder, feeds, notes)) or {}
    stages = _tried(
        notes, "stages were not measured", lambda: list(_stages(report, recorder, models, feeds, evaluation, scored, settings))
    )
    return Detail(
        layers=_layers(report, models, audited, errors),
        us=audited.us if audited else None,
        base_us=audited.base_us if audited else None,
        categories=audited.categories if audited else [],
        explanation=audited.explanation if audited else [],
        ranges=_ranges(report),
        nodes=recorder.lineage.rows(),
        edits=recorder.lineage.edits,
        stages=stages or [],
        notes=notes,
    )


def _ranges(report: Report) -> list[RangeRow]:
    """What quantize kept of calibration, taken out of its facts."""
    kept = [p.facts.pop("histograms", {}) for p in report.passes if p.name == "quantize"]
    return [RangeRow(tensor=name, **row) for found in kept for name, row in found.items()]


def _tried(notes: list[str], what: str, measure: Callable[[], Any]) -> Any:
    """The result; None where onnxruntime cannot do it, which is noted."""
    try:
        return measure()
    except (ModelError, DataError) as error:
        notes.append(f"{what}: {error}")
        return None


def _profiled(report: Report, models: tuple[Model, Model], feed: Mapping[str, np.ndarray]) -> AuditReport:
    """onnxruntime's profile of both models, one after the other in turns."""
    from graphopt.auditing import audit_pair

    if max(m.weight_bytes() for m in models) > LIMIT:
        raise ModelError("two models of this size do not fit side by side")
    slowest = max((r.latency.p50_ms for r in (report.before, report.after) if r.latency), default=_PROFILE_MS)
    runs = int(min(max(_PROFILE_MS / max(slowest, 1e-3), _FEWEST), _MOST))
    original, work = models
    with runnable(work) as mine, runnable(original) as base:
        return audit_pair((work, original), (mine, base), feed, runs=runs, speedup=report.speedup)


# ---- errors


def _relative(found: Sequence[OutputDifference]) -> float | None:
    """The largest error, root mean square over root mean square; None where shapes differ or values are not finite."""
    if not all(np.isfinite(d.max_error) and d.same_shape for d in found):
        return None
    return max((float(10 ** (-d.sqnr_db / 20)) for d in found), default=None)


Error = tuple[float, str | None]  # and the stage that the node was compared with; None: the original


def _errors(models: tuple[Model, Model], recorder: Recorder, feeds: Sequence[Any], notes: list[str]) -> dict[str, Error]:
    """By node of the result: against the original after the exact passes that come first, or where shapes differ the first stage
    that has the same.

    Tensors are compared a few at a time, so that memory stays bounded.
    """
    original, work = models
    if max(original.weight_bytes(), work.weight_bytes()) > LARGE:
        notes.append("errors of layers were not measured: the model is too large to be run with outputs inside")
        return {}
    b, owners = work.proto(), _owners(work)
    errors: dict[str, Error] = {}
    deadline = time.perf_counter() + _SECONDS
    earlier = recorder.stages[:-1]
    bases: list[tuple[str | None, int, Callable[[], onnx.ModelProto]]] = [
        (None if s.exact else s.name, s.runs, partial(onnx.load, s.path)) for s in earlier
    ]
    if not earlier or not earlier[0].exact:
        bases.insert(0, (None, 0, original.proto))
    usable = [(name, base) for name, runs, base in bases if recorder.comparable(runs)]
    if not usable:
        notes.append("errors of layers were not measured: exact passes folded layers into each other; outputs were compared")
    for name, base in usable:
        a = base()
        wanted = [t for t in shared_tensors(a, b) if t in owners and owners[t] not in errors]
        for chunk in _chunks(work, wanted):
            if time.perf_counter() > deadline:
                notes.append(f"errors of some layers were not measured: all of them would take more than {_SECONDS:.0f} seconds")
                return errors
            for row in inner_differences(a, b, chunk, feeds):
                error = _relative([row])
                if error is not None:
                    errors.setdefault(owners[row.name], (error, name))
    return errors


def _owners(model: Model) -> dict[str, str]:
    """The node that computes each tensor; behind QuantizeLinear and DequantizeLinear, that before them. Weights have none."""
    found = {}
    for node in model.graph.nodes:
        for tensor in node.outputs:
            writer = node
            while (is_op(writer, Q) or is_op(writer, DQ)) and len(writer.inputs[0].inputs) == 1:
                writer = writer.inputs[0].inputs[0]
            if not is_op(writer, Q) and not is_op(writer, DQ):
                found[tensor.name] = str(writer.name)
    return found


def _chunks(model: Model, names: Sequence[str]) -> Iterator[list[str]]:
    from graphopt.shapes import shapes

    known = shapes(model)
    chunk: list[str] = []
    held = 0
    for name in names:
        shape = known.shape(name)
        size = _UNKNOWN if shape is None else 4 * int(np.prod([d if isinstance(d, int) else 1 for d in shape], dtype=np.int64))
        if chunk and held + size > _BUDGET:
            yield chunk
            chunk, held = [], 0
        chunk.append(name)
        held += size
    if chunk:
        yield chunk


# ---- stages


def _stages(
    report: Report,
    recorder: Recorder,
    models: tuple[Model, Model],
    feeds: Sequence[Any],
    evaluation: Dataset | None,
    scored: np.ndarray | None,
    settings: Settings,
) -> Iterator[StageRow]:
    """Each stage against the original: quality where there are labelled rows, errors at the outputs, size, time."""
    from graphopt.evaluate import paired, score
    from graphopt.gains import latency_row, quality_row

    if not recorder.stages:
        return
    names = [t.name for t in models[0].graph.outputs]
    with runnable(models[0]) as content:
        first = session(content, threads=0)
        truth = [run(first, feed, names) for feed in feeds]
    for number, stage in enumerate(recorder.stages):
        settings.progress("measure stages", number, len(recorder.stages))
        runner = session(stage.path, threads=0)
        quality = report.quality if number == len(recorder.stages) - 1 else None
        if quality is None and evaluation is not None and scored is not None:
            quality = quality_row(settings.metric, paired(scored, score(runner, evaluation, settings.metric)))
        apart = differences(names, zip(truth, (run(runner, feed, names) for feed in feeds), strict=True))
        figures = report.passes[stage.runs - 1]
        yield StageRow(
            name=stage.name,
            runs=stage.runs,
            nodes=figures.nodes,
            parameters=figures.parameters,
            macs=figures.macs,
            file_bytes=stage.path.stat().st_size,
            latency=latency_row(stage.latency) if stage.latency else None,
            speedup=stage.latency.speedup if stage.latency else None,
            quality=quality,
            error=_relative(apart),
        )


# ---- layers


def _layers(
    report: Report, models: tuple[Model, Model], audited: AuditReport | None, errors: Mapping[str, Error]
) -> list[LayerRow]:
    """Nodes of the result's main graph in order, those left out that only convert or that nothing is known of."""
    original, work = models
    profiled = {n.name: n for n in audited.nodes} if audited else {}
    before = {str(n.name): n for n in original.graph.nodes}
    sparse = {row["layer"]: 1 - row["density"] for p in report.passes if p.name == "sparsify" for row in p.facts.get("layers", ())}
    rows = []
    for node in work.graph.nodes:
        if is_op(node, Q) or is_op(node, DQ) or node.op == "Constant":
            continue
        name = str(node.name)
        count, zeros = _weights(node)
        was = _weights(before[name])[1] if name in before else None
        row = _layer(name, str(node.op), profiled.get(name), errors.get(name))
        row = row.model_copy(update={"weights": count, "zeros": sparse.get(name) if zeros is None else zeros, "base_zeros": was})
        if row.us or row.base_us or row.error is not None or row.zeros is not None:
            rows.append(row)
    return rows


def _layer(name: str, op: str, found: NodeAudit | None, error: Error | None) -> LayerRow:
    return LayerRow(
        name=name,
        op=op,
        kernel=found.kernel if found else None,
        dtype=found.dtype if found else "",
        int8=found.int8 if found else False,
        reason=found.reason if found else None,
        us=found.us if found else None,
        base_us=found.base_us if found else None,
        macs=found.macs if found else None,
        error=error[0] if error else None,
        error_from=error[1] if error else None,
        weights=None,
        zeros=None,
        base_zeros=None,
    )


def _weights(node: gs.Node) -> tuple[int | None, float | None]:
    """(elements, share of zeros) of the constants of two axes or more that it reads, through DequantizeLinear too."""
    count = zeros = 0
    for tensor in node.inputs:
        source, zero, kinds = tensor, None, _OWN_WEIGHTS
        if len(tensor.inputs) == 1 and is_op(tensor.inputs[0], DQ):
            source, zero, kinds = tensor.inputs[0].inputs[0], [*tensor.inputs[0].inputs, None, None][2], _BYTES
        if not isinstance(source, gs.Constant) or len(source.shape) < _MATRIX or np.dtype(source.dtype).str[1:] not in kinds:
            continue
        point = np.unique(peek(zero)) if isinstance(zero, gs.Constant) else np.zeros(1)
        if point.size == 1:  # else a zero is another number in each channel
            count, zeros = count + int(np.prod(source.shape)), zeros + int(np.count_nonzero(peek(source) == point[0]))
    return (count, zeros / count) if count else (None, None)
