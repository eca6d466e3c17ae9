"""Shape analysis: symbols, shape arithmetic, bodies; and that nothing it says is untrue."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import onnx
import pytest
import shape_truth
import zoo
from cases import parse

from graphopt.model import from_proto
from graphopt.shapes import Shape, Shapes, shapes


def analyse(body: str, *, opset: int = 17, imports: str = "") -> Shapes:
    return shapes(parse(body, opset=opset, imports=imports))


def shape_after(nodes: str, initializers: str = "", inputs: str = "float[B,S,24] x", **options: Any) -> Shape | None:
    """The shape of y, the result of the nodes."""
    return analyse(f"g ({inputs}) => (float y) {initializers} {{ {nodes} }}", **options).shape("y")


ONE = "<int64 zero = {0}, int64 one = {1}, int64[1] axis0 = {0}, int64[1] axis1 = {1}, int64[1] m1 = {-1}, int64[1] n12 = {12}>"
BATCH_AND_LENGTH = (
    "s = Shape(x) b0 = Gather(s, zero) b = Unsqueeze(b0, axis0) "
    "l0 = Gather(s, one) l = Unsqueeze(l0, axis0) two = Add(axis1, axis1) "
)

SHAPES = {
    "heads": (BATCH_AND_LENGTH + "t = Concat<axis = 0>(b, l, n12, two) y = Reshape(x, t)", ("B", "S", 12, 2)),
    "what is left": (BATCH_AND_LENGTH + "t = Concat<axis = 0>(b, l, n12, m1) y = Reshape(x, t)", ("B", "S", 12, 2)),
    "product of symbols": (
        BATCH_AND_LENGTH + "bl = Mul(b, l) t = Concat<axis = 0>(bl, n12, two) y = Reshape(x, t)",
        ("B*S", 12, 2),
    ),
    "product and rest": (BATCH_AND_LENGTH + "bl = Mul(b, n12) t = Concat<axis = 0>(bl, m1) y = Reshape(x, t)", ("12*B", "2*S")),
    "a slice of a shape": ("s = Shape(x) h = Slice(s, axis1, n12) t = Concat<axis = 0>(m1, h) y = Reshape(x, t)", ("B", "S", 24)),
    "shape with an end": ("s = Shape<end = 2>(x) t = Concat<axis = 0>(s, n12, m1) y = Reshape(x, t)", ("B", "S", 12, 2)),
    "concat adds": ("y = Concat<axis = 1>(x, x, x)", ("B", "3*S", 24)),
    "flatten": ("y = Flatten<axis = 2>(x)", ("B*S", 24)),
    "tile": ("r = Concat<axis = 0>(n12, axis1, axis1) y = Tile(x, r)", ("12*B", "S", 24)),
    "expand": ("s = Shape(x) t = Concat<axis = 0>(n12, s) y = Expand(x, t)", (12, "B", "S", 24)),
    "constant of shape": ("s = Shape(x) y = ConstantOfShape(s)", ("B", "S", 24)),
    "range": ("s = Shape(x) l = Gather(s, one) r = Range(zero, l, one) y = Cast<to = 1>(r)", ("S",)),
    "all but the first": ("e = Mul(n12, n12) y = Slice(x, axis1, e, m1)", ("B", "S", 23)),
    "from the start to a symbol": (BATCH_AND_LENGTH + "z = Reshape(x, m1) y = Slice(z, axis0, l)", None),
    "split": ("y, z = Split<axis = 2>(x)", ("B", "S", 12)),
    "squeeze of a value": (
        "s = Shape(x) i = Gather(s, axis1) j = Squeeze(i, axis0) k = Unsqueeze(j, axis0) t = Concat<axis = 0>(m1, k) "
        "y = Reshape(x, t)",
        ("24*B", "S"),
    ),
    "halves that come out": (
        BATCH_AND_LENGTH
        + "d = Mul(l, two) h = Div(d, two) t = Concat<axis = 0>(b, h, m1) y = Reshape(x, t)",
        ("B", "S", 24),
    ),
    "where nothing is -1": (
        "s = Shape(x) e = Equal(s, m1) n = ConstantOfShape<value = int64[1] {7}>(n12) f = Gather(n, axis0) t = Where(e, f, s) "
        "y = Expand(x, t)",
        ("B", "S", 24),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SHAPES)
def test_shape_arithmetic(case: str) -> None:
    nodes, expected = SHAPES[case]
    found = shape_after(nodes, ONE)
    if expected is None:
        assert found is not None
        assert all(isinstance(size, str) and size not in ("B", "S", "B*S") for size in found)
    else:
        assert found == expected


def test_convolution_and_pooling_of_symbolic_images() -> None:
    conv = "y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 1]>(x, w)"
    image, weights = "float[N,3,H,W] x, float[8,3,3,3] w", ""
    assert shape_after(conv, weights, image) == ("N", 8, "floor((H + 1)/2)", "W")
    assert shape_after("y = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(x)", weights, image) == (
        "N",
        3,
        "floor((H)/2)",
        "floor((W)/2)",
    )
    up = "y = ConvTranspose<strides = [2, 2]>(x, w)"
    assert shape_after(up, "", "float[N,8,H,W] x, float[8,4,2,2] w") == ("N", 4, "2*H", "2*W")
    scales = "<float[4] s = {1, 1, 2, 0.5}>"
    assert shape_after("y = Resize(x, , s)", scales, image) == ("N", 3, "2*H", "floor((W)/2)")


def test_broadcasting_of_symbols() -> None:
    two = "float[B,S] x, float[B,T] z"
    assert shape_after("y = Add(x, x)", "", two) == ("B", "S")
    assert shape_after("y = Add(x, z)", "", two) == ("B", "broadcast(S, T)")
    assert shape_after("a = Add(x, z) y = Add(z, x)", "", two) == ("B", "broadcast(S, T)")
    assert shape_after("y = Add(x, z)", "", "float[B,S] x, float[B,5] z") == ("B", 5)
    assert shape_after("y = Add(x, z)", "", "float[B,S] x, float[1] z") == ("B", "S")


def test_a_table_cut_to_the_length_broadcasts_to_the_length() -> None:
    """Position embeddings: min(512, S) rows fit S rows only where they are S rows."""
    nodes = "s = Shape(x) l = Gather(s, axis1) t = Slice(p, axis0, l, axis1) y = Add(x, t)"
    known = analyse(f"g (float[B,S,24] x, float[1,512,24] p) => (float y) {ONE} {{ {nodes} }}")
    assert known.shape("t") == (1, "min(512, S)", 24)
    assert known.shape("y") == ("B", "S", 24)


def test_unknown_stays_unknown() -> None:
    known = analyse(
        "g (float[N,4] x) => (float y, float[M] z) { i = NonZero(x) a = Cast<to = 1>(i) y = test.op.Any(a) z = Flatten(y) }"
    )
    size = known.shape("i")
    assert size is not None
    assert size[0] == 2
    assert str(size[1]).startswith("?")
    assert known.shape("a") == size
    assert known.shape("y") is None
    assert known.rank("y") is None
    assert known.static("x") is None
    assert known.value("i") is None


def test_two_unnamed_axes_are_not_the_same() -> None:
    known = analyse("g (float[?,?] x) => (float[?,?] y) { y = Relu(x) }")
    first, second = known.shape("x") or (None, None)
    assert first != second
    assert known.shape("y") == (first, second)


def test_values() -> None:
    nodes = "s = Shape(x) b = Gather(s, axis0) d = Mul(b, n12) c = Concat<axis = 0>(d, n12, u) e = Greater(c, m1)"
    known = analyse(f"g (float[B,4] x, int64[1] u) => (bool[3] e) {ONE} {{ {nodes} }}")
    assert known.value("s") == ("B", 4)
    assert known.value("c") == ("12*B", 12, None)
    assert known.value("e") == (True, True, None)
    assert known.value("n12") == (12,)
    assert known.value("x") is None


def test_values_that_would_wrap_around_are_unknown() -> None:
    known = analyse("g (int32[1] u) => (int32[1] y) <int32[1] big = {2147483647}> { a = Add(big, big) y = Add(a, u) }")
    assert known.value("big") == (2147483647,)
    assert known.value("a") == (None,)


def test_declared_shapes_that_are_wrong() -> None:
    known = analyse("g (float[N,4] x) => (float[N,4] y) <float[N,5,6] a> { a = Relu(x) y = Relu(a) }")
    assert known.shape("a") == ("N", 4)
    assert known.shape("y") == ("N", 4)


def test_declared_shapes_help_where_the_operator_is_unknown() -> None:
    known = analyse("g (float[N,4] x) => (float[N,4] y) <float[N,5] a> { a = test.op.Any(x) y = Relu(a) }")
    assert (known.shape("y") or ())[1] == 5


def test_microsoft_operators() -> None:
    text = "g (float[B,S,8] x, float[8] b) => (float y) { y = com.microsoft.BiasGelu(x, b) }"
    known = analyse(text, imports=', "com.microsoft" : 1')
    assert known.shape("y") == ("B", "S", 8)
    assert known.dtype("y") == np.float32


IF = """g (float[N,4] x, bool c) => (float y) {
  y = If (c) <then_branch = t () => (float a) { a = Relu(x) }, else_branch = e () => (float b) { ELSE }>
}"""


def test_if_gives_what_both_branches_agree_on() -> None:
    assert analyse(IF.replace("ELSE", "b = Neg(x)")).shape("y") == ("N", 4)
    assert (analyse(IF.replace("ELSE", "b = Concat<axis = 1>(x, x)")).shape("y") or ())[0] == "N"
    assert (analyse(IF.replace("ELSE", "b = Concat<axis = 1>(x, x)")).static("y")) is None
    assert analyse(IF.replace("ELSE", "b = ReduceSum<keepdims = 0>(x)")).shape("y") is None


LOOP = """g (float[N,4] x, int64 n, bool c) => (float y, float z) {
  y, z = Loop (n, c, x) <body = l (int64 i, bool d, float v) => (bool e, float w, float s) { e = Identity(d) BODY s = Relu(v) }>
}"""


def test_loops() -> None:
    steady = analyse(LOOP.replace("BODY", "w = Neg(v)"))
    assert steady.shape("y") == ("N", 4)
    assert steady.shape("v") == ("N", 4)
    assert (steady.shape("z") or ())[1:] == ("N", 4)
    growing = analyse(LOOP.replace("BODY", "w = Concat<axis = 0>(v, v)"))
    assert (growing.shape("y") or ())[1] == 4
    assert str((growing.shape("y") or ())[0]).startswith("?y")
    assert (growing.shape("v") or ())[0] != "N"
    flat = analyse(LOOP.replace("BODY", "w = Flatten(v)").replace("[N,4]", "[N,4,2]"))
    assert flat.shape("y") is None


def test_scan() -> None:
    body = "b (float[4] a, float[4] v) => (float[4] w, float[4] o) { w = Add(a, v) o = Neg(w) }"
    text = f"g (float[4] s, float[T,4] x) => (float y, float z) {{ y, z = Scan (s, x) <num_scan_inputs = 1, body = {body}> }}"
    known = analyse(text)
    assert known.shape("y") == (4,)
    assert known.shape("z") == ("T", 4)


def test_malformed_nodes_do_no_harm() -> None:
    known = analyse(
        "g (float[N,4] x) => (float y) <int64[1] i = {9}> { a = Transpose<perm = [0, 7]>(x) b = Shape(a) y = Gather(x, i) }"
    )
    assert known.shape("x") == ("N", 4)


def test_time_grows_with_the_number_of_nodes() -> None:
    """Every node is asked about once, and nodes that look alike only once together."""
    body = " ".join(f"t{i} = Shape(x{i}) x{i + 1} = Reshape(x{i}, t{i})" for i in range(500))
    known = analyse(f"g (float[N,4] x0) => (float y) {{ {body} y = Relu(x500) }}")
    assert known.shape("y") == ("N", 4)


# --- nothing it says is untrue


def test_nothing_said_about_onnx_node_tests_is_untrue() -> None:
    checked = 0
    for test in islice(zoo.node_tests(["node", "simple"]), 0, None, 4):
        for feed, _ in test.data:
            try:
                model = from_proto(test.model)
                zoo.session(test.model.SerializeToString()).run(None, feed)
            except Exception:  # too old for graphopt, or nothing onnxruntime runs; its exceptions have no common class
                continue
            assert not shape_truth.lies(model, feed), test.name
            checked += 1
    assert checked > 200


@pytest.mark.network
@pytest.mark.parametrize("id", zoo.MODELS)
def test_nothing_said_about_real_models_is_untrue(id: str) -> None:
    path = zoo.model(id)
    model = from_proto(onnx.load(path))
    for batch in (1, 2):
        assert not shape_truth.lies(model, zoo.feeds(path, batch=batch, seed=batch, id=id))


@pytest.mark.network
def test_the_reshape_targets_of_a_transformer() -> None:
    model = from_proto(onnx.load(zoo.model("minilm_l3")))
    known = shapes(model)
    targets = [known.value(n.inputs[1].name) for n in model.nodes() if n.op == "Reshape" and "attention" in n.name]
    split, merged = ("batch_size", "sequence_length", 12, 32), ("batch_size", "sequence_length", 384)
    assert targets == [split, split, split, merged] * 3


def test_the_truth_harness_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    model = parse("g (float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    feed = {"x": np.ones((3, 4), np.float32)}
    assert not shape_truth.lies(model, feed)
    for wrong in (("N", 5), (2, 4), ("N", "N"), ("N",)):
        monkeypatch.setattr(shape_truth, "shapes", lambda _, wrong=wrong: Shapes({"y": wrong}, {}))
        assert shape_truth.lies(model, feed)
    monkeypatch.setattr(shape_truth, "shapes", lambda _: Shapes({}, {"y": np.dtype(np.int64)}))
    assert shape_truth.lies(model, feed)
