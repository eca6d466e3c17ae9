"""Vector-Jacobian products: a table of rules by op, and the nodes they append to a graph.

A rule sees one node and the name of the gradient of each of its outputs, appends ONNX nodes, and returns the name of the gradient
of each input (None where there is none). What it cannot do exactly it refuses with VjpError: nothing is guessed. Rules need opset
`OPSET` or later.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from graphopt.attributes import attribute
from graphopt.edit import constant_value
from graphopt.operands import has_input, operand
from graphopt.shapes import Dim, Shapes

OPSET = 16  # ScatterElements adds from here on
_AXES_INPUT = 18  # ReduceMean takes its axes as an input from here on


class VjpError(Exception):
    """There is no rule for this node, or none for a node like this; the text says why."""


@dataclass(eq=False)
class Tape:
    """Nodes and constants that rules append; names are unique in the graph they are appended to."""

    taken: Collection[str]
    opset: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    _known: dict[tuple[str, tuple[int, ...], bytes], str] = field(default_factory=dict)
    _shapes: dict[str, str] = field(default_factory=dict)
    _count: int = 0

    def fresh(self) -> str:
        """A name that nothing has."""
        while True:
            self._count += 1
            name = f"gradient/{self._count}"
            if name not in self.taken:
                return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of one output; its name."""
        output = self.fresh()
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def second(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Append a node of two outputs; the name of the second."""
        outputs = [self.fresh(), self.fresh()]
        self.nodes.append(helper.make_node(kind, list(inputs), outputs, name=outputs[0], **attributes))
        return outputs[1]

    def constant(self, values: np.ndarray) -> str:
        """A constant; equal ones are kept once."""
        key = (str(values.dtype), values.shape, values.tobytes())
        if key not in self._known:
            self._known[key] = self.fresh()
            self.constants.append(numpy_helper.from_array(values, self._known[key]))
        return self._known[key]

    def integers(self, *values: int) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(values, np.int64))

    def shape(self, tensor: str) -> str:
        """The shape of a tensor as int64, at run time."""
        if tensor not in self._shapes:
            self._shapes[tensor] = self.op("Shape", tensor)
        return self._shapes[tensor]

    def mean(self, x: str, axes: Sequence[int]) -> str:
        """The mean over these axes, which stay as axes of size 1."""
        if self.opset >= _AXES_INPUT:
            return self.op("ReduceMean", x, self.integers(*axes), keepdims=1)
        return self.op("ReduceMean", x, keepdims=1, axes=list(axes))

    def sum(self, x: str, axes: Sequence[int], *, keep: bool = True) -> str:
        """The sum over these axes; over none, what was given."""
        return self.op("ReduceSum", x, self.integers(*axes), keepdims=int(keep)) if axes else x

    def add(self, terms: Sequence[str]) -> str:
        """The sum of tensors of one shape."""
        return self.op("Sum", *terms) if len(terms) > 1 else terms[0]


@dataclass(frozen=True)
class Vjp:
    """What a rule sees. `wanted`: tensors whose gradient is asked for. `grads`: that of each output, None where there is none."""

    node: gs.Node
    tape: Tape
    shapes: Shapes
    wanted: Collection[str]
    grads: tuple[str | None, ...]

    @property
    def g(self) -> str:
        """The gradient of the first output; VjpError where other outputs have one."""
        if self.grads[0] is None or any(g is not None for g in self.grads[1:]):
            raise VjpError("only the gradient of the first output is known")
        return self.grads[0]

    @property
    def y(self) -> str:
        """The first output."""
        return str(self.node.outputs[0].name)

    def x(self, index: int = 0) -> str:
        """The input; VjpError where it is not given."""
        if not has_input(self.node, index):
            raise VjpError(f"input {index} is missing")
        return str(self.node.inputs[index].name)

    def has(self, index: int) -> bool:
        """Whether the optional input is given."""
        return has_input(self.node, index)

    def wants(self, index: int) -> bool:
        """Whether the gradient of the input is asked for."""
        return self.has(index) and wanted(self.node.inputs[index].name, self.wanted, self.shapes)

    def fixed(self, *indices: int) -> None:
        """VjpError where the gradient of one of these inputs is asked for."""
        for index in indices:
            if self.wants(index):
                raise VjpError(f"no gradient for input {index}, which is computed")

    def attr(self, name: str) -> Any:
        """The attribute, its default where it is absent."""
        return attribute(self.node, name, self.tape.opset)

    def integers(self, name: str, index: int) -> list[int] | None:
        """A parameter that is an attribute or an input; None where absent, VjpError where it is known at run time only."""
        found = operand(self.node, name, index)
        if found.known:
            return found.integers()
        followed = self.shapes.value(self.node.inputs[index].name) or (None,)
        values = [v for v in followed if isinstance(v, int)]
        if len(values) < len(followed):
            raise VjpError(f"its {name} are computed")
        return values

    def value(self, index: int) -> np.ndarray:
        """The constant that the input is; VjpError where it is computed."""
        found = constant_value(self.node.inputs[index]) if self.has(index) else None
        if found is None:
            raise VjpError(f"input {index} is not a constant")
        return found

    def shape(self, name: str) -> tuple[Dim, ...]:
        """Axes of a tensor; VjpError where their number is not known."""
        found = self.shapes.shape(name)
        if found is None:
            raise VjpError(f"the rank of '{name}' is not known")
        return found

    def rank(self, index: int = 0) -> int:
        """The number of axes of an input."""
        return len(self.shape(self.x(index)))

    def axes(self, given: Sequence[int] | None, rank: int) -> list[int]:
        """Axes counted from the front, in order; all of them where none are given."""
        return sorted({axis % rank for axis in given}) if given is not None else list(range(rank))

    def number(self, value: float) -> str:
        """A scalar of the output's type."""
        dtype = self.shapes.dtype(self.y)
        if dtype is None or dtype.kind != "f":
            raise VjpError("its type is not known" if dtype is None else f"its type is {dtype}")
        return self.tape.constant(np.asarray(value, dtype))

    def op(self, kind: str, *inputs: str | float, **attributes: Any) -> str:
        """Append a node; numbers become scalars of the output's type."""
        return self.tape.op(kind, *(x if isinstance(x, str) else self.number(x) for x in inputs), **attributes)

    def where(self, condition: str, g: str) -> str:
        """g where the condition holds, else 0; g must be finite. As a product, onnxruntime takes a fifth of the time of a Where."""
        return self.op("Mul", g, self.op("CastLike", condition, g))

    def like(self, g: str, tensor: str) -> str:
        """Reshaped to the tensor's shape."""
        return self.op("Reshape", g, self.tape.shape(tensor))

    def spread(self, g: str, tensor: str) -> str:
        """Broadcast to the tensor's shape."""
        return self.op("Expand", g, self.tape.shape(tensor))

    def reduced(self, g: str, index: int, target: Sequence[Dim] | None = None) -> str:
        """A gradient of the output's shape (or of `target`), summed over the axes along which the input was broadcast."""
        source, target = self.shape(self.x(index)), tuple(target if target is not None else self.shape(self.y))
        if source == target:
            return g
        new = len(target) - len(source)
        pairs = list(zip(source, target[new:], strict=True))
        if all(a == b or a == 1 or (isinstance(b, int) and isinstance(a, int)) for a, b in pairs):
            axes = [*range(new), *(new + i for i, (a, b) in enumerate(pairs) if a != b)]
            return self.like(self.tape.sum(g, axes), self.x(index))
        ones = self.tape.integers(*[1] * new)  # which axes grew is known at run time only
        padded = self.op("Concat", ones, self.tape.shape(self.x(index)), axis=0) if new else self.tape.shape(self.x(index))
        grown = self.op("NonZero", self.op("Not", self.op("Equal", padded, self.tape.shape(g))))
        axes_ = self.op("Reshape", grown, self.tape.integers(-1))
        return self.like(self.op("ReduceSum", g, axes_, keepdims=1, noop_with_empty_axes=1), self.x(index))


def wanted(name: str, among: Collection[str], shapes: Shapes) -> bool:
    """Whether a tensor is among those asked for, and carries a gradient: not indices, shapes and conditions.

    Narrow integers do, because they may be quantised values; no rule passes them, so they count as unknown.
    """
    dtype = shapes.dtype(name)
    return name in among and (dtype is None or dtype.kind == "f" or (dtype.kind in "iu" and dtype.itemsize < 8))


Rule = Callable[[Vjp], Sequence[str | None]]
VJP_RULES: dict[str, Rule] = {}


def vjp(*ops: str) -> Callable[[Rule], Rule]:
    """Decorator: make a function the rule of these ops ('Relu', 'com.microsoft::Gelu')."""

    def add(rule: Rule) -> Rule:
        VJP_RULES.update(dict.fromkeys(ops, rule))
        return rule

    return add
