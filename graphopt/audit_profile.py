"""What onnxruntime really runs: its kernels with types and times from its own profile, and the graph before layouts are chosen."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.errors import ModelError
from graphopt.operators import Operators, choose

_KERNEL = "_kernel_time"
INTEGER_BY_NAME = frozenset("DynamicQuantizeMatMul DynamicQuantizeLSTM QEmbedLayerNormalization".split())  # they read floats
CONVERSIONS = frozenset("QuantizeLinear DequantizeLinear DynamicQuantizeLinear Cast".split())
LAYOUTS = frozenset("ReorderInput ReorderOutput Transpose".split())
_DATA = {"QLinearConcat": 2, "QLinearWhere": 1}  # where the first input is a scale or a condition
_BYTES = frozenset(("uint8", "int8"))


@dataclass(frozen=True)
class Kernel:
    """One kernel of the running model; types and shapes as the profile has them, and the median time of a run."""

    name: str
    op: str
    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    us: float

    @property
    def dtype(self) -> str:
        """Of the first input that holds data: what the kernel computes on."""
        return self.inputs[_DATA.get(self.op, 0)][0] if self.inputs else ""

    @property
    def integer(self) -> bool:
        """Whether it computes on 8-bit integers; conversions do not compute."""
        return self.op not in CONVERSIONS and (
            self.dtype in _BYTES or self.op in INTEGER_BY_NAME or self.op.startswith("Int8Region")
        )


@dataclass(frozen=True)
class Profile:
    """Kernels by name in the order in which they run; `fused` is the graph after fusion and before layouts; `inner` names nodes in
    bodies of If, Loop and Scan."""

    kernels: Mapping[str, Kernel]
    fused: onnx.GraphProto
    inner: frozenset[str]
    operators: Operators

    @property
    def us(self) -> float:
        """Microseconds of a run, those of all kernels."""
        return sum(k.us for k in self.kernels.values())


def profiles(
    models: Sequence[bytes | Path], feeds: Sequence[Mapping[str, np.ndarray]], *, runs: int, threads: int
) -> list[Profile]:
    """Profile models side by side, so that what slows one slows all. Raises ModelError where one does not load or run."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as name:
        folder = Path(name)
        opened = [_open(m, folder, i, threads) for i, m in enumerate(models)]
        for _ in range(runs):
            for (session, _, _), feed in zip(opened, feeds, strict=True):
                try:
                    session.run(None, dict(feed))
                except Exception as error:  # onnxruntime's exceptions have no common base class of their own
                    raise ModelError(f"onnxruntime loads the model but cannot run it: {_line(error)}") from error
        return [_read(*entry) for entry in opened]


def _open(model: bytes | Path, folder: Path, number: int, threads: int) -> tuple[Any, onnx.GraphProto, Operators]:
    import onnxruntime as ort

    levels = ort.GraphOptimizationLevel
    content = model if isinstance(model, bytes) else str(model)
    graphs = {}
    for level in (levels.ORT_ENABLE_EXTENDED, levels.ORT_ENABLE_ALL):  # INT8 fusion is in the first, layouts only in the second
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = level
        how = choose(options, model, None, fallback=True)
        options.optimized_model_filepath = str(folder / f"{number}.onnx")
        if level == levels.ORT_ENABLE_ALL:
            options.enable_profiling, options.profile_file_prefix = True, str(folder / f"profile{number}")
        try:
            session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            graphs[level] = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        except Exception as error:  # as above; onnxruntime cannot save every model either
            raise ModelError(f"onnxruntime cannot load the model, or show what it makes of it: {_line(error)}") from error
    fused = graphs[levels.ORT_ENABLE_EXTENDED]
    fused.ClearField("initializer")
    return session, fused, how


def _read(session: Any, fused: onnx.GraphProto, how: Operators) -> Profile:
    events = json.loads(Path(session.end_profiling()).read_text())
    times: dict[str, list[float]] = defaultdict(list)
    seen: dict[str, Mapping[str, Any]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            times[name].append(event["dur"])
            seen.setdefault(name, event["args"])
    kernels = {
        name: Kernel(
            name, args["op_name"], _types(args, "input"), _types(args, "output"), float(np.mean(_undisturbed(times[name])))
        )
        for name, args in seen.items()
    }
    return Profile(kernels, fused, frozenset(_inner(fused)), how)


def _undisturbed(times: Sequence[float]) -> np.ndarray:
    """The faster half, since what else the machine does only adds. Times are whole microseconds: their mean says more than one."""
    return np.sort(times)[: max(1, len(times) // 2)]


def _types(args: Mapping[str, Any], side: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((next(iter(t)), tuple(next(iter(t.values())))) if t else ("", ()) for t in args[f"{side}_type_shape"])


def _inner(graph: onnx.GraphProto, *, inside: bool = False) -> Iterator[str]:
    for node in graph.node:
        if inside:
            yield node.name
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
                yield from _inner(body, inside=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]
