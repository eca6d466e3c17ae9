"""Products of float32 rows with 4-bit weights in blocks, as com.microsoft.MatMulNBits has them: `NBitsGemm`.

Column n of the product is the sum over k of x[k] * (q[n, k] - zero[n, k / block]) * scale[n, k / block], in float32.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from graphopt.kernels.abi import memcpy, memset
from graphopt.kernels.dialects import dialect
from graphopt.kernels.isa import RUNGS, detect
from graphopt.kernels.memory import ldf, ldu8, stf, stu8
from graphopt.kernels.micro_nbits import CHUNK, HEAD, MOST, PANEL, nbits_row, nbits_rows
from graphopt.kernels.specialise import compiled, specialise

Array = np.ndarray
BLOCKS = (16, 32, 64, 128, MOST)  # sizes of a block that are accepted
FEW = 4  # fewer rows are done one by one
MIDDLE = 8  # the zero point where none is given

row: Any = None  # set per rung
rows: Any = None


class NBits(NamedTuple):
    """Functions on addresses, int64 all. `run` is made for one rung."""

    packed_bytes: Any  # (columns, blocks, block) -> size of packed weights
    pack: Any  # (target, weights, scales, zeros or 0, columns, blocks, block)
    pad: Any  # (target, x, m, k, width): rows with zeros behind them
    block_sums: Any  # (target, x, blocks, block)
    run: Any  # (x, sums, m, weights, blocks, block, first panel, last panel, out, columns)


@compiled
def packed_bytes(columns: int, blocks: int, block: int) -> int:
    """Size of packed weights."""
    return (columns + PANEL - 1) // PANEL * blocks * (HEAD + block // 2 * PANEL)


@compiled
def pack(target: int, weights: int, scales: int, zeros: int, columns: int, blocks: int, block: int) -> None:
    """As MatMulNBits stores them (u8 [columns][blocks][block / 2], float32 [columns][blocks], u8 [columns][(blocks + 1) / 2] of two
    zero points each) -> records of micro_nbits; columns that do not exist have scale 0."""
    record, half = HEAD + block // 2 * PANEL, block // 2
    memset(target, 0, packed_bytes(columns, blocks, block))
    for n in range(columns):
        for i in range(blocks):
            at = target + (n // PANEL * blocks + i) * record
            lane = n % PANEL
            stf(at + 4 * lane, ldf(scales + 4 * (n * blocks + i)))
            zero = MIDDLE
            if zeros != 0:
                zero = ldu8(zeros + n * ((blocks + 1) // 2) + i // 2) >> (4 * (i % 2)) & 15
            stu8(at + 4 * PANEL + lane, zero)
            for k in range(half):
                stu8(at + HEAD + PANEL * k + lane, ldu8(weights + (n * blocks + i) * half + k))


@compiled
def pad(target: int, x: int, m: int, k: int, width: int) -> None:
    """float32 [m][k] -> [m][width], the rest of each row 0."""
    for r in range(m):
        memcpy(target + 4 * r * width, x + 4 * r * k, 4 * k)
        memset(target + 4 * (r * width + k), 0, 4 * (width - k))


@compiled
def block_sums(target: int, x: int, blocks: int, block: int) -> None:
    """The sum of each block of float32 [blocks][block]."""
    for i in range(blocks):
        total = np.float32(0)
        for j in range(i * block, (i + 1) * block):
            total += ldf(x + 4 * j)
        stf(target + 4 * i, total)


def run(x: int, sums: int, m: int, weights: int, blocks: int, block: int, start: int, stop: int, out: int, columns: int) -> None:
    """Panels [start, stop) of m rows, float32 [m][blocks * block]; out: float32 [m][columns].

    sums: float32 [m][blocks], of each block of x; read where m < FEW.
    """
    size, pitch = blocks * (HEAD + block // 2 * PANEL), 4 * blocks * block
    for n in range(start, stop):
        panel, target, real = weights + n * size, out + 4 * PANEL * n, columns - PANEL * n
        if m < FEW:
            for r in range(m):
                row(x + r * pitch, sums + 4 * blocks * r, panel, blocks, block // 2, target + 4 * r * columns, real)
            continue
        for r in range(0, m, CHUNK):
            rows(x + r * pitch, pitch, min(m - r, CHUNK), panel, blocks, block // 2, target + 4 * r * columns, 4 * columns, real)


@cache
def nbits(name: str) -> NBits:
    """The functions of a rung; nothing is compiled before it is called."""
    d = dialect(RUNGS[name])
    return NBits(packed_bytes, pack, pad, block_sums, specialise(run, name, row=nbits_row(d), rows=nbits_rows(d)))


class NBitsGemm:
    """x [..., K] times 4-bit weights, in float32: MatMulNBits with bits=4 and an `accuracy_level` of 0 or 1.

    weight: u8 [N, blocks, block / 2], the even k in the low half of a byte, K padded up to whole blocks; scale: float32
    [N, blocks] (or flat); zero: u8 [N, (blocks + 1) / 2], two to a byte (or flat), None for 8. `isa` names a rung.
    ValueError tells what does not fit.
    """

    def __init__(self, weight: Array, scale: Array, *, k: int, zero: Array | None = None, isa: str | None = None) -> None:
        if weight.dtype != np.uint8 or weight.ndim != 3 or 2 * weight.shape[2] not in BLOCKS:
            found = f"weight {weight.dtype}{list(weight.shape)}"
            raise ValueError(f"{found}: expected uint8 [N, blocks, block / 2], block one of {BLOCKS}")
        self.columns, self.blocks, self.block, self.k = weight.shape[0], weight.shape[1], 2 * weight.shape[2], k
        if not self.columns or not 0 < k <= self.blocks * self.block or self.blocks != -(-k // self.block):
            raise ValueError(f"{self.blocks} blocks of {self.block} do not make up K = {k}")
        pairs = (self.blocks + 1) // 2
        if scale.dtype != np.float32 or scale.size != self.columns * self.blocks:
            raise ValueError(f"scale {scale.dtype}{list(scale.shape)}: expected float32 [{self.columns}, {self.blocks}]")
        if zero is not None and (zero.dtype != np.uint8 or zero.size != self.columns * pairs):
            raise ValueError(f"zero {zero.dtype}{list(zero.shape)}: expected uint8 [{self.columns}, {pairs}]")
        self._call = nbits(isa or detect())
        weight, scale = np.ascontiguousarray(weight), np.ascontiguousarray(scale)
        kept = None if zero is None else np.ascontiguousarray(zero)
        sizes = self.columns, self.blocks, self.block
        self._packed = np.empty(self._call.packed_bytes(*sizes), np.uint8)
        at = 0 if kept is None else kept.ctypes.data
        self._call.pack(self._packed.ctypes.data, weight.ctypes.data, scale.ctypes.data, at, *sizes)

    def __call__(self, x: Array) -> Array:
        """x: float32 [..., K] -> float32 [..., N]."""
        if x.dtype != np.float32 or not x.ndim or x.shape[-1] != self.k:
            raise ValueError(f"x {x.dtype}{list(x.shape)}: expected float32 [..., {self.k}]")
        given = np.ascontiguousarray(x).reshape(-1, self.k)
        m = len(given)
        out = np.empty((m, self.columns), np.float32)
        padded, sums = np.empty((m, self.blocks * self.block), np.float32), np.empty((m, self.blocks), np.float32)
        self._call.pad(padded.ctypes.data, given.ctypes.data, m, self.k, padded.shape[1])
        for r in range(m if m < FEW else 0):
            self._call.block_sums(sums[r].ctypes.data, padded[r].ctypes.data, self.blocks, self.block)
        panels = -(-self.columns // PANEL)
        self._call.run(
            padded.ctypes.data, sums.ctypes.data, m, self._packed.ctypes.data, self.blocks, self.block, 0, panels, out.ctypes.data,
            self.columns,
        )  # fmt: skip
        return out.reshape(*x.shape[:-1], self.columns)
