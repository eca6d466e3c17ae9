"""Pad joins the Pad, Conv or pool that follows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.context import Context
from graphopt.edit import producer, set_input, set_inputs
from graphopt.model import Model
from graphopt.operands import Names, operand, set_operand
from graphopt.registry import register
from graphopt.shapes import Shapes, shapes

AT_LEAST_ZERO = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp")


@dataclass(frozen=True)
class Padding:
    """A constant Pad with its amounts for every axis."""

    begins: tuple[int, ...]
    ends: tuple[int, ...]
    mode: str
    value: float

    @property
    def spatial(self) -> list[int] | None:
        """Amounts as Conv and pools have them (all begins, all ends); None where batch, channels or negative pads are touched."""
        if len(self.begins) < 3 or any((*self.begins[:2], *self.ends[:2])) or min((*self.begins, *self.ends)) < 0:
            return None
        return [*self.begins[2:], *self.ends[2:]]


@dataclass(frozen=True)
class Edit:
    """What the rules need; `names` grows as they make initializers."""

    shapes: Shapes
    opset: int
    names: Names
    reject: Callable[[gs.Node, str], None]


Rule = Callable[[gs.Node, gs.Node, Padding, Edit], str | None]  # None: `node` has taken over the Pad; else why not


def read_padding(node: gs.Node, edit: Edit) -> Padding | None:
    """What a Pad adds; None where an amount, the value or the rank is not known."""
    pads, axes = operand(node, "pads", 1).integers(), operand(node, "axes", 3)
    value = operand(node, "value", 2)
    if pads is None or not axes.known or not value.known:
        return None
    half = len(pads) // 2
    rank = half if axes.values is None else edit.shapes.rank(node.inputs[0].name)
    if rank is None:
        return None
    where = axes.integers() or list(range(half))
    begins, ends = [0] * rank, [0] * rank
    for axis, begin, end in zip(where, pads[:half], pads[half:], strict=True):
        begins[axis], ends[axis] = begin, end
    filler = 0.0 if value.values is None or not value.values.size else float(value.values.ravel()[0])
    return Padding(tuple(begins), tuple(ends), attribute(node, "mode", edit.opset), filler)


def add_pads(node: gs.Node, padding: Padding) -> list[int]:
    """The window's own pads plus the Pad's."""
    extra = padding.spatial or []
    automatic = node.attrs.get("auto_pad", "NOTSET") != "NOTSET"  # VALID: none of its own
    own = [0] * len(extra) if automatic else node.attrs.get("pads") or [0] * len(extra)
    return [int(a + b) for a, b in zip(own, extra, strict=True)]


def unsuited(node: gs.Node, padding: Padding, *, value: float) -> str | None:
    """Why no window op could take over this Pad."""
    if padding.mode != "constant" or padding.value != value:
        return f"it does not pad with {value:g}"
    if padding.spatial is None:
        return "it pads batch or channels, or crops"
    if node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "automatic padding depends on the padded size"
    return None


def take(node: gs.Node, pad: gs.Node, pads: list[int]) -> None:
    """Make `node` read what the Pad read, with these pads."""
    set_input(node, 0, pad.inputs[0])
    node.attrs.pop("auto_pad", None)
    node.attrs["pads"] = pads


def conv(node: gs.Node, pad: gs.Node, padding: Padding, edit: Edit) -> str | None:
    """Conv pads with zeros."""
    reason = unsuited(node, padding, value=0.0)
    if reason is None:
        take(node, pad, add_pads(node, padding))
    return reason


def _window(node: gs.Node, pads: list[int]) -> str | None:
    """Pools: every window must hold at least one element, and a last partial window (ceil_mode) counts differently."""
    kernel = node.attrs["kernel_shape"]
    if any(p >= k for p, k in zip(pads, (*kernel, *kernel), strict=True)):
        return "a window would lie in the padding altogether"
    if node.attrs.get("ceil_mode") or any(d != 1 for d in node.attrs.get("dilations") or ()):
        return "ceil_mode or dilations"
    return None


def average_pool(node: gs.Node, pad: gs.Node, padding: Padding, edit: Edit) -> str | None:
    """The zeros of the Pad were counted, so the pool's padding must count: count_include_pad."""
    reason = unsuited(node, padding, value=0.0)
    if reason is None and any(node.attrs.get("pads") or ()) and not node.attrs.get("count_include_pad"):
        reason = "the pool's own padding is not counted, the Pad's is"
    reason = reason or _window(node, add_pads(node, padding))
    if reason is None:
        take(node, pad, add_pads(node, padding))
        node.attrs["count_include_pad"] = 1
    return reason


def max_pool(node: gs.Node, pad: gs.Node, padding: Padding, edit: Edit) -> str | None:
    """A pool ignores its padding: so does a Pad with -inf, and one with 0 where the input is never negative."""
    value = float("-inf") if padding.value == float("-inf") else 0.0
    reason = unsuited(node, padding, value=value)
    if reason is None and value == 0.0 and not _never_negative(pad.inputs[0]):
        reason = "it pads with 0, and the input may be negative"
    if reason is None and len(node.outputs) > 1 and node.outputs[1].name:
        reason = "indices count the padding"
    reason = reason or _window(node, add_pads(node, padding))
    if reason is None:
        take(node, pad, add_pads(node, padding))
    return reason


def _never_negative(tensor: gs.Tensor) -> bool:
    if producer(tensor, *AT_LEAST_ZERO) is not None:
        return True
    clip = producer(tensor, "Clip")
    low = None if clip is None else operand(clip, "min", 1).values
    return low is not None and bool(low.size) and bool((low >= 0).all())


def pad_of_pad(node: gs.Node, pad: gs.Node, padding: Padding, edit: Edit) -> str | None:
    """Two paddings with one constant, or two by the edge, add up (crops do not)."""
    outer = read_padding(node, edit)
    if outer is None:
        return "amounts computed at run time, or the rank is unknown"
    if outer.mode != padding.mode or padding.mode not in ("constant", "edge") or outer.value != padding.value:
        return "two modes or values"
    if min((*outer.begins, *outer.ends, *padding.begins, *padding.ends)) < 0:
        return "it crops"
    pairs = zip((*outer.begins, *outer.ends), (*padding.begins, *padding.ends), strict=True)
    amounts = [a + b for a, b in pairs]
    set_inputs(node, [pad.inputs[0], *node.inputs[1:3]])  # without axes: all of them
    set_operand(node, "pads", 1, amounts, edit.opset, edit.names)
    return None


FUSIONS: dict[str, Rule] = {
    "Conv": conv,
    "AveragePool": average_pool,
    "MaxPool": max_pool,
    "Pad": pad_of_pad,
}


@register("fuse-pads", exact=True)
def fuse_pads(model: Model, context: Context) -> int:
    """Pad -> Conv, AveragePool, MaxPool or Pad: the second takes over the padding; the Pad is dead if nothing else reads it.

    Exact: a Conv pads with zeros like the Pad; AveragePool then counts its padding; MaxPool ignores its padding, so the Pad must
    fill with -inf, or with 0 where nothing is negative (see FUSIONS).
    """
    edit = Edit(context.get(shapes, model), model.opset, Names(model), context.reject)
    changes = 0
    for node in model.nodes():
        rule = FUSIONS.get(op_key(node))
        while rule is not None and (pad := producer(node.inputs[0], "Pad")) is not None:
            padding = read_padding(pad, edit)
            reason = "amounts computed at run time, or the rank is unknown" if padding is None else rule(node, pad, padding, edit)
            if reason is not None:
                edit.reject(node, reason)
                break
            changes += 1
    return changes
