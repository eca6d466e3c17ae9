"""What a region plan computes, in plain numpy: the compiled engine and the lowering are both tested against this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from graphopt.kernels import plan as p
from graphopt.kernels.sparse_plan import to_dense

F = np.float32


def _saturate(values: np.ndarray, low: int = 0, high: int = 255) -> np.ndarray:
    return np.clip(np.clip(values, 0, 255), low, high).astype(np.uint8)


def fma(a: np.ndarray, b: np.float32, c: np.ndarray | np.float32) -> np.ndarray:
    """float32 fused multiply-add of u8 values: the product is exact in float64, so (nearly always) one rounding remains."""
    return (np.asarray(a, np.float64) * np.float64(b) + np.asarray(c, np.float64)).astype(F)


def _pixels(array: np.ndarray, layout: int) -> np.ndarray:
    """An activation as [N, H, W, C]."""
    if layout == p.ROWS:
        return array.reshape(1, 1, -1, array.shape[-1])
    if layout == p.CHANNELS_LAST:
        return array
    while array.ndim < 4:
        array = array[:, :, None] if array.ndim == 3 else array[..., None]
    return array.transpose(0, 2, 3, 1)


def _input(s: p.Step, plan: p.Plan, array: np.ndarray) -> np.ndarray:
    x = _pixels(array, s.layout)
    if s.type == p.FLOAT:
        return _saturate(np.rint(x / F(plan.scales[s.x_scale])) + F(plan.tensors[s.out].zero))
    return (x.astype(np.int16) + (128 if s.type == p.INT8 else 0)).astype(np.uint8)


def _shaped(x: np.ndarray, layout: int, rank: int, like: Sequence[int]) -> np.ndarray:
    if layout == p.ROWS:
        return x.reshape(*like[: rank - 1], x.shape[-1])  # of images: rank 2, one row each
    if layout == p.CHANNELS_LAST:
        return x
    first = x.transpose(0, 3, 1, 2)
    return first.reshape(first.shape[:2] + ((first.shape[2] * first.shape[3],) if rank == 3 else first.shape[2:][: rank - 2]))


def _output(s: p.Step, plan: p.Plan, x: np.ndarray, like: Sequence[int]) -> np.ndarray:
    if s.type == p.FLOAT:
        zero = plan.tensors[s.x].zero
        value = (x.astype(np.int32) - zero).astype(F) * F(plan.scales[s.x_scale])
    else:
        value = x if s.type == p.UINT8 else (x.astype(np.int16) - 128).astype(np.int8)
    return _shaped(value, s.layout, s.rank, like)


def _padded(x: np.ndarray, s: p.Step, value: int) -> np.ndarray:
    return np.pad(x, ((0, 0), (s.pt, s.pb), (s.pl, s.pr), (0, 0)), constant_values=value)


def _windows(x: np.ndarray, s: p.Step, rows: int, columns: int) -> list[np.ndarray]:
    """The pixels under each tap of the window, in order."""
    return [
        x[:, i * s.dh : i * s.dh + (rows - 1) * s.sh + 1 : s.sh, j * s.dw : j * s.dw + (columns - 1) * s.sw + 1 : s.sw]
        for i in range(s.kh)
        for j in range(s.kw)
    ]


def _size(size: int, pads: int, kernel: int, dilation: int, stride: int) -> int:
    return (size + pads - dilation * (kernel - 1) - 1) // stride + 1


def oihw(s: p.Step, weight: np.ndarray) -> np.ndarray:
    """Weights as [OC, IC / groups, KH, KW]; a transposed convolution's are turned for the ordinary one over its input."""
    if s.order == p.KN:
        return weight.T[:, :, None, None]
    if s.order == p.OIHW:
        return weight.reshape(weight.shape[0], -1, s.kh, s.kw)
    full = weight.reshape(s.groups, weight.shape[0] // s.groups, weight.shape[1], s.kh, s.kw)
    return full.transpose(0, 2, 1, 3, 4)[:, :, :, ::-1, ::-1].reshape(-1, weight.shape[0] // s.groups, s.kh, s.kw)


def _spread(x: np.ndarray, s: p.Step) -> np.ndarray:
    """Zeros between the pixels of a transposed convolution's input (which is centred already), and its own padding."""
    n, h, w, c = x.shape
    wide = np.zeros((n, (h - 1) * s.sh + 1 + s.oph, (w - 1) * s.sw + 1 + s.opw, c), x.dtype)
    wide[:, : (h - 1) * s.sh + 1 : s.sh, : (w - 1) * s.sw + 1 : s.sw] = x
    top, left = s.dh * (s.kh - 1) - s.pt, s.dw * (s.kw - 1) - s.pl
    bottom, right = s.dh * (s.kh - 1) - s.pb, s.dw * (s.kw - 1) - s.pr
    wide = np.pad(wide, ((0, 0), (max(top, 0), max(bottom, 0)), (max(left, 0), max(right, 0)), (0, 0)))
    return wide[:, max(-top, 0) : wide.shape[1] - max(-bottom, 0), max(-left, 0) : wide.shape[2] - max(-right, 0)]


def accumulate(s: p.Step, x: np.ndarray, zero: int, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """int64 [N, OH, OW, OC]: bias + sum of (x - zero) w."""
    w = oihw(s, weight).astype(np.int64)
    centred = x.astype(np.int64) - zero
    one = s
    if s.order == p.IOHW:
        centred, one = _spread(centred, s), p.step(p.CONV, kh=s.kh, kw=s.kw, dh=s.dh, dw=s.dw)
    else:
        centred = _padded(centred, s, 0)
    rows = _size(centred.shape[1], 0, one.kh, one.dh, one.sh)
    columns = _size(centred.shape[2], 0, one.kw, one.dw, one.sw)
    taps = _windows(centred, one, rows, columns)
    oc, ic = w.shape[0] // s.groups, w.shape[1]
    out = np.zeros((*taps[0].shape[:3], w.shape[0]), np.int64)
    for g in range(s.groups):
        for tap, values in enumerate(taps):
            part = w[g * oc : (g + 1) * oc, :, tap // s.kw, tap % s.kw].T
            out[..., g * oc : (g + 1) * oc] += values[..., g * ic : (g + 1) * ic] @ part
    return out if bias is None else out + bias


def _conv(
    s: p.Step, plan: p.Plan, tensors: Mapping[int, np.ndarray], constants: Sequence[np.ndarray], like: Sequence[int]
) -> np.ndarray:
    bias = constants[s.bias] if s.bias >= 0 else None
    acc = accumulate(s, tensors[s.x], plan.tensors[s.x].zero, constants[s.weight], bias).astype(np.int32).astype(F)
    scale = F(plan.scales[s.scale]) * constants[s.weight_scale].astype(F)
    if s.out < 0:
        value = acc * scale + (constants[s.float_bias] if s.float_bias >= 0 else F(0))
        return _shaped(value, p.ROWS, s.rank, like)
    q = _saturate(np.rint(acc * (scale / F(plan.scales[s.scale + 1]))) + s.mid_zero)
    if s.residual >= 0:
        ra, rb, fx = (F(v) for v in plan.scales[s.sum_scale : s.sum_scale + 3])
        q = _saturate(np.rint(fma(tensors[s.residual], rb, fma(q, ra, fx))))
    return _saturate(q, s.low, s.high)


def _pool(s: p.Step, plan: p.Plan, x: np.ndarray) -> np.ndarray:
    zero, out_zero = F(plan.tensors[s.x].zero), F(plan.tensors[s.out].zero)
    if s.op == p.GLOBAL_POOL:
        n = x.shape[1] * x.shape[2]
        sx, sy = F(plan.scales[s.scale]), F(plan.scales[s.scale + 1])
        total = x.astype(np.int64).sum((1, 2), keepdims=True) - n * int(zero)
        return _saturate(np.rint(total.astype(F) * (sx / (sy * F(n)))) + out_zero)
    rows, columns = pooled(s, x.shape[1], x.shape[2])
    need_h, need_w = (rows - 1) * s.sh + s.dh * (s.kh - 1) + 1, (columns - 1) * s.sw + s.dw * (s.kw - 1) + 1
    inside = np.zeros((1, max(need_h, x.shape[1] + s.pt), max(need_w, x.shape[2] + s.pl), 1), bool)
    inside[:, s.pt : s.pt + x.shape[1], s.pl : s.pl + x.shape[2]] = True
    wide = np.zeros((x.shape[0], *inside.shape[1:3], x.shape[3]), x.dtype)
    wide[:, s.pt : s.pt + x.shape[1], s.pl : s.pl + x.shape[2]] = x
    taps, valid = _windows(wide, s, rows, columns), _windows(inside, s, rows, columns)
    if s.op == p.MAX_POOL:
        return np.maximum.reduce([np.where(v, t, 0) for t, v in zip(taps, valid, strict=True)]).astype(np.uint8)
    sx, sy = F(plan.scales[s.scale]), F(plan.scales[s.scale + 1])
    total = np.zeros(taps[0].shape, F)
    for tap, ok in zip(taps, valid, strict=True):
        total = np.where(ok, total + sx * (tap.astype(F) - zero), total)
    count = F(s.kh * s.kw) if s.include_pad else np.sum([v.astype(F) for v in valid], 0, dtype=F)
    return _saturate(np.rint(total / count / sy + out_zero))


def pooled(s: p.Step, height: int, width: int) -> tuple[int, int]:
    """Output size of a pooling window (ONNX, MaxPool: with ceil_mode no window starts in the end padding)."""
    sizes = []
    for size, begin, end, k, d, stride in ((height, s.pt, s.pb, s.kh, s.dh, s.sh), (width, s.pl, s.pr, s.kw, s.dw, s.sw)):
        free = size + begin + end - d * (k - 1) - 1
        count = -(-free // stride) + 1 if s.ceil else free // stride + 1
        if s.ceil and (count - 1) * stride >= size + begin:
            count -= 1
        sizes.append(count)
    return sizes[0], sizes[1]


def _binary(s: p.Step, plan: p.Plan, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if s.op == p.ADD:
        ra, rb, fx = (F(v) for v in plan.scales[s.scale : s.scale + 3])
        return _saturate(np.rint(fma(y, rb, fma(x, ra, fx))), s.low, s.high)
    product = (x.astype(np.int32) - plan.tensors[s.x].zero) * (y.astype(np.int32) - plan.tensors[s.y].zero)
    return _saturate(np.rint(product.astype(F) * F(plan.scales[s.scale]) + F(plan.tensors[s.out].zero)), s.low, s.high)


def _copy(s: p.Step, plan: p.Plan, x: np.ndarray, table: np.ndarray | None, out: np.ndarray | None) -> np.ndarray:
    rows = s.hn if s.hn >= 0 else -(-(x.shape[1] - s.h0) // s.hs)
    columns = s.wn if s.wn >= 0 else -(-(x.shape[2] - s.w0) // s.ws)
    part = x[:, s.h0 :: s.hs, s.w0 :: s.ws, s.c0 : s.c0 + s.count][:, :rows, :columns]
    part = part.repeat(s.rh, 1).repeat(s.rw, 2)
    part = part if table is None else table[part]
    zero = plan.tensors[s.out].zero
    part = _padded(part, s, zero)
    if out is None:
        out = np.full((*part.shape[:3], plan.tensors[s.out].channels), zero, np.uint8)
    out[..., s.offset : s.offset + s.count] = part
    return out


def run(plan: p.Plan, inputs: Sequence[np.ndarray], constants: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of the region, batch and all."""
    tensors: dict[int, np.ndarray] = {}
    outputs: dict[int, np.ndarray] = {}
    constants = list(constants)
    for packed in plan.packed:
        shape = packed.shape[::-1] if packed.turned else (packed.shape[0], int(np.prod(packed.shape[1:])))
        matrix = to_dense(constants[packed.values], constants[packed.gaps], (shape[0], shape[1]), packed.block)
        constants[packed.values] = (matrix.T if packed.turned else matrix).reshape(packed.shape)

    def conv(s: p.Step) -> None:
        value = _conv(s, plan, tensors, constants, inputs[max(s.like, 0)].shape)
        (outputs if s.out < 0 else tensors)[s.index if s.out < 0 else s.out] = value

    def copy(s: p.Step) -> None:
        table = constants[s.table] if s.table >= 0 else None
        tensors[s.out] = _copy(s, plan, tensors[s.x], table, tensors.get(s.out))

    actions: Mapping[int, Callable[[p.Step], None]] = {
        p.INPUT: lambda s: tensors.__setitem__(s.out, _input(s, plan, inputs[s.index])),
        p.OUTPUT: lambda s: outputs.__setitem__(s.index, _output(s, plan, tensors[s.x], inputs[max(s.like, 0)].shape)),
        p.CONV: conv,
        p.POOL: lambda s: tensors.__setitem__(s.out, _pool(s, plan, tensors[s.x])),
        p.BINARY: lambda s: tensors.__setitem__(s.out, _binary(s, plan, tensors[s.x], tensors[s.y])),
        p.COPY: copy,
    }
    for s in plan.steps:
        actions[s.kind](s)
    return [outputs[i] for i in range(plan.outputs)]
