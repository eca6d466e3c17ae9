"""What removal writes into the graph: sliced weights, and the sizes that operators store."""

from __future__ import annotations

from typing import Any

import dim_cases
import numpy as np
import onnx_graphsurgeon as gs
import pytest
import soundness

from graphopt.dims import Dims, couple, groups
from graphopt.errors import ModelError
from graphopt.model import Model, load
from graphopt.removal import remove, zero


def prepared(text: str) -> tuple[Model, Dims, list[np.ndarray]]:
    model = load(soundness.model(text))
    dims = couple(model)
    return model, dims, [g.units for g in groups(model, dims)]


def node(model: Model, op: str) -> Any:
    return next(n for n in model.nodes() if n.op == op)


def shape(model: Model, name: str) -> tuple[int, ...]:
    return tuple(model.tensors()[name].shape)


def test_weights_lose_their_slices() -> None:
    model, dims, (units,) = prepared(dim_cases.CONVOLUTIONS["conv-bn-relu-conv"].text)
    before = {c.name: np.array(c.values) for c in model.constants()}
    assert remove(model, dims, units[[1, 4]]) == 7
    after = {c.name: np.asarray(c.values) for c in model.constants()}
    stay = [0, 2, 3, 5]
    assert np.array_equal(after["w1"], before["w1"][stay])
    assert np.array_equal(after["w2"], before["w2"][:, stay])
    assert np.array_equal(after["v"], before["v"][stay])
    assert shape(model, "w1") == (4, 3, 3, 3)
    model.verify()


def test_zeroing_leaves_shapes_and_variances() -> None:
    model, dims, (units,) = prepared(dim_cases.CONVOLUTIONS["conv-bn-relu-conv"].text)
    before = {c.name: np.array(c.values) for c in model.constants()}
    assert zero(model, dims, units[:1]) == 6
    after = {c.name: np.asarray(c.values) for c in model.constants()}
    assert not after["w1"][0].any()
    assert not after["w2"][:, 0].any()
    assert np.array_equal(after["w1"][1:], before["w1"][1:])
    assert np.array_equal(after["v"], before["v"])


def test_values_that_were_read_before_are_not_written_into() -> None:
    model, dims, (units,) = prepared(dim_cases.CONVOLUTIONS["conv-bn-relu-conv"].text)
    held = {c.name: c.values for c in model.constants()}
    copies = {name: np.array(values) for name, values in held.items()}
    zero(model, dims, units[:3])
    remove(model, dims, units[:3])
    assert all(np.array_equal(held[name], copies[name]) for name in held)


def test_nothing_to_remove_changes_nothing() -> None:
    model, dims, _ = prepared(dim_cases.CONVOLUTIONS["residual"].text)
    before = model.proto().SerializeToString()
    assert remove(model, dims, []) == 0
    assert zero(model, dims, []) == 0
    assert model.proto().SerializeToString() == before


def test_the_last_unit_cannot_go() -> None:
    model, dims, (units,) = prepared(dim_cases.CONVOLUTIONS["conv-bn-relu-conv"].text)
    with pytest.raises(ModelError, match="would become empty; keep at least one unit of each group"):
        remove(model, dims, units)


@pytest.mark.parametrize("label", [0, -3, 10**6])
def test_labels_must_be_removable(label: int) -> None:
    model, dims, _ = prepared(dim_cases.CONVOLUTIONS["conv-bn-relu-conv"].text)
    with pytest.raises(ModelError, match="a label is pinned or not one of this model's"):
        remove(model, dims, [label])


def test_depthwise_groups_follow() -> None:
    model, dims, (units,) = prepared(dim_cases.CONVOLUTIONS["depthwise with multiplier"].text)
    remove(model, dims, units[:1])
    assert [n.attrs.get("group", 1) for n in model.nodes()] == [1, 3, 1]
    assert shape(model, "w2") == (6, 1, 3, 3)


def test_groups_of_a_grouped_convolution_stay() -> None:
    model, dims, (units, _) = prepared(dim_cases.CONVOLUTIONS["grouped"].text)
    remove(model, dims, units[:1])
    assert [n.attrs.get("group", 1) for n in model.nodes()] == [1, 2, 1]
    assert shape(model, "w1") == (6, 3, 1, 1)
    assert shape(model, "w2") == (12, 3, 3, 3)


def test_padding_of_a_free_axis_shrinks() -> None:
    model, dims, (_, wide) = prepared(dim_cases.CONVOLUTIONS["pad of a shortcut"].text)
    first = (dims.labels("c") or [])[1]
    remove(model, dims, [int(first[0]), int(first[7]), int(first[6])])
    assert np.asarray(node(model, "Pad").inputs[1].values).tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert len(wide) == 4


def test_split_slice_and_gather_follow() -> None:
    model, dims, _ = prepared(dim_cases.MATRICES["concat, split, slice, gather"].text)
    labels = (dims.labels("c") or [])[1]
    remove(model, dims, [int(labels[1]), int(labels[3]), int(labels[6])])
    assert np.asarray(node(model, "Split").inputs[1].values).tolist() == [3, 4]
    starts, ends = (np.asarray(node(model, "Slice").inputs[i].values).tolist() for i in (1, 2))
    assert (starts, ends) == ([1], [3])
    assert np.asarray(node(model, "Gather").inputs[1].values).tolist() == [5, 4, 0]


def test_hidden_units_go_from_all_gates() -> None:
    model, dims, (_, hidden) = prepared(dim_cases.RECURRENT["bidirectional lstm"].text)
    before = {c.name: np.array(c.values) for c in model.constants()}
    remove(model, dims, hidden[[0, 3]])
    assert node(model, "LSTM").attrs["hidden_size"] == 3
    stay = [g * 5 + h for g in range(4) for h in (1, 2, 4)]
    after = {c.name: np.asarray(c.values) for c in model.constants()}
    assert np.array_equal(after["w"], before["w"][:, stay])
    assert np.array_equal(after["r"], before["r"][:, stay][:, :, [1, 2, 4]])
    assert np.array_equal(after["w1"], before["w1"][[1, 2, 4, 6, 7, 9]])


def test_a_computed_target_becomes_constant_where_it_can() -> None:
    model, dims, (heads, _) = prepared(dim_cases.TRANSFORMERS["attention as exported, sizes computed"].text)
    remove(model, dims, heads[:1])
    targets = [n.inputs[1] for n in model.nodes() if n.op == "Reshape"]
    assert all(isinstance(t, gs.Constant) for t in targets)
    assert [np.asarray(t.values).tolist() for t in targets] == [[0, 0, 2, 4]] * 3 + [[0, 0, 8]]
    assert shape(model, "w1") == (6, 8)


def test_arithmetic_goes_on_with_the_sizes_from_before() -> None:
    """Half of the channels go, but what divides by their number goes on dividing by six."""
    model, dims, (units, _) = prepared(dim_cases.TRANSFORMERS["sizes in arithmetic"].text)
    remove(model, dims, units[:3])
    assert any(n.op == "Where" for n in model.nodes())  # the Shape still gives the dynamic sizes
    model.verify()


def test_declared_shapes_follow() -> None:
    model, dims, (units,) = prepared(
        "g (float[N,3] x, float[3,6] w1, float[6,2] w2) => (float[N,2] y) <float[N,6] a> { a = MatMul(x, w1)  y = MatMul(a, w2) }"
    )
    remove(model, dims, units[:2])
    assert list(model.tensors()["a"].shape) == ["N", 4]
