"""An engine for the runtime's tests: every output is the first input plus a constant, as float32 or as saturated u8.

Plan: 0, 0, 0, 0, activations, parallel, element type of each output. `scales` may hold one float that is added too. One constant:
float32 with one element.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import aligned_free, aligned_malloc, atomic_xchg, cstr, memcpy, parallel_for, symaddr
from graphopt.kernels.isa import LADDERS
from graphopt.kernels.memory import ld64, ldf, st64, stf, stu8
from graphopt.kernels.region import Engine, family
from graphopt.kernels.specialise import specialise
from graphopt.kernels.text import put_number, put_text

CHUNKS = 16
SOURCES = (__file__,)

if TYPE_CHECKING:
    BODY = ""  # given by `engine`

# handle: 0 parallel, 8 added value (float32), 16 outputs, 24 spare instance, 32... output types
# instance: 0 handle, 8... record of the input; then input, output, elements, output index of a run (the callbacks get the instance)
_RUN = 8 + 8 * ort.RECORD


def _create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, err: int) -> int:
    outputs = plan_len - 6
    if n_consts != 1 or ld64(consts + ort.RECORD_TYPE) != 1 or outputs < 1:
        put_number(err, put_text(err, 0, cstr("one float32 constant expected, constants: ")), n_consts)
        return 0
    handle = aligned_malloc(32 + 8 * outputs)
    st64(handle, ld64(plan + 40))
    stf(handle + 8, ldf(ld64(consts)) + (ldf(scales) if n_scales > 0 else np.float32(0)))
    st64(handle + 16, outputs)
    st64(handle + 24, 0)
    memcpy(handle + 32, plan + 48, 8 * outputs)
    return handle


def _destroy(handle: int) -> None:
    aligned_free(ld64(handle + 24))
    aligned_free(handle)


def _acquire(handle: int, inputs: int, n_inputs: int, err: int) -> int:
    if ld64(inputs + ort.RECORD_TYPE) != 1 or ld64(inputs + ort.RECORD_NDIM) < 1:
        put_text(err, 0, cstr("the input must be float32 with a dimension"))
        return 0
    instance = atomic_xchg(handle + 24, 0)
    if instance == 0:
        instance = aligned_malloc(_RUN + 32)
    st64(instance, handle)
    memcpy(instance + 8, inputs, 8 * ort.RECORD)
    return instance


def _output_shape(instance: int, index: int, dims: int) -> int:
    memcpy(dims, instance + 8 + ort.RECORD_DIMS, 64)
    return ld64(instance + 8 + ort.RECORD_NDIM)


def _output_type(instance: int, index: int) -> int:
    return ld64(ld64(instance) + 32 + 8 * index)


def _part(instance: int, chunk: int) -> None:
    run = instance + _RUN
    elements = ld64(run + 16)
    handle = ld64(instance)
    added = ldf(handle + 8)
    x, out = ld64(run), ld64(run + 8)
    as_float = ld64(handle + 32 + 8 * ld64(run + 24)) == 1
    for i in range(chunk * elements // CHUNKS, (chunk + 1) * elements // CHUNKS):
        y = ldf(x + 4 * i) + added
        if as_float:
            stf(out + 4 * i, y)
        else:
            stu8(out + i, int(min(max(y, np.float32(0)), np.float32(255))))


def _run(instance: int, inputs: int, outputs: int, par: int) -> int:
    handle = ld64(instance)
    elements = 1
    for i in range(ld64(inputs + ort.RECORD_NDIM)):
        elements *= ld64(inputs + ort.RECORD_DIMS + 8 * i)
    run = instance + _RUN
    for index in range(ld64(handle + 16)):
        st64(run, ld64(inputs))
        st64(run + 8, ld64(outputs + 8 * index))
        st64(run + 16, elements)
        st64(run + 24, index)
        parallel_for(par if ld64(handle) != 0 else 0, symaddr(BODY), CHUNKS, instance)
    return 0


def _release(instance: int) -> None:
    aligned_free(atomic_xchg(ld64(instance) + 24, instance))


def engine(isa: str) -> Engine:
    """The engine for one instruction set; there is nothing special about any of them."""
    body = f"toy_part__{isa}"
    parts = (_create, _destroy, _acquire, _output_shape, _output_type, _run, _release)
    made = [specialise(part, isa, BODY=body, SOURCES=SOURCES) for part in parts]
    return Engine(*made, bodies={body: specialise(_part, isa, SOURCES=SOURCES)})  # type: ignore[misc] # mypy does not count


FAMILY = family(engine, sorted({r for rungs in LADDERS.values() for r in rungs}), SOURCES, "toy")


def _raising_create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, err: int) -> int:
    if plan_len > 3:
        raise ValueError("no library can have this")
    return plan


def _raising(isa: str) -> Engine:
    return engine(isa)._replace(create=specialise(_raising_create, isa, SOURCES=SOURCES))


RAISING = family(_raising, ("amx",), SOURCES, "raising")
