"""The INT8 kernels of a region, for one rung of graphopt.kernels.isa: `kernels(name)`.

All are Numba functions on int64 addresses that need neither Python nor Numba's runtime, so that they can also be compiled ahead of
time. The drivers below are templates: each rung gets its own copy, with its own micro-kernels in place of the names that are None
here. A copy is compiled when it is first called, so a rung that this CPU lacks costs nothing and harms nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from graphopt.kernels import layout, micro_tiles, packing
from graphopt.kernels.dialects import dialect
from graphopt.kernels.isa import RUNGS, Isa
from graphopt.kernels.layout import (
    CONV_BLOCK,
    CONV_CHANNELS,
    CONV_M,
    CONV_PANELS,
    CONV_QUADS,
    DW_ACROSS,
    DW_C,
    DW_INPUT,
    DW_KERNEL,
    DW_OW,
    DW_STRIDE,
)
from graphopt.kernels.memory import ld64
from graphopt.kernels.micro_conv import conv_quads, conv_tiles
from graphopt.kernels.micro_depthwise import depthwise_chunk
from graphopt.kernels.specialise import specialise

# set per rung
MOST, CHUNK, ABREAST = 1, 16, 4
tiles1: Any = None
tiles2: Any = None
tiles3: Any = None
tiles4: Any = None
single1: Any = None
single4: Any = None
half8: Any = None
quads2: Any = None
quads8: Any = None
gemv_panels: Any = None
begin: Any = None
end: Any = None
multiply1: Any = None
multiply2: Any = None
finish1: Any = None
finish2: Any = None
dw31: Any = None
dw32: Any = None
dw32_pieces: Any = None
dw51: Any = None
dw52: Any = None
dw52_pieces: Any = None


class KernelSet(NamedTuple):
    """The kernels of one rung. S: address of a row of graphopt.kernels.layout."""

    isa: str
    conv: Any  # (S, m0, m1): pixels [m0, m1), m0 a multiple of layout.PIXELS; the residual must not lie in the output
    gemv: Any  # (S, n0, n1): panels [n0, n1) of pixel 0
    conv_amx: Any  # (S, t0, t1, scratch): pairs of tiles; None where there are none
    depthwise: Any  # (S, c0, c1): chunks of the flat output row, of ceil(OW * C / chunk)
    pack_panels: Any  # (target, source s8 [panels * 16][groups * 4], panels, groups)
    panel_bytes: Any  # (groups) -> bytes of one panel; 0: weights come from windows.pack_windows instead
    pack_depthwise: Any  # (target, source s8 [C][k * k], C, k)
    depthwise_bytes: Any  # (C, k) -> bytes
    pack_channels: Any  # (target, source of 4-byte elements [C], C): comp and scale of a depthwise step
    channels_bytes: Any  # (C) -> bytes
    comp_adjust: int  # comp = bias - (zero - comp_adjust) * sum of weights; depthwise too
    chunk: int  # bytes of a depthwise chunk
    dw_min_row: int  # smallest OW * C of a depthwise step
    scratch: int  # bytes of scratch, 64-byte aligned, of each thread in conv_amx; 0 where there is none


def gemv(S: int, n0: int, n1: int) -> None:
    """Panels [n0, n1) of the first pixel: weights are read once, four panels abreast."""
    n = n0
    while n + ABREAST <= n1:
        single4(S, n, 0, 1)
        n += ABREAST
    while n < n1:
        single1(S, n, 0, 1)
        n += 1


def conv(S: int, m0: int, m1: int) -> None:
    """Blocks of pixels, each run through all panels, in groups of panels as equal as can be."""
    panels, block = ld64(S + 8 * CONV_PANELS), max(1, ld64(S + 8 * CONV_BLOCK))  # a step of range() that may be 0 can raise
    if ld64(S + 8 * CONV_M) == 1:
        if m0 < m1:
            gemv_panels(S, 0, panels)
        return
    count = (panels + MOST - 1) // MOST
    base, extra = panels // count, panels % count
    for start in range(m0, m1, block):
        stop = min(m1, start + block)
        n = 0
        for i in range(count):
            wide = base + (1 if i < extra else 0)
            if wide == 4:
                tiles4(S, n, start, stop)
            elif wide == 3:
                tiles3(S, n, start, stop)
            elif wide == 2:
                tiles2(S, n, start, stop)
            else:
                tiles1(S, n, start, stop)
            n += wide


def gemv_windows(S: int, n0: int, n1: int) -> None:
    """As `gemv`, where panels may be of 4 channels."""
    for n in range(n0, n1):
        if ld64(S + 8 * CONV_QUADS) == 1:
            quads2(S, n, 0, 1)
        else:
            single1(S, n, 0, 1)


def conv_windows(S: int, m0: int, m1: int) -> None:
    """As `conv`, panel by panel; a last panel of at most 8 channels is done by halves. Or with panels of 4 channels."""
    panels, block = ld64(S + 8 * CONV_PANELS), max(1, ld64(S + 8 * CONV_BLOCK))
    whole = panels
    if ld64(S + 8 * CONV_M) > 1 and panels * 16 - ld64(S + 8 * CONV_CHANNELS) >= 8:
        whole -= 1
    for start in range(m0, m1, block):
        stop = min(m1, start + block)
        rest = (stop - start) % 4
        tail = stop - rest if rest < 3 else stop
        if ld64(S + 8 * CONV_QUADS) == 1:
            eights = start + (stop - start) // 8 * 8
            for n in range(panels):
                quads8(S, n, start, eights)
                quads2(S, n, eights, stop)
            continue
        for n in range(whole):
            tiles1(S, n, start, tail)
            single1(S, n, tail, stop)
        if whole < panels:
            half8(S, whole, start, stop)


def conv_amx(S: int, t0: int, t1: int, scratch: int) -> None:
    """Pairs of tiles [t0, t1): panels two by two, then the odd one. Two scratch blocks take turns."""
    panels, block = ld64(S + 8 * CONV_PANELS), max(1, ld64(S + 8 * CONV_BLOCK) // 32)
    even = panels // 2 * 2
    if t0 >= t1:
        return
    begin(scratch)
    now, old, old_panel, old_pair = scratch, 0, 0, 0
    for start in range(t0, t1, block):
        for n in range(0, even, 2):
            for t in range(start, min(t1, start + block)):
                multiply2(S, n, t, now, scratch, old_panel, old_pair, old)
                old, old_panel, old_pair = now, n, t
                now = 2 * scratch + 4096 - now
    if old != 0:
        finish2(S, old_panel, old_pair, old)
        old = 0
    if even < panels:
        for t in range(t0, t1):
            multiply1(S, even, t, now, scratch, even, old_pair, old)
            old, old_pair = now, t
            now = 2 * scratch + 4096 - now
        finish1(S, even, old_pair, old)
    end()


def depthwise(S: int, c0: int, c1: int) -> None:
    """Chunks [c0, c1) of the flat output row, all rows; the last chunk ends where the row does."""
    start, channels, stride = ld64(S + 8 * DW_INPUT), ld64(S + 8 * DW_C), ld64(S + 8 * DW_STRIDE)
    five, wide = ld64(S + 8 * DW_KERNEL) == 5, ld64(S + 8 * DW_ACROSS) > 1
    last = ld64(S + 8 * DW_OW) * channels - CHUNK
    for chunk in range(c0, c1):
        o = min(chunk * CHUNK, last)
        # in strides of 2 output pixel x starts at 2 x pixels of the input: x * channels bytes further than in the output
        a0 = start + o + (o // channels * channels if wide else 0)
        if stride == 1:
            if five:
                dw51(S, o, a0, 0, 0, 0)
            else:
                dw31(S, o, a0, 0, 0, 0)
            continue
        if not wide or channels % CHUNK == 0:
            if five:
                dw52(S, o, a0, 0, 0, 0)
            else:
                dw32(S, o, a0, 0, 0, 0)
            continue
        a1 = start + o + 16 + (o + 16) // channels * channels
        a2 = start + o + 32 + (o + 32) // channels * channels
        a3 = start + o + 48 + (o + 48) // channels * channels
        if five:
            dw52_pieces(S, o, a0, a1, a2, a3)
        else:
            dw32_pieces(S, o, a0, a1, a2, a3)


@cache
def _packers(pairs: bool, lanes: int) -> dict[str, Any]:
    """The packers of a family; they are the same for every rung of it with as many lanes."""
    family = "pairs" if pairs else "quads"

    def make(name: str, **scope: Any) -> Any:
        return specialise(getattr(packing, name), f"{family}{lanes}", LANES=lanes, **scope)

    scope = {name: make(name) for name in ("signed_byte", "channels_bytes", "channel_of")}
    names = ("pack_panels", "panel_bytes", "pack_depthwise", "depthwise_bytes")
    made = {name: make(f"{name}_{family}", **scope) for name in names}
    return {**made, "pack_channels": make("pack_channels", **scope), "channels_bytes": scope["channels_bytes"]}


def _conv(isa: Isa) -> dict[str, Any]:
    d = dialect(isa)
    if isa.windows:
        one = conv_tiles(d, 1, 1)
        scope = {"tiles1": conv_tiles(d, isa.gemm[0], 1), "single1": one, "half8": conv_tiles(d, 8, 1, True)}
        quads = {f"quads{pixels}": conv_quads(d, pixels) for pixels in (2, 8)}
        scope |= quads
        vector = specialise(gemv_windows, isa.name, single1=one, quads2=quads["quads2"])
        return {"gemv": vector, "conv": specialise(conv_windows, isa.name, **scope)}
    sizes = dict(enumerate(isa.gemm, 1))
    wide = {f"tiles{n}": conv_tiles(d, sizes[n], n) if n in sizes else None for n in (1, 2, 3, 4)}
    # a rung without some widths never asks for them, but its copy of the driver must compile
    wide = {name: made or wide["tiles1"] for name, made in wide.items()}
    vector = specialise(gemv, isa.name, single1=conv_tiles(d, 1, 1), single4=conv_tiles(d, 1, 4))
    return {"gemv": vector, "conv": specialise(conv, isa.name, MOST=len(isa.gemm), gemv_panels=vector, **wide)}


def _tiles(isa: Isa) -> Any:
    d = dialect(isa)
    scope = {f"multiply{n}": micro_tiles.tile_multiply(d, n) for n in (1, 2)}
    scope |= {f"finish{n}": micro_tiles.tile_finish(d, n) for n in (1, 2)}
    return specialise(conv_amx, isa.name, begin=micro_tiles.tile_begin(d), end=micro_tiles.tile_end(d), **scope)


def _depthwise(isa: Isa) -> Any:
    d = dialect(isa)
    scope = {f"dw{k}{s}": depthwise_chunk(d, k, s, True) for k in (3, 5) for s in (1, 2)}
    for k in (3, 5):
        scope[f"dw{k}2_pieces"] = depthwise_chunk(d, k, 2, False)
    return specialise(depthwise, isa.name, CHUNK=isa.chunk, **scope)


def _no_panels(isa: Isa) -> dict[str, Any]:
    return {"panel_bytes": specialise(packing.panel_bytes_windows, isa.name)} if isa.windows else {}


@cache
def kernels(name: str) -> KernelSet:
    """The kernels of a rung; nothing is compiled before it is called."""
    isa = RUNGS[name]
    assert all(layout.PIXELS % pixels == 0 for pixels in isa.gemm)
    scratch = (micro_tiles.SOFT_SCRATCH if isa.soft else micro_tiles.SCRATCH) if isa.tiles else 0
    return KernelSet(
        isa=name,
        conv_amx=_tiles(isa) if isa.tiles else None,
        depthwise=_depthwise(isa),
        comp_adjust=isa.comp_adjust,
        chunk=isa.chunk,
        dw_min_row=isa.chunk,
        scratch=scratch,
        **_conv(isa),
        **{**_packers(dialect(isa).pairs, isa.lanes), **_no_panels(isa)},
    )
