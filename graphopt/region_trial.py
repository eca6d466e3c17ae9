"""Each region of a model as a small model of its own, with the inputs it has in the whole: what is timed before it is taken."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from graphopt.context import Context
from graphopt.kernels.plan import DOMAIN
from graphopt.model import Model, from_proto
from graphopt.region_emit import emit_region
from graphopt.region_find import search
from graphopt.runtime import Feed, run, session


@dataclass(frozen=True)
class Trial:
    """One region alone: a model of its node, its constants and its function, and its activations for each row of the feeds."""

    name: str
    model: onnx.ModelProto
    feeds: list[Feed]


def emitted(model: Model, exclude: Sequence[str], names: Collection[str] | None = None) -> onnx.ModelProto:
    """A copy of the model with its regions (those of these names) emitted; the model is left alone.

    The search is deterministic: regions have the names in the copy that they have in the model.
    """
    copy = from_proto(model.proto())
    for region in search(copy, Context(), exclude).regions:
        if names is None or region.name in names:
            emit_region(copy, region)
    copy.sort()
    return copy.proto()


def trials(proto: onnx.ModelProto, feeds: Sequence[Feed]) -> Iterator[Trial]:
    """The regions of the main graph, one by one; those in bodies of If or Loop cannot be fed from outside, and are left out.

    Raises ModelError where onnxruntime cannot run the model on the feeds.
    """
    nodes = [n for n in proto.graph.node if n.domain == DOMAIN]
    constants = {t.name: t for t in proto.graph.initializer}
    border = [name for n in nodes for name in (*n.input, *n.output) if name not in constants]
    rows = [_values(proto, list(dict.fromkeys(border)), feed) for feed in feeds]
    for node in nodes:
        given = [name for name in node.input if name not in constants]
        graph = onnx.helper.make_graph(
            [node],
            node.op_type,
            [_info(name, rows[0][name]) for name in given],
            [_info(name, rows[0][name]) for name in node.output],
            [constants[name] for name in dict.fromkeys(node.input) if name in constants],
        )
        functions = [f for f in proto.functions if f.name == node.op_type]
        small = onnx.helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version, functions=functions)
        yield Trial(node.op_type, small, [{name: row[name] for name in given} for row in rows])


def _info(name: str, value: np.ndarray) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)


def _values(proto: onnx.ModelProto, names: Sequence[str], feed: Feed) -> dict[str, np.ndarray]:
    """What the tensors hold, computed by the functions of the regions."""
    opened = onnx.ModelProto()
    opened.CopyFrom(proto)
    known = {v.name for v in (*opened.graph.output, *opened.graph.input)}
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    runner = session(opened, operators=False)
    outputs = [o.name for o in runner.get_outputs()]
    return dict(zip(outputs, run(runner, feed, outputs), strict=True)) | {k: v for k, v in feed.items() if k in names}
