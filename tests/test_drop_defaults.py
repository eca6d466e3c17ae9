"""drop-defaults: initial states of zeros go, whatever computed them; other states stay."""

from __future__ import annotations

import pytest
from cases import assert_pass

WEIGHTS = "float[1,8,2] w = {1,2,3,4,5,6,7,8,8,7,6,5,4,3,2,1}, float[1,8,2] r = {1,1,1,1,1,1,1,1,2,2,2,2,2,2,2,2}"
HEAD = f"g (float[4,N,2] x) => (float[4,1,N,2] y) <{WEIGHTS}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] zero = {{0}},"
PLAIN = f"{HEAD} float u = {{0}}> {{ y = LSTM<hidden_size = 2>(x, w, r) }}"


@pytest.mark.parametrize("fill", ["", "<value = float[1] {0.0}>"])
def test_zeros_of_the_batch_size(fill: str) -> None:
    """As PyTorch exports them: the batch size from the input, one zero tensor, a slice for each layer."""
    before = f"""{HEAD} int64[1] three = {{3}}> {{
        a = Shape(x) b = Slice(a, one, two) c = Concat<axis = 0>(three, b, two) d = ConstantOfShape{fill}(c)
        h = Slice(d, zero, one) e = Slice(d, one, two) y = LSTM<hidden_size = 2>(x, w, r, , , h, e) }}"""
    assert_pass("drop-defaults", before, PLAIN)


def test_constant_zeros() -> None:
    before = f"{HEAD} float[1,3,2] h = {{0,0,0,0,0,0}}> {{ y = LSTM<hidden_size = 2>(x, w, r, , , h, h) }}"
    assert_pass("drop-defaults", before, PLAIN)


@pytest.mark.parametrize("value", ["{0,0,0,0,0,1}", "{1,1,1,1,1,1}"])
def test_other_states_stay(value: str) -> None:
    graph = f"{HEAD} float[1,3,2] h = {value}> {{ y = LSTM<hidden_size = 2>(x, w, r, , , h, h) }}"
    assert_pass("drop-defaults", graph, None)


def test_states_filled_with_ones_stay() -> None:
    graph = f"""{HEAD} float u = {{0}}> {{ a = Shape(x) b = Slice(a, one, two) c = Concat<axis = 0>(one, b, two)
        h = ConstantOfShape<value = float[1] {{1.0}}>(c) y = LSTM<hidden_size = 2>(x, w, r, , , h) }}"""
    assert_pass("drop-defaults", graph, None)
