"""compile-sparse: the sparse node and its function compute what the layer did, and layers are chosen as measured or told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from onnx import TensorProto, helper, numpy_helper

from graphopt.api import optimize
from graphopt.context import Context
from graphopt.errors import OptionError
from graphopt.kernels.sparse_plan import MAX_LAYERS
from graphopt.measure import Latency
from graphopt.model import Model, from_proto, load
from graphopt.operators import has_regions, regions
from graphopt.registry import find
from graphopt.runtime import session
from graphopt.shapes import shapes
from graphopt.sparse_choice import by_table, expected, forms, steady
from graphopt.sparse_layers import Site, find_layers

Array = np.ndarray
RNG = np.random.default_rng(0)


def sparse(*shape: int, density: float = 0.2) -> Array:
    return np.asarray(RNG.normal(size=shape) * (RNG.random(shape) < density), np.float32)


def model(nodes: list[onnx.NodeProto], weights: dict[str, Array], x: list[Any], y: list[Any], opset: int = 17) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)], [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def residual(channels: int = 16, opset: int = 17, **attributes: Any) -> onnx.ModelProto:
    """Relu(conv(Clip(conv(x))) + x)."""
    options = {"pads": [1] * 4, **attributes}
    limits = {"low": np.float32(0), "high": np.float32(6)}
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b"], ["a"], "first", **options),
        helper.make_node("Clip", ["a", "low", "high"], ["c"], "clip"),
        helper.make_node("Conv", ["c", "w1"], ["d"], "second", **options),
        helper.make_node("Add", ["x", "d"], ["e"], "add"),
        helper.make_node("Relu", ["e"], ["y"], "relu"),
    ]
    weights = {"w0": sparse(channels, channels, 3, 3), "w1": sparse(channels, channels, 3, 3), "b": sparse(channels, density=1)}
    size = ["N", channels, "H", "W"]
    return model(nodes, {**weights, **limits}, size, size, opset)


def mlp() -> onnx.ModelProto:
    """Relu(x A + a) B + b, of tokens, and a Gemm is elsewhere."""
    nodes = [
        helper.make_node("MatMul", ["x", "A"], ["p"], "up"),
        helper.make_node("Add", ["a", "p"], ["q"], "bias"),
        helper.make_node("Relu", ["q"], ["r"], "relu"),
        helper.make_node("MatMul", ["r", "B"], ["s"], "down"),
        helper.make_node("Add", ["s", "x"], ["y"], "sum"),
    ]
    weights = {"A": sparse(24, 48), "a": sparse(48, density=1), "B": sparse(48, 24)}
    return model(nodes, weights, ["N", "S", 24], ["N", "S", 24])


def compiled(proto: onnx.ModelProto, *layers: str) -> Model:
    result = from_proto(proto)
    changes = find("compile-sparse").fn(result, Context(), layers=layers)
    result.sort()
    result.verify()
    assert changes == len(layers)
    return result


def judge(proto: onnx.ModelProto, after: Model, **inputs: Array) -> None:
    """The same to rounding, with the library and without."""
    made = after.proto()
    wanted = session(proto).run(None, inputs)
    for operators in (True, False):
        for one, other in zip(session(made, operators=operators).run(None, inputs), wanted, strict=True):
            assert one.shape == other.shape
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * max(1, np.abs(other).max(initial=0)))


def ops(made: Model) -> list[str]:
    return [n.op for n in made.nodes()]


@pytest.mark.parametrize("block", ["1x1", "4x1", "1x4", "4x4", "16x1"])
@pytest.mark.parametrize("opset", [11, 17])
def test_convolutions_with_all_that_follows(block: str, opset: int) -> None:
    proto = residual(opset=opset)
    after = compiled(proto, f"first={block}", f"second={block}")
    assert ops(after) == ["SparseLayer0", "SparseLayer1"]
    for size in ((1, 16, 9, 9), (3, 16, 5, 20)):
        judge(proto, after, x=RNG.normal(size=size).astype(np.float32))


def test_equal_layers_share_a_function() -> None:
    nodes = [helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"], f"c{i}") for i in range(5)]
    nodes[0].input[0], nodes[-1].output[0] = "x", "y"
    proto = model(nodes, {f"w{i}": sparse(8, 8, 1, 1) for i in range(5)}, [1, 8, 6, 6], [1, 8, 6, 6])
    after = compiled(proto, *(f"c{i}=1x1" for i in range(5)))
    assert ops(after) == ["SparseLayer0"] * 5
    assert len(after.shell.functions) == 1
    judge(proto, after, x=RNG.normal(size=(1, 8, 6, 6)).astype(np.float32))


def test_products_with_bias_and_residual() -> None:
    proto = mlp()
    after = compiled(proto, "up=1x1", "down=4x1")
    assert ops(after) == ["SparseLayer0", "SparseLayer1"]
    for size in ((1, 1, 24), (2, 70, 24)):
        judge(proto, after, x=RNG.normal(size=size).astype(np.float32))


@pytest.mark.parametrize("form", ["4x1", "bitmap"])
@pytest.mark.parametrize("transposed", [0, 1])
def test_gemm(transposed: int, form: str) -> None:
    weight = sparse(12, 20) if transposed else sparse(20, 12)
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], "fc", transB=transposed)]
    proto = model(nodes, {"w": weight, "b": sparse(12, density=1)}, ["N", 20], ["N", 12])
    after = compiled(proto, f"fc={form}")
    for rows in (1, 2, 40):
        judge(proto, after, x=RNG.normal(size=(rows, 20)).astype(np.float32))


@pytest.mark.parametrize("form", ["1x1", "4x1", "bitmap"])
@pytest.mark.parametrize("op", ["Gemm", "MatMul", "Conv"])
def test_int8_weights_with_scales(op: str, form: str) -> None:
    if op == "Conv" and form == "bitmap":
        return
    levels, scales = (20 * sparse(20, 12)).astype(np.int8), np.abs(sparse(12, density=1)) + np.float32(0.1)
    if op == "Conv":
        levels = levels.T.reshape(12, 20, 1, 1)
    size = [2, 20, 6, 6] if op == "Conv" else ["N", 20]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], "dq", axis=0 if op == "Conv" else 1),
        helper.make_node(op, ["x", "f"], ["z"], "fc"),
        helper.make_node("Relu", ["z"], ["y"], "relu"),
    ]
    proto = model(nodes, {"w": levels, "s": scales}, size, [None] * len(size))
    after = compiled(proto, f"fc={form}")
    assert ops(after) == ["SparseLayer0"]
    dense = levels * (scales[:, None, None, None] if op == "Conv" else scales)  # onnxruntime rounds activations of int8 weights
    plain = model([helper.make_node(op, ["x", "f"], ["z"]), nodes[2]], {"f": dense}, size, [None] * len(size))
    for rows in (1, 5) if op != "Conv" else (2,):
        judge(plain, after, x=RNG.normal(size=(rows, *size[1:])).astype(np.float32))


def test_weights_that_sparsify_rounds() -> None:
    proto = mlp()
    result = optimize(proto, "sparsify ratio=0.5 values=int8, compile-sparse layers='up=bitmap,down=1x1'")
    assert ops(result.model) == ["SparseLayer0", "SparseLayer1"]
    dtypes = [next(np.dtype(t.dtype) for t in n.inputs if "values" in t.name) for n in result.model.nodes()]
    assert dtypes == [np.int8, np.int8]
    x = RNG.normal(size=(2, 3, 24)).astype(np.float32)
    (wanted,) = session(optimize(proto, "sparsify ratio=0.5").proto()).run(None, {"x": x})
    (found,) = session(result.proto()).run(None, {"x": x})
    np.testing.assert_allclose(found, wanted, rtol=0, atol=0.05 * np.abs(wanted).max())
    assert (found != wanted).any()
    again = optimize(optimize(proto, "sparsify ratio=0.5 values=int8").model, "sparsify ratio=0.9").report.passes[0]
    assert again.changes == 0
    assert {r.reason for r in again.rejected} == {"its weight is quantised already"}


def test_quantised_weights_that_are_left_alone() -> None:
    scales = np.ones(12, np.float32)
    cases: list[tuple[dict[str, Any], dict[str, Array], list[str], str]] = [
        ({"axis": 0}, {"s": np.ones(20, np.float32)}, ["w", "s"], "its weight has scales on another axis"),
        ({"axis": 1}, {"s": scales, "z": np.ones(12, np.int8)}, ["w", "s", "z"], "its weight has computed scales, a zero point"),
        ({"axis": 1}, {"s": -scales}, ["w", "s"], "a scale of its weight is not above 0"),
    ]
    for attributes, constants, inputs, reason in cases:
        nodes = [
            helper.make_node("DequantizeLinear", inputs, ["f"], "dq", **attributes),
            helper.make_node("MatMul", ["x", "f"], ["y"]),
        ]
        proto = model(nodes, {"w": np.ones((20, 12), np.int8), **constants}, ["N", 20], ["N", 12])
        (rejected,) = optimize(proto, "compile-sparse").report.passes[0].rejected
        assert rejected.reason.startswith(reason)


def test_depthwise_strided_dilated_and_one_dimensional() -> None:
    cases: list[tuple[Array, dict[str, Any], tuple[int, ...]]] = [
        (sparse(6, 1, 3, 3, density=1), {"group": 6, "pads": [1] * 4, "strides": [2, 2]}, (2, 6, 11, 13)),
        (sparse(8, 4, 3, 2), {"group": 2, "dilations": [2, 1], "pads": [2, 0, 1, 1]}, (1, 8, 12, 30)),
        (sparse(8, 4, 5), {"pads": [2, 2], "strides": [3]}, (2, 4, 40)),
    ]
    for weight, attributes, size in cases:
        nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "c", **attributes)]
        proto = model(nodes, {"w": weight}, list(size), [None] * len(size))
        judge(proto, compiled(proto, "c=1x1"), x=RNG.normal(size=size).astype(np.float32))


def test_an_intermediate_that_is_read_elsewhere_stays() -> None:
    proto = residual()
    proto.graph.output.append(helper.make_tensor_value_info("d", TensorProto.FLOAT, ["N", 16, "H", "W"]))
    after = compiled(proto, "second=1x1")
    assert ops(after) == ["Conv", "Clip", "SparseLayer0", "Add", "Relu"]
    judge(proto, after, x=RNG.normal(size=(1, 16, 9, 9)).astype(np.float32))


def test_a_sum_of_two_layers_is_of_one() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one"),
        helper.make_node("Conv", ["x", "v"], ["b"], "two"),
        helper.make_node("Add", ["a", "b"], ["c"], "add"),
        helper.make_node("Relu", ["c"], ["y"], "relu"),
    ]
    proto = model(nodes, {"w": sparse(8, 8, 1, 1), "v": sparse(8, 8, 1, 1)}, ["N", 8, 5, 5], ["N", 8, 5, 5])
    for layers in (("one=1x1",), ("two=1x1",), ("one=1x1", "two=4x1")):
        judge(proto, compiled(proto, *layers), x=RNG.normal(size=(2, 8, 5, 5)).astype(np.float32))


def test_a_sum_that_broadcasts_is_no_residual() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "c"),
        helper.make_node("GlobalAveragePool", ["x"], ["m"]),
        helper.make_node("Add", ["a", "m"], ["y"], "add"),
    ]
    proto = model(nodes, {"w": sparse(8, 8, 1, 1)}, ["N", 8, 5, 5], ["N", 8, 5, 5])
    after = compiled(proto, "c=1x1")
    assert sorted(ops(after)) == ["Add", "GlobalAveragePool", "SparseLayer0"]
    judge(proto, after, x=RNG.normal(size=(2, 8, 5, 5)).astype(np.float32))


def test_the_file_shrinks(tmp_path: Path) -> None:
    proto = residual(64)
    after = compiled(proto, "first=1x1", "second=1x1").proto()
    assert after.ByteSize() < 0.3 * proto.ByteSize()
    assert [r.name for r in regions(after)] == ["SparseLayer0", "SparseLayer1"]
    assert has_regions(after)
    path = tmp_path / "m.onnx"
    onnx.save(after, str(path))
    assert has_regions(path)
    assert len(load(path).nodes()) == 2  # and can be optimised further
    assert optimize(after, "fold, compile-sparse").report.passes[-1].changes == 0


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("first", "expected name=form, a form being one of 1x1, 1x4, 4x1, 4x4, 16x1, bitmap"),
        ("first=2x2", "expected name=form"),
        ("first=bitmap", "a bitmap is for products of rows"),
        ("frist=1x1", "no such layer; did you mean 'first'"),
        ("first=16x1", "such blocks do not cover weights of shape .10, 90. exactly"),
    ],
)
def test_recipes_that_do_not_fit(layers: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        optimize(residual(10), [("compile-sparse", {"layers": (layers,)})])


def test_bad_sizes() -> None:
    with pytest.raises(OptionError, match="sizes=N: expected axis=number"):
        optimize(residual(), "compile-sparse sizes=N")


def test_layers_that_are_none_say_why() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "one", auto_pad="SAME_UPPER"),
        helper.make_node("Conv", ["a", "v"], ["b"], "two"),
        helper.make_node("Conv", ["b", "v"], ["y"], "three"),
    ]
    proto = model(nodes, {"w": sparse(4, 4, 3, 3), "v": sparse(4, 4, 1, 1)}, [1, 4, 6, 6], [1, 4, 6, 6])
    result = optimize(proto, "compile-sparse")
    assert {r.reason for r in result.report.passes[0].rejected} == {
        "its auto_pad is not resolved; run the preset fold first",
        "its weight is read by other nodes too",
    }
    old = optimize(residual(opset=17), "compile-sparse choose=table").report.passes[0]
    assert old.changes == 2


def test_more_kinds_of_layers_than_operators() -> None:
    count = MAX_LAYERS + 2
    nodes, weights = [], {}
    for i in range(count):
        nodes.append(helper.make_node("MatMul", ["x" if i == 0 else f"t{i}", f"w{i}"], [f"t{i + 1}"], f"m{i}"))
        weights[f"w{i}"] = sparse(4 + i, 5 + i, density=0.5)
    nodes[-1].output[0] = "y"
    proto = model(nodes, weights, [3, 4], [3, 4 + count])
    made = from_proto(proto)
    context = Context()
    assert find("compile-sparse").fn(made, context, layers=tuple(f"m{i}=1x1" for i in range(count))) == MAX_LAYERS
    assert context.facts["layers"][-1]["why"] == f"there are {MAX_LAYERS} other kinds of sparse layers"
    made.sort()
    judge(proto, made, x=np.ones((3, 4), np.float32))


# ---- choosing


def test_the_table_knows_density_and_blocks() -> None:
    made = from_proto(mlp())
    (up, down) = find_layers(Site(made, shapes(made), made.wiring())).layers
    kinds = {f.storage for f in forms(up)}
    assert len(kinds) == 3
    assert by_table(up, 100).storage is not None
    up.weight.values = sparse(24, 48, density=0.9)
    choice = by_table(up, 100)
    assert choice.storage is None
    assert choice.row()["why"] == "expected gain below 1.15"
    down.weight.values = np.repeat(sparse(48, 6, density=0.4), 4, 1)
    chosen = by_table(down, 100)
    assert chosen.storage is not None
    assert chosen.storage.block in ((4, 1), (4, 4))
    (four,) = [f for f in forms(down) if f.storage == chosen.storage]
    assert chosen.expected == pytest.approx(expected(down, four))


@pytest.mark.parametrize(("layer", "whole", "taken"), [(2.0, 1.5, 2), (1.01, 1.5, 0), (2.0, 1.01, 0)])
def test_what_was_measured_decides(monkeypatch: pytest.MonkeyPatch, layer: float, whole: float, taken: int) -> None:
    calls: list[int] = []

    def measured(models: list[bytes], feed: dict[str, Array], *, seconds: float, rounds: int) -> list[Latency]:
        by_itself = all(len(onnx.load_from_string(m).graph.node) < 5 for m in models)
        calls.append(len(models))
        gains = [1.0] + [layer if by_itself else whole] * (len(models) - 1)
        return [Latency(1 / g, 1 / g, 7, 1, 1, g) for g in gains]

    monkeypatch.setattr("graphopt.sparse_choice.latency", measured)
    result = optimize(residual(), "compile-sparse sizes='H=12,W=12'")
    (row,) = result.report.passes
    assert row.changes == taken
    assert len(row.facts["recipe"]) == taken
    assert {r["measured_gain"] for r in row.facts["layers"]} == {layer}
    assert calls == [3] * (2 * (3 if layer == 1.01 else 1)) + ([] if layer == 1.01 else [2] * (3 if whole == 1.01 else 1))


def test_gains_near_the_margin_are_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    noisy = iter([1.2, 1.04, 1.06, 1.04, 1.1])

    def measured(models: list[bytes], feed: dict[str, Array], *, seconds: float, rounds: int) -> list[Latency]:
        return [Latency(1, 1, 7, 1, 1, g) for g in (1.0, next(noisy))]

    monkeypatch.setattr("graphopt.sparse_choice.latency", measured)
    assert steady([b"", b""], {}, 1) == [1.2]
    assert steady([b"", b""], {}, 1) == [1.04]


def test_a_recipe_repeats_what_was_chosen() -> None:
    result = optimize(residual(), "compile-sparse choose=table")
    recipe = result.report.passes[0].facts["recipe"]
    again = optimize(residual(), [("compile-sparse", {"layers": tuple(recipe)})])
    assert ops(again.model) == ops(result.model)


def test_dense_models_stay(digits: Path) -> None:
    result = optimize(digits / "digits.onnx", "fold, compile-sparse")
    assert result.report.passes[-1].changes == 0
    assert {r["why"] for r in result.report.passes[-1].facts["layers"]} == {"denser than 75%"}


def test_a_real_model() -> None:
    path = zoo.model("minilm_l3")
    before = optimize(path, "fold, sparsify pattern=4x1 ratio=0.9 include='*intermediate*,*output/dense*'").proto()
    result = optimize(before, "compile-sparse choose=table")
    assert result.report.passes[0].changes >= 6
    feed = zoo.feeds(path)
    wanted, found = session(before).run(None, feed), session(result.proto()).run(None, feed)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5 * np.abs(other).max())
