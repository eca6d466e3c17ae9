"""compile-int8: the function body is what was there, the plan computes the same, and what cannot be lowered says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from region_cases import Graph, compiled, feed, judge, plan_of, regions, session, steps

from graphopt.api import optimize
from graphopt.errors import PassError
from graphopt.kernels import plan as p
from graphopt.kernels import reference_plan
from graphopt.model import from_proto, load
from graphopt.region_lower import sum_scales
from graphopt.region_values import Numbers
from graphopt.registry import find

Build = Callable[[Graph], str]


def conv_case(channels: int, filters: int, kernel: tuple[int, ...], size: tuple[int, ...], **attributes: object) -> Build:
    def build(g: Graph) -> str:
        x = g.q(g.input("N", channels, *size))
        return g.q(g.conv(x, channels, filters, kernel, **attributes), 0.3, 100)

    return build


CONVS: dict[str, Build] = {
    "3x3": conv_case(5, 7, (3, 3), (6, 8)),
    "strides": conv_case(3, 8, (3, 3), (9, 7), strides=[2, 2], pads=[0, 1, 2, 1]),
    "dilated": conv_case(4, 4, (3, 3), (9, 9), dilations=[2, 2], pads=[2, 2, 2, 2]),
    "depthwise": conv_case(6, 6, (5, 5), (7, 7), group=6),
    "grouped": conv_case(8, 4, (1, 1), (4, 4), group=2, pads=[0, 0, 0, 0]),
    "1-d": conv_case(4, 6, (5,), (12,)),
    "dynamic-size": conv_case(3, 4, (3, 3), ("h", "w")),  # type: ignore[arg-type]
    "auto-pad": conv_case(3, 4, (3, 3), (7, 8), strides=[2, 2], auto_pad="SAME_UPPER", pads=None),
}


@pytest.mark.parametrize("name", CONVS)
def test_convolutions(name: str) -> None:
    g = Graph()
    model = judge(g.model(CONVS[name](g)), h=6, w=9)
    (node,) = regions(model)
    assert steps(node) == {p.INPUT: 1, p.CONV: 1, p.OUTPUT: 1}
    assert [n.op for n in model.nodes()] == ["Int8Region0"]


@pytest.mark.parametrize(
    "attributes", [{}, {"strides": [2, 2]}, {"strides": [2, 1], "pads": [1, 0, 1, 2], "output_padding": [1, 0]}]
)
def test_transposed_convolution_is_within_rounding_of_float(attributes: dict[str, Any]) -> None:
    g = Graph()
    x = g.q(g.input("N", 4, 5, 6))
    y = g.op("ConvTranspose", x, g.weight(4, 6, 3, 3, axis=1), g.bias(6), **attributes)
    judge(g.model(g.q(y, 0.3, 100)), most=0.3 * 1.001)  # onnxruntime computes it in float: a half may round the other way


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("kind", ["int8", "uint8", "nncf", "per-tensor"])
def test_weights_and_activations_of_every_kind(kind: str, dtype: type) -> None:
    g = Graph()
    zero = 120 if dtype == np.uint8 else -8
    x = g.q(g.input("N", 4, 6, 6), 0.05, zero, dtype)
    options = {"uint8": {"dtype": np.uint8}, "nncf": {"real": True}, "per-tensor": {"per_channel": False}}.get(kind, {})
    w = g.weight(6, 4, 3, 3, **options)  # type: ignore[arg-type]
    model = judge(g.model(g.q(g.op("Conv", x, w, g.bias(6)), 0.3, zero, dtype)))
    assert {t.dtype for t in regions(model)[0].inputs[1:]} == {np.dtype(k) for k in (np.int8, np.float32, np.int32)}


def test_int8_weights_are_not_stored_twice() -> None:
    g = Graph()
    proto = g.model(g.q(g.conv(g.q(g.input("N", 32, 6, 6)), 32, 64), 0.3))
    model = judge(proto)
    assert len(model.proto().SerializeToString()) < len(proto.SerializeToString()) + 3500
    assert {t.name for t in regions(model)[0].inputs[1:]} <= {i.name for i in proto.graph.initializer}


def test_a_float_bias_is_rounded_and_the_body_still_adds_it() -> None:
    g = Graph()
    x = g.q(g.input("N", 4, 6, 6))
    bias = g.constant(g.random.standard_normal(6), np.float32)
    judge(g.model(g.q(g.op("Conv", x, g.weight(6, 4, 3, 3), bias), 0.3, 100)))


@pytest.mark.parametrize("order", ["ConvFirst", "ConvLast"])
def test_a_sum_joins_the_convolution_before_it(order: str) -> None:
    g = Graph()
    x = g.q(g.input("N", 8, 6, 6))
    c = g.q(g.conv(x, 8, 8), 0.4137, 130)
    s = g.op("Relu", g.op("Add", *((c, x) if order == "ConvFirst" else (x, c))))
    model = judge(g.model(g.q(s, 0.3219, 0)))
    (node,) = regions(model)
    convs = [s for s in plan_of(node).steps if s.kind == p.CONV]
    assert steps(node)[p.BINARY] == 0
    assert convs[0].residual >= 0
    assert (convs[0].low, convs[0].high) == (0, 255)


def test_limits_are_folded_into_the_step_before_them() -> None:
    g = Graph()
    c = g.op("Clip", g.conv(g.q(g.input("N", 8, 6, 6)), 8, 8), *_ends(g, -1.0, 6.0))
    model = judge(g.model(g.q(c, 0.0731, 100)), most=0.0732)  # onnxruntime computes this one in float
    (conv,) = [s for s in plan_of(regions(model)[0]).steps if s.kind == p.CONV]
    assert (conv.low, conv.high) == (86, 182)


def test_sums_are_onnxruntimes_for_every_pair_of_integers() -> None:
    random = np.random.default_rng(3)
    a, b = (v.astype(np.uint8) for v in np.meshgrid(np.arange(256), np.arange(256), indexing="ij"))
    for _ in range(20):
        g = Graph()
        scales, zeros = np.exp(random.uniform(-4, -2, 3)).astype(np.float32), random.integers(0, 256, 3)
        numbers = [(float(s), int(z)) for s, z in zip(scales, zeros, strict=True)]
        x, y = (g.input(256, 256, name=n, kind=TensorProto.UINT8) for n in ("x", "y"))
        total = g.op("Add", g.dequantized(x, *numbers[0]), g.dequantized(y, *numbers[1]))
        out = g.quantized(total, *numbers[2])
        (wanted,) = session(g.model(out, kinds={out: TensorProto.UINT8})).run(None, {"x": a, "y": b})
        ra, rb, fx = sum_scales(*(Numbers(s, z, False) for s, z in numbers))
        inner = reference_plan.fma(b, ra, fx)
        np.testing.assert_array_equal(np.clip(np.rint(reference_plan.fma(a, rb, inner)), 0, 255), wanted)


def test_a_sum_of_what_others_read_too_is_a_step() -> None:
    g = Graph()
    x = g.q(g.input("N", 8, 6, 6))
    c = g.q(g.conv(x, 8, 8), 0.4, 130)
    s = g.q(g.op("Add", c, x), 0.4, 100)
    model = judge(g.model(g.q(g.op("Add", s, c), 0.5, 100)))
    assert steps(regions(model)[0])[p.BINARY] == 2


def test_squeeze_and_excite_is_one_region() -> None:
    g = Graph()
    x = g.q(g.conv(g.q(g.input("N", 8, "h", "w")), 8, 8), 0.3, 100)
    pool = g.q(g.op("GlobalAveragePool", x), 0.1, 110)
    gate = g.q(g.op("HardSigmoid", g.q(g.op("Conv", pool, g.weight(8, 8, 1, 1), g.bias(8, 0.1)), 0.1, 128)), 1 / 255, 0)
    model = judge(g.model(g.q(g.op("Mul", x, gate), 0.3, 100)), h=5, w=4)
    assert steps(regions(model)[0]) == {p.INPUT: 1, p.CONV: 2, p.POOL: 1, p.COPY: 1, p.BINARY: 1, p.OUTPUT: 1}


FUNCTIONS: dict[str, Callable[[Graph, str], str]] = {
    "Sigmoid": lambda g, x: g.op("Sigmoid", x),
    "HardSwish": lambda g, x: g.op("HardSwish", x),
    "Clip": lambda g, x: g.op("Clip", x, g.constant(-0.5, np.float32), g.constant(1.5, np.float32)),
    "silu": lambda g, x: g.op("Mul", x, g.op("Sigmoid", x)),
    "silu-qdq": lambda g, x: g.op("Mul", x, g.q(g.op("Sigmoid", x), 1 / 255, 0)),
    "hardswish-qdq": lambda g, x: g.op(
        "Div",
        g.q(g.op("Mul", x, g.q(g.op("Clip", g.op("Add", x, g.constant(3, np.float32)), *_ends(g, 0, 6)), 6 / 255, 0)), 0.2, 40),
        g.constant([6], np.float32),
    ),
    "gelu": lambda g, x: g.op(
        "Mul",
        g.op("Mul", x, g.op("Add", g.op("Erf", g.op("Div", x, g.constant(1.4142135, np.float32))), g.constant(1, np.float32))),
        g.constant(0.5, np.float32),
    ),
    "requantised": lambda g, x: x,
}


def _ends(g: Graph, low: float, high: float) -> tuple[str, str]:
    return g.constant(low, np.float32), g.constant(high, np.float32)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_of_one_activation_are_tables(name: str, dtype: type) -> None:
    g = Graph()
    zero = 100 if dtype == np.uint8 else -28
    x = g.q(g.conv(g.q(g.input("N", 4, 5, 5), 0.05, zero, dtype), 4, 4), 0.3, zero, dtype)
    most = 0.22 if name == "requantised" else 0  # onnxruntime makes one pair of two, with numbers of its own
    model = judge(g.model(g.q(FUNCTIONS[name](g, x), 0.21, zero - 7, dtype)), most=most)
    assert steps(regions(model)[0]) == {p.INPUT: 1, p.CONV: 1, p.COPY: 1, p.OUTPUT: 1}


MOVES: dict[str, tuple[Callable[[Graph, str], str], float]] = {
    "MaxPool": (lambda g, x: g.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1], ceil_mode=1), 0),
    "AveragePool": (lambda g, x: g.op("AveragePool", x, kernel_shape=[3, 2], pads=[1, 0, 1, 0]), 0.31),
    "GlobalAveragePool": (lambda g, x: g.op("GlobalAveragePool", x), 0),
    "ReduceMean": (lambda g, x: g.op("ReduceMean", x, axes=[2, 3], keepdims=0), 0.31),
    "Slice-channels": (lambda g, x: g.op("Slice", x, *_integers(g, [1], [3], [1])), 0),
    "Slice-pixels": (lambda g, x: g.op("Slice", x, *_integers(g, [1, 0], [2**31 - 1, 5], [2, 3], [2, 1])), 0),
    "Pad": (lambda g, x: g.op("Pad", x, *_integers(g, [0, 1, 1, 2, 0, 2, 0, 1])), 0),
    "Resize": (lambda g, x: g.op("Resize", x, "", g.constant([1, 1, 2, 3], np.float32), mode="nearest"), 0),
    "Resize-floor": (
        lambda g, x: g.op(
            "Resize",
            x,
            "",
            g.constant([1, 1, 2, 2], np.float32),
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        ),
        0,
    ),
    "Transpose": (lambda g, x: g.op("Transpose", x, perm=[0, 2, 3, 1]), 0),
    "Reshape-merged": (lambda g, x: g.op("Reshape", x, *_integers(g, [0, 4, -1])), 0),
}


def _integers(g: Graph, *lists: list[int]) -> list[str]:
    return [g.constant(v, np.int64) for v in lists]


@pytest.mark.parametrize("numbers", [(0.3, 100), (0.25, 90)], ids=["same-scale", "requantised"])
@pytest.mark.parametrize("name", MOVES)
def test_moves_and_pools(name: str, numbers: tuple[float, int]) -> None:
    g = Graph()
    move, most = MOVES[name]
    x = g.q(g.conv(g.q(g.input("N", 4, 7, 6)), 4, 4), 0.3, 100)
    judge(g.model(g.q(move(g, x), *numbers)), most=most)


def test_concat_and_split_of_channels() -> None:
    g = Graph()
    x = g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 6), 0.3, 100)
    a, b = g.op("Split", x, *_integers(g, [2, 4]), axis=1, outputs=2)
    parts = [g.q(b, 0.3, 100), g.q(a, 0.2, 90)]
    judge(g.model(g.q(g.op("Concat", *parts, x, axis=1), 0.3, 100)))


def test_pad_on_integers() -> None:
    g = Graph()
    x = g.quantized(g.input("N", 4, 5, 5))
    padded = g.op("Pad", x, *_integers(g, [0, 0, 1, 1, 0, 0, 1, 1]), g.constant(120, np.uint8))
    c = g.conv(g.dequantized(padded), 4, 4, pads=[0, 0, 0, 0])
    judge(g.model(g.q(c, 0.3, 100)))


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("end", ["quantised", "float"])
def test_matrix_products_over_rows(end: str, rank: int) -> None:
    g = Graph()
    rows: list[int | str] = ["N", "S", 3]
    x = g.q(g.input(*rows[: rank - 1], 12))
    y = g.op("Add", g.op("MatMul", x, g.weight(12, 10, axis=1)), g.bias(10))
    y = g.q(g.op("Relu", y), 0.2, 0) if end == "quantised" else g.op("Tanh", y)
    judge(g.model(y), N=3, S=5)


@pytest.mark.parametrize("kind", ["Gemm", "GemmT", "MatMul"])
def test_a_flattened_image_is_a_convolution_of_its_size(kind: str) -> None:
    g = Graph()
    x = g.q(g.conv(g.q(g.input("N", 3, 4, 5)), 3, 4), 0.3, 100)
    flat = g.q(g.op("Flatten", x), 0.3, 100)
    w = g.weight(7, 80) if kind == "GemmT" else g.weight(80, 7, axis=1)
    y = g.op("MatMul", flat, w) if kind == "MatMul" else g.op("Gemm", flat, w, g.bias(7, 0.3), transB=int(kind == "GemmT"))
    model = judge(g.model(g.q(y, 2.0, 100)))
    assert [s.kh * s.kw for s in plan_of(regions(model)[0]).steps if s.kind == p.CONV] == [9, 20]


def test_an_nhwc_model_is_transposed_for_nothing() -> None:
    g = Graph()
    x = g.q(g.input("N", 6, 5, 3))
    c = g.q(g.conv(g.q(g.op("Transpose", x, perm=[0, 3, 1, 2])), 3, 4), 0.3, 100)
    model = judge(g.model(g.q(g.op("Transpose", c, perm=[0, 2, 3, 1]), 0.3, 100)))
    assert steps(regions(model)[0]) == {p.INPUT: 1, p.CONV: 1, p.OUTPUT: 1}


def test_integers_come_and_go_as_they_are() -> None:
    g = Graph()
    x = g.input("N", 4, 5, 5, kind=TensorProto.UINT8)
    y = g.quantized(g.conv(g.dequantized(x), 4, 4), 0.3, 100)
    judge(g.model(y, kinds={y: TensorProto.UINT8}))


def test_softmax_between_integers_stays_with_onnxruntime() -> None:
    g = Graph()
    x = g.q(g.op("MatMul", g.q(g.input("N", 12)), g.weight(12, 10, axis=1)), 0.3, 100)
    model = judge(g.model(g.q(g.op("Softmax", x), 1 / 256, 0)))
    assert regions(model)[0].outputs[0].dtype == np.uint8
    assert {n.op for n in model.nodes()} == {"Int8Region0", "DequantizeLinear", "Softmax", "QuantizeLinear"}


def test_regions_are_convex() -> None:
    g = Graph()
    x = g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4), 0.3, 100)
    around = g.q(g.op("Softmax", x, axis=1), 1 / 256, 0)
    model = judge(g.model(g.q(g.op("Add", g.q(g.conv(x, 4, 4), 0.3, 100), around), 0.3, 100)))
    assert len(regions(model)) == 1
    assert "Add" in {n.op for n in model.nodes()}


def test_two_regions_do_not_wait_for_each_other() -> None:
    """a1 -> b1 and b2 -> a2: each pair is convex, but as two nodes they would form a cycle."""
    g = Graph()
    x, y = g.q(g.input("N", 4, 5, 5)), g.q(g.input("N", 4, 5, 5, name="y"))
    a1, b2 = g.q(g.conv(x, 4, 4), 0.3, 100), g.q(g.conv(y, 4, 4), 0.3, 100)
    out = g.q(g.op("Softmax", a1, axis=1), 1 / 256, 0), g.q(g.op("Softmax", b2, axis=1), 1 / 256, 0)
    b1 = g.q(g.op("Add", g.q(g.conv(y, 4, 4), 0.3, 100), out[0]), 0.3, 100)
    a2 = g.q(g.op("Add", g.q(g.conv(x, 4, 4), 0.3, 100), out[1]), 0.3, 100)
    judge(g.model(a2, b1))


def _rejected(g: Graph, output: str) -> set[str]:
    _, context = compiled(g.model(output))
    return {reason for reason, _ in context.rejected}


REJECTED: dict[str, tuple[Build, str]] = {
    "bias scale": (
        lambda g: g.q(g.op("Conv", g.q(g.input("N", 4, 5, 5)), g.weight(4, 4, 3, 3), g.bias(4, wrong=1.1))),
        "its bias is not scaled as input times weight",
    ),
    "float weight": (
        lambda g: g.q(g.op("Conv", g.q(g.input("N", 4, 5, 5)), g.constant(np.ones((4, 4, 3, 3)), np.float32))),
        "its weight is not quantised",
    ),
    "float input": (lambda g: g.q(g.op("Conv", g.input("N", 4, 5, 5), g.weight(4, 4, 3, 3))), "its input is not quantised"),
    "3-d": (lambda g: g.q(g.op("Conv", g.q(g.input("N", 2, 4, 4, 4)), g.weight(2, 2, 1, 1, 1))), "it has 3 axes of pixels"),
    "channels": (
        lambda g: g.q(g.op("MatMul", g.q(g.input("N", "c")), g.weight(4, 4, axis=1))),
        "its number of channels is not known",
    ),
    "auto pad": (
        lambda g: g.q(g.op("Conv", g.q(g.input("N", 4, "h", 5)), g.weight(4, 4, 3, 3), auto_pad="SAME_UPPER")),
        "its automatic padding depends on sizes that are not known",
    ),
    "two products": (
        lambda g: g.q(g.op("MatMul", g.q(g.input("N", 4, 4)), g.q(g.input("N", 4, 4, name="y")))),
        "it multiplies two activations",
    ),
    "sums": (
        lambda g: g.q(g.op("MatMul", g.q(g.input("N", 70000)), g.weight(70000, 1, axis=1)), 5.0),
        "its sums may not fit int32",
    ),
    "alone": (lambda g: g.q(g.op("Sigmoid", g.q(g.input("N", 4)))), "no convolution or matrix product next to it"),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_cannot_be_lowered_says_why(name: str) -> None:
    g = Graph()
    build, reason = REJECTED[name]
    assert reason in _rejected(g, build(g))


def test_a_float_output_that_others_read_keeps_the_operator_out() -> None:
    g = Graph()
    c = g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4)
    assert "its float output is read elsewhere too" in {r for r, _ in compiled(g.model(g.q(c, 0.3), c))[1].rejected}


def test_a_dead_channel_with_a_bias_at_the_end_of_int32_is_lowered() -> None:
    g = Graph()
    x = g.q(g.input("N", 4, 5, 5))
    w = g.weight(3, 4, 1, 1)
    reach = int(np.abs(g.values[1].astype(np.int64)).sum() * 255)
    values = np.array([5, -(2**31) + int(0.6 * reach), 17], np.int32)  # no input reaches the end, but half the sums would
    b = g.op("DequantizeLinear", g.constant(values), g.constant(np.float32(0.05) * g.scales), axis=0)
    judge(g.model(g.q(g.op("Relu", g.op("Conv", x, w, b)), 0.3, 0)))


def test_at_most_64_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.region_find.MAX_REGIONS", 2)
    g = Graph()
    x = g.input("N", 4, 5, 5)
    for filters in (4, 12, 4, 8):
        x = g.op("Softmax", g.q(g.conv(g.q(x), 4, filters), 0.3, 100), axis=1)
        x = g.op("Slice", x, *_integers(g, [0], [4], [1]))
    model, context = compiled(g.model(x))
    assert [n.op for n in regions(model)] == ["Int8Region0", "Int8Region1"]
    assert ("there are 2 larger regions", "Conv") in context.rejected
    assert len(context.facts["regions"]) == 2


def test_compiled_models_are_saved_loaded_and_left_alone(tmp_path: Path) -> None:
    g = Graph()
    proto = g.model(g.op("Softmax", g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4), 0.3, 100), axis=1))
    result = optimize(proto, passes="compile-int8 boundaries=all")
    result.save(tmp_path / "c.onnx")
    again = load(tmp_path / "c.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "c.onnx"), full_check=True)
    assert [f.name for f in again.proto().functions] == ["Int8Region0"]
    assert find("compile-int8").fn(again, compiled(proto)[1]) == 0
    further = optimize(tmp_path / "c.onnx", passes="fold, dead-code", check=True)
    assert regions(further.model)[0].attrs["plan"] == regions(result.model)[0].attrs["plan"]
    inputs = feed(proto)
    (wanted,), (found,) = session(proto).run(None, inputs), session(further.proto()).run(None, inputs)
    np.testing.assert_array_equal(found, wanted)
    with pytest.raises(PassError, match="quantised already"):
        optimize(tmp_path / "c.onnx", passes="quantize", calibration=inputs)


def test_other_functions_are_still_inlined() -> None:
    g = Graph()
    model, _ = compiled(g.model(g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4), 0.3, 100)))
    proto = model.proto()
    body = [onnx.helper.make_node("Neg", ["a"], ["b"])]
    proto.functions.append(onnx.helper.make_function("mine", "Turn", ["a"], ["b"], body, [onnx.helper.make_opsetid("", 17)]))
    output = proto.graph.output[0].name
    proto.graph.node.append(onnx.helper.make_node("Turn", [output], ["turned"], domain="mine"))
    proto.graph.output[0].name = "turned"
    proto.opset_import.add(domain="mine", version=1)
    again = from_proto(proto)
    assert [n.op for n in again.nodes()] == ["Int8Region0", "Neg"]


def test_regions_in_the_body_of_an_if() -> None:
    g = Graph()
    y = g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4), 0.3, 100)
    infos = [onnx.helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", 4, 5, 5])]
    then = onnx.helper.make_graph([*g.nodes, onnx.helper.make_node("Identity", [y], ["out"])], "then", [], infos, g.initializers)
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["out"])], "else", [], infos)
    g.nodes, g.initializers = [], []
    g.input(name="flag", kind=TensorProto.BOOL)
    proto = g.model(g.op("If", "flag", then_branch=then, else_branch=other))
    model, _ = compiled(proto)
    assert [n.op for n in regions(model)] == ["Int8Region0"]
    for flag in (True, False):
        inputs = {**feed(proto), "flag": np.array(flag)}
        np.testing.assert_array_equal(session(model.proto()).run(None, inputs)[0], session(proto).run(None, inputs)[0])
