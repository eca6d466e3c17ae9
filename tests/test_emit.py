"""Writing models: inline, with external weights, and what the files look like to onnxruntime."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import emit
from graphopt.errors import ModelError
from graphopt.external import ALIGN, check_tensor, load_tensor
from graphopt.model import from_proto, load
from graphopt.runtime import session


def large(weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model that gives its weights back, each as an output."""
    nodes = [helper.make_node("Identity", [n], [f"{n}_out"], f"{n}_node") for n in weights]
    outs = [
        helper.make_tensor_value_info(f"{n}_out", helper.np_dtype_to_tensor_dtype(w.dtype), w.shape) for n, w in weights.items()
    ]
    tensors = [numpy_helper.from_array(w, n) for n, w in weights.items()]
    graph = helper.make_graph(nodes, "g", [], outs, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


WEIGHTS = {
    "a": np.arange(5000, dtype=np.float32),
    "b": np.arange(3001, dtype=np.uint8),
    "c": np.arange(2048, dtype=np.int64).reshape(2, 1024),
    "half": np.arange(1500).astype(np.float16),
    "small": np.ones(3, np.float32),
    "scalar": np.array(7, np.int64),
    "empty": np.zeros((0, 4), np.float32),
    "flags": np.arange(2000) % 3 == 0,
}


def test_external_weights_are_aligned_and_complete(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    files = emit.save(from_proto(large(WEIGHTS)), path, external=True)
    assert files == [path, tmp_path / "m.onnx.data"]
    proto = onnx.load(path, load_external_data=False)
    outside = {t.name: {e.key: e.value for e in t.external_data} for t in proto.graph.initializer if t.data_location}
    assert set(outside) == {"a", "b", "c", "half", "flags"}  # the others are small
    end = 0
    for name in ("a", "b", "c", "half", "flags"):
        offset, length = int(outside[name]["offset"]), int(outside[name]["length"])
        assert outside[name]["location"] == "m.onnx.data"
        assert offset % ALIGN == 0
        assert offset >= end
        assert length == WEIGHTS[name].nbytes
        end = offset + length
    assert (tmp_path / "m.onnx.data").stat().st_size == end
    onnx.checker.check_model(str(path), full_check=True)
    for name, found in zip(WEIGHTS, session(path).run(None, {}), strict=True):
        np.testing.assert_array_equal(found, WEIGHTS[name])
        assert found.dtype == WEIGHTS[name].dtype


def test_external_to_external_and_back(tmp_path: Path) -> None:
    emit.save(from_proto(large(WEIGHTS)), tmp_path / "one.onnx", external=True)
    emit.save(load(tmp_path / "one.onnx"), tmp_path / "two.onnx", external=True)
    assert (tmp_path / "two.onnx.data").read_bytes() == (tmp_path / "one.onnx.data").read_bytes()
    emit.save(load(tmp_path / "two.onnx"), tmp_path / "three.onnx")
    for tensor in onnx.load(tmp_path / "three.onnx", load_external_data=False).graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), WEIGHTS[tensor.name])


def test_the_model_moves_as_a_pair(tmp_path: Path) -> None:
    emit.save(from_proto(large(WEIGHTS)), tmp_path / "m.onnx", external=True)
    other = tmp_path / "elsewhere"
    other.mkdir()
    for file in ("m.onnx", "m.onnx.data"):
        (tmp_path / file).rename(other / file)
    np.testing.assert_array_equal(load(other / "m.onnx").tensors()["a"].values, WEIGHTS["a"])


def test_neither_file_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"mine")
    with pytest.raises(ModelError, match=r"m.onnx.data exists; give --overwrite"):
        emit.save(from_proto(large(WEIGHTS)), tmp_path / "m.onnx", external=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx.data"]
    emit.save(from_proto(large(WEIGHTS)), tmp_path / "m.onnx", external=True, overwrite=True)
    assert (tmp_path / "m.onnx.data").stat().st_size > 4


def test_files_have_the_users_permissions(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        emit.save(from_proto(large(WEIGHTS)), tmp_path / "m.onnx")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == 0o640


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    emit.write_text(path, "{}", overwrite=False)
    with pytest.raises(ModelError, match="exists"):
        emit.write_text(path, "new", overwrite=False)

    def half() -> None:
        with emit.atomic(path) as file:
            file.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_text() == "{}"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_names() -> None:
    assert emit.default_output(Path("a/net.v2.onnx")) == Path("a/net.v2.opt.onnx")
    assert emit.aside(Path("a/out.onnx")) == Path("a/out.failed.onnx")


# ---- sizes of tensors, against what onnx itself writes


@pytest.mark.parametrize("kind", sorted(set(helper.get_all_tensor_dtypes()) - {TensorProto.STRING}))
@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("raw", [True, False])
def test_sizes_of_every_type(kind: int, count: int, raw: bool) -> None:
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(kind))
    values = np.zeros(count).astype(dtype)
    if raw:
        tensor = numpy_helper.from_array(values, "t")
    else:
        tensor = helper.make_tensor("t", kind, [count], values)
    check_tensor(tensor, None)
    assert load_tensor(tensor, None).shape == (count,)
    tensor.dims[:] = [count + 8]
    with pytest.raises(ModelError, match="is the file complete"):
        check_tensor(tensor, None)


def test_strings_and_scalars() -> None:
    check_tensor(TensorProto(name="t", data_type=TensorProto.STRING, dims=[2], string_data=[b"a", b"b"]), None)
    check_tensor(numpy_helper.from_array(np.array(1.0), "t"), None)
    with pytest.raises(ModelError, match="needs 3 values in string_data, found 2"):
        check_tensor(TensorProto(name="t", data_type=TensorProto.STRING, dims=[3], string_data=[b"a", b"b"]), None)
