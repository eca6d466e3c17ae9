"""Bias correction: rounding weights shifts each output channel's mean; the bias takes the shift back.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (ICCV 2019), section 4.2, with the means of
the inputs measured on calibration rows. It costs nothing at run time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from graphopt.data import Dataset
from graphopt.feeds import Feed, fixed_batch, padded, row_count
from graphopt.quant_plan import Unit
from graphopt.runtime import run, session

ROWS = 64  # means of channels settle long before the extremes do
_BATCH = 8
_POOLED = ("Conv",)  # ops whose input's channels are axis 1, followed by space
_PLAIN = ("Gemm", "MatMul")  # ops whose input's channels are the last axis


def corrected(units: Iterable[Unit]) -> list[gs.Node]:
    """The nodes whose bias can be corrected: Conv, Gemm and MatMul that have one."""
    return [u.node for u in units if u.node.op in (*_POOLED, *_PLAIN) and u.bias_input() is not None]


def channel_means(content: bytes | Path, dataset: Dataset, nodes: Sequence[gs.Node], opset: int) -> dict[str, np.ndarray]:
    """Tensor name -> the mean of each channel of the nodes' data inputs, over up to ROWS rows spread over the dataset.

    onnxruntime averages over space, so that only one number a row and channel leaves it.
    """
    fragment = onnx.GraphProto()
    outputs: dict[str, str] = {}
    for node in nodes:
        name = node.inputs[0].name
        if name not in outputs:
            outputs[name] = f"{name}_channel_mean"
            fragment.node.extend(_average(node, name, outputs[name], opset))
            fragment.output.append(onnx.ValueInfoProto(name=outputs[name]))
    if not outputs:
        return {}
    data = content.read_bytes() if isinstance(content, Path) else content
    folder = content.parent if isinstance(content, Path) else None
    runner = session(data + onnx.ModelProto(graph=fragment).SerializeToString(), external=folder)
    sums = dict.fromkeys(outputs, np.zeros(()))
    total = 0
    for feed in _spread(dataset):
        rows = row_count(feed) or 1
        for name, values in zip(outputs, run(runner, feed, list(outputs.values())), strict=True):
            sums[name] = sums[name] + values.reshape(-1, values.shape[1]).mean(0, dtype=np.float64) * rows
        total += rows
    return {name: value / total for name, value in sums.items()}


def _average(node: gs.Node, name: str, output: str, opset: int) -> list[onnx.NodeProto]:
    """Nodes that reduce the tensor to [rows, channels, ones...]."""
    if node.op in _POOLED:
        return [onnx.helper.make_node("GlobalAveragePool", [name], [output])]
    flat, axes = f"{output}_flat", f"{output}_axes"
    nodes = [onnx.helper.make_node("Flatten", [name], [flat], axis=-1)]
    if opset < 18:
        return [*nodes, onnx.helper.make_node("ReduceMean", [flat], [output], axes=[0])]
    zero = onnx.helper.make_node("Constant", [], [axes], value_ints=[0])
    return [*nodes, zero, onnx.helper.make_node("ReduceMean", [flat, axes], [output])]


def _spread(dataset: Dataset) -> Iterator[Feed]:
    """Every n-th batch, so that data sorted by class is sampled evenly; whole batches only, where the model fixes their size."""
    fixed = fixed_batch(dataset.inputs)
    stride = -(-(dataset.rows or ROWS) // ROWS)
    seen = 0
    for number, feed in enumerate(dataset.batches(_BATCH)):
        rows = row_count(feed) or 1
        if number % stride == 0 and (seen == 0 or fixed in (None, rows)):
            seen += rows
            yield padded(feed, fixed) if fixed else feed
        if dataset.rows is None and seen >= ROWS:
            return


def shift(node: gs.Node, error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """How far the weight's error moves the mean of each output channel: the error summed over space, times the input's mean."""
    if node.op in _PLAIN:
        moved: np.ndarray = (error if node.attrs.get("transB") else error.T) @ mean
        return moved
    taps = error.reshape(*error.shape[:2], -1).sum(2, dtype=np.float64)  # output channels, input channels of the group
    groups = mean.size // taps.shape[1]
    grouped = np.einsum("goc,gc->go", taps.reshape(groups, -1, taps.shape[1]), mean.reshape(groups, -1))
    return np.asarray(grouped).reshape(-1)
