"""Attributes as the operator means them: the node's value, or the default of its schema in the model's opset."""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx
import onnx_graphsurgeon as gs


def op_key(node: gs.Node) -> str:
    """What tables by op are keyed by: the op type, with its domain in front where it is not ONNX's own ('com.microsoft::Gelu')."""
    return f"{node.domain}::{node.op}" if node.domain else str(node.op)


def attribute(node: gs.Node, name: str, opset: int) -> Any:
    """The attribute's value, the schema's default at `opset` where it is absent, or None where there is none."""
    if name in node.attrs:
        return node.attrs[name]
    return _defaults(node.op, node.domain or "", opset).get(name)


@cache
def _defaults(op: str, domain: str, opset: int) -> dict[str, Any]:
    try:
        schema = onnx.defs.get_schema(op, opset, domain)
    except onnx.defs.SchemaError:
        return {}
    given = {n: a.default_value for n, a in schema.attributes.items() if a.default_value.name}
    return {n: _text(onnx.helper.get_attribute_value(v)) for n, v in given.items()}


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
