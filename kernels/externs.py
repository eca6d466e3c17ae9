"""Calls between compiled functions through symbols, so that each is compiled once and by itself.

Numba links a function's callees into it and optimises all of them again; a deep call graph then takes minutes. Templates linked
here call each other as C functions would, by name; the ahead-of-time build resolves the names within one module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import networkx as nx

from graphopt.kernels.exports import Export
from graphopt.kernels.specialise import clone

Template = Callable[..., Any]


def extern(name: str, arguments: int, void: bool = False) -> Any:
    """An intrinsic that calls the C function `name` of int64 arguments; its result is int64, or nothing."""
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils

    from graphopt.kernels.memory import I64, emit

    def call(builder: ir.IRBuilder, *values: ir.Value) -> ir.Value | None:
        kind = ir.FunctionType(ir.VoidType() if void else I64, [I64] * arguments)
        result = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), list(values))
        return None if void else result

    call.__name__ = "".join(c if c.isalnum() else "_" for c in name)
    return emit((types.void if void else types.int64)(*[types.int64] * arguments))(call)


def link(templates: Sequence[Template], suffix: str, scope: Mapping[str, Any]) -> tuple[list[Export], dict[str, Any]]:
    """Exports `gk_<template><suffix>` in an order in which callees come first, and an extern for each template by its name.

    All arguments and results of templates are int64 (bool counts as one). `scope` gives them what else they call.
    """
    externs = {t.__name__: extern(f"gk_{t.__name__}{suffix}", _arguments(t), _void(t)) for t in templates}
    by_name = {t.__name__: t for t in templates}
    order = nx.DiGraph()
    order.add_nodes_from(by_name)
    order.add_edges_from((callee, name) for name, t in by_name.items() for callee in _code(t).co_names if callee in by_name)
    exports = []
    for name in nx.lexicographical_topological_sort(order):
        template = by_name[name]
        made = clone(template, f"gk_{name}{suffix}", **scope, **externs)
        exports.append(Export(f"gk_{name}{suffix}", made, _arguments(template), _void(template)))
    return exports, externs


def _code(template: Template) -> Any:
    assert isinstance(template, FunctionType)
    return template.__code__


def _arguments(template: Template) -> int:
    return int(_code(template).co_argcount)


def _void(template: Template) -> bool:
    return template.__annotations__.get("return") in (None, "None")
