"""Vector-Jacobian products of operators that are linear in their data: convolutions, products and windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from onnx import helper

from graphopt.vjp import Vjp, VjpError, vjp

Results = Sequence[str | None]


@dataclass(frozen=True)
class _Window:
    """How a window slides over the axes from the third on. `spare`: what no window reaches at their ends, None if unknown."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]
    spare: list[int] | None

    @property
    def reach(self) -> list[int]:
        """Elements that a window spans."""
        return [d * (k - 1) + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]


def _window(site: Vjp, kernel: Sequence[int]) -> _Window:
    """The window of a Conv or pool; VjpError where its padding depends on sizes that are not known."""
    rank = len(kernel)
    strides, dilations = ([int(v) for v in site.attr(name) or [1] * rank] for name in ("strides", "dilations"))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]
    sizes = [d if isinstance(d, int) else None for d in site.shape(site.x())[2:]]
    auto = site.attr("auto_pad") or "NOTSET"
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        totals = [_same(size, s, r) for size, s, r in zip(sizes, strides, reach, strict=True)]
        less, more = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (less, more) if auto == "SAME_UPPER" else (more, less)
    else:
        pads = [int(v) for v in site.attr("pads") or [0] * 2 * rank] if auto == "NOTSET" else [0] * 2 * rank
        before, after = pads[:rank], pads[rank:]
    lengths = [None if s is None else s + a + b for s, a, b in zip(sizes, before, after, strict=True)]
    spare = [(n - r) % s for n, r, s in zip(lengths, reach, strides, strict=True) if n is not None]
    if all(s == 1 for s in strides):
        spare = [0] * rank
    return _Window(list(kernel), strides, dilations, before, after, spare if len(spare) == rank else None)


def _same(size: int | None, stride: int, reach: int) -> int:
    """The padding of SAME on both sides together."""
    if size is None and stride > 1:
        raise VjpError("its padding depends on a size that is not known")
    return max(((-(-size // stride)) - 1) * stride + reach - size, 0) if size is not None else reach - 1


def _spread(site: Vjp, g: str, weight: str, window: _Window, group: int) -> str:
    """The transpose of the convolution: each element of g times the weights, added where its window lay."""
    rank = len(window.kernel)
    attributes = {"kernel_shape": window.kernel, "strides": window.strides, "dilations": window.dilations, "group": group}
    if window.spare is not None:
        pads = [*window.before, *window.after]
        return site.op("ConvTranspose", g, weight, pads=pads, output_padding=window.spare, **attributes)
    whole = site.op("ConvTranspose", g, weight, pads=[0] * 2 * rank, output_padding=[s - 1 for s in window.strides], **attributes)
    axes = site.tape.integers(*range(2, 2 + rank))  # the size is known at run time only: cut it out
    starts = site.tape.integers(*window.before)
    ends = site.op("Add", starts, site.op("Gather", site.tape.shape(site.x()), axes))
    return site.op("Slice", whole, starts, ends, axes)


@vjp("Conv")
def conv(site: Vjp) -> Results:
    """To the data by ConvTranspose; to a bias by summing. Computed weights: no rule."""
    site.fixed(1)
    kernel = site.shape(site.x(1))[2:]
    sizes = [k for k in kernel if isinstance(k, int)]
    if len(sizes) != len(kernel):
        raise VjpError("the size of its kernel is not known")
    data = _spread(site, site.g, site.x(1), _window(site, sizes), int(site.attr("group"))) if site.wants(0) else None
    others = [i for i in range(site.rank()) if i != 1]
    return [data, None, site.tape.sum(site.g, others, keep=False) if site.wants(2) else None]


@vjp("ConvTranspose")
def conv_transpose(site: Vjp) -> Results:
    """A Conv with the same weights: its windows end where those of the input did."""
    site.fixed(1)
    if site.attr("output_shape") or (site.attr("auto_pad") or "NOTSET") not in ("NOTSET", "VALID"):
        raise VjpError("its padding follows from output_shape or auto_pad")
    names = ("dilations", "group", "kernel_shape", "pads", "strides")
    attributes = {name: site.node.attrs[name] for name in names if name in site.node.attrs}
    if site.attr("auto_pad") == "VALID":
        attributes.pop("pads", None)
    data = site.op("Conv", site.g, site.x(1), **attributes) if site.wants(0) else None
    others = [i for i in range(site.rank()) if i != 1]
    return [data, None, site.tape.sum(site.g, others, keep=False) if site.wants(2) else None]


@vjp("Resize")
def resize(site: Vjp) -> Results:
    """Images. Linear along each axis: the matrix of an axis is what the same Resize makes of the identity."""
    site.fixed(1, 2, 3)
    x, y, attributes = site.shape(site.x()), site.shape(site.y), dict(site.node.attrs)
    if len(x) != 4 or x[:2] != y[:2] or site.attr("axes"):
        raise VjpError("it does not resize height and width alone")
    if site.attr("coordinate_transformation_mode") == "tf_crop_and_resize" or site.attr("exclude_outside"):
        raise VjpError("it does not resize each axis for itself")
    g = site.g
    for axis in (2, 3):
        matrix = _resizing(site, axis, attributes)
        g = site.op("MatMul", g, matrix) if axis == 3 else site.op("MatMul", site.op("Transpose", matrix, perm=[0, 1, 3, 2]), g)
    return [g]


def _resizing(site: Vjp, axis: int, attributes: dict[str, Any]) -> str:
    """[1, 1, resized, size]: how the axis is resized, as a matrix."""
    tape = site.tape
    size = tape.op("Gather", tape.shape(site.x()), tape.integers(axis))
    square = tape.op("Expand", site.number(0.0), tape.op("Concat", size, size, axis=0))
    dtype = helper.np_dtype_to_tensor_dtype(site.shapes.dtypes[site.y])
    identity = tape.op("Unsqueeze", tape.op("EyeLike", square, dtype=dtype), tape.integers(0, 1))
    target = tape.op("Gather", tape.shape(site.y), tape.integers(axis))
    if site.has(2):
        scale = tape.op("Gather", site.x(2), tape.integers(axis))
        ones = tape.constant(np.ones(1, np.float32))
        return tape.op("Resize", identity, "", tape.op("Concat", ones, ones, scale, ones, axis=0), **attributes)
    sizes = tape.op("Concat", tape.integers(1, 1), target, size, axis=0)
    return tape.op("Resize", identity, "", "", sizes, **{k: v for k, v in attributes.items() if k != "keep_aspect_ratio_policy"})


@vjp("MatMul")
def matmul(site: Vjp) -> Results:
    shapes = [site.shape(site.x(i)) for i in (0, 1)]
    if min(len(shape) for shape in shapes) < 2:
        raise VjpError("an operand is a vector")
    batch = site.shape(site.y)[:-2]
    a = b = None
    if site.wants(0):
        a = site.reduced(site.op("MatMul", site.g, _swapped(site, 1, len(shapes[1]))), 0, (*batch, *shapes[0][-2:]))
    if site.wants(1):
        b = site.reduced(site.op("MatMul", _swapped(site, 0, len(shapes[0])), site.g), 1, (*batch, *shapes[1][-2:]))
    return [a, b]


def _swapped(site: Vjp, index: int, rank: int) -> str:
    return site.op("Transpose", site.x(index), perm=[*range(rank - 2), rank - 1, rank - 2])


@vjp("Gemm")
def gemm(site: Vjp) -> Results:
    """alpha A' B' + beta C."""
    alpha, beta = float(site.attr("alpha")), float(site.attr("beta"))
    ta, tb = bool(site.attr("transA")), bool(site.attr("transB"))

    def product(left: str, right: str, turn_left: bool, turn_right: bool) -> str:
        return site.op("Gemm", left, right, alpha=alpha, transA=int(turn_left), transB=int(turn_right))

    a = b = c = None
    if site.wants(0):
        a = product(site.x(1), site.g, tb, True) if ta else product(site.g, site.x(1), False, not tb)
    if site.wants(1):
        b = product(site.g, site.x(0), True, ta) if tb else product(site.x(0), site.g, not ta, False)
    if site.wants(2):
        c = site.reduced(site.op("Mul", site.g, beta), 2)
    return [a, b, c]


@vjp("AveragePool")
def average_pool(site: Vjp) -> Results:
    """Every element of g, divided by how many its window averaged, spread over the window. Channels are taken as images."""
    window = _pool(site)
    tape, g = site.tape, site.g
    if any(window.before + window.after) and not site.attr("count_include_pad"):
        g = site.op("Div", g, _share(site, window))
    flat = site.op("Reshape", g, site.op("Concat", tape.integers(-1, 1), _tail(site, g), axis=0))
    dtype = site.shapes.dtype(site.y) or np.dtype(np.float32)
    weight = tape.constant(np.full((1, 1, *window.kernel), 1 / prod(window.kernel), dtype))
    return [site.like(_spread(site, flat, weight, window, 1), site.x())]


def _tail(site: Vjp, tensor: str) -> str:
    """The sizes from the third axis on."""
    return site.op("Slice", site.tape.shape(tensor), site.tape.integers(2), site.tape.integers(1 << 30))


def _share(site: Vjp, window: _Window) -> str:
    """Of each window, the share that lies in the input and not in its padding."""
    ones = site.op("Expand", 1.0, site.op("Concat", site.tape.integers(1, 1), _tail(site, site.x()), axis=0))
    attributes = {"dilations": window.dilations} if any(d > 1 for d in window.dilations) else {}
    pads = [*window.before, *window.after]
    return site.op(
        "AveragePool", ones, kernel_shape=window.kernel, strides=window.strides, pads=pads, count_include_pad=1, **attributes
    )


def _pool(site: Vjp) -> _Window:
    """The window of a pool; VjpError where the last one may reach over the end."""
    window = _window(site, [int(k) for k in site.attr("kernel_shape")])
    if site.attr("ceil_mode") and (window.spare is None or any(window.spare)):
        raise VjpError("its last window reaches over the end (ceil_mode)")
    return window


@vjp("MaxPool")
def max_pool(site: Vjp) -> Results:
    """To the positions that a MaxPool with a second output names."""
    tape, attributes = site.tape, {k: v for k, v in site.node.attrs.items() if k != "storage_order"}
    if site.attr("storage_order"):
        raise VjpError("its indices are column-major")
    return [scattered(site, site.g, tape.second("MaxPool", site.x(), **attributes), site.x())]


def scattered(site: Vjp, g: str, places: str, target: str) -> str:
    """Zeros of the target's shape with every element of g added at its place, an index into the flattened target."""
    tape = site.tape
    one = tape.integers(-1)
    zeros = site.op("Expand", 0.0, site.op("Reshape", tape.op("Size", target), one))
    flat = [tape.op("Reshape", t, one) for t in (places, g)]
    return site.like(tape.op("ScatterElements", zeros, *flat, axis=0, reduction="add"), target)
