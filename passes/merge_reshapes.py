"""Consecutive nodes that only move or re-describe data become one: views, Transpose, Cast, Slice, Concat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.context import Context
from graphopt.edit import Wiring, bypass, only_user, producer, remove_nodes, set_input, set_inputs
from graphopt.model import Model
from graphopt.operands import Names, operand, set_operand
from graphopt.registry import register
from graphopt.shapes import Shape, Shapes, shapes

VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")  # the elements stay in row-major order
FAR = 2**31 - 1


@dataclass(frozen=True)
class Edit:
    """What the rules need; `names` grows as they make initializers."""

    shapes: Shapes
    opset: int
    wiring: Wiring
    names: Names
    reject: Callable[[gs.Node, str], None]

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        return self.shapes.shape(tensor.name)


Rule = Callable[[gs.Node, Edit], bool]  # rewires the node past its producer; False where it cannot


def reshape_target(source: Shape | None, result: Shape | None) -> list[int] | None:
    """The constant target that reshapes `source` to `result`: 0 copies an axis, one -1 is what is left. None if there is none.

    Axes of length 0 are refused, since a target 0 means something else.
    """
    if result is None or 0 in result:
        return None
    target: list[int] = []
    for axis, size in enumerate(result):
        if isinstance(size, int):
            target.append(size)
        elif size is not None and source is not None and axis < len(source) and source[axis] == size:
            target.append(0)
        else:
            target.append(-1)
    return target if target.count(-1) <= 1 else None


def is_view(node: gs.Node, edit: Edit) -> bool:
    """Whether the node keeps the row-major order: a reshape of any kind, or a Transpose that only moves axes of length 1."""
    if node.op != "Transpose":
        return node.op in VIEWS
    perm, shape = permutation(node, edit), edit.shape(node.inputs[0])
    if perm is None or shape is None or sorted(perm) != list(range(len(shape))):
        return False
    moved = [p for p in perm if shape[p] != 1]
    return moved == sorted(moved)


def merge_views(node: gs.Node, edit: Edit) -> bool:
    """A reshape of a reshape reads what the first one read."""
    inner = producer(node.inputs[0], *VIEWS, "Transpose")
    if inner is None or not is_view(inner, edit) or not is_view(node, edit):
        return False
    source = inner.inputs[0]
    if node.op == inner.op and node.op in ("Squeeze", "Unsqueeze") and _merge_axes(node, inner, edit):
        return True
    if {node.op, inner.op} == {"Squeeze", "Unsqueeze"} and _same_axes(node, inner):
        return bypass(node, source, edit.wiring)
    if node.op == "Reshape" and _absolute(node, edit):
        set_input(node, 0, source)
        return True
    target = reshape_target(edit.shape(source), edit.shape(node.outputs[0]))
    if target is None:
        edit.reject(node, "the merged shape has an empty axis, or more than one that is unknown")
        return False
    node.op, node.attrs = "Reshape", {}
    set_inputs(node, [source, edit.names.constant(f"{node.name}_shape", np.array(target, np.int64))])
    return True


def _absolute(node: gs.Node, edit: Edit) -> bool:
    """Whether the target of a Reshape means the same on any input of the same size: no 0 that copies an axis."""
    if attribute(node, "allowzero", edit.opset):
        return True
    target = operand(node, "shape", 1).integers()
    return target is not None and 0 not in target


def _axes(node: gs.Node) -> list[int] | None:
    return operand(node, "axes", 1).integers()


def _same_axes(node: gs.Node, inner: gs.Node) -> bool:
    """Unsqueeze and Squeeze of the same axes undo each other; both count them in the longer shape."""
    a, b = _axes(node), _axes(inner)
    return a is not None and b is not None and sorted(a) == sorted(b)


def _merge_axes(node: gs.Node, inner: gs.Node, edit: Edit) -> bool:
    """Unsqueeze of Unsqueeze, Squeeze of Squeeze: one with the axes of both, counted in the longer shape."""
    outer_axes, inner_axes = _axes(node), _axes(inner)
    if outer_axes is None or inner_axes is None or min(*outer_axes, *inner_axes, 0) < 0:
        return False
    # the one whose longer shape is the longest counts as it is; the other counts the places the first leaves free
    fixed, moved = (outer_axes, inner_axes) if node.op == "Unsqueeze" else (inner_axes, outer_axes)
    free = [i for i in range(max((*fixed, *moved)) + len(fixed) + 1) if i not in fixed]
    axes = sorted([*fixed, *(free[m] for m in moved)])
    set_input(node, 0, inner.inputs[0])
    set_operand(node, "axes", 1, axes, edit.opset, edit.names)
    return True


def permutation(node: gs.Node, edit: Edit) -> list[int] | None:
    """perm, or its default (reversed) where the rank is known; None where it is no permutation."""
    if "perm" in node.attrs:
        given = list(node.attrs["perm"])
        return given if sorted(given) == list(range(len(given))) else None
    rank = edit.shapes.rank(node.inputs[0].name)
    return None if rank is None else list(range(rank))[::-1]


def merge_transposes(node: gs.Node, edit: Edit) -> bool:
    """Transpose of Transpose: the permutations composed; else a Transpose that is a view joins its neighbouring views."""
    inner = producer(node.inputs[0], "Transpose")
    outer_perm = permutation(node, edit)
    inner_perm = None if inner is None else permutation(inner, edit)
    if inner is None or outer_perm is None or inner_perm is None or len(inner_perm) != len(outer_perm):
        return merge_views(node, edit)
    composed = [inner_perm[p] for p in outer_perm]
    if composed == sorted(composed):
        return bypass(node, inner.inputs[0], edit.wiring)
    node.attrs["perm"] = composed
    set_input(node, 0, inner.inputs[0])
    return True


_MANTISSA = {2: 11, 4: 24, 8: 53}  # bits of a float of so many bytes


def holds_exactly(source: np.dtype, middle: np.dtype) -> bool:
    """Whether every value of `source` is a value of `middle` (numpy's "safe" also allows int64 -> float64, which rounds)."""
    if source == middle:
        return True
    if source.kind not in "biuf" or middle.kind not in "iuf":
        return False
    if source.kind in "iu" and middle.kind == "f":
        return 8 * source.itemsize - (source.kind == "i") <= _MANTISSA.get(middle.itemsize, 0)
    return bool(np.can_cast(source, middle, "safe"))


def merge_casts(node: gs.Node, edit: Edit) -> bool:
    """Cast of a Cast to a type that holds every value exactly: the first is skipped."""
    inner = producer(node.inputs[0], "Cast")
    if inner is None:
        return False
    source, middle, result = (edit.shapes.dtype(t.name) for t in (inner.inputs[0], node.inputs[0], node.outputs[0]))
    if source is None or middle is None or result is None or result.kind not in "biuf" or not holds_exactly(source, middle):
        return False
    set_input(node, 0, inner.inputs[0])
    return True


Span = tuple[int, int, int]  # start, end, step


def slice_spans(node: gs.Node, edit: Edit) -> dict[int, Span] | None:
    """axis -> what a Slice takes of it; None where something is computed, or axes are negative and the rank is unknown."""
    parts = [operand(node, name, index) for index, name in enumerate(("starts", "ends", "axes", "steps"), start=1)]
    starts, ends, axes, steps = (p.integers() for p in parts)
    if starts is None or ends is None or not all(p.known for p in parts):
        return None
    rank = edit.shapes.rank(node.inputs[0].name)
    where = list(range(len(starts))) if axes is None else axes
    if {len(ends), len(where), len(steps or starts)} != {len(starts)}:
        return None
    if any(a < 0 for a in where) and rank is None:
        return None
    spans = zip(starts, ends, steps or [1] * len(starts), strict=True)
    return {a if a >= 0 else a + (rank or 0): span for a, span in zip(where, spans, strict=True)}


def compose_spans(inner: Span, outer: Span) -> Span | None:
    """x[inner][outer] as one span, for steps of one; ends that both count from the front or both from the back.

    Python's clamping makes an empty inner slice stay empty: the composed start is never before the composed end then.
    """
    (start, end, step), (start2, end2, step2) = inner, outer
    if step != 1 or step2 != 1 or start < 0 or start2 < 0:
        return None
    if end2 >= FAR:
        return start + start2, end, 1
    if end >= FAR:
        return start + start2, end2 if end2 < 0 else start + end2, 1
    if end >= 0 and end2 >= 0:
        return start + start2, min(end, start + end2), 1
    return (start + start2, end + end2, 1) if end < 0 and end2 < 0 else None


def merge_slices(node: gs.Node, edit: Edit) -> bool:
    """Slice of Slice: one over the axes of both."""
    inner = producer(node.inputs[0], "Slice")
    inner_spans = None if inner is None else slice_spans(inner, edit)
    outer_spans = slice_spans(node, edit)
    if inner is None or inner_spans is None or outer_spans is None:
        return False
    spans = {**inner_spans, **outer_spans}
    for axis in inner_spans.keys() & outer_spans.keys():
        composed = compose_spans(inner_spans[axis], outer_spans[axis])
        if composed is None:
            return False
        spans[axis] = composed
    axes = sorted(spans)
    set_inputs(node, [inner.inputs[0]])
    for index, name in enumerate(("starts", "ends")):
        set_operand(node, name, index + 1, [spans[a][index] for a in axes], edit.opset, edit.names)
    set_operand(node, "axes", 3, axes, edit.opset, edit.names)
    if any(spans[a][2] != 1 for a in axes):
        set_operand(node, "steps", 4, [spans[a][2] for a in axes], edit.opset, edit.names)
    return True


RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, merge_views),
    "Transpose": merge_transposes,
    "Cast": merge_casts,
    "Slice": merge_slices,
}


def merge_concats(graph: gs.Graph, edit: Edit) -> int:
    """A Concat read only by a Concat on the same axis is spliced into it, from the last node back so that each is met once."""
    merged: dict[int, gs.Node] = {}
    for node in reversed(graph.nodes):
        if op_key(node) != "Concat" or id(node) in merged:
            continue
        spliced: list[gs.Tensor] = []
        found = len(merged)
        stack = list(reversed(node.inputs))
        while stack:
            tensor = stack.pop()
            inner = producer(tensor, "Concat")
            if inner is not None and only_user(tensor, edit.wiring) is not None and _joins(inner, node, edit):
                merged[id(inner)] = inner
                stack.extend(reversed(inner.inputs))
            else:
                spliced.append(tensor)
        if len(merged) > found:
            set_inputs(node, spliced)
    return remove_nodes(graph, list(merged.values())) if merged else 0


def _joins(inner: gs.Node, outer: gs.Node, edit: Edit) -> bool:
    """The same axis, in the same graph (a loop body must not repeat what was done once before it)."""
    if edit.wiring.home[id(inner)] != edit.wiring.home[id(outer)]:
        return False
    first, second = inner.attrs["axis"], outer.attrs["axis"]
    rank = edit.shapes.rank(inner.outputs[0].name)
    return bool(first == second or (rank is not None and first % rank == second % rank))


@register("merge-reshapes", exact=True)
def merge_reshapes(model: Model, context: Context) -> int:
    """Chains of Reshape/Flatten/Squeeze/Unsqueeze, of Transpose, of Cast, of Slice and of Concat become one node each.

    Every node is rewired past its producer, which stays for its other readers and is dead otherwise; so the node count never
    grows. The result is the same tensor, element by element (a -1 takes no axis of a graph input to be empty, as fold-constants
    does). Casts are skipped only where they lose nothing.
    """
    edit = Edit(context.get(shapes, model), model.opset, model.wiring(), Names(model), context.reject)
    changes = 0
    for graph in model.graphs():
        dead: list[gs.Node] = []
        for node in graph.nodes:
            while op_key(node) in RULES and RULES[node.op](node, edit):
                changes += 1
                if _is_dead(node.outputs[0], edit.wiring):
                    dead.append(node)
                    break
        if dead:
            remove_nodes(graph, dead)
        changes += merge_concats(graph, edit)
    return changes


def _is_dead(result: gs.Tensor, wiring: Wiring) -> bool:
    return not result.outputs and id(result) not in wiring.outputs
