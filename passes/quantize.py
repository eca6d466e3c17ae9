"""Post-training INT8 quantisation in QDQ form."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.errors import PassError
from graphopt.model import Model
from graphopt.observers import Statistics
from graphopt.operands import Names
from graphopt.opset import raise_opset
from graphopt.quant import quantised_ops
from graphopt.quant_bias import channel_means, corrected
from graphopt.quant_insert import Inserter, insert
from graphopt.quant_numbers import Parameters, parameters
from graphopt.quant_plan import Plan, Selection, plan
from graphopt.quant_tables import quantise_tables
from graphopt.ranges import summary
from graphopt.registry import register
from graphopt.runtime import runnable
from graphopt.shapes import shapes
from graphopt.targets import ORT_CPU, Target

if TYPE_CHECKING:
    from graphopt.data import Dataset

Method = Literal["minmax", "moving-average", "percentile", "entropy", "mse"]
OPSET = 13  # DequantizeLinear with an axis


@register(
    "quantize", needs_data=True, after=("prune-blocks", "prune-channels", "prune-heads", "prune-neurons", "fold-bn", "fold-scales")
)
def quantize(
    model: Model,
    context: Context,
    *,
    method: Method = "mse",
    percentile: float = 99.99,
    exclude: tuple[str, ...] = (),
    exclude_ops: tuple[str, ...] = (),
    include: tuple[str, ...] = (),
    include_ops: tuple[str, ...] = (),
    per_channel: bool = True,
    activation: Literal["u8", "s8"] | None = None,
    bias_correction: bool = True,
) -> int:
    """Weights become int8, activations u8 or s8 as the target wants them, in QDQ form; returns the nodes that run in INT8.

    - method: how the range of an activation is chosen from the calibration rows. minmax: all that was seen; moving-average:
      minmax of batches, averaged; percentile: all but the rarest values; entropy: the least information lost (KL divergence);
      mse: the least squared rounding error, best or equal on every network it was measured on.
    - percentile: share of the values, in percent, that stays inside the range; read by method=percentile only.
    - exclude, include: patterns (* and ?) of names of nodes that stay float, or that alone become INT8.
    - exclude_ops, include_ops: the same with operator types, such as exclude_ops='Gemm,MatMul'.
    - per_channel: one scale for each output channel of a weight, not one for the whole weight.
    - activation: u8 or s8 in the place of what the target prefers.
    - bias_correction: biases take back the shift of the mean that rounding the weights causes; costs nothing at run time.

    What runs in INT8 is the target's choice: see `graphopt targets NAME`. What stayed float, and why, is in the report.
    """
    from graphopt.calibrate import calibrate

    target = context.target or ORT_CPU
    rows = _checked(model, context)
    selection = Selection(include, exclude, include_ops, exclude_ops)
    if model.opset < OPSET and plan(model, context.get(shapes, model), target, selection, lambda node, reason: None).units:
        raise_opset(model, OPSET, context)  # only where something will be quantised: 0 changes mean an untouched model
    work = plan(model, context.get(shapes, model), target, selection, context.reject)
    if not work.units:
        context.facts.update(_facts(work, {}, target, method))
        return 0
    names = [t.name for t in work.sources()]
    with runnable(model) as content:
        statistics = calibrate(content, rows, names, method=method, histogram=context.detail, progress=context.progress)
        means = channel_means(content, rows, corrected(work.units), model.opset) if bias_correction else {}
    dtype = np.dtype(np.uint8 if (activation or target.activation) == "u8" else np.int8)
    numbers = _parameters(work, statistics, dtype, target, method, percentile)
    context.facts.update(_facts(work, numbers, target, method))
    if context.detail:
        context.facts["histograms"] = _histograms(work, numbers, statistics)
    insert(Inserter(model, work, target, numbers, per_channel and target.per_channel, Names(model), means))
    tables = quantise_tables(model, selection) if target.tables else []
    context.facts["tables"] = tables
    return len(work.units) + len(tables)


def _checked(model: Model, context: Context) -> Dataset:
    """The calibration rows. PassError where there are none, and where the model is quantised already."""
    present = quantised_ops(model)
    if present:
        found = ", ".join(f"{count} {op}" for op, count in present.most_common(3))
        raise PassError("quantize", f"the model is quantised already ({found}); give the float model it was made from")
    if context.calibration is None:
        raise PassError("quantize", "needs calibration data: give rows of typical inputs")
    return context.calibration


def _parameters(
    work: Plan, statistics: dict[str, Statistics], dtype: np.dtype, target: Target, method: str, percentile: float
) -> dict[int, Parameters]:
    """One set of numbers a class: it covers the ranges of all its members."""
    found: dict[int, Parameters] = {}
    levels = 255 if target.symmetric else 256
    for members in work.classes:
        low, high = np.float32(0), np.float32(0)
        for tensor in members:
            if isinstance(tensor, gs.Constant):
                ends = np.float32(np.min(tensor.values, initial=0)), np.float32(np.max(tensor.values, initial=0))
            elif tensor.name in statistics:
                ends = statistics[tensor.name].range(method, levels=levels, symmetric=target.symmetric, percentile=percentile)
            else:
                continue
            low, high = min(low, ends[0]), max(high, ends[1])
        numbers = parameters(float(low), float(high), dtype, symmetric=target.symmetric)
        found.update((id(t), numbers) for t in members)
    return found


def _histograms(work: Plan, numbers: dict[int, Parameters], statistics: dict[str, Statistics]) -> dict[str, Any]:
    """By tensor: what calibration saw, and what the range cuts off."""
    found = {t.name: (statistics[t.name], numbers[id(t)]) for t in work.sources() if t.name in statistics and id(t) in numbers}
    rows = {name: summary(seen, float(p.low), float(p.high)) for name, (seen, p) in found.items()}
    return {name: row for name, row in rows.items() if row is not None}


def _facts(work: Plan, numbers: dict[int, Parameters], target: Target, method: str) -> dict[str, Any]:
    """For the report: what runs in INT8, what stays float and why, and the range of each tensor."""
    return {
        "target": target.name,
        "method": method,
        "quantized_nodes": dict(Counter(u.node.op for u in work.units)),
        "float_nodes": [{"op": op, "count": n, "reason": why} for (why, op), n in work.floats.most_common()],
        "scales": len(work.classes),
        "ranges": {t.name: [p.low, p.high] for t in work.tensors.values() if (p := numbers.get(id(t))) is not None},
    }
