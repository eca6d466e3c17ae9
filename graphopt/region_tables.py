"""Functions of one quantised activation as tables of 256 integers: what onnxruntime computes for each, found by running it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import peek
from graphopt.model import Model
from graphopt.proto import Exporter, encode_inline
from graphopt.runtime import run, session

IR = 8


def table(model: Model, nodes: Sequence[gs.Node], source: gs.Tensor, rank: int, *, signed: bool, result: gs.Tensor) -> np.ndarray:
    """u8 [256]: the stored integer of `result` for each one of `source`; `nodes` (sorted) lie between."""
    exporter = Exporter(gs.Graph([], [], []), model.leftovers, encode_inline)
    constants = {t.name: t for n in nodes for t in n.inputs if isinstance(t, gs.Constant)}
    kind = onnx.TensorProto.INT8 if signed else onnx.TensorProto.UINT8
    shape = [256, *[1] * (rank - 1)]
    graph = onnx.helper.make_graph(
        [exporter.node(n) for n in nodes],
        "table",
        [onnx.helper.make_tensor_value_info(source.name, kind, shape)],
        [onnx.ValueInfoProto(name=result.name)],
        [onnx.numpy_helper.from_array(np.asarray(peek(c)), name) for name, c in constants.items()],
    )
    proto = onnx.helper.make_model(graph, opset_imports=model.shell.opset_import, ir_version=max(IR, model.shell.ir_version))
    stored = np.arange(256, dtype=np.uint8)
    values = (stored ^ np.uint8(128)).view(np.int8) if signed else stored
    (found,) = run(session(proto, optimize=False), {source.name: values.reshape(shape)}, [result.name])
    integers = np.asarray(found).reshape(256)
    return np.array(integers if integers.dtype == np.uint8 else integers.view(np.uint8) ^ np.uint8(128), np.uint8)
