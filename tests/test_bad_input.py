"""Bad input: one line on stderr that names what is wrong, exit code 1, nothing written and nothing changed."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bad_models import BROKEN, good, weight

import graphopt
from graphopt.errors import GraphoptError, ModelError, OptionError

Run = Callable[..., "tuple[int, str, str]"]
ROWS = np.random.default_rng(0).standard_normal((8, 3, 8, 8)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with good.onnx, w.bin and rows.npz in it."""
    inside = tmp_path / "work"
    inside.mkdir()
    monkeypatch.chdir(inside)
    Path("good.onnx").write_bytes(good().SerializeToString())
    Path("w.bin").write_bytes(weight(good()).raw_data)
    (tmp_path / "w.bin").write_bytes(weight(good()).raw_data)
    np.savez("rows.npz", x=ROWS, labels=np.arange(8) % 4)
    return inside


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in sorted(folder.rglob("*"))}


def refused(cli: Run, folder: Path, *arguments: object, code: int = 1) -> str:
    """Run the command line, which must fail with one line and leave every file as it was; the line."""
    before = contents(folder)
    found, _, err = cli(*arguments)
    assert (found, err.count("\n"), err[:7]) == (code, 1, "error: "), err
    assert "internal error" not in err
    assert "bug in the pass" not in err
    assert contents(folder) == before
    return err


def optimize(*arguments: object, source: object = "good.onnx") -> tuple[object, ...]:
    return ("optimize", source, "-o", "out.onnx", "--no-measure", "-q", *arguments)


def test_the_good_model_is_good(cli: Run, folder: Path) -> None:
    assert cli(*optimize("--passes", "fold, quantize", "--calib", "rows.npz", "--eval", "rows.npz", "--check"))[::2] == (0, "")


# ---- models


@pytest.mark.parametrize("name", BROKEN)
def test_broken_models(cli: Run, folder: Path, name: str) -> None:
    change, message = BROKEN[name]
    proto = good()
    change(proto)
    Path("bad.onnx").write_bytes(proto.SerializeToString())
    for command in (optimize(source="bad.onnx"), ("inspect", "bad.onnx"), ("groups", "bad.onnx")):
        line = refused(cli, folder, *command)
        assert message in line
        assert line.startswith("error: bad.onnx: ")
    with pytest.raises(ModelError):
        graphopt.optimize(proto)


def test_every_truncation(folder: Path) -> None:
    content = good().SerializeToString()
    for length in (*range(0, 200), *range(200, len(content), 17), len(content) - 1):
        Path("cut.onnx").write_bytes(content[:length])
        with pytest.raises(ModelError, match=r"^cut.onnx(:| is not an ONNX model or is truncated)"):
            graphopt.load("cut.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is the file complete?"),
        (b"hello\nthis is text\n", "is not an ONNX model or is truncated"),
        (b"\0" * 1000, "not an ONNX model"),
    ],
)
def test_files_that_are_no_models(cli: Run, folder: Path, content: bytes, message: str) -> None:
    Path("bad.onnx").write_bytes(content)
    assert message in refused(cli, folder, *optimize(source="bad.onnx"))
    assert message in refused(cli, folder, "compare", "good.onnx", "bad.onnx", "--data", "rows.npz")


def test_no_file_and_a_folder(cli: Run, folder: Path) -> None:
    Path("models").mkdir()
    for arguments in (optimize(source="gone.onnx"), ("inspect", "gone.onnx"), ("diff", "good.onnx", "gone.onnx")):
        assert "no such file: gone.onnx" in refused(cli, folder, *arguments)
    assert "models is a folder; name a model file" in refused(cli, folder, *optimize(source="models"))
    assert "cannot read models: Is a directory" in refused(cli, folder, "groups", "models")


def test_a_link_out_of_the_folder_is_not_followed(cli: Run, folder: Path) -> None:
    proto = good()
    BROKEN["external file missing"][0](proto)
    Path("bad.onnx").write_bytes(proto.SerializeToString())
    os.symlink(folder.parent / "w.bin", "gone.bin")
    assert "'gone.bin' lies outside the model's folder; copy it beside the model" in refused(
        cli, folder, *optimize(source="bad.onnx")
    )


def test_external_data_from_memory(folder: Path) -> None:
    onnx.save(good(), "m.onnx", save_as_external_data=True, location="m.bin", size_threshold=0)
    with pytest.raises(ModelError, match="load the model by path, not from memory"):
        graphopt.load(onnx.load("m.onnx", load_external_data=False))


@pytest.mark.parametrize(("domain", "op"), [("my.own", "Relu"), ("my.own", "Strange"), ("", "Strange")])
def test_unknown_operators_are_carried_through_untouched(cli: Run, folder: Path, domain: str, op: str) -> None:
    proto = good()
    proto.graph.node[2].op_type, proto.graph.node[2].domain = op, domain
    if domain:
        proto.opset_import.add(domain=domain, version=7)
    Path("own.onnx").write_bytes(proto.SerializeToString())
    passes = "fold, prune-channels ratio=0.5, quantize"
    assert cli(*optimize("--passes", passes, "--calib", "rows.npz", source="own.onnx"))[::2] == (0, "")
    result = onnx.load("out.onnx")
    assert [(n.domain, n.op_type, n.name) for n in result.graph.node if n.op_type == op] == [(domain, op, "relu")]
    assert not domain or any((o.domain, o.version) == (domain, 7) for o in result.opset_import)
    report = graphopt.optimize("own.onnx").report
    assert any("outputs were not compared: onnxruntime cannot load the model" in warning for warning in report.warnings)


def test_what_onnxruntime_refuses_is_told(folder: Path) -> None:
    """A weight of a type that Conv does not take: valid to onnx's plain checker."""
    proto = good()
    weight(proto).data_type = onnx.TensorProto.INT32
    assert any("Type 'tensor(int32)' of input" in warning for warning in graphopt.optimize(proto).report.warnings)
    with pytest.raises(GraphoptError, match=r"Type 'tensor\(int32\)' of input parameter \(w\) of operator \(Conv\)"):
        graphopt.optimize(proto, check=True)


# ---- data


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": ROWS}, "'rows.npz': input 'x' is missing; expected 'x', found 'y'"),
        ({}, "input 'x' is missing"),
        ({"x": ROWS[0]}, "key 'x': expected float32 [N, 3, 8, 8], found float32 [3, 8, 8]"),
        ({"x": ROWS[:, :2]}, "found float32 [8, 2, 8, 8]"),
        ({"x": ROWS.astype(np.int64)}, "expected float32, found int64, which does not convert without loss"),
        ({"x": ROWS.astype(complex)}, "found complex128"),
        ({"x": ROWS.astype(str)}, "expected float32, found <U"),
        ({"x": np.where(np.arange(8)[:, None, None, None] == 3, np.nan, ROWS)}, "row 3 holds NaN or Inf"),
        ({"x": np.where(np.arange(8)[:, None, None, None] == 5, -np.inf, ROWS)}, "row 5 holds NaN or Inf"),
        ({"x": ROWS.astype(np.float64) * 1e300}, "row 0 holds NaN or Inf as float32"),
        ({"x": ROWS[:0]}, "has no rows"),
        ({"x": np.array([ROWS, None], object)}, "holds Python objects"),
    ],
)
@pytest.mark.parametrize("use", ["--calib", "--eval"])
def test_rows_that_do_not_fit(cli: Run, folder: Path, use: str, arrays: dict[str, Any], message: str) -> None:
    labels = {"labels": np.arange(len(arrays.get("x", ROWS))) % 4} if use == "--eval" else {}
    np.savez("rows.npz", **{**arrays, **labels})
    assert message in refused(cli, folder, *optimize("--passes", "quantize" if use == "--calib" else "fold", use, "rows.npz"))
    if "labels" not in arrays and use == "--calib":
        with pytest.raises(GraphoptError):
            graphopt.optimize("good.onnx", "quantize", calibration=arrays)


@pytest.mark.parametrize(
    ("labels", "metric", "message"),
    [
        (None, "top1", "has no 'labels'"),
        (np.arange(5), "top1", "'rows.npz' key 'labels' has 5"),
        (np.zeros((8, 4)), "top1", "output has shape [8, 4] and the labels [8, 4]"),
        (np.arange(8) + 9, "top1", "must be numbers from 0 to 3"),
        (np.full(8, np.nan), "top5", "must be numbers from 0 to 3"),
        (np.array(["a"] * 8), "top1", "must be numbers from 0 to 3"),
        (np.arange(8), "binary", "expected one value a row; try top1"),
        (np.zeros((8, 3)), "negative-mse", "differ in shape"),
        (np.full((8, 4), "a"), "negative-mse", "the labels are <U1, expected numbers"),
        (np.arange(8) % 4, "nonsense", "unknown metric 'nonsense'"),
        (np.arange(8) % 4, "gone:f", "metric 'gone:f' cannot be loaded"),
        (np.arange(8) % 4, "os:sep", "metric 'os:sep' is a str, not a function"),
        (np.arange(8) % 4, "math:dist", "metric 'math:dist' raised"),
        (np.arange(8) % 4, "builtins:zip", "gave object"),
    ],
)
def test_labels_and_metrics_that_do_not_fit(cli: Run, folder: Path, labels: Any, metric: str, message: str) -> None:
    np.savez("rows.npz", x=ROWS, **({} if labels is None else {"labels": labels}))
    assert message in refused(cli, folder, *optimize("--eval", "rows.npz", "--metric", metric))


def _cut(length: int) -> bytes:
    np.savez("whole.npz", x=ROWS)
    content = Path("whole.npz").read_bytes()
    Path("whole.npz").unlink()
    return content[:length] if length > 0 else content[:3000] + b"\xff\xff\xff\xff" + content[3004:]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "cannot be read"),
        (lambda: b"PK\3\4garbage", "cannot be read"),
        (lambda: pickle.dumps({"x": ROWS}), "cannot be read"),
        (lambda: _cut(2000), "cannot be read"),
        (lambda: _cut(6300), "cannot be read"),
        (lambda: _cut(-1), "Bad CRC-32"),
    ],
)
def test_damaged_data_files(cli: Run, folder: Path, make: Callable[[], bytes], message: str) -> None:
    Path("rows.npz").write_bytes(make())
    line = refused(cli, folder, *optimize("--passes", "quantize", "--calib", "rows.npz"))
    assert "'rows.npz'" in line
    assert message in line


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gone.npz", "'gone.npz': no such file or folder"),
        ("good.onnx", "expected a .npz or .npy file"),
        ("empty", "the folder holds no .npz or .npy file"),
        ("nowhere:rows", "No module named 'nowhere'"),
        ("os:nothing", "'os' has no function 'nothing'"),
        ("feeds.py:fails", "raised ValueError: two lines"),
        ("feeds.py:ragged", "feed 0 key 'x': is not an array"),
        ("feeds.py:lists", "feed 0 is a list"),
        ("feeds.py:none", "has no rows"),
        ("bad.py:rows", "raised SyntaxError"),
    ],
)
def test_data_that_is_not_there(cli: Run, folder: Path, where: str, message: str) -> None:
    Path("empty").mkdir()
    Path("bad.py").write_text("def rows(:\n")
    Path("feeds.py").write_text(
        "def fails(): raise ValueError('two\\nlines')\ndef ragged(): yield {'x': [[1], [2, 3]]}\n"
        "def lists(): yield [1]\ndef none(): return []\n"
    )
    assert message in refused(cli, folder, *optimize("--passes", "quantize", "--calib", where))


# ---- names and options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--passes", "nope"), "unknown pass 'nope'; valid: "),
        (("--passes", "fold-bnn"), "did you mean 'fold-bn'?"),
        (("--passes", ""), "the pipeline is empty"),
        (("--passes", "fold-bn nope=1"), "fold-bn: unknown option 'nope'"),
        (("--passes", "prune-channels ratio"), "expected option=value, found 'ratio'"),
        (("--passes", "prune-channels ratio=much"), "ratio=much: Input should be a valid number"),
        (("--passes", "prune-channels ratio=2"), "ratio=2 is the share of units to remove"),
        (("--passes", "prune-channels ratio=0.5 criterion=nope"), "unknown criterion 'nope'"),
        (("--passes", "prune-channels ratio=0.5 criterion=activation"), "needs calibration data: give --calib"),
        (("--passes", "quantize"), "quantize: needs calibration data: give --calib"),
        (("--passes", "quantize, prune-channels ratio=0.5", "--calib", "rows.npz"), "quantize must come after prune-channels"),
        (("--passes", "'open"), "No closing quotation"),
        (("--preset", "nope"), "unknown preset 'nope'; valid: "),
        (("--target", "nope"), "unknown target 'nope'; valid: "),
        (("--metric", "nope"), "unknown metric 'nope'"),
        (("--print-after", "quantize"), "--print-after quantize: no such pass in the pipeline"),
        (("--passes", "fold-bn", "--preset", "fold"), "give one of --passes, --preset and --pipeline"),
        (("--plugin", "gone.py"), "gone.py does not exist"),
        (("--plugin", "rows.npz"), "rows.npz is not a Python file"),
        (("--nope",), "No such option '--nope'"),
    ],
)
def test_names_and_options(cli: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    assert message in refused(cli, folder, *optimize(*arguments))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "is not TOML"),
        ("", "expected an array of tables [[pass]]"),
        ("[[pass]]", "expected an array of tables [[pass]]"),
        ("pass = 3", "expected an array of tables [[pass]]"),
        ("[[pass]]\nname = 'nope'", "unknown pass 'nope'"),
        ("[[pass]]\nname = 'fold-bn'\nx = 1", "fold-bn: unknown option 'x'"),
        ("[[pass]]\nname = 'fold-bn'\n[other]\nx = 1", "expected an array of tables [[pass]]"),
    ],
)
def test_pipeline_files(cli: Run, folder: Path, text: str, message: str) -> None:
    Path("p.toml").write_text(text)
    assert message in refused(cli, folder, *optimize("--pipeline", "p.toml"))


def test_a_plugin_pass_that_misbehaves(cli: Run, folder: Path) -> None:
    Path("bad.py").write_text(
        "from graphopt import register\n@register('counts-not')\ndef a(model, context): return None\n"
        "@register('cuts')\ndef b(model, context):\n    model.nodes()[0].inputs.clear()\n    return 1\n"
    )
    assert "counts-not: returned None; a pass returns" in refused(
        cli, folder, *optimize("--plugin", "bad.py", "--passes", "counts-not")
    )
    assert "after cuts: the model is not valid ONNX" in refused(cli, folder, *optimize("--plugin", "bad.py", "--passes", "cuts"))


def test_python_calls(folder: Path) -> None:
    with pytest.raises(OptionError, match="the pipeline is empty"):
        graphopt.optimize("good.onnx", [])
    with pytest.raises(OptionError, match="not both"):
        graphopt.optimize("good.onnx", "fold", pipeline="p.toml")
    with pytest.raises(GraphoptError, match="a generator can be read only once"):
        graphopt.optimize("good.onnx", "quantize", calibration=iter([{"x": ROWS}]))
    with pytest.raises(GraphoptError, match="cannot read rows from a int"):
        graphopt.optimize("good.onnx", "quantize", calibration=3)
