"""Custom operators compiled in this process: the toy engine behind onnxruntime, and what happens when something is wrong."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from toy_models import PLACES, toy

from graphopt.kernels import runtime

if sys.platform != "linux":
    pytest.skip("the trampoline is for Linux", allow_module_level=True)

X = np.arange(-5, 300, dtype=np.float32)


def options(threads: int = 1) -> ort.SessionOptions:
    made = ort.SessionOptions()
    made.log_severity_level = 4
    made.intra_op_num_threads = threads
    runtime.register(made, PLACES)
    return made


def session(model: onnx.ModelProto, threads: int = 1) -> ort.InferenceSession:
    return ort.InferenceSession(model.SerializeToString(), options(threads), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(("threads", "parallel"), [(1, False), (1, True), (2, True)])
def test_outputs(threads: int, parallel: bool) -> None:
    model = toy(2.0, nodes=3, types=(1, 2), scales=(0.5,), parallel=parallel)
    made = session(model, threads)
    for x in (X, X[:3], X[:0]):
        floats, integers = made.run(None, {"t0": x})
        np.testing.assert_array_equal(floats, x + np.float32(7.5))
        np.testing.assert_array_equal(integers, np.clip(x + np.float32(7.5), 0, 255).astype(np.uint8))


def test_all_operators() -> None:
    np.testing.assert_array_equal(session(toy(1.0, nodes=64)).run(None, {"t0": X})[0], X + 64)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (toy(plan=[1, 2]), "graphopt: toy0: attribute 'plan' is too short"),
        (toy(plan=[0, 0, 0, 0, 9, 0, 1]), "graphopt: toy0: attribute 'plan' does not fit the number of inputs"),
        (toy(plan=[0, 0, 0, 0, -1, 0, 1]), "graphopt: toy0: attribute 'plan' does not fit"),
        (toy(plan=[0, 0, 0, 0, 2, 0, 1]), "graphopt: toy0: one float32 constant expected, constants: 0"),
        (toy(constant=False), "graphopt: toy0: input 1 must be a constant"),
        (toy(plan=[1], name=""), "graphopt: unnamed node: attribute|graphopt: .*: attribute 'plan' is too short"),
        (toy(plan=[1], name="n" * 300), f"graphopt: {'n' * 95}: attribute 'plan' is too short"),
    ],
)
def test_bad_nodes(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(Exception, match=message):
        session(model)


def test_missing_plan() -> None:
    model = toy()
    del model.graph.node[0].attribute[:]
    with pytest.raises(Exception, match="graphopt: toy0: attribute 'plan' is missing"):
        session(model)


def test_bad_runs() -> None:
    with pytest.raises(Exception, match="graphopt: toy0: output 0 is declared with another element type"):
        session(toy(declared=(2,))).run(None, {"t0": X})
    scalar = toy()
    scalar.graph.input[0].type.tensor_type.shape.Clear()
    scalar.graph.output[0].type.tensor_type.shape.Clear()
    made = session(scalar)
    with pytest.raises(Exception, match="graphopt: toy0: the input must be float32 with a dimension"):
        made.run(None, {"t0": np.array(1, np.float32)})
    np.testing.assert_array_equal(made.run(None, {"t0": X})[0], X + 1)


def test_function_body_without_the_operators() -> None:
    model = toy(body=True)  # whose body subtracts, to tell it from the operator
    plain = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(plain.run(None, {"t0": X})[0], X - 1)
    np.testing.assert_array_equal(session(model).run(None, {"t0": X})[0], X + 1)


def test_register_twice_and_from_threads() -> None:
    made = [options() for _ in range(4)]
    threads = [threading.Thread(target=runtime.register, args=(o, PLACES)) for o in made * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for one in made:
        found = ort.InferenceSession(toy().SerializeToString(), one, providers=["CPUExecutionProvider"])
        np.testing.assert_array_equal(found.run(None, {"t0": X})[0], X + 1)


def test_cpu_override(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CPU", "generic")
    np.testing.assert_array_equal(session(toy()).run(None, {"t0": X})[0], X + 1)
    monkeypatch.setenv("GRAPHOPT_CPU", "mmx")
    with pytest.raises(ValueError, match="GRAPHOPT_CPU=mmx is not available here; choose from: .*generic"):
        options()


def test_rungs_agree_with_llvm() -> None:
    from graphopt.kernels import cpu, isa

    assert cpu.available() == tuple(r for r in isa.RUNGS if not r.endswith("_soft") and isa.available(r))


def test_old_onnxruntime() -> None:
    """RegisterCustomOps called as onnxruntime 1.16 would."""
    text = ctypes.create_string_buffer(b"1.16.3")
    messages: list[bytes] = []

    def note(_: int, message: bytes) -> int:
        messages.append(message)
        return 7

    create_status = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int, ctypes.c_char_p)(note)
    api = (ctypes.c_void_p * 300)(ctypes.cast(create_status, ctypes.c_void_p).value)
    get_api = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(lambda v: ctypes.addressof(api) if v == 1 else 0)
    get_version = ctypes.CFUNCTYPE(ctypes.c_int64)(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p).value for f in (get_api, get_version)))
    function = ctypes.CDLL(runtime.library_path(PLACES)).RegisterCustomOps
    function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_int64, ctypes.c_int64]
    assert function(0, ctypes.addressof(base)) == 7
    assert messages == [b"graphopt: onnxruntime 1.17 or later is needed, this is 1.16.3"]


def _target() -> int:
    """Code for a library to lead to: returns 42."""
    made = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(lambda *_: 42)
    _KEEP.append(made)
    return int(ctypes.cast(made, ctypes.c_void_p).value or 0)


_KEEP: list[object] = []


def _leads(path: str) -> bool:
    return bool(ctypes.CDLL(path).RegisterCustomOps(0, 0) == 42)


def test_trampoline_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.kernels import trampoline

    monkeypatch.setattr(trampoline, "_in_memory", lambda _: None)
    path = trampoline.load(_target())
    assert Path(path).is_file()
    assert _leads(path)


def test_trampoline_where_nothing_is_executable(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.kernels import trampoline

    def refuse(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    with pytest.raises(RuntimeError, match="without 'noexec'"):
        trampoline.load(1)


def test_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.kernels import shim

    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path))
    assert _leads(shim.load(_target(), ["gcc"]))
    assert [p.suffix for p in tmp_path.iterdir()] == [".so"]


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def stress(make: Callable[[], ort.InferenceSession], runs: int, sessions: int) -> int:
    """8 threads on one session, then sessions made and destroyed; bytes that memory has grown over the second half."""
    shared, wrong = make(), []

    def work(seed: int) -> None:
        x = np.arange(seed, seed + 50 + seed, dtype=np.float32)
        for _ in range(runs):
            if not np.array_equal(shared.run(None, {"t0": x})[0], x + 2):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(250)
    assert not wrong
    assert not any(t.is_alive() for t in threads)
    before = 0
    for i in range(sessions):
        make().run(None, {"t0": X})
        if i == sessions // 2:
            before = _resident()
    return _resident() - before


@pytest.mark.parametrize(("runs", "sessions"), [(200, 40), pytest.param(5000, 500, marks=pytest.mark.slow)])
def test_stress(runs: int, sessions: int) -> None:
    model = toy(1.0, nodes=2, parallel=True)
    assert stress(lambda: session(model, 2), runs, sessions) < 4 << 20
