"""What a node `graphopt.SparseLayer<n>` computes, and how its weights are stored: no Numba here.

A weight matrix [outputs, inputs] is cut into blocks of `rows` x `columns`. Of the blocks that are not all zero, `values`
([blocks, rows * columns]) has the weights, row by row, and `places` where they are, as one of

    gaps   uint8 [blocks]: how far each lies behind the one before it, counted in blocks along the rows of blocks, the first from
           -1: so 1 means right behind. Where a gap is above 255, blocks of zeros stand in between
    bits   uint8 [(outputs * inputs + 7) / 8]: a bit for each weight, the lowest first; for single weights of products of rows

Values are float32, or int8 with `scales`, float32 [outputs]: a weight is its value times the scale of its output, in float32. The
same arrays serve every kernel: it arranges them for its CPU when the session is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAGIC = 0x53505253
VERSION = 2
MAX_LAYERS = 64  # operators SparseLayer0 ... SparseLayer63: onnxruntime before 1.24 confuses overloads of one function name
PREFIX = "SparseLayer"
ROWS, CONV = 0, 1  # kinds: x [..., inputs] times the transposed weights; convolution of [N, C, H, W] or [N, C, W]
GAPS, BITS = 0, 1  # how places are stored
FLOATS, BYTES = 0, 1  # values: float32, or int8 with scales
LARGEST_GAP = 255
BLOCKS = ((1, 1), (1, 4), (4, 1), (4, 4), (16, 1))
MAX_CHANNELS = 1 << 20
MAX_WINDOW = 1 << 12  # of kernel, strides, dilations and pads

# slots of the attribute `plan`; PLAN_ACTIVATIONS is where kernels/region.py looks for it
(P_MAGIC, P_VERSION, P_KIND, P_BIAS, P_ACTIVATIONS, P_OUT, P_IN, P_KH, P_KW, P_SH, P_SW, P_DH, P_DW, P_PT, P_PL, P_PB, P_PR,
 P_GROUPS, P_ROWS, P_COLUMNS, P_PLACES, P_NUMBERS) = range(22)  # fmt: skip
PLAN = 22


@dataclass(frozen=True)
class Window:
    """Of a convolution: kernel, strides, dilations, pads (top, left, bottom, right), groups of channels."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilations: tuple[int, int] = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    groups: int = 1


@dataclass(frozen=True)
class SparsePlan:
    """Inputs of the node: x, the residual if there is one, values, places, scales where values are int8, the bias if there is one.

    y = min(max(W x + bias + residual, low), high); `inputs` are channels: the matrix has inputs / groups * kernel
    columns, as in OIHW.
    """

    kind: int
    outputs_: int
    inputs: int
    block: tuple[int, int]
    window: Window = Window()
    bias: bool = False
    residual: bool = False
    low: float = float("-inf")
    high: float = float("inf")
    places: int = GAPS
    numbers: int = FLOATS
    outputs: int = 1  # tensors

    @property
    def activations(self) -> int:
        """Input tensors that are no constants."""
        return 1 + self.residual

    @property
    def scales(self) -> tuple[float, float]:
        """The attribute `scales`."""
        return self.low, self.high

    @property
    def columns(self) -> int:
        """Of the weight matrix."""
        return self.inputs // self.window.groups * self.window.kernel[0] * self.window.kernel[1]

    def encode(self) -> list[int]:
        """The attribute `plan`."""
        w = self.window
        numbers = (
            self.activations,
            self.outputs_,
            self.inputs,
            *w.kernel,
            *w.strides,
            *w.dilations,
            *w.pads,
            w.groups,
            *self.block,
            self.places,
            self.numbers,
        )
        return [MAGIC, VERSION, self.kind, int(self.bias), *numbers]


def fits(shape: Sequence[int], block: tuple[int, int]) -> bool:
    """Whether blocks cover a matrix exactly."""
    return shape[0] % block[0] == 0 and shape[1] % block[1] == 0


def _blocks(weight: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    (n, k), (rows, columns) = weight.shape, block
    cut = weight.reshape(n // rows, rows, k // columns, columns)
    return cut.transpose(0, 2, 1, 3).reshape(-1, rows * columns)


def to_sparse(weight: np.ndarray, block: tuple[int, int] = (1, 1)) -> tuple[np.ndarray, np.ndarray]:
    """(values, gaps) of a float32 or int8 matrix [outputs, inputs]; ValueError where the blocks do not cover it exactly.

    >>> values, gaps = to_sparse(np.array([[0, 2, 0, 0], [3, 0, 0, 4]], np.float32))
    >>> values[:, 0].tolist(), gaps.tolist()
    ([2.0, 3.0, 4.0], [2, 3, 3])
    """
    if weight.ndim != 2 or not fits(weight.shape, block) or min(block) < 1:
        raise ValueError(f"sparse weights: blocks of {block[0]} x {block[1]} do not cover a matrix of shape {weight.shape}")
    if not np.isfinite(weight).all():
        raise ValueError("sparse weights: there are NaN or infinite ones")
    cut = _blocks(weight if weight.dtype == np.int8 else np.asarray(weight, np.float32), block)
    places = np.flatnonzero(cut.any(1))
    if not len(places):
        places = np.zeros(1, np.int64)
    steps = np.diff(places, prepend=-1)
    fillers = (steps - 1) // LARGEST_GAP  # blocks of zeros before each
    ends = np.cumsum(fillers + 1)
    gaps = np.full(ends[-1], LARGEST_GAP, np.uint8)
    gaps[ends - 1] = steps - LARGEST_GAP * fillers
    values = np.zeros((ends[-1], cut.shape[1]), cut.dtype)
    values[ends - 1] = cut[places]
    return values, gaps


def to_bits(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(values, bits) of a float32 or int8 matrix [outputs, inputs], or ValueError.

    >>> values, bits = to_bits(np.array([[0, 2, 0, 0], [3, 0, 0, 4]], np.float32))
    >>> values[:, 0].tolist(), [f"{byte:08b}" for byte in bits]
    ([2.0, 3.0, 4.0], ['10010010'])
    """
    if weight.ndim != 2 or not np.isfinite(weight).all():
        raise ValueError(f"sparse weights: not a matrix of finite numbers, but of shape {weight.shape}")
    flat = (weight if weight.dtype == np.int8 else np.asarray(weight, np.float32)).reshape(-1)
    kept = flat != 0
    if not kept.any():
        kept[:1] = True  # there is at least one value
    return flat[kept][:, None], np.packbits(kept, bitorder="little")


def stored(matrix: np.ndarray, plan: SparsePlan) -> tuple[np.ndarray, np.ndarray]:
    """(values, places) of a matrix as the plan has them; ValueError where they cannot be."""
    return to_bits(matrix) if plan.places == BITS else to_sparse(matrix, plan.block)


def to_dense(values: np.ndarray, gaps: np.ndarray, shape: tuple[int, int], block: tuple[int, int] = (1, 1)) -> np.ndarray:
    """The matrix that `to_sparse` was given."""
    (n, k), (rows, columns) = shape, block
    cut = np.zeros((n // rows * (k // columns), rows * columns), values.dtype)
    cut[np.cumsum(gaps, dtype=np.int64) - 1] = values
    return cut.reshape(n // rows, k // columns, rows, columns).transpose(0, 2, 1, 3).reshape(n, k)
