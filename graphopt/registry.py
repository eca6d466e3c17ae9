"""Passes by name. A pass is a function `(model, context, *, options) -> number of changes`; 0 promises an untouched model."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from graphopt.errors import OptionError

ENTRY_POINTS = "graphopt.passes"

# name -> module, imported on first use; a test checks that each module registers exactly this name
BUILTIN = {
    "common-subexpressions": "graphopt.passes.common_subexpressions",
    "compile-int8": "graphopt.passes.compile_int8",
    "compile-nbits": "graphopt.passes.compile_nbits",
    "compile-sparse": "graphopt.passes.compile_sparse",
    "dead-code": "graphopt.passes.dead_code",
    "drop-defaults": "graphopt.passes.drop_defaults",
    "flush-denormals": "graphopt.passes.flush_denormals",
    "fold-bn": "graphopt.passes.fold_bn",
    "fold-constants": "graphopt.passes.fold_constants",
    "fold-scales": "graphopt.passes.fold_scales",
    "freeze-inputs": "graphopt.passes.freeze_inputs",
    "fuse-pads": "graphopt.passes.fuse_pads",
    "merge-initializers": "graphopt.passes.merge_initializers",
    "merge-reshapes": "graphopt.passes.merge_reshapes",
    "prune-blocks": "graphopt.passes.prune_blocks",
    "prune-channels": "graphopt.passes.prune_channels",
    "prune-heads": "graphopt.passes.prune_heads",
    "prune-neurons": "graphopt.passes.prune_neurons",
    "prune-search": "graphopt.passes.prune_search",
    "quantize": "graphopt.passes.quantize",
    "recover": "graphopt.passes.recover",
    "remove-noops": "graphopt.passes.remove_noops",
    "sparsify": "graphopt.passes.sparsify",
}


@dataclass(frozen=True)
class Pass:
    """A registered pass. `keeps`: analyses still true after a change. `exact`: outputs move by rounding only.

    `after`: passes that must not come later than this one in a pipeline that has both. `repairs`: wants the model as it was before
    the first removal (`Context.baseline`).
    """

    name: str
    fn: Callable[..., int]
    keeps: frozenset[str] = frozenset()
    exact: bool = False
    after: frozenset[str] = frozenset()
    needs_data: bool = False
    repairs: bool = False

    def options(self) -> dict[str, inspect.Parameter]:
        """The keyword-only arguments, which are the pass's options."""
        parameters = inspect.signature(self.fn).parameters
        return {name: p for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}

    def types(self) -> dict[str, Any]:
        """The declared type of each option."""
        hints = get_type_hints(self.fn)
        return {name: hints.get(name, str) for name in self.options()}

    def summary(self) -> str:
        """The first line of the docstring."""
        return (inspect.getdoc(self.fn) or "").split("\n", 1)[0]


@dataclass
class Registry:
    """Built-in, packaged (entry points) and file plugins; a clash of names raises and names both owners."""

    passes: dict[str, Pass] = field(default_factory=dict)
    loaded_plugins: bool = False

    def add(self, entry: Pass) -> None:
        known = self.passes.get(entry.name)
        owner = entry.fn.__module__
        if known is not None and known.fn.__module__ != owner:
            raise OptionError(f"two passes are named '{entry.name}': one in {known.fn.__module__}, one in {owner}; rename one")
        builtin = BUILTIN.get(entry.name)
        if builtin is not None and builtin != owner:
            raise OptionError(f"two passes are named '{entry.name}': one in {builtin}, one in {owner}; rename one")
        self.passes[entry.name] = entry

    def find(self, name: str) -> Pass:
        """The pass of that name; imports its module if need be. Raises OptionError with the valid names."""
        if name not in self.passes and name in BUILTIN:
            importlib.import_module(BUILTIN[name])
        if name not in self.passes:
            self.load_entry_points()
        if name not in self.passes:
            raise OptionError(f"unknown pass '{name}'; {suggest(name, self.names())}")
        return self.passes[name]

    def names(self) -> list[str]:
        """All names, plugins included, without importing the built-in modules."""
        self.load_entry_points()
        return sorted({*BUILTIN, *self.passes})

    def load_entry_points(self) -> None:
        if self.loaded_plugins:
            return
        from importlib.metadata import entry_points

        self.loaded_plugins = True
        for point in entry_points(group=ENTRY_POINTS):
            try:
                point.load()
            except OptionError:
                raise
            except Exception as error:  # somebody else's module: anything can happen in it
                raise OptionError(f"plugin '{point.name}' ({point.value}) cannot be loaded: {error}") from error


REGISTRY = Registry()


def register(
    name: str,
    *,
    keeps: Iterable[str] = (),
    exact: bool = False,
    after: Iterable[str] = (),
    needs_data: bool = False,
    repairs: bool = False,
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorator: make a function `(model, context, *, options) -> int` a pass."""

    def add(fn: Callable[..., int]) -> Callable[..., int]:
        REGISTRY.add(Pass(name, fn, frozenset(keeps), exact, frozenset(after), needs_data, repairs))
        return fn

    return add


def find(name: str) -> Pass:
    """The pass of that name (built-in, plugin package or file)."""
    return REGISTRY.find(name)


def load_plugin(path: str | Path) -> list[str]:
    """Import a Python file that registers passes; returns their names."""
    file = Path(path).resolve()
    if not file.is_file():
        raise OptionError(f"plugin file {path} does not exist")
    module_name = f"graphopt_plugin_{file.stem}"
    spec = importlib.util.spec_from_file_location(module_name, file)
    if spec is None or spec.loader is None:
        raise OptionError(f"plugin file {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except OptionError:
        raise
    except Exception as error:  # somebody else's module: anything can happen in it
        raise OptionError(f"plugin file {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return sorted(name for name, entry in REGISTRY.passes.items() if entry.fn.__module__ == module_name)


def suggest(name: str, valid: Iterable[str]) -> str:
    """'did you mean X? valid: ...' for error messages."""
    from difflib import get_close_matches

    names = sorted(valid)
    close = get_close_matches(name, names, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"valid: {', '.join(names)}"
