"""Load and save, and cleanup, beside the tools that do the same; `pytest bench --benchmark-only`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest
from zoo import Unavailable

pytestmark = pytest.mark.timeout(1800)


def file(name: str, folder: Path) -> Path:
    try:
        return jobs.workload(name, folder)
    except Unavailable as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("tool", ["graphopt", "onnx", "onnx-graphsurgeon"])
@pytest.mark.parametrize("model", [*jobs.CLEANUP_MODELS, "generated_20000"])
def test_load_and_save(benchmark: Any, model: str, tool: str, tmp_path: Path) -> None:
    benchmark.group = f"load and save {model}"
    jobs.timed(benchmark, jobs.load_and_save(file(model, tmp_path), tmp_path), tool, rounds=5)


@pytest.mark.parametrize("tool", ["graphopt", "onnxslim", "onnxsim"])
@pytest.mark.parametrize("model", jobs.CLEANUP_MODELS)
def test_cleanup(benchmark: Any, model: str, tool: str, tmp_path: Path) -> None:
    benchmark.group = f"cleanup {model}"
    jobs.timed(benchmark, jobs.cleanup(file(model, tmp_path), tmp_path), tool, rounds=5)
