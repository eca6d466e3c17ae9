"""Random region plans, with their constants and inputs: every kind of step, with shapes that fit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphopt.kernels import plan as p
from graphopt.kernels.sparse_plan import BLOCKS, fits, to_sparse

Array = np.ndarray
DTYPES = {p.FLOAT: np.float32, p.UINT8: np.uint8, p.INT8: np.int8}


@dataclass
class Case:
    """A plan being drawn. `sizes[t]` is (height, width) of tensor t."""

    rng: np.random.Generator
    batch: int
    tensors: list[p.Tensor] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    steps: list[p.Step] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    constants: list[Array] = field(default_factory=list)
    inputs: list[Array] = field(default_factory=list)
    outputs: int = 0
    packed: list[p.Packed] = field(default_factory=list)

    def pick(self, *values: int) -> int:
        return int(self.rng.choice(values))

    def tensor(self, channels: int, size: tuple[int, int]) -> int:
        self.tensors.append(p.Tensor(channels, self.pick(0, 3, 128, 255)))
        self.sizes.append(size)
        return len(self.tensors) - 1

    def scale(self, *values: float) -> int:
        self.scales += [float(np.float32(v)) for v in values]
        return len(self.scales) - len(values)

    def constant(self, array: Array) -> int:
        self.constants.append(array)
        return len(self.constants) - 1

    def step(self, kind: int, **fields: int) -> None:
        self.steps.append(p.step(kind, **fields))

    def plan(self) -> p.Plan:
        return p.Plan(self.tensors, self.steps, self.scales, len(self.inputs), self.outputs, len(self.constants), self.packed)


def add_input(c: Case, channels: int, size: tuple[int, int], layout: int) -> int:
    kind = c.pick(p.FLOAT, p.UINT8, p.INT8)
    if layout == p.ROWS:
        shape: tuple[int, ...] = (c.batch, size[1] // c.batch, channels)
    elif layout == p.CHANNELS_LAST:
        shape = (c.batch, *size, channels)
    else:
        shape = (c.batch, channels, *size)
    if kind == p.FLOAT:
        values = (c.rng.standard_normal(shape) * 2).astype(np.float32)
    else:
        values = c.rng.integers(0, 256, shape).astype(np.uint8).view(DTYPES[kind])
    out = c.tensor(channels, size)
    c.inputs.append(values)
    index = len(c.inputs) - 1
    c.step(p.INPUT, index=index, out=out, type=kind, layout=layout, rank=len(shape), x_scale=c.scale(0.02))
    return out


def add_output(c: Case, x: int, layout: int) -> None:
    rank = 3 if layout == p.ROWS else 4
    c.step(p.OUTPUT, x=x, index=c.outputs, type=c.pick(1, 2, 3), layout=layout, rank=rank, x_scale=c.scale(0.03), like=0)
    c.outputs += 1


def add_weight(c: Case, values: Array, order: int) -> int:
    """The constant as it is, or with most blocks zero, and perhaps without these."""
    if order == p.IOHW or c.pick(0, 1):
        return c.constant(values)
    turned = order == p.KN
    matrix = values.T if turned else values.reshape(len(values), -1)
    fitting = [block for block in BLOCKS if fits(matrix.shape, block)]
    block = fitting[c.pick(*range(len(fitting)))]
    kept = c.rng.random((matrix.shape[0] // block[0], matrix.shape[1] // block[1])) < 0.3
    matrix = (matrix * np.kron(kept, np.ones(block, np.int8))).astype(np.int8)
    if c.pick(0, 1):
        return c.constant(np.ascontiguousarray(matrix.T) if turned else matrix.reshape(values.shape))
    found, gaps = to_sparse(np.ascontiguousarray(matrix), block)
    c.packed.append(p.Packed(c.constant(found), c.constant(gaps), block, values.shape, turned))
    return c.packed[-1].values


def weights(c: Case, shape: tuple[int, ...], outs: int, taps: int, order: int = p.OIHW) -> dict[str, int]:
    values = c.rng.integers(-127, 128, shape).astype(np.int8)
    spread = (c.rng.random(outs if c.pick(0, 1) else 1) + 0.5).astype(np.float32)
    fields = {"weight": add_weight(c, values, order), "weight_scale": c.constant(spread)}
    if c.pick(0, 1):
        fields["bias"] = c.constant(c.rng.integers(-3000, 3000, outs).astype(np.int32))
    fields["scale"] = c.scale(0.02, 0.02 * 40 * max(taps, 1) ** 0.5 * 1.7)
    return fields


def add_conv(c: Case, x: int) -> int | None:
    channels, (height, width) = c.tensors[x].channels, c.sizes[x]
    groups = c.pick(1, 1, channels, *[g for g in (2, 3) if channels % g == 0])
    per = channels // groups
    outs = groups if groups == channels and c.pick(0, 1) else groups * c.pick(1, 3, 8)
    k = [c.pick(1, 2, 3, 3, 5), c.pick(1, 3, 3, 5)]
    if groups == channels and c.pick(0, 1):
        k = [c.pick(3, 5)] * 2
    stride, dilation = [c.pick(1, 1, 2, 3), c.pick(1, 2)], [c.pick(1, 1, 2), c.pick(1, 1, 2)]
    if k[0] == k[1] and c.pick(0, 1):
        stride, dilation = [stride[1], c.pick(1, stride[1])], [1, 1]
    pads = [c.pick(0, 1, 2) for _ in range(4)]
    window = dict(zip(("kh", "kw", "sh", "sw", "dh", "dw", "pt", "pl", "pb", "pr"), [*k, *stride, *dilation, *pads], strict=True))
    free = [height + pads[0] + pads[2] - dilation[0] * (k[0] - 1) - 1, width + pads[1] + pads[3] - dilation[1] * (k[1] - 1) - 1]
    if min(free) < 0:
        return None
    size = (free[0] // stride[0] + 1, free[1] // stride[1] + 1)
    more = weights(c, (outs, per, *k), outs, per * k[0] * k[1])
    low, high = c.pick(0, 0, 17), c.pick(255, 255, 200)
    out = c.tensor(outs, size)
    more |= {"mid_zero": c.tensors[out].zero, "low": low, "high": high}
    same = [t for t in range(out) if c.sizes[t] == size and c.tensors[t].channels == outs]
    if same and c.pick(0, 1):
        more |= {"residual": int(c.rng.choice(same)), "sum_scale": c.scale(0.7, 0.6, 20), "mid_zero": c.pick(0, 77, 255)}
    c.step(p.CONV, x=x, out=out, groups=groups, **window, **more)
    return out


def add_transposed(c: Case, x: int) -> int | None:
    channels, (height, width) = c.tensors[x].channels, c.sizes[x]
    groups = c.pick(1, 1, *[g for g in (2,) if channels % g == 0])
    outs = groups * c.pick(1, 5, 16)
    k, stride, dilation = [c.pick(1, 2, 3, 4), c.pick(2, 3)], [c.pick(1, 2, 3), c.pick(1, 2)], [c.pick(1, 2), 1]
    pads, extra = [c.pick(0, 1) for _ in range(4)], [c.pick(0, 0, 1) for _ in range(2)]
    extra = [min(e, s - 1) for e, s in zip(extra, stride, strict=True)]
    size = tuple(
        s * (n - 1) + e + d * (kk - 1) + 1 - a - b
        for s, n, e, d, kk, a, b in zip(stride, (height, width), extra, dilation, k, pads[:2], pads[2:], strict=True)
    )
    if min(size) < 1 or max(size) > 40:
        return None
    window = dict(zip(("kh", "kw", "sh", "sw", "dh", "dw", "pt", "pl", "pb", "pr"), [*k, *stride, *dilation, *pads], strict=True))
    more = weights(c, (channels, outs // groups, *k), outs, channels // groups * k[0] * k[1], p.IOHW)
    out = c.tensor(outs, (size[0], size[1]))
    c.step(
        p.CONV,
        x=x,
        out=out,
        groups=groups,
        order=p.IOHW,
        oph=extra[0],
        opw=extra[1],
        mid_zero=c.tensors[out].zero,
        **window,
        **more,
    )
    return out


def add_pool(c: Case, x: int) -> int | None:
    op, size, channels = c.pick(p.MAX_POOL, p.AVERAGE_POOL, p.GLOBAL_POOL), c.sizes[x], c.tensors[x].channels
    if op == p.GLOBAL_POOL:
        out = c.tensor(channels, (1, 1))
        c.step(p.POOL, x=x, out=out, op=op, scale=c.scale(0.02, 0.017))
        return out
    k, stride, dilation = [c.pick(1, 2, 3), c.pick(2, 3)], [c.pick(1, 2), c.pick(1, 2, 3)], [c.pick(1, 1, 2), 1]
    pads = [c.pick(0, min(1, kk - 1)) for kk in (*k, *k)]
    ceil = c.pick(0, 1)
    if op == p.AVERAGE_POOL:
        dilation = [1, 1]  # a window wholly in the padding has no mean
    names = ("kh", "kw", "sh", "sw", "dh", "dw", "pt", "pl", "pb", "pr")
    fields = dict(zip(names, [*k, *stride, *dilation, *pads], strict=True))
    from graphopt.kernels.reference_plan import pooled

    if min(s + a + b - d * (kk - 1) - 1 for s, a, b, d, kk in zip(size, pads[:2], pads[2:], dilation, k, strict=True)) < 0:
        return None
    rows, columns = pooled(p.step(p.POOL, ceil=ceil, **fields), *size)
    if op == p.AVERAGE_POOL and ceil:
        fields["include_pad"] = 1
    out = c.tensor(channels, (rows, columns))
    if op == p.MAX_POOL:
        c.tensors[out] = p.Tensor(channels, c.tensors[x].zero)
    c.step(p.POOL, x=x, out=out, op=op, ceil=ceil, scale=c.scale(0.02, 0.021), **fields)
    return out


def add_binary(c: Case, x: int) -> int | None:
    channels, size = c.tensors[x].channels, c.sizes[x]
    others = [t for t, other in enumerate(c.tensors) if other.channels == channels and c.sizes[t] in (size, (1, 1))]
    y, op = int(c.rng.choice(others)), c.pick(p.ADD, p.MUL)
    if c.pick(0, 1):
        x, y = y, x
    size = max(c.sizes[x], c.sizes[y])
    scale = c.scale(0.8, 0.4, -3.5) if op == p.ADD else c.scale(0.013)
    out = c.tensor(channels, size)
    c.step(p.BINARY, x=x, y=y, out=out, op=op, scale=scale, low=c.pick(0, 9), high=c.pick(255, 222))
    return out


def add_copy(c: Case, x: int) -> int | None:
    """A slice, a resize, a pad or a table look-up of some channels; the rest of the output is filled."""
    channels, (height, width) = c.tensors[x].channels, c.sizes[x]
    count = c.pick(channels, channels, max(1, channels // 2))
    first, offset = c.pick(0, channels - count), c.pick(0, 0, 3)
    h0, w0, hs, ws = c.pick(0, min(1, height - 1)), c.pick(0, min(1, width - 1)), c.pick(1, 1, 2), c.pick(1, 1, 2)
    rows, columns = -(-(height - h0) // hs), -(-(width - w0) // ws)
    rh, rw = c.pick(1, 1, 2), c.pick(1, 1, 3)
    pads = [c.pick(0, 0, 1) for _ in range(4)]
    size = (rows * rh + pads[0] + pads[2], columns * rw + pads[1] + pads[3])
    table = c.constant(c.rng.integers(0, 256, 256).astype(np.uint8)) if c.pick(0, 1) else -1
    total = offset + count + c.pick(0, 0, 5)
    out = c.tensor(total, size)
    places = dict(zip(("pt", "pl", "pb", "pr"), pads, strict=True))
    fill = int(any(pads) or total != count)
    c.step(
        p.COPY, x=x, out=out, table=table, c0=first, count=count, h0=h0, hs=hs, w0=w0, ws=ws, rh=rh, rw=rw, offset=offset,
        fill=fill, hn=c.pick(-1, rows), wn=c.pick(-1, columns), **places,
    )  # fmt: skip
    return out


def add_concat(c: Case, x: int) -> int | None:
    parts = [t for t in range(len(c.tensors)) if c.sizes[t] == c.sizes[x]][:3]
    out = c.tensor(sum(c.tensors[t].channels for t in parts), c.sizes[x])
    offset = 0
    for part in parts:
        c.step(p.COPY, x=part, out=out, count=c.tensors[part].channels, offset=offset)
        offset += c.tensors[part].channels
    return out


ADDERS = (add_conv, add_conv, add_conv, add_transposed, add_pool, add_binary, add_copy, add_concat)


def draw(seed: int, *, longest: int = 8) -> tuple[p.Plan, list[Array], list[Array]]:
    """(plan, constants, inputs)."""
    rng = np.random.default_rng(seed)
    c = Case(rng, batch=int(rng.integers(1, 3)))
    size = (int(rng.integers(1, 24)), int(rng.integers(1, 24)))
    layout = c.pick(p.CHANNELS_FIRST, p.CHANNELS_LAST)
    x = add_input(c, c.pick(1, 2, 3, 4, 5, 16, 17, 24, 40, 70, 130), size, layout)
    if c.pick(0, 0, 1):
        add_input(c, c.tensors[x].channels, size, layout)
    for _ in range(int(rng.integers(1, longest))):
        source = int(rng.integers(0, len(c.tensors)))
        adder = ADDERS[int(rng.integers(0, len(ADDERS)))]
        adder(c, source if c.pick(0, 1) else len(c.tensors) - 1)
    for t in {len(c.tensors) - 1, int(rng.integers(0, len(c.tensors)))}:
        add_output(c, t, layout)
    return c.plan(), c.constants, c.inputs


def rows(seed: int) -> tuple[p.Plan, list[Array], list[Array]]:
    """A matrix product (or two) over rows, with a quantised or a float output."""
    rng = np.random.default_rng(seed)
    c = Case(rng, batch=int(rng.integers(1, 4)))
    k, n, m = int(rng.integers(1, 200)), int(rng.integers(1, 300)), int(rng.integers(1, 60))
    x = add_input(c, k, (1, c.batch * m), p.ROWS)
    more = weights(c, (k, n), n, k, p.KN)
    if c.pick(0, 1):
        bias = c.constant(rng.standard_normal(n).astype(np.float32)) if c.pick(0, 1) else -1
        c.step(p.CONV, x=x, out=-1, index=0, order=p.KN, rank=3, like=0, float_bias=bias, **more)
        c.outputs = 1
    else:
        out = c.tensor(n, (1, c.batch * m))
        c.step(p.CONV, x=x, out=out, order=p.KN, mid_zero=c.tensors[out].zero, **more)
        add_output(c, out, p.ROWS)
    return c.plan(), c.constants, c.inputs


def edges(seed: int) -> tuple[p.Plan, list[Array], list[Array]]:
    """One image in and out in any type and layout, as wide or narrow as it may be, through a table on the way."""
    rng = np.random.default_rng(seed)
    c = Case(rng, batch=int(rng.integers(1, 3)))
    layouts = (p.CHANNELS_FIRST, p.CHANNELS_LAST)
    size = c.pick(1, 1, 2, 4), c.pick(1, 2, 7, 15, 16, 17, 31, 40, 130)
    x = add_input(c, c.pick(1, 2, 3, 4, 5, 16, 17, 33, 48), size, layouts[c.pick(0, 1)])
    out = c.tensor(c.tensors[x].channels, size)
    c.step(p.COPY, x=x, out=out, count=c.tensors[x].channels, table=c.constant(rng.integers(0, 256, 256).astype(np.uint8)))
    for t in (x, out):
        add_output(c, t, layouts[c.pick(0, 1)])
    return c.plan(), c.constants, c.inputs
