"""The compiled engine against the numpy interpreter of plans, for every rung that this CPU has; and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import plan_cases
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.kernels import isa, reference_plan
from graphopt.kernels import plan as p
from graphopt.kernels.native import Region

RUNGS = [name for name in isa.RUNGS if isa.available(name)]
FUZZ = Path(__file__).with_name("plan_fuzz.py")


def check(rung: str, plan: p.Plan, constants: list[np.ndarray], inputs: list[np.ndarray]) -> None:
    region = Region(plan, constants, isa=rung)
    wanted = reference_plan.run(plan, inputs, constants)
    for _ in range(2):  # the second run finds the instance, and the arena, of the first
        got = region(*inputs)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype


@pytest.mark.parametrize("rung", RUNGS)
@given(seed=st.integers(0, 100_000))
@settings(max_examples=60, deadline=None)
def test_random_plans_are_bit_exact(rung: str, seed: int) -> None:
    check(rung, *plan_cases.draw(seed))


@pytest.mark.parametrize("rung", RUNGS)
@given(seed=st.integers(0, 100_000))
@settings(max_examples=20, deadline=None)
def test_products_of_rows_are_bit_exact(rung: str, seed: int) -> None:
    check(rung, *plan_cases.rows(seed))


@pytest.mark.parametrize("rung", RUNGS)
@given(seed=st.integers(0, 100_000))
@settings(max_examples=40, deadline=None)
def test_edges_and_tables_are_bit_exact(rung: str, seed: int) -> None:
    check(rung, *plan_cases.edges(seed))


def conv(size: int = 3, channels: int = 5) -> tuple[p.Plan, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    steps = [
        p.step(p.INPUT, index=0, out=0, type=p.FLOAT, layout=p.CHANNELS_FIRST, rank=4, x_scale=0),
        p.step(p.CONV, x=0, out=1, weight=0, weight_scale=1, kh=size, kw=size, pt=1, pl=1, pb=1, pr=1, scale=0, mid_zero=3),
        p.step(p.OUTPUT, x=1, index=0, type=p.FLOAT, layout=p.CHANNELS_FIRST, rank=4, x_scale=1),
    ]
    weight = rng.integers(-127, 128, (channels, 4, size, size)).astype(np.int8)
    plan = p.Plan([p.Tensor(4, 128), p.Tensor(channels, 3)], steps, [0.02, 0.05], 1, 1, 2)
    return plan, [weight, np.full(channels, 0.01, np.float32)]


def test_shapes_may_change_between_runs() -> None:
    plan, constants = conv()
    region = Region(plan, constants)
    rng = np.random.default_rng(1)
    for batch, height, width in [(1, 8, 8), (3, 5, 9), (1, 8, 8), (2, 1, 1), (1, 40, 3), (0, 8, 8)]:
        x = rng.standard_normal((batch, 4, height, width)).astype(np.float32)
        (wanted,) = reference_plan.run(plan, [x], constants)
        np.testing.assert_array_equal(region(x)[0], wanted)


def test_rows_of_images() -> None:
    """A classifier: images in, one row of floats for each out."""
    plan, constants = conv()
    rng = np.random.default_rng(5)
    weight = rng.integers(-127, 128, (5, 7)).astype(np.int8)
    steps = [
        *plan.steps[:2],
        p.step(p.POOL, x=1, out=2, op=p.GLOBAL_POOL, scale=0),
        p.step(p.CONV, x=2, out=-1, index=0, weight=2, weight_scale=3, order=p.KN, rank=2, like=0, scale=0),
        p.step(p.OUTPUT, x=2, index=1, type=p.FLOAT, layout=p.ROWS, rank=2, x_scale=1, like=0),
    ]
    tensors = [*plan.tensors, p.Tensor(5, 9)]
    whole = p.Plan(tensors, steps, plan.scales, 1, 2, 4)
    inputs = [rng.standard_normal((3, 4, 6, 6)).astype(np.float32)]
    check(isa.detect(), whole, [*constants, weight, np.array([0.1], np.float32)], inputs)


def test_runs_overlap() -> None:
    """Eight threads on one region, of different shapes: each run has an instance of its own."""
    plan, constants = conv()
    region = Region(plan, constants)
    rng = np.random.default_rng(2)
    inputs = [rng.standard_normal((1, 4, 6 + i % 3, 9)).astype(np.float32) for i in range(8)]
    wanted = [reference_plan.run(plan, [x], constants)[0] for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(300):
            if not np.array_equal(region(inputs[i])[0], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def changed(plan: p.Plan, index: int, **fields: int) -> p.Plan:
    steps = list(plan.steps)
    steps[index] = p.Step(steps[index].kind, {**steps[index].fields, **fields})
    return p.Plan(plan.tensors, steps, plan.scales, plan.activations, plan.outputs, plan.constants)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"x": 7}, "step 1: reads a tensor that is not written before (7)"),
        ({"weight": 9}, "step 1: the weight is missing or not int8 (9)"),
        ({"weight_scale": 0}, "step 1: the weight scale is missing or not float32 (0)"),
        ({"kh": 5}, "step 1: the weight's shape does not fit"),
        ({"sh": 0}, "step 1: kernel, strides, dilations or pads out of range"),
        ({"pt": -1}, "step 1: kernel, strides, dilations or pads out of range"),
        ({"groups": 0}, "step 1: the weight's shape does not fit"),
        ({"scale": 2}, "step 1: a scale is missing or not a positive number (2)"),
        ({"out": 0}, "step 1: no such tensor, or it is written twice (0)"),
        ({"high": 256}, "step 1: zero point or bounds out of range"),
    ],
)
def test_damaged_plans_are_refused(fields: dict[str, int], message: str) -> None:
    plan, constants = conv()
    with pytest.raises(ValueError, match=message.replace("(", "\\(").replace(")", "\\)")):
        Region(changed(plan, 1, **fields), constants)


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0, 3e38])
def test_scales_that_are_no_positive_numbers_are_refused(value: float) -> None:
    plan, constants = conv()
    broken = p.Plan(plan.tensors, plan.steps, [value, 0.05], 1, 1, 2)
    with pytest.raises(ValueError, match=r"not a positive number|overflow 32 bits"):
        Region(broken, constants)


def test_sums_that_can_overflow_are_refused() -> None:
    plan, constants = conv()
    bias = np.full(5, 2**31 - 1, np.int32)
    full = changed(plan, 1, bias=2)
    with pytest.raises(ValueError, match=r"step 1: the sums of an output channel can overflow 32 bits \(0\)"):
        Region(p.Plan(full.tensors, full.steps, full.scales, 1, 1, 3), [*constants, bias])


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((1, 4, 5), np.float32), "another rank"),
        (np.zeros((1, 3, 5, 5), np.float32), "other channels"),
        (np.zeros((1, 4, 5, 5), np.uint8), "another type"),
        (np.zeros((1, 4, 0, 5), np.float32), "not possible"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(array: np.ndarray, message: str) -> None:
    region = Region(*conv())
    with pytest.raises(ValueError, match=message):
        region(array)


def test_inputs_that_are_no_numbers_saturate() -> None:
    plan, constants = conv()
    x = np.random.default_rng(3).standard_normal((1, 4, 6, 6)).astype(np.float32)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    clean = x.copy()
    clean[0, 0, 0, :3] = -1e9, 1e9, -1e9
    region = Region(plan, constants)
    np.testing.assert_array_equal(region(x)[0], region(clean)[0])


def fuzz(first: int, count: int, rung: str = "") -> str:
    env = {**os.environ, "MALLOC_PERTURB_": "165", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "ignore", "-X", "faulthandler", str(FUZZ), str(first), str(count), *([rung] if rung else [])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_malformed_plans_end_in_an_error_or_run() -> None:
    assert "refused" in fuzz(0, 2_000)


@pytest.mark.slow
def test_ten_thousand_malformed_plans() -> None:
    assert "refused" in fuzz(100_000, 10_000)
