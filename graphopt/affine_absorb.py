"""How an affine map goes into the weights of a linear operator, from its input side (forward) and its output side (backward).

A rule returns the edits and what cannot be absorbed: a shift in front of zero padding stays where it is (the padding would have
to become the shift), one behind a MatMul goes on behind it (a MatMul has no bias).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import FLOATS, Affine, affine, read
from graphopt.affine_moves import Edit, Move, Site, split_shift

COPY_BYTES = 16384  # a constant that other nodes read too is copied up to this size


def written(site: Site, slot: int) -> str | None:
    """Why the constant at `slot` must not change; None where it may (or is absent and can be added)."""
    if not site.given(slot):
        return None
    constant = site.node.inputs[slot]
    if not isinstance(constant, gs.Constant):
        return f"input {slot} of {site.node.op} is not a constant"
    if constant.dtype not in FLOATS:
        return f"the weight of {site.node.op} is not floating point"
    size = int(np.prod(constant.shape, dtype=np.int64)) * np.dtype(constant.dtype).itemsize
    shared = len(constant.outputs) != 1 or site.scene.is_output(constant)
    return f"the weight of {site.node.op} is shared" if shared and size > COPY_BYTES else None


def take_constant(site: Site) -> Move | str:
    """A map that arrived backward at a constant (input `slot` of the node that reads it) becomes part of it."""
    reason = written(site, site.slot)
    constant = site.node.inputs[site.slot]
    if reason is not None:
        return reason
    rest = () if site.affine.axis is None else (-1,) + (1,) * (len(constant.shape) - site.affine.axis - 1)
    scale, shift = site.affine.scale.reshape(rest), site.affine.shift.reshape(rest)
    return Move(edits=(Edit(site.node, lambda: {site.slot: _read(site, site.slot) * scale + shift}),))


def _read(site: Site, slot: int) -> np.ndarray:
    return read(site.node.inputs[slot])


def _kernel(site: Site) -> tuple[int, ...]:
    return tuple(site.node.inputs[1].shape[2:])


def _zero_padded(site: Site) -> bool:
    """Whether windows may reach into padding; SAME padding of a 1x1 kernel is none."""
    same = site.get("auto_pad") in ("SAME_UPPER", "SAME_LOWER")
    return bool(any(site.get("pads") or ())) if not same else set(_kernel(site)) != {1}


def _uneven(site: Site) -> bool:
    """A ConvTranspose spreads an input shift evenly only if it is pointwise: otherwise the border sums fewer taps."""
    strided = set(site.get("strides") or [1]) != {1} or any(site.get("output_padding") or ()) or site.get("output_shape")
    return bool(strided) or set(_kernel(site)) != {1} or _zero_padded(site)


# Weights as [group, outputs of the group, inputs of the group, taps], and back.
Layout = Callable[[np.ndarray, int], np.ndarray]


def _conv_layout(w: np.ndarray, groups: int) -> np.ndarray:
    return w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)


def _transpose_layout(w: np.ndarray, groups: int) -> np.ndarray:
    return np.swapaxes(w.reshape(groups, w.shape[0] // groups, w.shape[1], -1), 1, 2)


def _convolution(layout: Layout, blocks_shift: Callable[[Site], bool], site: Site) -> Move | str:
    """Conv [O, I/g, ...] and ConvTranspose [I, O/g, ...]; channels are axis 1 of input and output; bias is input 2."""
    a, rest = site.affine, None
    if a.axis not in (None, 1) or (site.forward and site.slot != 0):
        return f"it is not per channel of {site.node.op}"
    if not isinstance(site.node.inputs[1], gs.Constant):
        return f"input 1 of {site.node.op} is not a constant"
    if site.given(2) and isinstance(site.node.inputs[2], gs.Constant) and len(site.node.inputs[2].shape) != 1:
        return f"the bias of {site.node.op} is not a vector"
    if site.forward and a.has_shift and blocks_shift(site):
        parts = split_shift(site)
        if isinstance(parts, str):
            return f"a shift does not pass the zero padding of {site.node.op}"
        a, rest = parts
    biased = a.has_shift or (not site.forward and site.given(2))
    slots = [1] * a.has_scale + [2] * biased
    reasons = [r for r in (written(site, slot) for slot in slots) if r]
    return reasons[0] if reasons else Move((), rest, (Edit(site.node, partial(_convolve, layout, site, a)),))


def _convolve(layout: Layout, site: Site, a: Affine) -> dict[int, np.ndarray]:
    groups = site.get("group") or 1
    made: dict[int, np.ndarray] = {}
    bias = _read(site, 2) if site.given(2) else np.zeros(1)
    if site.forward and a.has_shift:  # bias += sum over inputs and taps of w * shift
        w = layout(_read(site, 1), groups)
        shift = np.broadcast_to(a.shift, groups * w.shape[2]).reshape(groups, 1, -1, 1)
        made[2] = bias + (w * shift).sum(axis=(2, 3)).ravel()
    elif not site.forward and (a.has_shift or site.given(2)):
        outputs = site.node.inputs[1].shape[0] if site.node.op == "Conv" else site.node.inputs[1].shape[1] * groups
        made[2] = np.broadcast_to(bias * a.scale + a.shift, outputs)
    if a.has_scale:
        w = _read(site, 1).copy()
        view = layout(w, groups)
        side = view.shape[2] if site.forward else view.shape[1]
        scale = np.broadcast_to(a.scale, groups * side).reshape(groups, -1)
        view *= scale[:, None, :, None] if site.forward else scale[:, :, None, None]
        made[1] = w
    return made


def _gemm(site: Site) -> Move | str:
    """Y = alpha * A' * B' + beta * C with constant B (and C, where it is there)."""
    a = site.affine
    channel = 0 if site.forward and site.get("transA") else 1
    if a.axis not in (None, channel) or (site.forward and site.slot != 0):
        return "it is not per feature of Gemm"
    if site.forward and a.has_shift and not isinstance(site.node.inputs[1], gs.Constant):
        return "input 1 of Gemm is not a constant"
    added = a.has_shift or (not site.forward and site.given(2))
    slots = [1] * a.has_scale + [2] * added
    reasons = [r for r in (written(site, slot) for slot in slots) if r]
    attrs = (("beta", 1.0),) if added else ()
    return reasons[0] if reasons else Move(edits=(Edit(site.node, partial(_gemm_weights, site, added), attrs),))


def _gemm_weights(site: Site, added: bool) -> dict[int, np.ndarray]:
    a, made = site.affine, {}
    turned = bool(site.get("transB"))
    bias = _read(site, 2) * site.get("beta") if site.given(2) else np.zeros(1)
    if added and site.forward:
        w = _read(site, 1).T if turned else _read(site, 1)
        made[2] = bias + site.get("alpha") * (np.broadcast_to(a.shift, len(w)) @ w)
    elif added:
        made[2] = bias * a.scale + a.shift
    if a.has_scale:
        rows = site.forward != turned
        made[1] = _read(site, 1) * (a.scale[:, None] if rows else a.scale)
    return made


def _matmul(site: Site) -> Move | str:
    """One factor is constant; a shift behind a product of two matrices makes it a Gemm."""
    ranks = [site.scene.rank(t) for t in (*site.node.inputs[:2], site.node.outputs[0])]
    if None in ranks or min(r for r in ranks if r is not None) < 2:
        return "the rank of a MatMul is unknown, or it has a vector"
    flat = ranks == [2, 2, 2]
    return _matmul_input(site, flat) if site.forward else _matmul_output(site, flat)


def _matmul_output(site: Site, flat: bool) -> Move | str:
    a, out = site.affine, site.scene.rank(site.node.outputs[0]) or 2
    if a.has_shift and flat and a.axis in (None, 1) and (not a.has_scale or isinstance(site.node.inputs[1], gs.Constant)):
        reason = written(site, 1) if a.has_scale else None
        return reason or Move(edits=(Edit(site.node, partial(_as_gemm, site, a.shift, a.scale), op="Gemm"),))
    if not a.has_scale:
        return "a shift has no place in a MatMul"
    slot = 1 if isinstance(site.node.inputs[1], gs.Constant) else 0
    axis = out - 1 if slot else out - 2
    reason = written(site, slot)
    if reason or a.axis not in (None, axis):
        return reason or "it does not run along the constant factor of MatMul"
    scale = a.scale if slot else a.scale[:, None]
    rest = a.shift_only(before=False) if a.has_shift else None
    return Move((), rest, (Edit(site.node, lambda: {slot: _read(site, slot) * scale}),))


def _as_gemm(site: Site, bias: np.ndarray, scale: np.ndarray) -> dict[int, np.ndarray]:
    return {2: bias} | ({1: _read(site, 1) * scale} if site.affine.has_scale else {})


def _matmul_input(site: Site, flat: bool) -> Move | str:
    a, slot = site.affine, 1 - site.slot
    rank, out = (site.scene.rank(t) or 2 for t in (site.node.inputs[site.slot], site.node.outputs[0]))
    if a.axis not in (None, rank - 1 if slot else rank - 2):
        return "it does not run along the summed axis of MatMul"
    reason = written(site, slot) if a.has_scale else None
    weight = site.node.inputs[slot]
    if reason or not isinstance(weight, gs.Constant):
        return reason or f"input {slot} of MatMul is not a constant"
    onward: tuple[tuple[int, Affine], ...] = ()
    rest = None
    if a.has_shift and len(weight.shape) == 2:
        shift = _sum_product(_read(site, slot), a.shift, slot)
        onward = ((0, affine(np.ones(1), shift, out - 1 if slot else out - 2, a.dtype)),)
    elif a.has_shift:
        parts = split_shift(site)
        if isinstance(parts, str):
            return parts
        a, rest = parts
    scale = a.scale[:, None] if slot else a.scale
    if flat and slot and a.has_shift:
        bias = onward[0][1].shift
        return Move(edits=(Edit(site.node, partial(_as_gemm, site, bias, scale), op="Gemm"),))
    edits = (Edit(site.node, lambda: {slot: _read(site, slot) * scale}),) if a.has_scale else ()
    return Move(onward, rest, edits)


def _sum_product(w: np.ndarray, shift: np.ndarray, slot: int) -> np.ndarray:
    """What a shift of the summed axis adds to each column (weight on the right) or row of the product."""
    product: np.ndarray = np.broadcast_to(shift, w.shape[0]) @ w if slot else w @ np.broadcast_to(shift, w.shape[1])
    return product


def _normalization(axis: Callable[[Site], int | None], site: Site) -> Move | str:
    """LayerNormalization and InstanceNormalization end in their own scale and shift: another one behind them joins these."""
    a = site.affine
    size = int(np.prod(site.node.inputs[1].shape, dtype=np.int64))
    if site.forward or site.slot != 0 or size == 0:
        return f"{site.node.op} does not commute with it"
    if a.axis is not None and (a.axis != axis(site) or len(site.node.inputs[1].shape) != 1):
        return f"it is not along the axis of {site.node.op}'s own scale"
    slots = [1] * a.has_scale + [2] * (a.has_shift or site.given(2))
    reasons = [r for r in (written(site, slot) for slot in slots) if r]

    def compute() -> dict[int, np.ndarray]:
        bias = _read(site, 2) if site.given(2) else np.zeros(site.node.inputs[1].shape)
        made = {2: bias * a.scale + a.shift} if 2 in slots else {}
        return made | ({1: _read(site, 1) * a.scale} if a.has_scale else {})

    return reasons[0] if reasons else Move(edits=(Edit(site.node, compute),))


def _last_axis(site: Site) -> int | None:
    rank = site.scene.rank(site.node.outputs[0])
    return None if rank is None else rank - 1


ABSORB: dict[str, Callable[[Site], Move | str]] = {
    "Conv": partial(_convolution, _conv_layout, _zero_padded),
    "ConvTranspose": partial(_convolution, _transpose_layout, _uneven),
    "Gemm": _gemm,
    "InstanceNormalization": partial(_normalization, lambda site: 1),
    "LayerNormalization": partial(_normalization, _last_axis),
    "MatMul": _matmul,
}
