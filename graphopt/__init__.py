"""graphopt: a compiler for neural networks in ONNX.

    import graphopt
    result = graphopt.optimize("model.onnx", "fold, quantize", calibration="calib.npz")
    result.save("model.int8.onnx")

Everything is imported on first use, so that `import graphopt` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt import backend as backend
    from graphopt.advice import advise as advise
    from graphopt.api import Result as Result
    from graphopt.api import bisect as bisect
    from graphopt.api import optimize as optimize
    from graphopt.context import Context as Context
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.errors import PassError as PassError
    from graphopt.model import Model as Model
    from graphopt.model import load as load
    from graphopt.operators import register as register
    from graphopt.operators import session as session
    from graphopt.sweeps import sweep as sweep

_HOMES = {
    "Context": "graphopt.context",
    "GraphoptError": "graphopt.errors",
    "Model": "graphopt.model",
    "PassError": "graphopt.errors",
    "Result": "graphopt.api",
    "advise": "graphopt.advice",
    "bisect": "graphopt.api",
    "load": "graphopt.model",
    "optimize": "graphopt.api",
    "register": "graphopt.operators",
    "session": "graphopt.operators",
    "sweep": "graphopt.sweeps",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("graphopt")
    if name == "backend":  # a module, not a name in one: `graphopt.backend.prepare(model)` needs no import of its own
        return importlib.import_module("graphopt.backend")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'graphopt' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "backend"])
