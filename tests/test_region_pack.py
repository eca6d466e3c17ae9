"""Regions whose weights are stored in blocks: smaller files, the same integers, and packed weights that are not right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from region_cases import Graph, judge, plan_of, regions

from graphopt.kernels import isa, reference_plan
from graphopt.kernels import plan as p
from graphopt.kernels.native import Region
from graphopt.kernels.sparse_plan import to_sparse

Array = np.ndarray


def zeros(values: Array, block: tuple[int, int], turned: bool = False, kept: float = 0.25) -> None:
    """Make most blocks of a weight zero, in place."""
    matrix = values.T if turned else values.reshape(len(values), -1)
    mask = np.random.default_rng(0).random((matrix.shape[0] // block[0], matrix.shape[1] // block[1])) < kept
    matrix *= np.kron(mask, np.ones(block, np.int8)).astype(np.int8)


class Sparse(Graph):
    """Whose weights have blocks of zeros."""

    block = (4, 4)

    def constant(self, values: Any, dtype: Any = None) -> str:
        array = np.asarray(values, dtype)
        if array.dtype == np.int8 and array.ndim > 1:
            zeros(array, self.block, turned=array.ndim == 2 and array.shape == (96, 64))
        return super().constant(array, dtype)


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (1, 4), (4, 4), (16, 1)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolutions(block: tuple[int, int], kernel: int) -> None:
    g = Sparse()
    g.block = block
    x = g.q(g.input("N", 32, 6, 6))
    proto = g.model(g.q(g.conv(x, 32, 64, (kernel, kernel), pads=[kernel // 2] * 4), 0.3))
    model = judge(proto)
    (packed,) = plan_of(regions(model)[0]).packed
    assert packed.shape == (64, 32, kernel, kernel)
    assert packed.block == block
    dense = 64 * 32 * kernel * kernel
    assert model.proto().ByteSize() < proto.ByteSize() - 0.4 * dense + 6000  # the function has its size, too


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_products(op: str) -> None:
    g = Sparse()
    x = g.q(g.input("N", 96))
    w = g.weight(96, 64, axis=1) if op == "MatMul" else g.weight(64, 96)
    y = g.op("MatMul", x, w) if op == "MatMul" else g.op("Gemm", x, w, g.bias(64), transB=1)
    model = judge(g.model(g.q(y, 2.0, 100)))
    (packed,) = plan_of(regions(model)[0]).packed
    assert packed.turned == (op == "MatMul")
    assert packed.block == (4, 4)


def test_dense_and_small_weights_stay() -> None:
    g = Graph()
    model = judge(g.model(g.q(g.conv(g.q(g.input("N", 32, 6, 6)), 32, 64), 0.3)))
    assert plan_of(regions(model)[0]).packed == []


def conv(turned: bool = False) -> tuple[p.Plan, list[Array]]:
    """A product of rows, its weight packed in 4 x 4 blocks."""
    rng = np.random.default_rng(0)
    matrix = rng.integers(-127, 128, (16, 64)).astype(np.int8)
    zeros(matrix, (4, 4))
    values, gaps = to_sparse(matrix, (4, 4))
    steps = [
        p.step(p.INPUT, index=0, out=0, type=p.UINT8, layout=p.ROWS, rank=2),
        p.step(p.CONV, x=0, out=1, weight=0, weight_scale=1, scale=0, mid_zero=3, order=p.KN if turned else p.OIHW),
        p.step(p.OUTPUT, x=1, index=0, type=p.UINT8, layout=p.ROWS, rank=2, like=0),
    ]
    packed = p.Packed(0, 2, (4, 4), (64, 16) if turned else (16, 64), turned)
    plan = p.Plan([p.Tensor(64, 128), p.Tensor(16, 3)], steps, [0.02, 0.5], 1, 1, 3, [packed])
    return plan, [values, np.full(16, 0.01, np.float32), gaps]


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("rung", [name for name in isa.RUNGS if isa.available(name) and not isa.RUNGS[name].soft])
def test_the_engine_unpacks(rung: str, turned: bool) -> None:
    plan, constants = conv(turned)
    again = p.decode(plan.encode(), plan.scales)
    assert (again.packed, again.encode()) == (plan.packed, plan.encode())
    x = np.random.default_rng(1).integers(0, 256, (5, 64)).astype(np.uint8)
    (found,) = Region(plan, constants, isa=rung)(x)
    np.testing.assert_array_equal(found, reference_plan.run(plan, [x], constants)[0])
    assert len(np.unique(found)) > 10


def _gap(constants: list[Array], index: int, value: int) -> list[Array]:
    gaps = constants[2].copy()
    gaps[index] = value
    return [*constants[:2], gaps]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": 3}, "values or gaps of a packed weight are no constants .3"),
        ({"gaps": -1}, "values or gaps of a packed weight are no constants"),
        ({"gaps": 0}, "gaps of a packed weight must be uint8"),
        ({"values": 2}, "values of a packed weight must be int8"),
        ({"block": (0, 4)}, "blocks of a packed weight are out of range"),
        ({"block": (17, 1)}, "blocks of a packed weight are out of range"),
        ({"block": (2, 4)}, "values of a packed weight must be int8"),
        ({"shape": (16, 66)}, "blocks do not cover a packed weight exactly"),
        ({"shape": (16, 32)}, "a gap of a packed weight is 0 or leads out of it"),
        ({"shape": (16,)}, "the shape of a packed weight is out of range"),
        ({"shape": (65536, 65536, 65536, 65536)}, "the shape of a packed weight is out of range"),
        ({"shape": (16, -64)}, "the shape of a packed weight is out of range"),
        ({"shape": (16384, 16384)}, "the shape of a packed weight is out of range"),
        ({"shape": (16, 128)}, "the input has other channels than the weight"),
    ],
)
def test_packed_weights_that_are_not_right(change: dict[str, Any], message: str) -> None:
    plan, constants = conv()
    with pytest.raises(ValueError, match=message):
        Region(replace(plan, packed=[replace(plan.packed[0], **change)]), constants)


@pytest.mark.parametrize(("index", "value"), [(0, 0), (-1, 255)])
def test_gaps_that_are_not_right(index: int, value: int) -> None:
    plan, constants = conv()
    with pytest.raises(ValueError, match="a gap of a packed weight is 0 or leads out of it: number"):
        Region(plan, _gap(constants, index, value))
