"""What `inspect` says of small models."""

from __future__ import annotations

import json

import numpy as np
import onnx.parser
import pytest

from graphopt.inspect import Inspection, inspect
from graphopt.model import from_proto
from graphopt.shapes import shapes


def look(text: str, *, denormals: bool = False) -> Inspection:
    model = from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "com.microsoft": 1]> {text}'))
    return inspect(model, shapes(model), denormals=denormals)


PLAIN = """g (float[N,2] x) => (float[N,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {1, 2}> {
    a = MatMul(x, w)  c = Add(a, b)  y = Relu(c)
}"""


def test_a_plain_model() -> None:
    seen = look(PLAIN)
    assert (seen.opset, seen.domains) == (17, {"com.microsoft": 1})
    assert seen.ops == {"MatMul": 1, "Add": 1, "Relu": 1}
    assert (seen.parameters, seen.weight_bytes, seen.macs) == (6, 24, 4)
    assert seen.inputs[0].shape == ("N", 2)
    assert seen.dynamic_axes == ("x[0] (N)",)
    assert seen.weights["float32"].tensors == 2
    assert seen.verdict == "not quantised"
    assert seen.denormals is None


def test_it_is_json_and_rows() -> None:
    seen = look(PLAIN, denormals=True)
    assert json.loads(json.dumps(seen.to_dict()))["weights"] == {"float32": {"tensors": 2, "elements": 6, "bytes": 24}}
    rows = dict(seen.rows())
    assert rows["MACs"] == "4, with x[N] = 1"
    assert rows["ops"] == "MatMul 1, Add 1, Relu 1"
    assert rows["input"] == "x  float32  N x 2"
    assert rows["denormals"] == "0 (0.00 % of the floating-point weights)"


QDQ = """g (float[1,2] x) => (float[1,2] y) <int8[2,2] w = {1, 2, 3, 4}, float s = {0.5}, uint8 z = {0}> {
    q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  v = DequantizeLinear(w, s)  y = MatMul(d, v)
}"""
INTEGER = "g (uint8[1,2] x) => (int32[1,2] y) <int8[2,2] w = {1, 2, 3, 4}> { y = MatMulInteger(x, w) }"
CAST = """g (float[1,2] x) => (float[1,2] y) <int8[2,2] w = {1, 2, 3, 4}, float[2] s = {1, 1}> {
    f = Cast<to=1>(w)  v = Mul(f, s)  y = MatMul(x, v)
}"""
MICROSOFT = "g (float[1,2] x, uint8[2,1,1] w, float[2] s) => (float[1,2] y) { y = com.microsoft.MatMulNBits<K=2,N=2>(x, w, s) }"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QDQ, {"QDQ nodes": 3, "int8 weights behind DequantizeLinear": 1}),
        (INTEGER, {"MatMulInteger nodes": 1, "int8 weights": 1}),
        (CAST, {"int8 weights behind Cast": 1}),
        (MICROSOFT, {"com.microsoft::MatMulNBits nodes": 1}),
    ],
)
def test_quantised_models_are_recognised(text: str, expected: dict[str, int]) -> None:
    seen = look(text)
    assert seen.quantized == expected
    assert seen.verdict.startswith("already quantised: ")


def test_denormals_are_counted_where_they_are() -> None:
    model = from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {PLAIN}'))
    weight = next(c for c in model.constants() if c.name == "w")
    weight.values = np.array([[1e-40, 0.0], [1.0, -1e-41]], np.float32)
    seen = inspect(model, shapes(model), denormals=True)
    assert seen.denormals is not None
    assert (seen.denormals.elements, seen.denormals.of, seen.denormals.tensors) == (2, 6, (("w", 2),))


def test_subgraphs_are_looked_into() -> None:
    seen = look("""g (bool c, float[2] x) => (float[2] y) {
        y = If(c) <then_branch = t () => (float[2] u) { u = Relu(x) }, else_branch = e () => (float[2] v) { v = Neg(x) }>
    }""")
    assert seen.ops == {"If": 1, "Relu": 1, "Neg": 1}
    assert seen.subgraphs == {"If": 2}
