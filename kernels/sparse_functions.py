"""Sparse weights on numpy arrays: products and convolutions whose weights were packed once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.kernels.native import SparseLayer
from graphopt.kernels.sparse_plan import BLOCKS, CONV, ROWS, SparsePlan, Window, to_sparse

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

    def __init__(self, plan: SparsePlan, matrix: Array, bias: Array | None, isa: str | None) -> None:
        values, gaps = to_sparse(np.asarray(matrix, np.float32), plan.block)
        constants = [values, gaps] if bias is None else [values, gaps, np.asarray(bias, np.float32)]
        self.stored_bytes = sum(c.nbytes for c in constants)
        self._layer = SparseLayer(plan, constants, isa=isa)

    def __call__(self, x: Array, residual: Array | None = None) -> Array:
        """float32 out; `residual`, of the output's shape, is added before the limits where the layer was made for one."""
        inputs = [np.asarray(a, np.float32) for a in (x, residual) if a is not None]
        return self._layer(*inputs)[0]


class SparseGemm(_Sparse):
    """float32 x [..., K] times the transpose of a weight [N, K], of which only the blocks that are not zero are kept.

    `block`: rows x columns of a block, (1, 1) for single weights. `low`, `high`: limits of the output, as of a Relu or a Clip.
    Raises ValueError where blocks do not cover the weight exactly, or a number is not finite.
    """

    def __init__(
        self, weight: Array, *, bias: Array | None = None, block: Block = (1, 1), low: float = -np.inf, high: float = np.inf,
        residual: bool = False, isa: str | None = None,
    ) -> None:  # fmt: skip
        _check_block(block)
        n, k = weight.shape
        plan = SparsePlan(ROWS, n, k, block, bias=bias is not None, residual=residual, low=low, high=high)
        super().__init__(plan, weight, bias, isa)


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
        super().__init__(plan, weight.reshape(n, -1), bias, isa)
