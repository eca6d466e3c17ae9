"""Layers as matrices, sums over rows, and models run in stages: what repair is made of."""

from __future__ import annotations

import numpy as np
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.data import open_dataset
from graphopt.feeds import input_specs
from graphopt.gram import Gram, inputs_at, outputs_at, positions, spread
from graphopt.layers import find_layers, from_matrix, to_matrix
from graphopt.model import Model, from_proto
from graphopt.runtime import run, session
from graphopt.shapes import shapes
from graphopt.walk import Store, Walk, mirrorable, mirrored


def parsed(text: str) -> Model:
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}'))


def weighted(text: str, **sizes: tuple[int, ...]) -> Model:
    """The model of the text, with random constants for the inputs named in `sizes`."""
    random = np.random.default_rng(0)
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {text}')
    for name, shape in sizes.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(random.standard_normal(shape).astype(np.float32), name))
    return from_proto(proto)


CONVOLUTIONS = {
    "3x3 padded": ("pads=[1,1,1,1]", (6, 5, 3, 3), (2, 5, 9, 7)),
    "strides and odd pads": ("strides=[2,3],pads=[0,1,2,0]", (4, 3, 3, 2), (3, 3, 11, 10)),
    "dilated": ("dilations=[2,1],pads=[2,0,2,0]", (4, 3, 3, 3), (2, 3, 9, 9)),
    "same upper": ('auto_pad="SAME_UPPER",strides=[2,2]', (4, 3, 4, 3), (2, 3, 9, 8)),
    "same lower": ('auto_pad="SAME_LOWER",strides=[2,2]', (4, 3, 4, 3), (2, 3, 9, 8)),
    "depthwise": ("group=5,pads=[1,1,1,1]", (5, 1, 3, 3), (2, 5, 6, 6)),
    "pointwise": ("strides=[2,2]", (7, 4, 1, 1), (2, 4, 6, 5)),
    "1-d": ("pads=[2,1],strides=[2]", (4, 3, 5), (3, 3, 13)),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_is_its_matrix(case: str) -> None:
    """Sampled inputs times the matrix, plus the bias, are what onnxruntime computes there."""
    options, weight, shape = CONVOLUTIONS[case]
    dims = ",".join("abcd"[: len(shape)])
    model = weighted(
        f"g (float[{dims}] x) => (float[{dims}2] y) {{ y = Conv<{options}>(x, w, b) }}".replace("d2", "e"), w=weight, b=weight[:1]
    )
    (layer,), left = find_layers(model)
    assert not left
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    y = run(session(model.proto()), {"x": x})[0]
    values = {c.name: np.asarray(c.values) for c in model.constants()}
    matrix = to_matrix(layer, values["w"])
    at = positions(layer, y.shape, 17, 3)
    assert len(at) == 17 == len(set(at.tolist()))
    found = np.einsum("ngf,gfo->ngo", inputs_at(layer, x, spread(layer, y.shape), at), matrix)
    found += values["b"].reshape(matrix.shape[0], -1)
    np.testing.assert_allclose(found, outputs_at(layer, y, at), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(from_matrix(layer, matrix, values["w"]), values["w"])


@pytest.mark.parametrize("node", ["y = Gemm<transB=1>(x, w, b)", "y = Gemm(x, w, b)", "m = MatMul(x, w) y = Add(m, b)"])
def test_a_product_is_its_matrix(node: str) -> None:
    size = (6, 4) if "transB" in node else (4, 6)
    model = weighted(f"g (float[N,4] x) => (float[N,6] y) {{ {node} }}", w=size, b=(6,))
    (layer,), _ = find_layers(model)
    assert (layer.y, layer.bias) == ("y", "b")
    x = np.random.default_rng(1).standard_normal((5, 4)).astype(np.float32)
    y = run(session(model.proto()), {"x": x})[0]
    values = {c.name: np.asarray(c.values) for c in model.constants()}
    at = np.array([0, 3])
    found = inputs_at(layer, x, (5,), at)[:, 0] @ to_matrix(layer, values["w"])[0] + values["b"]
    np.testing.assert_allclose(found, outputs_at(layer, y, at)[:, 0], rtol=1e-5)


def test_layers_that_cannot_be_taken_say_why() -> None:
    shared = weighted("g (float[N,4] x) => (float[N,4] y) { a = MatMul(x, w) y = MatMul(a, w) }", w=(4, 4))
    assert [reason for _, reason in find_layers(shared)[1]] == ["its weight is shared"] * 2
    computed = parsed("g (float[N,4] x, float[4,4] w) => (float[N,4] y) { y = MatMul(x, w) }")
    assert [reason for _, reason in find_layers(computed)[1]] == ["its weight is not a constant"]
    grouped = weighted("g (float[N,4,5,5] x) => (float[N,6,5,5] y) { y = Conv<group=2>(x, w) }", w=(6, 2, 1, 1))
    assert not find_layers(grouped)[0]
    assert len(find_layers(grouped)[1]) == 1


def test_damaged_nodes_are_left_with_a_reason() -> None:
    model = weighted("g (float[N,4,5,5] x) => (float[N,6,5,5] y) { y = Conv(x, w) }", w=(6, 4, 1, 1))
    model.graph.nodes[0].inputs[1].values = np.float32(1)
    layers, ((_, reason),) = find_layers(model)
    assert not layers
    assert reason == "Conv is not as its rule expects"


def gram(x: np.ndarray, y: np.ndarray, parts: int = 1) -> Gram:
    found = Gram()
    for a, b in zip(np.array_split(x, parts), np.array_split(y, parts), strict=True):
        found.add(a[:, None], b[:, None])
    return found


@settings(deadline=None, max_examples=20)
@given(st.integers(8, 60), st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_moments_do_not_depend_on_the_batches(rows: int, features: int, outputs: int, parts: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = (random.standard_normal((rows, features)) * 3 + 50).astype(np.float32)
    y = (random.standard_normal((rows, outputs)) - 20).astype(np.float32)
    found = gram(x, y, parts).moments()
    joined = gram(x[: rows // 2], y[: rows // 2]).moments().joined(gram(x[rows // 2 :], y[rows // 2 :]).moments())
    for m in (found, joined):
        np.testing.assert_allclose(
            m.cov[0], np.cov(x.T.astype(np.float64), bias=True).reshape(features, features), rtol=1e-4, atol=1e-3
        )
        np.testing.assert_allclose(m.mean_y[0], y.mean(0, dtype=np.float64), rtol=1e-6)
        np.testing.assert_allclose(m.var_y[0], y.var(0, dtype=np.float64), rtol=1e-3, atol=1e-4)


def test_ridge_without_strength_is_least_squares_and_the_error_is_the_error() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((200, 5)).astype(np.float32)
    y = (x @ random.standard_normal((5, 3)) + 0.3 * random.standard_normal((200, 3)) + 2).astype(np.float32)
    m = gram(x, y, 3).moments()
    matrix, bias = m.ridge(np.zeros((1, 5, 3)), 0.0)
    wide = np.c_[x, np.ones(200)].astype(np.float64)
    expected = np.linalg.lstsq(wide, y.astype(np.float64), rcond=None)[0]
    np.testing.assert_allclose(np.r_[matrix[0], bias], expected, rtol=1e-5, atol=1e-6)
    wrong = np.square(wide @ np.r_[matrix[0], bias] - y).sum(1).mean()
    assert m.error((matrix, bias)) == pytest.approx(wrong / y.var(0, dtype=np.float64).sum(), rel=1e-4)
    scaled = m.matched((matrix, bias))
    np.testing.assert_allclose((wide @ np.r_[scaled[0][0], scaled[1]]).std(0), y.std(0), rtol=1e-4)


def test_sparse_weights_keep_their_zeros() -> None:
    random = np.random.default_rng(0)
    x, start = random.standard_normal((300, 6)).astype(np.float32), random.standard_normal((1, 6, 4))
    start[0][random.random((6, 4)) < 0.5] = 0
    y = (x @ random.standard_normal((6, 4))).astype(np.float32)
    m = gram(x, y).moments()
    fit = m.supported(start, 1e-6)
    assert ((fit[0] == 0) == (start == 0)).all()
    assert m.error(fit) < m.error(m.centred((start, m.mean_y)))


NET = """g (float[N,3,8,8] x) => (float[N,4] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    b = Relu(a)
    c = Conv<pads=[1,1,1,1]>(b, w2, b2)
    d = Add(c, b)
    e = GlobalAveragePool(d)
    f = Flatten(e)
    y = Gemm(f, w3, b3)
}"""
SIZES = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 8, 3, 3), "b2": (8,), "w3": (8, 4), "b3": (4,)}


@pytest.mark.parametrize("budget", [0, 1 << 30], ids=["on disk", "in memory"])
def test_stages_compute_what_the_whole_model_does(budget: int) -> None:
    model = weighted(NET, **SIZES)
    x = np.random.default_rng(0).standard_normal((6, 3, 8, 8)).astype(np.float32)
    whole = run(session(model.proto()), {"x": x})[0]
    with Store(budget) as store:
        for i in range(3):
            store[i] = {"x": x[2 * i : 2 * i + 2]}
        walk = Walk(model, shapes(model).dtypes, [["b"], ["c", "b"], ["y"]], store)
        for stage in range(3):
            found = [walk.run(stage, i) for i in range(3)]
    np.testing.assert_allclose(np.concatenate([f["y"] for f in found]), whole, rtol=1e-5, atol=1e-5)


def test_stages_take_new_weights() -> None:
    model = weighted(NET, **SIZES)
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    with Store() as store:
        store[0] = {"x": x}
        walk = Walk(model, shapes(model).dtypes, [["b"], ["y"]], store)
        walk.run(0, 0)
        walk.set_weight("w3", np.zeros((8, 4), np.float32))
        walk.set_weight("b3", np.arange(4, dtype=np.float32))
        found = walk.run(1, 0)["y"]
    np.testing.assert_array_equal(found, np.tile(np.arange(4, dtype=np.float32), (2, 1)))


def test_only_images_are_mirrored() -> None:
    photos = parsed("g (float[N,3,32,32] x) => (float[N,3,32,32] y) { y = Relu(x) }")
    maps = parsed("g (float[N,1,49,10] x) => (float[N,1,49,10] y) { y = Relu(x) }")
    x = np.arange(3 * 32 * 32, dtype=np.float32).reshape(1, 3, 32, 32)
    data = open_dataset({"x": x}, input_specs(photos.interface()))
    assert mirrorable(data)
    np.testing.assert_array_equal(mirrored(data, {"x": x})["x"], x[..., ::-1])
    assert not mirrorable(open_dataset({"x": np.zeros((2, 1, 49, 10), np.float32)}, input_specs(maps.interface())))
