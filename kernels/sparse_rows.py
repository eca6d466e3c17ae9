"""Running rows of features through weights that a bitmap places."""

from __future__ import annotations

from typing import Any

from graphopt.kernels.abi import stack64
from graphopt.kernels.engine_state import I_HANDLE, get, put
from graphopt.kernels.memory import copy
from graphopt.kernels.micro_bitmap import (
    M_BIAS,
    M_GROUPS,
    M_LIMITS,
    M_MASKS,
    M_PITCH_R,
    M_PITCH_X,
    M_PITCH_Y,
    M_SCALES,
    M_STARTS,
    M_TABLE,
    M_VALUES,
)
from graphopt.kernels.sparse_plan import BYTES, P_IN, P_NUMBERS, P_OUT
from graphopt.kernels.sparse_state import (
    H_BIAS,
    H_GROUPS,
    H_LIMITS,
    H_MASKS,
    H_PLAN,
    H_SCALES,
    H_STARTS,
    H_TABLE,
    H_VALUES,
    H_ZEROS,
    I_OH,
    I_PITCH,
    I_SCRATCH,
    U_INPUT,
    U_INSTANCE,
    U_OUTPUT,
    U_PARTS,
    U_RESIDUAL,
)  # fmt: skip

# given by the rung
ABREAST = 1  # rows of features that the kernels take at once
bitmap_float: Any = None
bitmap_byte: Any = None


def copy_features(instance: int, usr: int) -> None:
    """Rows that do not fill whole groups, to where zeros are behind them."""
    if get(instance, I_SCRATCH) == 0:
        return
    width, pitch = 4 * get(get(get(instance, I_HANDLE), H_PLAN), P_IN), get(instance, I_PITCH)
    for m in range(get(instance, I_OH)):
        copy(get(instance, I_SCRATCH) + m * pitch, get(usr, U_INPUT) + m * width, width)
    put(usr, U_INPUT, get(instance, I_SCRATCH))


def set_masks(handle: int, s: int, pitch: int, summed: bool) -> None:
    """What the kernels of bitmaps read."""
    wide = 4 * get(get(handle, H_PLAN), P_OUT)
    put(s, M_MASKS, get(handle, H_MASKS))
    put(s, M_GROUPS, get(handle, H_GROUPS))
    put(s, M_STARTS, get(handle, H_STARTS))
    put(s, M_VALUES, get(handle, H_VALUES))
    put(s, M_SCALES, get(handle, H_SCALES))
    put(s, M_BIAS, get(handle, H_BIAS))
    put(s, M_LIMITS, get(handle, H_LIMITS))
    put(s, M_TABLE, get(handle, H_TABLE))
    put(s, M_PITCH_X, pitch)
    put(s, M_PITCH_Y, wide)
    put(s, M_PITCH_R, wide if summed else 0)


def bitmap_body(usr: int, part: int) -> None:
    """A part of the outputs of all rows."""
    instance = get(usr, U_INSTANCE)
    handle, record = get(instance, I_HANDLE), stack64(12)
    plan, parts, residual, pitch = get(handle, H_PLAN), get(usr, U_PARTS), get(usr, U_RESIDUAL), get(instance, I_PITCH)
    set_masks(handle, record, pitch, residual != 0)
    outputs, rows = get(plan, P_OUT), get(instance, I_OH)
    n0, n1 = outputs * part // parts, outputs * (part + 1) // parts
    for m in range(0, rows, ABREAST):
        place = 4 * m * outputs
        x, y, count = get(usr, U_INPUT) + m * pitch, get(usr, U_OUTPUT) + place, min(ABREAST, rows - m)
        r = residual + place if residual != 0 else get(handle, H_ZEROS)
        if get(plan, P_NUMBERS) == BYTES:
            bitmap_byte(record, x, y, r, n0, n1, count)
        else:
            bitmap_float(record, x, y, r, n0, n1, count)


PARTS = (copy_features, set_masks, bitmap_body)
