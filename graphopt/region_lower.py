"""Units to the steps of a plan."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.kernels import plan as p
from graphopt.region_find import Region
from graphopt.region_fuse import Draft, finish
from graphopt.region_tables import table
from graphopt.region_units import Unit
from graphopt.region_values import F, Given, Numbers, constant, turned
from graphopt.region_views import View

ELEMENT = {np.dtype(np.float32): p.FLOAT, np.dtype(np.uint8): p.UINT8, np.dtype(np.int8): p.INT8}
SAME = np.arange(256, dtype=np.uint8)


@dataclass
class Lowering:
    """One region being lowered. Tensors of the plan are numbers; `at`: of an activation in integers, by id.

    `fused`: activations whose QuantizeLinear the region takes over, by id; it then reads what that reads.
    """

    region: Region
    fused: Mapping[int, gs.Node]
    tensors: list[p.Tensor] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    scales: list[float] = field(default_factory=list)
    activations: list[gs.Tensor] = field(default_factory=list)
    constants: dict[str, Given] = field(default_factory=dict)
    at: dict[int, int] = field(default_factory=dict)
    writers: dict[int, Unit] = field(default_factory=dict)
    loaded: dict[tuple[int, View], int] = field(default_factory=dict)
    origin: dict[int, int] = field(default_factory=dict)  # tensor of the plan -> an activation with its rows or batch
    tables: dict[bytes, int] = field(default_factory=dict)
    functions: set[int] = field(default_factory=set)  # ids of the units that became tables
    results: list[gs.Tensor] = field(default_factory=list)

    def numbers(self, tensor: gs.Tensor) -> Numbers:
        return self.region.site.numbers[id(tensor)]

    def channels(self, tensor: gs.Tensor, view: View) -> int:
        """Channels of the plan's tensor."""
        shape = self.region.site.shapes.shape(tensor.name) or ()
        count = shape[view.roles.index("C")]
        assert isinstance(count, int)
        return count // (view.flat[0] * view.flat[1]) if view.flat else count

    def tensor(self, channels: int, numbers: Numbers, origin: int) -> int:
        self.tensors.append(p.Tensor(channels, numbers.zero))
        self.origin[len(self.tensors) - 1] = origin
        return len(self.tensors) - 1

    def output(self, unit: Unit, source: int, index: int = 0) -> int:
        """A new tensor of the plan for what the unit writes."""
        tensor = unit.outputs[index]
        view = self.region.fits[id(unit)][1][index]
        self.at[id(tensor)] = made = self.tensor(self.channels(tensor, view), self.numbers(tensor), self.origin[source])
        return made

    def scale(self, *values: float | np.floating) -> int:
        self.scales += [float(F(v)) for v in values]
        return len(self.scales) - len(values)

    def constant(self, given: Given) -> int:
        """The number of a constant."""
        self.constants.setdefault(given.name, given)
        return list(self.constants).index(given.name)

    def table(self, values: np.ndarray) -> int:
        """The number of a table; -1 where it changes nothing."""
        if np.array_equal(values, SAME):
            return -1
        key = values.tobytes()
        if key not in self.tables:
            made = self.region.site.names.constant(f"{self.region.name}_table", values)
            self.tables[key] = self.constant(Given(made, made.name))
        return self.tables[key]

    def add(self, kind: int, **fields: int) -> Draft:
        self.drafts.append(Draft(kind, fields))
        return self.drafts[-1]

    def input(self, unit: Unit, index: int = 0) -> int:
        """The plan's tensor of an input; loads what other nodes write."""
        tensor, view = unit.inputs[index], self.region.fits[id(unit)][0][index]
        if id(tensor) in self.at:
            return self.at[id(tensor)]
        key = (id(tensor), view)
        if key not in self.loaded:
            quantize = self.fused.get(id(tensor))
            source = tensor if quantize is None else quantize.inputs[0]
            if not any(t is source for t in self.activations):
                self.activations.append(source)
            number = next(i for i, t in enumerate(self.activations) if t is source)
            own = self.numbers(tensor)
            made = self.tensor(self.channels(tensor, view), own, number)
            fields = {"index": number, "out": made, "layout": view.layout, "rank": view.rank}
            if quantize is not None:
                self.add(p.INPUT, type=p.FLOAT, x_scale=self.scale(own.scale), **fields)
            else:
                self.add(p.INPUT, type=p.INT8 if own.signed else p.UINT8, **fields)
            self.loaded[key] = made
        return self.loaded[key]

    def bounds(self, unit: Unit) -> dict[str, int]:
        """The Relu or Clip behind it, in integers: quantising keeps order, so it may come first."""
        low, high = (self.numbers(unit.outputs[0]).quantise(b) for b in unit.bounds)
        return {"low": low, "high": high}

    def result(self, tensor: gs.Tensor) -> int:
        self.results.append(tensor)
        return len(self.results) - 1

    def give(self, tensor: gs.Tensor, view: View, dequantized: gs.Tensor | None) -> None:
        """An output of the node: the activation in integers, or in floats."""
        x, own = self.at[id(tensor)], self.numbers(tensor)
        fields = {"x": x, "layout": view.layout, "rank": view.rank, "like": self.origin[x] if view.layout == p.ROWS else -1}
        if dequantized is None:
            kind = p.INT8 if own.signed else p.UINT8
            self.add(p.OUTPUT, index=self.result(tensor), type=kind, **fields)
        else:
            self.add(p.OUTPUT, index=self.result(dequantized), type=p.FLOAT, x_scale=self.scale(own.scale), **fields)

    def plan(self, body: Collection[str]) -> tuple[p.Plan, list[Given]]:
        """The finished plan (sums fused into convolutions, unread steps left out) and its constants, those `body` reads too."""
        held = [name in body for name in self.constants]
        counts = (len(self.activations), len(self.results))
        plan, left = finish(self.drafts, self.tensors, self.scales, counts, held)
        given = list(self.constants.values())
        return plan, [given[i] for i in left]

    def root(self, unit: Unit) -> tuple[gs.Tensor, list[Unit]] | None:
        """The one activation that the unit is a function of, element by element, and the units in between; else None."""
        chain: dict[int, Unit] = {id(unit): unit}
        ends: dict[int, gs.Tensor] = {}
        stack = list(unit.inputs)
        while stack:
            tensor = stack.pop()
            writer = self.writers.get(id(tensor))
            if writer is not None and id(writer) in self.functions:
                chain[id(writer)] = writer
                stack += writer.inputs
            else:
                ends[id(tensor)] = tensor
        return (next(iter(ends.values())), list(chain.values())) if len(ends) == 1 else None


Lower = Callable[[Lowering, Unit], None]


def lower(work: Lowering) -> None:
    """Append the steps of all units."""
    for unit in work.region.units:
        LOWERINGS[unit.kind](work, unit)
        work.writers.update((id(t), unit) for t in unit.outputs)


def _conv(work: Lowering, unit: Unit) -> None:
    x = work.input(unit)
    fields, w = dict(unit.fields), unit.weight
    assert w is not None
    given, flat = w.given, work.region.fits[id(unit)][0][0].flat
    if flat:
        fields |= {"kh": flat[0], "kw": flat[1]}
        if fields["order"] == p.KN:
            given, fields["order"] = turned(given, w.values, work.region.site.names)[0], p.OIHW
    fields |= {"x": x, "weight": work.constant(given), "weight_scale": work.constant(Given(w.scale, w.scale.name))}
    own = work.numbers(unit.inputs[0])
    real = _real_bias(work, unit)
    if unit.bias is not None and real is None:
        fields["bias"] = work.constant(unit.bias.given)
    if real is not None:
        fields["float_bias"] = work.constant(Given(real, real.name))
    if unit.real:
        rank = len(work.region.site.shapes.shape(unit.outputs[0].name) or ())
        fields |= {"scale": work.scale(own.scale), "rank": rank, "like": work.origin[x], "index": work.result(unit.outputs[0])}
    else:
        to = work.numbers(unit.outputs[0])
        fields |= {"scale": work.scale(own.scale, to.scale), "mid_zero": to.zero, **work.bounds(unit), "out": work.output(unit, x)}
    work.add(p.CONV, **fields)


def _real_bias(work: Lowering, unit: Unit) -> gs.Constant | None:
    """What is added in float: only to float outputs, where the bias is float, or stands behind a MatMul that stays one.

    onnxruntime makes a Gemm of MatMul and Add over two axes; over more it is MatMulIntegerToFloat, whose bias is float.
    """
    if unit.bias is None or not unit.real:
        return None
    node = unit.bias.dequantize
    if node is None:
        return unit.bias.real
    value = constant(node.outputs[0])
    if unit.node.op != "MatMul" or value is None or work.region.site.shapes.rank(unit.outputs[0].name) == 2:
        return None
    return work.region.site.names.constant(f"{unit.bias.given.tensor.name}_float", value.ravel())


def _table(work: Lowering, unit: Unit) -> None:
    found = work.root(unit)
    assert found is not None  # a unit of one input
    _by_table(work, unit, *found)


def _by_table(work: Lowering, unit: Unit, source: gs.Tensor, chain: list[Unit]) -> None:
    site = work.region.site
    work.functions.add(id(unit))
    nodes = {id(n): n for u in chain for n in (*u.nodes, *u.helpers)}
    ordered = [n for n in work.region.graph.nodes if id(n) in nodes]
    own, to = work.numbers(source), work.numbers(unit.outputs[0])
    if [n.op for n in ordered] == ["DequantizeLinear", "QuantizeLinear"]:
        values = own.table(to)
    else:
        rank = site.shapes.rank(source.name) or 1
        values = table(site.model, ordered, source, rank, signed=own.signed, result=unit.outputs[0])
    first = next(u for u in chain if any(t is source for t in u.inputs))
    x = work.input(first, next(i for i, t in enumerate(first.inputs) if t is source))
    number = work.table(values)
    if number < 0 and own.zero == to.zero:
        work.at[id(unit.outputs[0])] = x
        return
    work.add(p.COPY, x=x, out=work.output(unit, x), table=number, count=work.tensors[x].channels)


def sum_scales(first: Numbers, second: Numbers, out: Numbers) -> tuple[np.float32, np.float32, np.float32]:
    """ra, rb, fx of a sum whose x is the operator's second input and y its first, as onnxruntime's MLAS adds and rounds them:

    fma(first, r1, fma(second, r2, zero - fma(r1, z1, r2 * z2))). Other orders differ in a few of a million pairs.
    """
    r1, r2 = F(first.scale) / F(out.scale), F(second.scale) / F(out.scale)
    offset = F(np.float64(r1) * first.zero + np.float64(r2 * F(second.zero)))
    return r2, r1, F(out.zero) - offset


def _sum(work: Lowering, unit: Unit) -> None:
    found = work.root(unit)
    if found is not None:
        return _by_table(work, unit, *found)
    y, x = work.input(unit, 0), work.input(unit, 1)  # onnxruntime adds the second input first; the step adds x first
    first, second, out = (work.numbers(t) for t in (*unit.inputs, unit.outputs[0]))
    ra, rb, fx = sum_scales(first, second, out)
    fields = {"x": x, "y": y, "op": p.ADD, "scale": work.scale(ra, rb, fx), **work.bounds(unit), "out": work.output(unit, x)}
    work.add(p.BINARY, **fields).same = _one_pixel(work, unit, 0) == _one_pixel(work, unit, 1)


def _one_pixel(work: Lowering, unit: Unit, index: int) -> bool:
    view, shape = work.region.fits[id(unit)][0][index], work.region.site.shapes.shape(unit.inputs[index].name) or ()
    return all(d == 1 for d, role in zip(shape, view.roles, strict=True) if role in "HW")


def _product(work: Lowering, unit: Unit) -> None:
    found = work.root(unit)
    if found is not None:
        return _by_table(work, unit, *found)
    x, y = work.input(unit, 0), work.input(unit, 1)
    a, b, c = (work.numbers(t) for t in (*unit.inputs, unit.outputs[0]))
    ratio = F(a.scale) * F(b.scale) / F(c.scale)
    work.add(p.BINARY, x=x, y=y, op=p.MUL, scale=work.scale(ratio), **work.bounds(unit), out=work.output(unit, x))


def _max_pool(work: Lowering, unit: Unit) -> None:
    x, own, to = work.input(unit), work.numbers(unit.inputs[0]), work.numbers(unit.outputs[0])
    if own == to:
        work.add(p.POOL, x=x, op=p.MAX_POOL, **unit.fields, out=work.output(unit, x))
        return
    pooled = work.tensor(work.tensors[x].channels, own, work.origin[x])
    work.add(p.POOL, x=x, op=p.MAX_POOL, **unit.fields, out=pooled)
    work.add(p.COPY, x=pooled, out=work.output(unit, x), table=work.table(own.table(to)), count=work.tensors[x].channels)


def _average_pool(work: Lowering, unit: Unit) -> None:
    x, sx, sy = work.input(unit), work.numbers(unit.inputs[0]).scale, work.numbers(unit.outputs[0]).scale
    work.add(p.POOL, x=x, op=p.AVERAGE_POOL, **unit.fields, scale=work.scale(sx, sy), out=work.output(unit, x))


def _global_pool(work: Lowering, unit: Unit) -> None:
    x, sx, sy = work.input(unit), work.numbers(unit.inputs[0]).scale, work.numbers(unit.outputs[0]).scale
    work.add(p.POOL, x=x, op=p.GLOBAL_POOL, scale=work.scale(sx, sy), out=work.output(unit, x))


def _requantised(work: Lowering, unit: Unit, index: int = 0, output: int = 0) -> int:
    return work.table(work.numbers(unit.inputs[index]).table(work.numbers(unit.outputs[output])))


def _concat(work: Lowering, unit: Unit) -> None:
    parts = [work.input(unit, i) for i in range(len(unit.inputs))]
    out, offset = work.output(unit, parts[0]), 0
    for index, x in enumerate(parts):
        count = work.tensors[x].channels
        work.add(p.COPY, x=x, out=out, table=_requantised(work, unit, index), count=count, offset=offset)
        offset += count


def _split(work: Lowering, unit: Unit) -> None:
    x, start = work.input(unit), 0
    for index, count in enumerate(unit.fields["sizes"]):
        work.add(p.COPY, x=x, out=work.output(unit, x, index), table=_requantised(work, unit, 0, index), c0=start, count=count)
        start += count


_SPAN = {"H": ("h0", "hs", "hn"), "W": ("w0", "ws", "wn")}


def _slice(work: Lowering, unit: Unit) -> None:
    x, roles = work.input(unit), work.region.fits[id(unit)][0][0].roles
    fields = {"count": work.tensors[x].channels}
    for axis, part in unit.fields["parts"].items():
        if roles[axis] == "C":
            fields |= {"c0": part[0], "count": part[2]}
        else:
            fields |= dict(zip(_SPAN[roles[axis]], part, strict=True))
    work.add(p.COPY, x=x, out=work.output(unit, x), table=_requantised(work, unit), **fields)


_PADS = {"H": ("pt", "pb"), "W": ("pl", "pr")}


def _pad(work: Lowering, unit: Unit) -> None:
    x, roles = work.input(unit), work.region.fits[id(unit)][0][0].roles
    fields = {"count": work.tensors[x].channels, "fill": 1}
    for axis, pair in unit.fields["pairs"].items():
        if roles[axis] == "C":
            fields["offset"] = pair[0]
        elif roles[axis] in _PADS:
            fields |= dict(zip(_PADS[roles[axis]], pair, strict=True))
    work.add(p.COPY, x=x, out=work.output(unit, x), table=_requantised(work, unit), **fields)


def _resize(work: Lowering, unit: Unit) -> None:
    x, roles = work.input(unit), work.region.fits[id(unit)][0][0].roles
    factors = {{"H": "rh", "W": "rw"}[r]: f for r, f in zip(roles, unit.fields["factors"], strict=True) if r in "HW"}
    work.add(p.COPY, x=x, out=work.output(unit, x), table=_requantised(work, unit), count=work.tensors[x].channels, **factors)


def _view(work: Lowering, unit: Unit) -> None:
    """No step where the numbers are the same: only the axes are called otherwise."""
    x = work.input(unit)
    if work.numbers(unit.inputs[0]) == work.numbers(unit.outputs[0]):
        work.at[id(unit.outputs[0])] = x
    else:
        work.add(p.COPY, x=x, out=work.output(unit, x), table=_requantised(work, unit), count=work.tensors[x].channels)


LOWERINGS: Mapping[str, Lower] = {
    "conv": _conv,
    "linear": _conv,
    "table": _table,
    "add": _sum,
    "mul": _product,
    "maxpool": _max_pool,
    "avgpool": _average_pool,
    "globalpool": _global_pool,
    "concat": _concat,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "resize": _resize,
    "reshape": _view,
    "transpose": _view,
}
