"""fold-constants: what can be known is a constant; what is random, quantised, stored smaller or unknown is left alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from cases import assert_pass, parse

from graphopt.context import Context
from graphopt.model import Model, from_proto
from graphopt.passes.dead_code import dead_code
from graphopt.passes.fold_constants import fold_constants
from graphopt.runtime import session

NUMBERS = (
    "int64 zero = {0}, int64 one = {1}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[1] m1 = {-1}, int64[1] n2 = {2}, "
    "float[2] w = {1.5, -2}, float[2,3] m = {1, 2, 3, 4, 5, 6}"
)


def fold(nodes: str, expected: str | None, *, inputs: str = "float[B,S,4] x", output: str = "float y") -> Context:
    """The nodes must become `expected` (None: nothing to fold)."""
    before = f"g ({inputs}) => ({output}) <{NUMBERS}> {{ {nodes} }}"
    return assert_pass("fold-constants", before, None if expected is None else f"g ({inputs}) => ({output}) {expected}")


def test_nodes_on_constants() -> None:
    nodes = "a = Mul(w, w) b = Neg(a) c = Unsqueeze(b, axis0) y = Add(x, c)"
    fold(nodes, "<float[1,2] c = {-2.25, -4}> { y = Add(x, c) }", inputs="float[N,2] x", output="float[N,2] y")


def test_nodes_with_several_outputs() -> None:
    nodes = "a, b = Split<axis = 0>(w) c = Mul(x, a) y = Add(c, b)"
    after = "<float[1] a = {1.5}, float[1] b = {-2}> { c = Mul(x, a) y = Add(c, b) }"
    fold(nodes, after, inputs="float[N,2] x", output="float[N,2] y")


def test_a_constant_output_is_written_by_a_constant_node() -> None:
    after = "{ z = Constant<value = float[2] {-1.5, 2}>() y = Relu(x) }"
    fold("y = Relu(x) z = Neg(w)", after, inputs="float[N] x", output="float[N] y, float[2] z")


HEADS = (
    "s = Shape(x) b0 = Gather(s, zero) b = Unsqueeze(b0, axis0) l0 = Gather(s, one) l = Unsqueeze(l0, axis0) "
    "t = Concat<axis = 0>(b, l, n2, m1) y = Reshape(x, t)"
)


def test_reshape_targets() -> None:
    fold(HEADS, "<int64[4] t = {0, 0, 2, -1}> { y = Reshape(x, t) }", output="float[B,S,2,2] y")


def test_one_unknown_element_is_what_is_left() -> None:
    nodes = HEADS.replace("t = Concat<axis = 0>(b, l, n2, m1)", "bl = Mul(b, l) four = Mul(n2, n2) t = Concat<axis = 0>(bl, four)")
    fold(nodes, "<int64[2] t = {-1, 4}> { y = Reshape(x, t) }", output="float[M,4] y")


def test_an_element_given_at_run_time_is_what_is_left() -> None:
    model = parse(f"g (float[6] x, int64[1] u) => (float[P,2] y) <{NUMBERS}> {{ t = Concat<axis = 0>(u, n2) y = Reshape(x, t) }}")
    assert fold_constants(model, Context()) == 1
    feed = {"x": np.arange(6, dtype=np.float32), "u": np.array([3])}
    assert session(model.proto()).run(None, feed)[0].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_two_unknown_elements_stay() -> None:
    nodes = HEADS.replace("(b, l, n2, m1)", "(l, b, n2, n2)")
    fold(nodes, None, output="float[C,D,E,F] y")


def test_a_zero_that_is_a_size_stays() -> None:
    nodes = "s = Shape(x) t = Concat<axis = 0>(s, axis0) y = Reshape<allowzero = 1>(x, t)"
    assert_pass("fold-constants", f"g (float[B,0] x) => (float[C,D,E] y) <{NUMBERS}> {{ {nodes} }}", None)


def test_picked_elements_of_a_dynamic_shape() -> None:
    nodes = "s = Shape(x) c = Gather(s, n2) d = Cast<to = 1>(c) e = Sqrt(d) y = Div(x, e)"
    fold(nodes, "<float[1] e = {2}> { y = Div(x, e) }", output="float[B,S,4] y")


def test_expand_that_repeats_its_input() -> None:
    nodes = "s = Shape(x) b = Slice(s, axis0, axis1) t = Concat<axis = 0>(n2, b, n2) y = Expand(z, t)"
    fold(nodes, "<int64[3] t = {2, 1, 2}> { y = Expand(z, t) }", inputs="float[B] x, float[B,1] z", output="float[2,B,2] y")


def test_equal_values_are_computed_once() -> None:
    nodes = "r = Relu(x) s = Shape(x) q = Shape(r) a = Tile(x, s) b = Tile(r, q) y = Add(a, b)"
    after = "{ r = Relu(x) s = Shape(x) a = Tile(x, s) b = Tile(r, s) y = Add(a, b) }"
    fold(nodes, after, inputs="float[B,S] x", output="float[C,D] y")


IF = """g (float[N,2] x) => (float[N,2] y) <bool c = {VALUE}, float[2] w = {1.5, -2}> {
  a = Relu(x)
  y = If (c) <
    then_branch = t () => (float[N,2] p) { q = Add(a, w) p = Mul(q, a) },
    else_branch = e () => (float[N,2] r) { r = Identity(a) }>
}"""


def test_the_branch_taken_is_inlined() -> None:
    assert_pass(
        "fold-constants",
        IF.replace("VALUE", "1"),
        "g (float[N,2] x) => (float[N,2] y) <float[2] w = {1.5, -2}> { a = Relu(x) q = Add(a, w) p = Mul(q, a) y = Identity(p) }",
    )
    assert_pass(
        "fold-constants",
        IF.replace("VALUE", "0"),
        "g (float[N,2] x) => (float[N,2] y) { a = Relu(x) r = Identity(a) y = Identity(r) }",
    )


NESTED = """g (float[N,1,2] x) => (float[N,2] y) <int64 one = {1}, int64[1] axis1 = {1}> {
  a = Relu(x) s = Shape(a) d = Gather(s, one) c = Equal(d, one)
  b = If (c) <
    then_branch = u () => (float[N,2] r) {
      v = If (c) <
        then_branch = t () => (float[N,1,2] p) { p = Neg(a) },
        else_branch = e () => (float[N,1,2] q) { q = Abs(a) }>
      r = Squeeze(v, axis1) },
    else_branch = f () => (float[N,1,2] z) { z = Identity(a) }>
  y = Relu(b)
}"""


def test_nested_branches_that_depend_on_a_size() -> None:
    """What exporters write for `squeeze if there is something to squeeze`."""
    after = "<int64[1] i = {1}> { a = Relu(x) v = Neg(a) b = Squeeze(v, i) y = Relu(b) }"
    assert_pass("fold-constants", NESTED, f"g (float[N,1,2] x) => (float[N,2] y) {after}")


def test_bodies_are_folded_too() -> None:
    text = f"""g (float[2] x, int64 n, bool c) => (float[2] y) <{NUMBERS}> {{
      y = Loop (n, c, x) <
        body = b (int64 i, bool d, float[2] v) => (bool e, float[2] u) {{ e = Identity(d) k = Neg(w) u = Add(v, k) }}>
    }}"""
    model = parse(text)
    assert fold_constants(model, Context()) == 1
    model.verify()
    assert sorted(n.op for n in model.nodes()) == ["Add", "Identity", "Loop"]


# --- left alone


def test_random_nodes() -> None:
    model = parse(f"g (float[2] x) => (float[2] y) <{NUMBERS}> {{ a = RandomNormalLike(w) y = Add(x, a) }}")
    context = Context()
    assert fold_constants(model, context) == 0
    assert context.rejected["its results are random", "RandomNormalLike"] == 1


def test_quantised_weights() -> None:
    text = """g (float[N,2] x) => (float[N,2] y) <int8[2] q = {3, -4}, float s = {0.5}, int8 z = {0}> {
      d = DequantizeLinear(q, s, z) y = Mul(x, d) }"""
    context = assert_pass("fold-constants", text, None)
    assert ("quantised weights stay quantised", "DequantizeLinear") in context.rejected


def model_with(nodes: str, weights: dict[str, np.ndarray]) -> Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,M] x) => (float[P,Q] y) {{ {nodes} }}')
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(v, k) for k, v in weights.items()])
    return from_proto(proto)


@pytest.mark.parametrize(
    ("nodes", "weights", "reason"),
    [
        ("f = ConstantOfShape(s) y = MatMul(x, f)", {"s": np.array([64, 64])}, "the result would be stored larger than it is now"),
        (
            "f = ConstantOfShape(s) y = MatMul(x, f)",
            {"s": np.array([640, 640])},
            "the result is much larger than what it is made from",
        ),
        (
            "f = Cast<to = 1>(q) g = Mul(f, s) t = Transpose(g) y = MatMul(x, t)",
            {"q": np.ones((64, 64), np.int8), "s": np.ones(64, np.float32)},
            "the result would be stored larger than it is now",
        ),
        (
            "i = NonZero(q) z = Cast<to = 7>(x) j = MatMul(z, i) y = Cast<to = 1>(j)",
            {"q": np.ones((512, 512), np.float32)},
            "much larger",
        ),
    ],
)
def test_what_would_be_stored_larger(nodes: str, weights: dict[str, np.ndarray], reason: str) -> None:
    model, context = model_with(nodes, weights), Context()
    before = model.proto()
    assert fold_constants(model, context) == 0
    assert model.proto() == before
    assert any(reason in text for text, _ in context.rejected)


def test_the_limit_is_an_option() -> None:
    weights = {"s": np.array([640, 640])}
    nodes = "f = ConstantOfShape(s) t = Trilu(f) y = MatMul(x, t)"
    assert fold_constants(model_with(nodes, weights), Context()) == 0
    model = model_with(nodes, weights)
    assert fold_constants(model, Context(), max_bytes=1 << 21) == 1
    assert [n.op for n in model.nodes()] == ["MatMul"]


def test_small_fills_are_folded() -> None:
    model = model_with("f = ConstantOfShape(s) y = MatMul(x, f)", {"s": np.array([8, 8])})
    assert fold_constants(model, Context()) == 1
    assert [n.op for n in model.nodes()] == ["MatMul"]


def test_a_node_that_cannot_be_evaluated_does_not_stop_the_others() -> None:
    weights = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32), "i": np.array([7])}
    model = model_with("p = Gather(a, i) q = Neg(b) r = Concat<axis = 0>(p, q) y = MatMul(x, r)", weights)
    context = Context()
    assert fold_constants(model, context) == 1
    assert context.rejected["cannot be evaluated by onnxruntime", "Gather"] >= 1
    assert [n.op for n in model.nodes()] == ["Gather", "Concat", "MatMul"]


def test_results_are_the_runtime_s_own() -> None:
    """Folding must give the bits that the node would have given."""
    weights = {"w": np.random.default_rng(0).normal(size=(33, 17)).astype(np.float32)}
    nodes = "a = Erf(w) b = Softmax(a) c = ReduceL2<keepdims = 1>(b) d = Div(b, c) y = MatMul(x, d)"
    before = model_with(nodes, weights)
    after = model_with(nodes, weights)
    assert fold_constants(after, Context()) == 1
    feed = {"x": np.eye(33, dtype=np.float32)}
    left, right = (session(m.proto(), optimize=False).run(None, feed)[0] for m in (before, after))
    np.testing.assert_array_equal(left, right)


def test_wrong_declarations_are_corrected() -> None:
    """An output declared with another rank than the node gives: onnxruntime warns, ONNX's check does not see it until folded."""
    text = f"g (float[B,S,4] x) => (float[B,L] y) <{NUMBERS}> {{ {HEADS} }}"
    model = parse(text)
    assert fold_constants(model, Context()) > 0
    model.sort()
    model.verify()
    assert model.graph.outputs[0].shape == [None, None, 2, 2]


def test_many_nodes_in_one_session(monkeypatch: pytest.MonkeyPatch) -> None:
    import graphopt.folding

    opened = []

    def counted(proto: onnx.ModelProto, *, optimize: bool) -> object:
        opened.append(proto)
        return session(proto, optimize=optimize)

    monkeypatch.setattr(graphopt.folding, "session", counted)
    body = " ".join(f"a{i} = Neg(w{i}) x{i + 1} = Mul(x{i}, a{i})" for i in range(200))
    proto = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,2] x0) => (float[N,2] y) {{ {body} y = Relu(x200) }}'
    )
    proto.graph.initializer.extend([onnx.numpy_helper.from_array(np.full(2, i, np.float32), f"w{i}") for i in range(200)])
    model = from_proto(proto)
    assert fold_constants(model, Context()) == 200
    assert len(opened) == 1
    assert dead_code(model, Context()) == 0
