"""Operators that move, pick or repeat indices: Transpose, Concat, Split, Slice, Gather, Pad, Expand, Tile, Resize and the like.

Those that store a size or a position of a free axis have a repair in `repair_rules`.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dim_labels import ONE, Labels, is_one
from graphopt.dim_rules import Axes, PinError, Result, Site, rule
from graphopt.dim_rules_reshape import hold_unknown
from graphopt.edit import constant_value
from graphopt.operands import operand


@rule("Transpose")
def transpose(site: Site) -> Result:
    """The order of axes."""
    x = site.axes()
    return [[x[i] for i in site.node.attrs.get("perm") or range(len(x) - 1, -1, -1)]]


@rule("Concat")
def concat(site: Site) -> Result:
    """Labels one after the other; the other axes meet."""
    parts = [site.axes(i) for i in site.given()]
    axis = int(site.attr("axis")) % len(parts[0])
    y = list(parts[0])
    for part in parts[1:]:
        for i, labels in enumerate(part):
            if i != axis:
                site.tie(y[i], labels)
                y[i] = max(y[i], labels, key=lambda a: a.size)
    y[axis] = _joined(site, [part[axis] for part in parts], site.out_shape()[axis])
    return [y]


def _joined(site: Site, parts: list[Labels], size: object) -> Labels:
    if sum(part.size for part in parts) == size:
        return np.concatenate(parts)
    site.pin_axes(parts, "joined on an axis of unknown size")
    return site.pinned(size, "joined on an axis of unknown size")


@rule("Split")
def split(site: Site) -> Result:
    """Runs of labels, as long as the outputs are."""
    x, axis = site.axes(), int(site.attr("axis") or 0) % len(site.axes())
    sizes = [site.out_shape(i)[axis] for i in range(len(site.node.outputs))]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes) or sum(known) != x[axis].size:
        site.pin(x[axis], "split into parts of unknown size")
        return [[site.pinned(size, "split from it") if i == axis else a for i, a in enumerate(x)] for size in sizes]
    ends = np.cumsum(known)
    return [[x[axis][end - size : end] if i == axis else a for i, a in enumerate(x)] for end, size in zip(ends, known, strict=True)]


@rule("Slice")
def slice_(site: Site) -> Result:
    """A run of labels with step 1, also where the start counts from the end; else the axis stays."""
    x, y, shape = site.axes(), list(site.axes()), site.out_shape()
    axes = site.ints("axes", 3)
    if axes is None and (site.has(3) or len(shape) != len(x)):
        raise PinError("the axes of a Slice are not known")
    starts, ends, steps = site.ints("starts", 1), site.ints("ends", 2), site.ints("steps", 4)
    if axes is None:
        axes = list(range(len(starts or ends or x)))
    for i, axis in enumerate(a % len(x) for a in axes):
        labels = x[axis]
        plain = starts is not None and ends is not None and (steps is not None or not site.has(4))
        step = steps[i] if steps else 1
        if plain and starts and ends and step == 1 and labels.size == (site.shape() or ())[axis]:
            y[axis] = labels[slice(starts[i], ends[i])]
        else:
            site.pin(labels, "sliced with a step" if plain else "sliced at positions that are not known")
            y[axis] = site.pinned(shape[axis], "sliced")
    return [y]


@rule("Gather")
def gather(site: Site) -> Result:
    """Constant indices pick labels; others address positions, and so the axis stays."""
    rank = len(site.shape() or ())
    if not rank:
        raise PinError(f"rank of '{site.node.inputs[0].name}' is unknown")
    axis = int(site.attr("axis") or 0) % rank
    indices, picks = site.axes(1), site.node.inputs[1]
    site.pin_axes(indices, "indices")
    if isinstance(picks, gs.Constant) and len(picks.shape) == 1 and isinstance((site.shape() or ())[axis], int):
        x = site.axes()
        return [[*x[:axis], x[axis][np.asarray(picks.values)], *x[axis + 1 :]]]
    x = site.axes(fixed={axis: "Gather addresses positions"})
    shape = site.out_shape()[axis : axis + len(indices)]
    middle = [site.pinned(size, "Gather addresses positions") for size in shape]
    return [[*x[:axis], *middle, *x[axis + 1 :]]]


@rule("Pad")
def pad(site: Site) -> Result:
    """What is added to a free axis has labels of its own: they go with what they are added to, as in a residual sum."""
    x, shape = site.axes(), site.out_shape()
    amounts, axes = operand(site.node, "pads", 1).integers() or site.ints("pads", 1), site.ints("axes", 3)
    if amounts is None or (axes is None and site.has(3)):
        raise PinError("the amounts of padding are not known")
    named = [a % len(x) for a in axes] if axes is not None else list(range(len(x)))
    constant = site.attr("mode") in (None, "constant")
    y = list(x)
    for i, axis in enumerate(named):
        before, after = amounts[i], amounts[i + len(named)]
        if before or after:
            y[axis] = _padded(site, x[axis], before, after, shape[axis], constant=constant)
    return [y]


def _padded(site: Site, labels: Labels, before: int, after: int, size: object, *, constant: bool) -> Labels:
    if not constant or before < 0 or after < 0 or labels.size + before + after != size or site.dims.classes.is_pinned(labels):
        site.pin(labels, "padded")
        return site.pinned(size, "padded")
    fresh = site.dims.classes.fresh
    return np.concatenate([fresh(before), labels, fresh(after)])


@rule("Expand")
def expand(site: Site) -> Result:
    """Axes of size 1 are repeated; the new indices are free as far as what they meet is."""
    x, shape = site.axes(), site.out_shape()
    padded = [ONE] * (len(shape) - len(x)) + x
    _target(site, 1)
    hold_unknown(site, padded)
    return [[_repeated(site, a, size) if is_one(a) else a for a, size in zip(padded, shape, strict=True)]]


def _repeated(site: Site, labels: Labels, size: object) -> Labels:
    """Labels of an axis of size 1 after repetition."""
    if isinstance(size, int) and 1 < size <= 1 << 16 and site.dims.shapes.dtype(site.node.outputs[0].name) != np.int64:
        return site.dims.classes.fresh(size)
    return labels if size == 1 else site.pinned(size, "repeated")


def _target(site: Site, index: int) -> None:
    """A size that is computed can only be corrected with Where, which opset 9 brought."""
    if site.has(index) and not isinstance(site.node.inputs[index], gs.Constant) and site.opset < 9:
        raise PinError("a computed size before opset 9")


@rule("Tile")
def tile(site: Site) -> Result:
    """Labels repeat as the data do."""
    x, repeats, shape = site.axes(), site.ints("repeats", 1), site.out_shape()
    if repeats is None or len(repeats) != len(x):
        raise PinError("the number of repeats is not known")
    site.pin_axes([a for a, size in zip(x, shape, strict=True) if not isinstance(size, int)], "repeated")
    y = [site.pinned(s, "repeated") if is_one(a) and r != 1 else np.tile(a, r) for a, r, s in zip(x, repeats, shape, strict=True)]
    return [[site.pinned(s, "repeated") if not isinstance(s, int) else a for a, s in zip(y, shape, strict=True)]]


@rule("Resize", "Upsample")
def resize(site: Site) -> Result:
    """Axes that keep their size keep their labels."""
    x, before, after = site.axes(), site.shape() or (), site.out_shape()
    if site.attr("axes") is not None or site.attr("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise PinError("Resize of named axes, or of crops")
    scales = [1.0] * len(x) if site.has(3) else _scales(site)
    if len(scales) != len(x):
        raise PinError("the scales are not known")
    if site.has(3):
        _target(site, 3)
    same = [b == a and s == 1 and isinstance(a, int) for b, a, s in zip(before, after, scales, strict=True)]
    site.pin_axes([a for a, s in zip(x, same, strict=True) if not s], "resized")
    return [[a if s else site.pinned(size, "resized") for a, s, size in zip(x, same, after, strict=True)]]


def _scales(site: Site) -> list[float]:
    """Where the sizes are not given. (A scale of 1.1 may leave a size as it is and move its elements all the same.)"""
    if "scales" in site.node.attrs:
        return [float(s) for s in site.node.attrs["scales"]]
    index = 2 if site.node.op == "Resize" and site.opset > 10 else 1
    scales = constant_value(site.node.inputs[index]) if site.has(index) else None
    return [] if scales is None else [float(s) for s in np.ravel(scales)]


@rule("DepthToSpace")
def depth_to_space(site: Site) -> Result:
    """Every block**2 channels make one: those of a kind first (DCR), or those of one output together (CRD)."""
    x, block = site.axes(), int(site.attr("blocksize"))
    channels = x[1].size // block**2
    if x[1].size != channels * block**2 or not channels:
        raise PinError("the number of channels is not known")
    apart = site.attr("mode") in (None, "DCR")
    grid = x[1].reshape(-1, channels) if apart else x[1].reshape(channels, -1).T
    site.dims.classes.union(grid, grid[:1])
    return [[x[0], grid[0], *_spatial(site, x)]]


@rule("SpaceToDepth")
def space_to_depth(site: Site) -> Result:
    """All channels, once for each place in the block."""
    x, block = site.axes(), int(site.attr("blocksize"))
    return [[x[0], np.tile(x[1], block**2), *_spatial(site, x)]]


def _spatial(site: Site, x: Axes) -> Axes:
    site.pin_axes(x[2:], "moved between depth and space")
    return [site.pinned(size, "moved between depth and space") for size in site.out_shape()[2:]]


@rule("ConstantOfShape")
def constant_of_shape(site: Site) -> Result:
    """One value everywhere: an axis is as free as what it meets."""
    _target(site, 0)
    return [[_repeated(site, ONE, size) for size in site.out_shape()]]


@rule("Constant", "Range", "RandomNormal", "RandomUniform", "EyeLike", "OneHot", "NonZero")
def source(site: Site) -> Result:
    """Values that depend on positions."""
    for index in site.given():
        site.pin_axes(site.axes(index), f"{site.node.op} depends on positions")
    return [None] * len(site.node.outputs)
