"""Sums of products must fit int32 whatever the input: where onnxruntime and the engine agree, and what the engine checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from graphopt.operands import Names
from graphopt.region_values import Bias, F, Given, Numbers, Weight

LIMIT = 1 << 31
ROUNDED = 2.0e9  # below 2**31 by more than rounding makes
UNSAFE = "its sums may not fit int32"


def safe_bias(
    x: Numbers, out: Numbers | None, w: Weight, axis: int, bias: Bias | None, fields: Mapping[str, Any], names: Names
) -> Bias | str | None:
    """The bias with which no sum leaves int32, or why there is none. `out` is None where the output is float.

    A channel that is dead, or always saturated, may come with a bias near the end of int32 (onnxruntime.quantization widens its
    scale until the bias just fits): that bias is moved inwards, if the output remains the same constant.
    """
    rows = _rows(w, axis, fields)
    reach = np.abs(rows).sum(1) * 255
    values = np.zeros(len(rows), np.int64) if bias is None else bias.values.astype(np.int64).ravel()
    if rows.shape[1] * 255 * 128 >= LIMIT or (reach >= LIMIT // 2).any():
        return UNSAFE
    room = LIMIT - 2 - reach
    moved = np.clip(values, -room, room)
    scales = F(x.scale) * w.scales / F(1 if out is None else out.scale)
    if out is not None and ((np.abs(moved) + reach + 1) * np.float64(scales)).max(initial=0) >= ROUNDED:
        return UNSAFE
    changed = moved != values
    if not changed.any():
        return bias
    if out is None or bias is None or bias.dequantize is None:
        return UNSAFE
    ends = [np.rint(F(1) * (v + sign * reach).astype(F) * scales) + F(out.zero) for v in (values, moved) for sign in (-1, 1)]
    results = np.clip(np.stack(ends), 0, 255)[:, changed]
    if not (results == results[0]).all():
        return UNSAFE
    made = names.constant(f"{bias.given.tensor.name}_moved", moved.astype(np.int32))
    return replace(bias, given=Given(made, made.name), values=np.asarray(made.values))


def _rows(w: Weight, axis: int, fields: Mapping[str, Any]) -> np.ndarray:
    """The weights of each output channel."""
    values = w.values.astype(np.int64)
    if fields.get("order") != 2:
        return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    groups, channels = int(fields["groups"]), values.shape[1]
    return np.asarray(values.reshape(groups, -1, *values.shape[1:]).swapaxes(1, 2).reshape(channels * groups, -1))
