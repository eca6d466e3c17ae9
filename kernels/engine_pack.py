"""Weights of a checked plan, laid out for the instruction set: once, when the session is created."""

from __future__ import annotations

import numpy as np

from graphopt.kernels.abi import call1, call2, call3, call4
from graphopt.kernels.engine_check import weight_of
from graphopt.kernels.engine_state import (
    H_CHANNELS_BYTES,
    H_DEPTHWISE_BYTES,
    H_PACK_CHANNELS,
    H_PACK_DEPTHWISE,
    H_PACK_PANELS,
    H_PANEL_BYTES,
    H_SIGNED,
    H_STEPS,
    H_TENSORS,
    H_TILES,
    R_DATA,
    R_DIMS,
    T_CHANNELS,
    T_PITCH,
    T_WRITTEN,
    bias_of,
    constant_at,
    elements,
    get,
    own,
    put,
    scale_at,
    step_at,
    tensor_at,
    zero_of,
)
from graphopt.kernels.memory import copy, fill, free, ldf, lds8, malloc, st32, stf, stu8
from graphopt.kernels.plan import CONV, IOHW, KN
from graphopt.kernels.quads import pack_best
from graphopt.kernels.windows import MATCHED, MOST_GROUPS, WINDOW
from graphopt.kernels.windows import TEMPLATES as WINDOWS

# a packed convolution: how it runs, and one part for each group and each phase of a transposed one
P_VARIANT = 0
P_COUNT = 1
P_PARTS = 2
P_WEIGHTS, P_COMP, P_SCALE = 3, 4, 5  # depthwise, fast kernel
P_ANY_WEIGHTS, P_ANY_COMP, P_ANY_SCALE, P_TAPS = 6, 7, 8, 9  # depthwise, any kernel; (dy, dx) of each tap as int32
PACKED = 10
DENSE, DEPTHWISE_FAST, DEPTHWISE_ANY = 1, 2, 3

S_WEIGHTS, S_PANEL, S_GROUPS, S_COMP, S_SCALE, S_PANELS = range(6)
S_OFFSETS = 6  # int32 [groups][3]: rows, columns and bytes to go for each group of 4 input bytes
S_PHASE_Y, S_PHASE_X = 7, 8
S_FIRST_IN, S_FIRST_OUT, S_CHANNELS = 9, 10, 11  # channel ranges of a group
S_BIAS = 12  # float32 [panels * 16], or 0
S_FIRSTS = 17  # windows: int32 [panels * SECTIONS + 1]; S_ENTRIES: int32 [groups][2]; S_OFFSETS is of windows then
S_ENTRIES = 18
S_QUADS = 19  # 1: these are of panels of 4 channels
S_TILE_WEIGHTS, S_TILE_PANEL, S_TILE_GROUPS, S_TILE_OFFSETS = 13, 14, 15, 16  # the same for tiles (AMX), 0 groups: not used
PART = 20


def tap_reach(s: int, phase: int, tap: int, vertical: bool) -> int:
    """How many input rows (columns) from the window's first a tap lies; -(1 << 30) where the phase does not meet it."""
    pad, stride, dilation = (get(s, 13), get(s, 9), get(s, 11)) if vertical else (get(s, 14), get(s, 10), get(s, 12))
    if get(s, 18) != IOHW:
        return tap * dilation
    distance = phase + pad - tap * dilation
    if distance % stride != 0:
        return -(1 << 30)
    return distance // stride


def take_tap(
    handle: int, s: int, part: int, wk: int, width: int, place: int, tap: int, byte: int, per: int, outs: int, span: int
) -> None:
    """Copy the weights of `span` input channels of a tap to bytes place.. of every row of the K-major matrix."""
    data = get(constant_at(handle, get(s, 4)), R_DATA)
    for n in range(get(part, S_CHANNELS)):
        row = wk + n * width + place
        for c in range(span):
            stu8(row + c, weight_of(s, data, get(part, S_FIRST_OUT) + n, byte + c, per, outs, tap))


def list_groups(
    handle: int, s: int, part: int, offsets: int, wk: int, width: int, unit: int, fused: bool, per: int, outs: int
) -> int:
    """Walk the groups of `unit` input bytes of a part; returns their number. With `offsets` and `wk` they are also written.

    `fused`: taps of one kernel row are neighbours in memory, so a group may run over them (one channel; or tiles).
    """
    pitch = get(tensor_at(handle, get(s, 1)), T_PITCH)
    count = 0
    for kh in range(get(s, 7)):
        dy = tap_reach(s, get(part, S_PHASE_Y), kh, True)
        if dy == -(1 << 30):
            continue
        if fused:
            run = get(s, 8) * pitch
            for start in range(0, run, max(1, unit)):
                if offsets != 0:
                    put_offset(offsets, count, dy, 0, start)
                    for kw in range(get(s, 8)):
                        for c in range(per):
                            byte = kw * pitch + c
                            if start <= byte and byte < start + unit:
                                take_tap(
                                    handle, s, part, wk, width, count * unit + byte - start, kh * get(s, 8) + kw, c, per, outs, 1
                                )
                count += 1
            continue
        for kw in range(get(s, 8)):
            dx = tap_reach(s, get(part, S_PHASE_X), kw, False)
            if dx == -(1 << 30):
                continue
            for start in range(0, per, max(1, unit)):
                if offsets != 0:
                    put_offset(offsets, count, dy, dx, get(part, S_FIRST_IN) + start)
                    span = min(unit, per - start)
                    take_tap(handle, s, part, wk, width, count * unit, kh * get(s, 8) + kw, start, per, outs, span)
                count += 1
    return count


def put_offset(offsets: int, index: int, dy: int, dx: int, byte: int) -> None:
    st32(offsets + 12 * index, dy)
    st32(offsets + 12 * index + 4, dx)
    st32(offsets + 12 * index + 8, byte)


def pack_part(handle: int, s: int, part: int, per: int, outs: int) -> int:
    """Weights, offsets, comp and scale of one part; 0 where memory runs out."""
    pitch = get(tensor_at(handle, get(s, 1)), T_PITCH)
    ordinary = get(s, 18) != IOHW and get(s, 17) == 1 and get(s, 12) == 1
    if call1(get(handle, H_PANEL_BYTES), 1) == 0:
        return pack_part_windows(handle, s, part, per, outs, ordinary and pitch < 16)
    fused = ordinary and pitch == 1
    count = list_groups(handle, s, part, 0, 0, 0, 4, fused, per, outs)
    groups = max(2, (count + 1) // 2 * 2)
    panels = (get(part, S_CHANNELS) + 15) // 16
    width = groups * 4
    offsets = own(handle, groups * 12)
    weights = own(handle, panels * call1(get(handle, H_PANEL_BYTES), groups) + 256)
    wk = malloc(panels * 16 * width + 64)
    if wk == 0 or offsets == 0 or weights == 0:
        free(wk)
        return 0
    fill(wk, 0, panels * 16 * width)
    fill(offsets, 0, groups * 12)
    list_groups(handle, s, part, offsets, wk, width, 4, fused, per, outs)
    if count > 0:
        for g in range(count, groups):
            copy(offsets + 12 * g, offsets + 12 * (count - 1), 12)
    call4(get(handle, H_PACK_PANELS), weights, wk, panels, groups)
    put(part, S_WEIGHTS, weights)
    put(part, S_PANEL, call1(get(handle, H_PANEL_BYTES), groups))
    put(part, S_GROUPS, groups)
    put(part, S_PANELS, panels)
    put(part, S_OFFSETS, offsets)
    done = pack_numbers(handle, s, part, wk, width)
    free(wk)
    if get(handle, H_TILES) != 0 and done != 0:
        return pack_tiles(handle, s, part, per, outs, ordinary)
    return done


def pack_part_windows(handle: int, s: int, part: int, per: int, outs: int, fused: bool) -> int:
    """As `pack_part`, where groups are picked from windows of 16 bytes."""
    count = max(1, list_groups(handle, s, part, 0, 0, 0, WINDOW, fused, per, outs))
    panels = (get(part, S_CHANNELS) + 15) // 16
    width, most = count * WINDOW, count * MOST_GROUPS * panels
    offsets, entries, firsts = own(handle, count * 12), own(handle, most * 32), own(handle, 16 * panels + 4)
    weights = own(handle, most * 64 + 256)
    wk = malloc(panels * 16 * width + 64 + count * MATCHED)
    if wk == 0 or offsets == 0 or entries == 0 or firsts == 0 or weights == 0:
        free(wk)
        return 0
    fill(wk, 0, panels * 16 * width)
    fill(offsets, 0, count * 12)
    list_groups(handle, s, part, offsets, wk, width, WINDOW, fused, per, outs)
    found = pack_best(wk, count, panels, weights, entries, firsts, wk + panels * 16 * width)
    put(part, S_GROUPS, abs(found))
    put(part, S_QUADS, 1 if found < 0 else 0)
    put(part, S_WEIGHTS, weights)
    put(part, S_PANELS, panels)
    put(part, S_OFFSETS, offsets)
    put(part, S_ENTRIES, entries)
    put(part, S_FIRSTS, firsts)
    done = pack_numbers(handle, s, part, wk, width)
    free(wk)
    return done


def pack_tiles(handle: int, s: int, part: int, per: int, outs: int, ordinary: bool) -> int:
    """The same weights in groups of 64 input bytes, where tiles do not mostly multiply zeros."""
    count = list_groups(handle, s, part, 0, 0, 0, 64, False, per, outs)
    fused = ordinary and list_groups(handle, s, part, 0, 0, 0, 64, True, per, outs) < count
    if fused:
        count = list_groups(handle, s, part, 0, 0, 0, 64, True, per, outs)
    real = get(part, S_GROUPS) * 4
    put(part, S_TILE_GROUPS, 0)
    if count < 2 or real * 2 < count * 64:
        return 1
    panels = get(part, S_PANELS)
    width = count * 64
    offsets = own(handle, count * 12)
    weights = own(handle, panels * 16 * width + 256)
    wk = malloc(panels * 16 * width + 64)
    if wk == 0 or offsets == 0 or weights == 0:
        free(wk)
        return 0
    fill(wk, 0, panels * 16 * width)
    list_groups(handle, s, part, offsets, wk, width, 64, fused, per, outs)
    call4(get(handle, H_PACK_PANELS), weights, wk, panels, count * 16)
    free(wk)
    put(part, S_TILE_WEIGHTS, weights)
    put(part, S_TILE_PANEL, count * 1024)
    put(part, S_TILE_GROUPS, count)
    put(part, S_TILE_OFFSETS, offsets)
    return 1


def pack_numbers(handle: int, s: int, part: int, wk: int, width: int) -> int:
    """comp (int32), scale and float bias (float32) of a part, padded with zeros to whole panels."""
    padded = get(part, S_PANELS) * 16
    comp, scale, bias = own(handle, padded * 4 + 64), own(handle, padded * 4 + 64), own(handle, padded * 4 + 64)
    if comp == 0 or scale == 0 or bias == 0:
        return 0
    fill(comp, 0, padded * 4)
    fill(scale, 0, padded * 4)
    fill(bias, 0, padded * 4)
    for n in range(get(part, S_CHANNELS)):
        total = 0
        for k in range(width):
            total += lds8(wk + n * width + k)
        oc = get(part, S_FIRST_OUT) + n
        st32(comp + 4 * n, bias_of(handle, s, oc) - (zero_of(handle, s) - get(handle, H_SIGNED)) * total)
        put_multiplier(handle, s, oc, scale + 4 * n)
        if get(s, 3) < 0 and get(s, 27) >= 0:
            stf(bias + 4 * n, ldf(get(constant_at(handle, get(s, 27)), R_DATA) + 4 * oc))
    put(part, S_COMP, comp)
    put(part, S_SCALE, scale)
    put(part, S_BIAS, bias)
    return 1


def put_multiplier(handle: int, s: int, oc: int, target: int) -> None:
    """(sx * sw) / sy, or sx * sw for float output, each rounded to float32 as onnxruntime does."""
    scales = constant_at(handle, get(s, 5))
    scale = ldf(get(scales, R_DATA) + (4 * oc if elements(scales) > 1 else 0))
    product = np.float32(scale_at(handle, get(s, 21)) * scale)
    stf(target, product if get(s, 3) < 0 else np.float32(product / scale_at(handle, get(s, 21) + 1)))


def pack_depthwise_step(handle: int, s: int, packed: int, fast: bool) -> int:
    """Depthwise weights for the general kernel, and for the fast one where it fits."""
    taps = get(s, 7) * get(s, 8)
    pitch = get(tensor_at(handle, get(s, 1)), T_PITCH)
    channels = get(tensor_at(handle, get(s, 1)), T_CHANNELS)
    data = get(constant_at(handle, get(s, 4)), R_DATA)
    plain, rows = own(handle, taps * pitch + 64), own(handle, taps * pitch + 64)
    comp, plain_comp, scale = own(handle, pitch * 4 + 64), own(handle, pitch * 4 + 64), own(handle, pitch * 4 + 64)
    places = own(handle, taps * 8)
    if plain == 0 or rows == 0 or comp == 0 or plain_comp == 0 or scale == 0 or places == 0:
        return 0
    for block in (plain, rows):
        fill(block, 0, taps * pitch)
    for block in (comp, plain_comp, scale):
        fill(block, 0, pitch * 4)
    for c in range(channels):
        total = 0
        for t in range(taps):
            w = lds8(data + c * taps + t)
            total += w
            stu8(plain + t * pitch + c, w)
            stu8(rows + c * taps + t, w)
        st32(plain_comp + 4 * c, bias_of(handle, s, c) - zero_of(handle, s) * total)
        st32(comp + 4 * c, bias_of(handle, s, c) - (zero_of(handle, s) - get(handle, H_SIGNED)) * total)
        put_multiplier(handle, s, c, scale + 4 * c)
    for t in range(taps):
        st32(places + 8 * t, t // get(s, 8) * get(s, 11))
        st32(places + 8 * t + 4, t % get(s, 8) * get(s, 12))
    put(packed, P_ANY_WEIGHTS, plain)
    put(packed, P_ANY_COMP, plain_comp)
    put(packed, P_ANY_SCALE, scale)
    put(packed, P_TAPS, places)
    if not fast:
        return 1
    k = get(s, 7)
    weights = own(handle, call2(get(handle, H_DEPTHWISE_BYTES), pitch, k) + 256)
    size = call1(get(handle, H_CHANNELS_BYTES), pitch) + 256
    comp_laid, scale_laid = own(handle, size), own(handle, size)
    if weights == 0 or comp_laid == 0 or scale_laid == 0:
        return 0
    call4(get(handle, H_PACK_DEPTHWISE), weights, rows, pitch, k)
    call3(get(handle, H_PACK_CHANNELS), comp_laid, comp, pitch)
    call3(get(handle, H_PACK_CHANNELS), scale_laid, scale, pitch)
    put(packed, P_WEIGHTS, weights)
    put(packed, P_COMP, comp_laid)
    put(packed, P_SCALE, scale_laid)
    return 1


def depthwise_variant(handle: int, s: int, per: int, outs: int) -> int:
    """DEPTHWISE_FAST, DEPTHWISE_ANY, or DENSE where the convolution is not depthwise (or sums a residual)."""
    x = tensor_at(handle, get(s, 1))
    if get(s, 17) == 1 or per != 1 or outs != get(s, 17) or get(s, 18) == IOHW or get(s, 2) >= 0 or get(x, T_PITCH) < 16:
        return DENSE
    k, stride = get(s, 7), get(s, 9)
    square = get(s, 8) == k and get(s, 11) == 1 and get(s, 12) == 1
    steps = (get(s, 10) == stride or get(s, 10) == 1) and (stride == 1 or stride == 2)  # both alike, or by rows only
    if square and (k == 3 or k == 5) and steps:
        return DEPTHWISE_FAST
    return DEPTHWISE_ANY


def pack_step(handle: int, s: int, per: int, outs: int) -> int:
    """The packed record of a convolution; 0 where memory runs out."""
    packed = own(handle, 8 * PACKED)
    if packed == 0:
        return 0
    fill(packed, 0, 8 * PACKED)
    variant = depthwise_variant(handle, s, per, outs)
    put(packed, P_VARIANT, variant)
    if variant != DENSE:
        return packed if pack_depthwise_step(handle, s, packed, variant == DEPTHWISE_FAST) != 0 else 0
    groups = get(s, 17)
    phases_y, phases_x = (get(s, 9), get(s, 10)) if get(s, 18) == IOHW else (1, 1)
    count = groups * phases_y * phases_x
    parts = own(handle, 8 * PART * count)
    if parts == 0:
        return 0
    fill(parts, 0, 8 * PART * count)
    for index in range(count):
        part = parts + 8 * PART * index
        phase = index // groups
        put(part, S_PHASE_Y, phase // phases_x)
        put(part, S_PHASE_X, phase % phases_x)
        put(part, S_FIRST_IN, index % groups * per)
        put(part, S_FIRST_OUT, index % groups * (outs // groups))
        put(part, S_CHANNELS, outs // groups)
        if pack_part(handle, s, part, per, outs) == 0:
            return 0
    put(packed, P_COUNT, count)
    put(packed, P_PARTS, parts)
    return packed


def weight_channels(handle: int, s: int, outputs: bool) -> int:
    """Output channels, or input channels of a group, of a checked convolution's weight."""
    record = constant_at(handle, get(s, 4))
    first, second, groups = get(record, R_DIMS), get(record, R_DIMS + 1), get(s, 17)
    if get(s, 18) == KN:
        return second if outputs else first
    if get(s, 18) == IOHW:
        return second * groups if outputs else first // groups
    return first if outputs else second


def set_pitches(handle: int) -> None:
    """Bytes between pixels: 1 or 4 for the few channels of an input, else a multiple of 16 (with room for the last vectors)."""
    for t in range(get(handle, H_TENSORS)):
        tensor = tensor_at(handle, t)
        channels = get(tensor, T_CHANNELS)
        pitch = (channels + 15) // 16 * 16
        if get(tensor, T_WRITTEN) == 1 and channels <= 4:
            pitch = 1 if channels == 1 else 4
        put(tensor, T_PITCH, pitch)
    for i in range(get(handle, H_STEPS)):
        s = step_at(handle, i)
        if get(s, 0) != CONV or get(s, 3) < 0 or get(s, 17) == 1:
            continue
        tensor = tensor_at(handle, get(s, 3))
        if depthwise_variant(handle, s, weight_channels(handle, s, False), weight_channels(handle, s, True)) != DENSE:
            put(tensor, T_PITCH, max(get(tensor, T_PITCH), get(tensor_at(handle, get(s, 1)), T_PITCH)))
            continue
        each = get(tensor, T_CHANNELS) // get(s, 17)
        room = get(tensor, T_CHANNELS) - each + (each + 15) // 16 * 16
        put(tensor, T_PITCH, max(get(tensor, T_PITCH), (room + 15) // 16 * 16))


def pack_all(handle: int, steps: int, packed: int) -> int:
    """Pack every convolution of the plan into the table `packed`; 0 where memory runs out."""
    for i in range(steps):
        s = step_at(handle, i)
        put(packed, i, 0)
        if get(s, 0) == CONV:
            record = pack_step(handle, s, weight_channels(handle, s, False), weight_channels(handle, s, True))
            if record == 0:
                return 0
            put(packed, i, record)
    return 1


TEMPLATES = (
    *WINDOWS, tap_reach, take_tap, list_groups, put_offset, pack_part, pack_part_windows, pack_tiles, pack_numbers,
    put_multiplier, pack_depthwise_step, depthwise_variant, pack_step, weight_channels, set_pitches, pack_all,
)  # fmt: skip
