"""Memory of the engine: which int64 slot of its records holds what, and blocks that are freed together.

Functions of the `engine_*` modules are templates: plain Python over addresses, compiled for one instruction set by `engine.engine`.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types

from graphopt.kernels.memory import I1, I64, at, emit, free, ld32, ld64, malloc, st64, text
from graphopt.kernels.plan import STEP
from graphopt.kernels.text import put_number, put_text

# a handle: a checked plan with packed weights, shared by all runs
H_BLOCKS = 0  # list of memory blocks to free
H_TENSORS = 1
H_STEPS = 2
H_ACTIVATIONS = 3
H_OUTPUTS = 4
H_TENSOR_TABLE = 5  # int64 [tensors][TENSOR_SLOTS]
H_STEP_TABLE = 6  # int64 [steps][plan.STEP], the steps as they stand in the plan
H_SCALES = 7  # float32
H_CONSTANTS = 8  # int64 [constants][TENSOR_RECORD], copied; data addresses are the caller's
H_PACKED = 9  # int64 [steps]: address of the step's packed record, or 0
H_LOCK = 10
H_FREE = 11  # linked list of idle instances
H_IDLE = 12  # how many of them
H_RUNG = 13  # int64 [RUNG] from here on: what the rung of instruction sets asks for
H_SIGNED = 13  # added to comp for each unit of weight: 128 where the dot product takes signed bytes
H_TILES = 14  # there are matrix tiles (AMX)
H_MIN_ROW = 15  # bytes that an output row of the fast depthwise kernel must have
H_CHUNK = 16  # bytes of its chunks
H_PACK_PANELS, H_PANEL_BYTES, H_PACK_DEPTHWISE, H_DEPTHWISE_BYTES, H_PACK_CHANNELS, H_CHANNELS_BYTES = (
    17,
    18,
    19,
    20,
    21,
    22,
)  # code
RUNG = 10
HANDLE = 24

T_CHANNELS = 0
T_ZERO = 1
T_PITCH = 2
T_WRITTEN = 3  # 0: not yet; 1: by INPUT only; 2: by other steps
TENSOR_SLOTS = 4
MAX_SIZE = 1 << 31  # elements of any one thing: offsets are int32

TENSOR_RECORD = 12  # what onnxruntime's tensors are handed over as: data, rank, element type, 8 dimensions, 0
R_DATA, R_RANK, R_TYPE, R_DIMS = 0, 1, 2, 3

# an instance: a handle bound to input shapes, used by one run at a time
I_BLOCKS = 0
I_HANDLE = 1
I_NEXT = 2
I_BATCH = 3
I_ROWS = 4  # address of the compiled rows
I_COUNT = 5  # how many
I_SHAPES = 6  # int64 [activations][TENSOR_RECORD], the shapes it is bound to
I_OUT_SHAPES = 7  # int64 [outputs][TENSOR_RECORD]
I_SIZES = 8  # int64 [tensors][BOUND]
I_ARENA = 9
I_ARENA_SIZE = 10
I_ROOM = 11  # rows that fit
I_IMAGES = 12  # 1 where an activation is images: outputs that are rows then have one row an image
INSTANCE = 16

B_H, B_W, B_TOP, B_LEFT, B_BOTTOM, B_RIGHT, B_ROW, B_SIZE, B_BORN, B_DIES, B_PLACE, B_ORIGIN = range(12)
BOUND = (
    12  # slots of a bound tensor: height, width, padding, bytes of a row, size, life, place in the arena, address of pixel (0, 0)
)


def own(owner: int, size: int) -> int:
    """Memory that lives as long as the record `owner`, aligned to 64 bytes; 0 where there is none."""
    block = malloc(size + 128)
    if block == 0:
        return 0
    st64(block, ld64(owner))
    st64(owner, block)
    return (block + 16 + 63) // 64 * 64


def release_all(owner: int) -> None:
    """Free everything that the record owns (not the record)."""
    block = ld64(owner)
    while block != 0:
        following = ld64(block)
        free(block)
        block = following
    st64(owner, 0)


def _slot(b: ir.IRBuilder, address: ir.Value, slot: ir.Value | int) -> ir.Value:
    """Pointer to an int64 slot of a record."""
    return at(b, b.add(address, b.mul(slot, I64(8)) if isinstance(slot, ir.Value) else I64(8 * slot)), I64)


def _entry(b: ir.IRBuilder, record: ir.Value, slot: int, index: ir.Value, slots: int) -> ir.Value:
    """Address of entry `index` of a table of records, whose address is in a slot."""
    return b.add(b.load(_slot(b, record, slot), align=8), b.mul(index, I64(8 * slots)))


_A = types.int64


@emit(_A(_A, _A))
def get(b: ir.IRBuilder, address: ir.Value, slot: ir.Value) -> ir.Value:
    """A slot of a record."""
    return b.load(_slot(b, address, slot), align=8)


@emit(types.void(_A, _A, _A))
def put(b: ir.IRBuilder, address: ir.Value, slot: ir.Value, value: ir.Value) -> None:
    b.store(value, _slot(b, address, slot), align=8)


@emit(types.boolean(_A, _A, _A))
def within(b: ir.IRBuilder, value: ir.Value, low: ir.Value, high: ir.Value) -> ir.Value:
    """low <= value <= high."""
    inside = b.and_(b.icmp_signed("<=", low, value), b.icmp_signed("<=", value, high))
    return b.select(inside, I1(1), I1(0))


@emit(_A(_A, _A))
def tensor_at(b: ir.IRBuilder, handle: ir.Value, index: ir.Value) -> ir.Value:
    return _entry(b, handle, H_TENSOR_TABLE, index, TENSOR_SLOTS)


@emit(_A(_A, _A))
def step_at(b: ir.IRBuilder, handle: ir.Value, index: ir.Value) -> ir.Value:
    return _entry(b, handle, H_STEP_TABLE, index, STEP)


@emit(_A(_A, _A))
def constant_at(b: ir.IRBuilder, handle: ir.Value, index: ir.Value) -> ir.Value:
    return _entry(b, handle, H_CONSTANTS, index, TENSOR_RECORD)


@emit(types.float32(_A, _A))
def scale_at(b: ir.IRBuilder, handle: ir.Value, index: ir.Value) -> ir.Value:
    place = b.add(b.load(_slot(b, handle, H_SCALES), align=8), b.mul(index, I64(4)))
    return b.load(at(b, place, ir.FloatType()), align=4)


@emit(_A(_A, _A))
def size_at(b: ir.IRBuilder, instance: ir.Value, tensor: ir.Value) -> ir.Value:
    return _entry(b, instance, I_SIZES, tensor, BOUND)


def fail(error: int, what: int, step: int, value: int) -> int:
    """Write "step <step>: <what> (<value>)" into the error buffer; 0."""
    position = 0
    if step >= 0:
        position = put_text(error, position, text("step "))
        position = put_number(error, position, step)
        position = put_text(error, position, text(": "))
    position = put_text(error, position, what)
    position = put_text(error, position, text(" ("))
    position = put_number(error, position, value)
    put_text(error, position, text(")"))
    return 0


def elements(record: int) -> int:
    """Elements of a tensor record; -1 where a dimension is negative or there are too many."""
    count = 1
    for axis in range(get(record, R_RANK)):
        size = get(record, R_DIMS + axis)
        if size < 0 or size >= MAX_SIZE:
            return -1
        count *= size
        if count >= MAX_SIZE:
            return -1
    return count


def readable(handle: int, index: int) -> bool:
    """Whether a tensor exists and an earlier step wrote it."""
    return within(index, 0, get(handle, H_TENSORS) - 1) and get(tensor_at(handle, index), T_WRITTEN) != 0


def leading_axes(instance: int, shape: int, rank: int, like: int, channels: int) -> bool:
    """The shape of an output of rows: the leading axes of activation `like`, and channels; False where ranks differ."""
    source = get(instance, I_SHAPES) + 8 * TENSOR_RECORD * like
    if get(source, R_RANK) != rank:
        return False
    for axis in range(rank - 1):
        put(shape, R_DIMS + axis, get(source, R_DIMS + axis))
    put(shape, R_DIMS + rank - 1, channels)
    return True


def row_count(instance: int, shape: int, rank: int) -> int:
    count = 1
    for axis in range(rank - 1):
        count *= get(shape, R_DIMS + axis)
    return count


def zero_of(handle: int, s: int) -> int:
    return get(tensor_at(handle, get(s, 1)), T_ZERO)


def bias_of(handle: int, s: int, oc: int) -> int:
    if get(s, 6) < 0:
        return 0
    return ld32(get(constant_at(handle, get(s, 6)), R_DATA) + 4 * oc)


TEMPLATES = (own, release_all, fail, elements, readable, leading_axes, row_count, zero_of, bias_of)
