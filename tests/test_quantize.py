"""The pass `quantize`: what it inserts, what it leaves alone, and that onnxruntime runs the result in INT8."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quant_cases import build, error, fused, initializer, normal, rows, run_quantize, scale_and_zero

from graphopt.context import Context
from graphopt.errors import GraphoptError, ModelError, PassError
from graphopt.model import from_proto
from graphopt.registry import find
from graphopt.targets import OPENVINO, ORT_CPU_NO_VNNI, TENSORRT, Target

W = normal(16, 16, 3, 3, scale=0.1)
B = normal(16, scale=0.1)
CONV = "g (float[N,16,8,8] x, float[16,16,3,3] w, float[16] b) => (float[N,16,8,8] y) { y = Conv<pads=[1,1,1,1]>(x, w, b) }"
RESIDUAL = """g (float[N,16,8,8] x, float[16,16,3,3] w, float[16] b) => (float[N,16,4,4] y) {
    c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w, b) s = Add(d, r) t = Relu(s)
    y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(t) }"""


def test_conv_runs_as_qlinear_conv_and_stays_close(tmp_path: Path) -> None:
    proto = build(CONV, w=W, b=B)
    model, _ = run_quantize(proto)
    assert fused(model, tmp_path) == ["QuantizeLinear", "QLinearConv", "DequantizeLinear"]
    assert error(proto, model, rows(proto)) < 0.02


def test_interface_is_unchanged() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B))
    proto = model.proto()
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [o.name for o in proto.graph.output] == ["y"]
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT


def test_weights_are_int8_per_channel_and_bias_is_int32_at_the_product_of_scales() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B), bias_correction=False)
    q, scales = initializer(model, "w_q"), initializer(model, "w_scale")
    assert q.dtype == np.int8
    assert np.abs(q.reshape(16, -1)).max(1).tolist() == [127] * 16
    assert np.abs(q * scales.reshape(-1, 1, 1, 1) - W).max() <= scales.max() / 2 * 1.001
    bias, bias_scales = initializer(model, "b_q"), initializer(model, "b_scale")
    assert bias.dtype == np.int32
    assert np.array_equal(bias_scales, np.float32(scale_and_zero(model, "x")[0]) * scales)
    assert np.allclose(bias * bias_scales, B, atol=float(bias_scales.max()))


def test_per_tensor_weights_on_request() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B), per_channel=False)
    assert initializer(model, "w_scale").shape == ()


def test_residual_block_is_int8_throughout(tmp_path: Path) -> None:
    proto = build(RESIDUAL, w=W, b=B)
    model, context = run_quantize(proto)
    ops = Counter(fused(model, tmp_path))
    assert ops == {"QuantizeLinear": 1, "QLinearConv": 2, "QLinearAdd": 1, "MaxPool": 1, "DequantizeLinear": 1}
    assert context.facts["quantized_nodes"] == {"Conv": 2, "Add": 1, "MaxPool": 1}
    assert error(proto, model, rows(proto)) < 0.03


def test_relu_is_absorbed_by_the_zero_point() -> None:
    model, _ = run_quantize(build(RESIDUAL, w=W, b=B))
    assert not [n for n in model.nodes() if n.op == "Relu"]
    assert scale_and_zero(model, "r")[1] == 0


def test_clip_is_absorbed_and_its_bound_is_the_range() -> None:
    text = CONV.replace("y = Conv<pads=[1,1,1,1]>(x, w, b)", "c = Conv<pads=[1,1,1,1]>(x, w, b) y = Clip(c, lo, hi)")
    bounds = {"lo": np.float32(0).reshape(()), "hi": np.float32(0.5).reshape(())}
    proto = build(text.replace("float[16] b)", "float[16] b, float lo, float hi)"), w=W, b=B, **bounds)
    model, _ = run_quantize(proto, method="minmax")
    assert not [n for n in model.nodes() if n.op == "Clip"]
    assert scale_and_zero(model, "y")[0] * 255 == pytest.approx(0.5, rel=1e-3)
    assert error(proto, model, rows(proto)) < 0.02


def test_pooling_and_views_share_the_scale_of_their_input() -> None:
    model, _ = run_quantize(build(RESIDUAL, w=W, b=B))
    assert scale_and_zero(model, "t") == scale_and_zero(model, "y")


def test_concat_gives_all_its_inputs_the_widest_range(tmp_path: Path) -> None:
    text = """g (float[N,16,8,8] x, float[16,16,3,3] w, float[16,16,3,3] v) => (float[N,16,8,8] y) {
        a = Conv<pads=[1,1,1,1]>(x, w) b = Conv<pads=[1,1,1,1]>(x, v) c = Concat<axis=1>(a, b) y = Conv<pads=[1,1,1,1]>(c, u) }"""
    proto = build(text.replace("v) =>", "v, float[16,32,3,3] u) =>"), w=W, v=W * 10, u=normal(16, 32, 3, 3))
    model, _ = run_quantize(proto)
    assert scale_and_zero(model, "a") == scale_and_zero(model, "b") == scale_and_zero(model, "c")
    assert Counter(fused(model, tmp_path))["QLinearConcat"] == 1


def test_gemm_chain_writes_float_without_a_second_rounding(tmp_path: Path) -> None:
    text = """g (float[N,16] x, float[32,16] w, float[32] b, float[32,8] v, float[8] c) => (float[N,8] y) {
        h = Gemm<transB=1>(x, w, b) r = Relu(h) y = Gemm(r, v, c) }"""
    proto = build(text, w=normal(32, 16), b=normal(32), v=normal(32, 8), c=normal(8))
    model, _ = run_quantize(proto)
    assert fused(model, tmp_path) == ["QuantizeLinear", "QGemm", "QGemm"]
    assert error(proto, model, rows(proto)) < 0.03


@pytest.mark.parametrize("shape", ["[N,16]", "[1,5,16]", "[N,S,16]"])
@pytest.mark.parametrize("bias", [(8,), (1, 8)])
def test_matmul_never_falls_back_to_dequantised_weights(tmp_path: Path, shape: str, bias: tuple[int, ...]) -> None:
    # With a float bias, onnxruntime merges MatMul + Add to a float Gemm that dequantises its weight at every run.
    text = f"g (float{shape} x, float[16,8] w, float{list(bias)} b) => (float y) {{ m = MatMul(x, w) y = Add(m, b) }}"
    proto = build(text, w=normal(16, 8), b=normal(*bias))
    del proto.graph.output[0].type.tensor_type.shape.dim[:]
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    model, _ = run_quantize(proto, rows(proto, 1))
    assert {"QGemm", "MatMulIntegerToFloat"} & set(fused(model, tmp_path))
    assert "Gemm" not in fused(model, tmp_path)
    assert error(proto, model, rows(proto, 1)) < 0.03


def test_pad_moves_integers(tmp_path: Path) -> None:
    text = """g (float[N,16,8,8] x, float[16,16,3,3] w, int64[8] p) => (float[N,16,8,8] y) {
        c = Conv<pads=[1,1,1,1]>(x, w) d = Pad<mode="constant">(c, p) y = Conv(d, w) }"""
    proto = build(text, w=W, p=np.array([0, 0, 1, 1, 0, 0, 1, 1]))
    model, _ = run_quantize(proto)
    ops = fused(model, tmp_path)
    assert ops.count("QuantizeLinear") == ops.count("DequantizeLinear") == 1
    assert "Pad" in ops
    assert error(proto, model, rows(proto)) < 0.03


@pytest.mark.parametrize(("target", "dtype"), [(OPENVINO, np.int8), (TENSORRT, np.float32)])
def test_embedding_tables_are_int8_where_the_target_takes_them(target: Target, dtype: type) -> None:
    text = """g (float[N,16] x, int64[N] i, float[5000,16] t, float[16,16] w) => (float[N,16] y) {
        e = Gather(t, i) m = MatMul(x, w) y = Add(m, e) }"""
    proto = build(text, t=normal(5000, 16), w=normal(16, 16), i=np.arange(8) * 600)
    model, context = run_quantize(proto, target=target)
    assert next(n for n in model.nodes() if n.op == "Gather").inputs[0].dtype == dtype
    assert context.facts["tables"] == (["t"] if dtype is np.int8 else [])
    assert error(proto, model, rows(proto)) < 0.03


def test_thin_first_convolution_stays_float_and_says_why() -> None:
    text = """g (float[N,3,8,8] x, float[16,3,3,3] s, float[16,16,3,3] w) => (float[N,16,8,8] y) {
        c = Conv<pads=[1,1,1,1]>(x, s) r = Relu(c) y = Conv<pads=[1,1,1,1]>(r, w) }"""
    model, context = run_quantize(build(text, s=normal(16, 3, 3, 3), w=W))
    assert context.facts["quantized_nodes"] == {"Conv": 1}
    assert any("first convolution" in row["reason"] for row in context.facts["float_nodes"])
    assert [n.inputs[0].name for n in model.nodes() if n.op == "Relu"] == ["c"]


@pytest.mark.parametrize(("channels", "quantised"), [(8, 1), (16, 2)])
def test_depthwise_of_few_channels_behind_a_float_stem_stays_float(channels: int, quantised: int) -> None:
    text = """g (float[N,3,8,8] x, float[C,3,3,3] s, float[C,1,3,3] d, float[16,C,1,1] w) => (float[N,16,8,8] y) {
        c = Conv<pads=[1,1,1,1]>(x, s) r = Relu(c) e = Conv<group=C, pads=[1,1,1,1]>(r, d) f = Relu(e) y = Conv(f, w) }"""
    arrays: dict[str, Any] = {"s": normal(channels, 3, 3, 3), "d": normal(channels, 1, 3, 3), "w": normal(16, channels, 1, 1)}
    _, context = run_quantize(build(text.replace("C,", f"{channels},").replace("=C", f"={channels}"), **arrays))
    assert context.facts["quantized_nodes"] == {"Conv": quantised}


@pytest.mark.parametrize(
    ("options", "left"),
    [({"exclude": ("Conv_0",)}, 1), ({"exclude": ("Conv*",)}, 0), ({"exclude_ops": ("Conv",)}, 0), ({"include": ("Conv_0",)}, 1)],
)
def test_exclude_and_include(options: dict[str, Any], left: int) -> None:
    text = CONV.replace("y = Conv<pads=[1,1,1,1]>(x, w, b)", "a = Conv<pads=[1,1,1,1]>(x, w, b) y = Conv<pads=[1,1,1,1]>(a, w, b)")
    _, context = run_quantize(build(text, w=W, b=B), **options)
    assert context.facts["quantized_nodes"].get("Conv", 0) == left


def test_light_ops_between_float_ones_stay_float() -> None:
    text = (
        "g (float[N,16,8,8] x) => (float[N,16,8,8] y) { a = Sigmoid(x) b = Add(a, x) t = Transpose<perm=[0,1,3,2]>(b) y = Exp(t) }"
    )
    _, context = run_quantize(build(text))
    assert context.facts["quantized_nodes"] == {}
    assert context.rejected["an INT8 island: its neighbours are float", "Add"] == 1


def test_quantised_models_are_refused() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B))
    with pytest.raises(PassError, match="quantised already.*DequantizeLinear"):
        run_quantize(model.proto(), rows(model.proto()))


def test_no_data_is_one_clear_line() -> None:
    with pytest.raises(PassError, match="needs calibration data"):
        find("quantize").fn(from_proto(build(CONV, w=W, b=B)), Context())


def test_weight_read_by_two_nodes_is_stored_once() -> None:
    model, _ = run_quantize(build(RESIDUAL, w=W, b=B))
    assert len([c for c in model.constants() if c.dtype == np.int8 and c.shape == W.shape]) == 1


def test_weight_read_by_a_float_node_stays_for_it() -> None:
    text = CONV.replace("float[N,16,8,8] y)", "float[N,16,8,8] y, float[16,16,3,3] z)").replace("}", "z = Exp(w) }")
    model, _ = run_quantize(build(text, w=W, b=B))
    assert next(n for n in model.nodes() if n.op == "Exp").inputs[0].dtype == np.float32


def test_dead_channel_and_huge_bias() -> None:
    w, b = W.copy(), B.copy()
    w[3], w[4], b[4] = 0, 1e-12, 7.0  # a bias that int32 could not hold at the scale of such weights
    proto = build(CONV, w=w, b=b)
    model, _ = run_quantize(proto)
    assert error(proto, model, rows(proto)) < 0.02


def test_dynamic_sizes_stay_dynamic() -> None:
    text = CONV.replace("[N,16,8,8]", "[N,16,H,V]")
    proto = build(text, w=W, b=B)
    model, _ = run_quantize(proto)
    for size in (5, 9):
        assert error(proto, model, rows(proto, 2, dynamic=size)) < 0.05


def test_bodies_of_control_flow_stay_float() -> None:
    text = """g (float[N,16,8,8] x, bool c, float[16,16,3,3] w) => (float[N,16,8,8] y) {
        y = If (c) <then_branch = t () => (float[N,16,8,8] a) { a = Conv<pads=[1,1,1,1]>(x, w) },
                    else_branch = e () => (float[N,16,8,8] d) { d = Relu(x) }> }"""
    proto = build(text, w=W, c=np.array(True))
    _, context = run_quantize(proto)
    assert context.facts["quantized_nodes"] == {}
    assert context.rejected["it lies in the body of If, Loop or Scan", "Conv"] == 1


def test_old_opset_is_raised() -> None:
    proto = build(CONV, opset=9, w=W, b=B)
    model, _ = run_quantize(proto)
    assert model.opset == 13
    assert error(proto, model, rows(proto)) < 0.02


def test_old_opset_stays_where_nothing_is_quantised() -> None:
    model, _ = run_quantize(build("g (float[N,4] x) => (float[N,4] y) { y = Exp(x) }", opset=9))
    assert model.opset == 9


def test_opset_that_cannot_be_raised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
        raise RuntimeError("no adapter")

    monkeypatch.setattr("onnx.version_converter.convert_version", fail)
    with pytest.raises(ModelError, match="opset 13 is needed and the model has 9; onnx's converter fails .no adapter."):
        run_quantize(build(CONV, opset=9, w=W, b=B))


def test_converted_model_must_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = build(CONV, opset=13, w=W * 2, b=B)
    monkeypatch.setattr("onnx.version_converter.convert_version", lambda model, version: wrong)
    with pytest.raises(ModelError, match="converter changes output 'y'"):
        run_quantize(build(CONV, opset=9, w=W, b=B))


def test_tensorrt_is_symmetric_with_float_bias_and_keeps_relu() -> None:
    proto = build(RESIDUAL, w=W, b=B)
    model, _ = run_quantize(proto, target=TENSORRT)
    for node in model.nodes():
        if node.op == "DequantizeLinear":
            assert node.inputs[2].dtype == np.int8
            assert not np.any(node.inputs[2].values)
    assert Counter(n.op for n in model.nodes())["Relu"] == 2
    assert error(proto, model, rows(proto)) < 0.05


def test_openvino_keeps_float_bias() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B), target=OPENVINO)
    assert next(n for n in model.nodes() if n.op == "Conv").inputs[2].dtype == np.float32


def test_no_vnni_uses_seven_bits() -> None:
    model, _ = run_quantize(build(CONV, w=W, b=B), target=ORT_CPU_NO_VNNI)
    assert np.abs(initializer(model, "w_q")).max() == 63


def test_bias_correction_keeps_channel_means() -> None:
    w = (W * 3).round() * 0.05 + 0.013  # rounding errors of one sign, on inputs that are not centred
    proto = build(CONV, w=w.astype(np.float32), b=B)
    data = {"x": np.abs(rows(proto, 32)["x"])}
    means = [
        np.abs(np.mean(_first(m.proto(), data) - _first(proto, data), axis=(0, 2, 3))).mean()
        for m, _ in (run_quantize(proto, data, bias_correction=on, per_channel=False) for on in (False, True))
    ]
    assert means[1] < means[0] / 2


def _first(proto: onnx.ModelProto, data: dict[str, np.ndarray]) -> np.ndarray:
    from quant_cases import outputs

    return outputs(proto, data)[0]


@pytest.mark.parametrize("method", ["minmax", "moving-average", "percentile", "mse"])
def test_digits_keeps_its_accuracy(digits: Path, method: str) -> None:
    proto = onnx.load(digits / "digits.onnx")
    with np.load(digits / "digits_calib.npz") as file:
        data = {k: file[k] for k in file if k != "labels"}
    with np.load(digits / "digits_eval.npz") as file:
        inputs, labels = {k: file[k] for k in file if k != "labels"}, file["labels"]
    model, _ = run_quantize(proto, data, method=method)
    before, after = ((_first(m, inputs).argmax(-1) == labels).mean() for m in (proto, model.proto()))
    assert after >= before - 0.01
    assert len(model.proto().SerializeToString()) < 0.5 * len(proto.SerializeToString())


def test_wrong_data_is_a_graphopt_error() -> None:
    with pytest.raises(GraphoptError, match="z"):
        run_quantize(build(CONV, w=W, b=B), {"z": np.zeros((1, 16, 8, 8), np.float32)})
