"""Means of activations over calibration rows, reduced inside onnxruntime: a run returns one number a channel, whatever its rows."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import helper

from graphopt.context import Context
from graphopt.cost import Axis
from graphopt.errors import DataError, PassError
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.model import Model
from graphopt.runtime import run, session
from graphopt.shapes import shapes

BATCH = 16
_AXES_INPUT = 18  # opset from which ReduceMean takes its axes as an input


def mean_magnitudes(model: Model, context: Context, places: Collection[Axis]) -> dict[Axis, np.ndarray]:
    """Mean of |x| over the calibration rows and all axes of x but one, for each (tensor, axis) of the main graph with known rank.

    Memory is that of one run, whatever the number of rows. PassError without data, DataError where an activation is not finite.
    """
    if context.calibration is None:
        raise PassError("prune-channels", "criterion 'activation' needs calibration data: give --calib PATH (or calibration=...)")
    found = context.get(shapes, model)
    main = {t.name for n in model.graph.nodes for t in n.outputs} | {t.name for t in model.graph.inputs}
    ranks = {name: found.rank(name) for name, _ in places if name in main}
    probed = [(name, axis) for name, axis in sorted(places) if (ranks.get(name) or 0) > 1]
    if not probed:
        return {}
    runner = session(_with_probes(model, probed, {n: r for n, r in ranks.items() if r}))
    names = [f"{name}/{axis}/mean magnitude" for name, axis in probed]
    fixed = fixed_batch(context.calibration.inputs)
    totals: list[np.ndarray] = []
    rows = 0
    for number, feed in enumerate(context.calibration.batches(BATCH)):
        count = row_count(feed) or 1
        whole = padded(feed, fixed) if fixed else feed  # a fixed batch: the last row counts more often, which moves a mean little
        means = [count * np.asarray(m, np.float64) for m in run(runner, whole, names)]
        bad = next((name for (name, _), mean in zip(probed, means, strict=True) if not np.isfinite(mean).all()), None)
        if bad is not None:
            raise DataError(f"data {context.calibration.where}: batch {number} makes '{bad}' NaN or infinite")
        totals = [a + b for a, b in zip(totals, means, strict=True)] if totals else means
        rows += count
        context.progress("measure activations", rows, context.calibration.rows or rows)
    return {place: total / rows for place, total in zip(probed, totals, strict=True)}


def _with_probes(model: Model, probed: list[Axis], ranks: dict[str, int]) -> onnx.ModelProto:
    """A copy whose outputs are Abs and ReduceMean of the probed tensors."""
    proto = model.proto()
    del proto.graph.output[:]
    for name, axis in probed:
        kept, output = axis % ranks[name], f"{name}/{axis}/mean magnitude"
        others = [i for i in range(ranks[name]) if i != kept]
        proto.graph.node.append(helper.make_node("Abs", [name], [f"{output}/abs"]))
        if model.opset >= _AXES_INPUT:
            proto.graph.initializer.append(helper.make_tensor(f"{output}/axes", onnx.TensorProto.INT64, [len(others)], others))
            reduce = helper.make_node("ReduceMean", [f"{output}/abs", f"{output}/axes"], [output], keepdims=0)
        else:
            reduce = helper.make_node("ReduceMean", [f"{output}/abs"], [output], keepdims=0, axes=others)
        proto.graph.node.append(reduce)
        proto.graph.output.add(name=output)
    return proto
