"""Every pass on a generated graph and on a real transformer, alone, verification included: each run has a model of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import onnx
import pytest
from test_bench_models import file

from graphopt.pipeline import parse, run
from graphopt.presets import PRESETS

pytestmark = pytest.mark.timeout(1800)
BEFORE = {"fold-bn": "cleanup", "fold-scales": "cleanup, fold-bn", "prune-channels": jobs.FOLD}  # what each is usually run after
OPTIONS = {"prune-channels": "ratio=0.5 round_to=1"}
PASSES = [*PRESETS["cleanup"].passes.split(", "), "fold-bn", "fold-scales", "prune-channels"]


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("model", ["generated_2500", "minilm_l3"])
def test_pass(benchmark: Any, model: str, name: str, tmp_path: Path) -> None:
    benchmark.group = f"passes {model}"
    proto = onnx.load(file(model, tmp_path))
    steps = parse(f"{name} {OPTIONS.get(name, '')}")

    def fresh() -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (jobs.fresh(proto, BEFORE.get(name, "")), steps, jobs.context(None)), {}

    run(*fresh()[0])  # warm-up: imports and kernels
    benchmark.pedantic(run, setup=fresh, rounds=5)
