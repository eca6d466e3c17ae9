"""merge-initializers: equal bytes of equal type and shape are stored once, and large weights are not kept in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from cases import canonical, feed, parse, run
from onnx import helper, numpy_helper

from graphopt.context import Context
from graphopt.model import load
from graphopt.proto import Weights
from graphopt.registry import find

TWO = "g (float[N,4] x) => (float[N,4] y) <float[4] p = {{1, 2, 3, 4}}, {}> {{ a = Mul(x, p) y = Add(a, q) }}"


def test_equal_ones_merge() -> None:
    model, context = parse(TWO.format("float[4] q = {1, 2, 3, 4}")), Context()
    before, lines = model.proto(), canonical(model)
    assert find("merge-initializers").fn(model, context) == 1
    assert context.facts["bytes_saved"] == 16
    assert [c.name for c in model.constants()] == ["p"]
    assert canonical(model) == lines
    model.verify()
    inputs = feed(before)
    np.testing.assert_array_equal(run(before, inputs)[0], run(model.proto(), inputs)[0])
    assert find("merge-initializers").fn(model, Context()) == 0


@pytest.mark.parametrize(
    "other", ["float[4] q = {1, 2, 3, 5}", "float[1,4] q = {1, 2, 3, 4}", "float[4] q = {1, 2, 3, -0.0}", "float q = {1}"]
)
def test_others_stay(other: str) -> None:
    model = parse(TWO.format(other))
    assert find("merge-initializers").fn(model, Context()) == 0
    assert len(model.constants()) == 2


def test_zeros_of_different_sign_stay() -> None:
    model = parse("g (float[N] x) => (float[N] y) <float p = {0.0}, float q = {-0.0}> { a = Div(x, p) y = Div(a, q) }")
    assert find("merge-initializers").fn(model, Context()) == 0


def test_graph_outputs_keep_their_own() -> None:
    model = parse("g (float[N] x) => (float[1] p, float[1] q, float[N] y) <float[1] p = {1}, float[1] q = {1}> { y = Add(x, q) }")
    assert find("merge-initializers").fn(model, Context()) == 0


def test_bodies_share_with_the_graph_around_them() -> None:
    model = parse("""g (float[N] x, bool c) => (float[N] y) <float[1] p = {7}> { a = Mul(x, p) y = If(c)<
        then_branch = t () => (float[N] u) <float[1] q = {7}> { u = Mul(a, q) },
        else_branch = e () => (float[N] v) { v = Identity(a) }> }""")
    assert find("merge-initializers").fn(model, Context()) == 1
    model.verify()
    assert [i.name for i in model.proto().graph.initializer] == ["p"]


def test_external_weights_stay_on_disk(tmp_path: Path) -> None:
    """Three large weights that agree in their first and last elements; two of them agree altogether."""
    first = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    third = first.copy()
    third[20, 20] += 1
    nodes = [helper.make_node("MatMul", [x, w], [y]) for x, w, y in (("x", "w0", "a"), ("a", "w1", "b"), ("b", "w2", "y"))]
    weights = [numpy_helper.from_array(w, f"w{i}") for i, w in enumerate((first, first, third))]
    ends = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [64, 64]) for n in ("x", "y")]
    proto = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], weights), ir_version=8)
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model, context = load(tmp_path / "m.onnx"), Context()
    assert find("merge-initializers").fn(model, context) == 1
    assert context.facts["bytes_saved"] == first.nbytes
    assert [n.inputs[1].name for n in model.nodes()] == ["w0", "w0", "w2"]
    assert all(isinstance(c._values, Weights) for c in model.constants())
