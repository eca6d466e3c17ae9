"""Shapes, dtypes and known integer values of every tensor; what is not known stays unknown (None)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from graphopt.model import Model
from graphopt.proto import _dimension

Dim = int | str | None
Shape = tuple[Dim, ...]


@dataclass(frozen=True)
class Shapes:
    """By tensor name, subgraphs included."""

    shapes: dict[str, Shape]
    dtypes: dict[str, np.dtype]

    def shape(self, name: str) -> Shape | None:
        """One int, symbol or None an axis; None where even the rank is unknown."""
        return self.shapes.get(name)

    def static(self, name: str) -> tuple[int, ...] | None:
        """The shape if every axis is a known number, else None."""
        shape = self.shapes.get(name)
        if shape is None:
            return None
        known = tuple(d for d in shape if isinstance(d, int))
        return known if len(known) == len(shape) else None

    def rank(self, name: str) -> int | None:
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)

    def dtype(self, name: str) -> np.dtype | None:
        return self.dtypes.get(name)


def shapes(model: Model) -> Shapes:
    """ONNX shape inference with data propagation over the skeleton (weights stay unread)."""
    inferred = onnx.shape_inference.infer_shapes(model.skeleton(), data_prop=True)
    found: dict[str, Shape] = {}
    dtypes: dict[str, np.dtype] = {}
    stack = [inferred.graph]
    while stack:
        graph = stack.pop()
        for info in (*graph.value_info, *graph.input, *graph.output):
            tensor = info.type.tensor_type
            if info.type.HasField("tensor_type") and tensor.elem_type:
                dtypes[info.name] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
                if tensor.HasField("shape"):
                    found[info.name] = tuple(_dimension(d) for d in tensor.shape.dim)
        stack.extend(a.g for n in graph.node for a in n.attribute if a.type == onnx.AttributeProto.GRAPH)
    for constant in model.constants():
        found[constant.name], dtypes[constant.name] = tuple(constant.shape), np.dtype(constant.dtype)
    return Shapes(found, dtypes)
