"""The op table, scale classes, and the arithmetic of scales, weights and biases."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quant_cases import build, normal, outputs

from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.feeds import input_specs
from graphopt.model import from_proto
from graphopt.quant import QOPS, quantised_ops
from graphopt.quant_bias import channel_means, shift
from graphopt.quant_numbers import least_scales, parameters, quantise_bias, quantise_weight
from graphopt.quant_plan import Plan, Selection, plan
from graphopt.shapes import shapes
from graphopt.targets import OPENVINO, ORT_CPU

FINITE = st.floats(-(2.0**100), 2.0**100, width=32)


@given(FINITE, FINITE, st.sampled_from([np.uint8, np.int8]), st.booleans())
def test_parameters_cover_the_range_and_hold_zero_exactly(a: float, b: float, dtype: type, symmetric: bool) -> None:
    low, high = sorted((a, b))
    p = parameters(low, high, np.dtype(dtype), symmetric=symmetric)
    info = np.iinfo(dtype)
    assert info.min <= p.zero <= info.max
    assert p.scale > 0
    assert p.quantise(np.zeros(1, np.float32))[0] == p.zero
    slack = float(p.scale) * 0.51
    assert p.low <= min(low, 0) + slack
    assert p.high >= max(high, 0) - slack


def test_symmetric_parameters_have_zero_point_0_and_use_127_steps() -> None:
    p = parameters(-2.0, 1.0, np.dtype(np.int8), symmetric=True)
    assert p.zero == 0
    assert float(p.scale) == pytest.approx(2 / 127)


@given(st.integers(0, 2**31), st.sampled_from([7, 8]), st.sampled_from([0, 1, None]))
def test_weights_are_off_by_half_a_step_at_most(seed: int, bits: int, axis: int | None) -> None:
    values = np.random.default_rng(seed).standard_normal((5, 7, 3)).astype(np.float32)
    weight = quantise_weight(values, axis, bits=bits)
    limit = 2 ** (bits - 1) - 1
    assert int(np.abs(weight.values.astype(int)).max()) == limit
    assert np.abs(weight.error(values, axis or 0)).max() <= weight.scales.max() * 0.5001


def test_zero_channel_and_bias_beyond_int32() -> None:
    values, bias = np.zeros((2, 4), np.float32), np.array([0.0, 5.0], np.float32)
    weight = quantise_weight(values, 0, bits=8, least=least_scales(bias, np.float32(1e-9)))
    integers, scales = quantise_bias(bias, np.float32(1e-9), weight.scales)
    assert weight.scales[0] == 1
    assert np.allclose(integers * scales, bias, rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "op", "reason"),
    [
        ("g (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = Gemm<alpha=2.0>(x, w) }", "Gemm", "alpha, beta"),
        ("g (float[N,4] x, float[N,4] z) => (float y) { t = Transpose(z) y = MatMul(x, t) }", "MatMul", "two activations"),
        ("g (float[N,4,4,4] x, float[4] s) => (float y) { y = Resize<mode=\"linear\">(x, , s) }", "Resize", "interpolates"),
        ("g (float[N,4] x) => (float[N,4] y) { y = Mul(x, x) }", "Mul", "squares"),
        ("g (float[N,4] x, float[4] b) => (float[N,4] y) { y = Add(x, b) }", "Add", "constant"),
        ("g (float[N,4,4] x) => (float y) { i = Cast<to=7>(x) y = Gather(w, i) }", "Gather", "data is constant"),
    ],
)  # fmt: skip
def test_a_node_that_does_not_fit_its_row_says_why(body: str, op: str, reason: str) -> None:
    shapes_of = {"w": (4, 4), "b": (4,)}
    arrays: dict[str, Any] = {k: normal(*shape) for k, shape in shapes_of.items() if f" {k})" in body or f"({k}" in body}
    if "Resize" in body:
        arrays = {"s": np.array([1, 1, 2, 2], np.float32)}
    planned = _plan(build(body, **arrays))
    assert any(reason in why for why, name in planned.floats if name == op)


def _plan(proto: onnx.ModelProto, *, shuffle: int | None = None) -> Plan:
    model = from_proto(proto)
    known = shapes(model)
    if shuffle is not None:
        random.Random(shuffle).shuffle(model.graph.nodes)
    return plan(model, known, ORT_CPU, Selection(), lambda node, reason: None)


def test_scale_classes_do_not_depend_on_the_order_of_nodes() -> None:
    body = """g (float[N,16,8,8] x, float[16,16,3,3] w) => (float y, float z) {
        a = Conv(x, w) b = Conv(x, w) c = Concat<axis=1>(a, b) d = MaxPool<kernel_shape=[2,2]>(c) e = Transpose<perm=[0,2,3,1]>(a)
        f = Transpose<perm=[0,3,1,2]>(e) y = Conv(f, w) h = Slice(d, k, l, m) z = Conv(h, w) }"""
    arrays: dict[str, Any] = {"k": np.array([0]), "l": np.array([16]), "m": np.array([1])}
    proto = build(body.replace("w) =>", "w, int64[1] k, int64[1] l, int64[1] m) =>"), w=normal(16, 16, 3, 3), **arrays)
    found = [{frozenset(t.name for t in c) for c in _plan(proto, shuffle=n).classes} for n in (None, 1, 2, 3)]
    assert frozenset("abcdefh") in found[0]
    assert all(classes == found[0] for classes in found)


def test_every_row_of_the_table_is_an_onnx_op_and_known_to_the_default_target() -> None:
    for op in QOPS:
        onnx.defs.get_schema(op)
        assert op in ORT_CPU.ops, op


@pytest.mark.parametrize("op", ["QuantizeLinear", "ConvInteger", "QLinearConv", "DynamicQuantizeLSTM", "MatMulNBits", "QGemm"])
def test_quantised_models_are_recognised(op: str) -> None:
    model = from_proto(build("g (float[4] x) => (float[4] y) { y = Relu(x) }"))
    model.graph.nodes[0].op = op
    assert quantised_ops(model) == {op: 1}


def test_ordinary_ops_are_not_taken_for_quantised_ones() -> None:
    assert not quantised_ops(from_proto(build("g (float[4] x) => (float[4] y) { y = Relu(x) }")))


@pytest.mark.parametrize(
    "text",
    [
        "g (float[N,8,9,9] x, float[6,4,3,3] w, float[6] b) => (float y) { y = Conv<group=2>(x, w, b) }",
        "g (float[N,8] x, float[8,6] w, float[6] b) => (float y) { y = Gemm(x, w, b) }",
        "g (float[N,8] x, float[6,8] w, float[6] b) => (float y) { y = Gemm<transB=1>(x, w, b) }",
        "g (float[N,5,8] x, float[8,6] w, float[6] b) => (float y) { m = MatMul(x, w) y = Add(m, b) }",
    ],
)
def test_shift_is_the_mean_that_a_weight_error_adds(text: str) -> None:
    shape = [int(d) for d in text.split("w")[0].rsplit("[", 1)[1].split("]")[0].split(",")]
    proto = build(text, w=normal(*shape), b=normal(6))
    node: gs.Node = next(n for n in from_proto(proto).graph.nodes if n.op in ("Conv", "Gemm", "MatMul"))
    inputs = [8, 9, 9] if node.op == "Conv" else [5, 8] if node.op == "MatMul" else [8]
    data = {
        "x": normal(24, *inputs) + np.arange(8, dtype=np.float32).reshape([8] + [1] * (len(inputs) - 1) if node.op == "Conv" else 8)
    }
    mean = channel_means(proto.SerializeToString(), open_dataset(data, input_specs(proto)), [node], 17)["x"]
    wrong = build(text, w=normal(*shape) + np.float32(0.1) * normal(*shape, seed=5), b=normal(6))
    axes = (0, 2, 3) if node.op == "Conv" else tuple(range(len(inputs)))
    moved = (outputs(wrong, data)[0] - outputs(proto, data)[0]).mean(axes)
    expected = shift(node, np.float32(0.1) * normal(*shape, seed=5), mean)
    assert np.allclose(moved, expected, atol=0.15 * np.abs(moved).max())


def test_a_target_without_a_row_gives_its_reason() -> None:
    model = from_proto(build("g (float[N,8] x) => (float y) { y = Softmax(x) }"))
    planned = plan(model, Context().get(shapes, model), OPENVINO, Selection(), lambda node, reason: None)
    assert planned.floats == {("computed in float, fused behind the primitive before it", "Softmax"): 1}
