"""Shapes through If, Loop and Scan: their bodies are walked with what is known outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.onnx_inference import Typed
from graphopt.shape_rules import Site
from graphopt.symbols import Size, Sizes

if TYPE_CHECKING:
    from graphopt.shapes import Walker


def if_(site: Site, walker: Walker) -> list[Typed]:
    """What both branches agree on; where the condition is known, what its branch gives."""
    branches = [site.node.attrs[name] for name in ("then_branch", "else_branch")]
    for branch in branches:
        walker.graph(branch)
    condition = site.value(0)
    if condition is not None and isinstance(condition.reshape(-1)[0], bool):
        taken = branches[0] if condition.reshape(-1)[0] else branches[1]
        return [_typed(t, walker) for t in taken.outputs]
    results = []
    for index in range(len(site.node.outputs)):
        then, other = (_typed(branch.outputs[index], walker) for branch in branches)
        results.append((then[0] if then[0] == other[0] else None, _join(then[1], other[1])))
    return results


def loop(site: Site, walker: Walker) -> list[Typed]:
    """Loop-carried values keep what each iteration leaves as it is; scan outputs get a new first axis."""
    body: gs.Graph = site.node.attrs["body"]
    outer = [_typed(t, walker) for t in site.node.inputs[2:]]
    counter: list[Typed] = [(np.dtype(np.int64), ()), (np.dtype(bool), ())]
    carried = _steady(body, counter, outer, [], walker, skip=1)
    scanned = [_typed(t, walker) for t in body.outputs[1 + len(carried) :]]
    visible = {size for _, shape in outer for size in shape or ()}
    return [*carried, *((dtype, _stacked(shape, visible)) for dtype, shape in scanned)]


def scan(site: Site, walker: Walker) -> list[Typed]:
    """As Loop, over slices of the scan inputs (ONNX operator Scan, version 9 and later)."""
    body, count = site.node.attrs["body"], site.node.attrs["num_scan_inputs"]
    typed = [_typed(t, walker) for t in site.node.inputs]
    states, inputs = typed[: len(typed) - count], typed[len(typed) - count :]
    if walker.known.opset < 9:
        walker.inputs(body.inputs)
        walker.graph(body)
        return [(None, None)] * len(site.node.outputs)
    axes = site.node.attrs.get("scan_input_axes") or [0] * count
    slices: list[Typed] = [(dtype, None if s is None else _without(s, axis)) for (dtype, s), axis in zip(inputs, axes, strict=True)]
    length = next((s[axis] for (_, s), axis in zip(inputs, axes, strict=True) if s is not None), None)
    carried = _steady(body, [], states, slices, walker, skip=0)
    visible = {size for _, shape in typed for size in shape or ()}
    outputs = [_typed(t, walker) for t in body.outputs[len(states) :]]
    places = site.node.attrs.get("scan_output_axes") or [0] * len(outputs)
    results = list(carried)
    for (dtype, shape), axis in zip(outputs, places, strict=True):
        stacked = _stacked(shape, visible)
        if stacked is not None:
            rest = list(stacked[1:])
            rest.insert(axis % len(stacked), length)
            stacked = tuple(rest)
        results.append((dtype, stacked))
    return results


def _steady(
    body: gs.Graph, before: list[Typed], states: list[Typed], after: list[Typed], walker: Walker, *, skip: int
) -> list[Typed]:
    """Walk the body until its state inputs have shapes that hold in every iteration; three rounds end with unknown ones."""
    for attempt in range(3):
        for tensor, (dtype, shape) in zip(body.inputs, [*before, *states, *after], strict=True):
            _set(tensor, dtype, shape, walker)
        walker.graph(body)
        left = [_typed(t, walker) for t in body.outputs[skip : skip + len(states)]]
        if all(_holds(a[1], b[1]) for a, b in zip(states, left, strict=True)):
            break
        joined = [_join(a[1], b[1]) for a, b in zip(states, left, strict=True)]
        states = [(a[0], s if attempt == 0 else None) for a, s in zip(states, joined, strict=True)]
    return [(a[0], _join(a[1], b[1])) for a, b in zip(states, left, strict=True)]


def _set(tensor: gs.Tensor, dtype: np.dtype | None, shape: Sizes | None, walker: Walker) -> None:
    walker.known.sizes.pop(tensor.name, None)
    walker.known.values.pop(tensor.name, None)
    dtype = dtype or (np.dtype(tensor.dtype) if tensor.dtype is not None else None)
    if dtype is not None:
        walker.known.dtypes[tensor.name] = dtype
    if tensor.name in walker.leftovers.types:
        walker.known.types[tensor.name] = walker.leftovers.types[tensor.name]
    elif shape is not None:
        walker.known.sizes[tensor.name] = walker.complete(tensor.name, shape)


def _typed(tensor: gs.Tensor, walker: Walker) -> Typed:
    return walker.known.dtypes.get(tensor.name), walker.known.sizes.get(tensor.name)


def _join(a: Sizes | None, b: Sizes | None) -> Sizes | None:
    """The axes on which both agree, None on the others."""
    if a is None or b is None or len(a) != len(b):
        return None
    return tuple(x if x == y else None for x, y in zip(a, b, strict=True))


def _holds(assumed: Sizes | None, left: Sizes | None) -> bool:
    """What was assumed of a state at the start of an iteration is true at its end."""
    if assumed is None or left is None:
        return assumed is None
    return len(assumed) == len(left) and all(a is None or a == b for a, b in zip(assumed, left, strict=True))


def _without(shape: Sizes, axis: int) -> Sizes:
    axis %= len(shape)
    return shape[:axis] + shape[axis + 1 :]


def _stacked(shape: Sizes | None, visible: set[Size]) -> Sizes | None:
    """The body's shape behind a new axis; symbols that only mean something inside the body do not leave it."""
    if shape is None:
        return None
    return (None, *(size if isinstance(size, int) or size in visible else None for size in shape))


CONTROL_FLOW: dict[str, Callable[[Site, Walker], list[Typed]]] = {"If": if_, "Loop": loop, "Scan": scan}
