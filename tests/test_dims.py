"""Labels, classes, pins and groups."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import soundness
import zoo
from onnx.defs import OpSchema

from graphopt.dim_labels import FREE, ONE, Classes, is_one
from graphopt.dim_rules import DIM_RULES, rule
from graphopt.dim_rules_reshape import blocks
from graphopt.dims import Dims, couple, groups
from graphopt.model import Model, load

CONV = """g (float[1,3,8,8] x, float[6,3,3,3] w1, float[6] b1, float[4,6,1,1] w2) => (float[1,4,6,6] y)
{ a = Conv(x, w1, b1)  r = Relu(a)  y = Conv(r, w2) }"""


def coupled(text: str) -> tuple[Model, Dims]:
    model = load(soundness.model(text))
    return model, couple(model)


def test_union_keeps_the_lowest_label_and_the_first_cause() -> None:
    classes = Classes()
    a, b, c = classes.fresh(4), classes.fresh(4), classes.fresh(4)
    classes.pin(c[2:], "late", "node")
    classes.union(b, c)
    classes.union(a, b[::-1])
    assert classes.find(c).tolist() == a[::-1].tolist()
    assert classes.roots()[a].tolist() == [0, 0, a[2], a[3]]
    assert [classes.causes[i][0] for i in classes.cause(a)[:2]] == ["late", "late"]
    classes.pin(a, "later", "")
    assert classes.causes[int(classes.cause(a)[0])] == ("late", "node")
    assert classes.causes[int(classes.cause(a)[3])] == ("later", "")


def test_union_is_transitive_in_any_order() -> None:
    random = np.random.default_rng(0)
    classes = Classes()
    labels = classes.fresh(3000)
    pairs = random.permutation(np.stack([np.arange(2990), np.arange(10, 3000)], axis=1))  # ten chains
    for part in np.array_split(pairs, 7):
        classes.union(labels[part[:, 0]], labels[part[:, 1]])
    assert (classes.find(labels) == labels[np.arange(3000) % 10]).all()


def test_pinned_labels_are_shared() -> None:
    classes = Classes()
    axis = classes.pinned(30522, "vocabulary", "")
    assert axis.strides == (0,)
    assert classes.is_pinned(axis)
    other = classes.fresh(30522)
    classes.union(other, axis)
    assert classes.is_pinned(other)
    assert is_one(ONE)
    assert not is_one(axis[:1])
    assert (classes.cause(classes.fresh(2)) == FREE).all()


def test_labels_of_a_convolution() -> None:
    _, dims = coupled(CONV)
    outputs, inputs, height, width = dims.labels("w1") or []
    assert (outputs > 0).all()
    assert len(set(outputs)) == 6
    assert not inputs.any()
    assert not height.any()
    assert not width.any()
    for tensor, axis in (("b1", 0), ("a", 1), ("r", 1), ("w2", 1)):
        assert np.array_equal((dims.labels(tensor) or [])[axis], outputs)
    assert not any(labels.any() for labels in dims.labels("y") or [])
    assert dims.labels("nothing") is None


def test_group_of_a_convolution() -> None:
    model, dims = coupled(CONV)
    (group,) = groups(model, dims)
    assert group.units.tolist() == sorted((dims.labels("b1") or [])[0].tolist())
    assert {(s.tensor, s.axis) for s in group.slices} == {("w1", 0), ("b1", 0), ("w2", 1)}
    assert {(s.tensor, s.axis) for s in group.activations} == {("a", 1), ("r", 1)}
    assert all(np.isin(s.labels, group.units).all() for s in group.slices)


def test_pins_name_the_first_cause() -> None:
    _, dims = coupled(CONV)
    pins = {(p.tensor, p.axis): p.reason for p in dims.pins}
    assert pins == {
        ("w1", 1): "graph input 'x'",
        ("w1", 2): "kernel axis",
        ("w1", 3): "kernel axis",
        ("w2", 0): "graph output 'y'",
    }


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("p = Softmax<axis=1>(a)", "Softmax over this axis"),
        ("p = LayerNormalization(a, w3)", "LayerNormalization over this axis"),
        ("p = LRN<size=3>(a)", "LRN across channels"),
        ("p = CumSum(a, one)", "CumSum along this axis"),
        ("p, i = TopK<axis=1>(a, four)", "TopK ranks this axis"),
        ("p = Det(a)", "op 'Det' has no dimension rule"),
        ("m = ReduceMax<axes=[1]>(a)  p = Sub(a, m)", "ReduceMax over this axis"),
        ("m = ArgMax<axis=1>(a)  f = Cast<to=1>(m)  p = Mul(a, f)", "ArgMax gives positions on this axis"),
        ("s = Size(a)  f = Cast<to=1>(s)  p = Mul(a, f)", "Size counts its elements"),
        ("t = Transpose(a)  q = MatMul(a, t)  p = MatMul(q, a)", "MatMul sums over it and neither operand is a constant"),
        ("p = Gather<axis=1>(a, picks)", "Gather addresses positions"),
        ("b = Cast<to=6>(a)  e = Equal(b, ids)  p = Cast<to=1>(e)", "Equal compares integers"),
        ("q, h, z = DynamicQuantizeLinear(a)  p = DequantizeLinear(q, h, z)", "op 'DynamicQuantizeLinear' has no dimension rule"),
    ],
)
def test_what_stays_and_why(body: str, reason: str) -> None:
    _, dims = coupled(
        "g (float[4,3] x, float[3,4] w1, float[4] w3, float[4,2] w2, int64[4] xpicks) => (float[N,2] y) "
        "<int64 one = {1}, int64[1] four = {4}, int32[4] ids = {0,1,2,3}> "
        f"{{ picks = Identity(xpicks)  a = MatMul(x, w1)  {body}  y = MatMul(p, w2) }}"
    )
    assert not (dims.labels("w1") or [])[1].any()
    assert reason in {p.reason for p in dims.pins if p.tensor == "w1" and p.axis == 1}


def test_a_parameter_is_not_data() -> None:
    """The same constant scales the channels and is the `scales` of a Resize: it keeps its four elements."""
    _, dims = coupled(
        "g (float[1,3,2,2] x, float[4,3,1,1] w1, float[2,4,1,1] w2) => (float[1,2,4,4] y) <float[4] s = {1,1,2,2}> "
        '{ a = Conv(x, w1)  b = BatchNormalization(a, s, s, s, s)  c = Resize<mode="nearest">(b, , s)  y = Conv(c, w2) }'
    )
    assert not (dims.labels("w1") or [])[0].any()
    assert {p.reason for p in dims.pins if p.tensor == "s"} == {"a parameter of Resize"}


def test_a_class_of_a_whole_axis_stays() -> None:
    model, dims = coupled(
        "g (float[N,3] x, float[3,2] w1, float[4,5] w2, float[5,2] w3) => (float[N,2] y) <int64[4] twice = {0,0,1,1}, "
        "int64[2] same = {0,0}> { a = MatMul(x, w1)  b = Gather<axis=1>(a, same)  c = Concat<axis=1>(b, b)  d = MatMul(c, w2)  "
        "y = MatMul(d, w3) }"
    )
    assert [len(g.units) for g in groups(model, dims)] == [5]
    assert "the whole axis would go" in {p.reason for p in dims.pins if p.tensor == "w1"}


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((2, 6, 4), (12, 4), [([0, 1], [0]), ([2], [1])]),
        (("B", "S", 12), ("B", "S", 3, 4), [([0], [0]), ([1], [1]), ([2], [2, 3])]),
        (("B", "S", 3, 4), ("B", "S", 12), [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        (("B", 3, "S", 4), ("3*B", "S", 4), [([0, 1], [0]), ([2], [1]), ([3], [2])]),
        (("?a", 8, 5), ("?b", 40), [([0], [0]), ([1, 2], [1])]),
        ((1, 8, 1, 1), (8,), [([1], [0])]),
        ((6, 4), (4, 6), [([0, 1], [0, 1])]),
        ((0, 4), (4, 0), None),
    ],
)
def test_blocks(source: tuple[int | str, ...], target: tuple[int | str, ...], expected: object) -> None:
    assert blocks(source, target) == expected


def test_a_second_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="Conv already has a dimension rule: conv"):
        rule("Conv")(DIM_RULES["Relu"])


def test_rules_are_for_operators_that_exist() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if isinstance(schema, OpSchema)}
    assert {op for op in DIM_RULES if "::" not in op and op not in known} == {"SimplifiedLayerNormalization"}


@pytest.mark.slow
def test_every_node_test_of_onnx_has_labels_that_fit() -> None:
    """No operator makes `couple` fail, and where a shape is known labels have it."""
    for case in zoo.node_tests(("node",)):
        if any(o.domain in ("", "ai.onnx") and o.version < 7 for o in case.model.opset_import):
            continue
        model = load(case.model)
        dims = couple(model)
        for name in model.tensors():
            labels, shape = dims.labels(name), dims.shapes.shape(name)
            if labels is not None and shape is not None:
                assert all(x.size == s for x, s in zip(labels, shape, strict=True) if isinstance(s, int)), (case.name, name)
