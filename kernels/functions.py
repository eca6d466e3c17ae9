"""The INT8 kernels on numpy arrays, for tools that want them alone: `qgemm`, `qconv`, `qadd`, `qmul`, `qpool`.

Arithmetic is onnxruntime's, bit for bit (`graphopt.kernels.plan` gives the formulas). Weights are packed for this CPU when an
object is made; the functions make one for a single call, so keep the object where weights are used again:

>>> import numpy as np
>>> from graphopt.kernels import functions
>>> layer = functions.QGemm(np.ones((3, 2), np.int8), weight_scale=0.5, x_scale=1.0)
>>> layer(np.array([[1, 2, 3]], np.uint8))
array([[3., 3.]], dtype=float32)

`isa` names a rung of `graphopt.kernels.isa`; the default is the best that this CPU has. ValueError tells what does not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.kernels import plan as p
from graphopt.kernels.native import Region

Array = np.ndarray


@dataclass(frozen=True)
class Scale:
    """A quantised tensor's numbers: real = scale * (q - zero); `signed`: int8, not uint8."""

    scale: float
    zero: int = 0
    signed: bool = False

    @property
    def kind(self) -> int:
        return p.INT8 if self.signed else p.UINT8

    @property
    def stored(self) -> int:
        """The zero point as plans store it."""
        return self.zero + 128 if self.signed else self.zero


def _scales(weight_scale: float | Array) -> Array:
    return np.atleast_1d(np.asarray(weight_scale, np.float32))


class QGemm:
    """x [..., K] times w [K, N], with int32 sums.

    weight: s8 [K, N]; weight_scale: one, or one a column; x_scale, x_zero, x_signed: of the input; bias: s32 [N] at scale
    x_scale * weight_scale, or float32 [N] where the output is float. out: the output's numbers, None for float32.
    """

    def __init__(
        self,
        weight: Array,
        *,
        weight_scale: float | Array,
        x_scale: float,
        x_zero: int = 0,
        x_signed: bool = False,
        bias: Array | None = None,
        out: Scale | None = None,
        rank: int = 2,
        isa: str | None = None,
    ) -> None:
        x, channels = Scale(x_scale, x_zero, x_signed), weight.shape[1]
        constants: list[Array] = [weight, _scales(weight_scale)]
        fields = {"weight": 0, "weight_scale": 1, "order": p.KN, "scale": 0}
        if bias is not None:
            fields["float_bias" if bias.dtype == np.float32 else "bias"] = len(constants)
            constants.append(bias)
        tensors = [p.Tensor(weight.shape[0], x.stored)]
        steps = [p.step(p.INPUT, index=0, out=0, type=x.kind, layout=p.ROWS, rank=rank)]
        if out is None:
            steps.append(p.step(p.CONV, x=0, index=0, rank=rank, like=0, **fields))
        else:
            tensors.append(p.Tensor(channels, out.stored))
            steps.append(p.step(p.CONV, x=0, out=1, mid_zero=out.stored, **fields))
            steps.append(p.step(p.OUTPUT, x=1, index=0, type=out.kind, layout=p.ROWS, rank=rank, like=0))
        scales = [x.scale, out.scale if out else 1.0]
        self._region = Region(p.Plan(tensors, steps, scales, 1, 1, len(constants)), constants, isa=isa)

    def __call__(self, x: Array) -> Array:
        """x: u8 or s8 [..., K], of the rank that was given -> [..., N]."""
        return self._region(x)[0]


class QConv:
    """A convolution of one or two dimensions over NCHW (or NCW) tensors, with int32 sums.

    weight: s8 [OC, IC / groups, KH, KW] (or [OC, IC / groups, K]); transposed: [IC, OC / groups, KH, KW] as ConvTranspose has it.
    given, out: numbers of input and output. pads: top, left, bottom, right.
    bias: s32 [OC]. low, high: bounds of the (stored) output, as Relu and Clip set them.
    """

    def __init__(
        self,
        weight: Array,
        *,
        weight_scale: float | Array,
        given: Scale,
        out: Scale,
        bias: Array | None = None,
        strides: Sequence[int] = (1, 1),
        pads: Sequence[int] = (0, 0, 0, 0),
        dilations: Sequence[int] = (1, 1),
        groups: int = 1,
        transposed: bool = False,
        low: int = 0,
        high: int = 255,
        isa: str | None = None,
    ) -> None:
        rank = weight.ndim
        if rank == 3:
            weight = weight[:, :, None]
        outs = weight.shape[1] * groups if transposed else weight.shape[0]
        inner = weight.shape[0] if transposed else weight.shape[1] * groups
        constants = [weight, _scales(weight_scale), *([] if bias is None else [bias])]
        names = ("kh", "kw", "sh", "sw", "dh", "dw", "pt", "pl", "pb", "pr")
        window = dict(zip(names, (*weight.shape[2:], *strides, *dilations, *pads), strict=True))
        steps = [
            p.step(p.INPUT, index=0, out=0, type=given.kind, layout=p.CHANNELS_FIRST, rank=rank),
            p.step(
                p.CONV, x=0, out=1, weight=0, weight_scale=1, bias=-1 if bias is None else 2, groups=groups, scale=0,
                order=p.IOHW if transposed else p.OIHW, mid_zero=out.stored, low=low, high=high, **window,
            ),
            p.step(p.OUTPUT, x=1, index=0, type=out.kind, layout=p.CHANNELS_FIRST, rank=rank),
        ]  # fmt: skip
        tensors = [p.Tensor(inner, given.stored), p.Tensor(outs, out.stored)]
        self._region = Region(p.Plan(tensors, steps, [given.scale, out.scale], 1, 1, len(constants)), constants, isa=isa)

    def __call__(self, x: Array) -> Array:
        """x: u8 or s8 [N, C, H, W] (or [N, C, W]) -> the same of the output."""
        return self._region(x)[0]


def qgemm(x: Array, weight: Array, **numbers: object) -> Array:
    """One product: see `QGemm` for the arguments. x: u8 or s8 [..., K]."""
    signed = x.dtype == np.int8
    return QGemm(weight, x_signed=signed, rank=x.ndim, **numbers)(x)  # type: ignore[arg-type]


def qconv(x: Array, weight: Array, **numbers: object) -> Array:
    """One convolution: see `QConv` for the arguments."""
    return QConv(weight, **numbers)(x)  # type: ignore[arg-type]


def _single(kind: int, inputs: Sequence[Array], given: Sequence[Scale], out: Scale, scales: list[float], **fields: int) -> Array:
    """One step on NCHW tensors."""
    names = ("x", "y")
    tensors = [p.Tensor(a.shape[1], s.stored) for a, s in zip(inputs, given, strict=True)]
    last = len(tensors)
    tensors.append(p.Tensor(inputs[0].shape[1], out.stored))
    rank = inputs[0].ndim
    steps = [p.step(p.INPUT, index=i, out=i, type=s.kind, layout=p.CHANNELS_FIRST, rank=rank) for i, s in enumerate(given)]
    steps.append(p.step(kind, **dict(zip(names, range(last), strict=False)), out=last, scale=0, **fields))
    steps.append(p.step(p.OUTPUT, x=last, index=0, type=out.kind, layout=p.CHANNELS_FIRST, rank=rank))
    return Region(p.Plan(tensors, steps, scales, last, 1, 0), [])(*inputs)[0]


def qadd(a: Array, b: Array, a_scale: Scale, b_scale: Scale, out: Scale) -> Array:
    """a + b of NCHW tensors; one of them may be [N, C, 1, 1]."""
    f = np.float32
    ra, rb = f(f(a_scale.scale) / f(out.scale)), f(f(b_scale.scale) / f(out.scale))
    fx = f(f(out.stored) - f(f(ra * f(a_scale.stored)) + f(rb * f(b_scale.stored))))
    return _single(p.BINARY, [a, b], [a_scale, b_scale], out, [float(ra), float(rb), float(fx)], op=p.ADD)


def qmul(a: Array, b: Array, a_scale: Scale, b_scale: Scale, out: Scale) -> Array:
    """a * b of NCHW tensors; one of them may be [N, C, 1, 1]."""
    f = np.float32
    ratio = f(f(f(a_scale.scale) * f(b_scale.scale)) / f(out.scale))
    return _single(p.BINARY, [a, b], [a_scale, b_scale], out, [float(ratio)], op=p.MUL)


def qpool(
    x: Array, x_scale: Scale, out: Scale, *, kind: Literal["max", "average", "global"], kernel: Sequence[int] = (1, 1),
    strides: Sequence[int] = (1, 1), pads: Sequence[int] = (0, 0, 0, 0), include_pad: bool = False, ceil: bool = False,
) -> Array:  # fmt: skip
    """Pooling of an NCHW tensor. `max` needs the output's numbers to be the input's."""
    op = {"max": p.MAX_POOL, "average": p.AVERAGE_POOL, "global": p.GLOBAL_POOL}[kind]
    window = dict(zip(("kh", "kw", "sh", "sw", "pt", "pl", "pb", "pr"), (*kernel, *strides, *pads), strict=True))
    scales = [x_scale.scale, out.scale]
    return _single(p.POOL, [x], [x_scale], out, scales, op=op, include_pad=int(include_pad), ceil=int(ceil), **window)


def quantise_rows(x: Array) -> tuple[Array, Array]:
    """Dynamic quantisation: float32 [..., K] -> (u8 with zero point 128, float32 scale [..., 1]), one scale a row.

    Raises ValueError where a number is not finite.
    """
    if not np.isfinite(x).all():
        raise ValueError("dynamic quantisation: the input has NaN or infinite values")
    scale = (np.abs(x).max(-1, keepdims=True, initial=0) / np.float32(127)).astype(np.float32)
    scale[scale < np.float32(1e-35)] = 1  # a row of zeros, or of denormals
    return (np.rint(x / scale) + 128).astype(np.uint8), scale


class DynamicGemm:
    """float32 [..., K] times an s8 weight [K, N], the rows quantised as they come: no calibration."""

    def __init__(self, weight: Array, *, weight_scale: float | Array, rank: int = 2, isa: str | None = None) -> None:
        self._product = QGemm(weight, weight_scale=weight_scale, x_scale=1.0, x_zero=128, rank=rank, isa=isa)

    def __call__(self, x: Array) -> Array:
        """float32 [..., N], to within the rounding of each row to 255 levels."""
        rows, scale = quantise_rows(x)
        return self._product(rows) * scale
