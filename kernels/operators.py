"""The families of operators that graphopt registers. A new kind of kernel adds its family here and to `runtime.FAMILIES`."""

from __future__ import annotations

from graphopt.kernels import engine, isa, nbits_op, sparse_engine
from graphopt.kernels.region import family
from graphopt.kernels.specialise import package_sources

REGION = family(engine.engine, tuple(isa.RUNGS), package_sources(), exports=engine.exports)
"""Int8Region0 ... Int8Region63."""

SPARSE = family(sparse_engine.engine, tuple(isa.RUNGS), package_sources(), "sparse", sparse_engine.exports, prefix="SparseLayer")
"""SparseLayer0 ... SparseLayer63."""
NBITS = nbits_op.family(tuple(isa.RUNGS), package_sources())
"""NBitsGemm, NBitsGemmZeros."""
