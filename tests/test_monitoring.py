"""`graphopt monitor`: silent on more of the same rows, loud on others; limits, windows, and what is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from graphopt.errors import DataError, ModelError
from graphopt.monitoring import BINS, DriftReport, Sentinel, Watched, _beyond, _distances, _ks, _summary, make

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="module")
def sentinel() -> Sentinel:
    from importlib import resources

    assets = Path(str(resources.files("graphopt") / "assets"))
    return make(assets / "digits.onnx", str(assets / "digits_calib.npz"))


@pytest.fixture
def held_back(digits: Path) -> np.ndarray:
    with np.load(digits / "digits_eval.npz") as data:
        return np.asarray(data["image"], np.float32)


def test_false_alarms_on_held_back_rows_are_rare(sentinel: Sentinel, held_back: np.ndarray) -> None:
    random = np.random.default_rng(3)
    drifted = sum(sentinel.check({"image": held_back[random.choice(len(held_back), 50, False)]}).drifted for _ in range(200))
    assert drifted <= 6  # 1 of 200 is meant; all 200 share their calibration rows


@pytest.mark.parametrize("change", ["darkened", "noisy", "shifted"])
def test_other_rows_raise_the_alarm(sentinel: Sentinel, held_back: np.ndarray, digits: Path, change: str) -> None:
    top = held_back.max()
    noise = np.random.default_rng(0).normal(0, 0.05 * top, held_back.shape)
    rows = {"darkened": held_back * 0.7, "noisy": held_back + noise, "shifted": held_back + 0.1 * top}[change].clip(0, top)
    reports = list(sentinel.check_rows(digits / "digits.onnx", {"image": rows.astype(np.float32)[:200]}, window=50))
    assert [r.rows for r in reports] == [64, 64, 64, 8]  # windows end with a batch of 16
    assert all(r.drifted for r in reports[:3])
    assert "calibrate again" in reports[0].advice
    same = list(sentinel.check_rows(digits / "digits.onnx", {"image": held_back[:200]}))
    assert [(r.rows, r.drifted) for r in same] == [(200, False)]


def test_rows_in_the_order_of_their_classes_are_no_sample(sentinel: Sentinel, held_back: np.ndarray, digits: Path) -> None:
    with np.load(digits / "digits_eval.npz") as data:
        labels = data["labels"]
    ordered = [held_back[labels == digit] for digit in range(10)]
    assert sum(sentinel.check({"image": rows}).drifted for rows in ordered) >= 5
    assert not sentinel.check({"image": held_back}).drifted


def test_false_alarms_are_as_rare_as_asked_for_on_heavy_tails() -> None:
    """PSI has far longer tails than KS here: with one limit for both, KS would never raise an alarm."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 1.5, 6000))
    values = (random.normal(0, 1, (6000, 40)) * scales[:, None]).astype(np.float32)
    edges = np.quantile(values, np.linspace(0, 1, BINS + 1))
    noisier = _summary(values[:50] + np.float32(1), edges)
    alarms = 0
    for k in range(100):
        mine = _summary(values[60 * k : 60 * k + 60], edges)
        made = Sentinel({"x": Watched(edges, mine[0][:30], mine[1][:30])}, ("x",), chance=0.05)
        report = made._report({"x": (mine[0][30:], mine[1][30:])})
        alarms += report.drifted
        assert max(report.tensors[0].ks_limits.values()) < 0.7
        assert made._report({"x": noisier}).drifted
    assert alarms <= 12  # 5 are meant; 12 or fewer with 99.9 % probability


def test_distances_by_hand() -> None:
    def ks(first: list[float], second: list[float]) -> float:
        mine = np.arange(len(first) + len(second)) >= len(first)
        return float(_ks(np.array([*first, *second]), mine[None])[0])

    assert ks([1, 2, 3], [1, 2, 3]) == 0
    assert ks([1, 2], [3, 4]) == 1
    assert ks([1, 2, 3, 4], [3, 4]) == 0.5
    counts = np.zeros((2, BINS + 2), int)
    counts[0, 1], counts[1, BINS], counts[1, -1] = 2, 1, 1  # outside counts at the end
    psi = _distances(counts, np.zeros((2, 3)), np.array([[False, True]]))[0, 0]
    assert psi == pytest.approx(2 * (2 / 10) * np.log(5))  # (2.5 and 0.5) / 10 in both ends
    edges = np.linspace(0, 16, BINS + 1)
    counts, figures = _summary(np.array([[-1.0, 0.0, 16.0, 17.0], [1.0, 1.5, 2.0, 2.5]]), edges)
    assert counts[0, [0, 1, BINS, BINS + 1]].tolist() == [1, 1, 1, 1]
    assert counts[1, [2, 3]].tolist() == [2, 2]
    assert figures[1] == pytest.approx([1.75, np.std([1, 1.5, 2, 2.5]), 0.5])


def test_the_chance_of_overflow_is_exact() -> None:
    counts = np.zeros((2, BINS + 2), int)
    assert _beyond(counts, 3) == 1
    counts[:, -1] = 1
    assert _beyond(counts, 3) == pytest.approx(2 / 5 * 1 / 4)  # the two largest of five are these two


def test_it_survives_a_file(sentinel: Sentinel, held_back: np.ndarray, tmp_path: Path) -> None:
    sentinel.save(tmp_path / "s.npz")
    again = Sentinel.load(tmp_path / "s.npz")
    assert again.check({"image": held_back[:40] * 0.5}) == sentinel.check({"image": held_back[:40] * 0.5})
    (tmp_path / "torn.npz").write_bytes((tmp_path / "s.npz").read_bytes()[:100])
    with pytest.raises(DataError, match="cannot be read"):
        Sentinel.load(tmp_path / "torn.npz")


def test_what_it_refuses(sentinel: Sentinel, held_back: np.ndarray, digits: Path) -> None:
    with pytest.raises(DataError, match="3 rows; 8 or more"):
        sentinel.check({"image": held_back[:3]})
    with pytest.raises(DataError, match="'picture' is not watched; watched are image"):
        sentinel.check({"picture": held_back})
    with pytest.raises(DataError, match="row 2 holds NaN"):
        sentinel.check({"image": np.where(np.arange(10)[:, None, None, None] == 2, np.float32(np.nan), held_back[:10])})
    with pytest.raises(DataError, match="20 calibration rows; 32 or more"):
        make(digits / "digits.onnx", {"image": held_back[:20]})
    with pytest.raises(ModelError, match="'nothing' is not computed"):
        make(digits / "digits.onnx", {"image": held_back[:40]}, watch=["nothing"])


def test_few_distinct_values_have_bins_too() -> None:
    from graphopt.monitoring import _edges
    from graphopt.observers import observe

    for values in (np.zeros((4, 8)), np.tile([0.0, 1.0], (4, 4))):
        edges = _edges(observe(values.astype(np.float32), rows=4, histogram=True))
        assert len(edges) == BINS + 1
        assert (np.diff(edges) > 0).all()
        assert _summary(values, edges)[0][:, [0, -1]].sum() == 0
    assert Watched(edges, np.zeros((1, BINS + 2)), np.zeros((1, 3))).edges is edges


def test_the_command_line(cli: Run, digits: Path, tmp_path: Path) -> None:
    common = ("monitor", digits / "digits.onnx", "--sentinel", tmp_path / "s.npz")
    code, out, err = cli(*common, "--calib", digits / "digits_calib.npz", "--data", digits / "digits_eval.npz")
    assert (code, err) == (0, "")
    assert "540 rows: nothing to do" in out
    with np.load(digits / "digits_eval.npz") as data:
        np.savez(tmp_path / "dark.npz", image=(data["image"] * 0.4).astype(np.float32))
    code, out, err = cli(*common, "--data", tmp_path / "dark.npz", "--json", "--window", 100)
    assert code == 2
    assert all(DriftReport.model_validate_json(line).drifted for line in out.splitlines())
    assert "are not like those of calibration" in err
    assert cli(*common)[0] == 1


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "monitor.schema.json"
    assert json.loads(published.read_text()) == DriftReport.model_json_schema()
