"""Finishes a plan: sums go into the convolution before them, copies of copies become one, and what nothing reads is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.kernels import plan as p

F = np.float32
NEAR = 16  # last digits of a sum's constant that are tried


@dataclass(eq=False)
class Draft:
    """A step that may still change. `same`: both inputs of a sum have the same pixels."""

    kind: int
    fields: dict[str, int]
    same: bool = False

    def reads(self) -> list[int]:
        return [
            self.fields[name] for name in ("x", "y", "residual") if self.fields.get(name, -1) >= 0 and name in p.SLOTS[self.kind]
        ]

    def get(self, name: str) -> int:
        return self.fields.get(name, p.DEFAULTS.get(name, -1))

    @property
    def out(self) -> int:
        return self.fields.get("out", -1)


CONSTANTS = ("weight", "weight_scale", "bias", "table", "float_bias")


def finish(
    drafts: Sequence[Draft],
    tensors: Sequence[p.Tensor],
    scales: Sequence[float],
    counts: tuple[int, int],
    held: Sequence[bool],
) -> tuple[p.Plan, list[int]]:
    """The plan of these steps, and the constants that are left: those it reads or the body does (`held`).

    `counts`: activations, outputs.
    """
    numbers = list(scales)
    live = _live(_fused(_direct(_live(list(drafts)), tensors), tensors, numbers))
    used = sorted({t for d in live for t in (*d.reads(), d.out) if t >= 0})
    place = {t: i for i, t in enumerate(used)}
    read = {d.fields.get(n, -1) for d in live for n in CONSTANTS if n in p.SLOTS[d.kind]}
    left = [i for i, body in enumerate(held) if body or i in read]
    steps = []
    for draft in live:
        names = [n for n in ("x", "y", "residual", "out") if draft.fields.get(n, -1) >= 0]
        given = {n: left.index(draft.fields[n]) for n in CONSTANTS if draft.fields.get(n, -1) >= 0}
        steps.append(p.step(draft.kind, **{**draft.fields, **{n: place[draft.fields[n]] for n in names}, **given}))
    return p.Plan([tensors[t] for t in used], steps, numbers, *counts, len(left)), left


def _live(drafts: list[Draft]) -> list[Draft]:
    needed: set[int] = set()
    kept = []
    for draft in reversed(drafts):
        if draft.kind in (p.OUTPUT, p.INPUT) or draft.out < 0 or draft.out in needed:
            kept.append(draft)
            needed.update(draft.reads())
    return kept[::-1]


def _direct(drafts: list[Draft], tensors: Sequence[p.Tensor]) -> list[Draft]:
    """A copy that only one other copy reads becomes one with it: slices of slices, and what goes into a concat."""
    readers = Counter(t for d in drafts for t in d.reads())
    writers: dict[int, list[Draft]] = {}
    for draft in drafts:
        writers.setdefault(draft.out, []).append(draft)
    gone: set[int] = set()
    for draft in drafts:
        if draft.kind != p.COPY:
            continue
        before = writers.get(draft.fields["x"], [])
        if len(before) == 1 and before[0].kind == p.COPY and readers[before[0].out] == 1:
            whole = before[0].get("offset") == 0 and before[0].get("count") == tensors[before[0].out].channels
            if whole and before[0].get("table") < 0 and _joins(before[0], draft):
                gone.add(id(before[0]))
    return [d for d in drafts if id(d) not in gone]


AXES = (("h0", "hs", "hn", "rh", "pt", "pb"), ("w0", "ws", "wn", "rw", "pl", "pr"))


def _joins(first: Draft, second: Draft) -> bool:
    """Turn the second of two copies into both of them; False where one copy cannot do it."""
    joined = {"x": first.fields["x"], "c0": first.get("c0") + second.get("c0")}
    for axis in AXES:
        start, step, count, repeat, before, behind = (first.get(name) for name in axis)
        start2, step2, count2, repeat2 = (second.get(name) for name in axis[:4])
        sliced = (start2, step2, count2) != (0, 1, -1)
        if before or behind or (sliced and repeat != 1):
            return False
        if count2 < 0 <= count:
            count2 = -(-(count - start2) // step2)
        joined |= dict(zip(axis, (start + start2 * step, step * step2, count2, repeat * repeat2), strict=False))
    second.fields |= joined
    return True


def _fused(drafts: list[Draft], tensors: Sequence[p.Tensor], scales: list[float]) -> list[Draft]:
    """A sum becomes the residual of the convolution that writes one of its inputs, if nothing else reads that."""
    readers: dict[int, int] = {}
    for draft in drafts:
        for tensor in draft.reads():
            readers[tensor] = readers.get(tensor, 0) + 1
    writers = {d.out: d for d in drafts if d.kind == p.CONV and d.out >= 0}
    gone: set[int] = set()
    for draft in drafts:
        if draft.kind != p.BINARY or draft.fields["op"] != p.ADD or not draft.same:
            continue
        for own, other in (("x", "y"), ("y", "x")):
            conv = writers.get(draft.fields[own])
            if conv is not None and readers[conv.out] == 1 and _bare(conv) and _takes(conv, draft, own, other, scales):
                gone.add(id(conv))
                break
    return [d for d in drafts if id(d) not in gone]


def _bare(conv: Draft) -> bool:
    """Whether it has room for a sum: what it clamps would have to come before."""
    return conv.fields.get("residual", -1) < 0 and (conv.fields.get("low", 0), conv.fields.get("high", 255)) == (0, 255)


def _takes(conv: Draft, total: Draft, own: str, other: str, scales: list[float]) -> bool:
    """Turn the sum into the convolution with its residual; False where that would round otherwise."""
    first = total.fields["scale"]
    ra, rb, fx = (F(v) for v in scales[first : first + 3])
    if own == "y":  # the convolution would add its own part first, the sum adds x first
        found = _swapped(ra, rb, fx)
        if found is None:
            return False
        ra, rb, fx = rb, ra, found
    scales += [float(ra), float(rb), float(fx)]
    bounds = {"low": total.fields["low"], "high": total.fields["high"]}
    residual = {"residual": total.fields[other], "sum_scale": len(scales) - 3, "out": total.out}
    total.kind, total.fields = p.CONV, {**conv.fields, **bounds, **residual}
    return True


def _sum(inner: np.ndarray, a: np.float32, outer: np.ndarray, b: np.float32, fx: np.float32) -> np.ndarray:
    """u8 of fma(outer, b, fma(inner, a, fx))."""
    once = (inner * np.float64(a) + np.float64(fx)).astype(F)
    return np.asarray(np.clip(np.rint((outer * np.float64(b) + once.astype(np.float64)).astype(F)), 0, 255))


def _swapped(ra: np.float32, rb: np.float32, fx: np.float32) -> np.float32 | None:
    """The constant with which adding the second input first gives the same integers, of all pairs of them; None: there is none."""
    a, b = np.arange(256.0)[:, None], np.arange(256.0)[None, :]
    wanted = _sum(a, ra, b, rb, fx)
    above, below = fx, fx
    for _ in range(NEAR):
        for candidate in (above, below):
            if np.array_equal(_sum(b, rb, a, ra, candidate), wanted):
                return candidate
        above, below = np.nextafter(above, F(np.inf)), np.nextafter(below, F(-np.inf))
    return None
