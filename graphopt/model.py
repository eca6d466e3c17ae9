"""The model: a gs.Graph plus what onnx-graphsurgeon lacks (order, text, checks, lossless load and save)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.edit import Wiring
from graphopt.errors import ModelError
from graphopt.proto import Exporter, Importer, Leftovers, Weights, encode_inline, walk

SMALL = 1024  # constants up to this many elements stay in a skeleton: shape inference reads their values
MIN_OPSET = 7
OWN = "graphopt"  # domain of the functions that stay functions: graphopt's library runs their nodes
UNKNOWN = "graphopt.unknown"  # domain that stands, in checks, for the default one where ONNX has no such operator


@dataclass(eq=False)
class Model:
    """An ONNX model being transformed.

    `graph` is the storage; passes edit it in place. Weights are lazy: `constant.values` reads them, and must never be written into
    (assign a new array instead). Nodes have unique names and tensors have names unique over all subgraphs.
    """

    graph: gs.Graph
    shell: onnx.ModelProto  # the model without its graph: versions, producer, metadata, imports
    leftovers: Leftovers
    path: Path | None = None
    strict: bool = False  # the model passed onnx's full check when it was loaded, so every later state must
    notes: list[str] = field(default_factory=list)  # what loading found worth telling the user

    @property
    def opset(self) -> int:
        """Version of the default domain; 0 where the model does not import it."""
        return next((o.version for o in self.shell.opset_import if o.domain in ("", "ai.onnx")), 0)

    def graphs(self) -> list[gs.Graph]:
        """The main graph and every subgraph, outer before inner."""
        return list(walk(self.graph))

    def nodes(self) -> list[gs.Node]:
        """All nodes, those of subgraphs too."""
        return [n for g in walk(self.graph) for n in g.nodes]

    def tensors(self) -> dict[str, gs.Tensor]:
        """Every named tensor of every graph, by name, in order of first appearance."""
        found: dict[str, gs.Tensor] = {}
        for graph in walk(self.graph):
            lists = [graph.inputs, *(x for n in graph.nodes for x in (n.inputs, n.outputs)), graph.outputs]
            for tensors in lists:
                for tensor in tensors:
                    if tensor.name and tensor.name not in found:
                        found[tensor.name] = tensor
        return found

    def constants(self) -> list[gs.Constant]:
        """Every initializer, once."""
        return [t for t in self.tensors().values() if isinstance(t, gs.Constant)]

    def wiring(self) -> Wiring:
        """Graph outputs and the graph of each node, as `graphopt.edit` needs them."""
        graphs = self.graphs()
        outputs = frozenset(id(t) for g in graphs for t in g.outputs)
        return Wiring(outputs, {id(n): id(g) for g in graphs for n in g.nodes})

    def proto(self) -> onnx.ModelProto:
        """The whole model as protobuf, weights inside. Raises ModelError above protobuf's 2 GB: save to a path instead."""
        if self.weight_bytes() > onnx.checker.MAXIMUM_PROTOBUF:
            raise ModelError("the model is over 2 GB and cannot be one protobuf: save it to a path (weights go to a .data file)")
        return self.encoded(encode_inline)

    def skeleton(self) -> onnx.ModelProto:
        """The model with its large constants as graph inputs: small enough to check and infer shapes on, whatever its size."""

        def encode(constant: gs.Constant) -> onnx.TensorProto | None:
            sparse = isinstance(constant._values, Weights) and isinstance(constant._values.tensor, onnx.SparseTensorProto)
            return encode_inline(constant) if not sparse and np.prod(constant.shape, dtype=np.int64) <= SMALL else None

        return self.encoded(encode)

    def interface(self) -> onnx.ModelProto:
        """Only the inputs that a caller must feed and the outputs: no nodes, no weights."""
        exporter = Exporter(gs.Graph([], [], []), self.leftovers, encode_inline)
        fed = [t for t in self.graph.inputs if t.name not in self.leftovers.defaults]
        graph = onnx.GraphProto(input=[exporter.info(t) for t in fed], output=[exporter.info(t) for t in self.graph.outputs])
        return onnx.ModelProto(graph=graph)

    def encoded(self, encode: Any) -> onnx.ModelProto:
        """The model as protobuf with each constant as `encode` gives it (see `proto.Exporter`)."""
        exporter = Exporter(self.graph, self.leftovers, encode)
        proto = onnx.ModelProto()
        proto.CopyFrom(self.shell)
        proto.graph.CopyFrom(exporter.graph(self.graph))
        known = {o.domain for o in proto.opset_import}
        for domain in dict.fromkeys(n.domain for n in self.nodes() if n.domain):
            if domain not in known:
                proto.opset_import.add(domain=domain, version=1)
        return proto

    def weight_bytes(self) -> int:
        """Bytes of all constants, without reading them."""
        return sum(int(np.prod(c.shape, dtype=np.int64)) * np.dtype(c.dtype).itemsize for c in self.constants())

    def sort(self) -> None:
        """Order the nodes of every graph topologically: stable (kept where already sorted) and without recursion."""
        for graph in walk(self.graph):
            _sort(graph)

    def verify(self) -> None:
        """Raise ModelError unless names are unique, inputs produced before use, and onnx's checker and shape inference agree."""
        self._verify_structure()
        problem = _problem(self, full=self.strict)
        if problem:
            raise ModelError(f"the model is not valid ONNX: {problem}")

    def _verify_structure(self) -> None:
        written: dict[str, str] = {}
        for graph in walk(self.graph):
            for tensor in graph.inputs:
                written[tensor.name] = "the graph's inputs"
            for node in graph.nodes:
                for tensor in node.outputs:
                    if tensor.name and written.setdefault(tensor.name, node.name) != node.name:
                        raise ModelError(f"tensor '{tensor.name}' is written by both '{written[tensor.name]}' and '{node.name}'")
        for graph in walk(self.graph):
            users = [(f"node '{n.name}' ({n.op})", n.inputs) for n in graph.nodes]
            for who, tensors in [*users, ("the graph's outputs", graph.outputs)]:
                for tensor in tensors:
                    if tensor.name and not isinstance(tensor, gs.Constant) and tensor.name not in written:
                        raise ModelError(f"{who}: '{tensor.name}' is produced by no node, input or initializer")


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 400 else text[:400] + " ..."


def _sort(graph: gs.Graph) -> None:
    """Kahn's order by original position (networkx); captured tensors of bodies count as inputs of their node."""
    position = {id(t): i for i, n in enumerate(graph.nodes) for t in n.outputs if t.name}
    edges = [(position[id(t)], i) for i, n in enumerate(graph.nodes) for t in _reads(n) if id(t) in position]
    if all(a < b for a, b in edges):
        return
    order = nx.DiGraph()
    order.add_nodes_from(range(len(graph.nodes)))
    order.add_edges_from(edges)
    try:
        indices = list(nx.lexicographical_topological_sort(order))
    except nx.NetworkXUnfeasible as error:
        cycle = " -> ".join(graph.nodes[a].name for a, *_ in nx.find_cycle(order))
        raise ModelError(f"the graph has a cycle: {cycle}") from error
    graph.nodes = [graph.nodes[i] for i in indices]


def _reads(node: gs.Node) -> list[gs.Tensor]:
    inner = (v for v in node.attrs.values() if isinstance(v, gs.Graph))
    return [*node.inputs, *(t for g in inner for body in walk(g) for n in body.nodes for t in (*n.inputs, *body.outputs))]


def from_proto(proto: onnx.ModelProto, *, path: Path | None = None) -> Model:
    """Import a ModelProto; raises ModelError with one line on anything broken."""
    try:
        return _imported(proto, path)
    except UnicodeDecodeError as error:  # protobuf looks at text when it is read or written
        raise ModelError(f"text in the model is not UTF-8 ({error}); is the file complete?") from error


def _imported(proto: onnx.ModelProto, path: Path | None) -> Model:
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), MIN_OPSET)
    if not proto.HasField("graph") or proto.ir_version < 1:
        raise ModelError("not an ONNX model: it has no graph or no IR version; is the file complete?")
    if not proto.graph.output:
        raise ModelError("the graph has no outputs; is the file complete?")
    if opset > onnx.defs.onnx_opset_version():
        raise ModelError(f"opset {opset} is newer than the installed onnx knows ({onnx.defs.onnx_opset_version()}): upgrade onnx")
    if opset < MIN_OPSET:
        raise ModelError(f"opset {opset} is too old: graphopt reads {MIN_OPSET} and later; convert with onnx.version_converter")
    functions = [f for f in proto.functions if f.domain == OWN]
    if proto.functions:
        proto = _inline(proto)
    importer = Importer(proto, path.parent if path else None)
    graph = importer.graph(proto.graph, {})
    shell = onnx.ModelProto()
    shell.CopyFrom(_without_graph(proto))
    shell.functions.extend(functions)
    shell.ir_version = max(shell.ir_version, 4)  # initializers need not be inputs (ONNX IR spec, version 4)
    for entry in shell.opset_import:
        entry.domain = "" if entry.domain == "ai.onnx" else entry.domain
    model = Model(graph, shell, importer.leftovers, path)
    if importer.leftovers.defaults:
        names = ", ".join(list(importer.leftovers.defaults)[:3])
        model.notes.append(
            f"{len(importer.leftovers.defaults)} inputs have overridable defaults ({names} ...) and are not constants: "
            "run freeze-inputs first to optimise them"
        )
    model.sort()
    model._verify_structure()
    _check(model)
    return model


def _without_graph(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A shallow copy of all fields but the graph and the (inlined) functions; the graph may be gigabytes."""
    shell = onnx.ModelProto()
    for field_, value in proto.ListFields():
        if field_.name in ("graph", "functions"):
            continue
        if hasattr(value, "add"):
            getattr(shell, field_.name).extend(value)
        elif hasattr(value, "CopyFrom"):
            getattr(shell, field_.name).CopyFrom(value)
        else:
            setattr(shell, field_.name, value)
    return shell


def _inline(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Functions become their nodes, all but graphopt's own."""
    import onnx.inliner

    if any(f.domain == OWN for f in proto.functions):
        others = [f for f in proto.functions if f.domain != OWN]
        if not others:
            return proto
        graph, proto = proto.graph, _without_graph(proto)
        proto.graph.CopyFrom(graph)
        proto.functions.extend(others)
    try:
        return onnx.inliner.inline_local_functions(proto, convert_version=True)
    except Exception as error:  # the C++ inliner raises bare RuntimeErrors
        raise ModelError(f"its local functions cannot be inlined: {_first_lines(error)}") from error


def _check(model: Model) -> None:
    """ONNX's full check decides how strictly later states are judged; what fails even its plain check is refused."""
    problem = _problem(model, full=True)
    model.strict = not problem
    if problem:
        plain = _problem(model, full=False)
        if plain:
            raise ModelError(f"the model is not valid ONNX: {plain}")
        model.notes.append(f"onnx's full check rejects the model as given: {problem}")
    unknown = sorted({n.op for n in model.nodes() if not n.domain and not onnx.defs.has(n.op)})
    if unknown:
        model.notes.append(f"not operators of ONNX, and carried through untouched: {', '.join(unknown)}")


def _problem(model: Model, *, full: bool) -> str:
    """What onnx's checker (and shape inference) has against the model; '' for nothing."""
    skeleton = model.skeleton()
    if _disguise(skeleton.graph):
        skeleton.opset_import.add(domain=UNKNOWN, version=1)
    for info in () if full else (*skeleton.graph.input, *skeleton.graph.output):
        tensor = info.type.tensor_type  # the plain check wants types and shapes, but does not look at them; runtimes infer them
        if info.type.WhichOneof("value") in (None, "tensor_type") and not (tensor.elem_type and tensor.HasField("shape")):
            tensor.elem_type = onnx.TensorProto.FLOAT
            tensor.shape.SetInParent()
    try:
        onnx.checker.check_model(skeleton, full_check=full)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError, RuntimeError) as error:
        return _first_lines(error)
    return ""


def _disguise(graph: onnx.GraphProto) -> bool:
    """Give operators that ONNX does not know (experimental ones of old) a domain of their own: the checker lets such be."""
    found = False
    for node in graph.node:
        if node.op_type and not node.domain and not onnx.defs.has(node.op_type):
            node.domain, found = UNKNOWN, True
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found = _disguise(attribute.g) or found
    return found


def load(source: str | Path | onnx.ModelProto | Model) -> Model:
    """Load a model from a path (weights stay on disk until used) or a ModelProto. Raises ModelError."""
    if isinstance(source, Model):
        return source
    if isinstance(source, onnx.ModelProto):
        return from_proto(source)
    path = Path(source)
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError as error:
        raise ModelError(f"no such file: {path}") from error
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # protobuf raises its own DecodeError, which differs between its implementations
        raise ModelError(f"{path} is not an ONNX model or is truncated: {_first_lines(error)}") from error
    try:
        return from_proto(proto, path=path)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
