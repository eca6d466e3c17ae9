"""The second output of `compile-int8`: graphopt's operators as a shared library beside the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from graphopt.errors import ModelError, OptionError
from graphopt.operators import OperatorError, is_linux, library_name, platform_name

TARGETS = {"x86-64": "linux-x86_64", "aarch64": "linux-aarch64"}
Progress = Callable[[str, int, int], None]


def library_target(name: str | None = None) -> str:
    """The target of that name, by default this machine's. OptionError where there is none, OperatorError where this is no Linux."""
    if name is not None and name not in TARGETS:
        raise OptionError(f"unknown library target '{name}'; valid: {', '.join(TARGETS)}")
    if name is not None:
        return name
    here = next((target for target, where in TARGETS.items() if where == platform_name()), None)
    if here is None or not is_linux():
        raise OperatorError(f"libraries are built for Linux on {' and '.join(TARGETS)}, not {platform_name()}; name one")
    return here


def is_here(name: str | None) -> bool:
    """Whether a library for this target is one for this machine. OptionError where there is no such target."""
    return name is None or TARGETS[library_target(name)] == platform_name()


def build(target: str, progress: Progress) -> bytes:
    """The library's content: from the cache of this machine, else built, which takes up to a minute. Raises OperatorError."""
    try:
        from graphopt.kernels import aot

        return aot.library(target, progress=lambda done, total, what: progress(f"library: {what}", done, total)).read_bytes()
    except ImportError as error:
        raise OperatorError(f"the library cannot be built: {error} (pip install numba)") from error
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("graphopt: ")
        raise OperatorError(f"the library cannot be built: {reason[:300]}") from error


def check_library(folder: Path, target: str, content: bytes, *, overwrite: bool) -> Path:
    """Where the library goes. ModelError where a different file of that name is there and may not be replaced."""
    from graphopt.emit import check_target

    path = folder / library_name(TARGETS[target])
    if path.is_file() and path.read_bytes() == content:
        return path
    if path.exists() and not overwrite:
        raise ModelError(f"{path} exists and is another version; give --overwrite, or --no-library to write only the model")
    check_target(path, overwrite=overwrite)
    return path


def write_library(path: Path, content: bytes) -> None:
    """Write it atomically; the identical file is left as it is."""
    from graphopt.emit import write_bytes

    if not (path.is_file() and path.read_bytes() == content):
        write_bytes(path, content)
