"""Shapes, dtypes and known integer values of every tensor; what is not known stays unknown (None).

One walk over the nodes in order. Each node is inferred by ONNX's own shape inference on a model of that one node, with everything
known so far (also sizes and values that ONNX cannot express by itself), then refined by `shape_rules` and `shape_values`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.model import Model
from graphopt.onnx_inference import OnnxInference, Typed
from graphopt.proto import subgraphs
from graphopt.shape_bodies import CONTROL_FLOW
from graphopt.shape_rules import ALIKE, BROADCAST, COMPARE, MAX_VALUES, SAME, SHAPE_RULES, Known, Site, same
from graphopt.shape_rules_contrib import CONTRIB_RULES
from graphopt.shape_values import VALUE_RULES, checked, split_values
from graphopt.symbols import Polynomial, Sizes, broadcast_all, symbol, text, unknown

T = TypeVar("T")
Dim = int | str | None
Shape = tuple[Dim, ...]
ANONYMOUS = frozenset({"", "?", "-1", "None", "none", "unk", "unknown", "*"})  # what exporters write for "no idea"


@dataclass(frozen=True)
class Shapes:
    """By tensor name, subgraphs included."""

    shapes: dict[str, Shape]
    dtypes: dict[str, np.dtype]
    values: dict[str, Shape] = field(default_factory=dict)

    def shape(self, name: str) -> Shape | None:
        """One int or symbol an axis; None where even the rank is unknown.

        Equal symbols are equal sizes: 'batch', '12*batch', 'floor((height + 1)/2)'; '?tensor:axis' is a size of which nothing is
        known but that it is one.
        """
        return self.shapes.get(name)

    def static(self, name: str) -> tuple[int, ...] | None:
        """The shape if every axis is a known number, else None."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        known = tuple(d for d in shape if isinstance(d, int))
        return known if len(known) == len(shape) else None

    def rank(self, name: str) -> int | None:
        """The number of axes, if known."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def dtype(self, name: str) -> np.dtype | None:
        """The element type, if known."""
        return self.dtypes.get(name)

    def value(self, name: str) -> Shape | None:
        """The elements of a small integer or boolean tensor of rank 0 or 1, unknown ones None; None where nothing is known."""
        return self.values.get(name)


def shapes(model: Model) -> Shapes:
    """Infer everything in one pass; linear in the number of nodes (loop bodies are walked up to three times)."""
    walker = Walker(model)
    walker.inputs(model.graph.inputs)
    walker.graph(model.graph)
    known = walker.known
    for constant in model.constants():
        known.sizes[constant.name], known.dtypes[constant.name] = tuple(constant.shape), np.dtype(constant.dtype)
        if np.prod(constant.shape, dtype=np.int64) <= MAX_VALUES and len(constant.shape) < 2:
            known.value(constant)
    sizes = {name: tuple(text(size) for size in shape) for name, shape in known.sizes.items()}
    values = {n: tuple(text(e) for e in v.reshape(-1)) for n, v in known.values.items() if v.ndim < 2}
    return Shapes(sizes, known.dtypes, values)


class Walker:
    """Fills `known` node by node; control flow comes back here for its bodies."""

    def __init__(self, model: Model) -> None:
        self.known = Known(model.opset)
        self.onnx = OnnxInference(model, self.known)
        self.leftovers = model.leftovers
        self.results = {id(t) for graph in model.graphs() for t in graph.outputs}

    def inputs(self, tensors: Sequence[gs.Tensor]) -> None:
        """Graph inputs as declared; every axis without a name gets a symbol of its own."""
        for tensor in tensors:
            if tensor.name in self.leftovers.types:
                self.known.types[tensor.name] = self.leftovers.types[tensor.name]
            if tensor.dtype is not None:
                self.known.dtypes[tensor.name] = np.dtype(tensor.dtype)
            if tensor.shape is not None:
                named = (None if d in ANONYMOUS else symbol(d) if isinstance(d, str) else d for d in tensor.shape)
                self.known.sizes[tensor.name] = self.complete(tensor.name, tuple(named))

    def complete(self, name: str, shape: Sizes) -> Sizes:
        """Unknown axes get a symbol that nothing else has."""
        return tuple(
            unknown(f"{name}:{i}") if size is None or (isinstance(size, int) and size < 0) else size for i, size in enumerate(shape)
        )

    def graph(self, graph: gs.Graph) -> None:
        for tensor in graph.outputs:
            self.constant(tensor)
        for node in graph.nodes:
            self.node(node)

    def constant(self, tensor: gs.Tensor) -> None:
        if isinstance(tensor, gs.Constant) and tensor.name not in self.known.sizes:
            self.known.sizes[tensor.name], self.known.dtypes[tensor.name] = tuple(tensor.shape), np.dtype(tensor.dtype)

    def node(self, node: gs.Node) -> None:
        for tensor in node.inputs:
            self.constant(tensor)
        site = Site(node, self.known)
        control = CONTROL_FLOW.get(op_key(node)) if subgraphs(node) else None
        typed = (_guarded(control, site, self) or []) if control is not None else self.infer(site)
        for tensor, (dtype, shape) in zip(node.outputs, typed, strict=False):
            if tensor.name:
                self.record(tensor, dtype, shape)
        if control is None:
            self.follow(site)
        for body in subgraphs(node) if control is None else []:  # an operator we do not know: its bodies as declared
            self.inputs(body.inputs)
            self.graph(body)

    def infer(self, site: Site) -> list[Typed]:
        """Type and shape of every output, axes None where unknown."""
        key = op_key(site.node)
        direct = _direct(site, key)
        if direct is not None:
            return direct
        alike, inputs, source = ALIKE.get(key, (site.node.op, None, 0))
        typed = self.onnx.infer(site, alike if inputs is not None else None, inputs)
        rule = SHAPE_RULES.get(alike if inputs is not None else key)
        refined = (_guarded(rule, site) or []) if rule is not None and inputs is None and _incomplete(typed) else []
        shapes_ = [_merge(shape, refined[i] if i < len(refined) else None) for i, (_, shape) in enumerate(typed)]
        dtype = self.known.dtypes.get(site.node.inputs[source].name) if inputs is not None and site.has(source) else None
        return [(dtype or kind, shape) for (kind, _), shape in zip(typed, shapes_, strict=True)]

    def record(self, tensor: gs.Tensor, dtype: np.dtype | None, shape: Sizes | None) -> None:
        """Store one output; what inference leaves open is taken from the declaration, except at outputs of a graph: runtimes only
        warn there, and exporters do get them wrong.
        """
        declared = None
        if tensor.shape is not None and id(tensor) not in self.results:
            declared = tuple(d if isinstance(d, int) and d >= 0 else None for d in tensor.shape)
        dtype = dtype or (np.dtype(tensor.dtype) if tensor.dtype is not None else None)
        shape = _merge(shape, declared)
        self.known.values.pop(tensor.name, None)  # of the round before, in loop bodies
        self.known.sizes.pop(tensor.name, None)
        if dtype is not None:
            self.known.dtypes[tensor.name] = dtype
        if shape is not None and tensor.name not in self.known.types:
            self.known.sizes[tensor.name] = self.complete(tensor.name, shape)

    def follow(self, site: Site) -> None:
        """Store the values of the outputs, as far as they are known."""
        if op_key(site.node) == "Split":
            values = _guarded(split_values, site) or []
        elif op_key(site.node) in VALUE_RULES and site.node.outputs:
            values = [self.evaluate(VALUE_RULES[op_key(site.node)], site)]
        else:
            return
        for tensor, value in zip(site.node.outputs, values, strict=False):
            dtype, shape = self.known.dtypes.get(tensor.name), self.known.sizes.get(tensor.name)
            if value is not None and tensor.name and dtype is not None and dtype.kind in "iub" and value.size <= MAX_VALUES:
                if shape is None:
                    self.known.sizes[tensor.name] = shape = value.shape
                if len(shape) == value.ndim and all(
                    isinstance(a, Polynomial) or a == b for a, b in zip(shape, value.shape, strict=True)
                ):
                    self.known.sizes[tensor.name] = value.shape
                    self.known.values[tensor.name] = checked(value, dtype)

    def evaluate(self, rule: Callable[[Site], np.ndarray | None], site: Site) -> np.ndarray | None:
        dtype = self.known.dtypes.get(site.node.outputs[0].name)
        if dtype is None or dtype.kind not in "iub":
            return None
        return _guarded(rule, site)


def _guarded(rule: Callable[..., T], *arguments: Any) -> T | None:
    """The rule's result; None for a node that is malformed or cannot run: nothing is known of its outputs."""
    try:
        return rule(*arguments)
    except (ValueError, IndexError, KeyError, TypeError, ZeroDivisionError):
        return None


def _direct(site: Site, key: str) -> list[Typed] | None:
    """Operators simple enough to do without ONNX; None for all others."""
    if not site.has(0) or site.node.inputs[0].name in site.known.types:
        return None
    if key in CONTRIB_RULES:
        return _guarded(CONTRIB_RULES[key], site)
    first = site.known.dtypes.get(site.node.inputs[0].name)
    if key in SAME or key == "Range":  # ONNX refuses ranges of 1-element tensors, which runtimes and its own functions use
        rule = same if key in SAME else SHAPE_RULES[key]
        return [(first, (_guarded(rule, site) or [None])[0])]
    if key in BROADCAST or key in COMPARE:
        shape = broadcast_all(site.shape(i) for i in range(len(site.node.inputs)))
        return [(np.dtype(bool) if key in COMPARE else first, shape)]
    return None


def _incomplete(typed: list[Typed]) -> bool:
    return any(shape is None or None in shape for _, shape in typed)


def _merge(shape: Sizes | None, other: Sizes | None) -> Sizes | None:
    """Axes of `shape`, unknown ones from `other`. Shapes of different rank do not mix: the first stands."""
    if shape is None or other is None or len(shape) != len(other):
        return other if shape is None else shape
    return tuple(b if a is None else a for a, b in zip(shape, other, strict=True))
