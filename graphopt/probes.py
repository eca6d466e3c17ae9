"""Statistics of activations over calibration rows, reduced inside onnxruntime: a run returns one number a channel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

import numpy as np
import onnx

from graphopt.context import Context
from graphopt.cost import Axis
from graphopt.errors import DataError, PassError
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.model import Model
from graphopt.runtime import run, session
from graphopt.shapes import Shapes, shapes
from graphopt.vjp import Tape

BATCH = 16
Quantity = Callable[
    [Tape, str, list[int]], str
]  # appends nodes: a tensor, the axes to reduce (kept as size 1) -> [..., channels, ...]


def mean_magnitudes(model: Model, context: Context, places: Collection[Axis]) -> dict[Axis, np.ndarray]:
    """Mean of |x| over the calibration rows and all axes of x but one, for each (tensor, axis) of the main graph with known rank.

    Memory is that of one run, whatever the number of rows. PassError without data, DataError where an activation is not finite.
    """
    totals: dict[Axis, np.ndarray] = {}
    rows = 0
    for count, found in _measured(model, context, places, [lambda tape, x, axes: tape.mean(tape.op("Abs", x), axes)]):
        totals = {place: totals.get(place, 0) + count * mean for place, (mean,) in found.items()}
        rows += count
    return {place: total / rows for place, total in totals.items()}


def variances(model: Model, context: Context, places: Collection[Axis]) -> dict[Axis, np.ndarray]:
    """Variance of x over the calibration rows and all axes but one; otherwise as `mean_magnitudes`.

    Batches are joined as by Chan, Golub and LeVeque (1979): nothing large is subtracted from something large.
    """
    joined: dict[Axis, tuple[np.ndarray, np.ndarray]] = {}  # mean, variance
    rows = 0
    for count, found in _measured(model, context, places, [lambda tape, x, axes: tape.mean(x, axes), _variance]):
        share = count / (rows + count)
        for place, (mean, variance) in found.items():
            before, spread = joined.get(place, (np.zeros_like(mean), np.zeros_like(mean)))
            apart = mean - before
            joined[place] = before + share * apart, (1 - share) * spread + share * (variance + (1 - share) * apart**2)
        rows += count
    return {place: variance for place, (_, variance) in joined.items()}


def _variance(tape: Tape, x: str, axes: list[int]) -> str:
    centred = tape.op("Sub", x, tape.mean(x, axes))
    return tape.mean(tape.op("Mul", centred, centred), axes)


def _measured(
    model: Model, context: Context, places: Collection[Axis], quantities: list[Quantity]
) -> Iterator[tuple[int, dict[Axis, list[np.ndarray]]]]:
    """For each batch its rows and, by place, the quantities as float64 vectors; nothing where no rank is known."""
    data = context.calibration
    if data is None:
        raise PassError("prune", "calibration data is needed: give --calib PATH (or calibration=...)")
    known = context.get(shapes, model)
    main = {t.name for n in model.graph.nodes for t in n.outputs} | {t.name for t in model.graph.inputs}
    probed = [(name, axis) for name, axis in sorted(places) if name in main and (known.rank(name) or 0) > 1]
    if not probed:
        return
    proto, names = _with_probes(model, known, probed, quantities)
    runner, fixed, done = session(proto), fixed_batch(data.inputs), 0
    for number, feed in enumerate(data.batches(BATCH)):
        count = row_count(feed) or 1
        whole = padded(feed, fixed) if fixed else feed  # a fixed batch: the last row counts more often, which moves a mean little
        values = [np.asarray(v, np.float64).reshape(-1) for v in run(runner, whole, names)]
        found = {place: values[i * len(quantities) : (i + 1) * len(quantities)] for i, place in enumerate(probed)}
        bad = next((name for (name, _), vectors in found.items() if not all(np.isfinite(v).all() for v in vectors)), None)
        if bad is not None:
            raise DataError(f"data {data.where}: batch {number} makes '{bad}' NaN or infinite")
        yield count, found
        done += count
        context.progress("measure activations", done, data.rows or done)


def _with_probes(model: Model, known: Shapes, probed: list[Axis], quantities: list[Quantity]) -> tuple[onnx.ModelProto, list[str]]:
    """A copy whose outputs are the quantities of the probed tensors, and their names."""
    proto, tape = model.proto(), Tape(set(model.tensors()) | {n.name for n in model.nodes()}, model.opset)
    names = []
    for name, axis in probed:
        rank = known.rank(name) or 0
        others = [i for i in range(rank) if i != axis % rank]
        x = tape.op("Cast", name, to=onnx.TensorProto.FLOAT) if known.dtype(name) == np.float16 else name  # squares would overflow
        names += [quantity(tape, x, others) for quantity in quantities]
    del proto.graph.output[:]
    proto.graph.node.extend(tape.nodes)
    proto.graph.initializer.extend(tape.constants)
    proto.graph.output.extend([onnx.ValueInfoProto(name=name) for name in names])
    return proto, names
