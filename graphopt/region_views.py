"""How a region sees the axes of its tensors: plans know only pixels and channels, so every reshape must be one of views."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from graphopt.kernels.plan import CHANNELS_FIRST, CHANNELS_LAST, MAX_CHANNELS, ROWS
from graphopt.region_units import Site, Unit
from graphopt.shapes import Shape

_ROLES: Mapping[tuple[int, int], str] = {
    (CHANNELS_FIRST, 4): "NCHW",
    (CHANNELS_FIRST, 3): "NCW",
    (CHANNELS_FIRST, 2): "NC",
    (CHANNELS_LAST, 4): "NHWC",
}


@dataclass(frozen=True)
class View:
    """`flat`: the height and width of a [N, C*H*W] whose plan tensor is still [H, W, C]; `merged`: [N, C, H*W], likewise."""

    layout: int
    rank: int
    flat: tuple[int, int] | None = None
    merged: bool = False

    @property
    def roles(self) -> str:
        """What each axis is: N, C, H, W, or R for rows."""
        return "R" * (self.rank - 1) + "C" if self.layout == ROWS else _ROLES[self.layout, self.rank]

    @property
    def plain(self) -> bool:
        """Whether a node can have an input or output of this view."""
        return self.flat is None and not self.merged


Views = tuple[list[View], list[View]]
Fit = Callable[[Unit, Sequence[View | None], Site], Views | str]
LAYOUT = "the layout before it does not suit it"


def fit(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Views of all inputs and outputs; None of `given` is chosen freely. Or the reason why the unit cannot have such inputs."""
    ranks = [site.shapes.rank(t.name) for t in (*unit.inputs, *unit.outputs)]
    if None in ranks:
        return "the rank of its tensors is not known"
    found = FITS[unit.kind](unit, given, site)
    if isinstance(found, str):
        return found
    for tensor, view in zip((*unit.inputs, *unit.outputs), (*found[0], *found[1]), strict=True):
        shape = site.shapes.shape(tensor.name) or ()
        if len(shape) != view.rank or ((view.layout, view.rank) not in _ROLES and view.layout != ROWS):
            return "its rank is not one that a region has"
        channels = shape[view.roles.index("C")]
        if not isinstance(channels, int) or not 0 < channels <= MAX_CHANNELS:
            return "its number of channels is not known"
    return found


def _shape(site: Site, unit: Unit, output: bool = False) -> Shape:
    return site.shapes.shape((unit.outputs if output else unit.inputs)[0].name) or ()


def _images(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Convolutions and pools: [N, C, W] or [N, C, H, W]."""
    rank = len(_shape(site, unit))
    if rank not in (3, 4):
        return "its rank is not one that a region has"
    view = View(CHANNELS_FIRST, rank)
    return ([view], [view]) if given[0] in (None, view) else LAYOUT


def _linear(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    view = given[0] or View(ROWS, len(_shape(site, unit)))
    if view.roles[-1] != "C" or view.merged:
        return LAYOUT
    if unit.real and view.layout == CHANNELS_LAST:
        return "a float output of pixels"
    return [view], [replace(view, flat=None)]


def _alike(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Element by element: one view for all."""
    known = {v for v in given if v is not None}
    if len(known) > 1:
        return LAYOUT
    view = known.pop() if known else site_default(site, unit)
    return [view] * len(unit.inputs), [view] * len(unit.outputs)


def site_default(site: Site, unit: Unit) -> View:
    """The view of an activation that nothing has decided: as what reads it wants it."""
    return wanted(unit, site, 8)


def wanted(unit: Unit, site: Site, depth: int) -> View:
    """The view of the unit's first input that suits the first reader, down the graph, with a need of its own."""
    rank = len(_shape(site, unit))
    if unit.kind == "linear":
        return View(ROWS, rank)
    if unit.kind == "transpose":
        return View(CHANNELS_LAST if unit.fields["perm"] == (0, 3, 1, 2) else CHANNELS_FIRST, rank)
    if unit.kind in _AGNOSTIC and depth:
        readers = [r for t in unit.outputs for r in site.readers.get(id(t), ())]
        views = [wanted(reader, site, depth - 1) for reader in readers]
        suited = [v for v in views if v.rank == rank]
        if suited:
            return suited[0]
    return View(ROWS if rank == 2 or (rank, unit.kind) == (3, "table") else CHANNELS_FIRST, rank)


def _broadcast(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Sums and products: equal shapes, or one input of one pixel."""
    found = _alike(unit, given, site)
    if isinstance(found, str):
        return found
    a, b = (site.shapes.shape(t.name) or () for t in unit.inputs)
    if len(a) != len(b):
        return "its inputs differ in rank"
    roles = found[0][0].roles
    if any(p != q and (role in "NCR" or found[0][0].flat) for p, q, role in zip(a, b, roles, strict=True)):
        return "its inputs differ in batch, rows or channels"
    ones = [[d == 1 for d, role in zip(s, roles, strict=True) if role in "HW"] for s in (a, b)]
    if any(x != y for x, y in zip(*ones, strict=True)) and not any(all(o) for o in ones):
        return "one of its inputs is a row or a column of pixels"
    return found


def _global(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    rank, axes = len(_shape(site, unit)), unit.fields["axes"]
    view = given[0]
    if view is None:
        last = axes is not None and axes == (1, 2) and rank == 4
        view = View(CHANNELS_LAST if last else CHANNELS_FIRST, rank)
    if view.layout == ROWS or view.flat is not None or rank < 3:
        return LAYOUT
    pixels = tuple(i for i, role in enumerate(view.roles) if role in "HW")
    if (axes or tuple(range(2, rank))) != pixels:
        return "its mean is over other axes than all pixels"
    return [view], [View(view.layout, rank) if unit.fields["keep"] else View(CHANNELS_FIRST, 2)]


def _channels(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Concat and Split: on channels."""
    found = _alike(unit, given, site)
    if isinstance(found, str):
        return found
    view = found[0][0]
    if view.flat or view.roles[unit.fields["axis"] % view.rank] != "C":
        return f"{unit.node.op} of another axis than channels"
    shapes = [site.shapes.shape(t.name) or () for t in unit.inputs]
    same = [i for i, role in enumerate(view.roles) if role in "NR"]
    return found if len({tuple(s[i] for i in same) for s in shapes}) == 1 else "its inputs differ in batch or rows"


def _touches(places: Callable[[Unit], Sequence[int]], roles: str) -> Fit:
    """Slice, Pad, Resize: only axes of these roles."""

    def rule(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
        found = _alike(unit, given, site)
        if isinstance(found, str):
            return found
        view = found[0][0]
        touched = {view.roles[axis] for axis in places(unit)}
        if (touched and not view.plain) or not touched <= set(roles):
            return f"{unit.node.op} of batch or rows" if touched - {"H", "W", "C"} else f"{unit.node.op} of channels"
        return found

    return rule


def _sliced(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    found = _touches(lambda u: list(u.fields["parts"]), "CHW")(unit, given, site)
    if not isinstance(found, str):
        roles = found[0][0].roles
        if any(roles[axis] == "C" and step != 1 for axis, (_, step, _) in unit.fields["parts"].items()):
            return "Slice of every n-th channel"
    return found


def _reshape(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    """Only unit axes come and go; or an image becomes one row, for a matrix product; or its pixels one axis."""
    shape, out = _shape(site, unit), _shape(site, unit, True)
    view = given[0] or wanted(unit, site, 0)
    if view.layout == ROWS:
        return ([view], [view]) if shape == out else "Reshape of rows"
    if not view.plain or len(shape) != view.rank or len(out) < 2:
        return LAYOUT
    result = _reshaped(view, shape, out)
    if isinstance(result, View) and result.flat:
        readers = site.readers.get(id(unit.outputs[0]), [])
        whole = sum(len(t.outputs) for t in [n.outputs[0] for n in unit.outputs[0].outputs if n.outputs])
        if not readers or any(r.kind != "linear" for r in readers) or whole != len(readers):
            return "Reshape of pixels to channels that not only matrix products read"
    return result if isinstance(result, str) else ([view], [result])


def _reshaped(view: View, shape: Shape, out: Shape) -> View | str:
    sizes = {role: size for role, size in zip(view.roles, shape, strict=True)}
    batch, channels = sizes["N"], sizes["C"]
    pixels = [sizes[r] for r in "HW" if r in sizes]
    sized = all(isinstance(d, int) for d in (*shape[1:], *out[1:]))  # then the batch is what is left, known or not
    if out[0] != batch and not (sized and isinstance(out[0], str)):
        return "Reshape of the batch"
    one = all(p == 1 for p in pixels)
    if one and len(out) <= 4 and out[1] == channels and all(d == 1 for d in out[2:]):
        return View(CHANNELS_FIRST, len(out))
    if view.layout == CHANNELS_FIRST and len(out) == 2:
        static = [d for d in (channels, 1, *pixels) if isinstance(d, int)]
        if len(static) == len(pixels) + 2 and out[1] == prod(static):
            return View(CHANNELS_FIRST, 2, flat=(static[-2], static[-1]))
    if view.layout == CHANNELS_FIRST and out[1] == channels and len(out) == 3 and len(shape) == 4:
        return View(CHANNELS_FIRST, 3, merged=(pixels[0], pixels[1]) != (1, out[2]))
    if view.layout == CHANNELS_FIRST and out[1] == channels and len(shape) == 3 and out[2:] == (1, pixels[0]):
        return View(CHANNELS_FIRST, 4)
    return "Reshape of channels or pixels"


def _transposed(unit: Unit, given: Sequence[View | None], site: Site) -> Views | str:
    perm = unit.fields["perm"]
    view = given[0] or wanted(unit, site, 0)
    if view.layout == CHANNELS_FIRST and perm == (0, 2, 3, 1) and view.plain:
        return [view], [View(CHANNELS_LAST, 4)]
    if view.layout == CHANNELS_LAST and perm == (0, 3, 1, 2):
        return [view], [View(CHANNELS_FIRST, 4)]
    return "Transpose other than between NCHW and NHWC"


FITS: Mapping[str, Fit] = {
    "conv": _images,
    "linear": _linear,
    "table": _alike,
    "add": _broadcast,
    "mul": _broadcast,
    "maxpool": _images,
    "avgpool": _images,
    "globalpool": _global,
    "concat": _channels,
    "split": _channels,
    "slice": _sliced,
    "pad": _touches(lambda u: [a for a, pair in u.fields["pairs"].items() if any(pair)], "CHW"),
    "resize": _touches(lambda u: [a for a, f in enumerate(u.fields["factors"]) if f != 1], "HW"),
    "reshape": _reshape,
    "transpose": _transposed,
}
_AGNOSTIC = frozenset({"table", "add", "mul", "concat", "split", "slice", "pad", "resize"})
