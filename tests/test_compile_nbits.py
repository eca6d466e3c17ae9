"""compile-nbits: what is taken, what stays and why; the operator inside onnxruntime, and the model without it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fake_clock import timer
from onnx import helper, numpy_helper

import graphopt
from graphopt.api import optimize
from graphopt.context import Context
from graphopt.kernels import reference, runtime
from graphopt.model import Model, from_proto, load
from graphopt.operators import has_regions, regions
from graphopt.passes.compile_nbits import Kind, compile_products, trial
from graphopt.region_choose import ALONE
from graphopt.runtime import session
from graphopt.targets import ORT_CPU_GRAPHOPT, TENSORRT

FLOAT = onnx.TensorProto.FLOAT


def build(*layers: dict[str, Any], kind: int = FLOAT) -> onnx.ModelProto:
    """Layers of MatMulNBits, each 64 -> 64 in blocks of 32 where nothing else is said."""
    random, nodes, x = np.random.default_rng(0), [], "x"
    weights: dict[str, np.ndarray] = {}
    for i, layer in enumerate(layers):
        given = {"bits": 4, "block_size": 32, "zeros": False, "extra": (), **layer}
        zeros, extra, block = given.pop("zeros"), given.pop("extra"), given["block_size"]
        dtype = helper.tensor_dtype_to_np_dtype(kind)
        arrays = {
            f"b{i}": random.integers(0, 256, (64, 64 // block, block // 2), dtype=np.uint8),
            f"s{i}": random.uniform(-0.01, 0.02, 64 * 64 // block).astype(dtype),
            **({f"z{i}": random.integers(0, 256, 64 * ((64 // block + 1) // 2), dtype=np.uint8)} if zeros else {}),
        }
        weights |= arrays
        inputs = [x, *arrays, *extra]
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{i}"], f"m{i}", domain="com.microsoft", K=64, N=64, **given))
        x = f"y{i}"
    infos = [helper.make_tensor_value_info(name, kind, ["a", "b", 64]) for name in ("x", x)]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], [numpy_helper.from_array(v, k) for k, v in weights.items()])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def compiled(proto: onnx.ModelProto, *speeds: float, target: Any = ORT_CPU_GRAPHOPT, **options: Any) -> tuple[Model, Context]:
    model, context = from_proto(proto), Context(target=target)
    options.setdefault("measure", True)
    compile_products(model, context, timer=timer(*(speeds or (2.0,))), **options)
    model.sort()
    model.verify()
    return model, context


def rows(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 1), (2, 5), (0, 3), (1, 130)])
def test_the_operator_computes_what_onnxruntime_does(shape: tuple[int, int]) -> None:
    proto = build({}, {"zeros": True}, {"block_size": 16, "accuracy_level": 1})
    model, _ = compiled(proto)
    assert [n.op for n in model.nodes()] == ["NBitsGemm", "NBitsGemmZeros", "NBitsGemm"]
    x = {"x": rows(*shape, 64)}
    (wanted,) = session(proto).run(None, x)
    for operators in (True, False):
        (got,) = session(model.proto(), operators=operators).run(None, x)
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_ragged_sizes_inside_onnxruntime() -> None:
    for k, n, block, zeros in ((100, 33, 16, True), (33, 7, 32, False), (257, 100, 128, True)):
        proto = trial(Kind(k, n, block, zeros))
        arrays = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        x = rows(3, k)
        wanted = reference.nbits(x, arrays["weight"], arrays["scale"].reshape(n, -1), arrays.get("zero"))
        np.testing.assert_allclose(session(proto).run(None, {"x": x})[0], wanted, rtol=1e-4, atol=1e-4)


def test_two_threads_compute_the_same() -> None:
    proto = trial(Kind(512, 1024, 32, True))
    x = {"x": rows(9, 512)}
    one, two = (graphopt.session(proto, threads=threads, library="jit").run(None, x)[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_only_what_is_faster_is_taken_and_the_report_says_so() -> None:
    proto = build({}, {"zeros": True}, {})
    model, context = compiled(proto, 3.0, 1.0)
    assert [n.op for n in model.nodes()] == ["NBitsGemm", "MatMulNBits", "NBitsGemm"]
    said = context.facts["products"]
    assert [(row["zeros"], row["count"], row["taken"], row["speed"]) for row in said["kinds"]] == [
        (False, 2, True, 3.0),
        (True, 1, False, 1.0),
    ]
    assert context.rejected[ALONE, "MatMulNBits"] == 1
    assert said["recipe"] == "compile-nbits measure=false exclude='m1'"
    assert optimize(proto, passes=said["recipe"]).proto().SerializeToString() == model.proto().SerializeToString()


def test_nothing_is_changed_where_nothing_can_be_timed() -> None:
    proto = build({})
    before = from_proto(proto).proto().SerializeToString()
    for target in (None, TENSORRT):
        model, context = compiled(proto, 3.0, target=target)
        assert model.proto().SerializeToString() == before
        assert "not timed: " in context.facts["products"]["why"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "8 bits": ({"bits": 8, "block_size": 32}, "its weights are not of 4 bits in blocks of 16 to 256"),
    "int8 activations": ({"accuracy_level": 4}, "it computes with activations of lower precision"),
    "a bias": ({"extra": ("", "", "x")}, "it reorders its weights, or adds a bias"),
    "weights from outside": ({"extra": ()}, "its weights are not constants"),
    "by name": ({}, "excluded by name"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_says_why(name: str) -> None:
    layer, reason = REFUSED[name]
    proto = build(layer)
    if name == "weights from outside":
        moved = proto.graph.initializer.pop(0)
        proto.graph.input.append(helper.make_tensor_value_info(moved.name, moved.data_type, list(moved.dims)))
    model, context = compiled(proto, measure=False, exclude=("m*",) if name == "by name" else ())
    assert [n.op for n in model.nodes()] == ["MatMulNBits"]
    assert [r for r, _ in context.rejected] == [reason]


def test_half_precision_stays() -> None:
    _, context = compiled(build({}, kind=onnx.TensorProto.FLOAT16), measure=False)
    assert [r for r, _ in context.rejected] == ["its scales, and so its input, are not float32, or its zero points are not packed"]


def test_saved_models_are_run_by_the_operators(tmp_path: Any) -> None:
    model, _ = compiled(build({}, {"zeros": True}))
    result = optimize(model, passes="dead-code")
    result.save(tmp_path / "m.onnx")
    assert has_regions(tmp_path / "m.onnx")
    assert regions(onnx.load(tmp_path / "m.onnx")) == []
    assert sorted(f.name for f in load(tmp_path / "m.onnx").proto().functions) == ["NBitsGemm", "NBitsGemmZeros"]
    runner, how = graphopt.operators.opened(tmp_path / "m.onnx", library="jit")
    assert how.kind == "jit"
    assert runner.run(None, {"x": rows(1, 2, 64)})[0].shape == (1, 2, 64)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "K": ({"K": 0}, "K and N must be from 1 to 2\\^24, block_size 16, 32, 64, 128 or 256"),
    "block": ({"block_size": 48}, "K and N must be from 1"),
    "N": ({"N": 65}, "the weights must be uint8"),
    "missing": ({"N": None}, "K and N must be from 1"),
    "huge": ({"N": 1 << 40}, "K and N must be from 1"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_node_is_an_error_of_onnxruntime(name: str) -> None:
    changed, message = WRONG[name]
    proto = trial(Kind(64, 64, 32, False))
    (node,) = proto.graph.node
    for attribute in list(node.attribute):
        if attribute.name in changed:
            node.attribute.remove(attribute)
            if changed[attribute.name] is not None:
                node.attribute.append(helper.make_attribute(attribute.name, changed[attribute.name]))
    with pytest.raises(Exception, match=f"graphopt: .*: {message}"):
        registered(proto)


def registered(proto: onnx.ModelProto) -> Any:
    """A session with the operators, whatever the model; without its functions, so that nothing else can run."""
    del proto.functions[:]
    options = ort.SessionOptions()
    options.log_severity_level = 4
    runtime.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_wrong_constants_and_rows_are_errors_of_onnxruntime() -> None:
    proto = trial(Kind(64, 64, 32, True))
    short = numpy_helper.to_array(proto.graph.initializer[1])[:-1]
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(short, "scale"))
    with pytest.raises(Exception, match="the scales must be float32"):
        registered(proto)
    proto = trial(Kind(64, 64, 32, True))
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "K"
    with pytest.raises(Exception, match="the last of 1 to 8 axes of its input must have K elements"):
        registered(proto).run(None, {"x": rows(2, 65)})
