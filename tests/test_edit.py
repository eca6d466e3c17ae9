"""Rewiring keeps both sides of every edge in step, whatever reads a tensor how often."""

from __future__ import annotations

import onnx.parser
import onnx_graphsurgeon as gs
import pytest

from graphopt.edit import (
    bypass,
    constant_value,
    detach,
    only_user,
    producer,
    remove_nodes,
    replace_uses,
    set_input,
    set_inputs,
    set_output,
)
from graphopt.model import Model, from_proto


def model(body: str) -> Model:
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {body}'))


def consistent(found: Model) -> None:
    """Every node stands in its tensors' lists exactly as often as the tensor in the node's."""
    for node in found.nodes():
        for mine, side in ((node.inputs, "outputs"), (node.outputs, "inputs")):
            for tensor in {id(t): t for t in mine if t.name}.values():
                theirs = sum(n is node for n in getattr(tensor, side))
                assert theirs == sum(t is tensor for t in mine) or (theirs >= 1 and side == "outputs"), (node.name, tensor.name)


TWICE = "m (float[2] x) => (float[2] y) { a = Relu(x)  b = Mul(a, a)  y = Add(b, a) }"


def test_replace_uses_of_a_tensor_that_is_read_twice() -> None:
    found = model(TWICE)
    a, x = found.tensors()["a"], found.tensors()["x"]
    assert replace_uses(a, x) == 3
    assert a.outputs == []
    assert [t.name for t in found.nodes()[1].inputs] == ["x", "x"]
    assert [t.name for t in found.nodes()[2].inputs] == ["b", "x"]
    consistent(found)


def test_equal_nodes_are_told_apart() -> None:
    """onnx-graphsurgeon compares nodes by content and tensors by name."""
    found = model("m (float[2] x) => (float[2] y) { a = Relu(x)  b = Relu(x)  y = Add(a, b) }")
    first, second, last = found.nodes()
    second.name = first.name
    remove_nodes(found.graph, [second])
    assert found.graph.nodes[0] is first
    assert [id(n) for n in found.tensors()["x"].outputs] == [id(first)]
    assert [t.name for t in last.inputs] == ["a", "b"]


def test_set_input_fills_optional_inputs() -> None:
    found = model("m (float[2] x) => (float[2] y) { y = Clip(x) }")
    (clip,) = found.nodes()
    high = gs.Variable("high")
    set_input(clip, 2, high)
    assert [t.name for t in clip.inputs] == ["x", "", "high"]
    assert high.outputs[0] is clip
    set_inputs(clip, [found.tensors()["x"]])
    assert high.outputs == []
    assert len(clip.inputs) == 1
    consistent(found)


def test_set_output_moves_the_producer() -> None:
    found = model(TWICE)
    relu, mul, _ = found.nodes()
    a = found.tensors()["a"]
    set_output(mul, 0, a)
    set_output(relu, 0, gs.Variable.empty())
    assert len(a.inputs) == 1
    assert a.inputs[0] is mul


def test_detach_frees_what_bodies_read() -> None:
    found = model(
        "m (bool c, float[2] x) => (float[2] y) { a = Relu(x)  y = If(c) "
        "< then_branch = t () => (float[2] p) { p = Neg(a) }, else_branch = e () => (float[2] q) { q = Abs(a) } > }"
    )
    a = found.tensors()["a"]
    assert len(a.outputs) == 2
    detach(found.graph.nodes[-1])
    assert a.outputs == []


# ---- bypass


def test_bypass_of_an_inner_node() -> None:
    found = model("m (float[2] x) => (float[2] y) { a = Identity(x)  y = Mul(a, a) }")
    identity, mul = found.nodes()
    assert bypass(identity, identity.inputs[0], found.wiring())
    assert [t.name for t in mul.inputs] == ["x", "x"]


def test_bypass_before_an_output_keeps_its_name() -> None:
    found = model("m (float[2] x) => (float[2] y, float[2] z) { a = Relu(x)  y = Identity(a)  z = Neg(a) }")
    relu, identity, neg = found.nodes()
    assert bypass(identity, identity.inputs[0], found.wiring())
    assert relu.outputs[0].name == "y"
    assert neg.inputs[0].name == "y"
    remove_nodes(found.graph, [identity])
    found.verify()
    consistent(found)


@pytest.mark.parametrize(
    "body",
    [
        "m (float[2] x) => (float[2] y) { y = Identity(x) }",  # an input cannot be called y
        "m (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Identity(w) }",  # nor a constant
        "m (float[2] x) => (float[2] a, float[2] y) { a = Relu(x)  y = Identity(a) }",  # nor another output
    ],
)
def test_bypass_that_is_impossible_changes_nothing(body: str) -> None:
    found = model(body)
    before = found.proto()
    node = next(n for n in found.nodes() if n.op == "Identity")
    assert not bypass(node, node.inputs[0], found.wiring())
    assert found.proto() == before


def test_bypass_does_not_write_across_graphs() -> None:
    found = model(
        "m (bool c, float[2] x) => (float[2] y) { a = Relu(x)  y = If(c) "
        "< then_branch = t () => (float[2] p) { p = Identity(a) }, else_branch = e () => (float[2] q) { q = Abs(a) } > }"
    )
    node = next(n for n in found.nodes() if n.op == "Identity")
    assert not bypass(node, node.inputs[0], found.wiring())


# ---- questions


def test_questions() -> None:
    found = model("m (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { a = Mul(x, w)  b = Add(a, a)  c = Relu(b)  y = Neg(c) }")
    tensors, wiring = found.tensors(), found.wiring()
    mul, _, relu, neg = found.nodes()
    value = constant_value(tensors["w"])
    assert value is not None
    assert value.tolist() == [1, 2]
    assert constant_value(tensors["x"]) is None
    assert producer(tensors["a"], "Mul") is mul
    assert producer(tensors["a"]) is mul
    assert producer(tensors["a"], "Add", "Sub") is None
    assert producer(tensors["x"]) is None
    assert only_user(tensors["a"], wiring) is None  # read twice
    assert only_user(tensors["b"], wiring) is relu
    assert only_user(tensors["c"], wiring) is neg
    assert only_user(tensors["y"], wiring) is None  # an output
    tensors["a"].inputs[0].domain = "own"
    assert producer(tensors["a"], "Mul") is None
