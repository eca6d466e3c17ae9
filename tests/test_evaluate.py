"""Metrics and the paired comparison, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest

from graphopt.data import open_dataset
from graphopt.errors import DataError, OptionError
from graphopt.evaluate import METRICS, metric, paired, score
from graphopt.feeds import input_specs
from graphopt.runtime import session

SCORES = np.array([[0.1, 0.2, 0.7], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]], np.float32)


def test_top1() -> None:
    assert metric("top1")([SCORES], np.array([2, 1, 2])).tolist() == [True, False, True]
    tokens = metric("top1")([SCORES[None]], np.array([[2, 0, 0]]))
    assert tokens.tolist() == [[True, True, False]]
    assert metric("top1")([SCORES], np.array([2.0, 0.0, 1.0])).tolist() == [True, True, False]  # labels saved as floats


def test_top5() -> None:
    scores = np.arange(8.0)[None].repeat(3, 0)
    assert metric("top5")([scores], np.array([7, 3, 2])).tolist() == [True, True, False]


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 1, 1)])
def test_binary(shape: tuple[int, ...]) -> None:
    probability = np.array([0.9, 0.1, 0.5, 0.51]).reshape(shape)
    assert metric("binary")([probability], np.array([1, 1, 0, 0])).tolist() == [True, False, True, False]


def test_negative_mse() -> None:
    found = metric("negative-mse")([np.array([[1.0, 2.0], [3.0, 5.0]])], np.array([[1.0, 4.0], [3.0, 5.0]]))
    assert found.tolist() == [-2.0, 0.0]


@pytest.mark.parametrize(
    ("name", "output", "labels", "message"),
    [
        ("top1", SCORES, [[0], [1], [2]], "expected"),
        ("top1", SCORES[:, :1], [0, 0, 0], "expected"),
        ("top1", SCORES, [0, 1, 3], "numbers from 0 to 2"),
        ("top1", SCORES, [0, 1, -100], "numbers from 0 to 2"),
        ("top5", SCORES, [0, 1, 0.5], "numbers from 0 to 2"),
        ("binary", SCORES, [0, 1, 0], "expected one value a row"),
        ("binary", SCORES[:, :1], [0, 1, 2], "one 0 or 1 a row"),
        ("negative-mse", SCORES, [0, 1, 2], "differ in shape"),
    ],
)
def test_what_does_not_fit_is_an_error(name: str, output: np.ndarray, labels: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(name)([output], np.array(labels))


def test_metrics_of_the_user() -> None:
    assert metric("operator:add") is not None
    messages = {"top2": "unknown metric 'top2'; did you mean", "operator:nothing": "cannot be loaded", "math:pi": "is a float"}
    for name, message in messages.items():
        with pytest.raises(OptionError, match=message):
            metric(name)
    assert set(METRICS) == {"top1", "top5", "binary", "negative-mse"}


@pytest.mark.parametrize("batch", ["N", "2"])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_one_score_a_row_whatever_the_batch(batch: str, size: int) -> None:
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> m (float[{batch},3] x) => (float[{batch},3] y) {{ y = Neg(x) }}'
    )
    rows = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    labels = np.array([0, 1, 2, 0, 1, 2, 0])
    data = open_dataset({"x": rows, "labels": labels}, input_specs(proto))
    seen: list[tuple[int, int]] = []
    found = score(session(proto), data, "top1", batch=size, progress=lambda what, done, total: seen.append((done, total)))
    assert found.tolist() == ((-rows).argmax(1) == labels).tolist()
    assert seen[-1] == (7, 7)


def test_rows_without_labels() -> None:
    proto = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> m (float[N,3] x) => (float[N,3] y) { y = Neg(x) }')
    with pytest.raises(DataError, match="has no 'labels'"):
        score(session(proto), open_dataset({"x": np.ones((2, 3), np.float32)}, input_specs(proto)), "top1")


def split(lost: int, won: int, same: int = 10) -> tuple[np.ndarray, np.ndarray]:
    before = np.array([1] * lost + [0] * won + [1] * same)
    return before, np.array([0] * lost + [1] * won + [1] * same)


@pytest.mark.parametrize(
    ("lost", "won", "p_value"),
    [
        (0, 0, 1.0),
        (1, 0, 1.0),  # 2 * 1/2
        (5, 0, 0.0625),  # 2 * 1/32
        (6, 0, 0.03125),  # 2 * 1/64
        (0, 6, 0.03125),  # two-sided
        (8, 2, 0.109375),  # 2 * (1 + 10 + 45) / 1024
        (9, 1, 0.021484375),  # 2 * (1 + 10) / 1024
        (15, 5, 0.04138946533203125),  # 2 * 21700 / 2**20
        (5, 5, 1.0),
    ],
)
def test_the_exact_sign_test(lost: int, won: int, p_value: float) -> None:
    found = paired(*split(lost, won))
    assert (found.lost, found.won, found.rows) == (lost, won, lost + won + 10)
    assert found.p_value == pytest.approx(p_value, rel=1e-12)
    assert found.original == (lost + 10) / found.rows
    assert found.optimized == (won + 10) / found.rows
