"""Numba kernels and their plain numpy references. Importing this package does not import Numba: the kernel modules do."""

if __name__ != "graphopt.kernels":
    raise ImportError(f"import this package as graphopt.kernels, not as {__name__}")
