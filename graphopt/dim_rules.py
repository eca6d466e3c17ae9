"""What each operator does to labels: a table by op type. This file: what a rule sees, and the elementwise operators.

A rule takes a `Site`, ties what must go together, pins what must stay, and gives the labels of each output (None: nothing of it may
go). What makes removal exact is told in docs/dimensions.md.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.dim_labels import NO_LABELS, ONE, Dims, Labels, is_one
from graphopt.edit import constant_value
from graphopt.operands import operand
from graphopt.shapes import Shape

Axes = list[Labels]


# inputs whose zeros would make infinities or NaN, which no zero weight can undo; what they are there does not matter
NEVER_ZEROED = {("Div", 1), ("Mod", 1), ("Pow", 1), ("BatchNormalization", 4), ("Reciprocal", 0), ("Log", 0)}


def zeroable(constant: gs.Constant) -> bool:
    """Whether `removal.zero` sets slices of it to zero."""
    return not any((n.op, i) in NEVER_ZEROED for n in constant.outputs for i, t in enumerate(n.inputs) if t is constant)


class PinError(Exception):
    """Nothing of the node's inputs and outputs may go; the text says why. Raised by rules, caught by `couple`."""


@dataclass(frozen=True)
class Site:
    """A node, for rules."""

    node: gs.Node
    dims: Dims
    opset: int
    looked: set[int] = field(default_factory=set)  # inputs whose labels the rule took

    @property
    def op(self) -> str:
        return op_key(self.node)

    def has(self, index: int) -> bool:
        """Whether the input is given."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index].name)

    def given(self) -> list[int]:
        """The inputs that are given."""
        return [i for i in range(len(self.node.inputs)) if self.has(i)]

    def attr(self, name: str) -> Any:
        return attribute(self.node, name, self.opset)

    def axes(self, index: int = 0, *, fixed: Mapping[int, str] | None = None) -> Axes:
        """Labels of an input. `fixed`: axes that stay, with the reason; those of a constant then cost no labels of their own."""
        tensor = self.node.inputs[index]
        self.looked.add(index)
        if tensor.name not in self.dims.axes:
            self.dims.axes[tensor.name] = self._first(tensor, fixed or {})
        axes = self.dims.axes[tensor.name]
        if axes is None:
            raise PinError(f"rank of '{tensor.name}' is unknown")
        for axis, reason in (fixed or {}).items():
            self.pin(axes[axis], reason)
        return list(axes)

    def _first(self, tensor: gs.Tensor, fixed: Mapping[int, str]) -> Axes | None:
        """A constant gets a label for each index; anything else that nobody wrote stays as it is."""
        shape, classes, name = self.dims.shapes.shape(tensor.name), self.dims.classes, self.node.name
        if shape is None or not isinstance(tensor, gs.Constant):
            return None if shape is None else self.dims.pinned_axes(shape, f"'{tensor.name}' has no producer", name)
        if np.dtype(tensor.dtype) in (np.int64, object):
            return self.dims.pinned_axes(shape, NO_LABELS, name)
        fixed = {axis % len(shape): reason for axis, reason in fixed.items()}
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        return [
            ONE if size == 1 else classes.pinned(size, fixed[i], name) if i in fixed else classes.fresh(size)
            for i, size in enumerate(sizes)
        ]

    def shape(self, index: int = 0) -> Shape | None:
        """One number or symbol an axis."""
        return self.dims.shapes.shape(self.node.inputs[index].name) if self.has(index) else None

    def out_shape(self, index: int = 0) -> Shape:
        """Shape of an output; one of unknown rank pins the node."""
        shape = self.dims.shapes.shape(self.node.outputs[index].name)
        if shape is None:
            raise PinError(f"rank of '{self.node.outputs[index].name}' is unknown")
        return shape

    def ints(self, name: str, index: int) -> list[int] | None:
        """A list that is an attribute in old opsets and an input in new ones; None where absent or not known before run time."""
        found = operand(self.node, name, index).integers()
        if found is None and self.has(index):
            value = self.dims.shapes.value(self.node.inputs[index].name)
            known = [v for v in value or () if isinstance(v, int)]
            return known if value is not None and len(known) == len(value) else None
        return found

    def tie(self, a: Labels, b: Labels) -> None:
        """Index by index."""
        self.dims.tie(a, b)

    def pin(self, labels: Labels, reason: str) -> None:
        self.dims.classes.pin(labels, reason, self.node.name)

    def pin_statistics(self, labels: Labels, reason: str) -> None:
        """A mean or norm is taken over the axis, which stays unless `couple` was asked to let it go."""
        if self.dims.residual:
            self.dims.statistics.append(labels)
        else:
            self.pin(labels, reason)

    def pinned(self, size: object, reason: str) -> Labels:
        """Labels of a new axis that stays; a size that is no number makes a dynamic one."""
        return ONE if size == 1 else self.dims.classes.pinned(size if isinstance(size, int) else 1, reason, self.node.name)

    def pin_axes(self, axes: Sequence[Labels], reason: str) -> None:
        for labels in axes:
            self.pin(labels, reason)

    def vanishes(self, index: int) -> bool:
        """Whether the input is exactly zero at every index that was zeroed: a constant, or computed from constants alone."""
        tensor = self.node.inputs[index]
        return (isinstance(tensor, gs.Constant) and zeroable(tensor)) or tensor.name in self.dims.vanishing


Result = Sequence[Axes | None]
Rule = Callable[[Site], Result]

DIM_RULES: dict[str, Rule] = {}


def rule(*ops: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule of these op types; a second rule for one of them is an error."""

    def add(function: Rule) -> Rule:
        for op in ops:
            if op in DIM_RULES:
                raise ValueError(f"{op} already has a dimension rule: {DIM_RULES[op].__name__}")
            DIM_RULES[op] = function
        return function

    return add


UNARY = (
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu HardSigmoid "
    "HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink Sigmoid Sign Sin Sinh Softplus "
    "Softsign Sqrt Swish Tan Tanh ThresholdedRelu com.microsoft::Gelu com.microsoft::QuickGelu"
).split()
BINARY = (
    "Add And BitShift BitwiseAnd BitwiseOr BitwiseXor Div Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mod Mul Or "
    "PRelu Pow Sub Sum Where Xor com.microsoft::BiasGelu com.microsoft::FastGelu"
).split()


@rule(*UNARY)
def unary(site: Site) -> Result:
    """Every element on its own; further inputs (the limits of Clip) are scalars."""
    return [site.axes()]


@rule("Dropout")
def dropout(site: Site) -> Result:
    """Nothing happens to the data, unless the model was exported for training: what is random must not depend on sizes."""
    if site.has(2) and not is_false(site.node.inputs[2]):
        raise PinError("Dropout in training mode")
    return [site.axes() for _ in site.node.outputs]


def is_false(tensor: gs.Tensor) -> bool:
    """A constant False."""
    value = constant_value(tensor)
    return value is not None and not value.any()


@rule("CastLike")
def first(site: Site) -> Result:
    """The second input only lends its type."""
    return [site.axes()]


@rule(*BINARY)
def elementwise(site: Site) -> Result:
    """Axes from the right; those of size 1 are repeated (ONNX, 'Broadcasting in ONNX')."""
    return [broadcast(site, [site.axes(i) for i in site.given()])]


def broadcast(site: Site, operands: Sequence[Axes]) -> Axes:
    """Labels of the broadcast shape."""
    rank = max(map(len, operands))
    padded = [[ONE] * (rank - len(axes)) + list(axes) for axes in operands]
    return [_meet(site, labels) for labels in zip(*padded, strict=True)]


def _meet(site: Site, labels: Sequence[Labels]) -> Labels:
    many = [x for x in labels if not is_one(x)]
    if not many:
        return ONE
    longest = max(many, key=lambda x: x.size)
    for other in many:
        site.tie(longest, other)
    return longest


@rule("Equal")
def equal(site: Site) -> Result:
    """Integers that are compared are categories or positions (one-hot encodings); what stands for one of them stays."""
    operands = [site.axes(i) for i in site.given()]
    dtype = site.dims.shapes.dtype(site.node.inputs[0].name)
    if dtype is None or dtype.kind in "iu":
        for axes in operands:
            site.pin_axes(axes, "Equal compares integers")
    return [broadcast(site, operands)]


@rule("QuantizeLinear", "DequantizeLinear")
def linear_scale(site: Site) -> Result:
    """A scale (and zero point) for all, or one for each index of `axis`."""
    x = site.axes()
    if site.attr("block_size"):
        raise PinError("scales by block")
    for index in (1, 2):
        scales = site.axes(index) if site.has(index) else []
        if len(scales) > 1:
            raise PinError("scales by block")
        if scales and not is_one(scales[0]):
            site.tie(x[site.attr("axis") % len(x)], scales[0])
    return [x]


@rule("Shape")
def shape(site: Site) -> Result:
    """Whoever reads sizes goes on reading those from before (`repair_rules`); a dynamic one that shrinks could not be told."""
    x, sizes = site.axes(), site.shape() or ()
    first = range(len(x))[slice(site.attr("start") or 0, site.attr("end"))]
    for place, axis in enumerate(first):
        if x[axis].size > 1 and not isinstance(sizes[axis], int):
            if not all(looks_elsewhere(reader, {place}, len(first)) for reader in site.node.outputs[0].outputs):
                site.pin(x[axis], "a dynamic size that is read")
    return [None]


def looks_elsewhere(reader: gs.Node, places: Container[int], length: int) -> bool:
    """Whether a node that reads a vector of sizes of this length picks only others (Shape -> Gather)."""
    indices = constant_value(reader.inputs[1]) if reader.op == "Gather" and not reader.domain else None
    return indices is not None and all(int(i) % length not in places for i in np.ravel(indices))


@rule("Size")
def size(site: Site) -> Result:
    """The number of elements would change."""
    site.pin_axes(site.axes(), "Size counts its elements")
    return [None]
