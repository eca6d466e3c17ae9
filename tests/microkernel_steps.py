"""Steps with random tables, weights and data for the micro-kernels, run by a rung and by the numpy reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from graphopt.kernels import layout, quads, reference, windows
from graphopt.kernels.isa import RUNGS
from graphopt.kernels.microkernels import KernelSet, kernels
from graphopt.kernels.specialise import specialise

Array = np.ndarray[Any, Any]


def aligned(size: int) -> Array:
    """Zero bytes at a 64-byte boundary, with slack behind."""
    raw = np.zeros(size + layout.SLACK + 64, np.uint8)
    return raw[-raw.ctypes.data % 64 :]


def padded(values: Array, size: int) -> Array:
    out = np.zeros(size, values.dtype)
    out[: values.size] = values
    return out


@dataclass
class Step:
    """A row of a step, and the arrays that its addresses point into."""

    row: Array = field(default_factory=lambda: np.zeros(layout.ROW, np.int64))
    kept: list[Array] = field(default_factory=list)

    def put(self, slot: int, value: int | Array) -> None:
        if isinstance(value, np.ndarray):
            self.kept.append(value)
            value = value.ctypes.data
        self.row[slot] = value

    @property
    def address(self) -> int:
        return int(self.row.ctypes.data)


@dataclass
class Dense:
    """One dense case: sizes, and what the numbers are."""

    m: int
    k: int
    n: int
    mode: int = layout.MODE_U8
    zero: int = 7
    low: int = 0
    high: int = 255
    block: int = layout.PIXELS
    seed: int = 0
    zero_x: int = 3
    extreme: bool = False
    quads: bool = False  # panels of 4 channels, where the rung has windows, and three quarters of the weights zero


def table(offsets: Array, size: int) -> Array:
    return np.concatenate([offsets, np.full(size - offsets.size, offsets[-1])]).astype(np.int32)


def dense_numbers(case: Dense) -> dict[str, Array]:
    """Random data of a dense case. K is rounded to whole groups, N to whole panels, as the engine does."""
    rng = np.random.default_rng(case.seed)
    k, n = -(-case.k // 8) * 8, -(-case.n // 16) * 16
    w = np.zeros((n, k), np.int8)
    values = rng.choice([-128, 127], (case.n, case.k)) if case.extreme else rng.integers(-128, 128, (case.n, case.k))
    if case.quads:
        values *= np.kron(rng.random((-(-case.n // 4), case.k)) < 0.25, np.ones((4, 1), int))[: case.n]
    w[: case.n, : case.k] = values
    arena = rng.choice([0, 255], 20000) if case.extreme else rng.integers(0, 256, 20000)
    scale = (rng.uniform(0.2, 2, n) * 100 / max(1, np.sqrt(case.k) * 128 * 74)).astype(np.float32)
    scale[::5] = np.float32(1 / 128)  # exact halves
    return {
        "w": w,
        "arena": arena.astype(np.uint8),
        "pixels": rng.integers(0, 9000, case.m),
        "scale": scale,
        "bias": rng.integers(-5000, 5000, n).astype(np.int32),
        "float_bias": rng.normal(size=n).astype(np.float32),
        "residual": rng.integers(0, 256, (case.m, n)).astype(np.uint8),
        "sum": np.array([rng.uniform(0.2, 2), rng.uniform(0.2, 2), rng.uniform(-9, 9)], np.float32),
        "order": rng.permutation(case.m),
    }


def expected_dense(case: Dense, data: dict[str, Array], offsets: Array, unit: int) -> Array:
    w, n = data["w"], case.n
    bytes_ = (offsets[:, None] + np.arange(unit)).ravel()[: w.shape[1]]
    x = data["arena"][data["pixels"][:, None] + bytes_]
    acc = reference.dense(x, w, data["bias"] - case.zero_x * w.astype(np.int32).sum(1))
    if case.mode == layout.MODE_F32:
        return (acc.astype(np.float32) * data["scale"] + data["float_bias"])[:, :n]
    q = reference.requantise(acc, data["scale"], case.zero)
    if case.mode == layout.MODE_SUM:
        q = reference.add_residual(q, data["residual"], *data["sum"])
    clipped: Array = np.clip(q, case.low, case.high)[:, :n]
    return clipped


def _put_weights(ks: KernelSet, step: Step, w: Array, offsets: Array, narrow: bool) -> None:
    panels, groups = w.shape[0] // 16, w.shape[1] // 4
    if not RUNGS[ks.isa].windows:
        packed = aligned(ks.panel_bytes(groups) * panels)
        ks.pack_panels(packed.ctypes.data, w.ctypes.data, panels, groups)
        step.put(layout.CONV_WEIGHTS, packed)
        step.put(layout.CONV_PANEL, ks.panel_bytes(groups))
        return
    panels = 4 * panels if narrow else panels
    most = len(offsets) * panels * windows.MOST_GROUPS
    packed, entries = aligned(64 * most), np.zeros((most, 2), np.int32)
    firsts = np.zeros(panels * (1 if narrow else windows.SECTIONS) + 1, np.int32)
    addresses = [a.ctypes.data for a in (packed, entries, firsts)]
    if narrow:
        assert packer("pack_quads")(w.ctypes.data, len(offsets), panels, *addresses) == firsts[-1]
    else:
        room = aligned(len(offsets) * windows.MATCHED)
        assert packer("pack_windows")(w.ctypes.data, len(offsets), panels, *addresses, room.ctypes.data) == firsts[-1]
    step.put(layout.CONV_QUADS, int(narrow))
    entries[:, 0] = offsets[entries[:, 0]]
    step.put(layout.CONV_K, entries)
    step.put(layout.CONV_FIRSTS, firsts)
    step.put(layout.CONV_WEIGHTS, packed)


@cache
def packer(name: str) -> Any:
    """A template of windows or quads with its helpers, compiled."""
    scope: dict[str, Any] = {}
    for template in (*windows.TEMPLATES, *quads.TEMPLATES):
        scope[template.__name__] = specialise(template, "test", **scope)
    return scope[name]


def run_dense(rung: str, case: Dense, tiles: bool = False, split: int = 0) -> tuple[Array, Array]:
    """(what the kernel wrote, what it should have): u8 or float32 [M, N]."""
    ks, isa, data, step = kernels(rung), RUNGS[rung], dense_numbers(case), Step()
    unit = 64 if tiles else (16 if isa.windows else 4)
    width = -(-case.k // unit) * unit if unit > 4 else data["w"].shape[1]
    w = np.zeros((data["w"].shape[0], max(width, data["w"].shape[1])), np.int8)
    w[:, : data["w"].shape[1]] = data["w"]
    data["w"] = w
    n, groups = w.shape[0], w.shape[1] // unit
    rng = np.random.default_rng(case.seed + 1)
    offsets = rng.integers(0, 9000, groups).astype(np.int32)
    if tiles:  # rows of a tile are evenly spaced; the last tiles overlap
        starts = np.minimum(np.arange(-(-case.m // 32) * 2) * 16, max(case.m - 16, 0))
        data["pixels"] = np.arange(case.m) * 48
        order = (starts[:, None] + np.arange(16)).ravel()
        step.put(layout.CONV_TILES, (starts * 48).astype(np.int32))
        step.put(layout.CONV_ROW_PITCH, 48)
    else:
        order = table(np.arange(case.m), -(-case.m // layout.PIXELS) * layout.PIXELS)
    size = 4 if case.mode == layout.MODE_F32 else 1
    pitch = n * size + 16
    step.put(layout.CONV_INPUT, padded(data["arena"], 20000 + layout.SLACK))
    step.put(layout.CONV_PIXELS, table(data["pixels"], len(order)) if not tiles else offsets)
    step.put(layout.CONV_K, offsets)
    step.put(layout.CONV_GROUPS, groups)
    _put_weights(ks, step, w, offsets, case.quads)
    out = np.full((case.m + 32, pitch), 99, np.uint8)
    step.put(layout.CONV_OUTPUT, out)
    step.put(layout.CONV_OUT_PIXELS, (order * pitch).astype(np.int32))
    step.put(layout.CONV_COMP, data["bias"] - ((case.zero_x - ks.comp_adjust) * w.astype(np.int32).sum(1)).astype(np.int32))
    step.put(layout.CONV_SCALE, data["scale"])
    step.put(layout.CONV_BIAS, data["float_bias"])
    step.put(layout.CONV_RESIDUAL, data["residual"])
    # pixels of a tile behind the last are repeated, or never real
    step.put(layout.CONV_RES_PIXELS, (np.minimum(order, case.m - 1) * n).astype(np.int32))
    step.put(layout.CONV_SUM, data["sum"])
    for slot, value in (
        (layout.CONV_ZERO, case.zero),
        (layout.CONV_M, case.m),
        (layout.CONV_PANELS, n // 16),
        (layout.CONV_BLOCK, case.block),
        (layout.CONV_MODE, case.mode),
        (layout.CONV_LOW, case.low),
        (layout.CONV_HIGH, case.high),
        (layout.CONV_CHANNELS, case.n),
    ):
        step.put(slot, value)
    _execute(ks, step, case, tiles, split)
    wanted = expected_dense(case, data, offsets, unit)
    rows = out[: case.m, : case.n * size]
    got = np.ascontiguousarray(rows).view(np.float32) if size == 4 else rows
    assert (out[: case.m, n * size :] == 99).all(), "wrote behind the last panel"
    assert size == 1 or (out[: case.m, case.n * size :] == 99).all(), "wrote behind the last channel"
    assert isa.name == rung
    return got, wanted


def _execute(ks: KernelSet, step: Step, case: Dense, tiles: bool, split: int) -> None:
    if tiles:
        scratch = aligned(ks.scratch)
        pairs = -(-case.m // 32)
        ks.conv_amx(step.address, 0, min(split, pairs), scratch.ctypes.data)
        ks.conv_amx(step.address, min(split, pairs), pairs, scratch.ctypes.data)
        return
    if split < 0:
        ks.gemv(step.address, 0, 5)
        ks.gemv(step.address, 5, -(-case.n // 16))
        return
    middle = min(split * layout.PIXELS, case.m)
    ks.conv(step.address, 0, middle)
    ks.conv(step.address, middle, case.m)


def run_depthwise(
    rung: str, c: int, kernel: int, strides: tuple[int, int], oh: int, ow: int, seed: int = 0, bounds: tuple[int, int] = (0, 255)
) -> tuple[Array, Array]:
    """(what the kernel wrote, what it should have): u8 [OH, OW, C]."""
    ks, step, rng = kernels(rung), Step(), np.random.default_rng(seed)
    h, wide = (oh - 1) * strides[0] + kernel, (ow - 1) * strides[1] + kernel
    x = rng.integers(0, 256, (h, wide, c)).astype(np.uint8)
    w = rng.integers(-128, 128, (c, kernel, kernel)).astype(np.int8)
    bias = rng.integers(-5000, 5000, c).astype(np.int32)
    scale = (rng.uniform(0.2, 2, c) / 200 / kernel).astype(np.float32)
    scale[::5] = np.float32(1 / 128)
    zero = int(rng.choice([0, 7, 255]))
    arena = padded(x.ravel(), x.size + layout.SLACK)
    packed = aligned(ks.depthwise_bytes(c, kernel))
    ks.pack_depthwise(packed.ctypes.data, w.ctypes.data, c, kernel)
    comp = (bias + ks.comp_adjust * w.astype(np.int32).sum((1, 2))).astype(np.int32)
    channels = []
    for values in (comp, scale):
        channels.append(aligned(ks.channels_bytes(c)))
        ks.pack_channels(channels[-1].ctypes.data, values.ctypes.data, c)
    out = np.full((oh, ow * c + 16), 99, np.uint8)
    for slot, value in (
        (layout.DW_INPUT, arena),
        (layout.DW_ROW, wide * c),
        (layout.DW_C, c),
        (layout.DW_WEIGHTS, packed),
        (layout.DW_OUTPUT, out),
        (layout.DW_OUT_ROW, ow * c + 16),
        (layout.DW_OH, oh),
        (layout.DW_OW, ow),
        (layout.DW_COMP, channels[0]),
        (layout.DW_SCALE, channels[1]),
        (layout.DW_ZERO, zero),
        (layout.DW_KERNEL, kernel),
        (layout.DW_STRIDE, strides[0]),
        (layout.DW_ACROSS, strides[1]),
        (layout.DW_LOW, bounds[0]),
        (layout.DW_HIGH, bounds[1]),
    ):
        step.put(slot, value)
    chunks = -(-ow * c // ks.chunk)
    ks.depthwise(step.address, 0, chunks // 2)
    ks.depthwise(step.address, chunks // 2, chunks)
    assert (out[:, ow * c :] == 99).all(), "wrote behind the row"
    acc = reference.depthwise(x, w, bias, strides)
    return out[:, : ow * c].reshape(oh, ow, c), np.clip(reference.requantise(acc, scale, zero), *bounds)
