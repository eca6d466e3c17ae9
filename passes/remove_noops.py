"""Nodes whose first output provably equals another tensor are removed: one small rule an op, in the table NOOPS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.context import Context
from graphopt.edit import bypass, constant_value, producer, remove_nodes
from graphopt.model import Model
from graphopt.operands import has_input, operand
from graphopt.registry import register
from graphopt.shapes import Shape, Shapes, shapes

FAR = 2**31 - 1  # "to the end" in a Slice: exporters write INT32_MAX or INT64_MAX
SMALL = 1 << 16  # elements of a constant worth reading to see whether it is all zeros or ones


@dataclass(frozen=True)
class View:
    """What the rules may ask."""

    shapes: Shapes
    opset: int

    def shape(self, tensor: gs.Tensor) -> Shape | None:
        return self.shapes.shape(tensor.name)

    def same_shape(self, a: gs.Tensor, b: gs.Tensor) -> bool:
        """Provably equal shapes: every axis a known number or a symbol, and the same on both sides."""
        first = self.shape(a)
        return first is not None and None not in first and first == self.shape(b)

    def broadcasts_into(self, other: gs.Tensor, target: gs.Tensor) -> bool:
        """Whether an elementwise op of the two has the shape of `target`."""
        small, large = self.shape(other), self.shape(target)
        if small is None or (small and large is None):
            return False
        if not small:
            return True
        assert large is not None
        if len(small) > len(large):
            return False
        return all(d == 1 or (d is not None and d == e) for d, e in zip(reversed(small), reversed(large), strict=False))


Rule = Callable[[gs.Node, View], gs.Tensor | None]  # the tensor that the first output equals


def first(node: gs.Node, view: View) -> gs.Tensor | None:
    """Always the first input (Identity)."""
    return node.inputs[0]


def dropout(node: gs.Node, view: View) -> gs.Tensor | None:
    """Inference: training_mode (an input since opset 12) absent or false."""
    if has_input(node, 2):
        training = constant_value(node.inputs[2])
        if training is None or training.any():
            return None
    return node.inputs[0]


def cast(node: gs.Node, view: View) -> gs.Tensor | None:
    """The element type stays."""
    source, result = view.shapes.dtype(node.inputs[0].name), view.shapes.dtype(node.outputs[0].name)
    return node.inputs[0] if source is not None and source == result else None


def same_shape(node: gs.Node, view: View) -> gs.Tensor | None:
    """Ops that keep the row-major order of elements do nothing where the shape stays (pools and reductions over axes of 1 too)."""
    return node.inputs[0] if view.same_shape(node.inputs[0], node.outputs[0]) else None


def reshape(node: gs.Node, view: View) -> gs.Tensor | None:
    """The same shape: inferred, or each target 0 ("keep") or equal, with at most one -1 for what is left."""
    if same_shape(node, view) is not None:
        return node.inputs[0]
    target, shape = operand(node, "shape", 1).integers(), view.shape(node.inputs[0])
    if target is None or shape is None or len(shape) != len(target) or attribute(node, "allowzero", view.opset):
        return None
    open_axes = [t for t, d in zip(target, shape, strict=True) if t != 0 and t != d]
    return node.inputs[0] if open_axes in ([], [-1]) and 0 not in shape else None


def flatten(node: gs.Node, view: View) -> gs.Tensor | None:
    """A matrix flattened at its second axis."""
    shape = view.shape(node.inputs[0])
    matrix = shape is not None and len(shape) == 2 and attribute(node, "axis", view.opset) in (1, -1)
    return node.inputs[0] if matrix else same_shape(node, view)


def expand(node: gs.Node, view: View) -> gs.Tensor | None:
    """To a shape that each axis already has."""
    target, shape = operand(node, "shape", 1).integers(), view.shape(node.inputs[0])
    if target is not None and shape is not None and len(target) <= len(shape):
        if all(t in (1, d) for t, d in zip(reversed(target), reversed(shape), strict=False)):
            return node.inputs[0]
    return same_shape(node, view)


def transpose(node: gs.Node, view: View) -> gs.Tensor | None:
    """The identity permutation, or one that only exchanges axes of length 1."""
    perm, shape = node.attrs.get("perm"), view.shape(node.inputs[0])
    if perm is None:
        if shape is None:
            return None
        perm = range(len(shape))[::-1]
    if list(perm) == list(range(len(perm))):
        return node.inputs[0]
    if shape is None or sorted(perm) != list(range(len(shape))) or [shape[p] == 1 for p in perm] != [d == 1 for d in shape]:
        return None
    moved = [p for p in perm if shape[p] != 1]
    return node.inputs[0] if moved == sorted(moved) else None


def pad(node: gs.Node, view: View) -> gs.Tensor | None:
    """All pads zero."""
    pads = operand(node, "pads", 1).integers()
    return node.inputs[0] if pads is not None and not any(pads) else None


def tile(node: gs.Node, view: View) -> gs.Tensor | None:
    """All repeats one."""
    repeats = operand(node, "repeats", 1).integers()
    return node.inputs[0] if repeats is not None and all(r == 1 for r in repeats) else None


def slice_(node: gs.Node, view: View) -> gs.Tensor | None:
    """Steps of one, and from the start to the end (or nothing is cut, by shape)."""
    starts, ends, axes, steps = (operand(node, n, i) for i, n in enumerate(("starts", "ends", "axes", "steps"), start=1))
    if not steps.known or any(s != 1 for s in steps.integers() or ()):
        return None
    first, last = starts.integers(), ends.integers()
    shape = view.shape(node.inputs[0])
    if first is not None and last is not None and axes.known and not any(first):
        where = axes.integers() or range(len(last))
        if len(where) == len(last) and all(end >= FAR or _covers(end, axis, shape) for end, axis in zip(last, where, strict=True)):
            return node.inputs[0]
    return same_shape(node, view)


def _covers(end: int, axis: int, shape: Shape | None) -> bool:
    if shape is None or not -len(shape) <= axis < len(shape):
        return False
    size = shape[axis]
    return isinstance(size, int) and end >= size


def only_input(node: gs.Node, view: View) -> gs.Tensor | None:
    """Concat, Sum, Max, Min, Mean of one tensor."""
    return node.inputs[0] if len(node.inputs) == 1 else None


def only_output(node: gs.Node, view: View) -> gs.Tensor | None:
    """A Split into one part."""
    return node.inputs[0] if len(node.outputs) == 1 else None


def neutral(node: gs.Node, view: View, *, value: int | bool, sides: tuple[int, ...] = (1,)) -> gs.Tensor | None:
    """One operand is everywhere the neutral element, and broadcasting it changes neither shape nor dtype.

    x + 0 turns -0.0 into 0.0, which is equal by value; infinities and NaN stay what they are.
    """
    for side in sides:
        constant, other = node.inputs[side], node.inputs[1 - side]
        if not _small(constant) or not view.broadcasts_into(constant, other):
            continue
        if view.shapes.dtype(other.name) not in (None, np.dtype(constant.dtype)) and node.op != "Pow":
            continue
        values = constant_value(constant)
        if values is not None and values.size and values.dtype.kind in "biuf" and bool((values == value).all()):
            return other
    return None


def _small(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and int(np.prod(tensor.shape, dtype=np.int64)) <= SMALL


def clip(node: gs.Node, view: View) -> gs.Tensor | None:
    """No bounds. (The operator's default bounds are the largest finite numbers: infinities then stay infinite.)"""
    bounded = "min" in node.attrs or "max" in node.attrs or has_input(node, 1) or has_input(node, 2)
    return None if bounded else node.inputs[0]


def where(node: gs.Node, view: View) -> gs.Tensor | None:
    """A constant condition that is the same everywhere."""
    if not _small(node.inputs[0]):
        return None
    condition = constant_value(node.inputs[0])
    if condition is None or not condition.size or condition.min() != condition.max():
        return None
    chosen, other = (node.inputs[1], node.inputs[2]) if condition.all() else (node.inputs[2], node.inputs[1])
    fits = view.broadcasts_into(node.inputs[0], chosen) and view.broadcasts_into(other, chosen)
    return chosen if fits else None


# tf_half_pixel_for_nn shifts by half a pixel and tf_crop_and_resize crops, even at scale one
_EXACT_COORDINATES = {"half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "asymmetric", "align_corners"}


def resize(node: gs.Node, view: View) -> gs.Tensor | None:
    """All scales one, or sizes that are the input's (opset 10 has scales as input 1, later ones as input 2)."""
    if view.opset >= 11 and attribute(node, "coordinate_transformation_mode", view.opset) not in _EXACT_COORDINATES:
        return None
    if attribute(node, "antialias", view.opset):
        return None
    scales = operand(node, "scales", 1 if view.opset < 11 else 2)
    if scales.values is not None and scales.values.size:
        return node.inputs[0] if (scales.values == 1).all() else None
    stretched = attribute(node, "keep_aspect_ratio_policy", view.opset) in (None, "stretch")
    return same_shape(node, view) if scales.known and stretched and has_input(node, 3) else None


def pool(node: gs.Node, view: View) -> gs.Tensor | None:
    """A window of one element, stride one, no padding."""
    kernel, strides, pads = (node.attrs.get(name, ()) for name in ("kernel_shape", "strides", "pads"))
    return None if any(k != 1 for k in (*kernel, *strides)) or any(pads) else node.inputs[0]


def reduction(node: gs.Node, view: View) -> gs.Tensor | None:
    """Over axes of length one, kept: the shape stays."""
    return same_shape(node, view) if attribute(node, "keepdims", view.opset) else None


def block(node: gs.Node, view: View) -> gs.Tensor | None:
    """Blocks of one element."""
    return node.inputs[0] if node.attrs.get("blocksize") == 1 else None


def idempotent(node: gs.Node, view: View) -> gs.Tensor | None:
    """Applied twice it does what it does once."""
    return node.inputs[0] if producer(node.inputs[0], node.op) is not None else None


def involution(node: gs.Node, view: View) -> gs.Tensor | None:
    """Applied twice it does nothing."""
    inner = producer(node.inputs[0], node.op)
    return inner.inputs[0] if inner is not None else None


_AT_LEAST_ZERO = {"Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp", "Sqrt", "Softplus"}


def relu(node: gs.Node, view: View) -> gs.Tensor | None:
    """Of what is never negative. Pools of one input keep the sign and are looked through."""
    source = node.inputs[0]
    while (inner := producer(source, "MaxPool", "GlobalAveragePool", "GlobalMaxPool")) is not None:
        source = inner.inputs[0]
    return node.inputs[0] if producer(source, *_AT_LEAST_ZERO) is not None else None


NOOPS: dict[str, Rule] = {
    "Identity": first,
    "Dropout": dropout,
    "Cast": cast,
    "CastLike": cast,
    "Reshape": reshape,
    "Flatten": flatten,
    "Squeeze": same_shape,
    "Unsqueeze": same_shape,
    "Expand": expand,
    "Transpose": transpose,
    "Pad": pad,
    "Tile": tile,
    "Slice": slice_,
    "Concat": only_input,
    "Split": only_output,
    "Sum": only_input,
    "Mean": only_input,
    "Max": only_input,
    "Min": only_input,
    "Add": partial(neutral, value=0, sides=(0, 1)),
    "Sub": partial(neutral, value=0),
    "Mul": partial(neutral, value=1, sides=(0, 1)),
    "Div": partial(neutral, value=1),
    "Pow": partial(neutral, value=1),
    "And": partial(neutral, value=True, sides=(0, 1)),
    "Or": partial(neutral, value=False, sides=(0, 1)),
    "Xor": partial(neutral, value=False, sides=(0, 1)),
    "Clip": clip,
    "Where": where,
    "Resize": resize,
    "Upsample": resize,
    "MaxPool": pool,
    "AveragePool": pool,
    "GlobalMaxPool": same_shape,
    "GlobalAveragePool": same_shape,
    **dict.fromkeys(("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd"), reduction),
    "DepthToSpace": block,
    "SpaceToDepth": block,
    **dict.fromkeys(("Abs", "Ceil", "Floor", "Round", "Sign"), idempotent),
    "Relu": relu,
    "Neg": involution,
    "Not": involution,
}


@register("remove-noops", exact=True, keeps={"shapes"})
def remove_noops(model: Model, context: Context) -> int:
    """Identity, Dropout and every node that provably changes nothing is removed; its readers read its input.

    Proofs use the inferred shapes and dtypes; a symbol stands for one size in the whole model (ONNX IR spec). Nodes whose other
    outputs are read stay, and so do those between a graph input (or a constant) and a graph output. Bodies are treated alike.
    """
    view = View(context.get(shapes, model), model.opset)
    wiring = model.wiring()
    removed = 0
    for graph in model.graphs():
        dead: list[gs.Node] = []
        for node in graph.nodes:
            rule = NOOPS.get(op_key(node))
            if rule is None or any(t.outputs or id(t) in wiring.outputs for t in node.outputs[1:]):
                continue
            source = rule(node, view)
            if source is None:
                continue
            if bypass(node, source, wiring):
                dead.append(node)
            else:
                context.reject(node, "it joins a graph input, a constant or another graph's tensor to a graph output")
        removed += remove_nodes(graph, dead) if dead else 0
    return removed
