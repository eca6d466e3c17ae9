"""Nodes none of whose outputs are used are removed; optional outputs that nobody reads are no longer computed."""

from __future__ import annotations

from functools import cache

import onnx
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.edit import set_output
from graphopt.liveness import remove_dead
from graphopt.model import Model
from graphopt.registry import register

# their optional outputs are not free to choose: onnxruntime's kernel writes them all in training mode
FIXED_OUTPUTS = frozenset({"BatchNormalization"})


@register("dead-code", keeps={"shapes"}, exact=True)
def dead_code(model: Model, context: Context) -> int:
    """Remove nodes that no output of the model depends on, in subgraphs too, and blank unused optional outputs.

    All ONNX operators are free of side effects, so a node whose results nobody reads changes nothing (ONNX IR spec, 'Graphs').
    Weights that only dead nodes read disappear with them. Linear in the size of the graph, whatever the order of the nodes.
    """
    changes = remove_dead(model)
    outputs = model.wiring().outputs
    return changes + sum(_blank_unused(node, outputs, model.opset) for node in model.nodes())


def _blank_unused(node: gs.Node, outputs: frozenset[int], opset: int) -> int:
    """Optional outputs nobody reads become '': the runtime need not compute them (the mask of Dropout, the states of an LSTM)."""
    if node.op in FIXED_OUTPUTS:
        return 0
    optional = _optional_outputs(node.op, node.domain or "", opset)
    unused = [
        i
        for i, t in enumerate(node.outputs)
        if t.name and i < len(optional) and optional[i] and not t.outputs and id(t) not in outputs
    ]
    for index in unused:
        set_output(node, index, gs.Variable.empty())
    while len(node.outputs) > 1 and unused and not node.outputs[-1].name:
        list.pop(node.outputs)
    return len(unused)


@cache
def _optional_outputs(op: str, domain: str, opset: int) -> tuple[bool, ...]:
    """Which outputs may be left out, by the operator's schema."""
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return ()
    return tuple(o.option == onnx.defs.OpSchema.FormalParameterOption.Optional for o in schema.outputs)
