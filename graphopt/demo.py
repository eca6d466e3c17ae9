"""The demo: a small network for handwritten digits, that ships with graphopt, pruned and quantised."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from graphopt.context import Progress
from graphopt.emit import write_text
from graphopt.errors import ModelError
from graphopt.report import ModelRow, Report

FILES = ("digits.onnx", "digits_calib.npz", "digits_eval.npz", "LICENSE-digits.txt")
PRUNE = "fold, prune-channels macs=0.5 scope=global criterion=activation, cleanup"
PAGE = "digits.int8.html"


@dataclass(frozen=True)
class Stage:
    """One model of the demo, measured beside the others; `report` tells how it was made (None for the baseline)."""

    name: str
    row: ModelRow
    speedup: float
    report: Report | None


def run_demo(folder: Path, *, overwrite: bool, progress: Progress) -> list[Stage]:
    """Write the shipped model and its data to `folder`, prune and quantise it there, and measure all three models in turns.

    A page of how the last one was made is written beside them (see `PAGE`).
    """
    from graphopt.api import Result, check_feeds, optimize
    from graphopt.html import rendered
    from graphopt.measure import peak_memory
    from graphopt.model import load

    source = _unpack(folder, overwrite)
    calibration, evaluation = folder / "digits_calib.npz", folder / "digits_eval.npz"

    def optimized(passes: str, name: str, *, measured: bool) -> Result:
        data: dict[str, Any] = {"calibration": calibration, "evaluation": evaluation}
        result = optimize(source, passes, **data, check=True, measure=measured, detail=measured, progress=progress)
        written = result.save(folder / f"{name}.onnx", overwrite=True)[0]
        found = {"path": str(written), "file_bytes": written.stat().st_size}
        result.report.after = result.report.after.model_copy(update=found)
        write_text(folder / f"{name}.json", result.report.model_dump_json(indent=2))
        return result

    pruned = optimized(PRUNE, "digits.pruned", measured=False).report
    final = optimized(f"{PRUNE}, quantize", "digits.int8", measured=True).report
    write_text(folder / PAGE, rendered(final, folder / PAGE))
    assert final.detail is not None
    between = final.detail.stages[-2]  # the pruned model, timed in turns with the two others
    peak = peak_memory(folder / "digits.pruned.onnx", check_feeds(load(source), None, 1)[0])
    row = pruned.after.model_copy(update={"latency": between.latency, "peak_memory_bytes": peak})
    return [
        Stage("baseline", final.before, 1.0, None),
        Stage("pruned", row, between.speedup or 1.0, pruned),
        Stage("pruned + INT8", final.after, final.speedup or 1.0, final),
    ]


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
