"""Operators that sum over an axis, weighted by another operand: what meets in the sum goes together.

Removing an index of a summed axis is exact if one of the two factors is zero there. Constants are zeroed (`removal.zero`), so one
factor must be a constant or be computed from constants alone by operators that keep zeros; otherwise the axis stays.
"""

from __future__ import annotations

import numpy as np

from graphopt.dim_labels import ONE, Labels
from graphopt.dim_rules import Axes, PinError, Result, Site, broadcast, rule
from graphopt.edit import constant_value

# computed from these inputs (all, where none is named), zero where they are: see `vanishing`
KEEPS_ZERO: dict[str, tuple[int, ...]] = {
    "Abs": (),
    "Cast": (),
    "Concat": (),
    "DequantizeLinear": (0,),
    "Expand": (0,),
    "Flatten": (),
    "Identity": (),
    "Mul": (),
    "Neg": (),
    "Relu": (),
    "Reshape": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (),
    "Unsqueeze": (0,),
}


def vanishing(site: Site) -> bool:
    """Whether the node's outputs are zero wherever the slices of the constants behind them are, at every labelled index."""
    if site.op not in KEEPS_ZERO:
        return False
    if site.op == "DequantizeLinear" and site.has(2):
        zero_point = constant_value(site.node.inputs[2])
        if zero_point is None or zero_point.any():
            return False
    return all(site.vanishes(i) for i in KEEPS_ZERO[site.op] or site.given())


def contract(site: Site, a: Labels, b: Labels, inputs: tuple[int, int]) -> None:
    """The node sums over these two axes, which belong to these two inputs."""
    site.tie(a, b)
    if not any(site.vanishes(i) for i in inputs):
        site.pin(a, f"{site.node.op} sums over it and neither operand is a constant")


def spatial(site: Site, x: Axes, fixed: str = "a window slides over this axis") -> Axes:
    """Axes from the third: those of the input stay, those of the output are new."""
    site.pin_axes(x[2:], fixed)
    return [site.pinned(size, fixed) for size in site.out_shape()[2:]]


def _kernel(site: Site, index: int = 1) -> Axes:
    shape = site.shape(index)
    if shape is None:
        raise PinError(f"rank of '{site.node.inputs[index].name}' is unknown")
    return site.axes(index, fixed={i: "kernel axis" for i in range(2, len(shape))})


def _bias(site: Site, index: int, labels: Labels) -> None:
    if site.has(index):
        site.tie(site.axes(index)[0], labels)


@rule("Conv", "com.microsoft::FusedConv")
def conv(site: Site) -> Result:
    """[N, C, ...] with weights [M, C/group, ...]. Several groups lose the same offsets; depthwise, a channel goes whole.

    onnxruntime's FusedConv may add a fourth input before its activation.
    """
    x, w, groups = site.axes(), _kernel(site), int(site.attr("group") or 1)
    inner = (site.shape(1) or ())[1]
    if not isinstance(inner, int) or x[1].size not in (1, groups * inner):
        raise PinError("the number of channels is not known")
    _contract_groups(site, x[1], w, groups, inner)
    _bias(site, 2, w[0])
    y = [x[0], w[0], *spatial(site, x)]
    return [broadcast(site, [y, site.axes(3)]) if site.has(3) else y]


def _contract_groups(site: Site, channels: Labels, w: Axes, groups: int, inner: int) -> None:
    outer = w[0].size
    if groups == 1:
        contract(site, channels, w[1], (0, 1))
    elif channels.size != groups * inner or outer % groups:
        raise PinError("the number of channels is not known")
    elif inner == 1:  # depthwise: each channel has outputs of its own
        site.tie(np.repeat(channels, outer // groups), w[0])
    else:
        site.dims.classes.union(channels.reshape(groups, -1), channels[None, :inner])
        site.dims.classes.union(w[0].reshape(groups, -1), w[0][None, : outer // groups])
        contract(site, channels[:inner], w[1], (0, 1))


@rule("ConvTranspose")
def conv_transpose(site: Site) -> Result:
    """[N, C, ...] with weights [C, M/group, ...]: the output has the second axis of the weights once a group."""
    x, w, groups = site.axes(), _kernel(site), int(site.attr("group") or 1)
    contract(site, x[1], w[0], (0, 1))
    if groups == 1:
        y = w[1]
    elif w[0].size == groups:  # depthwise
        y = np.repeat(w[0], w[1].size)
        site.pin(w[1], "each channel of a depthwise ConvTranspose has all of it")
    else:
        site.dims.classes.union(w[0].reshape(groups, -1), w[0][None, : w[0].size // groups])
        y = np.tile(w[1], groups)
    _bias(site, 2, y)
    return [[x[0], y, *spatial(site, x)]]


@rule("Gemm", "com.microsoft::FusedGemm")
def gemm(site: Site) -> Result:
    """alpha * A' B' + beta * C"""
    a, b = site.axes(0), site.axes(1)
    a, b = a[::-1] if site.attr("transA") else a, b[::-1] if site.attr("transB") else b
    contract(site, a[1], b[0], (0, 1))
    y = [a[0], b[1]]
    return [broadcast(site, [y, site.axes(2)]) if site.has(2) else y]


@rule("MatMul", "com.microsoft::FusedMatMul")
def matmul(site: Site) -> Result:
    """As numpy.matmul: leading axes broadcast, operands with one axis get a second one that is dropped again.

    onnxruntime's FusedMatMul may swap the last two axes of either operand first.
    """
    a, b = site.axes(0), site.axes(1)
    if site.node.attrs.get("transBatchA") or site.node.attrs.get("transBatchB"):
        raise PinError("FusedMatMul with transposed batch axes")
    a = [*a[:-2], a[-1], a[-2]] if site.node.attrs.get("transA") and len(a) > 1 else a
    b = [*b[:-2], b[-1], b[-2]] if site.node.attrs.get("transB") and len(b) > 1 else b
    contract(site, a[-1], b[-2] if len(b) > 1 else b[0], (0, 1))
    batch = broadcast(site, [a[:-2], b[:-2]]) if len(a) > 2 or len(b) > 2 else []
    return [[*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else [])]]


@rule("Einsum")
def einsum(site: Site) -> Result:
    """Axes of one letter meet; a letter that the result lacks is summed over, weighted by all operands that have it."""
    left, arrow, right = str(site.attr("equation")).replace(" ", "").partition("->")
    sides, operands = left.split(","), [site.axes(i) for i in site.given()]
    plain = arrow and "." not in left and all(len(set(s)) == len(s) == len(x) for s, x in zip(sides, operands, strict=True))
    if not plain:
        raise PinError("Einsum with an ellipsis, a diagonal, or no arrow")
    letters: dict[str, Labels] = {}
    for letter in dict.fromkeys("".join(sides)):
        held = [(i, x[side.index(letter)]) for i, (side, x) in enumerate(zip(sides, operands, strict=True)) if letter in side]
        (letters[letter],) = broadcast(site, [[labels] for _, labels in held])
        if letter not in right and not any(site.vanishes(i) for i, _ in held):
            site.pin(letters[letter], "Einsum sums over it and no operand is a constant")
    return [[letters[letter] for letter in right]]


@rule("BatchNormalization")
def batch_normalization(site: Site) -> Result:
    """With stored statistics every channel is on its own."""
    x = site.axes()
    if site.attr("training_mode") or len(site.node.outputs) > 1 or site.attr("spatial") == 0:
        raise PinError("BatchNormalization in training mode or for each pixel")
    for index in range(1, 5):
        _bias(site, index, x[1] if len(x) > 1 else ONE)
    return [x]


GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@rule(*GATES)
def recurrent(site: Site) -> Result:
    """Weights [directions, gates * hidden, ...]. A hidden unit goes from all gates and all directions.

    The recurrent weights that read the unit are zeroed with it, so what it held matters to nobody.
    """
    x, gates = site.axes(), GATES[site.node.op]
    if site.attr("layout"):
        raise PinError("batch-first layout")
    w, r = site.axes(1), site.axes(2)
    for index in [i for i in site.given() if i not in (0, 4)]:
        site.pin(site.axes(index)[0], "directions")
    if not (site.vanishes(1) and site.vanishes(2)):
        raise PinError("recurrent weights are not constant")
    hidden = r[2]
    site.pin(x[0], "time steps")
    site.tie(x[2], w[2])
    for labels in (w[1], r[1]):
        site.tie(labels, np.tile(hidden, gates))
    for index, repeats in ((3, 2 * gates), (7, 3)):
        if site.has(index):
            site.tie(site.axes(index)[1], np.tile(hidden, repeats))
    for index in (5, 6):
        if site.has(index):
            site.tie(site.axes(index)[2], hidden)
            site.tie(site.axes(index)[1], x[1])
    state = [w[0], x[1], hidden]
    return [[x[0], *state], state, state][: len(site.node.outputs)]


@rule("Trilu")
def trilu(site: Site) -> Result:
    """Which elements are kept depends on the position."""
    x = site.axes()
    site.pin_axes(x[-2:], "Trilu keeps elements by position")
    return [x]
