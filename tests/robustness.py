"""Runs models through passes and compares them with what they were: the harness behind test_robustness.

A model from onnx's own tests is compared with the outputs shipped with it, at the tolerance onnx uses, in onnxruntime; where
onnxruntime cannot run it, in onnx's reference evaluator; where neither can, it must still come out valid. Real models are compared
with themselves, relative to the scale of each output.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import zoo
from onnx.reference import ReferenceEvaluator

from graphopt import pipeline
from graphopt.context import Context
from graphopt.errors import ModelError
from graphopt.model import MIN_OPSET, Model, from_proto, load

TOLERANCE = 1e-4  # of the output's scale
# their results are random, or they leave it to the runtime which of several correct answers it gives
UNDEFINED = ("bernoulli", "training_dropout", "random", "multinomial")


@dataclass(frozen=True)
class Outcome:
    """What became of one model: 'onnxruntime' or 'reference' (equal there), 'valid' (nobody runs it), 'refused', 'failed'."""

    name: str
    status: str
    detail: str = ""
    nodes: tuple[int, int] = (0, 0)


def optimized(source: onnx.ModelProto | Path, passes: str) -> Model:
    """The model after the passes (none where the text is empty), in its own fresh Model."""
    model = from_proto(source) if isinstance(source, onnx.ModelProto) else load(source)
    if passes:
        pipeline.run(model, pipeline.parse(passes), Context())
    return model


def check_node_test(test: zoo.NodeTest, passes: str) -> Outcome:
    """One of onnx's backend tests through the passes."""
    try:
        before = from_proto(test.model)
    except ModelError as error:
        old = next((o.version for o in test.model.opset_import if not o.domain), MIN_OPSET) < MIN_OPSET
        return Outcome(test.name, "refused" if old else "failed", str(error))
    try:
        model = optimized(test.model, passes)
        proto = model.proto()
    except Exception as error:
        return Outcome(test.name, "failed", f"{type(error).__name__}: {error}")
    nodes = len(before.nodes()), len(model.nodes())
    problem = invalid(test.model, proto) or interface(test.model, proto)
    if problem:
        return Outcome(test.name, "failed", problem, nodes)
    for name, runner in (("onnxruntime", run_onnxruntime), ("reference", run_reference)):
        status = _compare(test, proto, runner)
        if status != "cannot run":
            return Outcome(test.name, "failed" if status else name, status, nodes)
    return Outcome(test.name, "valid", "", nodes)


def _compare(test: zoo.NodeTest, proto: onnx.ModelProto, runner: Any) -> str:
    """'' where the outputs are as expected, or as those of the original; 'cannot run' where that one does not run either."""
    for feed, expected in test.data:
        try:
            found = runner(proto, feed)
        except Exception as error:  # runners raise what they like
            try:
                runner(test.model, feed)
            except Exception:
                return "cannot run"
            return f"only the original runs: {type(error).__name__}: {error}"
        if any(word in test.name for word in UNDEFINED):
            continue
        if not same(expected, found, test.rtol, test.atol):
            try:
                original = runner(test.model, feed)
            except Exception:
                return "cannot run"
            if not same(original, found, TOLERANCE, test.atol):
                return "its outputs differ"
    return ""


def invalid(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """What onnx's checker has against `after`, if it accepts `before`."""
    try:
        onnx.checker.check_model(before)
    except onnx.checker.ValidationError:
        return ""
    try:
        onnx.checker.check_model(after)
    except onnx.checker.ValidationError as error:
        return f"not valid any more: {error}"
    return ""


def interface(before: onnx.ModelProto, after: onnx.ModelProto) -> str:
    """How names and element types of inputs and outputs changed, or metadata; '' where they did not."""
    fixed = {tensor.name for tensor in before.graph.initializer} if before.ir_version < 4 else set()

    def sides(proto: onnx.ModelProto) -> list[list[tuple[str, int]]]:
        values = ([i for i in proto.graph.input if i.name not in fixed], proto.graph.output)
        return [[(v.name, v.type.tensor_type.elem_type) for v in side] for side in values]

    if sides(before) != sides(after):
        return f"inputs or outputs changed: {sides(before)} -> {sides(after)}"
    same_metadata = [(p.key, p.value) for p in before.metadata_props] == [(p.key, p.value) for p in after.metadata_props]
    return "" if same_metadata else "metadata changed"


def run_onnxruntime(proto: onnx.ModelProto, feed: Mapping[str, Any]) -> list[Any]:
    return list(zoo.session(proto.SerializeToString()).run(None, dict(feed)))


def run_reference(proto: onnx.ModelProto, feed: Mapping[str, Any]) -> list[Any]:
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return list(ReferenceEvaluator(proto).run(None, dict(feed)))


def same(expected: Sequence[Any], found: Sequence[Any], rtol: float, atol: float) -> bool:
    """Equal lists of outputs: arrays within the tolerance (NaN where NaN, infinities alike), lists and None alike."""
    if len(expected) != len(found):
        return False
    return all(_same(a, b, rtol, atol) for a, b in zip(expected, found, strict=True))


def _same(a: Any, b: Any, rtol: float, atol: float) -> bool:
    if isinstance(a, list) or isinstance(b, list):
        return isinstance(a, list) and isinstance(b, list) and same(a, b, rtol, atol)
    if a is None or b is None:
        return a is None and b is None
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape:
        return False
    if a.dtype.kind in "OUSb":
        return bool((a.astype(str) == b.astype(str)).all())
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    return bool(np.allclose(b.astype(wide), a.astype(wide), rtol=rtol, atol=atol, equal_nan=True))


def check_real(path: Path, passes: str, feeds: Sequence[Mapping[str, Any]]) -> Outcome:
    """A whole model through the passes, against itself: outputs within 1e-4 of their scale, NaN in the same places."""
    model = optimized(path, passes)
    nodes = len(load(path).nodes()), len(model.nodes())
    proto = model.proto()
    problem = invalid(onnx.load(path), proto) or interface(onnx.load(path), proto)
    if problem:
        return Outcome(path.stem, "failed", problem, nodes)
    before, after = zoo.session(path), zoo.session(proto.SerializeToString())
    worst = 0.0
    for feed in feeds:
        for a, b in zip(before.run(None, dict(feed)), after.run(None, dict(feed)), strict=True):
            worst = max(worst, distance(np.asarray(a), np.asarray(b)))
    status = "onnxruntime" if worst <= TOLERANCE else "failed"
    return Outcome(path.stem, status, f"{worst:.1e} of the output's scale", nodes)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to the largest finite |a|; infinite where shapes, types, NaN or infinities differ."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if a.dtype.kind not in "fc":
        return 0.0 if np.array_equal(a, b) else float("inf")
    finite = np.isfinite(a)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(b[finite]).all():
        return float("inf")
    scale = float(np.abs(a[finite]).max(initial=0.0))
    error = float(np.abs(a[finite].astype(np.float64) - b[finite]).max(initial=0.0))
    return error / scale if scale else (0.0 if error == 0 else float("inf"))
