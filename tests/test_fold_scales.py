"""fold-scales: affine nodes into weights, past what they commute with, and what is left alone and why."""

from __future__ import annotations

import numpy as np
import pytest
from cases import assert_pass, parse, run

from graphopt.affine import affine
from graphopt.affine_axes import follow_reshape
from graphopt.affine_fold import rounded
from graphopt.context import Context
from graphopt.model import Model
from graphopt.registry import find

FLOAT32 = np.dtype(np.float32)


def graph(body: str, constants: str, out: str = "N,2,4,4", given: str = "N,2,4,4") -> str:
    return f"g (float[{given}] x) => (float[{out}] y) <{constants}> {{ {body} }}"


W = "float[2,2,1,1] w = {1, 2, 3, 4}"
UP = "float[4,2,1,1] w = {1, 2, 3, 4, 5, 6, 7, 8}"
W3 = "float[1,2,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 8, 7, 6, 5, 4, 3, 2, 1}"
W3_DOUBLED = "float[1,2,3,3] w = {2, 4, 6, 8, 10, 12, 14, 16, 18, 18, 16, 14, 12, 10, 8, 6, 4, 2}"
M = "float[2,2] w = {1, 2, 3, 4}"

FOLDED = {
    "Mul and Add behind Conv": (
        graph("a = Conv(x, w) b = Mul(s, a) y = Add(b, t)", f"{W}, float[1,2,1,1] s = {{2, -1}}, float t = {{5}}"),
        graph("y = Conv(x, w, b)", "float[2,2,1,1] w = {2, 4, -3, -4}, float[2] b = {5, 5}"),
    ),
    "a constant minus the tensor": (
        graph("a = Conv(x, w) y = Sub(t, a)", f"{W}, float[2,1,1] t = {{2, 3}}"),
        graph("y = Conv(x, w, b)", "float[2,2,1,1] w = {-1, -2, -3, -4}, float[2] b = {2, 3}"),
    ),
    "input normalisation without padding": (
        graph("a = Sub(x, m) b = Div(a, s) y = Conv(b, w)", f"{W}, float[2,1,1] m = {{1, 2}}, float[1] s = {{0.5}}"),
        graph("y = Conv(x, w, b)", "float[2,2,1,1] w = {2, 4, 6, 8}, float[2] b = {-10, -22}"),
    ),
    "input normalisation in front of zero padding": (
        graph(
            "a = Mul(x, s) b = Add(a, t) y = Conv<pads = [1, 1, 1, 1]>(b, w)", f"{W3}, float s = {{2}}, float t = {{6}}", "N,1,4,4"
        ),
        graph(
            "a = Add(x, t) y = Conv<pads = [1, 1, 1, 1]>(a, w)",
            W3_DOUBLED + ", float t = {3}",
            "N,1,4,4",
        ),
    ),
    "a scale between grouped convolutions": (
        graph(
            "a = Mul(x, s) y = Conv<group = 2, pads = [1, 1, 1, 1]>(a, w)",
            "float[2,1,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}, float[2,1,1] s = {2, 0}",
        ),
        graph(
            "y = Conv<group = 2, pads = [1, 1, 1, 1]>(x, w)",
            "float[2,1,3,3] w = {2, 4, 6, 8, 10, 12, 14, 16, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0}",
        ),
    ),
    "past Relu, the scale only": (
        graph(
            "a = Conv(x, w) b = Relu(a) c = Mul(b, s) y = Add(c, t)",
            f"{W}, float[2,1,1] s = {{2, 3}}, float t = {{1}}",
        ),
        graph("a = Conv(x, w) b = Relu(a) y = Add(b, t)", "float[2,2,1,1] w = {2, 4, 9, 12}, float t = {1}"),
    ),
    "past a branch, into both": (
        graph(
            "a = Conv(x, w) b = Conv(x, v) c = Concat<axis = 1>(a, b) d = Add(c, t) y = Conv(d, u)",
            f"{W}, float[1,2,1,1] v = {{5, 6}}, float[3,1,1] t = {{1, 2, 3}}, float[1,3,1,1] u = {{1, 10, 100}}",
            "N,1,4,4",
        ),
        graph(
            "a = Conv(x, w, p) b = Conv(x, v, q) c = Concat<axis = 1>(a, b) y = Conv(c, u)",
            f"{W}, float[1,2,1,1] v = {{5, 6}}, float[2] p = {{1, 2}}, float[1] q = {{3}}, float[1,3,1,1] u = {{1, 10, 100}}",
            "N,1,4,4",
        ),
    ),
    "past Flatten, each scale repeated": (
        graph(
            "a = Mul(x, s) b = Flatten(a) y = Gemm(b, w)",
            "float[2,1,1] s = {2, 3}, float[8,1] w = {1, 1, 1, 1, 1, 1, 1, 1}",
            "N,1",
            "N,2,2,2",
        ),
        graph("b = Flatten(x) y = Gemm(b, w)", "float[8,1] w = {2, 2, 2, 2, 3, 3, 3, 3}", "N,1", "N,2,2,2"),
    ),
    "Gemm with alpha, beta and transB": (
        graph(
            "a = Add(x, t) b = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(a, w, c) y = Mul(b, s)",
            f"{M}, float[2] t = {{2, 4}}, float[2] c = {{1, 1}}, float[2] s = {{1, 10}}",
            "N,2",
            "N,2",
        ),
        graph(
            "y = Gemm<alpha = 0.5, beta = 1.0, transB = 1>(x, w, c)",
            "float[2,2] w = {1, 2, 30, 40}, float[2] c = {7, 130}",
            "N,2",
            "N,2",
        ),
    ),
    "MatMul and Add": (
        graph("a = MatMul(x, w) y = Add(a, t)", f"{M}, float[2] t = {{5, 6}}", "N,2", "N,2"),
        graph("y = Gemm(x, w, t)", f"{M}, float[2] t = {{5, 6}}", "N,2", "N,2"),
    ),
    "around a MatMul of more axes": (
        graph(
            "a = Mul(x, s) b = Add(a, t) c = MatMul(b, w) y = Add(c, u)",
            f"{M}, float s = {{2}}, float[2] t = {{1, 2}}, float[2] u = {{5, 6}}",
            "N,3,2",
            "N,3,2",
        ),
        graph(
            "a = MatMul(x, w) y = Add(a, u)",
            "float[2,2] w = {2, 4, 6, 8}, float[2] u = {12, 16}",
            "N,3,2",
            "N,3,2",
        ),
    ),
    "a weight on the left of MatMul": (
        graph("a = MatMul(w, x) y = Mul(a, s)", f"{M}, float[2,1] s = {{2, 3}}", "N,2,3", "N,2,3"),
        graph("y = MatMul(w, x)", "float[2,2] w = {2, 4, 9, 12}", "N,2,3", "N,2,3"),
    ),
    "attention: 1 / sqrt(d) into the query": (
        graph(
            "q = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(x) a = MatMul(q, t) b = Div(a, s) y = Softmax(b)",
            f"{M}, float s = {{2}}",
            "N,3,3",
            "N,3,2",
        ),
        graph(
            "q = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(x) a = MatMul(q, t) y = Softmax(a)",
            "float[2,2] w = {0.5, 1, 1.5, 2}",
            "N,3,3",
            "N,3,2",
        ),
    ),
    "the tensor's Shape is read too": (
        graph("a = Conv(x, w) y = Mul(a, s) z = Shape(a)", f"{W}, float s = {{2}}").replace(
            " y) <",
            " y, int64[4] z) <",
        ),
        graph("y = Conv(x, w) z = Shape(y)", "float[2,2,1,1] w = {2, 4, 6, 8}").replace(" y) <", " y, int64[4] z) <"),
    ),
    "past DepthToSpace": (
        graph("a = Conv(x, w) b = DepthToSpace<blocksize = 2>(a) y = Mul(b, s)", f"{UP}, float s = {{2}}", "N,1,8,8"),
        graph("a = Conv(x, w) y = DepthToSpace<blocksize = 2>(a)", "float[4,2,1,1] w = {2, 4, 6, 8, 10, 12, 14, 16}", "N,1,8,8"),
    ),
    "a copy of the input": (
        graph("a = Mul(x, s) y = Div(a, s)", "float s = {2}"),
        "g (float[N,2,4,4] x) => (float[N,2,4,4] y) { y = Identity(x) }",
    ),
    "a chain that nothing absorbs": (
        graph("a = Mul(x, s) b = Add(a, t) c = Div(b, s) y = Sub(c, t)", "float s = {2}, float[2,1,1] t = {2, 4}"),
        graph("y = Add(x, t)", "float[2,1,1] t = {-1, -2}"),
    ),
    "LayerNormalization": (
        graph(
            "a = LayerNormalization(x, s, t) b = Mul(a, t) y = Add(b, s)", "float[2] s = {1, 2}, float[2] t = {3, 4}", "N,2", "N,2"
        ),
        graph("y = LayerNormalization(x, s, t)", "float[2] s = {3, 8}, float[2] t = {10, 18}", "N,2", "N,2"),
    ),
    "a small shared bias is copied": (
        graph(
            "a = Conv(x, w, t) b = Conv(x, v, t) c = Add(a, u) y = Mul(b, c)",
            f"{W}, float[2,2,1,1] v = {{1, 2, 3, 4}}, float[2] t = {{1, 2}}, float u = {{1}}",
        ),
        graph(
            "a = Conv(x, w, s) b = Conv(x, v, t) y = Mul(b, a)",
            f"{W}, float[2,2,1,1] v = {{1, 2, 3, 4}}, float[2] t = {{1, 2}}, float[2] s = {{2, 3}}",
        ),
    ),
}

LEFT = {
    "a negative scale at Relu": (
        graph("a = Conv(x, w) b = Relu(a) y = Mul(b, s)", f"{W}, float[2,1,1] s = {{2, -3}}"),
        "a negative scale does not pass Relu",
    ),
    "a shift at Relu": (graph("a = Conv(x, w) b = Relu(a) y = Add(b, t)", f"{W}, float t = {{1}}"), "a shift does not pass Relu"),
    "a constant divided by the tensor": (graph("a = Conv(x, w) y = Div(t, a)", f"{W}, float t = {{1}}"), "a constant divided"),
    "two axes": (
        graph("a = Sigmoid(x) y = Mul(a, t)", "float[2,1,4] t = {1, 2, 3, 4, 5, 6, 7, 8}"),
        "its constant varies along several axes",
    ),
    "a broadcast input": (
        graph("a = Conv(x, w) y = Mul(a, t)", "float[1,2,1,1] w = {1, 2}, float[2,1,1] t = {1, 2}"),
        "its constant broadcasts the input",
    ),
    "used elsewhere": (
        graph("a = Conv(x, w) b = Mul(a, s) c = Sigmoid(a) y = Sub(b, c)", f"{W}, float s = {{2}}"),
        "its input is used elsewhere",
    ),
    "a graph output": (
        graph("a = Conv(x, w) y = Mul(a, s)", f"{W}, float s = {{2}}").replace(" y) <", " y, float[N,2,4,4] a) <"),
        "its input is a graph output",
    ),
    "next to quantised tensors": (
        graph(
            "a = QuantizeLinear(x, s, z) b = DequantizeLinear(a, s, z) c = Mul(b, t) y = Conv(c, w)",
            f"{W}, float s = {{0.1}}, uint8 z = {{128}}, float t = {{2}}",
        ),
        "next to a quantised tensor",
    ),
    "a scale of one part of Add": (
        graph("a = Mul(x, s) y = Add(a, x)", "float s = {2}"),
        "a scale does not pass one input of Add",
    ),
    "padding that counts": (
        graph(
            "a = Add(x, t) b = AveragePool<kernel_shape = [2, 2], pads = [1, 1, 0, 0], count_include_pad = 1>(a) y = Conv(b, w)",
            f"{W}, float t = {{1}}",
        ),
        "a shift does not pass AveragePool",
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_folded(case: str) -> None:
    assert_pass("fold-scales", *FOLDED[case])


@pytest.mark.parametrize("case", LEFT)
def test_left(case: str) -> None:
    before, reason = LEFT[case]
    context = assert_pass("fold-scales", before, None)
    assert any(reason in why for why, _ in context.rejected), dict(context.rejected)


def folded(text: str) -> tuple[Model, set[str]]:
    model, context = parse(text), Context()
    find("fold-scales").fn(model, context)
    model.sort()
    model.verify()
    return model, {why for why, _ in context.rejected}


@pytest.mark.parametrize(("constant", "reason"), [("0", "division by zero"), ("inf", "its constant is not finite")])
def test_no_map(constant: str, reason: str) -> None:
    text = graph("a = Conv(x, w) y = Div(a, s)", f"{W}, float s = {{1}}")
    model, context = parse(text), Context()
    model.nodes()[1].inputs[1].values = np.array(constant, np.float32)
    assert find("fold-scales").fn(model, context) == 0
    assert {why for why, _ in context.rejected} == {reason}


@pytest.mark.parametrize("scale", [60000, 5e-7])
def test_float16_out_of_range_stays(scale: float) -> None:
    text = graph("a = Conv(x, w) y = Mul(a, s)", f"{W}, float s = {{1}}").replace("float", "float16")
    model, context = parse(text), Context()
    weight, factor = (n.inputs[1] for n in model.nodes())
    weight.values, factor.values = np.array([1.3, 2.3, 3.3, 4.3], np.float16).reshape(2, 2, 1, 1), np.array(scale, np.float16)
    assert find("fold-scales").fn(model, context) == 0
    assert set(context.rejected) == {("the folded numbers do not fit float16", "Mul")}


def test_integers_stay() -> None:
    text = "g (int64[N,2] x) => (int64[N,2] y) <int64 s = {2}> { a = Mul(x, s) b = Mul(a, s) y = Mul(b, s) }"
    assert len(folded(text)[0].nodes()) == 3


def test_large_shared_weight_stays() -> None:
    text = graph(
        "a = Conv(x, w) b = Conv(x, w) c = Mul(b, s) y = Concat<axis = 1>(a, c)", "float s = {2}", "N,200,4,4", "N,100,4,4"
    )
    values = ", ".join("1" for _ in range(10000))
    model, reasons = folded(text.replace("<float s", f"<float[100,100,1,1] w = {{{values}}}, float s"))
    assert len(model.nodes()) == 4
    assert any("the weight of Conv is shared" in r for r in reasons)


def test_inside_bodies() -> None:
    """Each graph is folded by itself; a tensor of the outer graph is not changed for a body."""
    body = "g () => (float[N,2] {0}) {{ a{0} = MatMul(o, w{0}) b{0} = Mul(a{0}, s) {0} = Sigmoid(b{0}) }}"
    text = (
        f"g (float[N,2] x, bool c) => (float[N,2] y) <float s = {{2}}, {M.replace(' w', ' wp')}, {M.replace(' w', ' wq')}, {M}>"
        f"{{ o = MatMul(x, w) y = If(c) <then_branch = {body.format('p')}, else_branch = {body.format('q')}> }}"
    )
    model, _ = folded(text)
    assert sorted(n.op for n in model.nodes()) == ["If", "MatMul", "MatMul", "MatMul", "Sigmoid", "Sigmoid"]


def test_reshape_is_followed_by_index() -> None:
    scale = affine(np.array([1.0, 2.0]), np.array([3.0, 4.0]), 1, FLOAT32)
    flat = follow_reshape(scale, ("N", 2, 3), ("N", 6))
    assert not isinstance(flat, str)
    assert flat.axis == 1
    np.testing.assert_array_equal(flat.scale, [1, 1, 1, 2, 2, 2])
    back = follow_reshape(flat, ("N", 6), ("N", 2, 3))
    assert not isinstance(back, str)
    np.testing.assert_array_equal(back.shift, [3, 4])
    assert isinstance(follow_reshape(flat, ("N", 6), ("N", 3, 2)), str)
    assert isinstance(follow_reshape(scale, ("N", 2, None), ("N", None)), str)
    heads = follow_reshape(affine(np.arange(6.0), np.zeros(6), 2, FLOAT32), ("B", "S", 6), ("B", "S", 2, 3))
    assert isinstance(heads, str)  # each head has scales of its own


def test_rounding_once_or_not_at_all() -> None:
    np.testing.assert_array_equal(rounded(np.array([[1e-50, 1.0]]), FLOAT32), np.array([[0, 1]], np.float32))
    assert rounded(np.array([[1e39]]), FLOAT32) is None
    assert rounded(np.array([[1e-7], [1.0]]), np.dtype(np.float16)) is None


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
@pytest.mark.parametrize("channels", [1, 3])
def test_depth_to_space_by_index(mode: str, channels: int) -> None:
    """Scales that differ from channel to channel."""
    random = np.random.default_rng(0)
    deep = 4 * channels
    text = (
        f"g (float[1,2,3,3] x) => (float[1,{channels},6,6] y)"
        f" <float[{deep},2,1,1] w, float[{channels},1,1] s, float[{channels},1,1] t>"
        f'{{ a = Conv(x, w) b = DepthToSpace<blocksize = 2, mode = "{mode}">(a) c = Mul(b, s) y = Add(c, t) }}'
    )
    for name, count in (("w", deep * 2), ("s", channels), ("t", channels)):
        end = ">" if name == "t" else ","
        text = text.replace(f" {name}{end}", f" {name} = {{{numbers(random, count)}}}{end}", 1)
    model, _ = folded(text)
    assert [n.op for n in model.nodes()] == ["Conv", "DepthToSpace"]
    inputs = {"x": random.standard_normal((1, 2, 3, 3)).astype(np.float32)}
    np.testing.assert_allclose(run(model.proto(), inputs)[0], run(parse(text).proto(), inputs)[0], rtol=1e-5, atol=1e-5)


def numbers(random: np.random.Generator, count: int) -> str:
    return ", ".join(f"{v:.3f}" for v in random.standard_normal(count))
