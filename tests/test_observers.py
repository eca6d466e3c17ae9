"""Statistics: the kernel against its reference, exact merging, and ranges against brute force and closed forms."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from graphopt.errors import DataError, OptionError
from graphopt.kernels import reference
from graphopt.observers import METHODS, Statistics, load, merge, merge_all, observe, save

SIDE = reference.SIDE
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
TABLES = hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=6), elements=FLOATS)


def fields(statistics: Statistics) -> dict[str, object]:
    counts = statistics.counts
    return {**statistics.__dict__, "counts": None if counts is None else {int(i): int(counts[i]) for i in np.flatnonzero(counts)}}


def check_scan(rows: np.ndarray) -> None:
    from graphopt.kernels.histogram import scan

    counts, low, high = np.zeros(2 * SIDE, np.int64), np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
    bad = np.empty(len(rows), np.int64)
    exponent = scan(rows, counts, reference.MIN_EXPONENT, low, high, bad)
    wanted = reference.scan(rows)
    for name, found, expected in zip(
        ("counts", "exponent", "low", "high", "bad"), (counts, exponent, low, high, bad), wanted, strict=True
    ):
        np.testing.assert_array_equal(found, expected, err_msg=name)


def samples() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    normal = random.standard_normal((3, 10_001)).astype(np.float32)
    mixed = normal.copy()
    mixed[0, ::7], mixed[1, 5], mixed[2, -1] = np.nan, np.inf, -np.inf
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "negative": -np.abs(normal),
        "growing": np.sort(np.abs(normal), axis=1) ** 30,  # the bin width grows from block to block
        "denormal": (normal * 1e-40).astype(np.float32),
        "huge": np.clip(normal, -1, 1) * np.finfo(np.float32).max,
        "powers": np.ldexp(np.float32(1), np.arange(-149, 128))[None].astype(np.float32),
        "negative powers": -np.ldexp(np.float32(1), np.arange(-149, 128))[None].astype(np.float32),
        "zeros": np.array([[0.0, -0.0]], np.float32),
        "not finite": mixed,
        "nothing finite": np.full((2, 3), np.nan, np.float32),
        "no elements": np.empty((2, 0), np.float32),
    }


@pytest.mark.parametrize("name", samples())
def test_scan_equals_its_reference(name: str) -> None:
    check_scan(samples()[name])


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(width=32)))
def test_scan_equals_its_reference_on_any_floats(rows: np.ndarray) -> None:
    check_scan(rows)


def test_scan_without_the_compiler() -> None:
    script = "import test_observers as t\nfor rows in t.samples().values(): t.check_scan(rows[:, :99])\nprint('equal')"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert result.stdout == "equal\n", result.stderr


def test_numba_is_imported_for_histograms_only() -> None:
    script = (
        "import sys, numpy as np, graphopt.kernels\nfrom graphopt.observers import observe\n"
        "observe(np.ones(3, np.float32)).range('minmax')\nassert 'numba' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@given(st.lists(TABLES, min_size=2, max_size=5), st.randoms())
@settings(max_examples=50)
def test_any_split_and_order_merge_to_the_same(tables: list[np.ndarray], random: object) -> None:
    width = min(table.shape[1] for table in tables)
    rows = np.concatenate([table[:, :width] for table in tables])
    whole = observe(rows, rows=len(rows), histogram=True)
    parts = [observe(table[:, :width], rows=len(table), histogram=True) for table in tables]
    random.shuffle(parts)  # type: ignore[attr-defined]
    assert fields(reduce(merge, parts)) == fields(whole)
    assert fields(reduce(merge, reversed(parts), Statistics(counts=np.zeros(2 * SIDE, np.int64)))) == fields(whole)


def test_bins_merge_across_widths() -> None:
    small, large = np.array([-1.0, 0.0, 1.0, 3.0], np.float32), np.array([1e6, -5e5], np.float32)
    merged = merge(observe(small, histogram=True), observe(large, histogram=True))
    together = observe(np.concatenate([small, large]), histogram=True)
    assert merged.counts is not None
    assert together.counts is not None
    np.testing.assert_array_equal(merged.counts, together.counts)
    assert merged.exponent == together.exponent == 8  # 1e6 < 4096 * 2**8


def test_half_and_double_are_counted_as_float32() -> None:
    for dtype in (np.float16, np.float64):
        values = np.array([-2, 0.5, 3], dtype)
        assert observe(values).range() == (np.float32(-2), np.float32(3))


@pytest.mark.parametrize("histogram", [False, True])
def test_nan_and_inf_name_the_row(histogram: bool) -> None:
    values = np.ones((4, 3), np.float32)
    values[2, 1] = np.inf
    values[3, 0] = np.nan
    with pytest.raises(DataError, match=r"tensor 'x': row 12 makes NaN or Inf"):
        observe(values, rows=4, histogram=histogram, where="tensor 'x'", first_row=10)


def test_moving_average_is_the_mean_of_row_extremes() -> None:
    values = np.array([[-1, 2], [-3, 10], [-4, 6]], np.float32)
    low, high = observe(values, rows=3).range("moving-average")
    assert low == np.float32(-8 / 3)
    assert high == np.float32(6)


def test_percentile_matches_numpy() -> None:
    values = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)
    statistics = observe(values, histogram=True)
    bin_width = 2.0**statistics.exponent
    for percentile in (90.0, 99.0, 99.99):
        low, high = statistics.range("percentile", percentile=percentile)
        cut = (100 - percentile) / 2
        assert abs(low - np.percentile(values, cut)) < 2 * bin_width
        assert abs(high - np.percentile(values, 100 - cut)) < 2 * bin_width
        _, symmetric = statistics.range("percentile", percentile=percentile, symmetric=True)
        assert abs(symmetric - np.percentile(np.abs(values), percentile)) < 2 * bin_width


def quantised_error(values: np.ndarray, low: float, high: float, levels: int) -> float:
    step = (high - low) / (levels - 1)
    zero = np.round(-low / step)
    return float(np.mean((values - (np.clip(np.round(values / step) + zero, 0, levels - 1) - zero) * step) ** 2))


@pytest.mark.parametrize("levels", [16, 256])
def test_mse_is_near_the_best_of_a_fine_grid(levels: int) -> None:
    random = np.random.default_rng(1)
    for values in (random.laplace(size=20_000), np.maximum(random.standard_normal(20_000), 0), random.gamma(2, size=20_000) - 1):
        values = values.astype(np.float32).astype(np.float64)
        low, high = observe(values, histogram=True).range("mse", levels=levels)
        ends = np.linspace(0.2, 1, 33)
        lows = ends * min(values.min(), 0) if values.min() < 0 else [0.0]
        best = min(quantised_error(values, a, b, levels) for a in lows for b in ends * values.max())
        assert quantised_error(values, float(low), float(high), levels) <= 1.03 * best


def naive_divergence(counts: np.ndarray, start: int, stop: int, levels: int) -> float:
    """KL(P || Q) of one window, bin by bin, as in Migacz's slides."""
    window = counts[start:stop].astype(np.float64)
    p, q = window.copy(), np.zeros_like(window)
    p[0] += counts[:start].sum()
    p[-1] += counts[stop:].sum()
    for j in range(levels):
        a, b = j * len(window) // levels, (j + 1) * len(window) // levels
        filled = window[a:b] > 0
        q[a:b][filled] = window[a:b].sum() / max(1, filled.sum())
    p, q = p / p.sum(), q / q.sum()
    return float((p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-300))).sum())


def test_entropy_cost_equals_the_definition() -> None:
    from graphopt.observers import _entropy

    counts = np.random.default_rng(3).poisson(40, 2 * SIDE).astype(np.float64)
    cost = _entropy(counts, 128)
    counts[SIDE], counts[SIDE - 1] = min(counts[SIDE : SIDE + 2]), min(counts[SIDE - 2 : SIDE])
    windows = [(4096, 4096), (100, 3000), (1500, 77), (64, 64), (0, 1000)]
    found = cost(*(np.array(side, float) for side in zip(*windows, strict=True)))
    expected = [naive_divergence(counts, SIDE - left, SIDE + right, 128) for left, right in windows]
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_entropy_cuts_an_outlier_on_its_side_only() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(100_000), 30).astype(np.float32)
    low, high = observe(values, histogram=True).range("entropy")
    assert -5 < low < -3
    assert 3 < high < 15


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_degenerate_tensors_have_sound_ranges(method: str, symmetric: bool) -> None:
    def found(*values: float) -> tuple[float, float]:
        low, high = observe(np.array(values, np.float32), histogram=True).range(method, symmetric=symmetric)
        assert low.dtype == high.dtype == np.float32
        return float(low), float(high)

    assert found() == found(0, 0) == found(-0.0) == found(1e-41, 1e-42) == (0, 0)
    assert found(5, 5, 5) == ((-5, 5) if symmetric else (0, 5))
    assert found(-5, -5) == ((-5, 5) if symmetric else (-5, 0))
    most = float(np.finfo(np.float32).max)
    assert found(-most, most) == (-most, most)


def test_symmetric_ranges_fold_both_signs() -> None:
    values = np.random.default_rng(5).gamma(2, size=50_000) - 1
    statistics = observe(values, histogram=True)
    folded = observe(np.abs(values), histogram=True)
    for method in ("minmax", "percentile", "entropy", "mse"):
        low, high = statistics.range(method, symmetric=True)
        assert low == -high
        assert high == folded.range(method, symmetric=True)[1]


def test_unknown_method_and_missing_histogram() -> None:
    statistics = observe(np.array([1, 2], np.float32))
    with pytest.raises(OptionError, match="unknown calibration method 'median'; choose from minmax"):
        statistics.range("median")
    with pytest.raises(DataError, match="needs a histogram"):
        statistics.range("entropy")


def test_saved_shards_reduce_to_the_whole(tmp_path: Path) -> None:
    rows = np.random.default_rng(2).standard_normal((10, 50)).astype(np.float32) * np.arange(1, 11, dtype=np.float32)[:, None]

    def shard(part: np.ndarray) -> dict[str, Statistics]:
        return {"a/b:0": observe(part, rows=len(part), histogram=True), "c": observe(part**2, rows=len(part))}

    save(tmp_path / "first", shard(rows[:3]))
    save(tmp_path / "second.npz", shard(rows[3:]))
    merged = merge_all([load(tmp_path / "second.npz"), load(tmp_path / "first")])
    assert {name: fields(s) for name, s in merged.items()} == {name: fields(s) for name, s in shard(rows).items()}
    with pytest.raises(DataError, match="tensor 'c' is in one shard only"):
        merge_all([merged, {"a/b:0": merged["a/b:0"]}])
    (tmp_path / "broken.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match=r"'broken\.npz': cannot be read"):
        load(tmp_path / "broken.npz")
