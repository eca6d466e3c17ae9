"""Latency is paired and interleaved; memory is that of a process of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import numpy_helper

from graphopt import measure
from graphopt.errors import ModelError

FEED = {"x": np.zeros((4, 3), np.float32)}


class Clock:
    """A clock that only runs of models move, by what each model takes in each round."""

    def __init__(self, costs: dict[str, list[float]]) -> None:
        self.now, self.costs, self.runs = 0.0, costs, dict.fromkeys(costs, 0)
        self.order: list[str] = []

    def run(self, runner: str, feed: Any) -> None:
        self.order.append(runner)
        steps = self.costs[runner]
        self.now += steps[min(self.runs[runner], len(steps) - 1)]
        self.runs[runner] += 1


def timed(monkeypatch: pytest.MonkeyPatch, costs: dict[str, list[float]], **options: Any) -> tuple[list[measure.Latency], Clock]:
    clock = Clock(costs)
    monkeypatch.setattr(measure, "session", lambda name, threads: name)
    monkeypatch.setattr(measure, "run", clock.run)
    monkeypatch.setattr("graphopt.measure.time.perf_counter", lambda: clock.now)
    return measure.latency(list(costs), FEED, **options), clock  # type: ignore[arg-type]


def test_models_take_turns_each_after_an_untimed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    _, clock = timed(monkeypatch, {"a": [0.01], "b": [0.02]}, seconds=0.0, rounds=3)
    assert "".join(clock.order) == "ab" + "aabb" * 3


def test_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    # warm-up, then pairs of (untimed, timed): the timed ones are 1, 2, 3, 4 ms against 2, 4, 6, 8
    slow = [9.0] + [v for ms in (2, 4, 6, 8) for v in (9.0, ms / 1e3)]
    fast = [9.0] + [v for ms in (1, 2, 3, 4) for v in (9.0, ms / 1e3)]
    (first, second), _ = timed(monkeypatch, {"a": slow, "b": fast}, seconds=0.0, rounds=4)
    assert [first.p50_ms, second.p50_ms] == pytest.approx([5.0, 2.5])
    assert second.p95_ms == pytest.approx(np.percentile([1, 2, 3, 4], 95))
    assert [first.speedup, second.speedup] == pytest.approx([1.0, 2.0])
    assert (first.runs, first.batch, first.threads) == (4, 4, 1)


def test_a_slow_spell_hits_both_and_cancels_out(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = [1, 1, 10, 10, 1, 1, 1]
    costs = {n: [0.0] + [v for f in factors for v in (0.0, base * f / 1e3)] for n, base in {"a": 3, "b": 1}.items()}
    (_, second), _ = timed(monkeypatch, costs, seconds=0.0, rounds=len(factors))
    assert second.speedup == pytest.approx(3.0)


def test_it_goes_on_for_the_time_given(monkeypatch: pytest.MonkeyPatch) -> None:
    (only,), _ = timed(monkeypatch, {"a": [0.05]}, seconds=1.0, rounds=2)
    assert only.runs == 10  # of 0.05 untimed and 0.05 timed


def weighted(path: Path, megabytes: int) -> Path:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[4,3] x) => (float[4,3] y, float s) {'
        " y = Neg(x)  s = ReduceSum<keepdims=0>(w) }"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(megabytes << 18, np.float32), "w"))
    path.write_bytes(proto.SerializeToString())
    return path


def test_peak_memory_grows_with_the_model(tmp_path: Path) -> None:
    small = measure.peak_memory(weighted(tmp_path / "s.onnx", 1), FEED)
    large = measure.peak_memory(weighted(tmp_path / "l.onnx", 64), FEED)
    assert large - small > 63 << 20
    assert 0 < small < 64 << 20


def test_a_model_that_does_not_load_there(tmp_path: Path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="failed in a fresh process"):
        measure.peak_memory(bad, FEED)


def test_cpu_features() -> None:
    found = measure.cpu_features()
    assert found["name"]
    assert isinstance(found["features"], list)
