"""The operators Int8Region0 ... Int8Region63: what stands between onnxruntime and the engine that runs a compiled plan.

A node has the activations as its first inputs, then constants; any number of outputs; `plan` (ints, `plan[PLAN_INPUTS]` is the
number of activations) and `scales` (floats). `create` reads all that once, when the session is made; `compute` asks the engine for
an instance bound to the shapes at hand, lets onnxruntime allocate the outputs, and runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import (
    aligned_free,
    aligned_malloc,
    call1,
    call2,
    call3,
    call4,
    call5,
    cstr,
    ld8,
    ld32,
    ld64,
    memset,
    st8,
    st64,
    stack64,
)
from graphopt.kernels.customop import ROLES, Family, Operator, has_reference, symbol
from graphopt.kernels.exports import Export
from graphopt.kernels.specialise import clone, compiled, specialise
from graphopt.kernels.text import put_number, put_text

COUNT = 64  # operators of the family
PLAN_INPUTS = 4  # plan[PLAN_INPUTS] is the number of activations
LIMIT = 32  # activations, and outputs, of a node

# state of a node, bytes
_API, _REFERENCE, _HANDLE, _INPUTS, _OUTPUTS, _CHECKED = range(0, 48, 8)
_NAME = 64
_NAME_SIZE = 96  # longer names are cut, so that messages have room
_STATE = _NAME + _NAME_SIZE


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
    def make(state: int, info: int, plan: int, scales: int) -> int: ...
    def allocate(state: int, context: int, instance: int, addresses: int) -> int: ...
    def engine_create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, err: int) -> int: ...
    def engine_destroy(handle: int) -> None: ...
    def engine_acquire(handle: int, inputs: int, n_inputs: int, err: int) -> int: ...
    def engine_output_shape(instance: int, index: int, dims: int) -> int: ...
    def engine_output_type(instance: int, index: int) -> int: ...
    def engine_run(instance: int, inputs: int, outputs: int, par: int) -> int: ...
    def engine_release(instance: int) -> None: ...


@compiled
def _failure(state: int, message: int) -> int:
    """OrtStatus "graphopt: <node>: <message>"."""
    text = stack64(32)
    end = put_text(text, 0, cstr("graphopt: "))
    end = put_text(text, put_text(text, end, state + _NAME), cstr(": "))
    put_text(text, end, message)
    return call2(ld64(ld64(state + _API) + ort.CREATE_STATUS), ort.INVALID_ARGUMENT, text)


@compiled
def _failure_at(state: int, before: int, number: int, after: int) -> int:
    """As `_failure`, with a number between two texts."""
    text = stack64(32)
    put_text(text, put_number(text, put_text(text, 0, before), number), after)
    return _failure(state, text)


@compiled
def _drop(api: int, status: int) -> None:
    """Release a status that is answered by a message of ours."""
    if status != 0:
        call1(ld64(api + ort.RELEASE_STATUS), status)


@compiled
def read_tensor(api: int, reference: int, value: int, record: int) -> int:
    """Describe an OrtValue in a record (`ortapi.RECORD`); an OrtStatus."""
    scratch = stack64(2)
    status = call2(ld64(api + ort.GET_TENSOR_MUTABLE_DATA), value, record + ort.RECORD_DATA)
    if status != 0:
        return status
    st64(record + ort.RECORD_TYPE, 0)  # onnxruntime writes the low half
    if reference != 0:
        status = call4(
            ld64(api + ort.GET_TYPE_AND_SHAPE_REFERENCE), value, record + ort.RECORD_TYPE, scratch, record + ort.RECORD_NDIM
        )
        if status != 0:
            return status
        for i in range(min(ld64(record + ort.RECORD_NDIM), ort.MAX_DIMS)):
            st64(record + ort.RECORD_DIMS + 8 * i, ld64(ld64(scratch) + 8 * i))
        return 0
    status = call2(ld64(api + ort.GET_TENSOR_TYPE_AND_SHAPE), value, scratch)
    if status != 0:
        return status
    info = ld64(scratch)
    call2(ld64(api + ort.GET_DIMENSIONS_COUNT), info, record + ort.RECORD_NDIM)
    call3(ld64(api + ort.GET_DIMENSIONS), info, record + ort.RECORD_DIMS, min(ld64(record + ort.RECORD_NDIM), ort.MAX_DIMS))
    call2(ld64(api + ort.GET_TENSOR_ELEMENT_TYPE), info, record + ort.RECORD_TYPE)
    call1(ld64(api + ort.RELEASE_TENSOR_TYPE_AND_SHAPE), info)
    return 0


@compiled
def _read_name(api: int, info: int, state: int) -> None:
    """The node's name, cut to fit; "unnamed node" where there is none."""
    put_text(state + _NAME, 0, cstr("unnamed node"))
    size = stack64(1)
    st64(size, 0)
    read = ld64(api + ort.KERNEL_INFO_GET_NODE_NAME)
    _drop(api, call3(read, info, 0, size))
    if ld64(size) <= 1:
        return
    buffer = aligned_malloc(ld64(size) + 1)
    if buffer == 0:
        return
    status = call3(read, info, buffer, size)
    if status == 0:
        for i in range(min(ld64(size), _NAME_SIZE - 1)):
            st8(state + _NAME + i, ld8(buffer + i))
            st8(state + _NAME + i + 1, 0)
    _drop(api, status)
    aligned_free(buffer)


@compiled
def _read_list(api: int, slot: int, info: int, name: int, item: int, out: int) -> int:
    """A list attribute in new memory: out[0] address (free it), out[1] length; -1 where the node has none, -2 without memory."""
    st64(out, 0)
    st64(out + 8, 0)
    status = call4(ld64(api + slot), info, name, 0, out + 8)
    if status != 0:
        _drop(api, status)
        return -1
    buffer = aligned_malloc(item * ld64(out + 8) + 8)
    if buffer == 0:
        return -2
    status = call4(ld64(api + slot), info, name, buffer, out + 8)
    if status != 0:
        _drop(api, status)
        aligned_free(buffer)
        return -1
    st64(out, buffer)
    return 0


@compiled
def _read_constants(state: int, info: int, first: int, count: int, records: int) -> int:
    """Describe the constant inputs from `first` on; an OrtStatus."""
    api = ld64(state + _API)
    found = stack64(2)
    for i in range(count):
        st64(found, 0)
        st64(found + 8, 0)
        status = call4(ld64(api + ort.KERNEL_INFO_GET_CONSTANT_INPUT), info, first + i, found, found + 8)
        if status != 0:
            return status
        if ld32(found) == 0:
            return _failure_at(state, cstr("input "), first + i, cstr(" must be a constant: an initializer that is no graph input"))
        status = read_tensor(api, ld64(state + _REFERENCE), ld64(found + 8), records + 8 * ort.RECORD * i)
        if status != 0:
            return status
        if ld64(records + 8 * ort.RECORD * i + ort.RECORD_NDIM) > ort.MAX_DIMS:
            return _failure_at(state, cstr("input "), first + i, cstr(" has more than 8 dimensions"))
    return 0


@compiled
def _count_ports(state: int, info: int, plan: int) -> int:
    """Number of inputs, activations and outputs of the node, checked; out: _INPUTS, _OUTPUTS. The number of constants, or < 0."""
    api = ld64(state + _API)
    ports = stack64(2)
    _drop(api, call2(ld64(api + ort.KERNEL_INFO_GET_INPUT_COUNT), info, ports))
    _drop(api, call2(ld64(api + ort.KERNEL_INFO_GET_OUTPUT_COUNT), info, ports + 8))
    activations = ld64(plan + 8 * PLAN_INPUTS)
    st64(state + _INPUTS, activations)
    st64(state + _OUTPUTS, ld64(ports + 8))
    if activations < 1 or activations > min(LIMIT, ld64(ports)) or ld64(ports + 8) < 1 or ld64(ports + 8) > LIMIT:
        return -1
    return ld64(ports) - activations


def _make(state: int, info: int, plan: int, scales: int) -> int:
    """Give the plan and the constants to the engine; `plan` and `scales` are (address, length). An OrtStatus."""
    if ld64(plan + 8) <= PLAN_INPUTS:
        return _failure(state, cstr("attribute 'plan' is too short"))
    constants = _count_ports(state, info, ld64(plan))
    if constants < 0:
        return _failure(state, cstr("attribute 'plan' does not fit the number of inputs and outputs (up to 32 of each)"))
    records = aligned_malloc(8 * ort.RECORD * (constants + 1))
    if records == 0:
        return _failure(state, cstr("out of memory"))
    memset(records, 0, 8 * ort.RECORD * (constants + 1))
    status = _read_constants(state, info, ld64(state + _INPUTS), constants, records)
    if status == 0:
        message = stack64(32)
        put_text(message, 0, cstr("the engine refused the plan"))
        handle = engine_create(ld64(plan), ld64(plan + 8), ld64(scales), ld64(scales + 8), records, constants, message)
        st64(state + _HANDLE, handle)
        if handle == 0:
            status = _failure(state, message)
    aligned_free(records)
    return status


def _body(usr: int, i: int) -> None:
    """A ParallelFor callback: what the engine gives, as a C function."""
    call(usr, i)


def _create(op: int, api: int, info: int, out: int) -> int:
    """OrtCustomOp::CreateKernelV2."""
    st64(out, 0)
    state = aligned_malloc(_STATE)
    if state == 0:
        return call2(ld64(api + ort.CREATE_STATUS), ort.FAIL, cstr("graphopt: out of memory"))
    memset(state, 0, _STATE)
    st64(state + _API, api)
    st64(state + _REFERENCE, has_reference(op, api))
    _read_name(api, info, state)
    plan = stack64(2)
    scales = stack64(2)
    st64(scales, 0)
    found = _read_list(api, ort.GET_ATTRIBUTE_INTS, info, cstr("plan"), 8, plan)
    if found == 0 and _read_list(api, ort.GET_ATTRIBUTE_FLOATS, info, cstr("scales"), 4, scales) == -2:
        found = -2
    if found == 0:
        status = make(state, info, plan, scales)
    elif found == -1:
        status = _failure(state, cstr("attribute 'plan' is missing"))
    else:
        status = _failure(state, cstr("out of memory"))
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


@compiled
def _read_inputs(state: int, context: int, records: int) -> int:
    """Describe the activations of a run; an OrtStatus."""
    api = ld64(state + _API)
    value = stack64(1)
    for i in range(ld64(state + _INPUTS)):
        record = records + 8 * ort.RECORD * i
        status = call3(ld64(api + ort.KERNEL_CONTEXT_GET_INPUT), context, i, value)
        if status != 0:
            return status
        if ld64(value) == 0:
            return _failure_at(state, cstr("input "), i, cstr(" is missing"))
        status = read_tensor(api, ld64(state + _REFERENCE), ld64(value), record)
        if status != 0:
            return status
        if ld64(record + ort.RECORD_NDIM) > ort.MAX_DIMS:
            return _failure_at(state, cstr("input "), i, cstr(" has more than 8 dimensions"))
    return 0


def _allocate(state: int, context: int, instance: int, addresses: int) -> int:
    """Have onnxruntime allocate the outputs, and see once that it takes them for the same types. An OrtStatus."""
    api = ld64(state + _API)
    dims = stack64(8)
    value = stack64(1)
    record = stack64(12)
    for i in range(ld64(state + _OUTPUTS)):
        ndim = engine_output_shape(instance, i, dims)
        status = call5(ld64(api + ort.KERNEL_CONTEXT_GET_OUTPUT), context, i, dims, ndim, value)
        if status != 0:
            return status
        if ld64(value) == 0:
            return _failure_at(state, cstr("output "), i, cstr(" is missing"))
        if ld64(state + _CHECKED) == 0:
            status = read_tensor(api, ld64(state + _REFERENCE), ld64(value), record)
            if status != 0:
                return status
            if ld64(record + ort.RECORD_TYPE) != engine_output_type(instance, i):
                return _failure_at(state, cstr("output "), i, cstr(" is declared with another element type than the plan gives it"))
        status = call2(ld64(api + ort.GET_TENSOR_MUTABLE_DATA), ld64(value), addresses + 8 * i)
        if status != 0:
            return status
    st64(state + _CHECKED, 1)
    return 0


def _compute(state: int, context: int) -> int:
    """OrtCustomOp::KernelComputeV2."""
    api = ld64(state + _API)
    records = stack64(384)  # LIMIT * RECORD
    status = _read_inputs(state, context, records)
    if status != 0:
        return status
    message = stack64(32)
    instance = engine_acquire(ld64(state + _HANDLE), records, ld64(state + _INPUTS), message)
    if instance == 0:
        return _failure(state, message)
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
            status = _failure_at(state, cstr("the engine stopped with code "), code, cstr(""))
    engine_release(instance)
    return status


def _exports(name: str, made: Engine, isa: str, sources: tuple[str, ...]) -> list[Export]:
    """The C functions of the family for one instruction set."""
    scope: dict[str, Any] = {f"engine_{field}": getattr(made, field) for field in Engine._fields if field != "bodies"}
    scope["SOURCES"] = sources
    for helper in (_make, _allocate):
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
    """Int8Region0 ... (or another `prefix`) on an engine: `make_engine(isa)` gives its functions for each of these instruction sets.

    `sources` are the files that the engine is made of (`specialise.package_sources()`): cached code is bound to their content.
    `name` tells engines apart that live in one process. `exports(isa)` are the C functions that the engine's functions call by
    name; those without `__<isa>` in their names are the same for every instruction set.
    """
    operators = tuple(Operator(f"{prefix}{i}", (0,), (0,), variadic=True) for i in range(COUNT))
    files = tuple(sources)

    def all_exports(isa: str) -> list[Export]:
        return [*(exports(isa) if exports else ()), *_exports(name, make_engine(isa), isa, files)]

    return Family(name, operators, tuple(rungs), all_exports, files)
