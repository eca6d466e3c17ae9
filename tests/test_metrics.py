"""Metrics of whole sets, against values worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.errors import DataError, OptionError
from graphopt.metrics import METRICS, Batch, find_metric, names


def value(name: str, output: Any, labels: Any, **feed: Any) -> float:
    found = find_metric(name)
    truth = np.asarray(labels)
    return found.total(found.keep(Batch([np.asarray(output)], truth, feed)), truth)


def test_f1_of_two_classes_is_that_of_class_1() -> None:
    # predictions 1 1 0 1 0, labels 1 0 0 1 1: 2 hits, 1 false, 1 missed
    assert value("f1", [[0.9], [0.8], [0.1], [0.6], [0.2]], [1, 0, 0, 1, 1]) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))


def test_f1_of_three_classes_is_their_mean() -> None:
    scores = np.eye(3)[[0, 1, 1, 2]]
    # class 0: 1.0; class 1: hits 1, given 2, true 1 -> 2/3; class 2: hits 1, given 1, true 2 -> 2/3
    assert value("f1", scores, [0, 1, 2, 2]) == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)


def test_auc_counts_pairs_in_order() -> None:
    # positives .8 .4, negatives .6 .2 .4: in order: .8 over three, .4 over .2 and half of .4 = 4.5 of 6
    assert value("auc", [0.8, 0.4, 0.6, 0.2, 0.4], [1, 1, 0, 0, 0]) == pytest.approx(4.5 / 6)
    assert value("auc", [[0.2, 0.8], [0.6, 0.4]], [1, 0]) == 1.0


def test_errors_and_cosine() -> None:
    assert value("mse", [[1.0, 2.0], [3.0, 5.0]], [[1.0, 4.0], [3.0, 5.0]]) == 1.0  # (4/2 + 0) / 2
    assert value("psnr", [[0.0, 10.0], [1.0, 9.0]], [[0.0, 10.0], [0.0, 10.0]]) == pytest.approx((100 + 20) / 2)  # peak 10, error 1
    assert value("cosine", [[3.0, 4.0], [1.0, 0.0]], [[6.0, 8.0], [0.0, 1.0]]) == pytest.approx(0.5)


def test_correlations() -> None:
    assert value("spearman", [1.0, 2.0, 30.0, 4.0], [10, 20, 40, 30]) == pytest.approx(1.0)
    assert value("pearson", [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    # ranks 1 2 3 4 against 2.5 2.5 1 4: covariance 1.5, variances 5 and 4.5
    assert value("spearman", [1.0, 2.0, 3.0, 4.0], [5, 5, 1, 9]) == pytest.approx(1.5 / np.sqrt(5 * 4.5))


def test_pairs_of_embeddings() -> None:
    rows = [[1, 0], [1, 0], [1, 0], [1, 1], [1, 0], [0, 1]]  # cosines 1, .71, 0
    assert value("pair-spearman", np.array(rows, np.float32), [9, 9, 5, 5, 1, 1]) == pytest.approx(1.0)
    tokens = np.zeros((6, 2, 2), np.float32)
    tokens[:, 0] = rows
    tokens[:, 1] = 7  # not attended to
    mask = np.array([[1, 0]] * 6)
    assert value("pair-pearson", tokens, [9, 9, 5, 5, 1, 1], attention_mask=mask) == pytest.approx(
        np.corrcoef([1, np.sqrt(0.5), 0], [9, 5, 1])[0, 1]
    )


def test_word_errors_and_exact_matches() -> None:
    said = np.array(["the cat sat", "on a mat"], object)
    assert value("wer", said, np.array(["the cat sat down", "on the mat"], object)) == pytest.approx(2 / 7)
    assert value("wer", [[1, 2, -1], [4, 5, 6]], [[1, 2, 3], [4, 6, -1]]) == pytest.approx(2 / 5)
    assert value("exact", [[1, 2, -1], [4, 5, 6]], [[1, 2, -1], [4, 6, -1]]) == 0.5
    scores = np.zeros((1, 2, 4))
    scores[0, [0, 1], [3, 1]] = 1
    assert value("exact", scores, [[3, 1]]) == 1.0


@pytest.mark.parametrize(
    ("name", "output", "labels", "message"),
    [
        ("auc", [0.1, 0.2], [1, 1], "both must occur"),
        ("auc", [[1, 2, 3]], [1], "one number a row"),
        ("f1", [[0.2]], [[1]], "one class a row"),
        ("mse", [[1.0, 2.0]], [1.0], "numbers of one shape"),
        ("spearman", [1.0, 1.0], [1, 2], "not all equal"),
        ("pair-spearman", np.ones((3, 2), np.float32), [1, 2, 3], "no pairs"),
        ("pair-spearman", [1], [1], "no output is an embedding"),
        ("cosine", [[1.0, 2.0]], [[1.0]], "differ in size"),
    ],
)
def test_what_does_not_fit_is_an_error(name: str, output: Any, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        value(name, output, labels)


def _median(outputs: Any, labels: np.ndarray) -> float:
    return float(np.median(outputs[0] - labels))


_median.whole = True  # type: ignore[attr-defined]


def test_functions_of_ones_own() -> None:
    assert value("test_metrics:_median", [1.0, 2.0, 9.0], [0, 0, 0]) == 2.0
    with pytest.raises(OptionError, match="did you mean 'spearman'"):
        find_metric("spearmen")
    assert {"top1", "auc", "wer"} <= set(names())
    assert set(METRICS) < set(names())
