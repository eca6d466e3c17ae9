"""The dense micro-kernel on matrix tiles (AMX): 32 pixels x 1 or 2 panels of 16 channels, K in groups of 64 bytes.

The epilogue of the block before runs between this block's multiplications and its stores: the tile unit works while the vector
units requantise. Tiles 0-3 accumulate, 4-5 hold pixels, 6-7 weights. A soft rung keeps the tiles in memory behind the scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from graphopt.kernels import layout
from graphopt.kernels.dialects import Dialect
from graphopt.kernels.micro_conv import Tile, epilogue
from graphopt.kernels.vectors import (
    I8,
    I32,
    I64,
    Builder,
    Value,
    call,
    const,
    load,
    load_index,
    local,
    loop,
    pointer,
    procedure,
    scaled,
    store,
    vector,
)

PIXELS = 32  # of a pair of tiles
BLOCK = 4096  # bytes of a block's accumulators: int32 [32][32]
SCRATCH = 3 * BLOCK  # two blocks in turn, and the configuration of the tiles
SOFT_SCRATCH = 6 * BLOCK  # and the tiles themselves
_STEP = 8  # pixels of one turn of the epilogue's loop
_VOID = ir.VoidType()


class Tiles:
    """Instructions on tiles, or calls of functions that do the same to tiles in memory at `file`."""

    def __init__(self, b: Builder, soft: bool, file: Value) -> None:
        self.b, self.soft, self.file = b, soft, file

    def at(self, tile: int) -> Value:
        return self.b.add(self.file, const(1024 * tile))

    def read(self, tile: int, address: Value, stride: Value) -> None:
        """16 rows of 64 bytes, `stride` bytes apart."""
        if self.soft:
            self.b.call(local(self.b, "soft_tile_copy", [I64] * 4, _VOID, _soft_copy), [self.at(tile), const(64), address, stride])
        else:
            call(self.b, "llvm.x86.tileloadd64", _VOID, [const(tile, I8), pointer(self.b, address), stride])

    def write(self, tile: int, address: Value, stride: Value) -> None:
        if self.soft:
            self.b.call(local(self.b, "soft_tile_copy", [I64] * 4, _VOID, _soft_copy), [address, stride, self.at(tile), const(64)])
        else:
            call(self.b, "llvm.x86.tilestored64", _VOID, [const(tile, I8), pointer(self.b, address), stride])

    def multiply(self, acc: int, x: int, w: int) -> None:
        """acc [16][16] int32 += x u8 [16][16][4] * w s8 [16][16][4]."""
        if self.soft:
            self.b.call(local(self.b, "soft_tdpbusd", [I64] * 3, _VOID, _soft_multiply), [self.at(acc), self.at(x), self.at(w)])
        else:
            call(self.b, "llvm.x86.tdpbusd", _VOID, [const(tile, I8) for tile in (acc, x, w)])


def _soft_copy(b: Builder, target: Value, to: Value, source: Value, by: Value) -> None:
    def body(row: Value, _: list[Value]) -> list[Value]:
        for part in range(0, 64, 16):
            store(b, load(b, b.add(source, b.mul(row, by)), vector(I8, 16), part), b.add(target, b.mul(row, to)), part)
        return []

    loop(b, const(0), const(16), 1, [], body)


def _soft_multiply(b: Builder, acc: Value, x: Value, w: Value) -> None:
    def cell(index: Value, _: list[Value]) -> list[Value]:
        row, column = b.udiv(index, const(16)), b.urem(index, const(16))

        def tap(k: Value, total: list[Value]) -> list[Value]:
            left = b.zext(load(b, b.add(scaled(b, x, row, 64), k), I8), I32)
            at = scaled(b, scaled(b, w, b.udiv(k, const(4)), 64), column, 4)
            right = b.sext(load(b, b.add(at, b.urem(k, const(4))), I8), I32)
            return [b.add(total[0], b.mul(left, right))]

        at = scaled(b, acc, index, 4)
        store(b, loop(b, const(0), const(64), 1, [load(b, at, I32)], tap)[0], at)
        return []

    loop(b, const(0), const(256), 1, [], cell)


def _epilogue(d: Dialect, panels: int) -> Callable[..., None]:
    """(S, panel, pair, block): requantise and store a block of accumulators in memory."""

    def emit(b: Builder, row: Value, panel: Value, pair: Value, block: Value) -> None:
        tile = Tile(d, row, panel, _STEP, panels)

        def body(pixel: Value, _: list[Value]) -> list[Value]:
            at = scaled(b, block, pixel, 64 * panels)

            def acc(r: int, j: int) -> Value:
                return load(b, at, d.i32, (r * panels + j) * 64)

            epilogue(b, tile, acc, scaled(b, pixel, pair, PIXELS))
            return []

        loop(b, const(0), const(PIXELS), _STEP, [], body)

    return emit


def _local_epilogue(b: Builder, d: Dialect, panels: int) -> Any:
    return local(b, f"graphopt_tiles_out_{d.isa.name}_{panels}", [I64] * 4, _VOID, _epilogue(d, panels))


def tile_multiply(d: Dialect, panels: int) -> Any:
    """void(S, panel, pair, block, scratch, panel', pair', block'): multiply, finish the block before (none: block' is 0), store."""

    def emit(b: Builder, row: Value, panel: Value, pair: Value, block: Value, scratch: Value, *before: Value) -> None:
        tile = Tile(d, row, panel, PIXELS, panels)
        tiles = Tiles(b, d.isa.soft, b.add(scratch, const(SCRATCH)))
        comp = scaled(b, tile.field(b, layout.CONV_COMP), panel, 64)
        for j in range(panels):
            for i in range(2):
                tiles.read(2 * i + j, b.add(comp, const(64 * j)), const(0))
        bases = scaled(b, tile.field(b, layout.CONV_TILES), pair, 8)
        start, pitch = tile.field(b, layout.CONV_INPUT), tile.field(b, layout.CONV_ROW_PITCH)
        inputs = [b.add(start, load_index(b, bases, 4 * i)) for i in range(2)]
        stride, offsets = tile.field(b, layout.CONV_PANEL), tile.field(b, layout.CONV_K)
        first = b.add(tile.field(b, layout.CONV_WEIGHTS), b.mul(panel, stride))
        weights = [b.add(first, b.mul(stride, const(j))) for j in range(panels)]

        def body(group: Value, _: list[Value]) -> list[Value]:
            offset = load_index(b, scaled(b, offsets, group, 4))
            for j in range(panels):
                tiles.read(6 + j, scaled(b, weights[j], group, 1024), const(64))
            for i in range(2):
                tiles.read(4 + i, b.add(inputs[i], offset), pitch)
                for j in range(panels):
                    tiles.multiply(2 * i + j, 4 + i, 6 + j)
            return []

        loop(b, const(0), tile.field(b, layout.CONV_GROUPS), 1, [], body)
        with b.if_then(b.icmp_signed("!=", before[2], const(0))):
            b.call(_local_epilogue(b, d, panels), [row, *before])
        for i in range(2):
            for j in range(panels):
                tiles.write(2 * i + j, b.add(block, const((16 * i * panels + j) * 64)), const(64 * panels))

    return procedure(f"graphopt_tiles_{d.isa.name}_{panels}", 8, emit)


def tile_finish(d: Dialect, panels: int) -> Any:
    """void(S, panel, pair, block): the epilogue of the last block."""

    def emit(b: Builder, row: Value, panel: Value, pair: Value, block: Value) -> None:
        b.call(_local_epilogue(b, d, panels), [row, panel, pair, block])

    return procedure(f"graphopt_tiles_last_{d.isa.name}_{panels}", 4, emit)


def tile_begin(d: Dialect) -> Any:
    """void(scratch): configure 8 tiles of 16 rows x 64 bytes."""

    def emit(b: Builder, scratch: Value) -> None:
        at = b.add(scratch, const(2 * BLOCK))
        store(b, const(0, vector(I8, 64)), at)
        store(b, const(1, I8), at)
        store(b, const(64, vector(ir.IntType(16), 8)), at, 16)
        store(b, const(16, vector(I8, 8)), at, 48)
        if not d.isa.soft:
            call(b, "llvm.x86.ldtilecfg", _VOID, [pointer(b, at)])

    return procedure(f"graphopt_tiles_begin_{d.isa.name}", 1, emit)


def tile_end(d: Dialect) -> Any:
    """void(): give the tile state back; otherwise the kernel saves 8 KB at each switch."""

    def emit(b: Builder) -> None:
        if not d.isa.soft:
            call(b, "llvm.x86.tilerelease", _VOID, [])

    return procedure(f"graphopt_tiles_end_{d.isa.name}", 0, emit)
