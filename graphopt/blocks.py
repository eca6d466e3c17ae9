"""Residual blocks: sums x + f(x) of equal shapes, which can be x alone; f goes, and the model stays valid whatever f is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.cost import MAC_RULES
from graphopt.edit import set_input, set_inputs, set_output
from graphopt.model import Model
from graphopt.proto import subgraphs
from graphopt.shapes import ANONYMOUS, Shapes

_SIMPLIFIED = "com.microsoft::SkipSimplifiedLayerNormalization"
SUMS = frozenset({"Add", "com.microsoft::SkipLayerNormalization", _SIMPLIFIED})  # op of a node that adds its first two inputs
_LAYER_NORMALIZATION = 17  # the opset that brought it


@dataclass(frozen=True)
class Block:
    """`node` adds `kept` and what `inner` computes of it; `inner` are the nodes that nothing else needs."""

    node: gs.Node
    kept: int  # the input that stays: 0 or 1
    inner: tuple[gs.Node, ...]

    @property
    def name(self) -> str:
        return str(self.node.name)

    @property
    def source(self) -> gs.Tensor:
        """The tensor that stays."""
        return self.node.inputs[self.kept]


def find_blocks(model: Model, shapes: Shapes, reject: Callable[[gs.Node, str], None] = lambda node, reason: None) -> list[Block]:
    """The blocks of the main graph in order, those that hold others too; `reject` hears of sums that look like one and are none."""
    outputs = {id(t) for t in model.graph.outputs}
    order = {id(n): i for i, n in enumerate(model.graph.nodes)}
    readers: dict[int, set[int]] = {}  # id(tensor) -> id() of the nodes of the main graph that read it, also inside their bodies
    for node in model.graph.nodes:
        for tensor in _reads(node):
            readers.setdefault(id(tensor), set()).add(id(node))
    blocks = []
    for node in model.graph.nodes:
        if op_key(node) not in SUMS or len(node.inputs) < 2:
            continue
        found = _block(node, order, readers, outputs)
        if found is None:
            continue
        if reason := _obstacle(found, model, shapes, outputs):
            reject(node, reason)
        else:
            blocks.append(found)
    return blocks


def _reads(node: gs.Node) -> Iterator[gs.Tensor]:
    yield from node.inputs
    for body in subgraphs(node):
        for inner in body.nodes:
            yield from _reads(inner)
        yield from body.outputs


def _block(node: gs.Node, order: Mapping[int, int], readers: Mapping[int, set[int]], outputs: set[int]) -> Block | None:
    """The node as x + f(x), where f multiplies by weights; None where it is another sum."""
    for kept in (0, 1):
        x, f = node.inputs[kept], node.inputs[1 - kept]
        if isinstance(x, gs.Constant) or x is f:
            continue
        behind = _behind(f, x, order)
        if behind is None:
            continue
        inner = _only_for(node, behind, readers, outputs)
        if any(op_key(n) in MAC_RULES for n in inner):
            return Block(node, kept, tuple(inner))
    return None


def _behind(f: gs.Tensor, x: gs.Tensor, order: Mapping[int, int]) -> list[gs.Node] | None:
    """What computes f, back to where x is computed, the last node first; None where f does not depend on x."""
    first = max((order.get(id(n), -1) for n in x.inputs), default=-1)
    starts = {id(x), *(id(n.outputs[0]) for n in x.inputs if op_key(n) in SUMS)}  # what was made of a sum as it was normalised
    stack, seen, met = [f], dict[int, gs.Node](), False
    while stack:
        tensor = stack.pop()
        met |= id(tensor) in starts
        for node in tensor.inputs if id(tensor) not in starts else ():
            if id(node) not in seen and order.get(id(node), -1) > first:
                seen[id(node)] = node
                stack.extend(_reads(node))
    return sorted(seen.values(), key=lambda n: -order[id(n)]) if met else None


def _only_for(node: gs.Node, behind: list[gs.Node], readers: Mapping[int, set[int]], outputs: set[int]) -> list[gs.Node]:
    """Of the nodes behind a sum, those whose results reach nothing but it."""
    inner, ids = [], {id(node)}
    for one in behind:
        if all(id(t) not in outputs and readers.get(id(t), set()) <= ids for t in one.outputs):
            inner.append(one)
            ids.add(id(one))
    return inner[::-1]


def _obstacle(block: Block, model: Model, shapes: Shapes, outputs: set[int]) -> str:
    """Why the sum cannot become one of its terms; '' if it can."""
    node, x = block.node, block.source
    y = [t for t in node.outputs if t.name]
    if any(id(t) in outputs for t in y):
        return "the sum is an output of the model"
    if not _alike(x, y[0], shapes):
        return "the shapes of the sum and of what stays are not known to be equal"
    if shapes.dtype(x.name) is None or shapes.dtype(x.name) != shapes.dtype(y[0].name):
        return "the types of the sum and of what stays are not known to be equal"
    if op_key(node) != "Add":
        if any(t.outputs for t in node.outputs[1:3]):
            return "the statistics of the normalisation are read"
        if op_key(node) != _SIMPLIFIED and model.opset < _LAYER_NORMALIZATION:
            return "LayerNormalization needs opset 17"
    return ""


def _alike(x: gs.Tensor, y: gs.Tensor, shapes: Shapes) -> bool:
    """Whether the shapes are equal: numbers and symbols as inferred, or symbols as the exporter declared both."""
    mine, theirs = shapes.shape(x.name), shapes.shape(y.name)
    if mine is None or theirs is None or len(mine) != len(theirs):
        return False
    declared = [tuple(t.shape) if t.shape is not None and len(t.shape) == len(mine) else (None,) * len(mine) for t in (x, y)]
    named = [a == b and isinstance(a, str) and a not in ANONYMOUS for a, b in zip(*declared, strict=True)]
    dynamic = [isinstance(a, str) and isinstance(b, str) for a, b in zip(mine, theirs, strict=True)]
    return all(a == b or (d and n) for a, b, d, n in zip(mine, theirs, dynamic, named, strict=True))


@contextmanager
def bypassed(block: Block) -> Iterator[None]:
    """The model without the block, until the with block ends."""
    undo = _bypass(block)
    try:
        yield
    finally:
        undo()


def bypass_block(block: Block) -> None:
    """x + f(x) becomes x, for good; the nodes of f are left dead."""
    _bypass(block)


def _bypass(block: Block) -> Callable[[], None]:
    node, x = block.node, block.source
    if op_key(node) != "Add":
        return _normalized(node, x)
    moved = _moved(node.outputs[0], x)
    return lambda: _restore(moved, node.outputs[0])


def _moved(old: gs.Tensor, new: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Readers of `old` read `new`; which inputs those were."""
    moved = [(n, i) for n in {id(n): n for n in old.outputs}.values() for i, t in enumerate(n.inputs) if t is old]
    for node, index in moved:
        set_input(node, index, new)
    return moved


def _restore(moved: list[tuple[gs.Node, int]], old: gs.Tensor) -> None:
    for node, index in moved:
        set_input(node, index, old)


def _normalized(node: gs.Node, x: gs.Tensor) -> Callable[[], None]:
    """SkipLayerNormalization(f, x) becomes LayerNormalization(x); whoever reads the sum itself reads x."""
    before = (node.op, node.domain, dict(node.attrs), list(node.inputs), list(node.outputs))
    moved = _moved(node.outputs[3], x) if len(node.outputs) > 3 and node.outputs[3].name else []
    simplified = op_key(node) == _SIMPLIFIED
    weights = [t for t in node.inputs[2 : 3 if simplified else 4] if t.name]
    node.op, node.domain = "SimplifiedLayerNormalization" if simplified else "LayerNormalization", ""
    node.attrs = {"axis": -1, "epsilon": float(node.attrs.get("epsilon", np.float32(1e-12)))}
    set_inputs(node, [x, *weights])
    while len(node.outputs) > 1:
        set_output(node, len(node.outputs) - 1, gs.Variable.empty())
        list.pop(node.outputs)

    def undo() -> None:
        node.op, node.domain, node.attrs = before[:3]
        set_inputs(node, before[3])
        for index, tensor in enumerate(before[4][1:], 1):
            list.append(node.outputs, gs.Variable.empty())
            set_output(node, index, tensor)
        if moved:
            _restore(moved, before[4][3])

    return undo
