"""`graphopt bench`: who runs when, what the intervals say, and what is written."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_measure import weighted

from graphopt import bench_probe, benchmark
from graphopt.bench_probe import energy_counters
from graphopt.benchmark import BLOCKS, BenchReport, bench, speedup
from graphopt.errors import ModelError, OptionError

Run = Callable[..., "tuple[int, str, str]"]


def drawn(random: np.random.Generator, ratio: float, rounds: int = 12) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rounds of two models: noise of each run, 2 % of each session, and spells that slow both."""
    base, other = [], []
    for _ in range(BLOCKS):
        spells = 1 + 3 * (random.random(rounds) < 0.2)
        sessions = np.exp(random.normal(0, 0.02, 2))
        noise = np.exp(random.normal(0, 0.05, (2, rounds)))
        base.append(sessions[0] * spells * noise[0])
        other.append(sessions[1] * spells * noise[1] / ratio)
    return base, other


@pytest.mark.parametrize("ratio", [1.0, 1.7])
def test_the_interval_holds_the_true_ratio(ratio: float) -> None:
    random = np.random.default_rng(5)
    held = 0
    for _ in range(60):
        middle, low, high = speedup(*drawn(random, ratio))
        held += low <= ratio <= high
        assert low <= middle <= high
        assert high / low < 1.25
    assert held >= 53  # 95 % of 60 are 57; under 53 has a chance of 1 in 100


def test_equal_times_are_a_ratio_of_one_without_width() -> None:
    times = [np.full(5, 0.25)] * BLOCKS
    assert speedup(times, times) == (1.0, 1.0, 1.0)


def test_every_round_runs_every_model_twice_and_the_first_against_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    loads: list[str] = []

    def loaded(entrant: benchmark.Entrant, threads: int) -> Callable[[Any], Any]:
        loads.append(entrant.label)
        name = f"{entrant.label}{loads.count(entrant.label) % 2 if entrant.label == 'a' else ''}"
        return lambda feed: ran.append(name)

    monkeypatch.setattr(benchmark, "_loaded", loaded)
    monkeypatch.setattr(benchmark, "_warm", lambda run, feed, entrant: None)
    entrants = [(benchmark.Entrant(Path(name)), {"x": np.zeros(1)}) for name in "ab"]
    rows, _ = benchmark._timed(entrants, 1, 1, 0.0, energy_counters(Path("nowhere")))
    pairs = [(ran[i], ran[i + 1]) for i in range(0, len(ran), 2)]
    assert all(first == second for first, second in pairs)
    assert sorted(loads) == sorted(["a", "a", "b"] * BLOCKS)
    rounds = [sorted(p[0] for p in pairs[i : i + 3]) for i in range(0, len(pairs), 3)]
    assert all(r == ["a0", "a1", "b"] for r in rounds)
    assert len({tuple(p[0] for p in pairs[i : i + 3]) for i in range(0, len(pairs), 3)}) > 3  # in changing orders
    assert [row.runs for row in rows] == [BLOCKS * benchmark.MIN_ROUNDS] * 2


def zone(root: Path, name: str, values: Sequence[int], top: int = 1000) -> Path:
    (root / name).mkdir(parents=True)
    (root / name / "energy_uj").write_text(str(values[0]))
    (root / name / "max_energy_range_uj").write_text(str(top))
    return root / name / "energy_uj"


def test_energy_counts_packages_once_and_survives_a_wrap(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", [900])
    zone(tmp_path, "intel-rapl:0:0", [0])  # the cores of the same package
    counters = energy_counters(tmp_path)
    assert [path for path, _ in counters.counters] == [package]
    assert counters.joules(lambda: package.write_text("101"), 0.0) == pytest.approx((101 + 1001 - 900) / 1e6)


def test_no_counters_are_said_plainly(tmp_path: Path) -> None:
    none = energy_counters(tmp_path)
    assert none.joules(lambda: None, 0.0) is None
    assert "exposes no RAPL" in none.said


def test_the_report_the_table_and_the_csv(cli: Run, digits: Path, tmp_path: Path) -> None:
    model, table = digits / "digits.onnx", tmp_path / "t.csv"
    command = ("bench", model, model, "--batch", "1,4", "--threads", "1,2", "--seconds", "0.2", "--csv", table)
    code, out, err = cli(*command, "--json")
    assert (code, err) == (0, "")
    report = BenchReport.model_validate_json(out)
    assert [(t.batch, t.threads) for t in report.timings] == [(1, 1), (1, 1), (4, 1), (4, 1), (1, 2), (1, 2), (4, 2), (4, 2)]
    assert {(c.batch, c.threads) for c in report.control} == {(1, 1), (4, 1), (1, 2), (4, 2)}
    for t in report.timings:
        assert 0 < t.p50_ms <= t.p95_ms <= t.p99_ms
        assert t.rows_per_second > 0
        assert t.load_ms > 0
    (held,) = report.memory  # of one file once
    assert held.file_bytes == model.stat().st_size
    assert held.load_bytes is not None
    assert held.peak_bytes is not None
    assert held.peak_bytes > 0
    rows = list(csv.DictReader(table.open()))
    assert [float(r["p50_ms"]) for r in rows] == [t.p50_ms for t in report.timings]
    code, out, err = cli(*command)
    assert code == 1
    assert "exists; give --overwrite" in err
    code, out, _ = cli(*command, "--overwrite", "--no-memory")
    assert code == 0
    assert "95 % interval" in out
    assert "noise: the first model against itself" in out


def test_memory_of_a_fresh_process_grows_with_the_model(tmp_path: Path) -> None:
    feed = {"x": np.zeros((4, 3), np.float32)}
    small = bench_probe.memory(weighted(tmp_path / "s.onnx", 1), feed)
    large = bench_probe.memory(weighted(tmp_path / "l.onnx", 64), feed)
    assert large["peak"] - small["peak"] > 63 << 20  # onnxruntime folds the sum of the weights, and gives them back
    assert large["load"] < large["peak"]
    assert large["operators"] == "the model has no regions"
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="fresh process"):
        bench_probe.memory(tmp_path / "bad.onnx", feed)


def test_a_fixed_batch_is_said(tmp_path: Path, digits: Path) -> None:
    fixed = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> m (float[2,3] x) => (float[2,3] y) { y = Neg(x) }')
    onnx.save(fixed, tmp_path / "fixed.onnx")
    report = bench([tmp_path / "fixed.onnx"], batches=(1, 2), seconds=0.1)
    assert [t.batch for t in report.timings] == [2]
    assert any("not run with batch 1" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--provider", "Abacus"), "unknown provider 'Abacus'; this onnxruntime has "),
        (("--batch", "0"), "at least 1"),
        (("--threads", "two"), "not a list of whole numbers"),
    ],
)
def test_user_errors(cli: Run, digits: Path, arguments: tuple[str, ...], message: str) -> None:
    code, _, err = cli("bench", digits / "digits.onnx", *arguments)
    assert code == 1
    assert message in " ".join(err.split())


def test_openvino_runs_the_model_or_says_what_to_install(digits: Path) -> None:
    try:
        import openvino  # noqa: F401
    except ImportError:
        with pytest.raises(OptionError, match=r"pip install 'graphopt\[openvino\]'"):
            bench([digits / "digits.onnx"], providers=["openvino"])
        return
    report = bench([digits / "digits.onnx"], providers=["CPUExecutionProvider", "openvino"], seconds=0.2, memory=False)
    assert [t.provider for t in report.timings] == ["CPUExecutionProvider", "openvino"]


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "bench.schema.json"
    assert json.loads(published.read_text()) == BenchReport.model_json_schema()
