"""Load, save and round trip: nothing is lost, nothing half-read is accepted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import emit
from graphopt.errors import ModelError
from graphopt.model import from_proto, load
from graphopt.text import text

IF = """<ir_version: 8, opset_import: ["" : 17]>
m (bool c, float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> {
    y = If (c) <
        then_branch = t () => (float[2] z) { k = Constant<value: tensor = float[2] {5, 6}>()  z = Add(x, k) },
        else_branch = e () => (float[2] z) { k = Constant<value: tensor = float[2] {7, 8}>()  u = Mul(x, k)  z = Add(u, w) }
    >
}"""


def run(proto: onnx.ModelProto, **feeds: np.ndarray) -> list[np.ndarray]:
    return list(ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds))


def test_subgraphs_keep_their_own_names_apart() -> None:
    proto = onnx.parser.parse_model(IF)
    model = from_proto(proto)
    model.verify()
    assert len({t for t in model.tensors()}) == len(model.tensors())
    for c in (True, False):
        feeds = {"c": np.array(c), "x": np.array([1, 2], np.float32)}
        np.testing.assert_array_equal(run(model.proto(), **feeds)[0], run(proto, **feeds)[0])


def test_text_shows_bodies() -> None:
    shown = text(from_proto(onnx.parser.parse_model(IF)))
    assert "then_branch:" in shown
    assert "z_1 = Add(u, w: float32[2] [1.0, 2.0])" in shown


def test_everything_that_graphsurgeon_drops_survives() -> None:
    node = helper.make_node("Custom", ["x"], ["y"], "n", "why it is here", "my.domain", empty=[1], kind="a")
    node.attribute[0].ClearField("ints")
    node.metadata_props.add(key="origin", value="test")
    node.attribute.append(helper.make_attribute("type", helper.make_tensor_type_proto(TensorProto.FLOAT, [1])))
    info = helper.make_tensor_value_info("x", TensorProto.BFLOAT16, ["n", None, 3], "the input")
    graph = helper.make_graph([node], "g", [info], [helper.make_tensor_value_info("y", TensorProto.INT4, None)], doc_string="doc")
    graph.metadata_props.add(key="k", value="v")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("my.domain", 3)])
    proto.metadata_props.add(key="author", value="someone")
    proto.producer_name = "p"
    back = from_proto(proto).proto()
    assert str(back) == str(proto)


def test_a_renamed_weight_leaves_the_callers_proto_alone() -> None:
    proto = onnx.parser.parse_model(IF)
    before = proto.SerializeToString(deterministic=True)
    from_proto(proto).proto()
    assert proto.SerializeToString(deterministic=True) == before


def test_constant_nodes_become_initializers() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[2] x) => (float[2] y) {'
        " a = Constant<value_floats = [1.0, 2.0]>() b = Constant<value_float = 3.0>() u = Add(x, a) y = Mul(u, b) }"
    )
    model = from_proto(proto)
    assert [n.op for n in model.nodes()] == ["Add", "Mul"]
    np.testing.assert_array_equal(run(model.proto(), x=np.array([1, 1], np.float32))[0], [6, 9])


def test_functions_are_inlined() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1]> m (float[2] x) => (float[2] y) { y = local.twice(x) }'
        '<domain: "local", opset_import: ["" : 17]> twice (a) => (b) { b = Add(a, a) }'
    )
    model = from_proto(proto)
    assert [n.op for n in model.nodes()] == ["Add"]
    assert not model.proto().functions


def test_reversed_long_chain_is_sorted_without_recursion() -> None:
    count = 3000
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"]) for i in range(count)]
    ends = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("t0", f"t{count}"))
    first, last = ends
    model = from_proto(helper.make_model(helper.make_graph(nodes[::-1], "g", [first], [last])))
    assert model.graph.nodes[0].inputs[0].name == "t0"
    model.verify()


def test_a_cycle_is_named() -> None:
    nodes = [helper.make_node("Add", ["x", "b"], ["a"], "first"), helper.make_node("Relu", ["a"], ["b"], "second")]
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("x", "b")]
    with pytest.raises(ModelError, match=r"cycle: (first -> second|second -> first)"):
        from_proto(helper.make_model(helper.make_graph(nodes, "g", infos[:1], infos[1:])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.opset_import[0].__setattr__("version", 5), "opset 5 is too old"),
        (lambda p: p.opset_import[0].__setattr__("version", 999), "opset 999 is newer"),
        (lambda p: p.ClearField("graph"), "has no graph"),
        (lambda p: p.graph.node[0].input.__setitem__(0, "ghost"), "'ghost' is produced by no node"),
        (lambda p: p.graph.initializer[0].__setattr__("data_type", 99), "unknown data type 99"),
    ],
)
def test_broken_models_are_refused(change: object, message: str) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[2] x) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }'
    )
    change(proto)  # type: ignore[operator]
    with pytest.raises(ModelError, match=message):
        from_proto(proto)


def external_model(folder: Path, location: str = "w.bin", offset: int = 0, length: int = 4096 * 4) -> Path:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4096], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4096]) for n in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [tensor])
    path = folder / "m.onnx"
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return path


def test_external_weights_are_lazy_and_saved_both_ways(tmp_path: Path) -> None:
    values = np.arange(4096, dtype=np.float32)
    values.tofile(tmp_path / "w.bin")
    model = load(external_model(tmp_path))
    assert not isinstance(model.constants()[0]._values, np.ndarray)  # not read by loading
    inline, out = tmp_path / "inline.onnx", tmp_path / "sub.onnx"
    emit.save(model, inline)
    assert emit.save(model, out, external=True) == [out, tmp_path / "sub.onnx.data"]
    for path in (inline, out):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(session.run(None, {"x": np.zeros(4096, np.float32)})[0], values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"location": "../w.bin"}, "outside the model's folder"),
        ({"location": "gone.bin"}, "'gone.bin' is missing"),
        ({"offset": 8}, "do not hold shape"),
        ({"length": 16}, "do not hold shape"),
        ({"offset": -8}, "do not hold shape"),
    ],
)
def test_external_data_never_reads_outside_its_file(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, tmp_path):
        np.zeros(4096, np.float32).tofile(place / "w.bin")
    with pytest.raises(ModelError, match=message):
        load(external_model(folder, **arguments))  # type: ignore[arg-type]


def test_saving_is_atomic_and_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = from_proto(onnx.parser.parse_model(IF))
    path = tmp_path / "out.onnx"
    emit.save(model, path)
    content = path.read_bytes()
    with pytest.raises(ModelError, match="exists; give --overwrite"):
        emit.save(model, path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ModelError, match="No space left on device; nothing was written"):
        emit.save(model, path, overwrite=True)
    assert path.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["out.onnx"]


def test_overridable_inputs_stay_inputs_with_their_defaults() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> m (float[2] x, float[2] w) => (float[2] y) { y = Add(x, w) }'
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float32), "w"))
    model = from_proto(proto)
    assert "overridable" in model.notes[0]
    back = model.proto()
    np.testing.assert_array_equal(run(back, x=np.array([0, 0], np.float32))[0], [1, 2])
    np.testing.assert_array_equal(run(back, x=np.array([0, 0], np.float32), w=np.array([5, 5], np.float32))[0], [5, 5])
