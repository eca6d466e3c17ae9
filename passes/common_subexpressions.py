"""Nodes that compute the same from the same inputs become one."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.edit import Wiring, remove_nodes, replace_uses, set_output
from graphopt.model import Model
from graphopt.proto import subgraphs
from graphopt.registry import register

PURE_DOMAINS = (None, "", "ai.onnx.ml")  # of operators elsewhere nothing is known: they may keep state
RANDOM = {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
COMMUTATIVE = {"Add", "Mul", "And", "Or", "Xor", "Equal"}
SMALL = 64  # elements of a constant that is compared by value instead of by identity


@dataclass(frozen=True)
class Scope:
    """What was computed so far in a graph, and in those around it."""

    wiring: Wiring
    seen: dict[Hashable, gs.Node] = field(default_factory=dict)
    outer: Scope | None = None

    def find(self, key: Hashable) -> gs.Node | None:
        """The first node with that key that is visible here."""
        scope: Scope | None = self
        while scope is not None:
            if key in scope.seen:
                return scope.seen[key]
            scope = scope.outer
        return None


def _array_key(values: np.ndarray) -> Hashable:
    return (str(values.dtype), values.shape, values.tobytes())


def _tensor_key(tensor: gs.Tensor) -> Hashable:
    if isinstance(tensor, gs.Constant) and np.prod(tensor.shape, dtype=np.int64) <= SMALL and tensor.dtype != object:
        return _array_key(np.asarray(tensor.values))
    return id(tensor) if tensor.name else ""


def _attribute_key(value: Any) -> Hashable:
    if isinstance(value, gs.Constant):
        return _tensor_key(value)
    if isinstance(value, onnx.AttributeProto):
        return bytes(value.SerializeToString(deterministic=True))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def node_key(node: gs.Node) -> Hashable | None:
    """Equal for nodes that compute the same; None for those that must not be shared (random, unknown domains, with bodies)."""
    if node.domain not in PURE_DOMAINS or node.op in RANDOM or subgraphs(node):
        return None
    inputs = [_tensor_key(t) for t in node.inputs]
    if node.op in COMMUTATIVE:
        inputs.sort(key=str)
    attributes = tuple(sorted((name, _attribute_key(value)) for name, value in node.attrs.items()))
    return (node.op, node.domain, attributes, tuple(inputs), tuple(bool(t.name) for t in node.outputs))


def merge_into(kept: gs.Node, node: gs.Node, wiring: Wiring) -> bool:
    """Readers of `node` read `kept`; a graph output keeps its name, so `kept` then writes it. False where both write one."""
    pairs = [(a, b) for a, b in zip(kept.outputs, node.outputs, strict=True) if b.name]
    results = [(a, b) for a, b in pairs if id(b) in wiring.outputs]
    if any(id(a) in wiring.outputs for a, _ in results) or (results and wiring.home[id(kept)] != wiring.home[id(node)]):
        return False
    for index, (a, b) in enumerate(zip(kept.outputs, node.outputs, strict=True)):
        if b.name and id(b) in wiring.outputs:
            set_output(node, index, gs.Variable.empty())
            set_output(kept, index, b)
            replace_uses(a, b)
        elif b.name:
            replace_uses(b, a)
    return True


@register("common-subexpressions", exact=True, keeps={"shapes"})
def common_subexpressions(model: Model, context: Context) -> int:
    """A node with the operator, attributes and inputs of an earlier one is removed; its readers read the earlier one.

    Operators that are random, of an unknown domain, or that hold bodies stay. A body may use what the graphs around it compute.
    Constants of up to 64 elements count as the same if their values are (merge-initializers does it for all).
    """
    wiring = model.wiring()
    removed = 0
    stack: list[tuple[gs.Graph, Scope]] = [(model.graph, Scope(wiring))]
    while stack:
        graph, scope = stack.pop()
        dead: list[gs.Node] = []
        for node in graph.nodes:
            key = node_key(node)
            kept = None if key is None else scope.find(key)
            if kept is None and key is not None:
                scope.seen[key] = node
            elif kept is not None and merge_into(kept, node, wiring):
                dead.append(node)
            elif kept is not None:
                context.reject(node, "both are graph outputs, or lie in different graphs")
            stack.extend((body, Scope(wiring, outer=scope)) for body in subgraphs(node))
        removed += remove_nodes(graph, dead) if dead else 0
    return removed
