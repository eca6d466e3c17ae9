"""graphopt.session and register: which operators a session gets, and what is said where there are none; `graphopt run`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import graphopt
from graphopt import library, operators
from graphopt.errors import GraphoptError
from graphopt.registry import find

Run = Callable[..., "tuple[int, str, str]"]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model with its INT8 part as a region; measured nowhere."""
    from graphopt.context import Context
    from graphopt.data import open_dataset
    from graphopt.emit import save
    from graphopt.feeds import input_specs
    from graphopt.model import load
    from graphopt.pipeline import parse, run

    assets = Path(graphopt.__file__).parent / "assets"
    model = load(assets / "digits.onnx")
    data = open_dataset(str(assets / "digits_calib.npz"), input_specs(model.interface()))
    run(model, parse("fold, quantize method=minmax, compile-int8"), Context(data))
    path = tmp_path_factory.mktemp("compiled") / "model.onnx"
    save(model, path)
    return path


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where nothing can be compiled."""

    def fails(options: Any) -> None:
        raise operators.OperatorError("they cannot be compiled in this process: No module named 'numba' (pip install numba)")

    monkeypatch.setattr(operators, "_attach_jit", fails)


def test_a_model_without_regions_needs_nothing(digits: Path, without: None) -> None:
    assert not operators.has_regions(digits / "digits.onnx")
    assert operators.opened(digits / "digits.onnx")[1].kind == "none"


def test_no_operators_is_one_clear_line(compiled: Path, without: None) -> None:
    with pytest.raises(GraphoptError, match=r"numba.*the model also runs without them, only slower") as raised:
        graphopt.session(compiled)
    assert f"there is no {operators.library_name()} beside the model" in str(raised.value)
    runner, how = operators.opened(compiled, fallback=True)
    assert how.kind == "functions"
    assert runner.run(None, {runner.get_inputs()[0].name: np.zeros((2, 1, 8, 8), np.float32)})[0].shape[0] == 2


def test_a_library_that_cannot_be_loaded(compiled: Path, without: None, tmp_path: Path) -> None:
    broken = tmp_path / operators.library_name()
    broken.write_bytes(b"no library")
    with pytest.raises(GraphoptError, match="cannot be used here"):
        graphopt.session(compiled, library=broken)
    with pytest.raises(GraphoptError, match="no such library"):
        graphopt.session(compiled, library=tmp_path / "gone.so")
    with pytest.raises(GraphoptError, match="no such file"):
        graphopt.session(tmp_path / "gone.onnx")


def test_the_log_says_why_it_is_not_the_library_beside_the_model(
    compiled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operators, "_attach_jit", lambda options: operators.Operators("jit", rung="avx2"))
    monkeypatch.setattr("onnxruntime.InferenceSession", lambda *arguments, **options: None)
    model = tmp_path / "model.onnx"
    model.write_bytes(compiled.read_bytes())
    caplog.set_level("INFO", "graphopt")
    graphopt.session(model)
    (tmp_path / operators.library_name()).write_bytes(b"no library")
    graphopt.session(model)
    first, second = caplog.records
    assert first.levelname == "INFO"
    assert (
        first.getMessage() == f"{model}: compiled in this process (avx2) (there is no {operators.library_name()} beside the model)"
    )
    assert second.levelname == "WARNING"
    assert f"{operators.library_name()} cannot be used here (" in second.getMessage()


def test_the_log_says_that_the_regions_are_left_to_onnxruntime(
    compiled: Path, without: None, caplog: pytest.LogCaptureFixture
) -> None:
    graphopt.session(compiled, fallback=True)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "onnxruntime, from the functions in the model (there is no " in record.getMessage()
    assert "No module named 'numba'" in record.getMessage()


def test_options_that_have_the_operators_are_not_given_them_again(compiled: Path, tmp_path: Path) -> None:
    """onnxruntime would refuse to make a session of them."""
    import onnxruntime as ort

    options, other = ort.SessionOptions(), tmp_path / "other.so"
    other.write_bytes(b"never loaded")
    graphopt.register(options)
    assert operators.attach(options, other).kind == "jit"
    graphopt.register(options)
    runner = ort.InferenceSession(str(compiled), options, providers=["CPUExecutionProvider"])
    assert runner.run(None, {runner.get_inputs()[0].name: np.zeros((1, 1, 8, 8), np.float32)})[0].shape[0] == 1


def test_the_regions_stand_for_the_nodes(compiled: Path) -> None:
    import onnx

    (region,) = operators.regions(onnx.load(compiled))
    assert region.nodes > 10
    assert operators.has_regions(compiled.read_bytes())


def test_register_is_also_the_decorator_of_passes() -> None:
    @graphopt.register("does-nothing")
    def does_nothing(model: graphopt.Model, context: graphopt.Context) -> int:
        return 0

    assert find("does-nothing").fn is does_nothing
    with pytest.raises(GraphoptError, match="expected onnxruntime.SessionOptions"):
        graphopt.register(3)


def test_run_writes_every_row_in_order(cli: Run, compiled: Path, digits: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.npz"
    with np.load(digits / "digits_eval.npz") as data:
        np.savez(rows, **{k: v[:10] for k, v in data.items()})
    out = tmp_path / "out.npz"
    code, text, err = cli("run", compiled, "--data", rows, "-o", out, "--batch", 4, "--no-library", "--json")
    assert (code, err) == (0, "")
    said = json.loads(text)
    assert (said["rows"], said["kind"], said["regions"]) == (10, "functions", 1)
    runner = graphopt.session(compiled, library=False)
    name = runner.get_inputs()[0].name
    with np.load(rows) as data, np.load(out) as written:
        wanted = runner.run(None, {name: data[name].astype(np.float32)})
        for output, value in zip(runner.get_outputs(), wanted, strict=True):
            np.testing.assert_allclose(written[output.name], value, rtol=1e-5, atol=1e-6)
    code, _, err = cli("run", compiled, "--data", rows, "-o", out, "--no-library")
    assert code == 1
    assert "exists; give --overwrite" in err


def test_a_library_is_reused_and_never_replaced_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.check_library(tmp_path, "x86-64", b"one", overwrite=False)
    library.write_library(path, b"one")
    assert path.name == "graphopt-ops-linux-x86_64.so"
    assert library.check_library(tmp_path, "x86-64", b"one", overwrite=False) == path
    with pytest.raises(GraphoptError, match="is another version; give --overwrite, or --no-library"):
        library.check_library(tmp_path, "x86-64", b"two", overwrite=False)
    library.write_library(library.check_library(tmp_path, "x86-64", b"two", overwrite=True), b"two")
    assert path.read_bytes() == b"two"


@pytest.mark.parametrize(("target", "name"), [("aarch64", "linux-aarch64"), ("x86-64", "linux-x86_64")])
def test_a_library_for_another_target(
    cli: Run, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str
) -> None:
    """What is timed here then says nothing: a table chooses the regions."""
    built: list[str] = []

    def build(chosen: str, progress: library.Progress) -> bytes:
        built.append(chosen)
        return b"code"

    monkeypatch.setattr(library, "build", build)
    out, report = tmp_path / "out.onnx", tmp_path / "report.json"
    passes = "fold, quantize method=minmax, compile-int8"
    arguments = ["optimize", digits / "digits.onnx", "-o", out, "--passes", passes, "--calib", digits / "digits_calib.npz"]
    code, _, err = cli(*arguments, "--target", "ort-cpu+graphopt", "--library-target", target, "--report", report, "-q")
    assert (code, err) == (0, "")
    assert built == [target]
    assert (tmp_path / f"graphopt-ops-{name}.so").read_bytes() == b"code"
    said = json.loads(report.read_text())["passes"][-1]["facts"]["boundaries"]
    here = operators.platform_name() == name
    assert said["how"] == ("measured" if here else "estimated")
    assert here or said["why"] == "the model is for another machine"


def test_an_unknown_library_target_is_one_line(cli: Run, digits: Path, tmp_path: Path) -> None:
    code, _, err = cli("optimize", digits / "digits.onnx", "-o", tmp_path / "o.onnx", "--library-target", "riscv")
    assert code == 1
    assert "'riscv' is not one of 'x86-64', 'aarch64'" in err
