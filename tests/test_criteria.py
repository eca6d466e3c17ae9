"""Scores of units: what counts, what is ignored, and that calibration rows are streamed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx.parser
import pytest

from graphopt.context import Context
from graphopt.criteria import CRITERIA, activation, bn_scale, bn_scale_shift, criterion, find_criterion, l1, l2
from graphopt.data import Dataset, input_specs, open_dataset
from graphopt.dims import Group, couple, groups
from graphopt.errors import DataError, OptionError, PassError
from graphopt.model import Model, from_proto

DENSE = """g (float[N,2] x) => (float[N,1] y)
<float[2,3] up = {1, 2, 0,  1, -2, 0}, float[3,1] down = {3, 3, 3}> {
    h = MatMul(x, up)  a = Relu(h)  y = MatMul(a, down)
}"""


def model(text: str, opset: int = 17) -> Model:
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}'))


def only_group(m: Model) -> list[Group]:
    found = groups(m, couple(m))
    assert len(found) == 1
    return found


def data(m: Model, rows: np.ndarray) -> Dataset:
    return open_dataset({"x": rows.astype(np.float32)}, input_specs(m.proto()))


def test_magnitudes_are_relative_to_each_weight() -> None:
    m = model(DENSE)
    (first,) = l1(m, Context(), only_group(m))
    # columns of `up` have sums 2, 4, 0, their mean is 2; rows of `down` are equal
    np.testing.assert_allclose(first, [1 + 1, 2 + 1, 0 + 1])
    (second,) = l2(m, Context(), only_group(m))
    np.testing.assert_allclose(second, np.sqrt([2 / (10 / 3) + 1, 8 / (10 / 3) + 1, 1]))


def test_scaling_a_weight_changes_nothing() -> None:
    m, scaled = model(DENSE), model(DENSE)
    for c in scaled.constants():
        if c.name == "up":
            c.values = c.values * np.float32(1000)
    np.testing.assert_allclose(l2(m, Context(), only_group(m))[0], l2(scaled, Context(), only_group(scaled))[0])


DEPTHWISE = """g (float[N,2,4,4] x) => (float[N,1,4,4] y)
<float[3,2,1,1] first = {1,1, 1,1, 1,1}, float[3,1,1,1] each = {100, 1, 1}, float[1,3,1,1] last = {1, 1, 1}> {
    a = Conv(x, first)  b = Conv<group=3>(a, each)  y = Conv(b, last)
}"""


def test_depthwise_filters_do_not_decide() -> None:
    m = model(DEPTHWISE)
    np.testing.assert_allclose(l2(m, Context(), only_group(m))[0], np.sqrt([2, 2, 2]))


BN = """g (float[N,2,2,2] x) => (float[N,1,2,2] y)
<float[3,2,1,1] w = {1,1, 1,1, 1,1}, float[3] s = {1, -2, 0}, float[3] b = {0,0,0}, float[3] m = {0,0,0}, float[3] v = {1,1,1},
 float[1,3,1,1] last = {1, 1, 1}> {
    a = Conv(x, w)  n = BatchNormalization(a, s, b, m, v)  y = Conv(n, last)
}"""


def test_bn_scale_takes_the_magnitude_of_the_scale_and_falls_back_where_there_is_none() -> None:
    m, context = model(BN), Context()
    np.testing.assert_allclose(bn_scale(m, context, only_group(m))[0], [1, 2, 0])
    assert context.facts["groups_without_bn_scale"] == 0
    m, context = model(DENSE), Context()
    np.testing.assert_allclose(bn_scale(m, context, only_group(m))[0], l2(m, context, only_group(m))[0])
    assert context.facts["groups_without_bn_scale"] == 1


def test_bn_scale_shift_is_the_size_behind_a_relu() -> None:
    """Against draws: scales 1, -2 and 0, shifts 0.5, -1 and 3; and a unit that a large negative shift silences."""
    m, context = model(BN.replace("b = {0,0,0}", "b = {0.5,-1,3}")), Context()
    draws = np.random.default_rng(0).standard_normal((200_000, 3)) * [1, -2, 0] + [0.5, -1, 3]
    expected = np.sqrt(np.square(np.maximum(draws, 0)).mean(0))
    np.testing.assert_allclose(bn_scale_shift(m, context, only_group(m))[0], expected / expected.mean(), rtol=0.02)
    silent = model(BN.replace("b = {0,0,0}", "b = {-9,0,1}"))
    assert bn_scale_shift(silent, context, only_group(silent))[0].argmin() == 0


@pytest.mark.parametrize("opset", [13, 18])
def test_activation_is_the_mean_magnitude_times_the_norm_of_its_readers(opset: int) -> None:
    m = model(DENSE, opset)
    rows = np.array([[1, 0], [0, 1], [2, 2]])
    (score,) = activation(m, Context(calibration=data(m, rows)), only_group(m))
    hidden = np.maximum(rows @ [[1, 2, 0], [1, -2, 0]], 0).mean(0)  # 2, 2/3, 0
    np.testing.assert_allclose(score, hidden / hidden.mean(), rtol=1e-6)


def test_activation_does_not_depend_on_batches() -> None:
    m = model(DENSE)
    rows = np.random.default_rng(0).standard_normal((50, 2)).astype(np.float32)
    whole = activation(m, Context(calibration=data(m, rows)), only_group(m))[0]

    def one_by_one() -> Iterator[dict[str, np.ndarray]]:
        return ({"x": row[None]} for row in rows)

    streamed = open_dataset(one_by_one, input_specs(m.proto()))
    np.testing.assert_allclose(activation(m, Context(calibration=streamed), only_group(m))[0], whole, rtol=1e-5)


def test_activation_without_data_or_with_broken_data_is_refused() -> None:
    m = model(DENSE)
    with pytest.raises(PassError, match="needs calibration data"):
        activation(m, Context(), only_group(m))
    with pytest.raises(DataError, match="batch 0 makes 'a' NaN or infinite"):
        activation(m, Context(calibration=data(m, np.full((2, 2), 3e38))), only_group(m))


def test_a_plugged_in_criterion_is_found_and_a_clash_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.criteria.CRITERIA", dict(CRITERIA))

    @criterion("constant")
    def constant(model: Model, context: Context, groups: Sequence[Group]) -> list[np.ndarray]:
        return [np.ones(len(g.units)) for g in groups]

    assert find_criterion("constant") is constant
    with pytest.raises(OptionError, match=r"two criteria are named 'l2': one in graphopt\.criteria, one in .*test_criteria"):
        criterion("l2")(constant)
    with pytest.raises(OptionError, match="unknown criterion 'bn-scal'; did you mean 'bn-scale'"):
        find_criterion("bn-scal")
