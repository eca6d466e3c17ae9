"""Sparse kernels against numpy, on drawn shapes, blocks and densities; and weights that are not what they should be."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.kernels import isa
from graphopt.kernels.native import SparseLayer
from graphopt.kernels.sparse_functions import SparseConv, SparseGemm
from graphopt.kernels.sparse_plan import BITS, BLOCKS, BYTES, CONV, ROWS, SparsePlan, Window, to_bits, to_dense, to_sparse

RUNGS = [name for name in ("avx512vnni", "avx2", "neon_dot", "generic") if isa.available(name)]
Array = np.ndarray


def drawn(rng: np.random.Generator, n: int, k: int, block: tuple[int, int], density: float) -> Array:
    """A matrix [n, k] of which blocks are zero."""
    kept = rng.random((n // block[0], k // block[1])) < density
    weight: Array = rng.normal(size=(n, k)) * np.repeat(np.repeat(kept, block[0], 0), block[1], 1)
    return weight.astype(np.float32)


def reference_conv(x: Array, weight: Array, window: Window) -> Array:
    """float64 convolution of [N, C, H, W], written as sums over the taps."""
    (kh, kw), (sh, sw), (dh, dw), (top, left, bottom, right) = window.kernel, window.strides, window.dilations, window.pads
    padded = np.pad(x.astype(np.float64), ((0, 0), (0, 0), (top, bottom), (left, right)))
    oh, ow = (padded.shape[2] - (kh - 1) * dh - 1) // sh + 1, (padded.shape[3] - (kw - 1) * dw - 1) // sw + 1
    n, o, g = x.shape[0], weight.shape[0], window.groups
    out = np.zeros((n, o, oh, ow))
    taps = weight.reshape(g, o // g, -1, kh, kw)
    for y in range(kh):
        for z in range(kw):
            part = padded[:, :, y * dh : y * dh + (oh - 1) * sh + 1 : sh, z * dw : z * dw + (ow - 1) * sw + 1 : sw]
            part = part.reshape(n, g, -1, oh, ow)
            out += np.einsum("goc,ngchw->ngohw", taps[..., y, z].astype(np.float64), part).reshape(n, o, oh, ow)
    return out


def close(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == np.float32
    scale = max(1.0, float(np.abs(wanted).max(initial=0)))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("block", [*BLOCKS, (3, 2)])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_stored_weights_come_back(block: tuple[int, int], density: float) -> None:
    shape = (48, 600)
    weight = drawn(np.random.default_rng(0), *shape, block, density)
    values, gaps = to_sparse(weight, block)
    assert values.dtype == np.float32
    assert gaps.dtype == np.uint8
    assert gaps.min() > 0
    np.testing.assert_array_equal(to_dense(values, gaps, shape, block), weight)


def test_stored_weights_are_small() -> None:
    weight = drawn(np.random.default_rng(0), 256, 512, (1, 1), 0.2)
    values, gaps = to_sparse(weight)
    assert values.nbytes + gaps.nbytes < 0.27 * weight.nbytes


@pytest.mark.parametrize(("weight", "block"), [(np.ones((4, 6)), (4, 4)), (np.full((4, 4), np.nan), (1, 1))])
def test_weights_that_cannot_be_stored(weight: Array, block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="sparse weights: "):
        to_sparse(weight.astype(np.float32), block)


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_products(rung: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    block = data.draw(st.sampled_from(BLOCKS))
    n, k = block[0] * data.draw(st.integers(1, 9)), block[1] * data.draw(st.integers(1, 150))
    rows = data.draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 24, 33, 64, 65, 130]))
    weight = drawn(rng, n, k, block, data.draw(st.sampled_from([0.0, 0.05, 0.3, 0.9])))
    bias = rng.normal(size=n).astype(np.float32) if data.draw(st.booleans()) else None
    x, r = rng.normal(size=(rows, k)).astype(np.float32), rng.normal(size=(rows, n)).astype(np.float32)
    summed, limited = data.draw(st.booleans()), data.draw(st.booleans())
    low, high = (0.0, 6.0) if limited else (-np.inf, np.inf)
    layer = SparseGemm(weight, bias=bias, block=block, low=low, high=high, residual=summed, isa=rung)
    wanted = x.astype(np.float64) @ weight.T + (0 if bias is None else bias) + (r if summed else 0)
    close(layer(x, r) if summed else layer(x), np.clip(wanted, low, high))


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_bitmaps_and_int8_values(rung: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    bitmap, integers = data.draw(st.booleans()), data.draw(st.booleans())
    block = (1, 1) if bitmap else data.draw(st.sampled_from(BLOCKS))
    n, k = block[0] * data.draw(st.integers(1, 9)), block[1] * data.draw(st.integers(1, 150))
    rows = data.draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 11]))
    weight = drawn(rng, n, k, block, data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])))
    scale = rng.uniform(0.01, 2, n).astype(np.float32) if integers else None
    given_weight = np.clip(50 * weight, -128, 127).astype(np.int8) if integers else weight
    dense = weight if scale is None else given_weight * scale[:, None]
    bias = rng.normal(size=n).astype(np.float32) if data.draw(st.booleans()) else None
    x, r = rng.normal(size=(rows, k)).astype(np.float32), rng.normal(size=(rows, n)).astype(np.float32)
    summed = data.draw(st.booleans())
    low = 0.0 if data.draw(st.booleans()) else -np.inf
    layer = SparseGemm(given_weight, scale=scale, bias=bias, block=block, bitmap=bitmap, low=low, residual=summed, isa=rung)
    wanted = x.astype(np.float64) @ dense.T + (0 if bias is None else bias) + (r if summed else 0)
    close(layer(x, r) if summed else layer(x), np.maximum(wanted, low))


def test_a_bitmap_of_every_byte() -> None:
    weight = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32)
    values, bits = to_bits(weight)
    assert bits.tolist() == list(range(256))
    assert len(values) == 1024
    weight *= np.arange(1, 9, dtype=np.float32)
    for rung in RUNGS:
        found = SparseGemm(weight, bitmap=True, isa=rung)(np.eye(8, dtype=np.float32))
        np.testing.assert_array_equal(found, weight.T)


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_convolutions(rung: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    small = st.integers(1, 3)
    depthwise = data.draw(st.booleans())
    block = (1, 1) if depthwise else data.draw(st.sampled_from([(1, 1), (4, 1), (16, 1)]))
    groups = data.draw(st.integers(2, 9)) if depthwise else data.draw(st.sampled_from([1, 1, 2]))
    c = 1 if depthwise else data.draw(st.sampled_from([1, 3, 130]))
    o = groups if depthwise else groups * block[0] * data.draw(small)
    pads = data.draw(st.tuples(*[st.integers(0, 2)] * 4))
    kernel, strides, dilations = (data.draw(st.tuples(small, small)) for _ in range(3))
    window = Window(kernel, strides, dilations, pads, groups)
    (kh, kw), (dh, dw) = window.kernel, window.dilations
    h = data.draw(st.sampled_from([1, 2, 5, 9, 20])) + max(0, (kh - 1) * dh - pads[0] - pads[2])
    w = data.draw(st.sampled_from([1, 2, 7, 8, 14, 33, 75])) + max(0, (kw - 1) * dw - pads[1] - pads[3])
    weight = drawn(rng, o, c * kh * kw, block, data.draw(st.sampled_from([0.1, 0.4, 1.0]))).reshape(o, c, kh, kw)
    bias, x = rng.normal(size=o).astype(np.float32), rng.normal(size=(2, c * groups, h, w)).astype(np.float32)
    wanted = reference_conv(x, weight, window) + bias[:, None, None]
    summed = data.draw(st.booleans())
    layer = SparseConv(
        weight, bias=bias, block=block, strides=window.strides, dilations=window.dilations, pads=pads, low=0, residual=summed,
        groups=groups, isa=rung,
    )  # fmt: skip
    r = rng.normal(size=wanted.shape).astype(np.float32)
    close(layer(x, r) if summed else layer(x), np.maximum(wanted + (r if summed else 0), 0))


def test_shapes_may_change_and_be_empty() -> None:
    rng = np.random.default_rng(0)
    weight = drawn(rng, 8, 20, (1, 1), 0.3)
    layer = SparseGemm(weight)
    for shape in ((3, 20), (2, 5, 20), (20,), (0, 20), (70, 20), (3, 20)):
        x = rng.normal(size=shape).astype(np.float32)
        close(layer(x), x.astype(np.float64) @ weight.T)
    conv = SparseConv(weight.reshape(8, 20, 1, 1))
    assert conv(np.zeros((0, 20, 4, 4), np.float32)).shape == (0, 8, 4, 4)
    line = SparseLayer(SparsePlan(CONV, 8, 5, (1, 1), Window((1, 4), pads=(0, 1, 0, 2))), list(to_sparse(weight)))
    x = rng.normal(size=(2, 5, 13)).astype(np.float32)
    close(line(x)[0], reference_conv(x[:, :, None], weight.reshape(8, 5, 1, 4), Window((1, 4), pads=(0, 1, 0, 2)))[:, :, 0])


def test_nan_in_the_input_stays_in_its_pixels() -> None:
    weight = np.ones((4, 3, 1, 1), np.float32)
    x = np.zeros((1, 3, 1, 40), np.float32)
    x[0, 1, 0, 7] = np.nan
    found = SparseConv(weight, low=0, high=6)(x)
    assert np.isnan(found[0, :, 0, 7]).all()
    assert np.isfinite(np.delete(found, 7, axis=3)).all()


_PLAN = SparsePlan(ROWS, 4, 6, (1, 1), bias=True)
_VALUES, _GAPS = to_sparse(np.arange(24, dtype=np.float32).reshape(4, 6))
_BIAS = np.zeros(4, np.float32)


def changed(gaps: Array, index: int, value: int) -> Array:
    found: Array = gaps.copy()
    found[index] = value
    return found


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ([_VALUES, _GAPS], "another number of constants"),
        ([_VALUES, changed(_GAPS, 5, 0), _BIAS], "a gap is 0 or leads out of the weights: number .5"),
        ([_VALUES, changed(_GAPS, -1, 9), _BIAS], "a gap is 0 or leads out of the weights: number .22"),
        ([_VALUES[:-1], _GAPS, _BIAS], "gaps must be uint8"),
        ([_VALUES.astype(np.int32), _GAPS, _BIAS], "values must be "),
        ([_VALUES[:, 0], _GAPS, _BIAS], "values must be "),
        ([_VALUES, _GAPS.astype(np.int32), _BIAS], "gaps must be uint8"),
        ([_VALUES[:0], _GAPS[:0], _BIAS], "blocks at least 1"),
        ([_VALUES, _GAPS, _BIAS[:3]], "bias and scales must be float32"),
        ([_VALUES, _GAPS, _BIAS + np.nan], "a bias or scale is NaN or infinite"),
        ([np.where(_VALUES == 3, np.inf, _VALUES), _GAPS, _BIAS], "a weight is NaN or infinite: number .2"),
    ],
)
def test_malformed_weights(constants: list[Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLayer(_PLAN, constants)


_BITMAP = SparsePlan(ROWS, 3, 5, (1, 1), places=BITS, numbers=BYTES)
_LEVELS, _BITS = to_bits(np.eye(3, 5, dtype=np.int8))
_SCALES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("constants", "message"),
    [
        ([_LEVELS, _BITS], "another number of constants"),
        ([_LEVELS, changed(_BITS, 0, 255), _SCALES], "another number of bits than there are values .9"),
        ([_LEVELS, np.array([0, 3 + 128], np.uint8), _SCALES], "bits behind the last weight .15"),
        ([_LEVELS, _BITS[:1], _SCALES], "a bitmap must be uint8"),
        ([_LEVELS, _BITS.astype(np.int8), _SCALES], "a bitmap must be uint8"),
        ([_LEVELS.astype(np.float32), _BITS, _SCALES], "float32 or int8 as planned"),
        ([_LEVELS, _BITS, changed(_SCALES, 1, 0)], "a scale is not above 0, or as large as to leave float32: number .1"),
        ([_LEVELS, _BITS, _SCALES * np.float32(1e37)], "as large as to leave float32"),
        ([_LEVELS, _BITS, _SCALES * np.nan], "a bias or scale is NaN"),
    ],
)
def test_malformed_bitmaps(constants: list[Array], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLayer(_BITMAP, constants)


def test_weights_that_kernels_do_not_take() -> None:
    with pytest.raises(ValueError, match="a bitmap places single weights, not blocks of 4 x 1"):
        SparseGemm(np.ones((4, 4), np.float32), block=(4, 1), bitmap=True)
    with pytest.raises(ValueError, match="a weight of int8 without scales"):
        SparseGemm(np.ones((4, 4), np.int8))


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 5), np.float32), "does not fit the weights"),
        (np.zeros((2, 6), np.int32), "activations must be float32"),
        (np.zeros((), np.float32), "does not fit the weights"),
    ],
)
def test_activations_that_do_not_fit(x: Array, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseLayer(_PLAN, [_VALUES, _GAPS, _BIAS])(x)


def test_residual_and_window_that_do_not_fit() -> None:
    summed = SparseGemm(np.ones((4, 3), np.float32), residual=True)
    with pytest.raises(ValueError, match="the residual must have the shape of the output"):
        summed(np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="the kernel does not fit"):
        SparseConv(np.ones((4, 1, 3, 3), np.float32))(np.zeros((1, 1, 2, 9), np.float32))
    with pytest.raises(ValueError, match="blocks of 2 x 2; valid: 1 x 1, "):
        SparseGemm(np.ones((4, 4), np.float32), block=(2, 2))


@pytest.mark.parametrize("first", [0, 5000])
def test_ten_thousand_malformed_inputs(first: int) -> None:
    script = Path(__file__).with_name("sparse_fuzz.py")
    done = subprocess.run([sys.executable, str(script), str(first), "5000"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    refused, ran = (int(n) for n in done.stdout.split())
    assert refused > 3000
    assert ran > 200


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])])
def test_malformed_layers_are_refused_when_the_session_is_made(count: int) -> None:
    script = Path(__file__).with_name("sparse_session_fuzz.py")
    done = subprocess.run([sys.executable, str(script), "0", str(count)], capture_output=True, text=True, timeout=1700)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-500:]
    refused, failed, ran = (int(n) for n in done.stdout.split())
    assert refused > 0.6 * count
    assert failed < 0.2 * count  # plans that are right, but not for these inputs
    assert refused + failed + ran == count
