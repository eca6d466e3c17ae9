"""The engine that runs region plans: `engine(isa)` gives its functions, compiled for one rung of instruction sets.

A plan is checked and packed once (`create`), laid out for the shapes it meets (`acquire`, which keeps a few instances for reuse:
each run has one of its own, so runs may overlap), and then interpreted row by row. `graphopt.kernels.plan` says what it computes.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.kernels import (
    engine_bind,
    engine_check,
    engine_conv,
    engine_edges,
    engine_pack,
    engine_rows,
    engine_run,
    engine_state,
    engine_unpack,
    quads,
)
from graphopt.kernels.abi import lock, stack64, symaddr, unlock
from graphopt.kernels.engine_bind import bind_arena, bind_bytes, bind_lives, bind_padding, bind_sizes
from graphopt.kernels.engine_check import check_outputs, check_step
from graphopt.kernels.engine_pack import pack_all, set_pitches
from graphopt.kernels.engine_rows import build_rows
from graphopt.kernels.engine_state import (
    BOUND,
    H_ACTIVATIONS,
    H_CHANNELS_BYTES,
    H_CHUNK,
    H_CONSTANTS,
    H_DEPTHWISE_BYTES,
    H_FREE,
    H_IDLE,
    H_LOCK,
    H_MIN_ROW,
    H_OUTPUTS,
    H_PACK_CHANNELS,
    H_PACK_DEPTHWISE,
    H_PACK_PANELS,
    H_PACKED,
    H_PANEL_BYTES,
    H_RUNG,
    H_SCALES,
    H_SIGNED,
    H_STEP_TABLE,
    H_STEPS,
    H_TENSOR_TABLE,
    H_TENSORS,
    H_TILES,
    HANDLE,
    I_BATCH,
    I_HANDLE,
    I_NEXT,
    I_OUT_SHAPES,
    I_SHAPES,
    I_SIZES,
    INSTANCE,
    R_DATA,
    R_DIMS,
    R_RANK,
    R_TYPE,
    RUNG,
    T_CHANNELS,
    T_ZERO,
    TENSOR_RECORD,
    TENSOR_SLOTS,
    fail,
    get,
    own,
    put,
    release_all,
    step_at,
    within,
)
from graphopt.kernels.engine_unpack import unpack_all
from graphopt.kernels.exports import Export
from graphopt.kernels.externs import extern, link
from graphopt.kernels.isa import RUNGS
from graphopt.kernels.memory import copy, fill, free, malloc, text
from graphopt.kernels.micro_table import look_up
from graphopt.kernels.microkernels import kernels
from graphopt.kernels.plan import HEADER, MAGIC, MAX_CHANNELS, PACK, STEP, TENSOR, VERSION
from graphopt.kernels.region import Engine

SUFFIX = ""  # of the names of functions
MAX_TENSORS = 65536
LARGEST = 1 << 31  # of the numbers in a step
KEPT = 16  # idle instances that a handle keeps; more are freed


def plan_length(plan: int) -> int:
    """Integers that its header asks for."""
    return HEADER + TENSOR * get(plan, 2) + STEP * get(plan, 3) + PACK * get(plan, 7)


def check_header(plan: int, plan_len: int, n_consts: int, error: int) -> int:
    if plan_len < HEADER or get(plan, 0) != MAGIC or get(plan, 1) != VERSION:
        return fail(error, text("not a region plan of this version of graphopt"), -1, plan_len)
    for slot in range(2, HEADER):
        if get(plan, slot) < 0 or get(plan, slot) > MAX_TENSORS:
            return fail(error, text("a count in the plan's header is out of range"), -1, get(plan, slot))
    if plan_len != plan_length(plan):
        return fail(error, text("the plan's length does not fit its header"), -1, plan_len)
    if get(plan, 6) != n_consts:
        return fail(error, text("the plan was made for another number of constants"), -1, n_consts)
    return 1


def copy_plan(handle: int, plan: int, scales: int, n_scales: int, consts: int, error: int) -> int:
    """The plan in memory of the handle's own."""
    tensors, steps, constants = get(plan, 2), get(plan, 3), get(plan, 6)
    table, rows = own(handle, 8 * TENSOR_SLOTS * (tensors + 1)), own(handle, 8 * STEP * (steps + 1))
    numbers, records = own(handle, 4 * n_scales + 64), own(handle, 8 * TENSOR_RECORD * (constants + 1))
    packed = own(handle, 8 * (steps + 1))
    if table == 0 or rows == 0 or numbers == 0 or records == 0 or packed == 0:
        return fail(error, text("no memory for the plan"), -1, steps)
    put(handle, H_TENSORS, tensors)
    put(handle, H_STEPS, steps)
    put(handle, H_ACTIVATIONS, get(plan, 4))
    put(handle, H_OUTPUTS, get(plan, 5))
    put(handle, H_TENSOR_TABLE, table)
    put(handle, H_STEP_TABLE, rows)
    put(handle, H_SCALES, numbers)
    put(handle, H_CONSTANTS, records)
    put(handle, H_PACKED, packed)
    fill(table, 0, 8 * TENSOR_SLOTS * (tensors + 1))
    fill(packed, 0, 8 * (steps + 1))
    copy(rows, plan + 8 * (HEADER + TENSOR * tensors), 8 * STEP * steps)
    copy(numbers, scales, 4 * n_scales)
    copy(records, consts, 8 * TENSOR_RECORD * constants)
    for t in range(tensors):
        channels, zero = get(plan, HEADER + TENSOR * t), get(plan, HEADER + TENSOR * t + 1)
        if channels < 1 or channels > MAX_CHANNELS or zero < 0 or zero > 255:
            return fail(error, text("channels or zero point of a tensor are out of range"), -1, t)
        put(table + 8 * TENSOR_SLOTS * t, T_CHANNELS, channels)
        put(table + 8 * TENSOR_SLOTS * t, T_ZERO, zero)
    return 1


def check_numbers(handle: int, error: int) -> int:
    """Every number of every step is small, so that sums and products of a few cannot overflow in later checks."""
    for i in range(get(handle, H_STEPS)):
        for slot in range(STEP):
            if not within(get(step_at(handle, i), slot), -1, LARGEST):
                return fail(error, text("a number is out of range"), i, slot)
    return 1


def check_constants(handle: int, constants: int, error: int) -> int:
    for i in range(constants):
        record = get(handle, H_CONSTANTS) + 8 * TENSOR_RECORD * i
        if get(record, R_RANK) < 0 or get(record, R_RANK) > 8 or get(record, R_DATA) == 0:
            return fail(error, text("a constant has no data or too many axes"), -1, i)
    return 1


def fill_handle(handle: int, plan: int, scales: int, n_scales: int, consts: int, n_consts: int, error: int) -> int:
    if copy_plan(handle, plan, scales, n_scales, consts, error) == 0:
        return 0
    if check_numbers(handle, error) == 0 or check_constants(handle, n_consts, error) == 0:
        return 0
    packs = get(plan, 7)
    if unpack_all(handle, plan + 8 * (plan_length(plan) - PACK * packs), packs, n_consts, error) == 0:
        return 0
    scratch = own(handle, 8 * (get(handle, H_OUTPUTS) + 8))
    if scratch == 0:
        return fail(error, text("no memory for the plan"), -1, 0)
    for i in range(get(handle, H_STEPS)):
        if check_step(handle, i, n_scales, n_consts, scratch, error) == 0:
            return 0
    fill(scratch, 0, 8 * (get(handle, H_OUTPUTS) + 8))
    if check_outputs(handle, scratch, error) == 0:
        return 0
    set_pitches(handle)
    if pack_all(handle, get(handle, H_STEPS), get(handle, H_PACKED)) == 0:
        return fail(error, text("no memory for packed weights"), -1, 0)
    return 1


def create_for(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, error: int, rung: int) -> int:
    """As `create`; `rung` is the address of what stands from H_RUNG on."""
    if check_header(plan, plan_len, n_consts, error) == 0:
        return 0
    handle = malloc(8 * HANDLE)
    if handle == 0:
        return fail(error, text("no memory for the plan"), -1, plan_len)
    fill(handle, 0, 8 * HANDLE)
    copy(handle + 8 * H_RUNG, rung, 8 * RUNG)
    if fill_handle(handle, plan, scales, n_scales, consts, n_consts, error) == 0:
        release_all(handle)
        free(handle)
        return 0
    return handle


def destroy_instance(instance: int) -> None:
    release_all(instance)
    free(instance)


def destroy(handle: int) -> None:
    """Free a handle and its idle instances; none may be in use."""
    if handle == 0:
        return
    instance = get(handle, H_FREE)
    while instance != 0:
        following = get(instance, I_NEXT)
        destroy_instance(instance)
        instance = following
    release_all(handle)
    free(handle)


def bind(handle: int, instance: int, inputs: int, error: int) -> int:
    activations, outputs, tensors = get(handle, H_ACTIVATIONS), get(handle, H_OUTPUTS), get(handle, H_TENSORS)
    shapes, out_shapes = own(instance, 8 * TENSOR_RECORD * (activations + 1)), own(instance, 8 * TENSOR_RECORD * (outputs + 1))
    sizes = own(instance, 8 * BOUND * (tensors + 1))
    if shapes == 0 or out_shapes == 0 or sizes == 0:
        return fail(error, text("no memory for an instance"), -1, tensors)
    copy(shapes, inputs, 8 * TENSOR_RECORD * activations)
    fill(out_shapes, 0, 8 * TENSOR_RECORD * (outputs + 1))
    fill(sizes, 0, 8 * BOUND * (tensors + 1))
    put(instance, I_SHAPES, shapes)
    put(instance, I_OUT_SHAPES, out_shapes)
    put(instance, I_SIZES, sizes)
    put(instance, I_BATCH, -1)
    if bind_sizes(handle, instance, error) == 0:
        return 0
    bind_padding(handle, instance)
    bind_lives(handle, instance)
    if bind_bytes(handle, instance, error) == 0 or bind_arena(handle, instance, error) == 0:
        return 0
    return build_rows(handle, instance, error)


def same_shapes(instance: int, inputs: int, count: int) -> bool:
    for i in range(count):
        a, b = get(instance, I_SHAPES) + 8 * TENSOR_RECORD * i, inputs + 8 * TENSOR_RECORD * i
        if get(a, R_RANK) != get(b, R_RANK) or get(a, R_TYPE) != get(b, R_TYPE):
            return False
        for axis in range(get(a, R_RANK)):
            if get(a, R_DIMS + axis) != get(b, R_DIMS + axis):
                return False
    return True


def take_idle(handle: int, inputs: int) -> int:
    """An idle instance for these shapes, taken out of the handle's list; 0 where there is none."""
    lock(handle + 8 * H_LOCK)
    before, instance = 0, get(handle, H_FREE)
    while instance != 0 and not same_shapes(instance, inputs, get(handle, H_ACTIVATIONS)):
        before, instance = instance, get(instance, I_NEXT)
    if instance != 0:
        if before == 0:
            put(handle, H_FREE, get(instance, I_NEXT))
        else:
            put(before, I_NEXT, get(instance, I_NEXT))
        put(handle, H_IDLE, get(handle, H_IDLE) - 1)
    unlock(handle + 8 * H_LOCK)
    return instance


def acquire(handle: int, inputs: int, n_inputs: int, error: int) -> int:
    """An instance for inputs of these shapes, for the caller alone until `release`; 0 and a message where they do not fit."""
    if n_inputs != get(handle, H_ACTIVATIONS):
        return fail(error, text("the node has another number of activations than its plan"), -1, n_inputs)
    for i in range(n_inputs):
        if get(inputs + 8 * TENSOR_RECORD * i, R_RANK) > 8:
            return fail(error, text("an activation has too many axes"), -1, i)
    instance = take_idle(handle, inputs)
    if instance != 0:
        return instance
    instance = malloc(8 * INSTANCE)
    if instance == 0:
        return fail(error, text("no memory for an instance"), -1, 0)
    fill(instance, 0, 8 * INSTANCE)
    put(instance, I_HANDLE, handle)
    if bind(handle, instance, inputs, error) == 0:
        destroy_instance(instance)
        return 0
    return instance


def release(instance: int) -> None:
    """Give an instance back: it is kept for the next run, and the one idle longest is freed where there are too many."""
    handle = get(instance, I_HANDLE)
    lock(handle + 8 * H_LOCK)
    put(instance, I_NEXT, get(handle, H_FREE))
    put(handle, H_FREE, instance)
    put(handle, H_IDLE, get(handle, H_IDLE) + 1)
    oldest = 0
    if get(handle, H_IDLE) > KEPT:
        before, oldest = instance, get(instance, I_NEXT)
        while get(oldest, I_NEXT) != 0:
            before, oldest = oldest, get(oldest, I_NEXT)
        put(before, I_NEXT, 0)
        put(handle, H_IDLE, get(handle, H_IDLE) - 1)
    unlock(handle + 8 * H_LOCK)
    if oldest != 0:
        destroy_instance(oldest)


def output_shape(instance: int, index: int, dims: int) -> int:
    """Write the dimensions of an output (up to 8); returns how many."""
    shape = get(instance, I_OUT_SHAPES) + 8 * TENSOR_RECORD * index
    for axis in range(get(shape, R_RANK)):
        put(dims, axis, get(shape, R_DIMS + axis))
    return get(shape, R_RANK)


def output_type(instance: int, index: int) -> int:
    """ONNX element type of an output."""
    return get(get(instance, I_OUT_SHAPES) + 8 * TENSOR_RECORD * index, R_TYPE)


def create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, error: int) -> int:
    """A handle for a plan, checked and packed; 0 and a message in `error` (256 bytes) where it cannot be run.

    plan: int64 [plan_len]; scales: float32 [n_scales]; consts: tensor records, whose data must outlive the handle.
    """
    rung = stack64(16)
    put(rung, H_SIGNED - H_RUNG, SIGNED)
    put(rung, H_TILES - H_RUNG, TILES)
    put(rung, H_MIN_ROW - H_RUNG, MIN_ROW)
    put(rung, H_CHUNK - H_RUNG, CHUNK)
    put(rung, H_PACK_PANELS - H_RUNG, symaddr(PACK_PANELS))
    put(rung, H_PANEL_BYTES - H_RUNG, symaddr(PANEL_BYTES))
    put(rung, H_PACK_DEPTHWISE - H_RUNG, symaddr(PACK_DEPTHWISE))
    put(rung, H_DEPTHWISE_BYTES - H_RUNG, symaddr(DEPTHWISE_BYTES))
    put(rung, H_PACK_CHANNELS - H_RUNG, symaddr(PACK_CHANNELS))
    put(rung, H_CHANNELS_BYTES - H_RUNG, symaddr(CHANNELS_BYTES))
    return create_for(plan, plan_len, scales, n_scales, consts, n_consts, error, rung)


# what the rung asks for: numbers, and the symbols of its packers
SIGNED, TILES, MIN_ROW, CHUNK = 0, 0, 0, 0
PACK_PANELS, PANEL_BYTES, PACK_DEPTHWISE, DEPTHWISE_BYTES, PACK_CHANNELS, CHANNELS_BYTES = "", "", "", "", "", ""

COMMON = (
    plan_length, check_header, copy_plan, check_numbers, check_constants, fill_handle, create_for, destroy_instance, destroy, bind,
    same_shapes, take_idle, acquire, release, output_shape, output_type,
)  # fmt: skip
PACKERS = {"pack_panels": 4, "panel_bytes": 1, "pack_depthwise": 4, "depthwise_bytes": 2, "pack_channels": 3, "channels_bytes": 1}


@cache
def common() -> tuple[list[Export], dict[str, Any]]:
    """What is the same for every rung: checking, packing, laying out memory."""
    modules = (engine_state, engine_unpack, quads, engine_check, engine_pack, engine_bind, engine_conv, engine_rows)
    return link([*(t for m in modules for t in m.TEMPLATES), *COMMON], "", {})


@cache
def _rung(isa: str) -> tuple[list[Export], dict[str, Any]]:
    """What is compiled for each rung: the kernels and the steps."""
    found = kernels(isa)
    sizes: dict[str, Any] = {"SIGNED": found.comp_adjust, "TILES": int(found.conv_amx is not None)}
    sizes |= {"MIN_ROW": found.dw_min_row, "CHUNK": found.chunk}
    sizes |= {name.upper(): f"gk_{name}__{isa}" for name in PACKERS}
    parts = [Export(f"gk_conv__{isa}", found.conv.py_func, 3, True), Export(f"gk_gemv__{isa}", found.gemv.py_func, 3, True)]
    parts.append(Export(f"gk_depthwise__{isa}", found.depthwise.py_func, 3, True))
    if found.conv_amx is not None:
        parts.append(Export(f"gk_conv_amx__{isa}", found.conv_amx.py_func, 4, True))
    for name, count in PACKERS.items():
        parts.append(Export(f"gk_{name}__{isa}", getattr(found, name).py_func, count, name.startswith("pack")))
    scope = {**common()[1], **sizes, "BODY": f"gk_rows_body__{isa}"}
    scope |= {name: extern(f"gk_{name}__{isa}", 3, True) for name in ("conv", "gemv", "depthwise")}
    scope["look_up"] = look_up(RUNGS[isa])
    scope["conv_amx"] = extern(f"gk_conv_amx__{isa}", 4, True)
    exports, externs = link([*engine_edges.TEMPLATES, *engine_run.TEMPLATES, create], f"__{isa}", scope)
    return [*parts, *exports], {**common()[1], **externs}


def engine(isa: str) -> Engine:
    """The engine for one rung: its functions may be called from compiled code once `exports(isa)` are bound."""
    found = _rung(isa)[1]
    return Engine(**{name: found[name] for name in Engine._fields if name != "bodies"}, bodies={})


def exports(isa: str) -> list[Export]:
    """The C functions of the engine for one rung."""
    return [*common()[0], *_rung(isa)[0]]
