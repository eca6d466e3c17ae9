"""Differences between outputs, by hand; and finding the node where two models part."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx.parser
import pytest

from graphopt.compare import as_arrays, compare, differences, first_difference
from graphopt.errors import CheckError

INF, NAN = float("inf"), float("nan")


def test_figures_by_hand() -> None:
    a, b = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[3.0, 4.5], [0.0, -0.1]])
    (found,) = differences(["y"], [([a], [b])])
    assert found.max_error == 0.5
    assert found.mean_error == pytest.approx(0.6 / 4)
    assert found.scale == 4.0
    assert found.relative == 0.125
    assert found.sqnr_db == pytest.approx(10 * math.log10(25 / 0.26))
    assert found.cosine == pytest.approx((9 + 18) / math.sqrt(25 * (9 + 20.25 + 0.01)))
    assert found.argmax_agreement == 1.0  # argmax of [0, 0] and of [0, -0.1] is 0


def test_feeds_are_folded() -> None:
    a, b = np.array([[1.0, 2.0]]), np.array([[2.0, 1.0]])
    whole = differences(["y"], [([np.concatenate([a, a])], [np.concatenate([a, b])])])
    assert differences(["y"], [([a], [a]), ([a], [b])]) == whole
    assert whole[0].argmax_agreement == 0.5


def test_equal_outputs() -> None:
    (found,) = differences(["y"], [([np.array([1.0, NAN, INF])], [np.array([1.0, NAN, INF])])])
    assert (found.max_error, found.sqnr_db, found.cosine, found.relative) == (0.0, INF, 1.0, 0.0)
    (zero,) = differences(["y"], [([np.zeros(3)], [np.zeros(3)])])
    assert (zero.relative, zero.cosine, zero.sqnr_db) == (0.0, 1.0, INF)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.array([1.0, NAN]), np.array([1.0, 2.0])),
        (np.array([1.0, INF]), np.array([1.0, -INF])),
        (np.array([1.0, 2.0]), np.array([1.0, INF])),
        (np.zeros(2), np.zeros(3)),
        (np.zeros(2), np.ones(2)),  # no scale to be relative to
        (np.array(["a", "b"]), np.array(["a", "c"])),
        ([np.zeros(1)], [np.zeros(1), np.zeros(1)]),
        (None, np.zeros(1)),
    ],
)
def test_what_is_not_equal_at_all_is_infinitely_far(a: object, b: object) -> None:
    (found,) = differences(["y"], [([a], [b])])
    assert found.relative == INF


def test_scalars_and_integers_have_no_argmax() -> None:
    for value in (np.array(3.0), np.array([[1, 2]]), np.zeros((2, 1))):
        (found,) = differences(["y"], [([value], [value])])
        assert found.argmax_agreement is None


def test_sequences_maps_and_optionals() -> None:
    assert as_arrays(None) == []
    assert [a.tolist() for a in as_arrays([np.array([1]), [np.array([2]), None]])] == [[1], [2]]
    assert [a.tolist() for a in as_arrays({"a": 1.0, "b": 2.0})] == [1.0, 2.0]
    (found,) = differences(["y"], [([[np.ones(2), np.ones(3)]], [[np.ones(2), np.ones(3) * 1.5]])])
    assert found.max_error == 0.5


MODEL = """<ir_version: 8, opset_import: ["" : 17]> m (float[2] x) => (float[2] OUT) {
    [one] a = Mul(x, x)  [two] b = OP(a)  [three] OUT = Add(b, x) }"""


def model(op: str = "Relu", out: str = "y") -> onnx.ModelProto:
    return onnx.parser.parse_model(MODEL.replace("OP", op).replace("OUT", out))


FEED = {"x": np.array([1, -2], np.float32)}


def test_compare_runs_both() -> None:
    (same,) = compare(model(), model(), [FEED])
    assert same.relative == 0
    (found,) = compare(model(), model("Neg"), [FEED])
    assert (found.name, found.max_error, found.scale) == ("y", 8.0, 2.0)  # [1, 4] + x against [-1, -4] + x
    with pytest.raises(CheckError, match="share no output name"):
        compare(model(), model(out="z"), [FEED])


def test_the_first_node_that_differs() -> None:
    assert first_difference(model(), model("Neg"), [FEED], tolerance=1e-4) == ("two", "b", 2.0)
    assert first_difference(model(), model(), [FEED], tolerance=1e-4) is None
    assert first_difference(model(), model("Neg"), [FEED], tolerance=2.0) == ("three", "y", 4.0)  # 8 of a scale of 2
    assert first_difference(model(), model("Neg"), [FEED], tolerance=4.0) is None
