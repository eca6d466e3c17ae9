"""Numba kernels and their plain numpy references. Importing this package does not import Numba: the kernel modules do.

`graphopt.kernels.qgemm`, `qconv`, `qadd`, `qmul`, `qpool`, `QGemm`, `QConv` and `DynamicGemm` run the INT8 kernels on numpy arrays.
"""

from __future__ import annotations

from typing import Any

if __name__ != "graphopt.kernels":
    raise ImportError(f"import this package as graphopt.kernels, not as {__name__}")

FUNCTIONS = ("DynamicGemm", "QConv", "QGemm", "Scale", "qadd", "qconv", "qgemm", "qmul", "qpool", "quantise_rows")


def __getattr__(name: str) -> Any:
    if name in FUNCTIONS:
        from graphopt.kernels import functions

        return getattr(functions, name)
    raise AttributeError(f"module 'graphopt.kernels' has no attribute '{name}'")
