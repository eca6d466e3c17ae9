"""How each operator becomes a unit: what it must be like, and the numbers of its step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute
from graphopt.operands import has_input, operand
from graphopt.region_sums import safe_bias
from graphopt.region_units import FULL, HEAVY, Rule, Site, Tail, Unit
from graphopt.region_values import Numbers, bias, constant, weight


def _inputs(site: Site, node: gs.Node, tail: Tail, indices: Sequence[int]) -> tuple[list[gs.Tensor], list[gs.Node]] | str:
    """Activations in integers and the DequantizeLinear nodes before the operator; none where it works on integers itself."""
    tensors: list[gs.Tensor] = []
    helpers: list[gs.Node] = []
    for index in indices:
        tensor = node.inputs[index]
        if tail.outputs[0] is node.outputs[0] and not tail.real:
            known = site.read(tensor)
            if isinstance(known, str):
                return known
            site.numbers.update((id(t), known) for t in tail.outputs)
            tensors.append(tensor)
            continue
        answer = site.activation(tensor)
        if isinstance(answer, str):
            return answer
        tensors.append(answer[0])
        helpers.append(answer[1])
    return tensors, helpers


def _numbers(site: Site, tensor: gs.Tensor) -> Numbers:
    found = site.read(tensor)
    assert not isinstance(found, str)  # read before
    return found


def _plain(
    kind: str, site: Site, node: gs.Node, tail: Tail, fields: Mapping[str, Any] | str, indices: Sequence[int] = (0,)
) -> Unit | str:
    """A unit without weights."""
    if isinstance(fields, str):
        return fields
    found = _inputs(site, node, tail, indices)
    if isinstance(found, str):
        return found
    return Unit(kind, node, tuple(found[0]), tail.outputs, tail.nodes, tuple(found[1]), fields, tail.bounds)


# ---- windows


def window(site: Site, node: gs.Node, kernel: Sequence[int]) -> dict[str, int] | str:
    """Kernel, strides, dilations and pads of a Conv or pool over one or two axes."""
    axes = len(kernel)
    if axes not in (1, 2):
        return f"it has {axes} axes of pixels"
    strides = list(node.attrs.get("strides") or [1] * axes)
    dilations = list(node.attrs.get("dilations") or [1] * axes)
    pads = _pads(site, node, kernel, strides, dilations)
    if isinstance(pads, str):
        return pads
    if min(pads, default=0) < 0:
        return "its pads are negative"
    values = [*kernel, *strides, *dilations, *pads]
    names = ("kh", "kw", "sh", "sw", "dh", "dw", "pt", "pl", "pb", "pr")
    return dict(zip(names if axes == 2 else names[1::2], map(int, values), strict=True))


def _pads(site: Site, node: gs.Node, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int] | str:
    auto = attribute(node, "auto_pad", site.model.opset) or "NOTSET"
    if auto in ("NOTSET", "VALID"):
        return list(node.attrs.get("pads") or [0] * 2 * len(kernel)) if auto == "NOTSET" else [0] * 2 * len(kernel)
    shape = site.shapes.shape(node.inputs[0].name) or ()
    sizes = [d for d in shape[2:] if isinstance(d, int)]
    if len(sizes) != len(kernel):
        return "its automatic padding depends on sizes that are not known"
    begins, ends = [], []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto == "SAME_UPPER" else large)
        ends.append(large if auto == "SAME_UPPER" else small)
    return [*begins, *ends]


# ---- operators with weights


def _conv(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    shape = node.inputs[1].shape or site.shapes.shape(node.inputs[1].name)
    found = window(site, node, [d if isinstance(d, int) else 0 for d in (shape or ())[2:]])
    if isinstance(found, str):
        return found
    groups = int(node.attrs.get("group", 1))
    return _weighted("conv", site, node, tail, {**found, "groups": groups}, 0)


def _transposed(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    if node.attrs.get("output_shape") or attribute(node, "auto_pad", site.model.opset) not in (None, "NOTSET"):
        return "its output size is given in place of its pads"
    shape = node.inputs[1].shape or site.shapes.shape(node.inputs[1].name)
    found = window(site, node, [d if isinstance(d, int) else 0 for d in (shape or ())[2:]])
    if isinstance(found, str):
        return found
    more = list(node.attrs.get("output_padding") or [0, 0])[-2:]
    extra = {"oph": more[0], "opw": more[1]} if "kh" in found else {"opw": more[-1]}
    groups = int(node.attrs.get("group", 1))
    return _weighted("conv", site, node, tail, {**found, **extra, "groups": groups, "order": 2}, 1)


def _gemm(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    opset = site.model.opset
    if attribute(node, "alpha", opset) != 1 or attribute(node, "beta", opset) != 1 or attribute(node, "transA", opset):
        return "alpha, beta or transA is set"
    order = 0 if node.attrs.get("transB") else 1
    return _weighted("linear", site, node, tail, {"order": order}, order)


def _matmul(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    value = constant(node.inputs[1])
    if value is None:
        return "it multiplies two activations"
    return _weighted("linear", site, node, tail, {"order": 1}, 1) if value.ndim == 2 else "its weight is not a matrix"


def _weighted(kind: str, site: Site, node: gs.Node, tail: Tail, fields: dict[str, Any], axis: int) -> Unit | str:
    found = _inputs(site, node, tail, (0,))
    if isinstance(found, str):
        return found
    (x,), helpers = found
    w = weight(node, axis, site.names, site.weights)
    if isinstance(w, str):
        return w
    grouped = fields.get("order") == 2 and fields["groups"] > 1
    if grouped and w.scales.size > 1:
        return "a grouped ConvTranspose with a scale for each channel"
    channels = w.values.shape[axis] * (fields["groups"] if grouped else 1)
    scales = np.float32(_numbers(site, x).scale) * w.scales
    place = tail.bias[1] if tail.bias else node.inputs[2] if has_input(node, 2) else None
    b = (
        None
        if place is None
        else bias(place, np.broadcast_to(scales, channels) if scales.size == 1 else scales, channels, site.names)
    )
    if isinstance(b, str):
        return b
    out = None if tail.real else _numbers(site, tail.outputs[0])
    b = safe_bias(_numbers(site, x), out, w, axis, b, fields, site.names)
    if isinstance(b, str):
        return b
    extra = [n for n in (b.dequantize if b else None, w.dequantize) if n is not None]
    return Unit(
        kind, node, (x,), tail.outputs, tail.nodes, (*helpers, *extra), fields, tail.bounds, w, b, tail.real, node.op in HEAVY
    )


# ---- operators of two activations, and of one


def _add(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    return _plain("add", site, node, tail, {}, (0, 1))


def _mul(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    return _plain("mul", site, node, tail, {}, (0, 1))


def _max_pool(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    if len(node.outputs) > 1 and node.outputs[1].name:
        return "its second output holds indices"
    found = window(site, node, node.attrs["kernel_shape"])
    fields = found if isinstance(found, str) else {**found, "ceil": int(node.attrs.get("ceil_mode", 0))}
    return _bounded(_plain("maxpool", site, node, tail, fields))


def _average_pool(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    found = window(site, node, node.attrs["kernel_shape"])
    if isinstance(found, str):
        return found
    ceil, include = int(node.attrs.get("ceil_mode", 0)), int(node.attrs.get("count_include_pad", 0))
    if ceil and include:
        return "ceil_mode with counted padding: onnxruntime's versions differ"
    return _bounded(_plain("avgpool", site, node, tail, {**found, "ceil": ceil, "include_pad": include}))


def _global_pool(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    return _bounded(_plain("globalpool", site, node, tail, {"keep": True, "axes": None}))


def _reduce_mean(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    axes = operand(node, "axes", 1).integers()
    rank = site.shapes.rank(node.inputs[0].name)
    if axes is None or rank is None:
        return "the axes of its mean are not known"
    keep = bool(attribute(node, "keepdims", site.model.opset))
    return _bounded(_plain("globalpool", site, node, tail, {"keep": keep, "axes": tuple(sorted(a % rank for a in axes))}))


def _bounded(unit: Unit | str) -> Unit | str:
    """Only convolutions, sums and products take a Relu or Clip behind them."""
    return "a Relu or Clip behind it" if isinstance(unit, Unit) and unit.bounds != FULL else unit


def _concat(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    unit = _plain("concat", site, node, tail, {"axis": int(node.attrs["axis"])}, range(len(node.inputs)))
    whole = tail.outputs[0] is node.outputs[0]
    if whole and isinstance(unit, Unit) and len({_numbers(site, t) for t in unit.inputs}) > 1:
        return "its inputs differ in scale"
    return _bounded(unit)


def _move(kind: str) -> Rule:
    def rule(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
        return _bounded(_plain(kind, site, node, tail, {}))

    return rule


def _split(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    rank = site.shapes.rank(node.inputs[0].name)
    if rank is None:
        return "its rank is not known"
    axis = int(attribute(node, "axis", site.model.opset) or 0) % rank
    shapes = [site.shapes.shape(t.name) for t in node.outputs]
    sizes = [s[axis] for s in shapes if s is not None and isinstance(s[axis], int)]
    if len(sizes) != len(node.outputs):
        return "the sizes of its parts are not known"
    return _bounded(_plain("split", site, node, tail, {"axis": axis, "sizes": tuple(sizes)}))


def _slice(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    starts, ends = operand(node, "starts", 1).integers(), operand(node, "ends", 2).integers()
    axes, steps = operand(node, "axes", 3), operand(node, "steps", 4)
    shape = site.shapes.shape(node.inputs[0].name)
    if starts is None or ends is None or not axes.known or not steps.known or shape is None:
        return "its bounds are computed"
    where = axes.integers() or list(range(len(starts)))
    parts = {}
    for axis, start, end, step in zip(where, starts, ends, steps.integers() or [1] * len(starts), strict=True):
        size = shape[axis % len(shape)]
        if step < 1:
            return "it steps backwards"
        if isinstance(size, int):
            begin, stop, _ = slice(start, end, step).indices(size)
            parts[axis % len(shape)] = (begin, step, max(-(-(stop - begin) // step), 0))
            if stop <= begin:
                return "it is empty"
        elif start >= 0 and end >= 2**31 - 1:
            parts[axis % len(shape)] = (start, step, -1)
        else:
            return "its bounds depend on sizes that are not known"
    return _bounded(_plain("slice", site, node, tail, {"parts": parts}))


def _pad(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    amounts, fill, axes = operand(node, "pads", 1).integers(), operand(node, "value", 2), operand(node, "axes", 3)
    rank = site.shapes.rank(node.inputs[0].name)
    if amounts is None or not fill.known or not axes.known or rank is None:
        return "its amounts are computed"
    if attribute(node, "mode", site.model.opset) != "constant" or min(amounts) < 0:
        return "it crops, or pads with something other than a constant"
    unit = _bounded(_plain("pad", site, node, tail, {}))
    if isinstance(unit, str):
        return unit
    value = 0.0 if fill.values is None or not fill.values.size else float(fill.values.ravel()[0])
    given = _numbers(site, unit.inputs[0])
    stored = value + 128 * given.signed if not unit.helpers else given.quantise(value)
    if stored != given.zero or (unit.helpers and value != 0):
        return "it pads with something other than zero"
    where = axes.integers() or list(range(rank))
    half = len(amounts) // 2
    pairs = {a % rank: (b, e) for a, b, e in zip(where, amounts[:half], amounts[half:], strict=True)}
    return Unit(unit.kind, node, unit.inputs, unit.outputs, unit.nodes, unit.helpers, {"pairs": pairs})


def _resize(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    opset = site.model.opset
    scales, sizes = operand(node, "scales", 2).values, operand(node, "sizes", 3).values
    shape = site.shapes.shape(node.inputs[0].name)
    if attribute(node, "mode", opset) != "nearest" or node.attrs.get("axes") or node.attrs.get("antialias"):
        return "it interpolates"
    if scales is not None and scales.size:
        factors = [float(s) for s in scales.ravel()]
    elif sizes is not None and shape is not None and all(isinstance(d, int) for d in shape):
        factors = [int(s) / d for s, d in zip(sizes.ravel(), shape, strict=True) if isinstance(d, int)]
    else:
        return "its factors are computed"
    how = (attribute(node, "coordinate_transformation_mode", opset), attribute(node, "nearest_mode", opset))
    if any(f != int(f) or f < 1 or not _repeats(int(f), *how) for f in factors):
        return "it does not repeat each pixel the same number of times"
    return _bounded(_plain("resize", site, node, tail, {"factors": tuple(int(f) for f in factors)}))


def _repeats(factor: int, transform: str, nearest: str) -> bool:
    """Whether output pixel i is input pixel i // factor (ONNX operator Resize)."""
    places = np.arange(4 * factor)
    source = {"asymmetric": places / factor, "half_pixel": (places + 0.5) / factor - 0.5}.get(transform)
    if source is None:
        return factor == 1
    rounds = {
        "round_prefer_floor": np.ceil(source - 0.5),
        "round_prefer_ceil": np.floor(source + 0.5),
        "floor": np.floor(source),
        "ceil": np.ceil(source),
    }
    return bool((np.clip(rounds[nearest], 0, None) == places // factor).all())


def _transpose(site: Site, node: gs.Node, tail: Tail) -> Unit | str:
    perm = node.attrs.get("perm")
    return _bounded(_plain("transpose", site, node, tail, {"perm": tuple(perm)})) if perm else "its order of axes is not given"


RULES: Mapping[str, Rule] = {
    "Conv": _conv,
    "ConvTranspose": _transposed,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Mul": _mul,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_pool,
    "ReduceMean": _reduce_mean,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    "Transpose": _transpose,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), _move("reshape")),
}
