"""The operators Int8Region0 ... Int8Region63: what stands between onnxruntime and the engine that runs a compiled plan.

A node has the activations as its first inputs, then constants; any number of outputs; `plan` (ints, `plan[PLAN_INPUTS]` is the
number of activations) and `scales` (floats). `create` reads all that once, when the session is made; `compute` asks the engine for
an instance bound to the shapes at hand, lets onnxruntime allocate the outputs, and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from graphopt.kernels import node
from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import aligned_free, aligned_malloc, call2, call3, call5, cstr, memset, stack64
from graphopt.kernels.customop import ROLES, Family, Operator, symbol
from graphopt.kernels.exports import Export
from graphopt.kernels.memory import ld64, st64
from graphopt.kernels.node import (
    API,
    REFERENCE,
    STATE,
    drop,
    failure,
    failure_at,
    new_state,
    read_constants,
    read_list,
    read_tensor,
)
from graphopt.kernels.specialise import clone, specialise
from graphopt.kernels.text import put_text

COUNT = 64  # operators of the family
PLAN_INPUTS = 4  # plan[PLAN_INPUTS] is the number of activations
LIMIT = 32  # activations, and outputs, of a node

_HANDLE, _INPUTS, _OUTPUTS, _CHECKED = range(STATE, STATE + 32, 8)  # of a node's state, bytes
_SIZE = STATE + 32


class Engine(NamedTuple):
    """The njit functions of an engine for one instruction set, on int64 addresses; `graphopt.kernels.region` is their only caller.

    `bodies` are its ParallelFor callbacks, `void f(usr, i)`, by the symbol that the engine passes to `parallel_for`.
    """

    create: Any
    destroy: Any
    acquire: Any
    output_shape: Any
    output_type: Any
    run: Any
    release: Any
    bodies: Mapping[str, Any]


if TYPE_CHECKING:  # globals that `_exports` gives to the templates below: the engine, and the functions of this file that use it

    def call(usr: int, i: int) -> None: ...
    def count_ports(state: int, info: int, plan: int) -> int: ...
    def read_inputs(state: int, context: int, records: int) -> int: ...
    def make(state: int, info: int, plan: int, scales: int) -> int: ...
    def allocate(state: int, context: int, instance: int, addresses: int) -> int: ...
    def engine_create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, err: int) -> int: ...
    def engine_destroy(handle: int) -> None: ...
    def engine_acquire(handle: int, inputs: int, n_inputs: int, err: int) -> int: ...
    def engine_output_shape(instance: int, index: int, dims: int) -> int: ...
    def engine_output_type(instance: int, index: int) -> int: ...
    def engine_run(instance: int, inputs: int, outputs: int, par: int) -> int: ...
    def engine_release(instance: int) -> None: ...


def _count_ports(state: int, info: int, plan: int) -> int:
    """Number of inputs, activations and outputs of the node, checked; out: _INPUTS, _OUTPUTS. The number of constants, or < 0."""
    api = ld64(state + API)
    ports = stack64(2)
    drop(api, call2(ld64(api + ort.KERNEL_INFO_GET_INPUT_COUNT), info, ports))
    drop(api, call2(ld64(api + ort.KERNEL_INFO_GET_OUTPUT_COUNT), info, ports + 8))
    activations = ld64(plan + 8 * PLAN_INPUTS)
    st64(state + _INPUTS, activations)
    st64(state + _OUTPUTS, ld64(ports + 8))
    if activations < 1 or activations > min(LIMIT, ld64(ports)) or ld64(ports + 8) < 1 or ld64(ports + 8) > LIMIT:
        return -1
    return ld64(ports) - activations


def _make(state: int, info: int, plan: int, scales: int) -> int:
    """Give the plan and the constants to the engine; `plan` and `scales` are (address, length). An OrtStatus."""
    if ld64(plan + 8) <= PLAN_INPUTS:
        return failure(state, cstr("attribute 'plan' is too short"))
    constants = count_ports(state, info, ld64(plan))
    if constants < 0:
        return failure(state, cstr("attribute 'plan' does not fit the number of inputs and outputs (up to 32 of each)"))
    records = aligned_malloc(8 * ort.RECORD * (constants + 1))
    if records == 0:
        return failure(state, cstr("out of memory"))
    memset(records, 0, 8 * ort.RECORD * (constants + 1))
    status = read_constants(state, info, ld64(state + _INPUTS), constants, records)
    if status == 0:
        message = stack64(32)
        put_text(message, 0, cstr("the engine refused the plan"))
        handle = engine_create(ld64(plan), ld64(plan + 8), ld64(scales), ld64(scales + 8), records, constants, message)
        st64(state + _HANDLE, handle)
        if handle == 0:
            status = failure(state, message)
    aligned_free(records)
    return status


def _body(usr: int, i: int) -> None:
    """A ParallelFor callback: what the engine gives, as a C function."""
    call(usr, i)


def _create(op: int, api: int, info: int, out: int) -> int:
    """OrtCustomOp::CreateKernelV2."""
    st64(out, 0)
    state = new_state(op, api, info, _SIZE)
    if state == 0:
        return call2(ld64(api + ort.CREATE_STATUS), ort.FAIL, cstr("graphopt: out of memory"))
    plan = stack64(2)
    scales = stack64(2)
    st64(scales, 0)
    found = read_list(api, ort.GET_ATTRIBUTE_INTS, info, cstr("plan"), 8, plan)
    if found == 0 and read_list(api, ort.GET_ATTRIBUTE_FLOATS, info, cstr("scales"), 4, scales) == -2:
        found = -2
    if found == 0:
        status = make(state, info, plan, scales)
    elif found == -1:
        status = failure(state, cstr("attribute 'plan' is missing"))
    else:
        status = failure(state, cstr("out of memory"))
    aligned_free(ld64(plan))
    aligned_free(ld64(scales))
    if status != 0:
        aligned_free(state)
        return status
    st64(out, state)
    return 0


def _destroy(state: int) -> None:
    """OrtCustomOp::KernelDestroy."""
    if state != 0:
        engine_destroy(ld64(state + _HANDLE))
        aligned_free(state)


def _read_inputs(state: int, context: int, records: int) -> int:
    """Describe the activations of a run; an OrtStatus."""
    api = ld64(state + API)
    value = stack64(1)
    for i in range(ld64(state + _INPUTS)):
        record = records + 8 * ort.RECORD * i
        status = call3(ld64(api + ort.KERNEL_CONTEXT_GET_INPUT), context, i, value)
        if status != 0:
            return status
        if ld64(value) == 0:
            return failure_at(state, cstr("input "), i, cstr(" is missing"))
        status = read_tensor(api, ld64(state + REFERENCE), ld64(value), record)
        if status != 0:
            return status
        if ld64(record + ort.RECORD_NDIM) > ort.MAX_DIMS:
            return failure_at(state, cstr("input "), i, cstr(" has more than 8 dimensions"))
    return 0


def _allocate(state: int, context: int, instance: int, addresses: int) -> int:
    """Have onnxruntime allocate the outputs, and see once that it takes them for the same types. An OrtStatus."""
    api = ld64(state + API)
    dims = stack64(8)
    value = stack64(1)
    record = stack64(12)
    for i in range(ld64(state + _OUTPUTS)):
        ndim = engine_output_shape(instance, i, dims)
        status = call5(ld64(api + ort.KERNEL_CONTEXT_GET_OUTPUT), context, i, dims, ndim, value)
        if status != 0:
            return status
        if ld64(value) == 0:
            return failure_at(state, cstr("output "), i, cstr(" is missing"))
        if ld64(state + _CHECKED) == 0:
            status = read_tensor(api, ld64(state + REFERENCE), ld64(value), record)
            if status != 0:
                return status
            if ld64(record + ort.RECORD_TYPE) != engine_output_type(instance, i):
                return failure_at(state, cstr("output "), i, cstr(" is declared with another element type than the plan gives it"))
        status = call2(ld64(api + ort.GET_TENSOR_MUTABLE_DATA), ld64(value), addresses + 8 * i)
        if status != 0:
            return status
    st64(state + _CHECKED, 1)
    return 0


def _compute(state: int, context: int) -> int:
    """OrtCustomOp::KernelComputeV2."""
    api = ld64(state + API)
    records = stack64(384)  # LIMIT * RECORD
    status = read_inputs(state, context, records)
    if status != 0:
        return status
    message = stack64(32)
    instance = engine_acquire(ld64(state + _HANDLE), records, ld64(state + _INPUTS), message)
    if instance == 0:
        return failure(state, message)
    addresses = stack64(32)  # LIMIT
    status = allocate(state, context, instance, addresses)
    if status == 0:
        par = stack64(4)
        st64(par, ld64(api + ort.KERNEL_CONTEXT_PARALLEL_FOR))
        st64(par + 8, context)
        st64(par + 16, api)
        st64(par + 24, 0)
        code = engine_run(instance, records, addresses, par)
        status = ld64(par + 24)
        if status == 0 and code != 0:
            status = failure_at(state, cstr("the engine stopped with code "), code, cstr(""))
    engine_release(instance)
    return status


def _exports(name: str, made: Engine, isa: str, sources: tuple[str, ...]) -> list[Export]:
    """The C functions of the family for one instruction set."""
    scope: dict[str, Any] = {f"engine_{field}": getattr(made, field) for field in Engine._fields if field != "bodies"}
    scope |= {"SOURCES": sources, **node.common()[1]}
    for helper in (_count_ports, _read_inputs, _make, _allocate):
        scope[helper.__name__.strip("_")] = specialise(helper, f"{name}__{isa}", **scope)
    exports = [Export(body, clone(_body, body, call=f, SOURCES=sources), 2, void=True) for body, f in made.bodies.items()]
    callbacks: tuple[Callable[..., Any], ...] = (_create, _compute, _destroy)
    for role, function, arguments in zip(ROLES, callbacks, (4, 2, 1), strict=True):
        c_name = symbol(name, role, isa)
        exports.append(Export(c_name, clone(function, c_name, **scope), arguments, void=role == "destroy"))
    return exports


def family(
    make_engine: Callable[[str], Engine],
    rungs: Sequence[str],
    sources: Sequence[str],
    name: str = "region",
    exports: Callable[[str], Sequence[Export]] | None = None,
    prefix: str = "Int8Region",
) -> Family:
    """Int8Region0 ... (or another `prefix`) on an engine: `make_engine(isa)` gives its functions for each of these rungs.

    `sources` are the files that the engine is made of (`specialise.package_sources()`): cached code is bound to their content.
    `name` tells engines apart that live in one process. `exports(isa)` are the C functions that the engine's functions call by
    name; those without `__<isa>` in their names are the same for every instruction set.
    """
    operators = tuple(Operator(f"{prefix}{i}", (0,), (0,), variadic=True) for i in range(COUNT))
    files = tuple(sources)

    def all_exports(isa: str) -> list[Export]:
        return [*node.common()[0], *(exports(isa) if exports else ()), *_exports(name, make_engine(isa), isa, files)]

    return Family(name, operators, tuple(rungs), all_exports, files)
