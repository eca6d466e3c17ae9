"""How an affine map passes an operator: one row per op, the same row in both directions.

Forward: op(affine(x)) == affine'(op(x)); the map moves from an input to the outputs. Backward: from an output to the inputs.
An op without a row stops a map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import Affine, affine
from graphopt.affine_axes import blocks, concatenated, gathered, pad_shift, padded, reshaped, resized, sliced, split, transposed
from graphopt.affine_moves import Carried, Carry, Move, Site, split_shift, unmoved
from graphopt.attributes import op_key


@dataclass(frozen=True)
class Through:
    """`positive`: only scales >= 0 pass. `shift`: whether a shift passes here. `widens`: values between may be larger than
    on both sides, so that float16 could overflow."""

    carry: Carry
    positive: bool = False
    shift: Callable[[Site], bool] = lambda site: True
    widens: bool = False


def pass_through(site: Site) -> Move | str:
    """The map on the far side of the node, or why it cannot get there."""
    row, op = THROUGH.get(op_key(site.node)), site.node.op
    if row is None:
        return f"{op} does not commute with it"
    moving, rest = site.affine, None
    if row.positive and (moving.scale < 0).any():
        return f"a negative scale does not pass {op}"
    if row.widens and moving.dtype == np.float16 and moving.has_scale:
        return f"float16 could overflow inside {op}"
    if moving.has_shift and not row.shift(site):
        parts = split_shift(site)
        if isinstance(parts, str):
            return parts
        moving, rest = parts
    carried = row.carry(site, moving)
    return carried if isinstance(carried, str) else Move(tuple(carried), rest)


def _pooled(site: Site, a: Affine) -> Carried:
    if len(site.node.outputs) > 1 and site.node.outputs[1].name:
        return f"{site.node.op} also returns indices"
    return unmoved(site, a) if a.axis in (None, 0, 1) else f"it runs along an axis that {site.node.op} pools"


def _average_shift(site: Site) -> bool:
    """Zeros of the padding count in the average only with count_include_pad=1 (windows past the end: ceil_mode)."""
    padded = any(site.get("pads") or ()) or site.get("auto_pad") not in ("NOTSET", "VALID", None) or site.get("ceil_mode")
    return not (site.get("count_include_pad") and padded)


def _reduced(site: Site, a: Affine) -> Carried:
    if a.axis is None:
        return unmoved(site, a)
    full = site.scene.rank(site.node.inputs[0])
    axes = site.ints("axes", 1)
    if full is None or (axes is None and site.given(1)):
        return "the reduced axes are unknown"
    gone = set(range(full)) if not axes else {x % full for x in axes}
    if site.get("keepdims") == 0:
        kept = [x for x in range(full) if x not in gone]
        if site.forward:
            return [(0, a.on(kept.index(a.axis)))] if a.axis in kept else "it runs along a reduced axis"
        return [(0, a.on(kept[a.axis]))] if a.axis < len(kept) else "the reduced axes are unknown"
    return unmoved(site, a) if a.axis not in gone else "it runs along a reduced axis"


def _aligned(site: Site, a: Affine, slot: int) -> Affine | None:
    """The map between an elementwise op's output and its input `slot`, whose axes align at the end; None where it broadcasts."""
    if a.axis is None:
        return a
    inner, outer = site.scene.dims(site.node.inputs[slot]), site.scene.dims(site.node.outputs[0])
    if inner is None or outer is None:
        return None
    axis = a.axis + (len(outer) - len(inner)) * (1 if site.forward else -1)
    dims, there = (outer, axis) if site.forward else (inner, axis)
    return a.on(axis) if there >= 0 and dims[there] == len(a.scale) else None


def _summed(site: Site, a: Affine) -> Carried:
    """Forward a shift passes; backward the scale goes to every input and the shift to the first."""
    if site.forward:
        moved = _aligned(site, a, site.slot)
        if a.has_scale or moved is None:
            return f"a scale does not pass one input of {site.node.op}"
        negative = site.node.op == "Sub" and site.slot == 1
        return [(0, affine(moved.scale, -moved.shift if negative else moved.shift, moved.axis, a.dtype))]
    carried = [(i, _aligned(site, a if i == 0 else a.scale_only(), i)) for i in range(len(site.node.inputs))]
    known = [(i, m) for i, m in carried if m is not None]
    return known if len(known) == len(carried) else f"an input of {site.node.op} is broadcast"


def _factors(site: Site) -> list[int]:
    return [0] if site.node.op == "Div" else [0, 1]


def _best_factor(site: Site, candidates: list[tuple[int, Affine]]) -> Carried:
    """Only one factor takes a scale: a constant, or one that something wrote and nothing else reads."""
    for i, moved in sorted(candidates, key=lambda c: not isinstance(site.node.inputs[c[0]], gs.Constant)):
        tensor = site.node.inputs[i]
        if len(site.scene.readers(tensor)) == 1 and (isinstance(tensor, gs.Constant) or tensor.inputs):
            return [(i, moved)]
    return f"every factor of {site.node.op} is used elsewhere or cannot take a scale"


def _multiplied(site: Site, a: Affine) -> Carried:
    if site.forward:
        moved = _aligned(site, a, site.slot)
        fits = moved is not None and site.slot in _factors(site)
        return [(0, moved)] if fits and moved is not None else f"it does not pass this input of {site.node.op}"
    found = [(i, _aligned(site, a, i)) for i in _factors(site)]
    return _best_factor(site, [(i, m) for i, m in found if m is not None])


def _matrix_product(site: Site, a: Affine) -> Carried:
    """Rows of the left factor and columns of the right one are rows and columns of the product."""
    out = site.scene.rank(site.node.outputs[0])
    ranks = [site.scene.rank(t) for t in site.node.inputs[:2]]
    if a.axis is None:
        return [(0, a)] if site.forward else _best_factor(site, [(0, a), (1, a)])
    if out is None or ranks[0] is None or ranks[1] is None or min(out, ranks[0], ranks[1]) < 2:
        return "the rank of a MatMul is unknown"
    lines = [(r - 2 + i, out - 2 + i) for i, r in enumerate((ranks[0], ranks[1]))]  # (axis of factor i, axis of the product)
    if site.forward:
        return [(0, a.on(lines[site.slot][1]))] if a.axis == lines[site.slot][0] else "it runs along the summed axis of MatMul"
    return _best_factor(site, [(i, a.on(inner)) for i, (inner, outer) in enumerate(lines) if outer == a.axis])


def _never(site: Site) -> bool:
    return False


_SAME, _POSITIVE = Through(unmoved), Through(unmoved, positive=True, shift=_never)
_EXTREME = Through(_pooled, positive=True)
_ORDER = Through(reshaped)

# An op that is missing here on purpose: Clip and HardSwish (not homogeneous), Softmax, Sigmoid, Erf, Tanh (not linear),
# Where and Max (both inputs would have to be mapped alike).
THROUGH: dict[str, Through] = {
    "Abs": _POSITIVE,
    "Add": Through(_summed, widens=True),
    "AveragePool": Through(_pooled, shift=_average_shift, widens=True),
    "Concat": Through(concatenated),
    "DepthToSpace": Through(blocks),
    "Div": Through(_multiplied, shift=_never, widens=True),
    "Dropout": _SAME,
    "Flatten": _ORDER,
    "Gather": Through(gathered),
    "GlobalAveragePool": Through(_pooled, widens=True),
    "GlobalMaxPool": _EXTREME,
    "Identity": _SAME,
    "LeakyRelu": _POSITIVE,
    "MatMul": Through(_matrix_product, shift=_never, widens=True),
    "MaxPool": _EXTREME,
    "Mul": Through(_multiplied, shift=_never, widens=True),
    "PRelu": _POSITIVE,
    "Pad": Through(padded, shift=pad_shift),
    "ReduceMax": Through(_reduced, positive=True),
    "ReduceMean": Through(_reduced, widens=True),
    "ReduceMin": Through(_reduced, positive=True),
    "ReduceSum": Through(_reduced, shift=_never, widens=True),
    "Relu": _POSITIVE,
    "Reshape": _ORDER,
    "Resize": Through(resized),
    "Slice": Through(sliced),
    "SpaceToDepth": Through(blocks),
    "Split": Through(split),
    "Squeeze": _ORDER,
    "Sub": Through(_summed, widens=True),
    "Sum": Through(_summed, widens=True),
    "Transpose": Through(transposed),
    "Unsqueeze": _ORDER,
    "Upsample": Through(resized),
}
