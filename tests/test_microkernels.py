"""Every rung that this CPU can run, real or soft, computes what the numpy reference does, bit for bit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from microkernel_steps import Dense, run_dense, run_depthwise

from graphopt.kernels import isa, layout
from graphopt.kernels.isa import RUNGS

HERE = [name for name in RUNGS if isa.available(name)]
TILED = [name for name in HERE if RUNGS[name].tiles]
MODES = [layout.MODE_U8, layout.MODE_SUM, layout.MODE_F32]

DENSE = st.builds(
    Dense,
    m=st.integers(1, 110),
    k=st.integers(1, 150),
    n=st.integers(1, 100),
    mode=st.sampled_from(MODES),
    zero=st.sampled_from([0, 7, 255]),
    low=st.sampled_from([0, 7, 130]),
    high=st.sampled_from([255, 200, 130]),
    block=st.sampled_from([48, 96, 4800]),
    seed=st.integers(0, 99),
    zero_x=st.sampled_from([0, 3, 128, 255]),
    extreme=st.booleans(),
    quads=st.booleans(),
)
CASES = settings(max_examples=25, deadline=None)


@pytest.mark.parametrize("rung", HERE)
@given(case=DENSE, split=st.integers(0, 2))
@example(Dense(1, 150, 100, extreme=True), 0)
@example(Dense(49, 8, 80, layout.MODE_SUM), 1)
@example(Dense(97, 4096, 16, extreme=True), 1)
@CASES
def test_dense(rung: str, case: Dense, split: int) -> None:
    got, wanted = run_dense(rung, case, split=split)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rung", TILED)
@given(case=DENSE, split=st.integers(0, 2))
@example(Dense(33, 130, 112, layout.MODE_SUM), 1)
@CASES
def test_tiles(rung: str, case: Dense, split: int) -> None:
    got, wanted = run_dense(rung, case, tiles=True, split=split)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rung", HERE)
@given(
    groups=st.integers(1, 9),
    kernel=st.sampled_from([3, 5]),
    strides=st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    size=st.tuples(st.integers(1, 6), st.integers(1, 9)),
    bounds=st.sampled_from([(0, 255), (7, 200)]),
    seed=st.integers(0, 99),
)
@CASES
def test_depthwise(
    rung: str, groups: int, kernel: int, strides: tuple[int, int], size: tuple[int, int], bounds: tuple[int, int], seed: int
) -> None:
    width = max(size[1], -(-RUNGS[rung].chunk // (groups * 16)))  # a row must fill a chunk
    got, wanted = run_depthwise(rung, groups * 16, kernel, strides, size[0], width, seed, bounds)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("rung", HERE)
@pytest.mark.parametrize("mode", MODES)
def test_gemv_in_two_parts(rung: str, mode: int) -> None:
    got, wanted = run_dense(rung, Dense(1, 64, 107, mode), split=-1)
    np.testing.assert_array_equal(got, wanted)


def _python(code: str, **environment: str) -> str:
    """Run code in a fresh process."""
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    full = {**os.environ, "PYTHONPATH": path, **environment}
    done = subprocess.run([sys.executable, "-c", code], env=full, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LOAD = """
from graphopt.kernels.isa import detect
from graphopt.kernels.microkernels import kernels
from microkernel_steps import Dense, run_dense, run_depthwise
run_dense(detect(), Dense(5, 8, 16)); run_depthwise(detect(), 64, 3, (1, 1), 2, 2)
for f in (kernels(detect()).conv, kernels(detect()).depthwise, kernels(detect()).pack_channels):
    print(sum(f.stats.cache_hits.values()), sum(f.stats.cache_misses.values()))
"""


def test_a_fresh_process_compiles_nothing(tmp_path: Path) -> None:
    cache = str(tmp_path)
    if _python(LOAD, NUMBA_CACHE_DIR=cache).split() == ["1", "0"] * 3:
        pytest.fail("the first process found code that it had not compiled")
    assert _python(LOAD, NUMBA_CACHE_DIR=cache).split() == ["1", "0"] * 3


# compiles a rung for a CPU that has it, and returns the assembly without running it
ASSEMBLY = """
from numba import types
from graphopt.kernels.microkernels import kernels
ks = kernels(RUNG)
for f, arity in ((ks.conv, 3), (ks.depthwise, 3), (ks.conv_amx, 4)):
    if f is not None:
        f._cache = type("NoCache", (), {"load_overload": lambda *a: None, "save_overload": lambda *a: None})()
        f.compile((types.int64,) * arity)
        print(next(iter(f.inspect_asm().values())))
"""
EXPECTED = [  # amx is avx512vnni, and tiles
    ("amx", "sapphirerapids", ["tdpbusd", "tileloadd", "ldtilecfg", "tilerelease", "vpdpbusd", "zmm", "vpackuswb"]),
    ("avxvnni", "alderlake", ["vpdpbusd", "ymm"]),
    ("generic", "x86-64", ["pmaddwd"]),
]


@pytest.mark.parametrize(("rung", "cpu", "wanted"), EXPECTED)
def test_special_instructions(rung: str, cpu: str, wanted: list[str]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("compiles for x86")
    text = _python(f"RUNG = {rung!r}\n" + ASSEMBLY, NUMBA_CPU_NAME=cpu, NUMBA_CPU_FEATURES="")
    assert [name for name in wanted if name not in text] == []
    assert "fmaf" not in text
    assert "NRT_incref" not in text
    assert "NRT_MemInfo" not in text


# writes the IR of a rung's micro-kernels into a module of its own, and compiles that for ARM without Numba
ARM = """
import llvmlite.binding as llvm
from llvmlite import ir
from graphopt.kernels.dialects import dialect
from graphopt.kernels.isa import RUNGS
from graphopt.kernels.micro_conv import conv_tiles
from graphopt.kernels.micro_depthwise import depthwise_chunk
llvm.initialize_all_targets(); llvm.initialize_all_asmprinters()
try:
    target = llvm.Target.from_triple("aarch64-unknown-linux-gnu")
except RuntimeError:
    print("skip"); raise SystemExit(0) from None
d = dialect(RUNGS[RUNG])
module = ir.Module("kernels")
module.triple = "aarch64-unknown-linux-gnu"
class Context:
    def get_dummy_value(self): return None
made = [(conv_tiles(d, n, p), 4) for n, p in ((d.isa.gemm[0], 1), (1, 4))]
made += [(depthwise_chunk(d, k, s, True), 6) for k in (3, 5) for s in (1, 2)]
for i, (kernel, arity) in enumerate(made):
    kind = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [kind] * arity), name=f"entry{i}")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    kernel._defn(None, *[kind] * arity)[1](Context(), b, None, function.args)
    b.ret_void()
machine = target.create_target_machine(cpu="generic", features=FEATURES, opt=2)
print(machine.emit_assembly(llvm.parse_assembly(str(module))))
"""


@pytest.mark.parametrize(
    ("rung", "features", "wanted"), [("neon_dot", "+neon,+dotprod", ["sdot", "fmla"]), ("generic", "+neon", ["smull", "fcvtzs"])]
)
def test_arm(rung: str, features: str, wanted: list[str]) -> None:
    text = _python(f"RUNG, FEATURES = {rung!r}, {features!r}\n" + ARM)
    if text == "skip":
        pytest.skip("this llvmlite has no ARM back end")
    assert [name for name in wanted if name not in text] == []
    called = {line.split()[1] for line in text.splitlines() if line.strip().startswith("bl\t")}
    assert all(name.startswith("graphopt_") for name in called), called


def test_detect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(isa.VARIABLE, raising=False)
    assert isa.detect() == HERE[0]
    monkeypatch.setenv(isa.VARIABLE, "generic")
    assert isa.detect() == "generic"
    for wrong, reason in (("avx3", "no such rung"), ("neon_dot", "this CPU lacks it")):
        monkeypatch.setenv(isa.VARIABLE, wrong)
        if wrong not in HERE:
            with pytest.raises(ValueError, match=f"{wrong}: .*{reason}.*; valid here: .*generic"):
                isa.detect()
