"""Which nodes the outputs of a model depend on."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graphopt.edit import remove_nodes
from graphopt.model import Model
from graphopt.proto import subgraphs


def remove_dead(model: Model) -> int:
    """Remove every node that no output of the model depends on, in subgraphs too; returns how many.

    Linear in the size of the graph, whatever the order of its nodes.
    """
    kept = alive(model.graph)
    changes = 0
    for graph in model.graphs():
        dead = [n for n in graph.nodes if id(n) not in kept]
        changes += remove_nodes(graph, dead) if dead else 0
    return changes


def alive(graph: gs.Graph) -> set[int]:
    """id() of every node that the graph's outputs depend on; a live node's bodies depend on what their outputs do."""
    alive: set[int] = set()
    pending: list[gs.Tensor] = list(graph.outputs)
    while pending:
        for node in pending.pop().inputs:
            if id(node) not in alive:
                alive.add(id(node))
                pending.extend(node.inputs)
                for body in subgraphs(node):
                    pending.extend(body.outputs)
    return alive
