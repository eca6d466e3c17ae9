"""The kernels on numpy arrays against the formulas written out."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.kernels import functions
from graphopt.kernels.functions import Scale

RNG = np.random.default_rng(0)


def requantised(acc: np.ndarray, multiplier: np.ndarray, zero: int) -> np.ndarray:
    rounded: np.ndarray = np.clip(np.rint(acc.astype(np.float32) * multiplier) + zero, 0, 255)
    return rounded.astype(np.uint8)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_gemm_quantised(rows: int) -> None:
    x, w = RNG.integers(0, 256, (rows, 33), dtype=np.uint8), RNG.integers(-127, 128, (33, 21)).astype(np.int8)
    ws, bias = RNG.uniform(0.01, 0.02, 21).astype(np.float32), RNG.integers(-999, 999, 21).astype(np.int32)
    got = functions.qgemm(x, w, weight_scale=ws, x_scale=0.05, x_zero=7, bias=bias, out=Scale(0.3, 99))
    acc = (x.astype(np.int64) - 7) @ w.astype(np.int64) + bias
    np.testing.assert_array_equal(got, requantised(acc, np.float32(0.05) * ws / np.float32(0.3), 99))


def test_gemm_float_output_of_signed_rows() -> None:
    x, w = RNG.integers(-128, 128, (2, 3, 40)).astype(np.int8), RNG.integers(-127, 128, (40, 9)).astype(np.int8)
    bias = RNG.standard_normal(9).astype(np.float32)
    got = functions.qgemm(x, w, weight_scale=0.01, x_scale=0.5, x_zero=-3, bias=bias)
    acc = (x.astype(np.int64) + 3) @ w.astype(np.int64)
    np.testing.assert_array_equal(got, acc.astype(np.float32) * (np.float32(0.5) * np.float32(0.01)) + bias)


def test_conv_of_one_dimension() -> None:
    x, w = RNG.integers(0, 256, (2, 4, 17), dtype=np.uint8), RNG.integers(-127, 128, (6, 4, 3)).astype(np.int8)
    got = functions.qconv(x, w, weight_scale=0.01, given=Scale(0.1, 5), out=Scale(0.7, 8), pads=(0, 1, 0, 1))
    wide = np.pad(x.astype(np.int64) - 5, ((0, 0), (0, 0), (1, 1)))
    acc = sum(np.einsum("ncl,oc->nol", wide[:, :, k : k + 17], w[:, :, k].astype(np.int64)) for k in range(3))
    np.testing.assert_array_equal(got, requantised(np.asarray(acc), np.float32(0.1) * np.float32(0.01) / np.float32(0.7), 8))


def test_transposed_conv_of_stride_two() -> None:
    x, w = RNG.integers(0, 256, (1, 3, 4, 5), dtype=np.uint8), RNG.integers(-127, 128, (3, 2, 2, 2)).astype(np.int8)
    got = functions.qconv(x, w, weight_scale=0.01, given=Scale(0.1), out=Scale(0.7, 128), strides=(2, 2), transposed=True)
    acc = np.einsum("nchw,cokl->nohkwl", x.astype(np.int64), w.astype(np.int64)).reshape(1, 2, 8, 10)
    np.testing.assert_array_equal(got, requantised(acc, np.float32(0.1) * np.float32(0.01) / np.float32(0.7), 128))


def test_add_mul_and_pools_are_near_the_real_numbers() -> None:
    a, b = RNG.integers(0, 256, (1, 20, 6, 6), dtype=np.uint8), RNG.integers(0, 256, (1, 20, 1, 1), dtype=np.uint8)
    sa, sb = Scale(0.02, 100), Scale(0.03, 9)
    real_a, real_b = 0.02 * (a.astype(float) - 100), 0.03 * (b.astype(float) - 9)
    for got, wanted, out in (
        (functions.qadd(a, b, sa, sb, Scale(0.06, 30)), real_a + real_b, Scale(0.06, 30)),
        (functions.qmul(a, b, sa, sb, Scale(0.2, 80)), real_a * real_b, Scale(0.2, 80)),
        (functions.qpool(a, sa, Scale(0.02, 90), kind="global"), real_a.mean((2, 3), keepdims=True), Scale(0.02, 90)),
        (functions.qpool(a, sa, sa, kind="max", kernel=(6, 6)), real_a.max((2, 3), keepdims=True), sa),
    ):
        exact = np.clip(wanted / out.scale + out.zero, 0, 255)
        assert np.abs(got - exact).max() <= 0.501


def test_dynamic_products_are_near_the_real_ones() -> None:
    x, w = RNG.standard_normal((5, 64)).astype(np.float32), RNG.integers(-127, 128, (64, 30)).astype(np.int8)
    x[2] = 0
    got = functions.DynamicGemm(w, weight_scale=0.01)(x)
    wanted = x @ (w.astype(np.float32) * 0.01)
    assert np.abs(got - wanted).max() < 0.02 * np.abs(wanted).max()
    assert not got[2].any()
    with pytest.raises(ValueError, match="NaN or infinite"):
        functions.quantise_rows(np.array([[np.nan]], np.float32))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ValueError, match="step 1: the weight is missing or not int8"):
        functions.qgemm(np.zeros((1, 3), np.uint8), np.zeros((3, 2), np.uint8), weight_scale=1.0, x_scale=1.0)
    layer = functions.QGemm(np.ones((3, 2), np.int8), weight_scale=1.0, x_scale=1.0)
    with pytest.raises(ValueError, match="other channels"):
        layer(np.zeros((1, 4), np.uint8))
