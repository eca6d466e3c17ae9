"""dead-code, freeze-inputs and flush-denormals."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import assert_pass, parse

from graphopt.context import Context
from graphopt.model import Model, from_proto
from graphopt.passes.dead_code import dead_code
from graphopt.passes.flush_denormals import flush_denormals
from graphopt.passes.freeze_inputs import freeze_inputs
from graphopt.runtime import session


def test_unused_nodes_and_their_weights() -> None:
    model = parse("g (float[N] x) => (float[N] y) <float w = {2}> { a = Mul(x, w) b = Neg(a) y = Relu(x) }")
    assert dead_code(model, Context()) == 2
    assert [n.op for n in model.nodes()] == ["Relu"]
    assert not model.proto().graph.initializer
    assert dead_code(model, Context()) == 0


def test_nothing_to_remove() -> None:
    assert_pass("dead-code", "g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) z = Neg(y) }", None)


LOOP = """g (float[N] x, int64 n, bool c) => (float[N] y) {
  a = Neg(x) b = Abs(x)
  y = Loop (n, c, x) <body = b (int64 i, bool d, float[N] v) => (bool e, float[N] w) {
    e = Identity(d) k = Cast<to = 1>(i) m = Mul(v, k) w = Add(v, a) }>
}"""


def test_bodies_and_what_they_read() -> None:
    model = parse(LOOP)
    assert dead_code(model, Context()) == 3
    assert sorted(n.op for n in model.nodes()) == ["Add", "Identity", "Loop", "Neg"]
    model.verify()


def test_the_body_of_a_dead_node_goes_with_it() -> None:
    model = parse(LOOP.replace("y = Loop", "u = Loop").replace("a = Neg(x)", "a = Neg(x) y = Relu(a)"))
    assert dead_code(model, Context()) == 6  # Abs, Loop and the four nodes of its body
    assert [n.op for n in model.nodes()] == ["Neg", "Relu"]
    assert [n.op for n in model.tensors()["a"].outputs] == ["Relu"]


def test_order_does_not_matter() -> None:
    model = parse("g (float[N] x) => (float[N] y) { a = Neg(x) b = Abs(a) c = Exp(b) y = Relu(a) }")
    model.graph.nodes.reverse()
    assert dead_code(model, Context()) == 2


OPTIONAL = {
    "indices": ("a, i = MaxPool<kernel_shape = [1, 1]>(x)", "a = MaxPool<kernel_shape = [1, 1]>(x)"),
    "mask": ("a, m = Dropout(x)", "a = Dropout(x)"),
    "statistics": ("a, m, v = LayerNormalization(x, w)", "a = LayerNormalization(x, w)"),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_optional_outputs(case: str) -> None:
    head = "g (float[N,2,3,4] x) => (float[N,2,3,4] y) <float[4] w = {1, 2, 3, 4}>"
    before, after = (f"{head} {{ {node} y = Relu(a) }}" for node in OPTIONAL[case])
    assert_pass("dead-code", before, after)


def test_first_outputs_can_be_optional_too() -> None:
    weights = "<float[1,4,1] w = {1, 2, 3, 4}, float[1,4,1] r = {1, 2, 3, 4}>"
    text = f"g (float[T,N,1] x) => (float[1,N,1] h) {weights} {{ y, h, c = LSTM<hidden_size = 1>(x, w, r) }}"
    model = parse(text)
    assert dead_code(model, Context()) == 2
    assert [t.name for t in model.nodes()[0].outputs] == ["", "h"]
    model.verify()
    feed = {"x": np.ones((3, 2, 1), np.float32)}
    before, after = (session(m.proto()).run(None, feed)[0] for m in (parse(text), model))
    np.testing.assert_array_equal(before, after)


def test_outputs_that_must_be_written_stay() -> None:
    text = "g (float[N,4] x) => (float[N,2] a) { a, b = Split<axis = 1>(x) }"
    assert_pass("dead-code", text, None)


# --- freeze-inputs

DEFAULTS = """<ir_version: 7, opset_import: ["" : 13]> g (float[2] x, float[2] w) => (float[2] y)
  <float[2] w = {2, 3}> { y = Mul(x, w) }"""


def with_defaults() -> Model:
    model = from_proto(onnx.parser.parse_model(DEFAULTS))
    assert [t.name for t in model.graph.inputs] == ["x", "w"]
    return model


def test_inputs_with_defaults_become_constants() -> None:
    model = with_defaults()
    assert freeze_inputs(model, Context()) == 1
    proto = model.proto()
    onnx.checker.check_model(proto, full_check=True)
    assert [i.name for i in proto.graph.input] == ["x"]
    assert [i.name for i in proto.graph.initializer] == ["w"]
    assert session(proto).run(None, {"x": np.ones(2, np.float32)})[0].tolist() == [2, 3]
    assert freeze_inputs(model, Context()) == 0


def test_a_model_without_defaults_is_left_alone() -> None:
    assert freeze_inputs(parse("g (float[2] x) => (float[2] y) { y = Relu(x) }"), Context()) == 0


# --- flush-denormals


def weighted(values: np.ndarray, op: str = "MatMul") -> Model:
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[N] x) => (float[N] y, float[N] z) { y = Relu(x) }'
    )
    del proto.graph.output[1:]
    proto.graph.node.add(op_type=op, input=["x", "w"], output=["v"])
    proto.graph.output.add(name="v")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(values, "w"))
    return from_proto(proto)


def weights_of(model: Model) -> np.ndarray:
    return np.asarray(next(c for c in model.constants()).values)


TINY = float(np.finfo(np.float32).tiny)


def test_denormal_weights_become_zero() -> None:
    given = np.array([1, -1e-40, 1e-45, TINY, -TINY, 0, np.inf, np.nan], np.float32)
    model, context = weighted(given), Context()
    assert flush_denormals(model, context) == 1
    assert context.facts["weights flushed"] == 2
    expected = given.copy()
    expected[1:3] = 0
    np.testing.assert_array_equal(weights_of(model), expected)
    assert given[1] != 0
    assert flush_denormals(model, Context()) == 0


@pytest.mark.parametrize("op", ["Div", "Add", "Mul", "Max"])
def test_a_denormal_that_may_become_a_divisor_stays(op: str) -> None:
    assert flush_denormals(weighted(np.array([1, 1e-40], np.float32), op), Context()) == 0


def test_normal_weights_are_not_touched() -> None:
    model = weighted(np.array([1, TINY, 0], np.float32))
    before = model.proto()
    assert flush_denormals(model, Context()) == 0
    assert model.proto() == before


def test_small_float16_weights_are_real_weights() -> None:
    assert flush_denormals(weighted(np.array([1e-6, 1], np.float16)), Context()) == 0


def test_doubles_have_a_bound_of_their_own() -> None:
    model = weighted(np.array([1e-40, 1e-310], np.float64))
    assert flush_denormals(model, Context()) == 1
    assert weights_of(model).tolist() == [1e-40, 0]


def test_integers_have_no_denormals() -> None:
    assert flush_denormals(weighted(np.array([1, 2])), Context()) == 0
