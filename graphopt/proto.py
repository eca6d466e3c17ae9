"""ONNX protobuf <-> onnx-graphsurgeon graph, without loss.

onnx-graphsurgeon's own importer and exporter drop metadata, unusual attributes and types, shadow outer names in subgraphs and
cannot write empty lists; here its Graph, Node, Variable and Constant are only the storage. What they have no place for is kept
beside them (`node.extra`, `Leftovers`) and written back. Every tensor name is unique over the whole model, subgraphs included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto, helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from graphopt.errors import ModelError
from graphopt.external import check_tensor, load_tensor

Encode = Callable[[gs.Constant], TensorProto | None]
_NUMBERED = {AttributeProto.FLOAT: "f", AttributeProto.INT: "i"}
_DENSE = 1 << 40  # elements of a dense tensor: more is a damaged file, not a model
_LISTS = {AttributeProto.FLOATS: "floats", AttributeProto.INTS: "ints"}


@dataclass
class Leftovers:
    """What onnx-graphsurgeon has no place for, kept by tensor name."""

    types: dict[str, onnx.TypeProto] = field(default_factory=dict)  # sequences, optionals, maps, sparse tensors
    infos: dict[str, ValueInfoProto] = field(default_factory=dict)  # documented graph inputs and outputs
    defaults: dict[str, TensorProto] = field(default_factory=dict)  # overridable inputs (ONNX IR spec: IR >= 4)
    graphs: dict[int, GraphProto] = field(default_factory=dict)  # id(graph) -> its metadata and annotations


class Weights(LazyValues):  # type: ignore[misc]
    """Constant values still in their protobuf or external file; read on first use."""

    def __init__(self, tensor: TensorProto | onnx.SparseTensorProto, base_dir: Path | None) -> None:
        self.tensor, self.base_dir = tensor, base_dir
        self.shape = tuple(tensor.dims)
        values = tensor.values if isinstance(tensor, onnx.SparseTensorProto) else tensor
        check_tensor(values, base_dir)
        if values is not tensor:
            _check_sparse(tensor, base_dir)
        self.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(values.data_type))
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> np.ndarray:
        if isinstance(self.tensor, onnx.SparseTensorProto):
            return _dense(self.tensor, self.base_dir)
        return load_tensor(self.tensor, self.base_dir)


def _check_sparse(sparse: onnx.SparseTensorProto, base_dir: Path | None) -> None:
    check_tensor(sparse.indices, base_dir)
    if any(d < 0 for d in sparse.dims) or math.prod(sparse.dims) > _DENSE:
        raise ModelError(f"sparse initializer '{sparse.values.name}': shape {list(sparse.dims)} cannot be made dense")


def _dense(sparse: onnx.SparseTensorProto, base_dir: Path | None) -> np.ndarray:
    """The array of a sparse tensor; indices are linear or one row a value (ONNX IR spec, SparseTensorProto)."""
    values, indices = load_tensor(sparse.values, base_dir), load_tensor(sparse.indices, base_dir)
    shape = tuple(sparse.dims)
    if indices.ndim == 2:
        indices = indices @ np.array([*np.cumprod(shape[:0:-1], dtype=np.int64)[::-1], 1], dtype=np.int64)
    size = int(np.prod(shape, dtype=np.int64))
    if indices.shape != values.shape or (indices.size and (indices.min() < 0 or indices.max() >= size)):
        raise ModelError(f"sparse initializer '{sparse.values.name}': its indices do not fit the shape {list(shape)}")
    dense = np.zeros(size, values.dtype)
    dense[indices] = values
    return dense.reshape(shape)


class Importer:
    """Builds one model's gs.Graph; `taken` keeps names unique over all scopes."""

    def __init__(self, model: onnx.ModelProto, base_dir: Path | None) -> None:
        self.model, self.base_dir = model, base_dir
        self.leftovers = Leftovers()
        self.taken: set[str] = set()
        self.node_names: set[str] = set()
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), None)

    def graph(self, proto: GraphProto, outer: dict[str, gs.Tensor]) -> gs.Graph:
        scope: dict[str, gs.Tensor] = {}
        main = not outer and proto is self.model.graph
        _check_single_assignment(proto)
        self._values(proto, scope, main)
        inputs = [scope[i.name] for i in proto.input if not isinstance(scope[i.name], gs.Constant)]
        for node in proto.node:
            for name in filter(None, node.output):
                if name not in scope:
                    scope[name] = gs.Variable(self._fresh(name))
        fixed = self._constant_nodes(proto, scope)
        visible = {**outer, **scope}
        nodes = [self._node(node, visible) for index, node in enumerate(proto.node) if index not in fixed]
        outputs = [visible[o.name] if o.name in visible else self._dangling(o.name, visible) for o in proto.output]
        graph = gs.Graph(nodes, inputs, outputs, proto.name, proto.doc_string, self.opset)
        if main or proto.metadata_props or proto.quantization_annotation:
            kept = GraphProto(metadata_props=proto.metadata_props, quantization_annotation=proto.quantization_annotation)
            self.leftovers.graphs[id(graph)] = kept
        return graph

    def _constant_nodes(self, proto: GraphProto, scope: dict[str, gs.Tensor]) -> set[int]:
        """Constant nodes become initializers, so that passes meet weights in one form; except where one is a graph output."""
        outputs, fixed = {o.name for o in proto.output}, set()
        for index, node in enumerate(proto.node):
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output and node.output[0] not in outputs:
                value = _constant_tensor(node)
                if value is not None:
                    name = scope[node.output[0]].name
                    scope[node.output[0]] = gs.Constant(name, Weights(value, self.base_dir))
                    fixed.add(index)
        return fixed

    def _fresh(self, name: str) -> str:
        unique, number = name, 0
        while unique in self.taken:
            number += 1
            unique = f"{name}_{number}"
        self.taken.add(unique)
        return unique

    def _dangling(self, name: str, visible: dict[str, gs.Tensor]) -> gs.Tensor:
        visible[name] = gs.Variable(self._fresh(name))
        return visible[name]

    def _values(self, proto: GraphProto, scope: dict[str, gs.Tensor], main: bool) -> None:
        declared = {i.name for i in proto.input}
        for info in (*proto.input, *proto.output, *proto.value_info):
            if info.name and info.name not in scope:
                scope[info.name] = self._variable(info)
                if main and (info.doc_string or info.metadata_props or info.type.denotation):
                    self.leftovers.infos[scope[info.name].name] = info
        for tensor in (*proto.initializer, *proto.sparse_initializer):
            name = (tensor.values if isinstance(tensor, onnx.SparseTensorProto) else tensor).name
            unique = scope[name].name if name in scope else self._fresh(name)
            overridable = main and name in declared and self.model.ir_version >= 4
            if overridable and isinstance(tensor, TensorProto):
                self.leftovers.defaults[unique] = tensor
            else:
                scope[name] = gs.Constant(unique, Weights(tensor, self.base_dir))

    def _variable(self, info: ValueInfoProto) -> gs.Variable:
        variable = gs.Variable(self._fresh(info.name))
        if info.type.HasField("tensor_type") and info.type.tensor_type.elem_type:
            tensor_type = info.type.tensor_type
            if tensor_type.elem_type not in helper.get_all_tensor_dtypes():
                raise ModelError(f"tensor '{info.name}': unknown data type {tensor_type.elem_type}")
            variable.dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor_type.elem_type))
            if tensor_type.HasField("shape"):
                variable.shape = [_dimension(d) for d in tensor_type.shape.dim]
        elif info.type.ByteSize() and not info.type.HasField("tensor_type"):
            self.leftovers.types[variable.name] = info.type
        return variable

    def _node(self, proto: NodeProto, visible: dict[str, gs.Tensor]) -> gs.Node:
        def tensor(name: str) -> gs.Tensor:
            if not name:
                return gs.Variable.empty()
            return visible[name] if name in visible else self._dangling(name, visible)

        name, number = proto.name or f"{proto.op_type}_{len(self.node_names)}", 0
        while name in self.node_names:
            number += 1
            name = f"{proto.name or proto.op_type}_{len(self.node_names) + number}"
        self.node_names.add(name)
        attributes = {a.name: self._attribute(a, visible) for a in proto.attribute}
        if len(attributes) < len(proto.attribute):
            raise ModelError(
                f"node '{name}' ({proto.op_type}) has an attribute twice: {', '.join(a.name for a in proto.attribute)}"
            )
        domain = None if proto.domain in ("", "ai.onnx") else proto.domain
        node = gs.Node(proto.op_type, name, attributes, [tensor(n) for n in proto.input], [tensor(n) for n in proto.output], domain)
        if proto.doc_string or proto.metadata_props or proto.overload:
            node.extra = NodeProto()
            node.extra.CopyFrom(proto)
            for held in ("op_type", "domain", "name", "input", "output", "attribute"):
                node.extra.ClearField(held)
        return node

    def _attribute(self, attribute: AttributeProto, visible: dict[str, gs.Tensor]) -> Any:
        """A Python value, gs.Constant or gs.Graph; an AttributeProto where there is no such thing."""
        kind = attribute.type
        if kind in _NUMBERED:
            return getattr(attribute, _NUMBERED[kind])
        if kind in _LISTS:
            return list(getattr(attribute, _LISTS[kind]))
        if kind == AttributeProto.GRAPH:
            return self.graph(attribute.g, visible)
        if kind == AttributeProto.TENSOR:
            return gs.Constant(attribute.t.name, Weights(attribute.t, self.base_dir))
        try:
            if kind == AttributeProto.STRING:
                return attribute.s.decode()
            if kind == AttributeProto.STRINGS and attribute.strings:
                return [s.decode() for s in attribute.strings]
        except UnicodeDecodeError:
            pass
        return attribute


def _check_single_assignment(proto: GraphProto) -> None:
    """Every name is given once: by one input, one initializer (which may be an input's default) or one node output."""
    texts: list[Any] = [t for n in proto.node for t in (n.op_type, n.name, n.domain, *n.input, *(a.name for a in n.attribute))]
    for name in (*texts, *(o.name for o in proto.output), *(i.name for i in proto.value_info)):
        if isinstance(name, bytes):  # what protobuf gives where text is not UTF-8
            raise ModelError(f"the name {name!r} is not text; is the file complete?")
    writers: dict[str, str] = {}
    initializers = [*(t.name for t in proto.initializer), *(t.values.name for t in proto.sparse_initializer)]
    nodes = [(o, f"node '{n.name}' ({n.op_type})" if n.name else f"a {n.op_type} node") for n in proto.node for o in n.output if o]
    known = {*initializers} & {i.name for i in proto.input}
    given = [(i.name, "a graph input") for i in proto.input] + [(n, "an initializer") for n in initializers if n not in known]
    for name, writer in [*given, *nodes]:
        if not name or not isinstance(name, str):
            raise ModelError(f"{writer} has no name, or one that is not text: {name!r}")
        if name in writers:
            raise ModelError(f"tensor '{name}' is written twice: by {writers[name]} and by {writer}")
        writers[name] = writer


_CONSTANT_FORMS: dict[str, Callable[[AttributeProto], TensorProto | onnx.SparseTensorProto]] = {
    "value": lambda a: a.t,
    "sparse_value": lambda a: a.sparse_tensor,
    "value_float": lambda a: onnx.numpy_helper.from_array(np.array(a.f, np.float32)),
    "value_floats": lambda a: onnx.numpy_helper.from_array(np.array(a.floats, np.float32)),
    "value_int": lambda a: onnx.numpy_helper.from_array(np.array(a.i, np.int64)),
    "value_ints": lambda a: onnx.numpy_helper.from_array(np.array(a.ints, np.int64)),
    "value_string": lambda a: onnx.numpy_helper.from_array(np.array(a.s, object)),
    "value_strings": lambda a: onnx.numpy_helper.from_array(np.array(list(a.strings), object)),
}


def _constant_tensor(node: NodeProto) -> TensorProto | onnx.SparseTensorProto | None:
    """The value of a Constant node, in any of the forms the operator has (ONNX operator Constant)."""
    attribute = node.attribute[0] if len(node.attribute) == 1 else None
    if attribute is None or attribute.ref_attr_name or attribute.name not in _CONSTANT_FORMS:
        return None
    return _CONSTANT_FORMS[attribute.name](attribute)


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value") and dim.dim_value >= 0:
        return int(dim.dim_value)
    name: Any = dim.dim_param  # bytes where it is not text; some exporters write -1 for any size, and runtimes read it so
    return name if isinstance(name, str) and name else None


def subgraphs(node: gs.Node) -> list[gs.Graph]:
    """The graphs held by a node's attributes (bodies of If, Loop, Scan, SequenceMap)."""
    return [value for value in node.attrs.values() if isinstance(value, gs.Graph)]


def walk(graph: gs.Graph) -> Iterator[gs.Graph]:
    """The graph and all graphs nested in it, outer before inner."""
    stack = [graph]
    while stack:
        current = stack.pop()
        yield current
        for node in reversed(current.nodes):
            stack.extend(reversed(subgraphs(node)))


def owners(graph: gs.Graph) -> dict[int, list[gs.Constant]]:
    """id(graph) -> the constants it must hold: each in the innermost graph that encloses all its uses."""
    paths: dict[int, tuple[gs.Constant, tuple[int, ...]]] = {}

    def see(tensors: Iterable[gs.Tensor], path: tuple[int, ...], *, here: bool = False) -> None:
        for tensor in tensors:
            if isinstance(tensor, gs.Constant):
                _, known = paths.get(id(tensor), (tensor, path))
                common = next((i for i, (a, b) in enumerate(zip(known, path, strict=False)) if a != b), min(len(known), len(path)))
                paths[id(tensor)] = (tensor, path if here else known[:common])

    stack: list[tuple[gs.Graph, tuple[int, ...]]] = [(graph, (id(graph),))]
    while stack:
        current, path = stack.pop()
        for node in current.nodes:
            see(node.inputs, path)
            stack.extend((g, (*path, id(g))) for g in subgraphs(node))
        see(current.outputs, path)
    held: dict[int, list[gs.Constant]] = {}
    for constant, path in paths.values():
        held.setdefault(path[-1], []).append(constant)
    return held


class Exporter:
    """Writes one gs.Graph; `encode` turns a constant into a TensorProto, or None to make it a graph input (a skeleton)."""

    def __init__(self, main: gs.Graph, leftovers: Leftovers, encode: Encode) -> None:
        self.leftovers, self.encode = leftovers, encode
        self.held = owners(main)
        self.hoisted: list[ValueInfoProto] = []
        self.imports: dict[str, int] = {}

    def graph(self, graph: gs.Graph, *, main: bool = True) -> GraphProto:
        kept = self.leftovers.graphs.get(id(graph))
        proto = GraphProto(name=graph.name, doc_string=graph.doc_string)
        if kept is not None:
            proto.MergeFrom(kept)
        proto.node.extend([self.node(n) for n in graph.nodes])
        proto.input.extend([self.info(t) for t in graph.inputs])
        proto.output.extend([self.info(t) for t in graph.outputs])
        proto.initializer.extend(
            [self.leftovers.defaults[t.name] for t in graph.inputs if main and t.name in self.leftovers.defaults]
        )
        for constant in self.held.get(id(graph), []):
            tensor = self.encode(constant)
            if tensor is None:
                self.hoisted.append(self.info(constant))
            else:
                proto.initializer.append(tensor)
        written = {t.name for t in (*graph.inputs, *graph.outputs)}
        for node in graph.nodes:
            for t in node.outputs:
                if t.name and t.name not in written and (t.dtype is not None or t.name in self.leftovers.types):
                    written.add(t.name)
                    proto.value_info.append(self.info(t))
        if main:
            proto.input.extend(self.hoisted)
        return proto

    def info(self, tensor: gs.Tensor) -> ValueInfoProto:
        known = self.leftovers.infos.get(tensor.name)
        info = ValueInfoProto(name=tensor.name)
        if known is not None:
            info.CopyFrom(known)
        if tensor.name in self.leftovers.types:
            info.type.CopyFrom(self.leftovers.types[tensor.name])
        elif tensor.dtype is not None:
            shape = None if tensor.shape is None else [_plain(d) for d in tensor.shape]
            made = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), shape)
            if info.type.denotation:
                made.denotation = info.type.denotation
            info.type.CopyFrom(made)
        return info

    def node(self, node: gs.Node) -> NodeProto:
        proto = NodeProto(op_type=node.op, name=node.name, domain=node.domain or "")
        proto.input.extend([t.name for t in node.inputs])
        proto.output.extend([t.name for t in node.outputs])
        proto.attribute.extend([self.attribute(node, name, value) for name, value in node.attrs.items()])
        extra = getattr(node, "extra", None)
        if extra is not None:
            proto.MergeFrom(extra)
        return proto

    def attribute(self, node: gs.Node, name: str, value: Any) -> AttributeProto:
        if isinstance(value, AttributeProto):
            return value
        if isinstance(value, gs.Graph):
            return AttributeProto(name=name, type=AttributeProto.GRAPH, g=self.graph(value, main=False))
        if isinstance(value, gs.Constant):
            return AttributeProto(name=name, type=AttributeProto.TENSOR, t=encode_inline(value))
        if isinstance(value, list | tuple) and not value:  # an empty list does not tell its type, the schema does
            return AttributeProto(name=name, type=_schema_type(node, name, AttributeProto.INTS))
        if isinstance(value, int | np.integer) and _schema_type(node, name, AttributeProto.INT) == AttributeProto.FLOAT:
            value = float(value)
        return helper.make_attribute(name, value)


def _plain(dim: Any) -> int | str | None:
    return dim if dim is None or isinstance(dim, str) else int(dim)


def _schema_type(node: gs.Node, name: str, default: AttributeProto.AttributeType) -> AttributeProto.AttributeType:
    try:
        kind = int(cast(Any, onnx.defs.get_schema(node.op, domain=node.domain or "").attributes[name].type))
        return cast("AttributeProto.AttributeType", kind)
    except (onnx.defs.SchemaError, KeyError):
        return default


def encode_inline(constant: gs.Constant) -> TensorProto:
    """The whole tensor as protobuf; one that was never read is passed on as it came."""
    values = constant._values
    if isinstance(values, Weights):
        if isinstance(values.tensor, onnx.SparseTensorProto) or values.tensor.data_location == TensorProto.EXTERNAL:
            return onnx.numpy_helper.from_array(values.load(), constant.name)
        if values.tensor.name == constant.name:
            return values.tensor
        renamed = TensorProto()
        renamed.CopyFrom(values.tensor)  # the proto may be the caller's: never write into it
        renamed.name = constant.name
        return renamed
    return onnx.numpy_helper.from_array(np.asarray(constant.values), constant.name)
