"""Rewiring a gs.Graph safely and fast.

onnx-graphsurgeon unlinks by equality (tensors by name, nodes by comparing everything), which is slow and, with equal nodes,
wrong; these helpers unlink by identity. Use them instead of assigning to `inputs`/`outputs` elements.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.proto import Weights


@dataclass(frozen=True)
class Wiring:
    """What the tensors themselves do not tell: taken once a pass by `Model.wiring`; nodes made later have no home yet."""

    outputs: frozenset[int]  # id() of every output tensor of every graph: these keep their names
    home: dict[int, int]  # id(node) -> id of the graph it lies in


def _unlink(items: list[Any], item: object) -> None:
    for index in range(len(items)):
        if items[index] is item:
            list.__delitem__(items, index)
            return


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Make `tensor` the node's input `index`; missing optional inputs before it are filled with empty ones."""
    while len(node.inputs) <= index:
        node.inputs.append(gs.Variable.empty())
    old = node.inputs[index]
    _unlink(old.outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def set_inputs(node: gs.Node, tensors: Sequence[gs.Tensor]) -> None:
    """Replace all inputs."""
    for old in node.inputs:
        _unlink(old.outputs, node)
    list.clear(node.inputs)
    for tensor in tensors:
        list.append(node.inputs, tensor)
        list.append(tensor.outputs, node)


def set_output(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Make the node the producer of `tensor`; what it produced there before is left without a producer."""
    _unlink(node.outputs[index].inputs, node)
    list.__setitem__(node.outputs, index, tensor)
    list.append(tensor.inputs, node)


def detach(node: gs.Node) -> None:
    """Take the node out of its tensors' lists (not out of graph.nodes: see `remove_nodes`); bodies of control flow too."""
    for tensor in node.inputs:
        _unlink(tensor.outputs, node)
    for tensor in node.outputs:
        _unlink(tensor.inputs, node)
    list.clear(node.inputs)
    list.clear(node.outputs)
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for inner in value.nodes:
                detach(inner)


def remove_nodes(graph: gs.Graph, nodes: Collection[gs.Node]) -> int:
    """Detach the nodes and rebuild the graph's list without them, in linear time."""
    dead = {id(n) for n in nodes}
    for node in nodes:
        detach(node)
    graph.nodes = [n for n in graph.nodes if id(n) not in dead]
    return len(dead)


def replace_uses(old: gs.Tensor, new: gs.Tensor) -> int:
    """Every node that reads `old` (in subgraphs too) reads `new` instead; returns the number of inputs changed.

    Graph outputs are not touched: see `bypass`.
    """
    changed = 0
    for node in {id(n): n for n in old.outputs}.values():
        for index, tensor in enumerate(node.inputs):
            if tensor is old:
                list.__setitem__(node.inputs, index, new)
                list.append(new.outputs, node)
                changed += 1
    list.clear(old.outputs)
    return changed


def bypass(node: gs.Node, source: gs.Tensor, wiring: Wiring) -> bool:
    """Readers of the node's first output read `source` instead; the node is left dead. False where that cannot be done.

    A graph output keeps its name: the producer of `source` writes it directly, which is impossible where `source` is a graph
    input, a constant or itself an output, or is produced in another graph.
    """
    target = node.outputs[0]
    if id(target) not in wiring.outputs:
        replace_uses(target, source)
        return True
    if isinstance(source, gs.Constant) or id(source) in wiring.outputs or len(source.inputs) != 1:
        return False
    writer = source.inputs[0]
    if id(writer) not in wiring.home or wiring.home[id(writer)] != wiring.home.get(id(node)):
        return False
    set_output(node, 0, gs.Variable.empty())
    set_output(writer, next(i for i, t in enumerate(writer.outputs) if t is source), target)
    replace_uses(source, target)
    return True


def constant_value(tensor: gs.Tensor) -> np.ndarray | None:
    """The values of a constant (an initializer, or the output of a Constant node that holds a tensor), else None."""
    if isinstance(tensor, gs.Constant):
        return np.asarray(tensor.values)
    if len(tensor.inputs) == 1 and tensor.inputs[0].op == "Constant" and not tensor.inputs[0].domain:
        value = tensor.inputs[0].attrs.get("value")
        return np.asarray(value.values) if isinstance(value, gs.Constant) else None
    return None


def peek(constant: gs.Constant) -> np.ndarray:
    """The values, without keeping in memory what was not there before: `constant.values` maps an external weight for good."""
    values = constant._values
    return np.asarray(values.load() if isinstance(values, Weights) else constant.values)


def producer(tensor: gs.Tensor, *ops: str) -> gs.Node | None:
    """The node that writes `tensor`, if its op (in the default domain) is one of `ops`; any op where none is given."""
    if len(tensor.inputs) != 1:
        return None
    node = tensor.inputs[0]
    return node if not ops or (not node.domain and node.op in ops) else None


def only_user(tensor: gs.Tensor, wiring: Wiring) -> gs.Node | None:
    """The one node that reads `tensor`, and reads it once, if it is no graph output; else None."""
    if id(tensor) in wiring.outputs or len(tensor.outputs) != 1:
        return None
    node = tensor.outputs[0]
    return node if sum(t is tensor for t in node.inputs) == 1 else None
