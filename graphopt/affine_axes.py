"""Operators that move elements about: which index of which axis an affine map belongs to on the other side."""

from __future__ import annotations

import numpy as np

from graphopt.affine import Affine, affine
from graphopt.affine_moves import Carried, Site, unmoved
from graphopt.shapes import Shape

LARGEST_PATTERN = 1 << 22  # elements of one period of a per-channel pattern that a Reshape is followed through


def transposed(site: Site, a: Affine) -> Carried:
    rank = site.scene.rank(site.node.inputs[0])
    perm = site.get("perm") or (list(range(rank))[::-1] if rank is not None else None)
    if a.axis is None:
        return [(0, a)]
    if perm is None:
        return "the rank is unknown"
    return [(0, a.on(list(perm).index(a.axis) if site.forward else int(perm[a.axis])))]


def reshaped(site: Site, a: Affine) -> Carried:
    """Reshape, Flatten, Squeeze, Unsqueeze keep the order of elements: only the shapes matter."""
    if site.slot != 0:
        return f"it is not the data of {site.node.op}"
    made = follow_reshape(a, site.dims(0, far=False), site.dims(0, far=True))
    return made if isinstance(made, str) else [(0, made)]


def follow_reshape(a: Affine, source: Shape | None, target: Shape | None) -> Affine | str:
    """The map after `source` was reshaped to `target`, exactly; a reason where it is not per index of one axis any more."""
    if a.axis is None:
        return a
    if source is None or target is None:
        return "a shape is unknown"
    before = [d for d in source[: a.axis] if d != 1]
    for b, size in enumerate(target):
        if None not in before and size == source[a.axis] and [d for d in target[:b] if d != 1] == before:
            return a.on(b)
    inner = _product(source[a.axis + 1 :])
    if inner is None or len(a.scale) * inner > LARGEST_PATTERN:
        return "the reshaped sizes are unknown"
    for b in range(len(target)):
        made = _periodic(a, inner, target, b)
        if made is not None:
            return made
    return "a Reshape mixes its axis with another"


def _product(dims: Shape) -> int | None:
    known = [d for d in dims if isinstance(d, int)]
    return int(np.prod(known, dtype=np.int64)) if len(known) == len(dims) else None


def _periodic(a: Affine, inner: int, target: Shape, b: int) -> Affine | None:
    """Flattened, the map repeats every len * inner elements: it is one of axis b if it depends on nothing but b's index."""
    size, block = target[b], _product(target[b + 1 :])
    if not isinstance(size, int) or not block or not size:
        return None
    period, wanted = len(a.scale) * inner, size * block
    if wanted % period and period % wanted:
        return None
    columns = []
    for values in (a.scale, a.shift):
        flat = np.repeat(values, inner)
        grid = np.tile(flat, max(1, wanted // period)).reshape(-1, size, block)
        if (grid != grid[:1, :, :1]).any():
            return None
        columns.append(grid[0, :, 0])
    return affine(columns[0], columns[1], b, a.dtype, bn=a.bn)


def concatenated(site: Site, a: Affine) -> Carried:
    rank = site.scene.rank(site.node.outputs[0])
    sizes = [site.scene.size(t, site.get("axis")) for t in site.node.inputs]
    axis = site.get("axis") % rank if rank else None
    if not site.forward and a.axis != axis:
        return [(i, a) for i in range(len(sizes))] if a.axis is None or axis is not None else "the rank is unknown"
    known = [s for s in sizes if s is not None]
    if len(known) != len(sizes) or axis is None or a.axis not in (None, axis):
        return "it covers one part of a Concat, or a size is unknown"
    ends = np.cumsum(known)
    parts = [np.arange(end - size, end) for size, end in zip(known, ends, strict=True)]
    if site.forward:
        return [(0, a.spread(parts[site.slot], int(ends[-1]), axis))]
    return [(i, a.indexed(part, axis)) for i, part in enumerate(parts)]


def split(site: Site, a: Affine) -> Carried:
    rank = site.scene.rank(site.node.inputs[0])
    used = [t for t in site.node.outputs if t.name]
    if site.forward and a.axis is None:
        return [(i, a) for i, t in enumerate(site.node.outputs) if t.name] if site.slot == 0 else "it is not the data of Split"
    axis = site.get("axis") % rank if rank else None
    sizes = [site.scene.size(t, site.get("axis")) for t in used]
    if axis is None or None in sizes or len(used) != len(site.node.outputs):
        return "the sizes of a Split are unknown"
    ends = np.cumsum([s for s in sizes if s is not None])
    parts = [np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if site.forward:
        return [(i, a.indexed(part, axis) if a.axis == axis else a) for i, part in enumerate(parts)]
    if a.axis not in (None, axis):
        return "it covers one part of a Split"
    return [(0, a.spread(parts[site.slot], int(ends[-1]), axis))]


def sliced(site: Site, a: Affine) -> Carried:
    """Slice: attributes before opset 10, inputs after; what is cut away may be mapped in any way."""
    if a.axis is None or site.slot != 0:
        return unmoved(site, a)
    rank, size = site.scene.rank(site.node.inputs[0]), site.scene.size(site.node.inputs[0], a.axis)
    starts, ends = site.ints("starts", 1), site.ints("ends", 2)
    axes, steps = site.ints("axes", 3), site.ints("steps", 4)
    unknown = starts is None or ends is None or (axes is None and site.given(3)) or (steps is None and site.given(4))
    if unknown or starts is None or ends is None or rank is None or size is None:
        return "the bounds of a Slice are unknown"
    where = [x % rank for x in axes] if axes is not None else list(range(len(starts)))
    if a.axis not in where:
        return unmoved(site, a)
    i = where.index(a.axis)
    step = steps[i] if steps else 1
    if step < 0:
        return "a Slice runs backwards"
    return _picked(site, a, np.arange(size)[starts[i] : ends[i] : step], size)


def _picked(site: Site, a: Affine, index: np.ndarray, size: int) -> Carried:
    """The output's index i along the map's axis is the input's index[i]."""
    if a.axis is None or site.forward:
        return [(0, a.indexed(index, a.axis))] if len(index) else "nothing is left of its axis"
    return [(0, a.spread(index, size, a.axis))]


def gathered(site: Site, a: Affine) -> Carried:
    if a.axis is None or site.slot != 0:
        return unmoved(site, a)
    rank, index = site.scene.rank(site.node.inputs[0]), site.fixed(1)
    if rank is None or index is None or index.ndim != 1:
        return "the indices of a Gather are unknown"
    size = site.scene.size(site.node.inputs[0], a.axis)
    if site.get("axis") % rank != a.axis:
        return unmoved(site, a)
    if size is None or (len(np.unique(index % size)) != len(index) and not site.forward):
        return "a Gather repeats an index"
    return _picked(site, a, index.astype(np.int64) % size, size)


def padded(site: Site, a: Affine) -> Carried:
    if site.slot != 0 or (a.axis is None and _pad_zeros(site)):
        return unmoved(site, a)
    pads, rank = site.ints("pads", 1), site.scene.rank(site.node.inputs[0])
    if pads is None or rank is None or site.given(3) or len(pads) != 2 * rank:
        return "the widths of a Pad are unknown"
    if not _pad_zeros(site) and site.get("mode") == "constant" and any(p > 0 for p in pads):
        return "a Pad adds other values than 0"
    if a.axis is None or not (pads[a.axis] or pads[a.axis + rank]):
        return unmoved(site, a)
    before, after, length = pads[a.axis], pads[a.axis + rank], len(a.scale)
    if before < 0 or after < 0 or site.get("mode") != "constant":
        return "a Pad changes its axis"
    if site.forward:
        return [(0, a.spread(np.arange(before, before + length), before + length + after, a.axis))]
    return [(0, a.indexed(np.arange(before, length - after), a.axis))]


def _pad_zeros(site: Site) -> bool:
    value = site.fixed(2) if site.given(2) else site.get("value")
    known = value is not None or not site.given(2)
    return site.get("mode") == "constant" and known and not np.any(value or 0)


def pad_shift(site: Site) -> bool:
    pads = site.ints("pads", 1)
    return site.get("mode") != "constant" or (pads is not None and all(p <= 0 for p in pads))


def blocks(site: Site, a: Affine) -> Carried:
    """DepthToSpace and SpaceToDepth: one channel of the image is blocksize ** 2 channels of the other side."""
    if a.axis != 1:
        return unmoved(site, a) if a.axis in (None, 0) else "a block of pixels is cut across its axis"
    count, to_depth = site.get("blocksize") ** 2, site.node.op == "SpaceToDepth"
    inner = site.get("mode") == "CRD"  # the channel is the outer index of the depth, else the inner one
    if site.forward == to_depth:
        size = len(a.scale)
        return [(0, a.indexed(np.repeat(np.arange(size), count) if inner else np.tile(np.arange(size), count), 1))]
    index = np.arange(len(a.scale)).reshape((-1, count) if inner else (count, -1))
    index = index if inner else index.T
    equal = all((v[index] == v[index[:, :1]]).all() for v in (a.scale, a.shift))
    return [(0, a.indexed(index[:, 0], 1))] if equal else f"the pixels of one channel of {site.node.op} are mapped differently"


def resized(site: Site, a: Affine) -> Carried:
    """Interpolation weights sum to 1, except outside a cropped region."""
    if site.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        return "a Resize extrapolates"
    if a.axis is None or site.slot != 0:
        return unmoved(site, a)
    sizes = [site.scene.size(t, a.axis) for t in (site.node.inputs[0], site.node.outputs[0])]
    return unmoved(site, a) if None not in sizes and sizes[0] == sizes[1] else "it runs along an axis that is resized"
