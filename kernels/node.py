"""What the callbacks of every family need of a node, in compiled code: its name in messages, attributes, constants, tensors.

A node's state starts with the fields below; what a family adds follows at STATE. Callbacks call these functions by symbol
(`common`), so that each is compiled once, not once more into every caller.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import aligned_free, aligned_malloc, call1, call2, call3, call4, cstr, memset, stack64
from graphopt.kernels.customop import has_reference
from graphopt.kernels.exports import Export
from graphopt.kernels.externs import link
from graphopt.kernels.memory import ld32, ld64, ldu8, st64, stu8
from graphopt.kernels.text import put_number, put_text

# bytes of a node's state
API, REFERENCE = 0, 8  # OrtApi; 1 where it has the shape call without an allocation
NAME = 16
NAME_SIZE = 96  # longer names are cut, so that messages have room
STATE = NAME + NAME_SIZE


def failure(state: int, message: int) -> int:
    """OrtStatus "graphopt: <node>: <message>"."""
    text = stack64(32)
    end = put_text(text, 0, cstr("graphopt: "))
    end = put_text(text, put_text(text, end, state + NAME), cstr(": "))
    put_text(text, end, message)
    return call2(ld64(ld64(state + API) + ort.CREATE_STATUS), ort.INVALID_ARGUMENT, text)


def failure_at(state: int, before: int, number: int, after: int) -> int:
    """As `failure`, with a number between two texts."""
    text = stack64(32)
    put_text(text, put_number(text, put_text(text, 0, before), number), after)
    return failure(state, text)


def drop(api: int, status: int) -> None:
    """Release a status that is answered by a message of ours."""
    if status != 0:
        call1(ld64(api + ort.RELEASE_STATUS), status)


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


def read_name(api: int, info: int, state: int) -> None:
    """The node's name, cut to fit; "unnamed node" where there is none."""
    put_text(state + NAME, 0, cstr("unnamed node"))
    size = stack64(1)
    st64(size, 0)
    read = ld64(api + ort.KERNEL_INFO_GET_NODE_NAME)
    drop(api, call3(read, info, 0, size))
    if ld64(size) <= 1:
        return
    buffer = aligned_malloc(ld64(size) + 1)
    if buffer == 0:
        return
    status = call3(read, info, buffer, size)
    if status == 0:
        for i in range(min(ld64(size), NAME_SIZE - 1)):
            stu8(state + NAME + i, ldu8(buffer + i))
            stu8(state + NAME + i + 1, 0)
    drop(api, status)
    aligned_free(buffer)


def read_list(api: int, slot: int, info: int, name: int, item: int, out: int) -> int:
    """A list attribute in new memory: out[0] address (free it), out[1] length; -1 where the node has none, -2 without memory."""
    st64(out, 0)
    st64(out + 8, 0)
    status = call4(ld64(api + slot), info, name, 0, out + 8)
    if status != 0:
        drop(api, status)
        return -1
    buffer = aligned_malloc(item * ld64(out + 8) + 8)
    if buffer == 0:
        return -2
    status = call4(ld64(api + slot), info, name, buffer, out + 8)
    if status != 0:
        drop(api, status)
        aligned_free(buffer)
        return -1
    st64(out, buffer)
    return 0


def read_constants(state: int, info: int, first: int, count: int, records: int) -> int:
    """Describe the constant inputs from `first` on; an OrtStatus."""
    api = ld64(state + API)
    found = stack64(2)
    for i in range(count):
        st64(found, 0)
        st64(found + 8, 0)
        status = call4(ld64(api + ort.KERNEL_INFO_GET_CONSTANT_INPUT), info, first + i, found, found + 8)
        if status != 0:
            return status
        if ld32(found) == 0:
            return failure_at(state, cstr("input "), first + i, cstr(" must be a constant: an initializer that is no graph input"))
        status = read_tensor(api, ld64(state + REFERENCE), ld64(found + 8), records + 8 * ort.RECORD * i)
        if status != 0:
            return status
        if ld64(records + 8 * ort.RECORD * i + ort.RECORD_NDIM) > ort.MAX_DIMS:
            return failure_at(state, cstr("input "), first + i, cstr(" has more than 8 dimensions"))
    return 0


def new_state(op: int, api: int, info: int, size: int) -> int:
    """`size` zero bytes with the fields of every state filled; 0 where memory is out."""
    state = aligned_malloc(size)
    if state == 0:
        return 0
    memset(state, 0, size)
    st64(state + API, api)
    st64(state + REFERENCE, has_reference(op, api))
    read_name(api, info, state)
    return state


def read_integer(api: int, info: int, name: int) -> int:
    """An attribute of one integer; -1 where the node has none."""
    value = stack64(1)
    status = call3(ld64(api + ort.KERNEL_INFO_GET_ATTRIBUTE_INT64), info, name, value)
    if status != 0:
        drop(api, status)
        return -1
    return ld64(value)


TEMPLATES = (
    failure, failure_at, drop, read_tensor, read_name, read_list, read_constants, new_state, read_integer,
)  # fmt: skip


@cache
def common() -> tuple[list[Export], dict[str, Any]]:
    """The functions as exports, and what calls them, by name: the scope of a callback."""
    return link(TEMPLATES, "", {})
