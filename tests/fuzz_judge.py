"""What must hold whatever model comes in: success or one clear GraphoptError, and nothing that was valid or ran is broken.

Judged in a process of its own, because onnxruntime itself does not survive every damaged model: a crash inside it is counted, one
anywhere else is a failure.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto
from robustness import distance

from graphopt import pipeline
from graphopt.context import Context
from graphopt.data import Dataset, generated, open_dataset
from graphopt.errors import CheckError, GraphoptError
from graphopt.feeds import Feed, input_specs
from graphopt.groups_view import view
from graphopt.inspect import inspect
from graphopt.model import Model, from_proto
from graphopt.runtime import run, session
from graphopt.shapes import shapes
from graphopt.targets import find_target

EXACT = "cleanup, fold-bn, fold-scales"
MAX_ELEMENTS = 1 << 16  # of inputs that are fed: larger models are transformed, and not run
MEMORY = 8 << 30
PATIENCE = 20.0  # seconds that one stage may take
TOLERANCE = 1e-3  # of the output's scale: damaged weights may lie far from 1
Reach = Callable[[str], None]  # told of every stage that is reached


def judge(content: bytes, reach: Reach) -> None:
    """Load and transform; raises where anything but success or a GraphoptError comes out."""
    try:
        proto = onnx.load_model_from_string(content)
    except Exception:  # protobuf's DecodeError, which has no types
        reach("undecodable")
        return
    before = proto.SerializeToString(deterministic=True)
    reach("load")
    try:
        model = from_proto(proto)
    except GraphoptError as error:
        reach("refused")
        if "\n" in str(error):
            raise AssertionError(f"more than one line: {error}") from error
        return
    reach("loaded")
    with contextlib.suppress(GraphoptError):
        inspect(model, shapes(model))
        view(model)
    exact = transformed(proto, EXACT, None)
    if transformed(proto, "prune-channels ratio=0.5", None) is not None:
        reach("pruned")
    assert proto.SerializeToString(deterministic=True) == before
    reach("onnxruntime")  # or onnx: its inference, too, has assertions that end the process
    if not accepted(proto):
        return
    data = rows(model)
    if exact is None:  # onnx's inference may see a contradiction only when a pass has made something known
        if data is not None and runs(proto, list(data.batches(1)), reach):
            raise AssertionError("the exact passes refuse a model that runs")
        return
    reach("valid")
    onnx.checker.check_model(exact.proto(), full_check=True)
    if data is not None:
        same_outputs(proto, exact.proto(), list(data.batches(1)), reach)
        reach("onnxruntime")
        if transformed(proto, "fold, quantize", data) is not None:
            reach("quantized")


def transformed(proto: ModelProto, passes: str, data: Dataset | None) -> Model | None:
    """The model after the passes; None where they refuse it."""
    model = from_proto(proto)
    try:
        pipeline.run(model, pipeline.parse(passes), Context(data, find_target("ort-cpu")))
    except GraphoptError as error:
        if "bug in the pass" in str(error) or isinstance(error, CheckError):
            raise AssertionError(f"{passes}: {error}") from error
        return None
    return model


def accepted(proto: ModelProto) -> bool:
    """onnx's full check, and no name with two types (which it overlooks); onnxruntime is shown nothing else."""
    if contradictory(proto.graph):
        return False
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError):
        return False
    return True


def contradictory(graph: GraphProto) -> bool:
    """Whether a name is declared with two types, or with an undefined one."""
    types: dict[str, int] = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.tensor_type.elem_type
        if info.type.HasField("tensor_type") and (not kind or types.setdefault(info.name, kind) != kind):
            return True
    return any(contradictory(a.g) for n in graph.node for a in n.attribute if a.HasField("g"))


def rows(model: Model) -> Dataset | None:
    """Two generated rows, where they are small and can be made; integers are 0, because they may be indices."""
    try:
        specs = input_specs(model.interface())
        sizes = [np.prod([d if isinstance(d, int) else 8 for d in s.shape or ()], dtype=np.float64) for s in specs]
        if sum(sizes) > MAX_ELEMENTS:
            return None
        feeds = list(generated(specs, 2, axis=4).batches(1))
        return open_dataset([{n: v * 0 if v.dtype.kind in "iu" else v for n, v in f.items()} for f in feeds], specs)
    except GraphoptError:
        return None


def runs(proto: ModelProto, feeds: Sequence[Feed], reach: Reach) -> bool:
    """Whether onnxruntime runs the model."""
    reach("onnxruntime")
    try:
        _outputs(proto, feeds, None)
    except GraphoptError:
        return False
    return True


def same_outputs(before: ModelProto, after: ModelProto, feeds: Sequence[Feed], reach: Reach) -> None:
    """What runs computes the same."""
    reach("onnxruntime")
    try:
        names, expected = _outputs(before, feeds, None)
    except GraphoptError:
        return
    found = _outputs(after, feeds, names)[1]
    reach("compared")
    for name, a, b in zip(names * len(feeds), expected, found, strict=True):
        assert distance(a, b) <= TOLERANCE, f"output '{name}' moved by {distance(a, b):.2g} of its scale"


def _outputs(proto: ModelProto, feeds: Sequence[Feed], names: list[str] | None) -> tuple[list[str], list[np.ndarray]]:
    runner = session(proto, optimize=False)
    chosen = names or [o.name for o in runner.get_outputs()]
    return chosen, [np.asarray(v) for feed in feeds for v in run(runner, feed, chosen)]


# ---- the process


def serve(connection: Connection) -> None:
    """Judge what comes in until nothing does; answers are the stages reached, then ('done', '') or ('bug', traceback)."""
    with contextlib.suppress(ImportError):  # damaged sizes must not take the machine's memory
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while content := connection.recv():
        try:
            judge(content, lambda stage: connection.send(("reached", stage)))
        except Exception:
            connection.send(("bug", traceback.format_exc()))
        else:
            connection.send(("done", ""))


class Judge:
    """The process that judges, restarted when it dies; `seen` counts the stages that were reached."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.process: Any = None
        self.connection: Any = None

    def __call__(self, content: bytes) -> str:
        """'' or what went wrong."""
        if self.process is None or not self.process.is_alive():
            context = multiprocessing.get_context("spawn")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        self.connection.send(content)
        stage = "start"
        while True:
            try:
                if not self.connection.poll(PATIENCE):
                    self.process.kill()
                kind, text = self.connection.recv()
            except EOFError:
                self.process.join()
                if stage == "onnxruntime":  # it crashed, or a loop of millions of rounds is run
                    self.seen["crashed"] += 1
                    return ""
                return f"the process died, or was killed for taking long, after '{stage}': exit code {self.process.exitcode}"
            if kind != "reached":
                return str(text)
            stage = text
            self.seen[stage] += 1

    def close(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.connection.send(b"")
            self.process.join()
