"""Calibration, quantisation and all of `optimize` beside onnxruntime.quantization.

On the shipped model; on another one where GRAPHOPT_BENCH_MODEL and GRAPHOPT_BENCH_CALIB name a float model and its rows.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jobs
import pytest

pytestmark = pytest.mark.timeout(1800)
NAMED = (os.environ.get("GRAPHOPT_BENCH_MODEL"), os.environ.get("GRAPHOPT_BENCH_CALIB"))
MODELS = {"digits": (jobs.workload("digits", Path()), jobs.digits_data())}
if NAMED[0] and NAMED[1]:
    MODELS[Path(NAMED[0]).stem] = (Path(NAMED[0]), Path(NAMED[1]))
FACTORIES = {"calibrate": jobs.calibration, "quantize": jobs.quantize, "end to end": jobs.end_to_end}


@pytest.mark.parametrize("tool", ["graphopt", "onnxruntime.quantization"])
@pytest.mark.parametrize("method", jobs.METHODS)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("job", FACTORIES)
def test_quantization(benchmark: Any, job: str, model: str, method: str, tool: str, tmp_path: Path) -> None:
    benchmark.group = f"{job} {method} {model}"
    path, data = MODELS[model]
    jobs.timed(benchmark, FACTORIES[job](path, data, tmp_path, method), tool, rounds=3)
