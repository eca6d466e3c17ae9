"""Numba kernels and their plain numpy references. Importing this package does not import Numba: the kernel modules do.

`graphopt.kernels.qgemm`, `qconv`, `qadd`, `qmul`, `qpool`, `QGemm`, `QConv` and `DynamicGemm` run the INT8 kernels on numpy arrays,
`NBitsGemm` those of 4-bit weights, `SparseGemm` and `SparseConv` float32 ones with sparse weights.
"""

from __future__ import annotations

import importlib
from typing import Any

if __name__ != "graphopt.kernels":
    raise ImportError(f"import this package as graphopt.kernels, not as {__name__}")

FUNCTIONS = dict.fromkeys(
    ("DynamicGemm", "QConv", "QGemm", "Scale", "qadd", "qconv", "qgemm", "qmul", "qpool", "quantise_rows"), "functions"
) | {"NBitsGemm": "nbits", "SparseConv": "sparse_functions", "SparseGemm": "sparse_functions"}
"""What this package gives, and the module that has it."""


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        return getattr(importlib.import_module(f"graphopt.kernels.{FUNCTIONS[name]}"), name)
    raise AttributeError(f"module 'graphopt.kernels' has no attribute '{name}'")
