"""The demo: a small network for handwritten digits, that ships with graphopt, pruned and quantised."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from graphopt.context import Progress
from graphopt.emit import write_text
from graphopt.errors import ModelError
from graphopt.report import LatencyRow, ModelRow, Report

FILES = ("digits.onnx", "digits_calib.npz", "digits_eval.npz", "LICENSE-digits.txt")
PRUNE = "fold, prune-channels macs=0.5 scope=global criterion=activation, cleanup"
SECONDS = 4.0  # spent timing the three models


@dataclass(frozen=True)
class Stage:
    """One model of the demo, measured beside the others; `report` tells how it was made (None for the baseline)."""

    name: str
    row: ModelRow
    speedup: float
    report: Report | None


def run_demo(folder: Path, *, overwrite: bool, progress: Progress) -> list[Stage]:
    """Write the shipped model and its data to `folder`, prune and quantise it there, and measure all three models."""
    from graphopt.api import Result, optimize
    from graphopt.measure import latency, peak_memory
    from graphopt.model import load

    source = _unpack(folder, overwrite)
    calibration, evaluation = folder / "digits_calib.npz", folder / "digits_eval.npz"

    def optimized(passes: str, name: str) -> Result:
        result = optimize(source, passes, calibration=calibration, evaluation=evaluation, check=True, progress=progress)
        result.save(folder / f"{name}.onnx", overwrite=True)
        write_text(folder / f"{name}.json", result.report.model_dump_json(indent=2))
        return result

    results = {"pruned": optimized(PRUNE, "digits.pruned"), "pruned + INT8": optimized(f"{PRUNE}, quantize", "digits.int8")}
    paths = [source, folder / "digits.pruned.onnx", folder / "digits.int8.onnx"]
    from graphopt.api import check_feeds

    feed = check_feeds(load(source), None, 1)[0]
    progress("measure latency and memory", 0, 0)
    timed = latency(paths, feed, seconds=SECONDS)
    reports = [r.report for r in results.values()]
    rows = [reports[0].before, *(r.after for r in reports)]
    stages = []
    for name, report, row, path, time in zip(["baseline", *results], [None, *reports], rows, paths, timed, strict=True):
        measured = LatencyRow(p50_ms=time.p50_ms, p95_ms=time.p95_ms, runs=time.runs, batch=time.batch, threads=time.threads)
        peak = peak_memory(path, feed)
        update = {"path": str(path), "file_bytes": path.stat().st_size, "latency": measured, "peak_memory_bytes": peak}
        stages.append(Stage(name, row.model_copy(update=update), time.speedup, report))
    return stages


def _unpack(folder: Path, overwrite: bool) -> Path:
    """The shipped files in `folder`; returns the model's path."""
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{folder} is a file; name a folder with -o")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ModelError(f"the folder {folder} is not empty; give --overwrite or another folder with -o")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            with resources.as_file(resources.files("graphopt") / "assets" / name) as shipped:
                shutil.copyfile(shipped, folder / name)
    except OSError as error:
        raise ModelError(f"cannot write the demo to {folder}: {error.strerror}") from error
    return folder / FILES[0]
