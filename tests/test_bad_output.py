"""Outputs that cannot be written: found before any work where possible, and never half written, whatever happens."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bad_models import good
from test_bad_input import contents, folder, optimize, refused

from graphopt import emit
from graphopt.errors import ModelError
from graphopt.model import load
from graphopt.pipeline import run_step

Run = Callable[..., "tuple[int, str, str]"]
__all__ = ["folder"]


@pytest.fixture(autouse=True)
def no_work(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No pass may have run, except where a test is about what happens later."""

    def fail(*arguments: object) -> None:
        raise AssertionError("the work began")

    if "late" not in request.node.name:
        monkeypatch.setattr("graphopt.pipeline.run_step", fail)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "good.onnx", "--overwrite"), "the output good.onnx is the input good.onnx; name another output"),
        (("-o", "link.onnx", "--overwrite"), "the output link.onnx is the input good.onnx"),
        (("-o", "rows.npz", "--overwrite", "--calib", "rows.npz"), "the output rows.npz is the input rows.npz"),
        (("-o", "w.bin"), "w.bin exists; give --overwrite"),
        (("-o", "dangling"), "dangling exists; give --overwrite"),
        (("-o", "sub", "--overwrite"), "sub is a folder; name a file"),
        (("-o", "gone/o.onnx"), "cannot write gone/o.onnx: the folder gone does not exist"),
        (("-o", "pipe", "--overwrite"), "pipe is not a regular file; name another"),
        (("-o", "x" * 300), "File name too long"),
        (("--report", "gone/r.json"), "cannot write gone/r.json: the folder gone does not exist"),
        (("--report", "out.onnx"), "the model and its report would both be out.onnx"),
        (("--report", "good.onnx", "--overwrite"), "the output good.onnx is the input good.onnx"),
        (("--report", "w.bin"), "w.bin exists; give --overwrite"),
        (("--dump-after", "good.onnx"), "cannot make the folder good.onnx"),
        (("--dump-after", "sub"), "the folder sub is not empty; name a new one"),
    ],
)
def test_outputs_are_checked_before_the_work(cli: Run, folder: Path, arguments: tuple[str, ...], message: str) -> None:
    os.link("good.onnx", "link.onnx")
    os.symlink("nowhere", "dangling")
    Path("sub").mkdir()
    Path("sub/file").write_text("kept")
    if "pipe" in arguments:
        os.mkfifo("pipe")
    assert message in refused(cli, folder, *optimize(*arguments))
    assert "pipe" not in arguments or Path("pipe").is_fifo()


def test_a_failed_check_never_replaces_the_input(cli: Run, folder: Path) -> None:
    """OUT.failed.onnx is where a result that failed its check is kept."""
    shutil.move("good.onnx", "o.failed.onnx")
    line = refused(cli, folder, "optimize", "o.failed.onnx", "-o", "o.onnx")
    assert "the output o.failed.onnx is the input" in line


def test_a_folder_that_may_not_be_written(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("graphopt.emit.tempfile.TemporaryFile", denied)
    assert "cannot write out.onnx: the folder . is not writable (Permission denied)" in refused(cli, folder, *optimize())


@pytest.mark.parametrize("function", ["os.fsync", "os.replace"])
def test_late_errors_of_the_disk(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(function, full)
    assert "cannot write out.onnx: No space left on device; nothing was written" in refused(cli, folder, *optimize())


@pytest.mark.parametrize("calls", [1, 2])
def test_late_errors_leave_no_half_of_a_model_with_external_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    """The graph and the weights are two files: neither is replaced before both are on the disk."""
    model = load("good.onnx")
    emit.save(model, "pair.onnx", external=True)
    before, left, real = contents(folder), [calls], os.fsync

    def full(handle: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr("os.fsync", full)
    changed = good()
    changed.graph.name = "another"
    with pytest.raises(ModelError, match="No space left on device; nothing was written"):
        emit.save(load(changed), "pair.onnx", external=True, overwrite=True)
    assert contents(folder) == before


def test_late_weights_that_are_read_are_not_replaced(folder: Path) -> None:
    onnx.save(good(), "m.onnx", save_as_external_data=True, location="o.onnx.data", size_threshold=0)
    before = contents(folder)
    with pytest.raises(ModelError, match="o.onnx.data holds the weights of the model that is read"):
        emit.save(load("m.onnx"), "o.onnx", external=True, overwrite=True)
    assert contents(folder) == before


def test_late_interrupts(cli: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graphopt.emit.os.fsync", stop)
    before = contents(folder)
    code, _, err = cli(*optimize())
    assert (code, err.strip()) == (130, "error: interrupted; nothing was written")
    assert contents(folder) == before


FULL = """
import sys
from graphopt.cli import main
main(["optimize", "good.onnx", "-o", "full/out.onnx", "--no-measure", "-q", "--passes", "dead-code"])
"""


@pytest.mark.skipif(not shutil.which("unshare"), reason="needs unshare to mount a small disk of its own")
def test_late_a_disk_that_is_really_full(folder: Path) -> None:
    proto = good()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(1 << 17, dtype=np.float32), "ballast"))
    proto.graph.node.add(op_type="Identity", name="keep", input=["ballast"], output=["z"])
    proto.graph.output.append(onnx.helper.make_tensor_value_info("z", onnx.TensorProto.FLOAT, [1 << 17]))
    Path("good.onnx").write_bytes(proto.SerializeToString())
    Path("run.py").write_text(FULL)
    Path("full").mkdir()
    script = f"mount -t tmpfs -o size=128k tmpfs full || exit 77; {sys.executable} run.py; echo code $?; ls -A full"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, timeout=60)
    if done.returncode == 77 or "code" not in done.stdout:
        pytest.skip(f"cannot mount a disk of its own here: {done.stderr.strip()[:200]}")
    assert done.stderr == "error: cannot write full/out.onnx: No space left on device; nothing was written\n"
    assert done.stdout == "code 1\n"


def test_late_run_step_is_what_the_others_forbid() -> None:
    """The guard above replaces a function that exists."""
    assert run_step.__name__ == "run_step"
