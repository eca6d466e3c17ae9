"""ONNX's shape inference of single nodes, given everything that is known of their inputs."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper

from graphopt.model import Model
from graphopt.proto import Exporter, encode_inline
from graphopt.shape_rules import Known, Site
from graphopt.symbols import Polynomial, Sizes, text

Typed = tuple[np.dtype | None, Sizes | None]  # what is known of one tensor
MAX_FLOATS = 16  # float constants up to this many elements are shown to ONNX: the scales of Resize, not weights


class OnnxInference:
    """Asks ONNX about one node at a time; nodes that look the same to it are asked about once."""

    def __init__(self, model: Model, known: Known) -> None:
        self.known = known
        self.exporter = Exporter(model.graph, model.leftovers, encode_inline)
        self.imports = [*model.shell.opset_import]
        self.ir_version = model.shell.ir_version
        self.answers: dict[bytes, list[TypeProto]] = {}

    def infer(self, site: Site, alike: str | None = None, chosen: tuple[int, ...] | None = None) -> list[Typed]:
        """Type and shape of each output. `alike`: as if the node were that operator on the chosen inputs."""
        node = NodeProto(op_type=alike or site.node.op, domain="" if alike else site.node.domain or "")
        node.attribute.extend([self.exporter.attribute(site.node, name, value) for name, value in site.node.attrs.items()])
        graph = GraphProto(name="node")
        symbols: dict[str, Polynomial] = {}
        indices = range(len(site.node.inputs)) if chosen is None else [i for i in chosen if i < len(site.node.inputs)]
        for index in indices:
            node.input.append(f"i{index}" if site.has(index) else "")
            if site.has(index):
                self._input(graph, f"i{index}", site.node.inputs[index], symbols)
        node.output.extend([f"o{i}" if t.name else "" for i, t in enumerate(site.node.outputs)])
        graph.node.append(node)
        types = self._ask(graph)
        result: list[Typed] = []
        for tensor, kind in zip(site.node.outputs, types, strict=True):
            if kind.WhichOneof("value") not in (None, "tensor_type"):
                self.known.types[tensor.name] = kind
            result.append(_typed(kind, symbols))
        return result

    def _input(self, graph: GraphProto, name: str, tensor: gs.Tensor, symbols: dict[str, Polynomial]) -> None:
        """Declare an input and, where all its elements are known, its value."""
        info = graph.input.add(name=name)
        if tensor.name in self.known.types:
            info.type.CopyFrom(self.known.types[tensor.name])
            return
        dtype, sizes = self.known.dtypes.get(tensor.name), self.known.sizes.get(tensor.name)
        if dtype is None:
            return
        shown = None if sizes is None else [text(s) for s in sizes]
        symbols.update({s.text: s for s in sizes or () if isinstance(s, Polynomial)})
        info.type.CopyFrom(helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(dtype), shown))
        value = self._value(tensor, dtype)
        if value is not None:
            value.name = name
            graph.initializer.append(value)

    def _value(self, tensor: gs.Tensor, dtype: np.dtype) -> TensorProto | None:
        if isinstance(tensor, gs.Constant) and dtype.kind == "f" and np.prod(tensor.shape, dtype=np.int64) <= MAX_FLOATS:
            return onnx.numpy_helper.from_array(np.asarray(tensor.values))
        value = self.known.value(tensor)
        if value is None or not all(isinstance(v, int) for v in value.reshape(-1)):
            return None
        return onnx.numpy_helper.from_array(value.astype(dtype))

    def _ask(self, graph: GraphProto) -> list[TypeProto]:
        model = ModelProto(ir_version=self.ir_version, opset_import=self.imports, graph=graph)
        question = model.SerializeToString(deterministic=True)
        if question not in self.answers:
            self.answers[question] = _inferred(question, [*graph.node[0].output])
        return self.answers[question]


def _inferred(question: bytes, outputs: list[str]) -> list[TypeProto]:
    """The types of the outputs; empty ones where ONNX knows nothing or the node contradicts itself."""
    try:
        graph = onnx.shape_inference.infer_shapes(question).graph
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return [TypeProto() for _ in outputs]
    found = {info.name: info.type for info in graph.value_info}
    return [found.get(name, TypeProto()) for name in outputs]


def _typed(kind: TypeProto, symbols: dict[str, Polynomial]) -> Typed:
    tensor = kind.tensor_type
    if not kind.HasField("tensor_type") or not tensor.elem_type:
        return None, None
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    if not tensor.HasField("shape"):
        return dtype, None
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else symbols.get(d.dim_param) for d in tensor.shape.dim)
