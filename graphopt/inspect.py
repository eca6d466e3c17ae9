"""What a model is made of: the data behind `graphopt inspect`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.cost import costs, weights
from graphopt.edit import peek
from graphopt.model import Model
from graphopt.proto import subgraphs
from graphopt.shapes import Shapes


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the model; a dynamic axis is its symbol or None, an unknown rank is None."""

    name: str
    dtype: str | None
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class WeightInfo:
    """Weights of one dtype (see `graphopt.cost.weights`)."""

    tensors: int
    elements: int
    bytes: int


@dataclass(frozen=True)
class Denormals:
    """Floats below the smallest normal number: each multiplication with one can cost a hundred normal ones."""

    elements: int
    of: int
    tensors: tuple[tuple[str, int], ...]  # the worst first


@dataclass(frozen=True)
class Inspection:
    """Everything `graphopt inspect` shows."""

    opset: int
    domains: Mapping[str, int]  # other than ONNX's own
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    dynamic_axes: tuple[str, ...]
    nodes: int
    ops: Mapping[str, int]  # most frequent first, those of subgraphs too
    subgraphs: Mapping[str, int]  # op that holds them -> how many
    parameters: int
    weight_bytes: int
    weights: Mapping[str, WeightInfo]  # by dtype, largest first
    macs: int | None  # None where some node could not be counted
    counted_macs: int
    assumed: Mapping[str, int]  # sizes taken for dynamic axes when counting MACs
    uncounted: tuple[tuple[str, str], ...]  # nodes whose MACs are not in the sum, and why
    quantized: Mapping[str, int]  # what is already quantised, and how often
    verdict: str
    denormals: Denormals | None  # None: not asked for
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON values only."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text, one a line of a table."""
        sizes = ", ".join(f"{place} = {size}" for place, size in self.assumed.items())
        left = Counter(reason for _, reason in self.uncounted)
        why = "; ".join(f"{count} not counted: {reason}" for reason, count in left.items())
        known = f"at least {self.counted_macs:,} ({why})" if self.macs is None else f"{self.macs:,}"
        rows = [
            ("opset", ", ".join([str(self.opset), *(f"{name} {version}" for name, version in self.domains.items())])),
            *(("input", _tensor(t)) for t in self.inputs),
            *(("output", _tensor(t)) for t in self.outputs),
            ("dynamic axes", ", ".join(self.dynamic_axes) or "none"),
            ("nodes", f"{self.nodes:,}"),
            ("ops", ", ".join(f"{op} {count}" for op, count in self.ops.items()) or "none"),
            ("parameters", f"{self.parameters:,}"),
            ("MACs", known + (f", with {sizes}" if sizes else "")),
            *((f"weights {name}", f"{w.elements:,} in {w.tensors} tensors, {w.bytes:,} bytes") for name, w in self.weights.items()),
            ("quantised", self.verdict),
        ]
        if self.subgraphs:
            rows.append(("subgraphs", ", ".join(f"{count} in {op}" for op, count in self.subgraphs.items())))
        if self.denormals is not None:
            share = 100 * self.denormals.elements / max(self.denormals.of, 1)
            rows.append(("denormals", f"{self.denormals.elements:,} ({share:.2f} % of the floating-point weights)"))
        return [*rows, *(("note", note) for note in self.notes)]


def inspect(model: Model, shapes: Shapes, *, denormals: bool = False, sizes: Mapping[str, int] | None = None) -> Inspection:
    """Describe a model. Weights are read only where `denormals` asks for their share; `sizes` as in `graphopt.cost.costs`."""
    counted = costs(model, shapes, sizes=sizes)
    inputs = tuple(_info(t, shapes) for t in model.graph.inputs)
    nodes = model.nodes()
    found = quantization(model)
    return Inspection(
        opset=model.opset,
        domains={o.domain: o.version for o in model.shell.opset_import if o.domain},
        inputs=inputs,
        outputs=tuple(_info(t, shapes) for t in model.graph.outputs),
        dynamic_axes=tuple(dict.fromkeys(_dynamic(inputs))),
        nodes=len(nodes),
        ops=dict(Counter(op_key(n) for n in nodes).most_common()),
        subgraphs=dict(Counter(op_key(n) for n in nodes for _ in subgraphs(n))),
        parameters=counted.parameters,
        weight_bytes=counted.weight_bytes,
        weights=_by_dtype(model),
        macs=counted.macs,
        counted_macs=counted.counted_macs,
        assumed=dict(counted.assumed),
        uncounted=counted.uncounted,
        quantized=found,
        verdict=verdict(found),
        denormals=_denormals(model) if denormals else None,
        notes=tuple(model.notes),
    )


INTEGER_OPS = frozenset(
    "ConvInteger MatMulInteger DynamicQuantizeLinear com.microsoft::DynamicQuantizeLSTM com.microsoft::DynamicQuantizeMatMul "
    "com.microsoft::MatMulIntegerToFloat com.microsoft::MatMulNBits com.microsoft::MatMulBnb4 com.microsoft::MatMulFpQ4 "
    "com.microsoft::GatherBlockQuantized com.microsoft::QMoE".split()
)
_QDQ_OPS = frozenset(f"{domain}{op}" for domain in ("", "com.microsoft::") for op in ("QuantizeLinear", "DequantizeLinear"))


def quantization(model: Model) -> dict[str, int]:
    """What is already quantised, and how often: QDQ nodes, operators on integers, weights of 8 bits or less. Empty: nothing."""
    found: Counter[str] = Counter()
    for node in model.nodes():
        key = op_key(node)
        if key in _QDQ_OPS:
            found["QDQ nodes"] += 1
        elif key in INTEGER_OPS or node.op.startswith(("QLinear", "QGemm", "QAttention", "QEmbed")):
            found[f"{key} nodes"] += 1
    for constant in weights(model):
        if is_quantized(constant):
            readers = {str(n.op) for n in constant.outputs}
            how = f" behind {readers.pop()}" if len(readers) == 1 and readers <= {"Cast", "DequantizeLinear"} else ""
            found[f"{np.dtype(constant.dtype).name} weights{how}"] += 1
    return dict(found)


def is_quantized(weight: gs.Constant) -> bool:
    """Whether a weight (see `graphopt.cost.weights`) is stored in 8 bits or less."""
    return bool(np.dtype(weight.dtype).itemsize == 1)


def verdict(found: Mapping[str, int]) -> str:
    """`quantization` in one sentence."""
    how = ", ".join(f"{count} {what}" for what, count in found.items())
    return f"already quantised: {how}" if how else "not quantised"


def _tensor(info: TensorInfo) -> str:
    shape = "unknown rank" if info.shape is None else " x ".join("?" if _unnamed(d) else str(d) for d in info.shape) or "scalar"
    return f"{info.name}  {info.dtype or 'no tensor'}  {shape}"


def _unnamed(size: int | str | None) -> bool:
    """A dynamic axis that the model gives no name; shape analysis calls it '?tensor:axis'."""
    return size is None or (isinstance(size, str) and size.startswith("?"))


def _info(tensor: gs.Tensor, shapes: Shapes) -> TensorInfo:
    dtype = shapes.dtype(tensor.name)
    return TensorInfo(tensor.name, None if dtype is None else dtype.name, shapes.shape(tensor.name))


def _dynamic(inputs: tuple[TensorInfo, ...]) -> list[str]:
    places = [(t.name, i, d) for t in inputs for i, d in enumerate(t.shape or ())]
    return [
        f"{name}[{i}]" + ("" if _unnamed(d) or isinstance(d, int) else f" ({d})")
        for name, i, d in places
        if not isinstance(d, int) or d < 0
    ]


def _by_dtype(model: Model) -> dict[str, WeightInfo]:
    groups: dict[np.dtype, list[int]] = defaultdict(list)
    for constant in weights(model):
        groups[np.dtype(constant.dtype)].append(prod(constant.shape))
    infos = {dtype.name: WeightInfo(len(v), sum(v), sum(v) * dtype.itemsize) for dtype, v in groups.items()}
    return dict(sorted(infos.items(), key=lambda item: -item[1].bytes))


def _denormals(model: Model) -> Denormals:
    total, worst = 0, []
    for constant in weights(model):
        if np.dtype(constant.dtype) not in (np.float32, np.float64):  # CPUs widen float16 before computing
            continue
        magnitude = np.abs(peek(constant))
        total += magnitude.size
        count = int(np.count_nonzero((magnitude > 0) & (magnitude < np.finfo(constant.dtype).tiny)))
        if count:
            worst.append((constant.name, count))
    worst.sort(key=lambda entry: -entry[1])
    return Denormals(sum(count for _, count in worst), total, tuple(worst))
