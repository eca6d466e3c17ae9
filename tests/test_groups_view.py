"""The data behind `graphopt groups`."""

from __future__ import annotations

import json

import onnx.parser

from graphopt.groups_view import GroupsView, view
from graphopt.model import from_proto

TEXT = """g (float[N,2] x) => (float[N,3] y)
<float[2,4] up = {1, 0, 5, 2,  3, 0, 6, 1}, float[4] bias = {0, 0, 1, 1}, float[4,3] down = {1, 1, 1, 0, 0, 0, 9, 9, 9, 1, 2, 1}> {
    hidden = MatMul(x, up)  shifted = Add(hidden, bias)  active = Relu(shifted)  y = MatMul(active, down)
}"""


def look(round_to: int) -> GroupsView:
    return view(from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {TEXT}')), round_to=round_to)


def test_a_group_says_what_it_holds_and_what_it_is_worth() -> None:
    (group,) = look(1).groups
    assert (group.units, group.step, group.removable) == (4, 1, 3)
    assert (group.parameters_per_unit, group.macs_per_unit) == (2 + 1 + 3, 2 + 3)
    assert (group.parameters, group.macs) == (24, 20)
    assert group.weights == ("up[1]", "down[0]", "bias[0]")
    ops = [node.rsplit("_", 1)[0] for node in group.nodes]
    assert sorted(ops) == ["Add", "MatMul", "MatMul", "Relu"]


def test_rounding_says_what_may_go() -> None:
    assert [g.removable for g in look(2).groups] == [2]
    assert [g.removable for g in look(8).groups] == [0]


def test_pinned_axes_say_why() -> None:
    found = look(1)
    assert [(p.weight, p.axis, p.size, p.pinned) for p in found.pinned] == [("up", 0, 2, 2), ("down", 1, 3, 3)]
    assert found.pinned_rows() == ["up axis 0 (2): graph input 'x'", "down axis 1 (3): graph output 'y'"]


def test_it_is_json_and_rows() -> None:
    found = look(1)
    assert json.loads(json.dumps(found.to_dict()))["groups"][0]["units"] == 4
    (row,) = found.rows()
    assert len(row) == len(found.HEADER)
    assert row == ("0", "neurons", "4", "3", "6", "5", "100.0 %", "100.0 %")
    (line,) = found.held_rows()
    assert line.startswith("0: weights up[1], down[0], bias[0]; nodes ")
