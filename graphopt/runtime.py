"""onnxruntime sessions for checking, calibrating and measuring; the only place that makes them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from graphopt.errors import ModelError
from graphopt.operators import choose

if TYPE_CHECKING:
    from graphopt.model import Model

Feed = Mapping[str, np.ndarray]


def session(
    model: str | Path | bytes | onnx.ModelProto,
    *,
    threads: int = 1,
    optimize: bool = True,
    external: Path | None = None,
    operators: bool = True,
    profile: Path | None = None,
) -> Any:
    """A CPU InferenceSession. `optimize=False` runs the graph as written; `external` is where the external weights lie of a model
    given as bytes. Raises ModelError where onnxruntime refuses it.

    graphopt's regions run with graphopt's operators, so that what is measured is the real thing; where those cannot be had, or with
    `operators=False`, onnxruntime runs the functions that say the same. With `profile`, the beginning of a file's name,
    `end_profiling` of the session gives the file with the times of all nodes.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if external is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(external))
    if operators:
        choose(options, model, None, fallback=True)
    content = model.SerializeToString() if isinstance(model, onnx.ModelProto) else model
    content = str(content) if isinstance(content, Path) else content
    try:
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base class of their own
        raise ModelError(f"onnxruntime cannot load the model: {' '.join(str(error).split())[:400]}") from error


@contextlib.contextmanager
def runnable(model: Model) -> Iterator[bytes | Path]:
    """What `session` can open: bytes, or a temporary file with external weights where the model is over 2 GB."""
    from graphopt.emit import save, serialized
    from graphopt.external import LIMIT

    if model.weight_bytes() <= LIMIT:
        yield serialized(model.proto())
        return
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "model.onnx"
        save(model, path, external=True)
        yield path


def run(runner: Any, feed: Feed, names: Sequence[str] | None = None) -> list[Any]:
    """Run one feed; raises ModelError with onnxruntime's message in one line."""
    try:
        return list(runner.run(names, dict(feed)))
    except Exception as error:  # as above
        raise ModelError(f"onnxruntime cannot run the model: {' '.join(str(error).split())[:400]}") from error
