"""What an optimisation gained and lost: figures of both models, measured side by side, and plain warnings about the losses."""

from __future__ import annotations

import contextlib
import math
import platform
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from graphopt.compare import OutputDifference, differences
from graphopt.emit import sources
from graphopt.errors import DataError, ModelError
from graphopt.feeds import row_count
from graphopt.measure import Latency, cpu_features, latency, peak_memory
from graphopt.model import Model
from graphopt.operators import DOMAIN, choose, regions
from graphopt.proportion import SLOWER, explain, out_of_step
from graphopt.registry import find
from graphopt.report import Environment, LatencyRow, ModelRow, OperatorsRow, OutputRow, QualityRow, Report
from graphopt.runtime import Feed, run, runnable, session
from graphopt.targets import find_target

if TYPE_CHECKING:
    from graphopt.api import Figures, Settings
    from graphopt.data import Dataset
    from graphopt.detail import Stage
    from graphopt.evaluate import Paired

COMPARE_ROWS = 64  # rows on which outputs are compared
GENERATED_ROWS = 2  # the same where no data was given
_SECONDS = 1.0  # of timing, for each model
DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp"})
_FLOAT_COMPUTE = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")


def environment() -> Environment:
    """Versions and CPU of this machine."""
    cpu = cpu_features()
    packages = {name: version(name) for name in ("graphopt", "onnx", "onnxruntime")}
    features = cpu["features"]
    names = [str(f) for f in features] if isinstance(features, list) else []
    return Environment(**packages, python=platform.python_version(), cpu=str(cpu["name"]), cpu_features=names)


def model_row(model: Model, costs: Figures) -> ModelRow:
    """The figures that need no run."""
    size = model.path.stat().st_size if model.path and model.path.is_file() else None
    if size is not None:
        size += sum(f.stat().st_size for f in sources(model))
    return ModelRow(
        path=str(model.path) if model.path else None,
        nodes=len(model.nodes()),
        parameters=costs[0],
        macs=costs[1],
        weight_bytes=costs[2],
        file_bytes=size,
        quality=None,
        latency=None,
        peak_memory_bytes=None,
    )


def measure_gains(
    report: Report,
    original: Model,
    work: Model,
    calibration: Dataset | None,
    evaluation: Dataset | None,
    scored: np.ndarray | None,
    settings: Settings,
    stages: Sequence[Stage] = (),
) -> None:
    """Fill the report's figures: outputs, quality where the original was `scored`, latency and memory where asked for.

    `stages`, the last of which is the result, are timed in turns with both models.
    """
    with contextlib.ExitStack() as stack:
        try:
            contents = [stack.enter_context(runnable(m)) for m in (original, work)]
            _outputs(report, contents, original, evaluation or calibration)
        except (ModelError, DataError) as error:
            if isinstance(error, DataError) and (evaluation or calibration):  # given rows must fit, generated ones may not
                raise
            report.warnings.append(f"outputs were not compared: {error}")
            return
        report.before = report.before.model_copy(update={"file_bytes": report.before.file_bytes or _size(contents[0])})
        report.after = report.after.model_copy(update={"path": None, "file_bytes": _size(contents[1])})
        if evaluation is not None and scored is not None:
            _quality(report, session(contents[1], threads=0), evaluation, scored, settings)
        if settings.measure:
            settings.progress("measure latency and memory", 0, 0)
            _speed(report, contents, (original, work), evaluation or calibration, stages)
    report.warnings += _unmeasured(report)
    _operators(report, work)
    if find_target(settings.target).onnxruntime:
        report.warnings += _kernels_that_ran(work)


def _unmeasured(report: Report) -> list[str]:
    """What the figures do not say and the user must know."""
    inexact = [p.name for p in report.passes if p.changes and not find(p.name).exact]
    said = []
    if inexact and report.quality is None:
        said.append(
            f"quality was not measured, and {' and '.join(dict.fromkeys(inexact))} can lower it: give labelled rows (--eval)"
        )
    target = find_target(report.target)
    quantized = "quantize" in inexact
    features = report.environment.cpu_features
    if quantized and not target.onnxruntime and report.after.latency is not None:
        said.append(
            f"latency and memory are onnxruntime's on this CPU; they say nothing about {target.name}, where the model is to run"
        )
    if quantized and target.dot_products and features and not DOT_PRODUCTS & set(features):
        said.append(f"this CPU has no INT8 dot products, which {target.name} relies on: here, give --target ort-cpu-no-vnni")
    return said


def _size(content: bytes | Path) -> int:
    if isinstance(content, bytes):
        return len(content)
    return sum(p.stat().st_size for p in content.parent.iterdir())


def _large(contents: Sequence[bytes | Path]) -> bool:
    """Over 2 GB: two sessions side by side could take more memory than there is, so only one is held at a time."""
    return any(isinstance(c, Path) for c in contents)


def _outputs(report: Report, contents: Sequence[bytes | Path], model: Model, data: Dataset | None) -> None:
    from graphopt.api import check_feeds

    names = [t.name for t in model.graph.outputs]
    feeds = check_feeds(model, data, COMPARE_ROWS if data else GENERATED_ROWS)
    first, second = (_answers(c, feeds, names) for c in contents)
    pairs = zip(list(first), second, strict=True) if _large(contents) else zip(first, second, strict=True)
    report.outputs = [_output_row(d) for d in differences(names, pairs)]
    report.compared_on = (
        f"the first {sum(row_count(f) or 1 for f in feeds)} rows of {data.where}"
        if data
        else f"{len(feeds)} random inputs (no data was given)"
    )


def _answers(content: bytes | Path, feeds: Sequence[Feed], names: Sequence[str]) -> Iterator[list[Any]]:
    runner = session(content, threads=0)
    for feed in feeds:
        yield run(runner, feed, names)


def _output_row(d: OutputDifference) -> OutputRow:
    finite = d.sqnr_db if math.isfinite(d.sqnr_db) else None
    return OutputRow(
        name=d.name,
        max_error=d.max_error,
        mean_error=d.mean_error,
        scale=d.scale,
        sqnr_db=finite,
        cosine=d.cosine,
        argmax_agreement=d.argmax_agreement,
    )


def quality_row(metric: str, both: Paired) -> QualityRow:
    """As the report has it."""
    return QualityRow(
        metric=metric,
        rows=both.rows,
        original=both.original,
        optimized=both.optimized,
        lost=both.lost,
        won=both.won,
        p_value=both.p_value,
    )


def _quality(report: Report, runner: object, evaluation: Dataset, scored: np.ndarray, settings: Settings) -> None:
    from graphopt.evaluate import paired, score

    both = paired(scored, score(runner, evaluation, settings.metric, progress=settings.progress))
    report.quality = quality_row(settings.metric, both)
    report.before = report.before.model_copy(update={"quality": both.original})
    report.after = report.after.model_copy(update={"quality": both.optimized})
    drop = both.original - both.optimized
    if drop > 0.01:
        chance = "significant" if both.p_value < 0.05 else "within chance"
        report.warnings.append(f"quality fell by {100 * drop:.1f} points ({chance}: p = {both.p_value:.2g})")


def _speed(
    report: Report, contents: Sequence[bytes | Path], models: tuple[Model, Model], data: Dataset | None, stages: Sequence[Stage]
) -> None:
    from graphopt.api import check_feeds

    feed = check_feeds(models[0], data, 1)[0]
    paired = not _large(contents)
    between = [s.path for s in stages[:-1]]
    seconds = _SECONDS * (2 + len(between))
    rows = latency([*contents, *between], feed, seconds=seconds) if paired else [latency([c], feed)[0] for c in contents]
    for stage, row in zip(stages, [*rows[2:], rows[1]], strict=False):
        stage.latency = row
    if paired:
        report.speedup = rows[1].speedup
    else:
        report.warnings.append("models over 2 GB are timed one after the other: what the machine did meanwhile is in the latencies")
    peaks: list[int | None] = [None, None]
    try:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            peaks = [peak_memory(_as_file(c, Path(folder) / f"{i}.onnx"), feed) for i, c in enumerate(contents)]
    except (ModelError, OSError, subprocess.SubprocessError) as error:  # no room for a copy, no second process: no reason to fail
        report.warnings.append(f"peak memory was not measured: {error}")
    report.before = report.before.model_copy(update={"latency": latency_row(rows[0]), "peak_memory_bytes": peaks[0]})
    report.after = report.after.model_copy(update={"latency": latency_row(rows[1]), "peak_memory_bytes": peaks[1]})
    if paired and rows[1].speedup < SLOWER and find_target(report.target).onnxruntime:
        quantized = any(p.name == "quantize" and p.changes for p in report.passes)
        what = "the INT8 model" if quantized else "the result"
        report.warnings.append(
            f"{what} is SLOWER than the original here: {rows[1].speedup:.2f}x its speed "
            f"({rows[0].p50_ms:.3f} -> {rows[1].p50_ms:.3f} ms, batch {rows[0].batch}, {rows[0].threads} thread)"
        )
    if paired and find_target(report.target).onnxruntime and any(p.facts.get("removed") for p in report.passes if p.changes):
        _proportion(report, models, feed, 1 / rows[1].speedup)


def _proportion(report: Report, models: tuple[Model, Model], feed: Feed, time: float) -> None:
    """A warning where units were removed and the time did not fall with the MACs."""
    before, after = report.before.macs, report.after.macs
    share = after / before if before and after is not None else None
    if share is not None and out_of_step(share, time):
        report.warnings.append(explain(share, time, *models, feed))


def _as_file(content: bytes | Path, path: Path) -> Path:
    if isinstance(content, Path):
        return content
    path.write_bytes(content)
    return path


def latency_row(row: Latency) -> LatencyRow:
    """As the report has it."""
    return LatencyRow(p50_ms=row.p50_ms, p95_ms=row.p95_ms, runs=row.runs, batch=row.batch, threads=row.threads)


def _operators(report: Report, model: Model) -> None:
    """What runs the regions of the result here."""
    import onnxruntime as ort

    if not any(n.domain == DOMAIN for n in model.nodes()):
        return
    proto = model.proto()
    found = regions(proto)
    how = choose(ort.SessionOptions(), proto, None, fallback=True)
    nodes = sum(r.nodes for r in found)
    report.operators = OperatorsRow(regions=len(found), nodes=nodes, ran=str(how), rung=how.rung)
    if how.kind == "functions":
        report.warnings.append(f"the regions were measured as onnxruntime's own INT8, not with graphopt's operators: {how.reason}")


def _kernels_that_ran(model: Model) -> list[str]:
    """Warnings about nodes that were quantised and that onnxruntime nevertheless runs in float; regions run in INT8."""
    if not any(n.op == "DequantizeLinear" for n in model.nodes()):
        return []
    import onnxruntime as ort

    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder, runnable(model) as content:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        # the layout transformation of the highest level hides what ran; INT8 fusion happens before it
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        choose(options, content, None, fallback=True)
        try:
            ort.InferenceSession(content if isinstance(content, bytes) else str(content), options, ["CPUExecutionProvider"])
            graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        except Exception as error:  # onnxruntime cannot save every model (compiled nodes, external data)
            return [f"which kernels ran is not known: {' '.join(str(error).split())[:200]}"]
    dequantized = {o for n in graph.node if n.op_type == "DequantizeLinear" for o in n.output}
    left = [n for n in graph.node if n.op_type in _FLOAT_COMPUTE and n.input[0] in dequantized]
    if not left:
        return []
    names = ", ".join(f"{n.name} ({n.op_type})" for n in left[:3])
    return [f"{len(left)} quantised nodes still run in float in onnxruntime: {names}{' ...' if len(left) > 3 else ''}"]
