"""graphopt's own operators in onnxruntime sessions: `graphopt.register(options)` and `graphopt.session(path)`.

A model with INT8 regions (`compile-int8`) runs them with graphopt's library: the file beside the model, or code compiled in this
process. Where neither can be had, onnxruntime runs the functions that the model holds: the same results, only slower.
"""

from __future__ import annotations

import logging
import mmap
import platform
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from graphopt.errors import GraphoptError, ModelError, OptionError
from graphopt.kernels.plan import NBITS

if TYPE_CHECKING:
    import onnx

DOMAIN = "graphopt"
PREFIXES = ("Int8Region", "SparseLayer")
MACHINES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
LOG = logging.getLogger("graphopt")
REMARK = "the model also runs without them, only slower (fallback=True, or --no-library)"
Library = str | Path | Literal[False] | None
"""None: the one beside the model, else compiled in this process; "jit": always compiled; a path; False: none."""


class OperatorError(GraphoptError):
    """graphopt's operators cannot be had here."""


@dataclass(frozen=True)
class Operators:
    """How the regions of a model run. `rung`: the instruction set, "" where it is not known or none of ours."""

    kind: Literal["library", "jit", "functions", "none"]
    library: Path | None = None
    rung: str = ""
    reason: str = ""  # why not with what comes first: the library beside the model, then code compiled here

    def __str__(self) -> str:
        """As a user reads it.

        >>> str(Operators("jit", rung="avx512vnni"))
        'compiled in this process (avx512vnni)'
        """
        rung = f" ({self.rung})" if self.rung else ""
        named, why = self.library.name if self.library else "", f" ({self.reason})" if self.reason else ""
        return {
            "library": f"{named}{rung}",
            "jit": f"compiled in this process{rung}{why}",
            "functions": f"onnxruntime, from the functions in the model{why}",
            "none": "the model has no regions",
        }[self.kind]


@dataclass(frozen=True)
class RegionNode:
    """One region of a model: how many nodes it stands for, QuantizeLinear and DequantizeLinear not counted."""

    name: str
    nodes: int


def platform_name(system: str | None = None, machine: str | None = None) -> str:
    """`linux-x86_64`: what a library is for.

    >>> platform_name("Linux", "arm64")
    'linux-aarch64'
    """
    found = (machine or platform.machine()).lower()
    return f"{(system or platform.system()).lower()}-{MACHINES.get(found, found)}"


def library_name(where: str | None = None) -> str:
    """The name of the library beside a model, by default this platform's.

    >>> library_name("linux-aarch64")
    'graphopt-ops-linux-aarch64.so'
    """
    return f"graphopt-ops-{where or platform_name()}.so"


def regions(proto: onnx.ModelProto) -> list[RegionNode]:
    """The region nodes of a model, those in subgraphs too."""
    names = [f.name for f in proto.functions if f.domain == DOMAIN and f.name.startswith(PREFIXES)]
    sizes = {f.name: _computing(f) for f in proto.functions if f.domain == DOMAIN}
    found = [node.op_type for node in _nodes(proto.graph) if node.domain == DOMAIN and node.op_type.startswith(PREFIXES)]
    return [RegionNode(name, sizes.get(name, 0)) for name in found or names]


def _computing(function: onnx.FunctionProto) -> int:
    return sum(n.op_type not in ("Constant", "QuantizeLinear", "DequantizeLinear") for n in function.node)


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from _nodes(inner)


def has_regions(model: str | Path | bytes | onnx.ModelProto) -> bool:
    """Whether the model has nodes that graphopt's library runs; cheap where it has none, however large it is."""
    if isinstance(model, bytes):
        return any(name in model for name in _NAMES) and _runs_ours(_parsed(model))
    if not isinstance(model, str | Path):
        return _runs_ours(model)
    try:
        with Path(model).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if all(content.find(name) < 0 for name in _NAMES):
                return False
        return _runs_ours(_parsed(Path(model).read_bytes()))
    except (OSError, ValueError):  # not there, or empty: onnxruntime says what is wrong with it
        return False


_NAMES = tuple(name.encode() for name in (*PREFIXES, NBITS[0]))


def _runs_ours(proto: onnx.ModelProto) -> bool:
    return bool(regions(proto)) or any(n.domain == DOMAIN and n.op_type in NBITS for n in _nodes(proto.graph))


def _parsed(content: bytes) -> onnx.ModelProto:
    import onnx

    found = onnx.ModelProto()
    try:
        found.ParseFromString(content)
    except Exception:  # protobuf implementations differ in what they raise; onnxruntime says what is wrong with the file
        return onnx.ModelProto()
    return found


# ---- registering


@overload
def register(
    target: str, *, keeps: Iterable[str] = (), exact: bool = False, after: Iterable[str] = (), needs_data: bool = False
) -> Callable[[Callable[..., int]], Callable[..., int]]: ...


@overload
def register(target: Any) -> None: ...


def register(target: Any, **options: Any) -> Any:
    """With SessionOptions: make graphopt's operators known to the sessions made with them, compiled in this process.

    With the name of a pass it is the decorator `graphopt.registry.register`. Raises OperatorError where they cannot be had.
    """
    if isinstance(target, str):
        from graphopt.registry import register as register_pass

        return register_pass(target, **options)
    if options or not hasattr(target, "register_custom_ops_library"):
        raise OptionError("register: expected onnxruntime.SessionOptions, or the name of a pass and its properties")
    attach(target, "jit")
    return None


_KNOWN: weakref.WeakKeyDictionary[Any, Operators] = weakref.WeakKeyDictionary()  # SessionOptions that have them already


def attach(options: Any, library: Library, *, beside: Path | None = None) -> Operators:
    """Register the operators with these SessionOptions and say how. `beside`: the model's path. Raises OperatorError.

    Options that have them from here keep what they have: onnxruntime refuses a second set ("Domain already set in registry").
    """
    if library is False:
        return Operators("functions")
    if options not in _KNOWN:
        _KNOWN[options] = _attach(options, library, beside)
    return _KNOWN[options]


def _attach(options: Any, library: Library, beside: Path | None) -> Operators:
    if library not in (None, "jit"):
        path = Path(str(library))
        if not path.is_file():
            raise OperatorError(f"no such library: {path}")
        return _attach_file(options, path)
    local = beside.with_name(library_name()) if beside is not None and library is None else None
    reason = ""
    if local is not None:
        try:
            reason = f"there is no {local.name} beside the model"
            if local.is_file():
                return _attach_file(options, local)
        except OperatorError as error:
            reason = str(error)
    try:
        return replace(_attach_jit(options), reason=reason)
    except OperatorError as error:
        before = f"{reason} and " if reason else ""
        raise OperatorError(f"{before}{error}; {REMARK}") from error


def _attach_file(options: Any, path: Path) -> Operators:
    try:
        options.register_custom_ops_library(str(path.resolve()))
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        raise OperatorError(f"{path.name} cannot be used here ({_line(error)})") from error
    return Operators("library", path, rung())


def _attach_jit(options: Any) -> Operators:
    try:
        from graphopt.kernels import runtime

        runtime.register(options)
        return Operators("jit", rung=runtime.rung())
    except ImportError as error:
        raise OperatorError(f"they cannot be compiled in this process: {_line(error)} (pip install numba)") from error
    except Exception as error:  # Numba, LLVM and the system's loader each have their own
        raise OperatorError(f"they cannot be compiled in this process: {_line(error)}") from error


def rung() -> str:
    """The instruction set that the operators use in this process, "" where what would tell is not installed."""
    try:
        from graphopt.kernels.isa import detect

        return detect()
    except (ImportError, ValueError):
        return ""


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()).removeprefix("graphopt: ")[:300]


# ---- sessions


def session(
    path: str | Path | bytes | onnx.ModelProto,
    *,
    threads: int = 1,
    library: Library = None,
    providers: Sequence[str] | None = None,
    fallback: bool = False,
) -> Any:
    """An InferenceSession of the model, ready to run its INT8 regions with graphopt's operators.

    library: None takes `graphopt-ops-<platform>.so` beside the model, else compiles the operators in this process; a path names
    another file, "jit" always compiles, False leaves the regions to onnxruntime. threads: 0 takes all cores. fallback: leave them
    to onnxruntime also where the operators cannot be had; without it that is an OperatorError. Raises ModelError for a bad model.

    Why it is not the library beside the model goes to the log `graphopt`: at level INFO where there is none, as a WARNING where it
    cannot be used or where the regions are left to onnxruntime. `graphopt.operators.opened` returns it.
    """
    runner, how = opened(path, threads=threads, library=library, providers=providers, fallback=fallback)
    if how.reason:
        missing = how.kind == "jit" and how.reason.startswith("there is no ")
        LOG.log(logging.INFO if missing else logging.WARNING, "%s: %s", _named(path), how)
    return runner


def _named(model: str | Path | bytes | onnx.ModelProto) -> str:
    return str(model) if isinstance(model, str | Path) else "model"


def opened(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    threads: int = 1,
    library: Library = None,
    providers: Sequence[str] | None = None,
    fallback: bool = False,
) -> tuple[Any, Operators]:
    """`session`, and how the regions run."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if isinstance(model, str | Path) and not Path(model).is_file():
        raise ModelError(f"no such file: {model}")
    how = choose(options, model, library, fallback=fallback)
    content = model if isinstance(model, bytes) else str(model) if isinstance(model, str | Path) else model.SerializeToString()
    try:
        return ort.InferenceSession(content, options, providers=list(providers or ["CPUExecutionProvider"])), how
    except Exception as error:  # as above
        hint = f"; {REMARK}" if how.kind in ("library", "jit") and DOMAIN in str(error) else ""
        raise ModelError(f"onnxruntime cannot load the model: {_line(error)}{hint}") from error


def choose(options: Any, model: str | Path | bytes | onnx.ModelProto, library: Library, *, fallback: bool) -> Operators:
    """`attach` where the model has regions; with `fallback` without them where they cannot be had."""
    if library is not False and library not in (None, "jit") and not Path(library).is_file():
        raise OperatorError(f"no such library: {library}")
    if not has_regions(model):
        return Operators("none")
    try:
        return attach(options, library, beside=Path(model) if isinstance(model, str | Path) else None)
    except OperatorError as error:
        if not fallback:
            raise OperatorError(f"the model has nodes of graphopt, but {error}") from error
        return Operators("functions", reason=str(error).removesuffix(f"; {REMARK}"))


def is_linux() -> bool:
    """Whether libraries can be used here: they are built for Linux."""
    return sys.platform.startswith("linux")
