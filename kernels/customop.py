"""onnxruntime custom operators in compiled code: the operator table, its callbacks, and `RegisterCustomOps`.

A `Family` is a set of operators that share create, compute and destroy. A library (in this process, or ahead of time) holds any
number of families, each for several instruction sets; `registration` makes the function that onnxruntime calls, which chooses the
instruction set, fills the OrtCustomOp structs and adds them to the domain `graphopt`. Another kind of kernel is one more family.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from graphopt.kernels import cpu
from graphopt.kernels import ortapi as ort
from graphopt.kernels.abi import (
    call0,
    call1,
    call2,
    constant_table,
    cstr,
    lock,
    machine,
    memset,
    stack64,
    symaddr,
    text_words,
    unlock,
)
from graphopt.kernels.exports import Export
from graphopt.kernels.isa import LADDERS
from graphopt.kernels.memory import ld64, ldu8, st64
from graphopt.kernels.specialise import clone, compiled, specialise
from graphopt.kernels.text import put_text

if TYPE_CHECKING:  # globals that `registration` gives to the templates below
    RUNG_COUNT = OPERATOR_COUNT = 0
    STORAGE_NAME = ""

    def rung_names() -> int: ...
    def rung_bits() -> int: ...
    def common_words() -> int: ...
    def operator_words() -> int: ...
    def callback_table() -> int: ...
    def fill(op: int, storage: int, template: int, callbacks: int) -> None: ...
    def enlist(record: int, storage: int, api: int, minor: int) -> int: ...


DOMAIN = "graphopt"
ROLES = ("create", "compute", "destroy")

# an operator after its OrtCustomOp, in words
STORAGE = ort.OP_SIZE  # address of the library's storage
NAME = STORAGE + 1
INPUTS = NAME + 4
OUTPUTS = INPUTS + 1
KIND = OUTPUTS + 1  # 0 required, 2 variadic
INPUT_TYPES = KIND + 1
OUTPUT_TYPES = INPUT_TYPES + 8
WORDS = OUTPUT_TYPES + 8

# storage: [0] lock; APIS records of onnxruntimes that have registered (one, but for a process that loads several); the operators
APIS = 4
API_RECORD = 4  # OrtApi, domain, 1 where it has the shape call without an allocation
OPERATORS = 8 + APIS * API_RECORD  # word of the first operator


class Operator(NamedTuple):
    """Name and signature of an operator: ONNX element types, 0 for any. A variadic one has one entry on each side."""

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    variadic: bool = False


class Family(NamedTuple):
    """Operators that share their callbacks.

    `exports(isa)` are the C functions for an instruction set, among them `symbol(name, role, isa)` for every role of `ROLES`, in an
    order in which each uses only symbols of those before it. An export whose name does not end in `__<isa>` is the same for
    all, and is compiled once, for any CPU. `sources` are the files outside this package that the code is made of.
    """

    name: str
    operators: tuple[Operator, ...]
    rungs: tuple[str, ...]
    exports: Callable[[str], Sequence[Export]]
    sources: tuple[str, ...] = ()


def served_by(family: Family, rung: str) -> str:
    """The best code of a family that runs wherever a rung runs. A CPU with AVX-512 need not have AVX-VNNI."""
    if rung in family.rungs:
        return rung
    order = LADDERS[machine()]
    below = [r for r in order[order.index(rung) :] if r == rung or r != "avxvnni"]
    return next(r for r in below if r in family.rungs)


def symbol(family: str, role: str, isa: str) -> str:
    """The C name of a family's function for an instruction set."""
    return f"graphopt_{family}_{role}__{isa}"


def _op_name(op: int) -> int:
    return op + 8 * NAME


def _op_zero(op: int) -> int:
    return 0


def _op_one(op: int) -> int:
    return 1


def _op_zero_of(op: int, index: int) -> int:
    return 0


def _op_inputs(op: int) -> int:
    return ld64(op + 8 * INPUTS)


def _op_outputs(op: int) -> int:
    return ld64(op + 8 * OUTPUTS)


def _op_kind(op: int, index: int) -> int:
    return ld64(op + 8 * KIND)


def _op_input_type(op: int, index: int) -> int:
    return ld64(op + 8 * (INPUT_TYPES + index))


def _op_output_type(op: int, index: int) -> int:
    return ld64(op + 8 * (OUTPUT_TYPES + index))


_METADATA = (
    (_op_name, 1, (ort.OP_GET_NAME,)),
    (_op_zero, 1, (ort.OP_GET_PROVIDER, ort.OP_SAME_INPUTS, ort.OP_SAME_OUTPUTS)),
    (_op_one, 1, (ort.OP_MIN_INPUTS, ort.OP_MIN_OUTPUTS)),
    (_op_zero_of, 2, (ort.OP_MEMORY_TYPE,)),
    (_op_inputs, 1, (ort.OP_INPUT_COUNT,)),
    (_op_outputs, 1, (ort.OP_OUTPUT_COUNT,)),
    (_op_kind, 2, (ort.OP_INPUT_KIND, ort.OP_OUTPUT_KIND)),
    (_op_input_type, 2, (ort.OP_INPUT_TYPE,)),
    (_op_output_type, 2, (ort.OP_OUTPUT_TYPE,)),
)


def metadata() -> list[Export]:
    """The callbacks by which onnxruntime asks for names and signatures."""
    return [Export(f"graphopt{function.__name__}", clone(function, function.__name__), count) for function, count, _ in _METADATA]


def _callback_words() -> list[int | str]:
    """OrtCustomOp as a constant table, all of it that is the same for every operator."""
    words: list[int | str] = [0] * ort.OP_SIZE
    words[ort.OP_VERSION] = ort.API_VERSION
    for function, _, slots in _METADATA:
        for slot in slots:
            words[slot] = f"graphopt{function.__name__}"
    return words


def _operator_words(operator: Operator, family: int) -> list[int]:
    """The words NAME... of an operator, and the index of its family."""
    inputs, outputs = operator.inputs, operator.outputs
    kind = 2 if operator.variadic else 0
    types = [*inputs, *[0] * (8 - len(inputs)), *outputs, *[0] * (8 - len(outputs))]
    return [*text_words(operator.name, 4), len(inputs), len(outputs), kind, *types, family]


@compiled
def minor_version(text: int) -> int:
    """Minor version of onnxruntime from "1.24.0"; 0 for a major version below 1, 999 above."""
    major, i = 0, 0
    while 48 <= ldu8(text + i) <= 57:
        major = major * 10 + ldu8(text + i) - 48
        i += 1
    if major != 1:
        return 0 if major < 1 else 999
    minor = 0
    i += 1
    while 48 <= ldu8(text + i) <= 57:
        minor = minor * 10 + ldu8(text + i) - 48
        i += 1
    return minor


def _fill(op: int, storage: int, template: int, callbacks: int) -> None:
    """Make one operator of its template; `callbacks` are the addresses of create, compute and destroy."""
    common = common_words()
    for i in range(ort.OP_SIZE):
        st64(op + 8 * i, ld64(common + 8 * i))
    st64(op + 8 * STORAGE, storage)
    for i in range(NAME, WORDS):
        st64(op + 8 * i, ld64(template + 8 * (i - NAME)))
    st64(op + 8 * ort.OP_CREATE, ld64(callbacks))
    st64(op + 8 * ort.OP_COMPUTE, ld64(callbacks + 8))
    st64(op + 8 * ort.OP_DESTROY, ld64(callbacks + 16))


def _enlist(record: int, storage: int, api: int, minor: int) -> int:
    """Make the domain of an onnxruntime that has not registered before; an OrtStatus."""
    message = stack64(32)
    rung = cpu.select(rung_names(), rung_bits(), RUNG_COUNT, message)
    if rung < 0:
        return call2(ld64(api + ort.CREATE_STATUS), ort.FAIL, message)
    status = call2(ld64(api + ort.CREATE_CUSTOM_OP_DOMAIN), cstr(DOMAIN), record + 8)
    if status != 0:
        return status
    for i in range(OPERATOR_COUNT):
        template = operator_words() + 8 * (WORDS - NAME + 1) * i
        family = ld64(template + 8 * (WORDS - NAME))
        op = storage + 8 * (OPERATORS + WORDS * i)
        fill(op, storage, template, callback_table() + 24 * (family * RUNG_COUNT + rung))
        status = call2(ld64(api + ort.CUSTOM_OP_DOMAIN_ADD), ld64(record + 8), op)
        if status != 0:
            return status
    st64(record + 16, 1 if minor >= ort.REFERENCE_SINCE else 0)
    st64(record, api)
    return 0


def _register(options: int, base: int) -> int:
    """RegisterCustomOps(OrtSessionOptions *, const OrtApiBase *) -> OrtStatus *."""
    version = call0(ld64(base + 8))
    minor = minor_version(version)
    if minor < ort.API_VERSION:
        message = stack64(32)
        end = put_text(message, 0, cstr("graphopt: onnxruntime 1.17 or later is needed, this is "))
        put_text(message, end, version)
        return call2(ld64(call1(ld64(base), 1) + ort.CREATE_STATUS), ort.FAIL, message)
    api = call1(ld64(base), ort.API_VERSION)
    storage = symaddr(STORAGE_NAME)
    lock(storage)
    record = storage + 64
    for _ in range(APIS - 1):
        if ld64(record) != 0 and ld64(record) != api:
            record += 8 * API_RECORD
    status = 0
    if ld64(record) != api:
        if ld64(record) != 0:
            memset(
                record, 0, 8 * API_RECORD
            )  # a fifth onnxruntime: its predecessor keeps its domain, and is served anew if it returns
        status = enlist(record, storage, api, minor)
    unlock(storage)
    if status != 0:
        return status
    return call2(ld64(api + ort.ADD_CUSTOM_OP_DOMAIN), options, ld64(record + 8))


@compiled
def has_reference(op: int, api: int) -> int:
    """1 where the onnxruntime of this table has the shape call without an allocation."""
    record = ld64(op + 8 * STORAGE) + 64
    for _ in range(APIS):
        if ld64(record) == api:
            return ld64(record + 16)
        record += 8 * API_RECORD
    return 0


def storage_words(families: Sequence[Family]) -> int:
    """Size of a library's storage in int64, zero at the start."""
    return OPERATORS + WORDS * sum(len(f.operators) for f in families)


def registration(families: Sequence[Family], rungs: Sequence[str], name: str, storage: str) -> Export:
    """The function onnxruntime calls, for these families on the rungs that the library has code for, best first.

    `name` is its symbol, `storage` the symbol of `storage_words(families)` int64.
    """
    operators = [(o, i) for i, family in enumerate(families) for o in family.operators]
    callbacks = [symbol(f.name, role, served_by(f, rung)) for f in families for rung in rungs for role in ROLES]
    scope: dict[str, Any] = {
        "SOURCES": tuple(sorted({s for f in families for s in f.sources})),
        "rung_names": constant_table(f"{name}_rungs", [w for r in rungs for w in text_words(r, cpu.NAME_WORDS)]),
        "rung_bits": constant_table(f"{name}_bits", [cpu.bit(r) for r in rungs]),
        "common_words": constant_table(f"{name}_common", _callback_words()),
        "operator_words": constant_table(f"{name}_operators", [w for o, i in operators for w in _operator_words(o, i)]),
        "callback_table": constant_table(f"{name}_callbacks", callbacks),
        "RUNG_COUNT": len(rungs),
        "OPERATOR_COUNT": len(operators),
        "STORAGE_NAME": storage,
    }
    for helper in (_fill, _enlist):
        label = helper.__name__.strip("_")
        scope[label] = specialise(helper, name, **scope)
    return Export(name, clone(_register, name, **scope), 2)
