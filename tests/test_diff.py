"""What differs between two models, and the text of a graph."""

from __future__ import annotations

import onnx.parser

from graphopt.attributes import attribute, op_key
from graphopt.diff import Diff, diff
from graphopt.model import Model, from_proto
from graphopt.text import node_text, text

BODY = "m (float[N,2] x) => (float[N,2] y) <float[2] w = {1.0, 2.0}> { a = Add(x, w)  b = Relu(a)  y = Softmax<axis=1>(b) }"


def model(body: str = BODY) -> Model:
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17, "own" : 1]> {body}'))


def test_a_model_does_not_differ_from_itself() -> None:
    found = diff(model(), model())
    assert not found
    assert found == Diff((), (), (), (), ())


def test_nodes_by_their_first_output() -> None:
    found = diff(model(), model(BODY.replace("b = Relu(a)  y = Softmax<axis=1>(b)", "c = Tanh(a)  y = Softmax<axis=0>(c)")))
    assert found.added == ("c = Tanh(a)",)
    assert found.removed == ("b = Relu(a)",)
    assert found.changed == (("y = Softmax(b) {axis=1}", "y = Softmax(c) {axis=0}"),)
    assert found


def test_shapes() -> None:
    found = diff(model(), model(BODY.replace("float[N,2] x", "float[3,2] x")))
    assert ("x", "[N, 2]", "[3, 2]") in found.shapes
    assert ("a", "[N, 2]", "[3, 2]") in found.shapes
    assert not found.initializers


def test_initializers() -> None:
    assert diff(model(), model(BODY.replace("{1.0, 2.0}", "{1.0, 2.5}"))).initializers == (
        ("w", "float32[2]", "float32[2] with other values"),
    )
    renamed = diff(model(), model(BODY.replace("w =", "v =").replace("x, w", "x, v")))
    assert renamed.initializers == (("w", "float32[2]", "-"), ("v", "-", "float32[2]"))
    wider = diff(model(), model(BODY.replace("float[2] w = {1.0, 2.0}", "float[1] w = {1.0}")))
    assert wider.initializers == (("w", "float32[2]", "float32[1]"),)


# ---- text


def test_text_of_a_graph() -> None:
    assert text(model()) == (
        "inputs: x: float32[N,2]\n"
        "a = Add(x, w: float32[2] [1.0, 2.0])\n"
        "b = Relu(a)\n"
        "y = Softmax(b) {axis=1}\n"
        "outputs: y: float32[N,2]\n"
    )


def test_text_of_unusual_nodes() -> None:
    shown = model(
        "m (float[2] x) => (float[2] y) <float[8] w = {1,2,3,4,5,6,7,8}> "
        '{ v, i = own.Op<kind="a", rate=0.5, sizes=[1,2], t = float[1] {3}>(x, , w)  , z = own.Two(v)  y = Add(v, z) }'
    )
    first, second, _ = (node_text(n) for n in shown.nodes())
    assert first == "v, i = own::Op(x, _, w: float32[8]) {kind='a', rate=0.5, sizes=[1, 2], t=float32[1] [3.0]}"
    assert second == "_, z = own::Two(v)"


# ---- attributes


def test_attributes_have_the_defaults_of_the_models_opset() -> None:
    relu, softmax = model().nodes()[1], model().nodes()[2]
    assert attribute(softmax, "axis", 17) == 1
    del softmax.attrs["axis"]
    assert attribute(softmax, "axis", 17) == -1
    assert attribute(softmax, "axis", 12) == 1  # changed in opset 13
    assert attribute(relu, "axis", 17) is None
    assert op_key(relu) == "Relu"
    relu.domain = "own"
    assert op_key(relu) == "own::Relu"
    assert attribute(relu, "alpha", 17) is None
