"""Operators that store a size or a position of an axis: what they must store after removal. A table by op type.

Whatever reads sizes at run time (Shape) goes on seeing those from before the removal, so that arithmetic on them means what it
meant; only where a size is used as the size of an axis that shrinks is it replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.dim_labels import Dims
from graphopt.dim_rules import looks_elsewhere
from graphopt.edit import constant_value, replace_uses, set_input
from graphopt.model import Model
from graphopt.operands import Names, has_input, operand, set_operand
from graphopt.shapes import Shape


@dataclass
class Cut:
    """What a removal does to the axes; `kept` has only tensors and axes that lose indices."""

    model: Model
    dims: Dims
    kept: Mapping[str, Mapping[int, np.ndarray]]
    names: Names = field(init=False)
    _added: list[tuple[gs.Node, gs.Node]] = field(default_factory=list)  # new node, and one in the same graph

    def __post_init__(self) -> None:
        self.names = Names(self.model)

    def sizes(self, tensor: gs.Tensor) -> dict[int, int]:
        """New sizes of the axes that shrink and whose size is a number."""
        shape = self.shape(tensor)
        return {axis: int(mask.sum()) for axis, mask in self.kept.get(tensor.name, {}).items() if isinstance(shape[axis], int)}

    def scales(self, tensor: gs.Tensor) -> dict[int, tuple[int, int]]:
        """Of the dynamic axes that shrink, how many of how many indices stay: of 12*batch, say 9 of every 12."""
        shape = self.shape(tensor)
        shrunk = self.kept.get(tensor.name, {}).items()
        return {axis: (int(mask.sum()), mask.size) for axis, mask in shrunk if not isinstance(shape[axis], int)}

    def shape(self, tensor: gs.Tensor) -> Shape:
        """The shape before."""
        return self.dims.shapes.shape(tensor.name) or tuple(tensor.shape or ())

    def ints(self, node: gs.Node, name: str, index: int) -> list[int] | None:
        """A parameter by attribute or input; the rules have made sure that what matters here is known."""
        found = operand(node, name, index).integers()
        if found is None and has_input(node, index):
            found = [v for v in self.dims.shapes.value(node.inputs[index].name) or () if isinstance(v, int)]
        return found

    def corrected(self, sizes: gs.Tensor, new: Mapping[int, int], beside: gs.Node) -> gs.Tensor:
        """A 1-D tensor of sizes with some of them replaced: a constant, or a Where on what is computed."""
        values = constant_value(sizes)
        if values is not None:
            values = values.copy()
            values[list(new)] = list(new.values())
            return self.names.constant(sizes.name, values)
        length = int(self.shape(sizes)[0] or 0)
        mask, replaced = np.zeros(length, bool), np.zeros(length, np.int64)
        mask[list(new)], replaced[list(new)] = True, list(new.values())
        result = gs.Variable(self.names.fresh(sizes.name), np.dtype(np.int64), [len(mask)])
        inputs = [self.names.constant(f"{result.name}_mask", mask), self.names.constant(f"{result.name}_new", replaced), sizes]
        self._added.append((gs.Node("Where", self.names.fresh(f"{beside.name}_sizes"), {}, inputs, [result]), beside))
        return result

    def scaled(self, sizes: gs.Tensor, scales: Mapping[int, tuple[int, int]], beside: gs.Node) -> gs.Tensor:
        """A computed 1-D tensor of sizes with some of them multiplied by a fraction, which comes out exactly."""
        length = int(self.shape(sizes)[0] or 0)
        for op, part in (("Mul", 0), ("Div", 1)):
            factors = np.array([scales[i][part] if i in scales else 1 for i in range(length)], np.int64)
            result = gs.Variable(self.names.fresh(sizes.name), np.dtype(np.int64), [length])
            inputs = [sizes, self.names.constant(f"{result.name}_{op.lower()}", factors)]
            self._added.append((gs.Node(op, self.names.fresh(f"{beside.name}_sizes"), {}, inputs, [result]), beside))
            sizes = result
        return sizes

    def insert(self) -> int:
        """Put the nodes made by `corrected` and `scaled` into their graphs."""
        home = {id(node): graph for graph in self.model.graphs() for node in graph.nodes} if self._added else {}
        for node, beside in self._added:
            home[id(beside)].nodes.append(node)
        return len(self._added)


Repair = Callable[[gs.Node, Cut], None]


def _conv(node: gs.Node, cut: Cut) -> None:
    """A depthwise convolution has as many groups as channels."""
    channels, mask = cut.shape(node.inputs[1]), cut.kept.get(node.inputs[0].name, {}).get(1)
    depthwise = channels[1] == 1 if node.op == "Conv" else channels[0] == node.attrs.get("group", 1)
    if mask is not None and depthwise and node.attrs.get("group", 1) > 1:
        node.attrs["group"] = int(mask.sum())


def _target(index: int) -> Repair:
    """The whole shape of the output is an input."""

    def repair(node: gs.Node, cut: Cut) -> None:
        new, y = cut.sizes(node.outputs[0]), node.outputs[0]
        if not (new or cut.scales(y)) or not has_input(node, index):
            return
        sizes = _by_position(node, cut, new) if node.op == "Reshape" and constant_value(node.inputs[index]) is None else None
        if sizes is not None:
            set_input(node, index, cut.names.constant(node.inputs[index].name, np.array(sizes, np.int64)))
            return
        if node.op == "Reshape":  # a 0 there would copy the new size of an input axis that is not this axis
            fixed = {i: size for i, size in enumerate(cut.shape(y)) if i in cut.sizes(node.inputs[0]) and isinstance(size, int)}
            new = {**fixed, **new}
        offset = len(cut.shape(y)) - int(cut.shape(node.inputs[index])[0] or 0)  # Expand aligns to the right
        values = cut.dims.shapes.value(node.inputs[index].name) or ()  # numbers here are no sizes: 0 copies, -1 is what is left
        scales = {a - offset: s for a, s in cut.scales(y).items() if a >= offset and isinstance(values[a - offset], str)}
        if scales:
            set_input(node, index, cut.scaled(node.inputs[index], scales, node))
        new = {axis - offset: size for axis, size in new.items() if axis >= offset}
        if new:
            set_input(node, index, cut.corrected(node.inputs[index], new, node))

    return repair


def _by_position(node: gs.Node, cut: Cut, new: Mapping[int, int]) -> list[int] | None:
    """A constant target for a Reshape whose target is computed: 0 copies an axis of the input, one size may be left open."""
    source, target = cut.shape(node.inputs[0]), cut.shape(node.outputs[0])
    if node.attrs.get("allowzero"):
        return None
    sizes: list[int] = []
    for axis, size in enumerate(target):
        same = axis < len(source) and source[axis] == size
        sizes.append(new[axis] if axis in new else size if isinstance(size, int) else 0 if same else -1)
    return sizes if sizes.count(-1) <= 1 and 0 not in target else None


def _split(node: gs.Node, cut: Cut) -> None:
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    if axis in cut.sizes(node.inputs[0]):
        sizes = [cut.sizes(t).get(axis, cut.shape(t)[axis]) for t in node.outputs]
        node.attrs.pop("num_outputs", None)
        set_operand(node, "split", 1, [int(s or 0) for s in sizes], cut.model.opset, cut.names)


def _slice(node: gs.Node, cut: Cut) -> None:
    kept, shape = cut.kept.get(node.inputs[0].name, {}), cut.shape(node.inputs[0])
    starts, ends = cut.ints(node, "starts", 1) or [], cut.ints(node, "ends", 2) or []
    axes = cut.ints(node, "axes", 3) or list(range(len(starts)))
    touched = [i for i, axis in enumerate(axes) if axis % len(shape) in kept]
    for i in touched:
        mask = kept[axes[i] % len(shape)]
        first, last, _ = slice(starts[i], ends[i]).indices(mask.size)
        starts[i] = int(mask[:first].sum())
        ends[i] = starts[i] + int(mask[first:last].sum())
    for name, index, values in (("starts", 1, starts), ("ends", 2, ends)) if touched else ():
        if has_input(node, index):
            dtype = cut.dims.shapes.dtype(node.inputs[index].name)  # that of the axes too
            set_input(node, index, cut.names.constant(node.inputs[index].name, np.array(values, dtype)))
        else:
            node.attrs[name] = values


def _gather(node: gs.Node, cut: Cut) -> None:
    axis = int(node.attrs.get("axis", 0)) % len(cut.shape(node.inputs[0]))
    mask, indices = cut.kept.get(node.inputs[0].name, {}).get(axis), constant_value(node.inputs[1])
    if mask is not None and indices is not None:
        picked = indices % mask.size
        moved = (np.cumsum(mask) - 1)[picked[mask[picked]]].astype(indices.dtype)
        set_input(node, 1, cut.names.constant(node.inputs[1].name, moved))


def _pad(node: gs.Node, cut: Cut) -> None:
    rank = len(cut.shape(node.inputs[0]))
    pads, axes = cut.ints(node, "pads", 1) or [], cut.ints(node, "axes", 3) or list(range(rank))
    count, changed = len(axes), False
    for i, axis in enumerate(a % rank for a in axes):
        mask = cut.kept.get(node.outputs[0].name, {}).get(axis)
        if mask is not None and (pads[i] or pads[i + count]):
            before, after = int(mask[: pads[i]].sum()), int(mask[mask.size - pads[i + count] :].sum())
            changed |= (before, after) != (pads[i], pads[i + count])
            pads[i], pads[i + count] = before, after
    if changed:
        set_operand(node, "pads", 1, pads, cut.model.opset, cut.names)


def _recurrent(node: gs.Node, cut: Cut) -> None:
    node.attrs["hidden_size"] = cut.sizes(node.inputs[2]).get(2, node.attrs["hidden_size"])


def _count(node: gs.Node, cut: Cut, name: str, index: int) -> None:
    """An attribute that counts the heads of an input: [batch, length, heads * width], or the heads are an axis of their own."""
    tensor, heads = node.inputs[index], int(node.attrs.get(name, 0))
    shape, new = cut.shape(tensor), cut.sizes(tensor)
    axis = {3: 2, 4: 1, 5: 2}.get(len(shape), 0)
    size = shape[axis] if shape else 0
    if heads and axis in new and isinstance(size, int):
        node.attrs[name] = new[axis] * heads // size


def _heads(**counted: int) -> Repair:
    """Attributes, and the inputs whose heads they count."""

    def repair(node: gs.Node, cut: Cut) -> None:
        for name, index in counted.items():
            if has_input(node, index):
                _count(node, cut, name, index)

    return repair


def _packed_attention(node: gs.Node, cut: Cut) -> None:
    """The columns of the weights are queries, keys and values side by side."""
    mask, heads = cut.kept.get(node.inputs[1].name, {}).get(1), int(node.attrs["num_heads"])
    if mask is not None:
        old = node.attrs.get("qkv_hidden_sizes") or [mask.size // 3] * 3
        new = [int(part.sum()) for part in np.split(mask, np.cumsum(old)[:2])]
        node.attrs["num_heads"] = new[0] * heads // old[0]
        if "qkv_hidden_sizes" in node.attrs or len(set(new)) > 1:
            node.attrs["qkv_hidden_sizes"] = new


def _group_query_attention(node: gs.Node, cut: Cut) -> None:
    """Queries, keys and values may lie side by side in one input."""
    if has_input(node, 1):
        _heads(num_heads=0, kv_num_heads=1)(node, cut)
        return
    mask, many, few = cut.kept.get(node.inputs[0].name, {}).get(2), int(node.attrs["num_heads"]), int(node.attrs["kv_num_heads"])
    if mask is not None:
        width = mask.size // (many + 2 * few)
        queries, keys, _ = np.split(mask, [many * width, (many + few) * width])
        node.attrs["num_heads"], node.attrs["kv_num_heads"] = int(queries.sum()) // width, int(keys.sum()) // width


def _shape(node: gs.Node, cut: Cut) -> None:
    """Readers see the sizes from before; those that only look at axes that do not change go on reading the Shape itself."""
    shape = cut.shape(node.inputs[0])
    read = list(range(len(shape)))[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
    old = {i: size for i, axis in enumerate(read) if axis in cut.sizes(node.inputs[0]) and isinstance(size := shape[axis], int)}
    y, readers = node.outputs[0], list({id(n): n for n in node.outputs[0].outputs}.values())
    touched = [reader for reader in readers if not looks_elsewhere(reader, old, len(read))]
    if not old or not touched:
        return
    known = [shape[axis] for axis in read]
    if all(isinstance(size, int) for size in known):
        replace_uses(y, cut.names.constant(y.name, np.array(known, np.int64)))
        return
    corrected = cut.corrected(y, old, node)
    for reader in touched:
        for index in [i for i, tensor in enumerate(reader.inputs) if tensor is y]:
            set_input(reader, index, corrected)


REPAIR: dict[str, Repair] = {
    "Attention": _heads(q_num_heads=0, kv_num_heads=1),
    "Conv": _conv,
    "ConvTranspose": _conv,
    "ConstantOfShape": _target(0),
    "Expand": _target(1),
    "GRU": _recurrent,
    "Gather": _gather,
    "LSTM": _recurrent,
    "Pad": _pad,
    "RNN": _recurrent,
    "Reshape": _target(1),
    "Resize": _target(3),
    "RotaryEmbedding": _heads(num_heads=0),
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "com.microsoft::Attention": _packed_attention,
    "com.microsoft::FusedConv": _conv,
    "com.microsoft::GroupQueryAttention": _group_query_attention,
    "com.microsoft::MultiHeadAttention": _heads(num_heads=0),
    "com.microsoft::RotaryEmbedding": _heads(num_heads=0),
}
