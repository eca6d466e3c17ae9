"""Vector-Jacobian products of operators that only move elements."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.vjp import Vjp, VjpError, vjp
from graphopt.vjp_rules_linear import scattered

Results = Sequence[str | None]


@vjp("Flatten", "Reshape", "Squeeze", "Unsqueeze")
def reshape(site: Vjp) -> Results:
    return [site.like(site.g, site.x())]


@vjp("Transpose")
def transpose(site: Vjp) -> Results:
    perm = site.node.attrs.get("perm") or list(range(site.rank()))[::-1]
    return [site.op("Transpose", site.g, perm=[int(i) for i in np.argsort(perm)])]


@vjp("Expand")
def expand(site: Vjp) -> Results:
    return [site.reduced(site.g, 0)]


@vjp("Tile")
def tile(site: Vjp) -> Results:
    """Each axis of g is (repeats, size): the sum over all repeats."""
    tape, rank = site.tape, site.rank()
    columns = [tape.op("Unsqueeze", t, tape.integers(1)) for t in (site.x(1), tape.shape(site.x()))]
    pairs = tape.op("Reshape", tape.op("Concat", *columns, axis=1), tape.integers(-1))
    return [tape.sum(tape.op("Reshape", site.g, pairs), list(range(0, 2 * rank, 2)), keep=False)]


@vjp("DepthToSpace")
def depth_to_space(site: Vjp) -> Results:
    if (site.attr("mode") or "DCR") != "DCR":
        raise VjpError("only its mode DCR has an inverse operator")
    return [site.op("SpaceToDepth", site.g, blocksize=int(site.attr("blocksize")))]


@vjp("SpaceToDepth")
def space_to_depth(site: Vjp) -> Results:
    return [site.op("DepthToSpace", site.g, blocksize=int(site.attr("blocksize")))]


@vjp("Pad")
def pad(site: Vjp) -> Results:
    """With constants: the negative padding cuts off what was added, and brings back zeros for what was cut."""
    if (site.attr("mode") or "constant") != "constant":
        raise VjpError(f"it pads by '{site.attr('mode')}'")
    site.fixed(2)
    pads, zero = site.tape.op("Neg", site.x(1)), site.number(0.0)
    return [site.op("Pad", site.g, pads, zero, *([site.x(3)] if site.has(3) else []))]


@vjp("Slice")
def slice_(site: Vjp) -> Results:
    """Step 1: zeros around g. Else every element goes where it came from."""
    tape, axes = site.tape, site.integers("axes", 3)
    starts = site.x(1)
    if axes is None:
        size = site.shape(starts)[0]
        if not isinstance(size, int):
            raise VjpError("the number of its axes is not known")
        axes = list(range(size))
    if any(step != 1 for step in site.integers("steps", 4) or ()):
        return [_moved(site)]
    which, whole = tape.integers(*axes), tape.shape(site.x())
    sizes = tape.op("Gather", whole, which)
    starts = tape.op("Cast", starts, to=7)
    starts = tape.op("Where", tape.op("Less", starts, tape.integers(0)), tape.op("Add", starts, sizes), starts)
    starts = tape.op("Max", tape.integers(0), tape.op("Min", starts, sizes))
    before = tape.op("ScatterElements", tape.integers(*[0] * site.rank()), which, starts, axis=0)
    after = tape.op("Sub", tape.op("Sub", whole, tape.shape(site.y)), before)
    return [site.op("Pad", site.g, tape.op("Concat", before, after, axis=0), site.number(0.0))]


@vjp("Gather")
def gather(site: Vjp) -> Results:
    return [_moved(site), None]


@vjp("GatherElements", "GatherND")
def gather_elements(site: Vjp) -> Results:
    return [_moved(site), None]


def _moved(site: Vjp) -> str:
    """The operator applied to the positions of its input's elements says where each element of g came from."""
    tape, node = site.tape, site.node
    zero, one = (tape.constant(np.asarray(v, np.int64)) for v in (0, 1))
    line = tape.op("Range", zero, tape.op("Size", site.x()), one)
    places = tape.op("Reshape", line, tape.shape(site.x()))
    others = [t.name for t in node.inputs[1:]]
    return scattered(site, site.g, tape.op(node.op, places, *others, **node.attrs), site.x())


@vjp("Split")
def split(site: Vjp) -> Results:
    """Parts without a gradient count as zero."""
    parts = []
    for tensor, g in zip(site.node.outputs, site.grads, strict=True):
        if g is None and not tensor.name:
            raise VjpError("an output has no name")
        parts.append(g or site.spread(site.number(0.0), tensor.name))
    return [site.op("Concat", *parts, axis=int(site.attr("axis")))]


@vjp("Concat")
def concat(site: Vjp) -> Results:
    """The part of g that each input became."""
    tape, which = site.tape, site.tape.integers(int(site.attr("axis")) % len(site.shape(site.y)))
    end, found = site.tape.integers(0), list[str | None]()
    for index in range(len(site.node.inputs)):
        start, end = end, tape.op("Add", end, tape.op("Gather", tape.shape(site.x(index)), which))
        found.append(tape.op("Slice", site.g, start, end, which) if site.wants(index) else None)
    return found
