"""The ahead-of-time library, with the toy engine: built once for this module, then used without Numba, from C, on every rung."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from toy_models import PLACES, toy

from graphopt.kernels import aot, elf, linker

if sys.platform != "linux" or platform.machine() != "x86_64":
    pytest.skip("runs a library for Linux on x86-64", allow_module_level=True)

_USE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('numba', 'llvmlite', 'graphopt'):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.register_custom_ops_library(sys.argv[1])
x = np.arange(50, dtype=np.float32)
y = ort.InferenceSession(sys.argv[2], options, providers=['CPUExecutionProvider']).run(None, {'t0': x})[0]
assert np.array_equal(y, x + 6), y
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> aot.Library:
    steps: list[str] = []
    made = aot.build_library(
        tmp_path_factory.mktemp("aot") / "toy.so", progress=lambda _done, _all, text: steps.append(text), places=PLACES
    )
    assert steps[0] == "compiling for amx"
    assert steps[-1] == "linking"
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "toy.onnx"
    path.write_bytes(toy(2.0, nodes=3).SerializeToString())
    return path


def _use(library: Path, model: Path, cpu: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "GRAPHOPT_CPU": cpu}
    return subprocess.run([sys.executable, "-c", _USE, str(library), str(model)], capture_output=True, text=True, env=environment)


def test_small_and_alone(built: aot.Library) -> None:
    assert built.rungs == ("amx", "avx512vnni", "avxvnni", "avx2", "generic")
    assert built.size == built.path.stat().st_size < 1 << 20
    assert set(built.imports) <= {"malloc", "free", "memcpy", "memmove", "memset", "getenv", "sched_yield"}


@pytest.mark.parametrize("cpu", ["", "generic"])
def test_without_numba(built: aot.Library, model: Path, cpu: str) -> None:
    found = _use(built.path, model, cpu)
    assert found.returncode == 0, found.stderr


def test_every_available_rung(built: aot.Library, model: Path) -> None:
    from graphopt.kernels.cpu import available

    for rung in built.rungs:
        found = _use(built.path, model, rung)
        if rung in available():
            assert found.returncode == 0, found.stderr
        else:
            assert f"graphopt: GRAPHOPT_CPU={rung} is not available here; choose from: " in found.stderr


def test_from_c(built: aot.Library, model: Path, tmp_path: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    files = metadata.files("onnxruntime") or []
    runtimes = [Path(str(f.locate())) for f in files if f.name.startswith("libonnxruntime.so")]
    if not runtimes:
        pytest.skip("this onnxruntime has no shared library of its own")
    host = tmp_path / "host"
    source = Path(__file__).with_name("host.c")
    subprocess.run(["gcc", "-O1", str(source), "-o", str(host), "-ldl"], check=True)
    found = subprocess.run([host, runtimes[0], model, built.path, "6"], capture_output=True, text=True)
    assert (found.returncode, found.stdout.strip()) == (0, "ok"), found.stdout + found.stderr


def test_code_that_raises_fails_the_build(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match="graphopt_exception_in_graphopt_raising_create__amx.*ValueError: no library can have this"
    ):
        aot.build_library(tmp_path / "x.so", places=("toy_engine:RAISING",))


def test_unknown_target(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown target 'riscv'; valid: x86-64, aarch64"):
        aot.build_library(tmp_path / "x.so", "riscv", places=PLACES)


@pytest.mark.slow
def test_aarch64_links(tmp_path: Path) -> None:
    made = aot.build_library(tmp_path / "x.so", "aarch64", places=PLACES)
    assert made.rungs == ("neon_dot", "generic")
    assert made.path.read_bytes()[18] == elf.AARCH64
    assert "getauxval" in made.imports


def test_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builds = []

    def build(path: Path, target: str, **_: object) -> aot.Library:
        builds.append(target)
        Path(path).write_bytes(b"library")
        return aot.Library(Path(path), 7, (), ())

    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(aot, "build_library", build)
    first = aot.library(places=PLACES)
    assert aot.library(places=PLACES) == first
    assert first.read_bytes() == b"library"
    assert builds == ["x86-64"]


def _object(ir: str) -> elf.Object:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine(reloc="pic", codemodel="small")
    return elf.read_object(machine.emit_object(llvm.parse_assembly(ir)))


_CALLS = """
declare void @NRT_Free()
declare void @malloc()
define void @f() {
  call void @NRT_Free()
  call void @malloc()
  ret void
}"""
_ONE = """
@data = external global i64
declare i64 @g(i64)
define i64 @f(i64 %x) {
  %d = load i64, ptr @data
  %y = call i64 @g(i64 %d)
  ret i64 %y
}"""
_TWO = """
@data = global i64 20
@table = global ptr @data
define i64 @g(i64 %x) {
  %p = load ptr, ptr @table
  %v = load i64, ptr %p
  %y = add i64 %x, %v
  ret i64 %y
}"""


def test_linker_names_undefined_symbols() -> None:
    with pytest.raises(elf.LinkError, match="undefined symbols: NRT_Free. A library may import only: malloc"):
        linker.link([_object(_CALLS)], ["f"], {"malloc"})


def test_linker_joins_objects(tmp_path: Path) -> None:
    import ctypes

    library, imports = linker.link([_object(_ONE), _object(_TWO)], ["f"], ())
    path = tmp_path / "joined.so"
    path.write_bytes(library)
    assert imports == []
    assert ctypes.CDLL(str(path)).f(0) == 40
    with pytest.raises(elf.LinkError, match="defined twice"):
        linker.link([_object(_ONE), _object(_ONE)], ["f"], {"g", "data"})
    with pytest.raises(elf.LinkError, match="exports that are not defined: h"):
        linker.link([_object(_ONE), _object(_TWO)], ["h"], ())


def test_linker_names_the_provider_of_an_import(tmp_path: Path) -> None:
    one = _object("declare float @fmaf(float, float, float)\n@f = constant ptr @fmaf")
    for providers, found in (({"libm.so.6": {"fmaf"}}, True), ({"libm.so.6": {"expf"}}, False)):
        library, imports = linker.link([one], ["f"], {"fmaf"}, providers=providers)
        assert imports == ["fmaf"]
        assert (b"libm.so.6" in library) == found
