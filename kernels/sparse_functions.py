"""Sparse weights on numpy arrays: products and convolutions whose weights were packed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.kernels.native import SparseLayer
from graphopt.kernels.sparse_plan import BITS, BLOCKS, BYTES, CONV, FLOATS, GAPS, ROWS, SparsePlan, Window, stored

Array = np.ndarray
Block = tuple[int, int]


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    one, two = (value, value) if isinstance(value, int) else value
    return int(one), int(two)


def _check_block(block: Block) -> None:
    if block not in BLOCKS:
        raise ValueError(f"sparse: blocks of {block[0]} x {block[1]}; valid: {', '.join(f'{r} x {c}' for r, c in BLOCKS)}")


class _Sparse:
    """A plan and its weights."""

    def __init__(self, plan: SparsePlan, matrix: Array, scale: Array | None, bias: Array | None, isa: str | None) -> None:
        constants = [*stored(matrix, plan)]
        constants += [np.asarray(numbers, np.float32) for numbers in (scale, bias) if numbers is not None]
        self.stored_bytes = sum(c.nbytes for c in constants)
        self._layer = SparseLayer(plan, constants, isa=isa)

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """float32 out; `residual`, of the output's shape, is added before the limits where the layer was made for one."""
        inputs = [np.asarray(a, np.float32) for a in (x, residual) if a is not None]
        return self._layer(*inputs)[0]


class SparseGemm(_Sparse):
    """float32 x [..., K] times the transpose of a weight [N, K], of which only the blocks that are not zero are kept.

    weight: float32, or int8 with `scale`, float32 [N]: the weight of output n is then scale[n] times it. `block`: rows x columns of
    a block, (1, 1) for single weights. `bitmap`: these are placed by a bit each, which is fastest for one row or a few where the
    weights do not fit into the caches. `low`, `high`: limits of the output, as of a Relu or a Clip.
    Raises ValueError where blocks do not cover the weight exactly, or a number is not finite.
    """

    def __init__(
        self, weight: Array, *, scale: Array | None = None, bias: Array | None = None, block: Block = (1, 1), bitmap: bool = False,
        low: float = -np.inf, high: float = np.inf, residual: bool = False, isa: str | None = None,
    ) -> None:  # fmt: skip
        _check_block(block)
        if bitmap and block != (1, 1):
            raise ValueError(f"sparse: a bitmap places single weights, not blocks of {block[0]} x {block[1]}")
        if (weight.dtype == np.int8) != (scale is not None):
            raise ValueError(
                f"sparse: a weight of {weight.dtype} {'with' if scale is not None else 'without'} scales; int8 needs them"
            )
        n, k = weight.shape
        places, numbers = BITS if bitmap else GAPS, FLOATS if scale is None else BYTES
        plan = SparsePlan(ROWS, n, k, block, Window(), bias is not None, residual, low, high, places, numbers)
        super().__init__(plan, weight, scale, bias, isa)


class SparseConv(_Sparse):
    """float32 [N, C, H, W] (or [N, C, W]) convolved with a weight [O, C / groups, KH, KW]; blocks as in its matrix [O, -1].

    `pads`: top, left, bottom, right. Else as SparseGemm.
    """

    def __init__(
        self, weight: Array, *, bias: Array | None = None, block: Block = (1, 1), strides: int | Sequence[int] = 1,
        dilations: int | Sequence[int] = 1, pads: Sequence[int] = (0, 0, 0, 0), low: float = -np.inf, high: float = np.inf,
        residual: bool = False, groups: int = 1, isa: str | None = None,
    ) -> None:  # fmt: skip
        _check_block(block)
        n, c, kh, kw = weight.shape
        top, left, bottom, right = (int(p) for p in pads)
        window = Window((kh, kw), _pair(strides), _pair(dilations), (top, left, bottom, right), groups)
        plan = SparsePlan(CONV, n, c * groups, block, window, bias is not None, residual, low, high)
        super().__init__(plan, weight.reshape(n, -1), None, bias, isa)
