"""Raising a model to a newer opset with onnx's converter, checked by running both."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.version_converter

from graphopt.compare import EXACT_TOLERANCE, differences
from graphopt.context import Context
from graphopt.errors import GraphoptError, ModelError
from graphopt.feeds import Feed, input_specs
from graphopt.model import Model, from_proto
from graphopt.runtime import run, session

_ROWS = 2  # what the check runs


def raise_opset(model: Model, version: int, context: Context) -> bool:
    """Convert the model to opset `version` in place; False where it is that new already.

    The outputs of both are compared, on calibration rows if there are any, else on generated ones. Raises ModelError, and leaves
    the model as it was, where the converter fails, onnxruntime refuses its result, or outputs differ.
    """
    if model.opset >= version:
        return False
    old = model.proto()
    why = f"opset {version} is needed and the model has {model.opset}"
    try:
        new = onnx.version_converter.convert_version(old, version)
        raised = from_proto(new, path=model.path)
    except Exception as error:  # the C++ converter raises bare RuntimeErrors
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"{why}; onnx's converter fails ({text}): export the model again with opset {version} or later") from error
    _compare(old, new, _feeds(old, context), why)
    model.graph, model.shell, model.leftovers, model.strict = raised.graph, raised.shell, raised.leftovers, raised.strict
    context.drop()
    return True


def _feeds(proto: onnx.ModelProto, context: Context) -> Sequence[Feed]:
    from graphopt.data import generated

    rows = context.calibration or generated(input_specs(proto), _ROWS)
    return [next(iter(rows.batches(_ROWS)))]


def _compare(old: onnx.ModelProto, new: onnx.ModelProto, feeds: Sequence[Feed], why: str) -> None:
    try:
        first, second = session(old), session(new)
        names = [o.name for o in first.get_outputs()]
        pairs = [(run(first, feed, names), run(second, feed, names)) for feed in feeds]
    except GraphoptError as error:
        raise ModelError(f"{why}; the converted model cannot be checked: {error}") from error
    worst = max(differences(names, pairs), key=lambda d: np.nan_to_num(d.relative, nan=np.inf))
    if not worst.relative <= EXACT_TOLERANCE:
        raise ModelError(f"{why}; onnx's converter changes output '{worst.name}' by {worst.relative:.1e}: export the model again")
