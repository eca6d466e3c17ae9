"""Region plans on numpy arrays, without onnxruntime: what the Python API of the kernels, the tests and the cost table call."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from graphopt.kernels.engine_state import TENSOR_RECORD
from graphopt.kernels.plan import FLOAT, INT8, INT32, UINT8, Plan
from graphopt.kernels.sparse_plan import SparsePlan

_TYPES = {np.dtype(np.float32): FLOAT, np.dtype(np.uint8): UINT8, np.dtype(np.int8): INT8, np.dtype(np.int32): INT32}
_DTYPES: dict[int, Any] = {kind: dtype for dtype, kind in _TYPES.items()}
_ARGUMENTS = {"create": 7, "destroy": 1, "acquire": 4, "output_shape": 3, "output_type": 2, "run": 4, "release": 1}
_LOCK = threading.Lock()


@cache
def _functions(isa: str, module: str = "engine") -> dict[str, Any]:
    """An engine's functions for one rung as ctypes functions, which release the GIL; compiled on the first call."""
    from graphopt.kernels import exports, warm
    from graphopt.kernels.runtime import FAMILIES

    engine = importlib.import_module(f"graphopt.kernels.{module}")
    with _LOCK, warm.helped(isa, FAMILIES):
        exports.bind(engine.exports(isa))
    found = {}
    for name, count in _ARGUMENTS.items():
        symbol = f"gk_{name}{engine.SUFFIX}__{isa}" if name in ("create", "run") else f"gk_{name}{engine.SUFFIX}"
        found[name] = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * count)(exports.address(symbol))
    return found


def _records(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Tensor records of contiguous arrays, int64 [n, TENSOR_RECORD]."""
    records = np.zeros((max(len(arrays), 1), TENSOR_RECORD), np.int64)
    for record, array in zip(records, arrays, strict=False):
        if array.dtype not in _TYPES or array.ndim > 8:
            raise ValueError(
                f"an array of {array.dtype} with {array.ndim} axes: expected float32, uint8, int8, int32, up to 8 axes"
            )
        record[:3] = array.ctypes.data, array.ndim, _TYPES[array.dtype]
        record[3 : 3 + array.ndim] = array.shape
    return records


class Region:
    """A checked and packed plan. Calls may overlap; `isa` names a rung of graphopt.kernels.isa (default: the best of this CPU).

    Raises ValueError with the engine's message where the plan, its constants or the inputs of a call do not fit.
    """

    ENGINE = "engine"  # module of the engine

    def __init__(self, plan: Plan | SparsePlan, constants: Sequence[np.ndarray], *, isa: str | None = None) -> None:
        from graphopt.kernels.isa import detect

        self.isa = isa or detect()
        self._call = _functions(self.isa, self.ENGINE)
        self._constants = [np.ascontiguousarray(c) for c in constants]
        self._outputs, self._inputs = plan.outputs, plan.activations
        row, scales = np.array(plan.encode(), np.int64), np.array(plan.scales, np.float32)
        records, error = _records(self._constants), np.zeros(256, np.uint8)
        self._handle = self._call["create"](
            row.ctypes.data, row.size, scales.ctypes.data, scales.size, records.ctypes.data, len(self._constants), error.ctypes.data
        )
        if not self._handle:
            raise ValueError(_message(error))

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The outputs for these activations, in new arrays."""
        arrays = [np.ascontiguousarray(i) for i in inputs]
        records, error = _records(arrays), np.zeros(256, np.uint8)
        instance = self._call["acquire"](self._handle, records.ctypes.data, len(arrays), error.ctypes.data)
        if not instance:
            raise ValueError(_message(error))
        try:
            outputs = [self._allocate(instance, index) for index in range(self._outputs)]
            addresses = np.array([o.ctypes.data for o in outputs], np.int64)
            self._call["run"](instance, records.ctypes.data, addresses.ctypes.data, 0)
        finally:
            self._call["release"](instance)
        return outputs

    def _allocate(self, instance: int, index: int) -> np.ndarray:
        dims = np.zeros(8, np.int64)
        rank = self._call["output_shape"](instance, index, dims.ctypes.data)
        return np.empty(dims[:rank], _DTYPES[self._call["output_type"](instance, index)])

    def __del__(self) -> None:
        if getattr(self, "_handle", 0):
            self._call["destroy"](self._handle)
            self._handle = 0


class SparseLayer(Region):
    """The same for a sparse plan; constants: values, places, the scales and the bias if there are any."""

    ENGINE = "sparse_engine"


def _message(error: np.ndarray) -> str:
    return bytes(error).split(b"\0")[0].decode(errors="replace")
