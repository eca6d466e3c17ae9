"""Evaluates nodes whose inputs are all constants, in onnxruntime: many nodes in one session, so that the time stays linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto

from graphopt.errors import ModelError
from graphopt.model import SMALL, Model
from graphopt.proto import Exporter, encode_inline
from graphopt.runtime import run, session

BATCH_BYTES = 1 << 29  # of constants in one session: protobuf ends at 2 GB, and the session holds a copy

Failed = Callable[[gs.Node], None]


def evaluate(model: Model, nodes: Sequence[gs.Node], wanted: set[str], failed: Failed) -> dict[str, np.ndarray]:
    """The values of the wanted outputs of `nodes` (in order; each input a constant or an output of a node before it).

    Graph optimisations are off, so the values are what onnxruntime computes when it runs the node. Where a batch fails, its nodes
    are tried one by one; `failed` is told which cannot be evaluated, and what depends on them is left out.
    """
    exporter = Exporter(model.graph, model.leftovers, encode_inline)
    results: dict[str, gs.Constant] = {}
    for batch in _batches(nodes):
        keep = _read_later(batch, nodes) | wanted
        try:
            results.update(_run(model, exporter, batch, results, keep))
        except ModelError:
            for node in batch:
                if not _ready(node, results):
                    continue
                try:
                    results.update(_run(model, exporter, [node], results, {t.name for t in node.outputs}))
                except ModelError:
                    failed(node)
    return {name: np.asarray(c.values) for name, c in results.items() if name in wanted}


def _batches(nodes: Sequence[gs.Node]) -> Iterator[list[gs.Node]]:
    batch: list[gs.Node] = []
    total = 0
    for node in nodes:
        size = sum(nbytes(t) for t in node.inputs if isinstance(t, gs.Constant))
        if batch and total + size > BATCH_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(node)
        total += size
    if batch:
        yield batch


def _read_later(batch: Sequence[gs.Node], nodes: Sequence[gs.Node]) -> set[str]:
    """Results of the batch that nodes of other batches read."""
    inside = {id(n) for n in batch}
    every = {id(n) for n in nodes}
    return {t.name for n in batch for t in n.outputs if any(id(u) in every and id(u) not in inside for u in t.outputs)}


def _ready(node: gs.Node, results: dict[str, gs.Constant]) -> bool:
    return all(not t.name or isinstance(t, gs.Constant) or t.name in results for t in node.inputs)


def nbytes(constant: gs.Constant) -> int:
    """Size of a constant, without reading it."""
    return int(np.prod(constant.shape, dtype=np.int64)) * int(np.dtype(constant.dtype).itemsize)


def _run(
    model: Model, exporter: Exporter, nodes: Sequence[gs.Node], known: dict[str, gs.Constant], keep: set[str]
) -> dict[str, gs.Constant]:
    graph = GraphProto(name="constants")
    given: dict[str, gs.Constant] = {}
    for node in nodes:
        graph.node.append(exporter.node(node))
        for tensor in node.inputs:
            constant = tensor if isinstance(tensor, gs.Constant) else known.get(tensor.name)
            if constant is not None:
                given[tensor.name] = constant
    names = [t.name for n in nodes for t in n.outputs if t.name and t.name in keep]
    graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    proto = ModelProto(ir_version=model.shell.ir_version, opset_import=model.shell.opset_import, graph=graph)
    if not names:
        return {}
    _check(proto, given)
    graph = proto.graph
    graph.initializer.extend([encode_inline(c) for c in given.values()])
    values = run(session(proto, optimize=False), {}, names)
    return {name: gs.Constant(name, value) for name, value in zip(names, values, strict=True) if isinstance(value, np.ndarray)}


def _check(proto: ModelProto, given: dict[str, gs.Constant]) -> None:
    """Raise ModelError where ONNX finds the nodes malformed: kernels trust it, and may crash the process."""
    shown = ModelProto()
    shown.CopyFrom(proto)
    for name, constant in given.items():
        if constant.shape and np.prod(constant.shape, dtype=np.int64) > SMALL:
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(constant.dtype))
            shown.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, list(constant.shape)))
        else:
            shown.graph.initializer.append(encode_inline(constant))
    try:
        onnx.shape_inference.infer_shapes(shown, check_type=True, strict_mode=True)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        raise ModelError(f"not valid: {error}") from error
