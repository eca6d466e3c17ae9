"""Reshape, Flatten, Squeeze, Unsqueeze: exact maps from indices to indices, also where sizes are symbols."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dim_labels import ONE, Fold, Labels
from graphopt.dim_rules import Axes, PinError, Result, Site, rule
from graphopt.shapes import Dim, Shape
from graphopt.symbols import monomial

MAX_FOLD = 1 << 22  # elements; above it a fold of several free axes is pinned
Monomial = tuple[int, tuple[str, ...]]  # a number times symbols
Block = tuple[list[int], list[int]]  # axes of the input that hold the same elements as axes of the output


def _times(a: Monomial, b: Monomial) -> Monomial:
    return a[0] * b[0], tuple(sorted((*a[1], *b[1])))


def _products(shape: Shape, axes: list[int]) -> dict[Monomial, int]:
    """Product of the first n axes -> n."""
    total: Monomial = (1, ())
    found = {total: 0}
    for count, axis in enumerate(axes, 1):
        total = _times(total, monomial(shape[axis]))
        found[total] = count
    return found


def blocks(source: Shape, target: Shape) -> list[Block] | None:
    """The finest pairs of runs of axes with the same elements, axes of size 1 left out; None where an axis is empty.

    Both shapes hold the same number of elements in the same order. So wherever products of leading axes are equal, the rest are
    equal too; the same holds from the right, which is what helps where a leading size is not known.
    """
    if 0 in source or 0 in target:
        return None
    left, right = ([i for i, size in enumerate(s) if size != 1] for s in (source, target))
    heads, others = _products(source, left), _products(target, right)
    cuts = {(heads[p], others[p]) for p in heads.keys() & others.keys()}
    tails, others = _products(source, left[::-1]), _products(target, right[::-1])
    cuts |= {(len(left) - tails[p], len(right) - others[p]) for p in tails.keys() & others.keys()}
    cuts |= {(0, 0), (len(left), len(right))}
    ordered = sorted(cuts)
    if any(b[1] < a[1] for a, b in pairwise(ordered)):
        return None
    return [(left[a[0] : b[0]], right[a[1] : b[1]]) for a, b in pairwise(ordered)]


@rule("Reshape", "Flatten")
def reshape(site: Site) -> Result:
    """Axes are matched by equal products; one axis that meets several is a fold, decided at the end (`dim_folds`)."""
    x, source, target = site.axes(), site.shape(), site.out_shape()
    found = blocks(source, target) if source is not None else None
    if found is None:
        raise PinError("Reshape of an empty tensor" if source else f"rank of '{site.node.inputs[0].name}' is unknown")
    y: Axes = [ONE] * len(target)
    for mine, theirs in found:
        made = _block(site, [x[i] for i in mine], [target[i] for i in theirs], [source[i] for i in mine] if source else [])
        for axis, labels in zip(theirs, made, strict=True):
            y[axis] = labels
    hold_unknown(site, y)
    return [y]


def hold_unknown(site: Site, y: Axes, index: int = 1) -> None:
    """The size of a dynamic axis that may shrink is scaled by the repair, for which it must be known what the size is."""
    if not site.has(index) or isinstance(site.node.inputs[index], gs.Constant):
        return
    target, values = site.out_shape(), site.dims.shapes.value(site.node.inputs[index].name) or ()
    known = [None] * (len(target) - len(values)) + list(values)  # Expand aligns to the right
    for labels, size, value in zip(y, target, known, strict=True):
        if labels.size > 1 and not isinstance(size, int) and value is None:
            site.pin(labels, "a size that is computed in a way that is not known")


def _block(site: Site, xs: Axes, sizes: list[Dim], source: list[Dim]) -> Axes:
    known = [s for s in sizes if isinstance(s, int)]
    if len(xs) == len(sizes) == 1:
        return xs
    if len(known) < len(sizes) or not all(isinstance(s, int) for s in source):
        return _dynamic(site, xs, sizes, source) or _stuck(site, xs, sizes, "Reshape mixes axes of unknown size")
    if len(xs) == 1:
        return unfold(site, xs[0], known)
    if len(sizes) == 1:
        return [fold(site, xs)]
    return _refined(site, xs, known)


def _dynamic(site: Site, xs: Axes, sizes: list[Dim], source: list[Dim]) -> Axes | None:
    """(batch, 12, 64) -> (12*batch, 64): the symbols are outermost on both sides, so the numbers inside are a Reshape of their own.

    An axis of size 12*batch has 12 labels: those of its indices, again and again. None where it is not so.
    """
    mine, theirs = _inner(source), _inner(sizes)
    if mine is None or theirs is None or mine[0] != theirs[0]:
        return None
    (_, first, numbers), (_, start, others) = mine, theirs
    if xs[first].size not in (1, numbers[0]) or prod(numbers) != prod(others):
        return None
    labels = [np.broadcast_to(xs[first], numbers[0]), *xs[first + 1 :]]
    parts, shape = zip(*([(x, n) for x, n in zip(labels, numbers, strict=True) if n != 1] or [(ONE, 1)]), strict=True)
    wanted = [n for n in others if n != 1]
    made = iter(_block(site, list(parts), list(wanted), list(shape)) if wanted else [])
    inner = [next(made) if n != 1 else None for n in others]
    reason = "merged with an axis of unknown size"
    outer = [site.pinned(None, reason) for _ in sizes[:start]]
    return [*outer, *(site.pinned(None, reason) if x is None else x for x in inner)]


def _inner(sizes: list[Dim]) -> tuple[tuple[str, ...], int, list[int]] | None:
    """The symbols, the last axis that has some, and its number with those of the axes after it; None where numbers are outside."""
    split = [monomial(size) for size in sizes]
    last = max((i for i, (_, names) in enumerate(split) if names), default=-1)
    if last < 0 or any(number != 1 for number, _ in split[:last]):
        return None
    symbols = tuple(sorted(name for _, names in split for name in names))
    return symbols, last, [number for number, _ in split[last:]]


def _refined(site: Site, xs: Axes, sizes: list[int]) -> Axes:
    """(2048, 64) -> (512, 256) is (512 x 4, 64) -> (512, 4 x 64): both are made of the same smaller axes, or it is stuck."""
    sources = [labels.size for labels in xs]
    inner = {prod(s[i:]) for s in (sources, sizes) for i in range(len(s))}
    ordered = [*sorted(inner, reverse=True), 1]
    if any(a % b for a, b in pairwise(ordered)):
        return _stuck(site, xs, sizes, "Reshape mixes axes whose sizes do not divide each other")
    atoms = [a // b for a, b in pairwise(ordered)]
    parts: Axes = []
    for labels, run in zip(xs, _runs(atoms, sources), strict=True):
        parts.extend([labels] if len(run) == 1 else unfold(site, labels, [atoms[i] for i in run]))
    return [parts[run[0]] if len(run) == 1 else fold(site, [parts[i] for i in run]) for run in _runs(atoms, sizes)]


def _runs(atoms: list[int], sizes: list[int]) -> list[list[int]]:
    """Which atoms make up each size, in order."""
    runs, place = [], 0
    for size in sizes:
        run: list[int] = []
        while prod(atoms[i] for i in run) < size:
            run.append(place)
            place += 1
        runs.append(run)
    return runs


def _stuck(site: Site, xs: Axes, sizes: Sequence[Dim], reason: str) -> Axes:
    site.pin_axes(xs, reason)
    return [site.pinned(size, reason) for size in sizes]


def unfold(site: Site, whole: Labels, sizes: list[int]) -> Axes:
    """C -> (H, D): the labels of the parts of an axis, the outermost first."""
    classes = site.dims.classes
    if classes.is_pinned(whole):
        classes.union(whole, whole[:1])
        return [np.broadcast_to(whole[:1], size) for size in sizes]
    parts = tuple(classes.fresh(size) for size in sizes)
    site.dims.folds.append(Fold(whole, parts, site.node.name))
    return list(parts)


def fold(site: Site, parts: Axes) -> Labels:
    """(H, D) -> C: the labels of an axis made of these. With one part free the labels of C are its labels, repeated."""
    classes, sizes = site.dims.classes, [part.size for part in parts]
    free = [i for i, part in enumerate(parts) if not classes.is_pinned(part)]
    if not free:
        return np.broadcast_to(parts[0][:1], prod(sizes))
    if len(free) == 1:
        shape = [1] * len(sizes)
        shape[free[0]] = sizes[free[0]]
        return np.broadcast_to(parts[free[0]].reshape(shape), sizes).reshape(-1)
    if prod(sizes) > MAX_FOLD:
        reason = "Reshape folds several free axes that are too large to follow"
        site.pin_axes(parts, reason)
        return site.pinned(prod(sizes), reason)
    whole = classes.fresh(prod(sizes))
    site.dims.folds.append(Fold(whole, tuple(parts), site.node.name))
    return whole


@rule("Squeeze")
def squeeze(site: Site) -> Result:
    """Axes of size 1 go: the named ones, or all."""
    x, shape, axes = site.axes(), site.shape() or (), site.ints("axes", 1)
    if axes is None and (site.has(1) or not all(isinstance(size, int) for size in shape)):
        raise PinError("the axes to squeeze are not known")
    gone = {a % len(x) for a in axes} if axes is not None else {i for i, size in enumerate(shape) if size == 1}
    site.pin_axes([x[i] for i in gone], "squeezed, so it has size 1")
    return [[labels for i, labels in enumerate(x) if i not in gone]]


@rule("Unsqueeze")
def unsqueeze(site: Site) -> Result:
    """New axes of size 1."""
    x, axes = iter(site.axes()), site.ints("axes", 1)
    if axes is None:
        raise PinError("the axes to unsqueeze are not known")
    rank = len(site.axes()) + len(axes)
    new = {a % rank for a in axes}
    return [[ONE if i in new else next(x) for i in range(rank)]]
