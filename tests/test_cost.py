"""Parameters and MACs, against counts by hand."""

from __future__ import annotations

from math import prod

import onnx.parser
import pytest

from graphopt.cost import costs, parameters
from graphopt.model import Model, from_proto
from graphopt.shapes import shapes


def model(text: str, opset: int = 17) -> Model:
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft": 1]> {text}'))


def macs(text: str) -> int:
    m = model(text)
    counted = costs(m, shapes(m))
    assert counted.uncounted == ()
    recounted = sum(t.factor * prod(counted.sizes[a] for a in t.axes) for n in counted.nodes for t in n.terms)
    assert counted.macs == recounted
    return counted.macs


WEIGHT = "g (float[{x}] x, float[{w}] w) => (float[{y}] y) {{ y = {op}(x, w) }}"

CASES = {
    "Conv": ("Conv<pads=[1,1,1,1]>", "1,3,8,8", "16,3,3,3", "1,16,8,8", 16 * 64 * 27),
    "strided": ("Conv<strides=[2,2]>", "1,3,9,9", "16,3,3,3", "1,16,4,4", 16 * 16 * 27),
    "depthwise": ("Conv<group=8>", "1,8,5,5", "8,1,3,3", "1,8,3,3", 8 * 9 * 9),
    "grouped": ("Conv<group=2>", "1,8,4,4", "6,4,1,1", "1,6,4,4", 16 * 6 * 4),
    "ConvTranspose": ("ConvTranspose<strides=[2,2]>", "1,8,5,5", "8,4,2,2", "1,4,10,10", 25 * 8 * 4 * 4),
    "Gemm": ("Gemm<transB=1>", "2,10", "7,10", "2,7", 2 * 7 * 10),
    "transposed Gemm": ("Gemm<transA=1>", "10,2", "10,7", "2,7", 2 * 7 * 10),
    "MatMul": ("MatMul", "2,5,10", "10,7", "2,5,7", 2 * 5 * 7 * 10),
    "vectors": ("MatMul", "10", "10", "", 10),
    "Einsum": ('Einsum<equation="bij,bjk->bik">', "2,3,4", "2,4,5", "2,3,5", 2 * 3 * 4 * 5),
    "elementwise": ("Add", "2,3", "2,3", "2,3", 0),
}


@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_counted_by_hand(name: str) -> None:
    op, x, w, y, expected = CASES[name]
    text = WEIGHT.format(op=op, x=x, w=w, y=y)
    assert macs(text.replace("float[]", "float") if y == "" else text) == expected


def test_recurrent_nets_multiply_by_both_matrices_in_every_step() -> None:
    text = """g (float[5,2,3] x, float[1,16,3] w, float[1,16,4] r) => (float[5,1,2,4] y) { y = LSTM<hidden_size=4>(x, w, r) }"""
    assert macs(text) == 5 * 2 * (16 * 3 + 16 * 4)


def test_quantised_ops_count_like_their_float_ones() -> None:
    text = "g (uint8[2,2] x) => (int32[2,3] y) <int8[2,3] w = {1, 2, 3, 4, 5, 6}> { y = MatMulInteger(x, w) }"
    assert macs(text) == 2 * 2 * 3
    assert parameters(model(text)) == 6


def test_dynamic_axes_take_nominal_sizes_and_say_so() -> None:
    text = """g (float[N,3,H,W] x, int64[N,T] z, float[M,S] u, float[4,3,1,1] w) => (float[N,4,H,W] y, int64[N,T] v, float[M,S] t)
    { y = Conv(x, w)  v = Abs(z)  t = Relu(u) }"""
    m = model(text)
    counted = costs(m, shapes(m))
    assert counted.macs == 224 * 224 * 12
    assert counted.assumed == {"x[N]": 1, "x[H]": 224, "x[W]": 224, "z[T]": 64, "u[M]": 1, "u[S]": 512}
    assert costs(m, shapes(m), sizes={"H": 10, "x[3]": 20}).macs == 10 * 20 * 12


def test_sizes_follow_formulas_of_symbols() -> None:
    text = """g (float[N,3,H,W] x, float[4,3,3,3] w) => (float[A,4,B,C] y) {
        a = Concat<axis=2>(x, x)  y = Conv<strides=[2,2],pads=[1,1,1,1]>(a, w)
    }"""
    m = model(text)
    assert costs(m, shapes(m), sizes={"H": 9, "W": 8}).macs == 9 * 4 * 4 * 27
    assert costs(m, shapes(m)).assumed == {"x[N]": 1, "x[H]": 224, "x[W]": 224}


def test_what_no_formula_tells_is_inferred_from_the_sizes() -> None:
    text = """g (float[1,1,H,4] x, float[1,1,K,4] z, float[1,1,1,1] w) => (float[1,1,B,C] y) { a = Add(x, z)  y = Conv(a, w) }"""
    m = model(text)
    assert costs(m, shapes(m), sizes={"H": 5, "K": 1}).macs == 20


def test_what_cannot_be_counted_is_named_and_not_guessed() -> None:
    m = model("g (float[2,4] x) => (float[2,4] y) { a = com.microsoft.Strange(x)  y = com.microsoft.Gelu(a) }")
    counted = costs(m, shapes(m))
    assert (counted.macs, counted.counted_macs) == (None, 0)
    assert [reason for _, reason in counted.uncounted] == ["no rule counts the MACs of this op"]


def test_parameters_are_weights_and_not_shapes_bounds_or_scalars() -> None:
    text = """g (float[1,2,2,2] x) => (float[4,1] y)
    <float[2] scale = {1, 2}, float low = {0}, float high = {6}, int64[2] shape = {4, 2}, float[2,1] w = {1, 2}> {
        a = Mul(x, low)
        b = Clip(a, low, high)
        c = Reshape(b, shape)
        d = Mul(c, scale)
        y = MatMul(d, w)
    }"""
    m = model(text)
    counted = costs(m, shapes(m))
    assert (counted.parameters, counted.weight_bytes) == (4, 16)


def test_a_weight_used_twice_counts_once_but_its_macs_twice() -> None:
    text = """g (float[1,2] x) => (float[1,2] y) <float[2,2] w = {1, 2, 3, 4}> { a = MatMul(x, w)  y = MatMul(a, w) }"""
    m = model(text)
    counted = costs(m, shapes(m))
    assert (counted.parameters, counted.macs) == (4, 8)


def test_qdq_weights_count_and_scales_do_not() -> None:
    text = """g (float[1,2] x) => (float[1,2] y)
    <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {0.5, 0.5}, int8[2] z = {0, 0}, int32[2] b = {1, 2}, float[2] bs = {0.1, 0.1}> {
        a = DequantizeLinear<axis=1>(w, s, z)
        c = DequantizeLinear<axis=0>(b, bs)
        y = Gemm(x, a, c)
    }"""
    assert parameters(model(text)) == 6


def test_the_costliest_branch_of_an_if_counts() -> None:
    text = """g (bool c, float[1,2] x, float[2,2] w) => (float[1,2] y) {
        y = If(c) <
            then_branch = t () => (float[1,2] u) { a = MatMul(x, w)  u = MatMul(a, w) },
            else_branch = e () => (float[1,2] v) { v = MatMul(x, w) }
        >
    }"""
    m = model(text)
    counted = costs(m, shapes(m))
    assert counted.macs == 8
    assert len(counted.nodes) == 2
