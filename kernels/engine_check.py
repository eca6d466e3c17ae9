"""Whether a region plan can be run: every index, size and number in it is looked at before any memory is laid out by it.

Nothing in a plan is trusted: it comes out of a file. After the checks all tensors, constants and scales that a step names exist
and fit, and no accumulator can overflow.
"""

from __future__ import annotations

import numpy as np

from graphopt.kernels.engine_state import (
    H_ACTIVATIONS,
    H_OUTPUTS,
    H_STEPS,
    H_TENSORS,
    MAX_SIZE,
    R_DATA,
    R_DIMS,
    R_RANK,
    R_TYPE,
    T_CHANNELS,
    T_WRITTEN,
    T_ZERO,
    constant_at,
    elements,
    fail,
    get,
    put,
    readable,
    scale_at,
    step_at,
    tensor_at,
    within,
)
from graphopt.kernels.memory import ld32, ldf, lds8, text, to_float
from graphopt.kernels.plan import (
    BINARY,
    CHANNELS_FIRST,
    CHANNELS_LAST,
    CONV,
    COPY,
    FLOAT,
    GLOBAL_POOL,
    INPUT,
    INT8,
    INT32,
    IOHW,
    KN,
    MAX_CHANNELS,
    MAX_POOL,
    MUL,
    OUTPUT,
    POOL,
    ROWS,
    UINT8,
)

MAX_WINDOW = 4096  # kernel sizes, strides, dilations and paddings


def positive_scales(handle: int, scales: int, first: int, count: int) -> bool:
    """Whether `count` scales from `first` exist, are finite and greater than zero."""
    if first < 0 or first + count > scales:
        return False
    for i in range(count):
        value = scale_at(handle, first + i)
        if not (value > np.float32(0) and value < np.float32(3.0e38)):
            return False
    return True


def finite_scales(handle: int, scales: int, first: int, count: int) -> bool:
    if first < 0 or first + count > scales:
        return False
    for i in range(count):
        if not abs(scale_at(handle, first + i)) < np.float32(3.0e38):
            return False
    return True


def sum_scales(handle: int, scales: int, first: int) -> bool:
    """ra, rb, fx of a sum: its result must stay far inside int32."""
    if not finite_scales(handle, scales, first, 3):
        return False
    for i in range(3):
        if not abs(scale_at(handle, first + i)) < np.float32(2.0e6):
            return False
    return True


def written(handle: int, index: int, by: int) -> None:
    tensor = tensor_at(handle, index)
    put(tensor, T_WRITTEN, max(get(tensor, T_WRITTEN), by))


def window_ok(step: int) -> bool:
    for slot in range(7, 13):
        if not within(get(step, slot), 1, MAX_WINDOW):
            return False
    for slot in range(13, 17):
        if not within(get(step, slot), 0, MAX_WINDOW):
            return False
    return get(step, 7) * get(step, 8) <= MAX_CHANNELS


def rank_ok(layout: int, rank: int) -> bool:
    if layout == CHANNELS_FIRST:
        return within(rank, 2, 4)
    if layout == CHANNELS_LAST:
        return rank == 4
    return layout == ROWS and within(rank, 1, 8)


def check_input(handle: int, s: int, i: int, scales: int, error: int) -> int:
    out = get(s, 3)
    if not within(get(s, 1), 0, get(handle, H_ACTIVATIONS) - 1):
        return fail(error, text("no such activation"), i, get(s, 1))
    if not within(out, 0, get(handle, H_TENSORS) - 1) or get(tensor_at(handle, out), T_WRITTEN) != 0:
        return fail(error, text("no such tensor, or it is written twice"), i, out)
    if not rank_ok(get(s, 5), get(s, 6)):
        return fail(error, text("layout and rank do not fit"), i, get(s, 6))
    kind = get(s, 4)
    if kind != FLOAT and kind != UINT8 and kind != INT8:
        return fail(error, text("unknown type of an activation"), i, kind)
    if kind == FLOAT and not positive_scales(handle, scales, get(s, 7), 1):
        return fail(error, text("the input's scale is missing or not a positive number"), i, get(s, 7))
    written(handle, out, 1)
    return 1


def check_output(handle: int, s: int, i: int, scales: int, error: int) -> int:
    if not readable(handle, get(s, 1)):
        return fail(error, text("reads a tensor that is not written before"), i, get(s, 1))
    if not rank_ok(get(s, 5), get(s, 6)):
        return fail(error, text("layout and rank do not fit"), i, get(s, 6))
    kind = get(s, 4)
    if kind != FLOAT and kind != UINT8 and kind != INT8:
        return fail(error, text("unknown type of an output"), i, kind)
    if kind == FLOAT and not positive_scales(handle, scales, get(s, 7), 1):
        return fail(error, text("the output's scale is missing or not a positive number"), i, get(s, 7))
    if get(s, 5) == ROWS and not within(get(s, 8), 0, get(handle, H_ACTIVATIONS) - 1):
        return fail(error, text("no such activation to take axes from"), i, get(s, 8))
    return 1


def weight_shape(handle: int, s: int, record: int, dims: int) -> bool:
    """Write (OC, IC / groups, KH, KW) to `dims`; False where rank or sizes do not fit the step."""
    rank = get(record, R_RANK)
    order = get(s, 18)
    if not within(order, 0, 2) or elements(record) <= 0:
        return False
    kh, kw, groups = get(s, 7), get(s, 8), get(s, 17)
    if order == KN:
        put(dims, 0, get(record, R_DIMS + 1))
        put(dims, 1, get(record, R_DIMS))
        return rank == 2 and kh == 1 and kw == 1 and groups == 1
    if not within(rank, 2, 4):
        return False
    taps = elements(record) // (get(record, R_DIMS) * get(record, R_DIMS + 1))
    if taps != kh * kw:
        return False
    put(dims, 0, get(record, R_DIMS))
    put(dims, 1, get(record, R_DIMS + 1))
    if order == IOHW:
        if get(record, R_DIMS) % groups != 0:
            return False
        put(dims, 0, get(record, R_DIMS + 1) * groups)
        put(dims, 1, get(record, R_DIMS) // groups)
    return True


def weight_of(s: int, data: int, oc: int, ic: int, per: int, outs: int, tap: int) -> int:
    """One weight by output channel, input channel within its group, and tap; `per`: inputs of a group, `outs`: all outputs."""
    taps = get(s, 7) * get(s, 8)
    order = get(s, 18)
    if order == KN:
        return lds8(data + ic * outs + oc)
    if order == IOHW:
        each = outs // get(s, 17)
        return lds8(data + (((oc // each) * per + ic) * each + oc % each) * taps + tap)
    return lds8(data + (oc * per + ic) * taps + tap)


def check_sums(handle: int, s: int, i: int, dims: int, error: int) -> int:
    """No accumulator may leave int32, and no requantised value, whatever the input."""
    outs, per = get(dims, 0), get(dims, 1)
    taps = get(s, 7) * get(s, 8)
    data = get(constant_at(handle, get(s, 4)), R_DATA)
    scales = constant_at(handle, get(s, 5))
    many = elements(scales) > 1
    for oc in range(outs):
        total = 0
        for ic in range(per):
            for tap in range(taps):
                total += abs(weight_of(s, data, oc, ic, per, outs, tap))
        total *= 255
        if get(s, 6) >= 0:
            total += abs(ld32(get(constant_at(handle, get(s, 6)), R_DATA) + 4 * oc))
        if total >= MAX_SIZE:
            return fail(error, text("the sums of an output channel can overflow 32 bits"), i, oc)
        scale = ldf(get(scales, R_DATA) + (4 * oc if many else 0))
        if not (scale > np.float32(0) and scale < np.float32(3.0e38)):
            return fail(error, text("a weight scale is not a positive number"), i, oc)
        scale = np.float32(scale * scale_at(handle, get(s, 21)))
        if get(s, 3) >= 0:
            scale = np.float32(scale / scale_at(handle, get(s, 21) + 1))
            if not to_float(min(total + 1, MAX_SIZE - 1)) * scale < np.float32(2.0e9):
                return fail(error, text("requantised values of an output channel can overflow 32 bits"), i, oc)
    return 1


def check_conv_constants(handle: int, s: int, i: int, constants: int, dims: int, error: int) -> int:
    weight, scale, bias = get(s, 4), get(s, 5), get(s, 6)
    if not within(weight, 0, constants - 1) or get(constant_at(handle, weight), R_TYPE) != INT8:
        return fail(error, text("the weight is missing or not int8"), i, weight)
    if not within(get(s, 17), 1, MAX_CHANNELS) or not weight_shape(handle, s, constant_at(handle, weight), dims):
        return fail(error, text("the weight's shape does not fit"), i, weight)
    outs = get(dims, 0)
    if not within(outs, 1, MAX_CHANNELS) or not within(get(dims, 1), 1, MAX_CHANNELS) or outs % get(s, 17) != 0:
        return fail(error, text("channels and groups do not fit"), i, outs)
    if not within(scale, 0, constants - 1) or get(constant_at(handle, scale), R_TYPE) != FLOAT:
        return fail(error, text("the weight scale is missing or not float32"), i, scale)
    count = elements(constant_at(handle, scale))
    if count != 1 and count != outs:
        return fail(error, text("the weight scale has a wrong size"), i, count)
    if bias >= 0:
        if bias >= constants or get(constant_at(handle, bias), R_TYPE) != INT32 or elements(constant_at(handle, bias)) != outs:
            return fail(error, text("the bias is missing, not int32, or of a wrong size"), i, bias)
    return 1


def check_conv(handle: int, s: int, i: int, scales: int, constants: int, dims: int, error: int) -> int:
    x, residual, out = get(s, 1), get(s, 2), get(s, 3)
    if not readable(handle, x):
        return fail(error, text("reads a tensor that is not written before"), i, x)
    if not window_ok(s):
        return fail(error, text("kernel, strides, dilations or pads out of range"), i, get(s, 7))
    if check_conv_constants(handle, s, i, constants, dims, error) == 0:
        return 0
    if get(tensor_at(handle, x), T_CHANNELS) != get(dims, 1) * get(s, 17):
        return fail(error, text("the input has other channels than the weight"), i, get(tensor_at(handle, x), T_CHANNELS))
    if not positive_scales(handle, scales, get(s, 21), 1 if out < 0 else 2):
        return fail(error, text("a scale is missing or not a positive number"), i, get(s, 21))
    if get(s, 18) == IOHW and not (within(get(s, 19), 0, MAX_WINDOW) and within(get(s, 20), 0, MAX_WINDOW)):
        return fail(error, text("output padding out of range"), i, get(s, 19))
    put(s, 30, get(dims, 0))  # the engine's own slot: output channels
    if out < 0:
        return check_float_conv(handle, s, i, constants, dims, error)
    if not within(out, 0, get(handle, H_TENSORS) - 1) or get(tensor_at(handle, out), T_WRITTEN) != 0:
        return fail(error, text("no such tensor, or it is written twice"), i, out)
    if get(tensor_at(handle, out), T_CHANNELS) != get(dims, 0):
        return fail(error, text("the output has other channels than the weight"), i, get(dims, 0))
    if not (within(get(s, 22), 0, 255) and within(get(s, 23), 0, 255) and within(get(s, 24), 0, 255)):
        return fail(error, text("zero point or bounds out of range"), i, get(s, 22))
    if residual >= 0:
        if not readable(handle, residual) or get(tensor_at(handle, residual), T_CHANNELS) != get(dims, 0):
            return fail(error, text("the residual is not written before, or has other channels"), i, residual)
        if not sum_scales(handle, scales, get(s, 25)):
            return fail(error, text("scales of the residual sum are missing or too large"), i, get(s, 25))
    if check_sums(handle, s, i, dims, error) == 0:
        return 0
    written(handle, out, 2)
    return 1


def check_float_conv(handle: int, s: int, i: int, constants: int, dims: int, error: int) -> int:
    bias = get(s, 27)
    if not within(get(s, 28), 1, 8) or not within(get(s, 29), 0, get(handle, H_ACTIVATIONS) - 1):
        return fail(error, text("rank or axes of the float output do not fit"), i, get(s, 28))
    if bias >= 0:
        if (
            bias >= constants
            or get(constant_at(handle, bias), R_TYPE) != FLOAT
            or elements(constant_at(handle, bias)) != get(dims, 0)
        ):
            return fail(error, text("the float bias is missing, not float32, or of a wrong size"), i, bias)
    if get(s, 2) >= 0 or get(s, 18) == IOHW or get(s, 7) * get(s, 8) * get(s, 9) * get(s, 10) * get(s, 17) != 1:
        return fail(error, text("float output is for matrix products only"), i, get(s, 2))
    for slot in range(13, 17):
        if get(s, slot) != 0:
            return fail(error, text("float output is for matrix products only"), i, slot)
    return check_sums(handle, s, i, dims, error)


def fresh(handle: int, index: int, channels: int) -> bool:
    """Whether a tensor exists, is not written yet and has these channels."""
    if not within(index, 0, get(handle, H_TENSORS) - 1):
        return False
    tensor = tensor_at(handle, index)
    return get(tensor, T_WRITTEN) == 0 and get(tensor, T_CHANNELS) == channels


def check_pool(handle: int, s: int, i: int, scales: int, error: int) -> int:
    x, out, op = get(s, 1), get(s, 3), get(s, 4)
    if not readable(handle, x):
        return fail(error, text("reads a tensor that is not written before"), i, x)
    if not fresh(handle, out, get(tensor_at(handle, x), T_CHANNELS)):
        return fail(error, text("no such output, written twice, or of other channels"), i, out)
    if not within(op, 0, GLOBAL_POOL) or not window_ok(s) or not within(get(s, 17), 0, 1) or not within(get(s, 18), 0, 1):
        return fail(error, text("window out of range"), i, op)
    if get(s, 13) >= get(s, 7) * get(s, 11) or get(s, 14) >= get(s, 8) * get(s, 12):
        return fail(error, text("padding is wider than the window"), i, get(s, 13))
    if op == MAX_POOL:
        if get(tensor_at(handle, x), T_ZERO) != get(tensor_at(handle, out), T_ZERO):
            return fail(error, text("max pooling does not change the zero point"), i, out)
    elif not positive_scales(handle, scales, get(s, 21), 2):
        return fail(error, text("a scale is missing or not a positive number"), i, get(s, 21))
    written(handle, out, 2)
    return 1


def check_binary(handle: int, s: int, i: int, scales: int, error: int) -> int:
    x, y, out, op = get(s, 1), get(s, 2), get(s, 3), get(s, 4)
    if not readable(handle, x) or not readable(handle, y):
        return fail(error, text("reads a tensor that is not written before"), i, x)
    channels = get(tensor_at(handle, x), T_CHANNELS)
    if not fresh(handle, out, channels) or get(tensor_at(handle, y), T_CHANNELS) != channels:
        return fail(error, text("no such output, written twice, or of other channels"), i, out)
    if not within(op, 0, 1) or not within(get(s, 23), 0, 255) or not within(get(s, 24), 0, 255):
        return fail(error, text("operator or bounds out of range"), i, op)
    if op == MUL:
        if not positive_scales(handle, scales, get(s, 21), 1):
            return fail(error, text("a scale is missing or not a positive number"), i, get(s, 21))
    elif not sum_scales(handle, scales, get(s, 21)):
        return fail(error, text("scales of the sum are missing or too large"), i, get(s, 21))
    written(handle, out, 2)
    return 1


def check_copy(handle: int, s: int, i: int, constants: int, error: int) -> int:
    x, out, table = get(s, 1), get(s, 3), get(s, 4)
    if not readable(handle, x):
        return fail(error, text("reads a tensor that is not written before"), i, x)
    if not within(out, 0, get(handle, H_TENSORS) - 1) or out == x or get(tensor_at(handle, out), T_WRITTEN) == 1:
        return fail(error, text("no such output, or it is the input"), i, out)
    if table >= 0:
        if table >= constants or get(constant_at(handle, table), R_TYPE) != UINT8 or elements(constant_at(handle, table)) != 256:
            return fail(error, text("the table is missing or not 256 uint8"), i, table)
    first, count, offset = get(s, 5), get(s, 6), get(s, 19)
    if first < 0 or count < 1 or first + count > get(tensor_at(handle, x), T_CHANNELS):
        return fail(error, text("input channels out of range"), i, count)
    if offset < 0 or offset + count > get(tensor_at(handle, out), T_CHANNELS):
        return fail(error, text("output channels out of range"), i, offset)
    for slot in (7, 10, 13, 14, 15, 16):
        if not within(get(s, slot), 0, MAX_SIZE):
            return fail(error, text("a start or padding is out of range"), i, get(s, slot))
    for slot in (8, 11, 17, 18):
        if not within(get(s, slot), 1, MAX_WINDOW):
            return fail(error, text("a step or repetition is out of range"), i, get(s, slot))
    if not within(get(s, 9), -1, MAX_SIZE) or not within(get(s, 12), -1, MAX_SIZE) or not within(get(s, 20), 0, 1):
        return fail(error, text("a count is out of range"), i, get(s, 9))
    if get(s, 20) == 1 and get(tensor_at(handle, out), T_WRITTEN) != 0:
        return fail(error, text("fills a tensor that is written already"), i, out)
    written(handle, out, 2)
    return 1


def check_step(handle: int, i: int, scales: int, constants: int, dims: int, error: int) -> int:
    s = step_at(handle, i)
    kind = get(s, 0)
    if kind == INPUT:
        return check_input(handle, s, i, scales, error)
    if kind == OUTPUT:
        return check_output(handle, s, i, scales, error)
    if kind == CONV:
        return check_conv(handle, s, i, scales, constants, dims, error)
    if kind == POOL:
        return check_pool(handle, s, i, scales, error)
    if kind == BINARY:
        return check_binary(handle, s, i, scales, error)
    if kind == COPY:
        return check_copy(handle, s, i, constants, error)
    return fail(error, text("unknown kind of step"), i, kind)


def check_outputs(handle: int, seen: int, error: int) -> int:
    """Every output of the node is written by exactly one step; `seen` is zeroed room for one int64 each."""
    outputs = get(handle, H_OUTPUTS)
    for i in range(get(handle, H_STEPS)):
        s = step_at(handle, i)
        index = get(s, 2) if get(s, 0) == OUTPUT else (get(s, 26) if get(s, 0) == CONV and get(s, 3) < 0 else -1)
        if get(s, 0) == OUTPUT or (get(s, 0) == CONV and get(s, 3) < 0):
            if not within(index, 0, outputs - 1) or get(seen, index) != 0:
                return fail(error, text("no such output of the node, or it is written twice"), i, index)
            put(seen, index, 1)
    for index in range(outputs):
        if get(seen, index) == 0:
            return fail(error, text("an output of the node is never written"), -1, index)
    return 1


TEMPLATES = (
    positive_scales, finite_scales, sum_scales, written, window_ok, rank_ok, check_input, check_output,
    weight_shape, weight_of, check_sums, check_conv_constants, check_conv, check_float_conv, fresh, check_pool, check_binary,
    check_copy, check_step, check_outputs,
)  # fmt: skip
