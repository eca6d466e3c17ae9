"""Compares the shape analysis with what a run really gives: every tensor of the main graph becomes an output."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import zoo

from graphopt.model import Model
from graphopt.shapes import Shapes, shapes


def lies(model: Model, feed: Mapping[str, Any]) -> list[str]:
    """What the analysis says wrongly: a size, a type, a value, or one symbol for two sizes. Empty where all of it is true."""
    known = shapes(model)
    results = run_all(model, feed)
    sizes: dict[str, int] = {}
    found = []
    for name, array in {**feed, **results}.items():
        if isinstance(array, np.ndarray):
            found += [f"{name}: {text}" for text in _compare(known, name, array, sizes)]
    return found


def run_all(model: Model, feed: Mapping[str, Any]) -> dict[str, Any]:
    """Every tensor that a node of the main graph computes, by name."""
    proto = model.proto()
    del proto.graph.output[:]
    names = [t.name for n in model.graph.nodes for t in n.outputs if t.name and isinstance(t, gs.Variable)]
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    values = zoo.session(proto.SerializeToString()).run(None, dict(feed))
    return dict(zip(names, values, strict=True))


def _compare(known: Shapes, name: str, array: np.ndarray, sizes: dict[str, int]) -> list[str]:
    shape, dtype, value = known.shape(name), known.dtype(name), known.value(name)
    found = []
    if dtype is not None and dtype != array.dtype and np.dtype(dtype).isbuiltin == 1:  # float8 and the like come as their bytes
        found.append(f"{dtype} is {array.dtype}")
    if shape is not None and len(shape) != array.ndim:
        return [*found, f"{shape} is {array.shape}"]
    pairs = list(zip(shape or (), array.shape, strict=False))
    if value is not None:
        pairs += list(zip(value, array.reshape(-1).tolist(), strict=True))
    for said, true in pairs:
        if said is not None and (true != said if isinstance(said, int) else sizes.setdefault(said, true) != true):
            found.append(f"'{said}' is {true}" + (f", was {sizes[said]}" if isinstance(said, str) else ""))
    return found
