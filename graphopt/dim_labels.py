"""Labels of axis indices, and the union-find over them: what must be removed together, and why some of it never is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphopt.shapes import Shape, Shapes

Labels = np.ndarray  # int64, one label for each index of one axis
ONE: Labels = np.zeros(1, np.int64)  # an axis of size 1: broadcasts, and never goes; label 0 is nothing else
FREE = np.iinfo(np.int64).max
NO_LABELS = "integers are positions or sizes, not data"


@dataclass(frozen=True)
class Pin:
    """Indices of an axis of a constant that must stay: the first cause, and the node (or "") where it lies."""

    tensor: str
    axis: int
    reason: str
    node: str


def is_one(labels: Labels) -> bool:
    """Whether the axis has size 1. (A dynamic axis has one label too, but not label 0.)"""
    return labels.size == 1 and int(labels[0]) == 0


class Classes:
    """Union-find over labels on arrays; the root of a class is its lowest label. A pinned class has a cause: the first one."""

    def __init__(self) -> None:
        self._parent, self._cause, self._count = np.zeros(1024, np.int64), np.full(1024, FREE), 1
        self.causes: list[tuple[str, str]] = []  # reason, node
        self._cause[0] = self._add_cause("an axis of size 1", "")

    def _add_cause(self, reason: str, node: str) -> int:
        self.causes.append((reason, node))
        return len(self.causes) - 1

    def fresh(self, count: int) -> Labels:
        """New labels, each a class of its own."""
        first, self._count = self._count, self._count + count
        if self._count > self._parent.size:
            grown = max(self._count, 2 * self._parent.size) - self._parent.size
            self._parent = np.concatenate([self._parent, np.zeros(grown, np.int64)])
            self._cause = np.concatenate([self._cause, np.full(grown, FREE)])
        labels = np.arange(first, self._count)
        self._parent[first : self._count] = labels
        return labels

    def pinned(self, size: int, reason: str, node: str) -> Labels:
        """One new pinned label for all indices of an axis."""
        label = self.fresh(1)
        self._cause[label] = self._add_cause(reason, node)
        return np.broadcast_to(label, size)

    def find(self, labels: Labels) -> Labels:
        """The root of each label; paths are shortened on the way."""
        roots: np.ndarray = self._parent[labels]
        while True:
            higher = self._parent[roots]
            if np.array_equal(higher, roots):
                return roots
            self._parent[labels] = higher
            roots = higher

    def union(self, a: Labels, b: Labels) -> None:
        """The i-th of `a` and the i-th of `b` go together; if either is pinned, both are. Arrays broadcast."""
        if a is b:
            return
        low, high = np.broadcast_arrays(self.find(a), self.find(b))
        touched = np.concatenate([low.ravel(), high.ravel()])
        causes = self._cause[touched]
        while True:
            low, high = np.minimum(low, high), np.maximum(low, high)
            if np.array_equal(low, high):
                break
            np.minimum.at(self._parent, high, low)
            low, high = self.find(low), self.find(high)
        np.minimum.at(self._cause, self.find(touched), causes)

    def pin(self, labels: Labels, reason: str, node: str) -> None:
        """The classes of these labels stay. Those pinned before keep their cause."""
        roots = self.find(labels)
        free = roots[self._cause[roots] == FREE]
        if free.size:
            self._cause[free] = self._add_cause(reason, node)

    def is_pinned(self, labels: Labels) -> bool:
        """Whether all of them are."""
        sample = labels[:1] if labels.strides == (0,) else labels
        return bool((self._cause[self.find(sample)] != FREE).all())

    def cause(self, labels: Labels) -> np.ndarray:
        """Index into `causes` for each label; FREE where it is not pinned."""
        cause: np.ndarray = self._cause[self.find(labels)]
        return cause

    def roots(self) -> np.ndarray:
        """By label: the root of its class, 0 where pinned."""
        roots = self.find(np.arange(self._count))
        return np.where(self._cause[roots] == FREE, roots, 0)


@dataclass(frozen=True)
class Fold:
    """A Reshape that makes one axis of several, or the reverse: which of the parts stays free is decided at the end."""

    whole: Labels
    parts: tuple[Labels, ...]
    node: str


@dataclass
class Dims:
    """The labels of every axis of every tensor and their classes; made by `graphopt.dims.couple`."""

    shapes: Shapes
    classes: Classes = field(default_factory=Classes)
    axes: dict[str, list[Labels] | None] = field(default_factory=dict)  # None: the rank is unknown
    vanishing: set[str] = field(default_factory=set)  # computed tensors that are zero wherever the constants' slices are
    folds: list[Fold] = field(default_factory=list)
    pins: list[Pin] = field(default_factory=list)
    residual: bool = False  # features under a LayerNormalization may go, which is not exact
    statistics: list[Labels] = field(default_factory=list)  # those features
    _roots: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def labels(self, tensor: str) -> list[np.ndarray] | None:
        """Per axis the root label of each index, 0 where pinned; a dynamic axis has one label 0. None: nothing is known.

        Sizes (int64) and other parameters of operators have no labels either: they are None.
        """
        axes = self.axes.get(tensor)
        return None if axes is None else [self._public(labels) for labels in axes]

    def _public(self, labels: Labels) -> np.ndarray:
        same = labels.strides == (0,)  # one label for all: keep it so
        return np.broadcast_to(self._roots[labels[:1]], labels.shape) if same and labels.size else self._roots[labels]

    def freeze(self) -> None:
        """Take the classes as they are now; `labels` answers from here on."""
        self._roots = self.classes.roots()

    def is_exact(self, units: np.ndarray) -> bool:
        """Whether removing these root labels is the same as zeroing them: no mean and no norm is taken over them."""
        return not any(np.isin(self._roots[labels], units).any() for labels in self.statistics)

    def root_count(self) -> int:
        """One more than the highest label."""
        return int(self._roots.size)

    def pinned_axes(self, shape: Shape, reason: str, node: str = "") -> list[Labels]:
        """Labels for a tensor of which nothing may go: one label an axis."""
        return [ONE if size == 1 else self.classes.pinned(size if isinstance(size, int) else 1, reason, node) for size in shape]

    def pin_tensor(self, tensor: str, reason: str, node: str = "") -> None:
        """Nothing of this tensor may go. One without labels gets pinned ones."""
        known = self.axes.get(tensor)
        if known is not None:
            for labels in known:
                self.classes.pin(labels, reason, node)
            return
        shape = self.shapes.shape(tensor)
        self.axes[tensor] = None if shape is None else self.pinned_axes(shape, reason, node)

    def tie(self, a: Labels, b: Labels) -> None:
        """Index by index; where the sizes are not known to be equal, all of both stay."""
        if a.size == b.size or a.size == 1 or b.size == 1:
            self.classes.union(a, b)  # a single label is a dynamic axis, and pinned
        else:
            self.classes.union(a, a[:1])
            self.classes.union(b, b[:1])
            self.classes.union(a[:1], b[:1])
            self.classes.pin(a, f"axes of {a.size} and {b.size} indices meet", "")
