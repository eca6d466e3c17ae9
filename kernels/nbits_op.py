"""The operators NBitsGemm and NBitsGemmZeros: MatMulNBits of 4 bits in onnxruntime, by graphopt's kernels.

Inputs: rows float32 [..., K]; constants as `nbits.pack` takes them: weights, scales, with NBitsGemmZeros zero points. Attributes:
K, N, block_size. Weights are packed once, when the session is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from graphopt.kernels import node
from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import aligned_free, aligned_malloc, call2, call3, call5, cstr, memset, parallel_for, stack64, symaddr
from graphopt.kernels.customop import ROLES, Family, Operator, symbol
from graphopt.kernels.exports import Export
from graphopt.kernels.externs import link
from graphopt.kernels.memory import ld64, st64
from graphopt.kernels.micro_nbits import MOST, PANEL
from graphopt.kernels.nbits import FEW, block_sums, nbits, pack, packed_bytes, pad
from graphopt.kernels.node import API, REFERENCE, STATE, drop, failure, new_state, read_constants, read_integer, read_tensor
from graphopt.kernels.plan import NBITS
from graphopt.kernels.specialise import clone, specialise

LARGEST = 1 << 24  # of K and N: sizes of what is packed then fit int64
GRAIN = 400_000  # products of a part that one thread takes: about 20 us
_FLOAT, _BYTE = ort.ELEMENT_TYPES["float32"], ort.ELEMENT_TYPES["uint8"]

_PACKED, _K, _COLUMNS, _BLOCKS, _BLOCK = range(STATE, STATE + 40, 8)  # of a node's state, bytes
_SIZE = STATE + 40

# words of what a part of a product is told
_X, _SUMS, _ROWS, _WEIGHTS, _N_BLOCKS, _WIDTH, _PANELS, _OUT, _N, _STEP = range(0, 80, 8)

if TYPE_CHECKING:  # globals that `_exports` gives to the templates below
    PART = ""

    def run(
        x: int, sums: int, m: int, weights: int, blocks: int, block: int, start: int, stop: int, out: int, columns: int
    ) -> None: ...
    def multiply(state: int, context: int, x: int, m: int, out: int) -> int: ...


def holds(record: int, kind: int, count: int) -> bool:
    """Whether a tensor has elements of this type, as many."""
    total = 1
    for i in range(ld64(record + ort.RECORD_NDIM)):
        size = ld64(record + ort.RECORD_DIMS + 8 * i)
        if size < 0 or (size > 0 and total > count // size):
            return False
        total *= size
    return ld64(record + ort.RECORD_TYPE) == kind and total == count


def fill(state: int, records: int, zeros: bool) -> int:
    """Check the constants and pack them; an OrtStatus."""
    columns, blocks, block = ld64(state + _COLUMNS), ld64(state + _BLOCKS), ld64(state + _BLOCK)
    scales, points = records + 8 * ort.RECORD, records + 16 * ort.RECORD
    if not holds(records, _BYTE, columns * blocks * block // 2):
        return failure(state, cstr("the weights must be uint8 [N, blocks, block_size / 2]"))
    if not holds(scales, _FLOAT, columns * blocks):
        return failure(state, cstr("the scales must be float32 [N, blocks]"))
    if zeros and not holds(points, _BYTE, columns * ((blocks + 1) // 2)):
        return failure(state, cstr("the zero points must be uint8 [N, (blocks + 1) / 2]"))
    packed = aligned_malloc(packed_bytes(columns, blocks, block))
    if packed == 0:
        return failure(state, cstr("out of memory"))
    at = 0
    if zeros:
        at = ld64(points + ort.RECORD_DATA)
    pack(packed, ld64(records + ort.RECORD_DATA), ld64(scales + ort.RECORD_DATA), at, columns, blocks, block)
    st64(state + _PACKED, packed)
    return 0


def make(state: int, info: int) -> int:
    """Read attributes and constants; an OrtStatus."""
    api = ld64(state + API)
    k, columns = read_integer(api, info, cstr("K")), read_integer(api, info, cstr("N"))
    block = read_integer(api, info, cstr("block_size"))
    if k < 1 or columns < 1 or k > LARGEST or columns > LARGEST or block < 16 or block > MOST or block & (block - 1) != 0:
        return failure(state, cstr("K and N must be from 1 to 2^24, block_size 16, 32, 64, 128 or 256"))
    st64(state + _K, k)
    st64(state + _COLUMNS, columns)
    st64(state + _BLOCKS, (k + block - 1) // block)
    st64(state + _BLOCK, block)
    ports = stack64(1)
    st64(ports, 0)
    drop(api, call2(ld64(api + ort.KERNEL_INFO_GET_INPUT_COUNT), info, ports))
    if ld64(ports) < 3 or ld64(ports) > 4:
        return failure(state, cstr("it must have 3 or 4 inputs"))
    records = stack64(36)  # 3 RECORD
    memset(records, 0, 8 * 36)
    status = read_constants(state, info, 1, ld64(ports) - 1, records)
    if status != 0:
        return status
    return fill(state, records, ld64(ports) == 4)


def _create(op: int, api: int, info: int, out: int) -> int:
    """OrtCustomOp::CreateKernelV2."""
    st64(out, 0)
    state = new_state(op, api, info, _SIZE)
    if state == 0:
        return call2(ld64(api + ort.CREATE_STATUS), ort.FAIL, cstr("graphopt: out of memory"))
    status = make(state, info)
    if status != 0:
        aligned_free(ld64(state + _PACKED))
        aligned_free(state)
        return status
    st64(out, state)
    return 0


def _destroy(state: int) -> None:
    """OrtCustomOp::KernelDestroy."""
    if state != 0:
        aligned_free(ld64(state + _PACKED))
        aligned_free(state)


def _part(told: int, i: int) -> None:
    """A ParallelFor callback: some panels of a product."""
    start = i * ld64(told + _STEP)
    stop = min(start + ld64(told + _STEP), ld64(told + _PANELS))
    run(
        ld64(told + _X), ld64(told + _SUMS), ld64(told + _ROWS), ld64(told + _WEIGHTS), ld64(told + _N_BLOCKS), ld64(told + _WIDTH),
        start, stop, ld64(told + _OUT), ld64(told + _N),
    )  # fmt: skip


def _multiply(state: int, context: int, x: int, m: int, out: int) -> int:
    """m rows, on onnxruntime's threads; an OrtStatus."""
    api = ld64(state + API)
    k, columns, blocks, block = ld64(state + _K), ld64(state + _COLUMNS), ld64(state + _BLOCKS), ld64(state + _BLOCK)
    width, copied = blocks * block, 0
    if width != k:
        copied = m * width
    scratch = aligned_malloc(4 * (copied + FEW * blocks))
    if scratch == 0:
        return failure(state, cstr("out of memory"))
    rows, sums = x, scratch + 4 * copied
    if copied != 0:
        rows = scratch
        pad(scratch, x, m, k, width)
    if m < FEW:
        for r in range(m):
            block_sums(sums + 4 * blocks * r, rows + 4 * width * r, blocks, block)
    panels = (columns + PANEL - 1) // PANEL
    step = GRAIN // (m * PANEL * k) + 1
    told = stack64(10)
    st64(told + _X, rows)
    st64(told + _SUMS, sums)
    st64(told + _ROWS, m)
    st64(told + _WEIGHTS, ld64(state + _PACKED))
    st64(told + _N_BLOCKS, blocks)
    st64(told + _WIDTH, block)
    st64(told + _PANELS, panels)
    st64(told + _OUT, out)
    st64(told + _N, columns)
    st64(told + _STEP, step)
    par = stack64(4)
    st64(par, ld64(api + ort.KERNEL_CONTEXT_PARALLEL_FOR))
    st64(par + 8, context)
    st64(par + 16, api)
    st64(par + 24, 0)
    parallel_for(par, symaddr(PART), (panels + step - 1) // step, told)
    aligned_free(scratch)
    return ld64(par + 24)


def _compute(state: int, context: int) -> int:
    """OrtCustomOp::KernelComputeV2."""
    api = ld64(state + API)
    value, record, address = stack64(1), stack64(12), stack64(1)
    status = call3(ld64(api + ort.KERNEL_CONTEXT_GET_INPUT), context, 0, value)
    if status != 0:
        return status
    status = read_tensor(api, ld64(state + REFERENCE), ld64(value), record)
    if status != 0:
        return status
    ndim = ld64(record + ort.RECORD_NDIM)
    if ndim < 1 or ndim > ort.MAX_DIMS or ld64(record + ort.RECORD_DIMS + 8 * (ndim - 1)) != ld64(state + _K):
        return failure(state, cstr("the last of 1 to 8 axes of its input must have K elements"))
    m = 1
    for i in range(ndim - 1):
        m *= ld64(record + ort.RECORD_DIMS + 8 * i)
    st64(record + ort.RECORD_DIMS + 8 * (ndim - 1), ld64(state + _COLUMNS))
    status = call5(ld64(api + ort.KERNEL_CONTEXT_GET_OUTPUT), context, 0, record + ort.RECORD_DIMS, ndim, value)
    if status != 0:
        return status
    status = call2(ld64(api + ort.GET_TENSOR_MUTABLE_DATA), ld64(value), address)
    if status != 0 or m == 0:
        return status
    return multiply(state, context, ld64(record + ort.RECORD_DATA), m, ld64(address))


@cache
def _common() -> tuple[list[Export], dict[str, Any]]:
    """What is the same for every instruction set."""
    found, scope = node.common()
    templates = [*(f.py_func for f in (packed_bytes, pack, pad, block_sums)), holds, fill, make]
    exports, externs = link(templates, "_nbits", scope)
    return [*found, *exports], {**scope, **externs}


def _exports(isa: str) -> list[Export]:
    """The C functions of the family for one instruction set."""
    part = f"graphopt_nbits_part__{isa}"
    scope: dict[str, Any] = {"PART": part, "run": nbits(isa).run, **_common()[1]}
    scope["multiply"] = specialise(_multiply, f"nbits__{isa}", **scope)
    callbacks: tuple[Callable[..., Any], ...] = (_create, _compute, _destroy)
    exports = [*_common()[0], Export(part, clone(_part, part, **scope), 2, void=True)]
    for role, function, arguments in zip(ROLES, callbacks, (4, 2, 1), strict=True):
        name = symbol("nbits", role, isa)
        exports.append(Export(name, clone(function, name, **scope), arguments, void=role == "destroy"))
    return exports


def family(rungs: Sequence[str], sources: Sequence[str]) -> Family:
    """NBitsGemm and NBitsGemmZeros for each of these instruction sets."""
    given = (_FLOAT, _BYTE, _FLOAT)
    operators = (Operator(NBITS[0], given, (_FLOAT,)), Operator(NBITS[1], (*given, _BYTE), (_FLOAT,)))
    return Family("nbits", operators, tuple(rungs), _exports, tuple(sources))
