"""Where a quantised model will run, as data: what each runtime executes in INT8, with which types, and why the rest stays float.

The rows for onnxruntime's CPU provider were measured: a small QDQ model of each op was optimised and looked at (does it fuse?) and
timed between two INT8 convolutions against its float form (does it pay?). tests/test_targets.py repeats the first half.
Packages add targets through the entry-point group `graphopt.targets`, each entry a `Target`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.edit import producer
from graphopt.errors import OptionError
from graphopt.operands import operand
from graphopt.quant import QOPS
from graphopt.registry import suggest

ENTRY_POINTS = "graphopt.targets"
DEFAULT = "ort-cpu"
Activation = Literal["u8", "s8"]


@dataclass(frozen=True)
class Support:
    """One op on one target. `reason` says why it runs in INT8, or why it is left in float.

    `float_output`: may read INT8 and write float. `on_integers`: no QDQ fusion exists, so the op itself is written on the integers.
    `misfit` gives the reason why one node is better left in float, or "".
    """

    int8: bool
    reason: str
    float_output: bool = False
    on_integers: bool = False
    misfit: Callable[[gs.Node], str] = lambda node: ""


@dataclass(frozen=True)
class Target:
    """Types and ops of one runtime. Ops are keyed as in `op_key`; `unlisted` is the reason for every op without a row.

    `symmetric`: activations have zero point 0 (or the middle of u8). `weight_bits`: 7 leaves headroom in 16-bit accumulation.
    `bias`: s32 with scale input x weight, or float. `tables`: embedding tables may be int8. `onnxruntime`: it is the runtime, so
    what is measured here is what the user gets. `dot_products`: the CPU must have INT8 dot products, or sums saturate.
    `why`: the reason of each of these settings by field name.
    """

    name: str
    summary: str
    ops: Mapping[str, Support]
    unlisted: str
    activation: Activation = "u8"
    symmetric: bool = False
    weight_bits: Literal[7, 8] = 8
    per_channel: bool = True
    bias: Literal["s32", "float"] = "s32"
    tables: bool = True
    onnxruntime: bool = False
    dot_products: bool = False
    why: Mapping[str, str] = field(default_factory=dict)

    def support(self, op: str) -> Support:
        """The row of the op, or one that says why there is none."""
        return self.ops.get(op, Support(False, self.unlisted))


def _yes(*ops: str, reason: str, float_output: bool = False, on_integers: bool = False) -> dict[str, Support]:
    return {op: Support(True, reason, float_output, on_integers) for op in ops}


def _no(*ops: str, reason: str) -> dict[str, Support]:
    return {op: Support(False, reason) for op in ops}


def _thin_stem(node: gs.Node) -> str:
    """onnxruntime's INT8 Conv gathers patches byte by byte where a pixel has 1-3 channels; its float Conv has a kernel for them.

    Not where the result runs through several residual sums: if it does not come from an INT8 Conv, onnxruntime keeps all of them in
    NCHW, with two transposes around each INT8 Conv, which costs more.
    """
    weight = node.inputs[1].shape
    thin = int(node.attrs.get("group", 1)) == 1 and weight[1] <= 3 and weight[1] < np.prod(weight[1:]) <= _PATCH
    return "a first convolution of 1-3 channels: INT8 takes up to twice as long as float" if thin and _sums(node) < 2 else ""


def _slow_in_int8(node: gs.Node) -> str:
    """A thin first convolution, or a depthwise one right behind it whose channels do not fill the INT8 kernel's vectors.

    Further inside, onnxruntime makes an INT8 Conv of whatever lies between INT8 tensors: leaving one in float has no effect.
    """
    weight = node.inputs[1].shape
    if not (weight[1] == 1 and int(node.attrs.get("group", 1)) == weight[0] and weight[0] % _VECTOR):
        return _thin_stem(node)
    source = producer(node.inputs[0], "Relu", "Clip") or node
    stem = producer(source.inputs[0], "Conv")
    return (
        "depthwise, its channels no multiple of 16, behind a float convolution: INT8 is slower" if stem and _thin_stem(stem) else ""
    )


def _sums(node: gs.Node) -> int:
    """How many Add nodes the output reaches without passing a Conv, MatMul or Gemm."""
    seen: dict[int, gs.Node] = {}
    stack = [node]
    while stack:
        readers = [reader for tensor in stack.pop().outputs for reader in tensor.outputs]
        fresh = [r for r in readers if id(r) not in seen and not (r.op in QOPS and QOPS[r.op].heavy)]
        seen.update((id(r), r) for r in fresh)
        stack += fresh
    return sum(n.op == "Add" for n in seen.values())


_VECTOR = 16
_PATCH = 150  # inputs of one output, as measured: 7x7x3
_MOVES = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Expand", "Tile", "DepthToSpace")
_NO_KERNEL = "no INT8 kernel: it would convert its inputs and its output"

_ORT_CPU: dict[str, Support] = {
    "Conv": Support(
        True,
        "QLinearConv: 2-5x float where dense, even where depthwise or grouped (channels in multiples of 16, else half as fast)",
        misfit=_slow_in_int8,
    ),
    **_yes(
        "Gemm", reason="QGemm: 3x float; fuses only with an explicit weight zero point; writes float directly", float_output=True
    ),
    **_yes("MatMul", reason="QGemm or MatMulIntegerToFloat with a constant weight: 3x float", float_output=True),
    **_yes("Add", reason="QLinearAdd: as fast as float, and keeps a residual stream in INT8"),
    **_yes("Mul", reason="QLinearMul: 0.7x float alone; 1.4x in a squeeze-and-excite block, where it saves the conversions"),
    **_yes("Sigmoid", reason="QLinearSigmoid: a table look-up, as fast as float, and it saves the conversions"),
    **_yes("LeakyRelu", reason="QLinearLeakyRelu: a table look-up, slower than float alone but cheaper than two conversions"),
    **_yes("MaxPool", reason="NhwcMaxPool next to QLinearConv, at no cost; 17x slower than float on its own, so never alone"),
    **_yes(
        "AveragePool", reason="QLinearAveragePool: slower than float, but fused by onnxruntime wherever it lies between INT8 ops"
    ),
    **_yes("GlobalAveragePool", reason="QLinearGlobalAveragePool: 3x float"),
    **_yes("Concat", reason="QLinearConcat: copies a quarter of the bytes"),
    **_yes("Resize", reason="nearest only: moves bytes (slower than float in NHWC, but fused by onnxruntime between INT8 ops)"),
    **_yes(*_MOVES, reason="moves bytes, a quarter as many"),
    **_yes("ReduceMax", "ReduceMin", reason="quantisation keeps order: runs on the integers"),
    **_yes("Pad", reason="has no QDQ fusion; written on the integers it saves both conversions: 1.4x", on_integers=True),
    **_yes("Relu", "Clip", reason="absorbed: saturation of the quantised output does the same"),
    **_no("Softmax", reason="QLinearSoftmax takes 2-5x as long as float, and 8 bits are coarse for probabilities"),
    **_no("ConvTranspose", reason="no INT8 kernel, and its weights would be dequantised at every run"),
    **_no("Sub", "Div", "Max", "Min", "Sum", "PRelu", "Elu", "HardSigmoid", "HardSwish", "Tanh", "Erf", "Gelu", reason=_NO_KERNEL),
    **_no("SpaceToDepth", "GlobalMaxPool", "ReduceMean", "LRN", "Einsum", reason=_NO_KERNEL),
    **_no("LayerNormalization", "InstanceNormalization", "BatchNormalization", reason="no INT8 kernel, and its sums need float"),
    **_no("LSTM", "GRU", "RNN", reason="onnxruntime quantises it only dynamically (DynamicQuantizeLSTM)"),
}


def _not_pixels(node: gs.Node) -> str:
    """A region's mean is over all pixels of [N, C, H, W]."""
    axes = operand(node, "axes", 1).integers()
    return "" if axes is not None and sorted(axes) in ([2, 3], [-2, -1]) else "a mean over other axes than all pixels"


_GRAPHOPT: dict[str, Support] = {
    **_ORT_CPU,
    "Conv": Support(True, "a step of a region: padding, requantisation, Relu and residual sums cost nothing; thin stems too"),
    **_yes("ConvTranspose", reason="a step of a region, the zeros between its pixels left out"),
    **_yes("Sigmoid", "LeakyRelu", reason="a table of 256 integers, in the step before it or as one pass over its bytes"),
    **_yes(
        "HardSigmoid", "HardSwish", "Tanh", "Gelu", "Elu", reason="a table of 256 integers, where onnxruntime has no INT8 kernel"
    ),
    "ReduceMean": Support(True, "pooling over all pixels", misfit=_not_pixels),
}

_BEHIND = "low-precision transformation moves the dequantisation behind it"
_OPENVINO: dict[str, Support] = {
    **_yes("Conv", "ConvTranspose", "Gemm", "MatMul", reason="oneDNN INT8 primitive; writes float or u8", float_output=True),
    **_yes("Add", "Mul", reason="fused into the primitive before it, or an INT8 elementwise kernel"),
    **_yes("AveragePool", "GlobalAveragePool", "MaxPool", "ReduceMax", "ReduceMin", reason=_BEHIND),
    **_yes("Concat", "Resize", "Pad", *_MOVES, reason=_BEHIND),
    **_yes("Relu", "Clip", reason="absorbed: saturation of the quantised output does the same"),
    **_no("Sigmoid", "LeakyRelu", "Softmax", reason="computed in float, fused behind the primitive before it"),
}

_TENSORRT: dict[str, Support] = {
    **_yes("Conv", "ConvTranspose", "Gemm", "MatMul", reason="INT8 tensor cores; the output may have any type", float_output=True),
    **_yes("Add", reason="a residual sum is fused behind a convolution when its other input is quantised"),
    **_yes("MaxPool", "AveragePool", "GlobalAveragePool", reason="INT8 pooling kernels; Q/DQ commute with them"),
    **_yes("Concat", "Resize", *_MOVES, reason="INT8 data movement; Q/DQ commute with it"),
    **_no("Relu", "Clip", reason="kept: a symmetric range cannot cut off negatives; fused behind the convolution"),
    **_no("Sigmoid", "Mul", "LeakyRelu", reason="pointwise in float, fused with its neighbours by TensorRT itself"),
    **_no("Pad", reason="its Q/DQ handling is not documented"),
}

_PER_CHANNEL = "a channel of small weights keeps its resolution, and it costs no time"
_TABLES = "a quarter of the bytes; only the rows found are dequantised"
_SATURATES = "vpmaddubsw adds two u8 x s8 products in 16 bits and saturates: 2 x 255 x 127 does not fit, 2 x 255 x 63 does"

ORT_CPU = Target(
    "ort-cpu",
    "onnxruntime on x86 with VNNI or AMX, and on ARM with dot products",
    _ORT_CPU,
    "not known to run in INT8 in onnxruntime's CPU provider",
    onnxruntime=True,
    dot_products=True,
    why={
        "activation": "u8 x s8 is what VNNI multiplies: s8 activations run convolutions 2-5x and MatMul 7-30x slower",
        "symmetric": "a free zero point doubles the resolution after Relu and costs nothing",
        "weight_bits": "VNNI adds in 32 bits: no headroom needed",
        "per_channel": _PER_CHANNEL,
        "bias": "added to the int32 sum at scale input x weight; onnxruntime before 1.21 does not fuse a float bias",
        "tables": _TABLES,
    },
)
ORT_CPU_NO_VNNI = replace(
    ORT_CPU,
    name="ort-cpu-no-vnni",
    summary="onnxruntime on x86 with AVX2 or AVX-512 but without VNNI",
    weight_bits=7,
    dot_products=False,
    why={**ORT_CPU.why, "weight_bits": _SATURATES},
)
ORT_CPU_GRAPHOPT = replace(
    ORT_CPU,
    name="ort-cpu+graphopt",
    summary="onnxruntime on any CPU with graphopt's library, which runs what compile-int8 and compile-sparse make",
    ops=_GRAPHOPT,
    dot_products=False,
    why={
        **ORT_CPU.why,
        "activation": "u8 x s8 is what the library multiplies, on every CPU",
        "weight_bits": "the library adds in 32 bits on every CPU: no headroom needed",
        "bias": "added to the int32 sum at scale input x weight",
    },
)
OPENVINO = Target(
    "openvino",
    "OpenVINO on CPU",
    _OPENVINO,
    "no low-precision transformation is known for it",
    bias="float",
    why={
        "activation": "its low-precision transformations choose u8 where they can; zero points of activations are free on CPU",
        "symmetric": "the CPU plugin folds activation zero points into the bias",
        "weight_bits": "oneDNN scales by itself where there is no VNNI",
        "per_channel": _PER_CHANNEL,
        "bias": "the plugin fuses a float bias behind the INT8 sum, and it takes less room",
        "tables": _TABLES,
    },
)
TENSORRT = Target(
    "tensorrt",
    "TensorRT with explicit quantisation",
    _TENSORRT,
    "not a layer TensorRT runs in INT8",
    activation="s8",
    symmetric=True,
    bias="float",
    tables=False,
    why={
        "activation": "INT8 in TensorRT is signed",
        "symmetric": "TensorRT rejects zero points other than 0",
        "weight_bits": "tensor cores add in 32 bits: no headroom needed",
        "per_channel": _PER_CHANNEL,
        "bias": "its parser refuses DequantizeLinear of int32 ('only activation types allowed as input to this layer')",
        "tables": "a Gather of int8 constants is not one of its quantised layers",
    },
)
BUILTIN: Mapping[str, Target] = {t.name: t for t in (ORT_CPU, ORT_CPU_NO_VNNI, ORT_CPU_GRAPHOPT, OPENVINO, TENSORRT)}


def targets() -> dict[str, Target]:
    """All targets by name, those of installed packages included. OptionError where two have one name or one cannot be loaded."""
    from importlib.metadata import entry_points

    found, owners = dict(BUILTIN), dict.fromkeys(BUILTIN, "graphopt")
    for point in entry_points(group=ENTRY_POINTS):
        try:
            target = point.load()
        except Exception as error:  # somebody else's module: anything can happen in it
            raise OptionError(f"target '{point.name}' ({point.value}) cannot be loaded: {error}") from error
        if not isinstance(target, Target):
            raise OptionError(f"target '{point.name}' ({point.value}) is a {type(target).__name__}, not a Target")
        if target.name in found:
            raise OptionError(
                f"two targets are named '{target.name}': one in {owners[target.name]}, one in {point.value}; rename one"
            )
        found[target.name], owners[target.name] = target, point.value
    return found


def find_target(name: str) -> Target:
    """The target of that name. Raises OptionError with the valid names."""
    if name in BUILTIN:
        return BUILTIN[name]
    known = targets()
    if name not in known:
        raise OptionError(f"unknown target '{name}'; {suggest(name, known)}")
    return known[name]
