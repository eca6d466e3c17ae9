"""fold-bn: what a BatchNormalization becomes, and where it must stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import pytest
from cases import assert_pass, parse, run

from graphopt.context import Context
from graphopt.registry import find
from graphopt.shapes import shapes

# scale, bias, mean, variance: with epsilon 0 the map is 2x + 3 and -x + 4
WEIGHTS = "float[2,2,1,1] w = {1, 2, 3, 4}"
BN = "float[2] s = {4, -1}, float[2] b = {1, 2}, float[2] m = {-1, 2}, float[2] v = {4, 1}"
NODE = "y = BatchNormalization<epsilon = 0.0>(c, s, b, m, v)"
IMAGE = "g (float[N,2,4,4] x) => (float[N,{c},{h},{w}] y)"


def graph(body: str, constants: str = "", *, out: tuple[int, int, int] = (2, 4, 4), bn: str = BN) -> str:
    head = IMAGE.format(c=out[0], h=out[1], w=out[2])
    constants = ", ".join(c for c in (constants, bn) if c)
    return f"{head} <{constants}> {{ {body} }}"


def plain(body: str, constants: str, *, out: tuple[int, int, int] = (2, 4, 4)) -> str:
    return graph(body, constants, out=out, bn="")


FOLDED = {
    "behind Conv": (
        graph(f"c = Conv(x, w) {NODE}", WEIGHTS),
        plain("y = Conv(x, w, b)", "float[2,2,1,1] w = {2, 4, -3, -4}, float[2] b = {3, 4}"),
    ),
    "behind Conv with a bias": (
        graph(f"c = Conv(x, w, k) {NODE}", "float[2,2,1,1] w = {1, 2, 3, 4}, float[2] k = {10, 20}"),
        plain("y = Conv(x, w, b)", "float[2,2,1,1] w = {2, 4, -3, -4}, float[2] b = {23, -16}"),
    ),
    "behind a depthwise Conv": (
        graph(f"c = Conv<group = 2>(x, w) {NODE}", "float[2,1,1,1] w = {1, 2}"),
        plain("y = Conv<group = 2>(x, w, b)", "float[2,1,1,1] w = {2, -2}, float[2] b = {3, 4}"),
    ),
    "behind ConvTranspose": (
        graph(f"c = ConvTranspose(x, w) {NODE}", WEIGHTS),
        plain("y = ConvTranspose(x, w, b)", "float[2,2,1,1] w = {2, -2, 6, -4}, float[2] b = {3, 4}"),
    ),
    "behind a grouped ConvTranspose": (
        graph(f"c = ConvTranspose<group = 2>(x, w) {NODE}", "float[2,1,1,1] w = {1, 2}"),
        plain("y = ConvTranspose<group = 2>(x, w, b)", "float[2,1,1,1] w = {2, -2}, float[2] b = {3, 4}"),
    ),
    "in front of Conv without padding": (
        graph("c = BatchNormalization<epsilon = 0.0>(x, s, b, m, v) y = Conv(c, w)", "float[1,2,1,1] w = {1, 10}", out=(1, 4, 4)),
        plain("y = Conv(x, w, b)", "float[1,2,1,1] w = {2, -10}, float[1] b = {43}", out=(1, 4, 4)),
    ),
    "through MaxPool into Conv": (
        graph(
            "a = Conv(x, w) c = MaxPool<kernel_shape = [2, 2]>(a) y = BatchNormalization<epsilon = 0.0>(c, v, b, m, v)",
            WEIGHTS,
            out=(2, 3, 3),
        ),
        plain(
            "a = Conv(x, w, b) y = MaxPool<kernel_shape = [2, 2]>(a)",
            "float[2,2,1,1] w = {2, 4, 3, 4}, float[2] b = {3, 0}",
            out=(2, 3, 3),
        ),
    ),
    "with the Mul and Add around it": (
        graph("c = Mul(x, k) d = BatchNormalization<epsilon = 0.0>(c, s, b, m, v) y = Sub(d, k)", "float k = {2}"),
        plain(
            "y = BatchNormalization<epsilon = 0.0>(x, s, b, m, v)",
            "float[2] s = {4, -2}, float[2] b = {1, 2}, float[2] m = {0, 0}, float[2] v = {1, 1}",
        ),
    ),
}

LEFT = {
    "nothing absorbs it": (graph(f"c = Sigmoid(x) {NODE}"), "before: Sigmoid does not commute with it"),
    "in front of zero padding": (
        graph(
            "c = BatchNormalization(x, s, b, m, v) y = Conv<pads = [1, 1, 1, 1]>(c, w)",
            "float[1,2,3,3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9}",
            out=(1, 4, 4),
        ),
        "a shift does not pass Conv",
    ),
    "a negative scale at MaxPool": (
        graph(f"a = Conv(x, w) c = MaxPool<kernel_shape = [1, 1]>(a) {NODE}", WEIGHTS),
        "a negative scale does not pass MaxPool",
    ),
    "the Conv is used elsewhere": (
        graph("c = Conv(x, w) d = BatchNormalization(c, s, b, m, v) e = Sigmoid(d) y = Add(c, e)", WEIGHTS),
        "its input is used elsewhere",
    ),
    "its parameters are computed": (
        "g (float[N,2] x, float[2] s) => (float[N,2] y) <float[2] b = {1, 2}, float[2] v = {4, 1}>"
        " { y = BatchNormalization(x, s, b, b, v) }",
        "its parameters are not constants",
    ),
    "a negative variance": (
        graph("c = Conv(x, w) y = BatchNormalization(c, s, b, m, s)", WEIGHTS),
        "not finite",
    ),
}


@pytest.mark.parametrize("opset", [9, 14, 15, 17])
@pytest.mark.parametrize("case", FOLDED)
def test_folded(case: str, opset: int) -> None:
    before, after = FOLDED[case]
    assert_pass("fold-bn", before, after, opset=opset)


@pytest.mark.parametrize("case", [c for c in LEFT if c != "a negative variance"])
def test_left(case: str) -> None:
    before, reason = LEFT[case]
    context = assert_pass("fold-bn", before, None)
    assert any(reason in why for why, op in context.rejected if op == "BatchNormalization"), dict(context.rejected)


def refused(body: str, opset: int) -> set[str]:
    """Reasons on models that onnxruntime would not run."""
    model, context = parse(body, opset=opset), Context()
    context.get(shapes, model)  # reading a constant may already write it in another encoding
    before = model.proto()
    assert find("fold-bn").fn(model, context) == 0
    assert model.proto() == before
    return {why for why, _ in context.rejected}


def test_a_negative_variance_stays() -> None:
    assert refused(LEFT["a negative variance"][0], 17) == {"its parameters are not finite"}


def test_training_mode_stays() -> None:
    body = "c = Conv(x, w) y, p, q = BatchNormalization<training_mode = 1>(c, s, b, m, v)"
    assert refused(graph(body, WEIGHTS), 15) == {"in training mode"}


def test_a_statistic_that_is_read_stays() -> None:
    body = "c = Conv(x, w) y, p = BatchNormalization(c, s, b, m, v)".replace("y, p", "y, p, q, r, t")
    text = graph(body, WEIGHTS).replace(" y)", " y, float[2] p)")
    assert refused(text, 9) == {"its running statistics are read"}


def test_unread_statistics_do_not_matter() -> None:
    body = "c = Conv(x, w) y, p, q, r, t = BatchNormalization<epsilon = 0.0>(c, s, b, m, v)"
    model = parse(graph(body, WEIGHTS), opset=9)
    assert find("fold-bn").fn(model, Context()) == 1
    assert [n.op for n in model.nodes()] == ["Conv"]


def test_parameters_that_are_not_per_channel_stay() -> None:
    body = "y = BatchNormalization<spatial = 0>(x, s, b, m, v)"
    assert refused(graph(body), 7) == {"spatial=0: its parameters are not per channel"}


def test_epsilon_and_variance_in_float64() -> None:
    """The variance of each channel counts, down to where epsilon is all of it; the weights are rounded once."""
    random = np.random.default_rng(0)
    values = {n: random.standard_normal(4).astype(np.float32) for n in "sbm"} | {"v": np.array([0, 1e-12, 1e-4, 1e4], np.float32)}
    weights = random.standard_normal((4, 2, 1, 1)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["c"]),
        onnx.helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], epsilon=1e-3),
    ]
    constants = [onnx.numpy_helper.from_array(v, n) for n, v in (*values.items(), ("w", weights))]
    infos = [onnx.helper.make_tensor_value_info(n, 1, ["N", c, 3, 3]) for n, c in (("x", 2), ("y", 4))]
    body = onnx.printer.to_text(onnx.helper.make_graph(nodes, "g", infos[:1], infos[1:], constants))
    model = parse(body)
    assert find("fold-bn").fn(model, Context()) == 1
    factor = values["s"].astype(np.float64) / np.sqrt(values["v"].astype(np.float64) + np.float32(1e-3))
    w, bias = (np.asarray(t.values) for t in model.nodes()[0].inputs[1:])
    np.testing.assert_array_equal(w, (weights * factor.reshape(-1, 1, 1, 1)).astype(np.float32))
    np.testing.assert_array_equal(bias, (values["b"] - values["m"] * factor).astype(np.float32))


def test_a_folded_graph_output_keeps_its_name() -> None:
    model = parse(FOLDED["behind Conv"][0])
    find("fold-bn").fn(model, Context())
    x = np.ones((1, 2, 4, 4), np.float32)
    assert [o.name for o in model.proto().graph.output] == ["y"]
    np.testing.assert_array_equal(run(model.proto(), {"x": x})[0][0, :, 0, 0], [9, -3])
