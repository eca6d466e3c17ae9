"""A small model, and everything that can be wrong with one: label -> (how it is broken, what the error must say)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx.parser
from onnx import ModelProto, TensorProto, helper, numpy_helper

_TEXT = """<ir_version: 8, opset_import: ["" : 17]>
small (float[N,3,8,8] x) => (float[N,4] y) {
    [conv] c = Conv<pads=[1,1,1,1]>(x, w, b)  [norm] n = BatchNormalization(c, s, b, m, v)  [relu] r = Relu(n)
    [pool] p = GlobalAveragePool(r)  [flat] q = Flatten(p)  [gemm] y = Gemm<transB=1>(q, f)
}"""
WEIGHTS = {"w": (8, 3, 3, 3), "b": (8,), "s": (8,), "m": (8,), "v": (8,), "f": (4, 8)}
Change = Callable[[ModelProto], object]


def good() -> ModelProto:
    """Valid, and runs."""
    proto, random = onnx.parser.parse_model(_TEXT), np.random.default_rng(0)
    for name, shape in WEIGHTS.items():
        proto.graph.initializer.append(numpy_helper.from_array(0.1 + random.random(shape).astype(np.float32), name))
    return proto


def weight(proto: ModelProto, name: str = "w") -> TensorProto:
    found: TensorProto = next(t for t in proto.graph.initializer if t.name == name)
    return found


def _external(proto: ModelProto, **entries: object) -> None:
    tensor = weight(proto)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", **entries}.items():
        tensor.external_data.add(key=key, value=str(value))


def _dims(proto: ModelProto, *dims: int) -> None:
    weight(proto).dims[:] = dims


def _field(proto: ModelProto, field: str, count: int) -> None:
    weight(proto).ClearField("raw_data")
    getattr(weight(proto), field).extend([1] * count)


def _set(index: int, **fields: str) -> Change:
    """Set op_type, or the first input or output, of a node."""

    def change(proto: ModelProto) -> None:
        for key, value in fields.items():
            if key == "op_type":
                proto.graph.node[index].op_type = value
            else:
                getattr(proto.graph.node[index], key)[0] = value

    return change


def _attribute(name: str, value: object) -> Change:
    def change(proto: ModelProto) -> None:
        kept = [a for a in proto.graph.node[0].attribute if a.name != name]
        del proto.graph.node[0].attribute[:]
        proto.graph.node[0].attribute.extend([*kept, helper.make_attribute(name, value)])

    return change


BROKEN: dict[str, tuple[Change, str]] = {
    "no graph": (lambda p: p.ClearField("graph"), "it has no graph or no IR version; is the file complete?"),
    "no IR version": (lambda p: p.ClearField("ir_version"), "it has no graph or no IR version; is the file complete?"),
    "IR too new": (lambda p: p.__setattr__("ir_version", 999), "ir_version 999 is higher than the checker's"),
    "opset too old": (lambda p: p.opset_import[0].__setattr__("version", 3), "opset 3 is too old: graphopt reads 7 and later"),
    "opset zero": (lambda p: p.opset_import[0].__setattr__("version", 0), "opset 0 is too old"),
    "opset too new": (lambda p: p.opset_import[0].__setattr__("version", 999), "opset 999 is newer than the installed onnx knows"),
    "no opset import": (lambda p: p.ClearField("opset_import"), "must specify opset_import"),
    "no outputs": (lambda p: p.graph.ClearField("output"), "the graph has no outputs"),
    "no nodes": (lambda p: p.graph.ClearField("node"), "the graph's outputs: 'y' is produced by no node, input or initializer"),
    "no inputs": (lambda p: p.graph.ClearField("input"), "node 'conv' (Conv): 'x' is produced by no node, input or initializer"),
    "nobody's tensor": (_set(2, input="ghost"), "node 'relu' (Relu): 'ghost' is produced by no node"),
    "cycle": (_set(0, input="r"), "the graph has a cycle: conv -> norm -> relu"),
    "own input": (_set(2, input="r"), "the graph has a cycle: relu"),
    "tensor written twice": (_set(2, output="c"), "'c' is written twice: by node 'conv' (Conv) and by node 'relu' (Relu)"),
    "input written": (_set(2, output="x"), "'x' is written twice: by a graph input and by node 'relu' (Relu)"),
    "initializer written": (_set(2, output="w"), "'w' is written twice: by an initializer and by node 'relu' (Relu)"),
    "initializer twice": (lambda p: p.graph.initializer.append(weight(p)), "'w' is written twice"),
    "input twice": (lambda p: p.graph.input.append(p.graph.input[0]), "'x' is written twice"),
    "input without name": (lambda p: p.graph.input[0].__setattr__("name", ""), "a graph input has no name"),
    "input type": (lambda p: p.graph.input[0].type.tensor_type.__setattr__("elem_type", 77), "tensor 'x': unknown data type 77"),
    "weight type": (lambda p: weight(p).__setattr__("data_type", 77), "initializer 'w': unknown data type 77"),
    "weight of a wider type": (
        lambda p: weight(p).__setattr__("data_type", TensorProto.DOUBLE),
        "initializer 'w': shape [8, 3, 3, 3] needs 1728 bytes, found 864; is the file complete?",
    ),
    "weight of strings": (
        lambda p: weight(p).__setattr__("data_type", TensorProto.STRING),
        "'w': shape [8, 3, 3, 3] needs 216 values in string_data, found 0",
    ),
    "weight too short": (lambda p: weight(p).__setattr__("raw_data", b"1234" * 215), "needs 864 bytes, found 860"),
    "weight too long": (lambda p: weight(p).__setattr__("raw_data", b"1234" * 217), "needs 864 bytes, found 868"),
    "weight without data": (lambda p: weight(p).ClearField("raw_data"), "needs 216 values in float_data, found 0"),
    "weight in another field": (lambda p: _field(p, "int32_data", 216), "needs 216 values in float_data, found 0"),
    "weight in two fields": (
        lambda p: weight(p).float_data.extend([1]),
        "should contain one and only one value field",
    ),
    "negative size": (lambda p: _dims(p, -8, 3, 3, 3), "initializer 'w': shape [-8, 3, 3, 3] has a negative size"),
    "huge size": (lambda p: _dims(p, 2**62, 3, 3, 3), "shape [4611686018427387904, 3, 3, 3] needs"),
    "size that overflows to the right one": (lambda p: _dims(p, 2**62, 4, 3, 8), "needs 1770887431076116955136 bytes, found 864"),
    "external file missing": (
        lambda p: _external(p, location="gone.bin"),
        "external file 'gone.bin' is missing; put it beside",
    ),
    "external offset": (lambda p: _external(p, offset=10**9), "at offset 1000000000 of 'w.bin' (864 bytes) do not hold shape"),
    "external negative offset": (lambda p: _external(p, offset=-4), "at offset -4 of 'w.bin'"),
    "external offset no number": (lambda p: _external(p, offset="x"), "'w': external offset or length is not a number"),
    "external length": (lambda p: _external(p, length=12), "12 bytes at offset 0 of 'w.bin' (864 bytes) do not hold shape"),
    "external path out": (lambda p: _external(p, location="../w.bin"), "external file '../w.bin' lies outside the model's folder"),
    "external absolute": (lambda p: _external(p, location="/etc/hostname"), "'/etc/hostname' lies outside the model's folder"),
    "external no name": (lambda p: _external(p, location=""), "'w': its external data name no file"),
    "external NUL": (lambda p: _external(p, location="a\0b"), "'w': its external data name no file"),
    "external folder": (lambda p: _external(p, location="."), "external file '.' is missing"),
    "node without op": (_set(2, op_type=""), "Field 'op_type' of 'node' is required to be non-empty"),
    "too many inputs": (lambda p: p.graph.node[2].input.append("c"), "Node(relu) with schema(::Relu:14) has input size 2"),
    "too few inputs": (lambda p: p.graph.node[0].ClearField("input"), "Node(conv) with schema(::Conv:11) has input size 0"),
    "attribute of another type": (_attribute("pads", "abc"), "Mismatched attribute type in 'conv : pads'"),
    "attribute twice": (
        lambda p: p.graph.node[0].attribute.append(p.graph.node[0].attribute[0]),
        "node 'conv' (Conv) has an attribute twice: pads, pads",
    ),
    "unknown attribute": (_attribute("colour", 1), "Unrecognized attribute: colour for operator Conv"),
}
