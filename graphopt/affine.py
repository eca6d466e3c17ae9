"""Per-channel affine maps, y = scale * x + shift for each index of one axis, and the nodes that are one.

Everything is float64 until it is written to a constant: a chain of any length is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.edit import Wiring, peek
from graphopt.model import Model
from graphopt.shapes import Shape, Shapes

FLOATS = tuple(np.dtype(t) for t in (np.float16, np.float32, np.float64))
UNIT = 4 * np.finfo(np.float64).eps  # 1 / 49 * 49 is not 1 in float64
VALUE_BLIND = frozenset({"Shape", "Size"})  # these read a tensor's shape only: they do not mind a change of its values


@dataclass(frozen=True, eq=False)
class Affine:
    """`axis` is None where all elements share one scale and one shift (both arrays then hold one element).

    `bn`: a BatchNormalization is part of it, so it may be written back as one node.
    """

    scale: np.ndarray
    shift: np.ndarray
    axis: int | None
    dtype: np.dtype
    bn: bool = False

    @cached_property
    def has_scale(self) -> bool:
        return bool((np.abs(self.scale - 1) > UNIT).any())

    @cached_property
    def has_shift(self) -> bool:
        return bool(self.shift.any())

    def then(self, after: Affine) -> Affine | None:
        """First this, then `after`; None where they run along different axes."""
        if None not in (self.axis, after.axis) and self.axis != after.axis:
            return None
        axis = after.axis if self.axis is None else self.axis
        bn = self.bn or after.bn
        return affine(self.scale * after.scale, self.shift * after.scale + after.shift, axis, self.dtype, bn=bn)

    def scale_only(self) -> Affine:
        return affine(self.scale, np.zeros(1), self.axis, self.dtype)

    def shift_only(self, *, before: bool) -> Affine:
        """The shift that is left beside `scale_only`: after it, or (`before`) in front of it, which divides by the scale."""
        return affine(np.ones(1), self.shift / self.scale if before else self.shift, self.axis, self.dtype)

    def on(self, axis: int | None) -> Affine:
        """The same along another axis."""
        return self if self.axis is None else replace(self, axis=axis)

    def indexed(self, index: np.ndarray, axis: int | None) -> Affine:
        """Only the given indices, in their order."""
        if self.axis is None:
            return self
        return affine(self.scale[index], self.shift[index], axis, self.dtype, bn=self.bn)

    def spread(self, index: np.ndarray, size: int, axis: int) -> Affine:
        """The given indices of an axis of `size` get this map in order (the same one where it is uniform), the rest stays."""
        scale, shift = np.ones(size), np.zeros(size)
        scale[index], shift[index] = self.scale, self.shift
        return affine(scale, shift, axis, self.dtype, bn=self.bn)


def affine(scale: np.ndarray, shift: np.ndarray, axis: int | None, dtype: np.dtype, *, bn: bool = False) -> Affine:
    """Normalised: arrays of equal length, `axis` None where every index is mapped alike."""
    scale, shift = np.broadcast_arrays(np.asarray(scale, np.float64).ravel(), np.asarray(shift, np.float64).ravel())
    if axis is None or ((scale == scale[0]).all() and (shift == shift[0]).all()):
        scale, shift, axis = scale[:1], shift[:1], None
    return Affine(scale, shift, axis, dtype, bn)


@dataclass(frozen=True)
class Scene:
    """What rules may ask about the model."""

    opset: int
    shapes: Shapes
    wiring: Wiring

    @classmethod
    def of(cls, model: Model, shapes: Shapes) -> Scene:
        return cls(model.opset, shapes, model.wiring())

    def dims(self, tensor: gs.Tensor) -> Shape | None:
        """The shape as far as it is known; None where even the rank is unknown."""
        known = self.shapes.shape(tensor.name)
        if known is not None or tensor.shape is None:
            return known
        return tuple(tensor.shape)

    def rank(self, tensor: gs.Tensor) -> int | None:
        dims = self.dims(tensor)
        return None if dims is None else len(dims)

    def size(self, tensor: gs.Tensor, axis: int) -> int | None:
        """The length of an axis where it is a known number."""
        dims = self.dims(tensor)
        size = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
        return size if isinstance(size, int) else None

    def readers(self, tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
        """Each use of the tensor's values: the node and which of its inputs."""
        nodes = {id(n): n for n in tensor.outputs if n.domain or n.op not in VALUE_BLIND}
        return [(n, slot) for n in nodes.values() for slot, t in enumerate(n.inputs) if t is tensor]

    def is_output(self, tensor: gs.Tensor) -> bool:
        return id(tensor) in self.wiring.outputs

    def home(self, node: gs.Node) -> int:
        return self.wiring.home[id(node)]

    def attribute(self, node: gs.Node, name: str) -> object:
        return attribute(node, name, self.opset)


@dataclass(frozen=True)
class Source:
    """A node that is an affine map of its input `slot`."""

    affine: Affine
    slot: int


def read(constant: gs.Constant) -> np.ndarray:
    """Its values in float64. The constant itself stays as it came: a pass that changes nothing must not re-encode weights."""
    return np.asarray(peek(constant), np.float64)


Rule = Callable[[gs.Node, Scene], "Source | str | None"]


def source(node: gs.Node, scene: Scene) -> Source | str | None:
    """The affine map that a node is; a reason where it is one that must be left alone; None where it is none at all."""
    rule = SOURCES.get(op_key(node))
    found = rule(node, scene) if rule is not None else None
    return (_quantised(node, found.slot) or found) if isinstance(found, Source) else found


def _quantised(node: gs.Node, slot: int) -> str | None:
    """Around quantised tensors a scale is part of what the runtime's kernels recognise."""
    x = node.inputs[slot]
    writer = x.inputs[0] if len(x.inputs) == 1 else None
    if writer is not None and writer.op in ("DequantizeLinear", "DynamicQuantizeLinear"):
        return "next to a quantised tensor"
    if any(n.op == "QuantizeLinear" for n in node.outputs[0].outputs):
        return "next to a quantised tensor"
    if writer is not None and writer.op == "Cast" and isinstance(writer.inputs[0], gs.Constant):
        return "decodes a weight stored in a smaller type"
    return None


def _batch_normalization(node: gs.Node, scene: Scene) -> Source | str:
    """Inference form of the ONNX operator BatchNormalization, opset 7, 9, 14 and 15; channels are axis 1."""
    if scene.attribute(node, "training_mode"):
        return "in training mode"
    if node.op == "BatchNormalization" and scene.attribute(node, "spatial") == 0:
        return "spatial=0: its parameters are not per channel"
    if any(t.name and (t.outputs or scene.is_output(t)) for t in node.outputs[1:]):
        return "its running statistics are read"
    if not all(isinstance(t, gs.Constant) for t in node.inputs[1:5]):
        return "its parameters are not constants"
    if len({tuple(t.shape) for t in node.inputs[1:5]}) != 1:
        return "its parameters differ in size"
    if node.inputs[1].dtype not in FLOATS or (scene.rank(node.inputs[0]) or 2) < 2:
        return "not floating point, or its input has no channel axis"
    scale, bias, mean, variance = (read(t).ravel() for t in node.inputs[1:5])
    epsilon = scene.attribute(node, "epsilon")
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = scale / np.sqrt(variance + (epsilon if isinstance(epsilon, float) else 1e-5))
        shift = bias - mean * factor
    if not (np.isfinite(factor).all() and np.isfinite(shift).all()):
        return "its parameters are not finite"
    dtype = scene.shapes.dtype(node.inputs[0].name) or np.dtype(node.inputs[1].dtype)
    return Source(affine(factor, shift, 1, dtype, bn=True), 0)


def _add(c: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray]:
    return np.ones(1), c


def _subtract(c: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray]:
    return (-np.ones(1), c) if left else (np.ones(1), -c)


def _multiply(c: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray]:
    return c, np.zeros(1)


def _divide(c: np.ndarray, left: bool) -> tuple[np.ndarray, np.ndarray] | str:
    if left:
        return "a constant divided by a tensor is not affine"
    return "division by zero" if (c == 0).any() else (1 / c, np.zeros(1))


Terms = Callable[[np.ndarray, bool], "tuple[np.ndarray, np.ndarray] | str"]


def _by_constant(terms: Terms, node: gs.Node, scene: Scene) -> Source | str | None:
    """Add, Sub, Mul, Div with exactly one constant that varies along at most one axis of the other operand."""
    fixed = [i for i, t in enumerate(node.inputs) if isinstance(t, gs.Constant)]
    if len(fixed) != 1 or len(node.inputs) != 2 or node.inputs[fixed[0]].dtype not in FLOATS:
        return None
    slot = 1 - fixed[0]
    constant, x = node.inputs[fixed[0]], node.inputs[slot]
    axis = _constant_axis(tuple(constant.shape), scene.dims(x))
    if isinstance(axis, str):
        return axis
    values = read(constant).ravel()
    if not np.isfinite(values).all():
        return "its constant is not finite"
    made = terms(values, fixed[0] == 0)
    return made if isinstance(made, str) else Source(affine(*made, axis, np.dtype(constant.dtype)), slot)


def _constant_axis(shape: tuple[int, ...], dims: Shape | None) -> int | str | None:
    """The axis of the other operand along which a constant of `shape` varies; a reason where it would change the result's shape."""
    if not shape:
        return None
    if dims is None:
        return "the rank of its input is unknown"
    if len(shape) > len(dims):
        return "its constant adds axes to the result"
    wide = [i for i, d in enumerate(shape) if d != 1]
    if len(wide) > 1:
        return "its constant varies along several axes"
    if not wide:
        return None
    axis = wide[0] + len(dims) - len(shape)
    if dims[axis] != shape[wide[0]] or not shape[wide[0]]:
        return "its constant broadcasts the input, or the axis has an unknown size"
    return axis


SOURCES: dict[str, Rule] = {
    "Add": partial(_by_constant, _add),
    "BatchNormalization": _batch_normalization,
    "Div": partial(_by_constant, _divide),
    "Mul": partial(_by_constant, _multiply),
    "Sub": partial(_by_constant, _subtract),
}
