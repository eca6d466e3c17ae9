"""The graph as text, one line a node: for people, golden tests and `graphopt diff`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from onnx import AttributeProto

from graphopt.attributes import op_key
from graphopt.model import Model

_FEW = 6  # constants of up to this many elements are shown whole


def text(model: Model) -> str:
    """Inputs, then one line a node, then outputs; bodies of control flow indented. Weights appear as dtype[shape]."""
    return "\n".join(_graph(model.graph, "")) + "\n"


def _graph(graph: gs.Graph, indent: str) -> list[str]:
    lines = [f"{indent}inputs: {', '.join(_typed(t) for t in graph.inputs)}"]
    for node in graph.nodes:
        lines.append(f"{indent}{node_text(node)}")
        for name, value in node.attrs.items():
            if isinstance(value, gs.Graph):
                lines += [f"{indent}  {name}:", *_graph(value, indent + "    ")]
    return [*lines, f"{indent}outputs: {', '.join(_typed(t) for t in graph.outputs)}"]


def node_text(node: gs.Node) -> str:
    """`y = Conv(x, w: float32[8,3,3,3]) {pads=[1,1,1,1]}`."""
    outputs = ", ".join(t.name or "_" for t in node.outputs)
    attributes = ", ".join(f"{k}={_value(v)}" for k, v in sorted(node.attrs.items()) if not isinstance(v, gs.Graph))
    suffix = f" {{{attributes}}}" if attributes else ""
    return f"{outputs} = {op_key(node)}({', '.join(_operand(t) for t in node.inputs)}){suffix}"


def _operand(tensor: gs.Tensor) -> str:
    if not isinstance(tensor, gs.Constant):
        return tensor.name or "_"
    return f"{tensor.name}: {_constant(tensor)}"


def _constant(tensor: gs.Constant) -> str:
    kind = f"{np.dtype(tensor.dtype).name}[{','.join(map(str, tensor.shape))}]"
    if np.prod(tensor.shape, dtype=np.int64) > _FEW:
        return kind
    return f"{kind} {np.asarray(tensor.values).tolist()}"


def _typed(tensor: gs.Tensor) -> str:
    if tensor.dtype is None:
        return str(tensor.name)
    shape = "?" if tensor.shape is None else ",".join("?" if d is None else str(d) for d in tensor.shape)
    return f"{tensor.name}: {np.dtype(tensor.dtype).name}[{shape}]"


def _value(value: Any) -> str:
    if isinstance(value, gs.Constant):
        return _constant(value)
    if isinstance(value, AttributeProto):
        return str(AttributeProto.AttributeType.Name(value.type)).lower()
    return f"{value:g}" if isinstance(value, float) else repr(value)
