"""Gradients without labels: how the outputs of a model depend on tensors inside it, over calibration rows.

The backward pass is ONNX nodes appended to the model (`graphopt.vjp`), so that one onnxruntime session runs both, and what comes
out is one number a row and channel. Where an op has no rule the gradient stops, and all that lies upstream of it counts as unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnx.inliner
import onnx.shape_inference
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper

from graphopt import vjp_rules, vjp_rules_layout, vjp_rules_linear  # noqa: F401 (they fill the table)
from graphopt.agreement import token_mask, with_outputs
from graphopt.attributes import attribute, op_key
from graphopt.context import Context
from graphopt.errors import DataError, ModelError, PassError
from graphopt.feeds import Feed, fixed_batch, padded, row_count
from graphopt.model import Model, from_proto
from graphopt.nominal import bind
from graphopt.opset import raise_opset
from graphopt.proto import subgraphs, walk
from graphopt.runtime import run, session
from graphopt.shapes import Shape, Shapes, shapes
from graphopt.vjp import OPSET, VJP_RULES, Tape, Vjp, VjpError, wanted

Scalar = Literal["projections", "likelihood"]
BUDGET = 256 << 20  # bytes of activations and gradients that a run may hold, roughly
MAX_BATCH = 32
View = Callable[[Feed], Feed]
_MALFORMED = (ArithmeticError, LookupError, ModelError, TypeError, ValueError)  # what rules meet in damaged nodes


def same(feed: Feed) -> Feed:
    """The view that changes nothing."""
    return feed


class Spot(NamedTuple):
    """Channels of a tensor of the main graph: an axis of it.

    With `node`, the gradient is only what comes through input `input` of the node whose first output has that name.
    """

    tensor: str
    axis: int
    node: str = ""
    input: int = -1


@dataclass(frozen=True)
class Head:
    """A tensor whose values are what the model says: an output, or what goes into the Softmax that makes it.

    `classes` is the axis of its classes, None where it is no classifier.
    """

    tensor: str
    classes: int | None


@dataclass(frozen=True)
class Stop:
    """A node that the gradient could not pass, and why."""

    node: str
    op: str
    why: str


@dataclass(frozen=True)
class Backward:
    """Names of gradients, by tensor and by (first output of a node, input)."""

    tensors: Mapping[str, str]
    reads: Mapping[tuple[str, int], str]
    stops: tuple[Stop, ...]


def heads(model: Model, known: Shapes) -> list[Head]:
    """One for each float output. A classifier ends in Softmax or LogSoftmax, or in a product of rank 2 (a bias may follow)."""
    found = {}
    for tensor in model.graph.outputs:
        dtype, shape = known.dtype(tensor.name), known.shape(tensor.name)
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or shape is None or dtype is None or dtype.kind != "f":
            continue
        if op_key(node) in ("Softmax", "LogSoftmax"):
            found[node.inputs[0].name] = Head(node.inputs[0].name, int(attribute(node, "axis", model.opset)) % len(shape))
        else:
            found.setdefault(tensor.name, Head(tensor.name, 1 if _logits(node, shape) else None))
    return list(found.values())


def _logits(node: gs.Node, shape: Shape) -> bool:
    if op_key(node) == "Add":
        node = next((t.inputs[0] for t in node.inputs if t.inputs), node)
    return op_key(node) in ("Gemm", "MatMul") and len(shape) == 2 and shape[1] != 1


def backward(model: Model, known: Shapes, tape: Tape, seeds: Mapping[str, str], targets: Collection[str]) -> Backward:
    """Append to the tape the gradient of a scalar with respect to the targets; `seeds` is its gradient at the heads."""
    among = _reached(model, known, targets)
    terms: dict[str, list[str]] = {name: [seed] for name, seed in seeds.items()}
    unknown, stops, reads = set[str](), list[Stop](), dict[tuple[str, int], str]()
    for node in reversed(model.graph.nodes):
        outputs = [t.name for t in node.outputs]
        inside = {n for n in _captured(node) if n in among}
        if not inside and not any(wanted(t.name, among, known) for t in node.inputs):
            continue
        if not any(n in terms or n in unknown for n in outputs):
            continue
        grads = tuple(tape.add(terms[n]) if n in terms else None for n in outputs)
        terms.update({n: [g] for n, g in zip(outputs, grads, strict=True) if g is not None})
        found = None if unknown.intersection(outputs) else _products(Vjp(node, tape, known, among, grads), stops)
        if found is None:
            unknown |= inside | {t.name for t in node.inputs if t.name}
            continue
        for index, g in enumerate(found):
            if g is not None and wanted(node.inputs[index].name, among, known):
                terms.setdefault(node.inputs[index].name, []).append(g)
                reads[outputs[0], index] = g
    whole = {name: tape.add(terms[name]) for name in targets if name in terms and name not in unknown}
    return Backward(whole, reads, tuple(reversed(stops)))


def _products(site: Vjp, stops: list[Stop]) -> Sequence[str | None] | None:
    """What the rule gives; None where it gives nothing, and why goes to `stops`."""
    node = site.node
    rule = VJP_RULES.get(op_key(node))
    try:
        if rule is None or subgraphs(node):
            raise VjpError("the op has no rule")
        return rule(site)
    except (VjpError, *_MALFORMED) as error:
        why = str(error) if isinstance(error, VjpError) else "it is not as its rule expects"
        stops.append(Stop(node.name, op_key(node), why))
        return None


def _reached(model: Model, known: Shapes, targets: Collection[str]) -> set[str]:
    """The targets, and all that is computed from them by way of floats."""
    among = set(targets)
    for node in model.graph.nodes:
        if any(wanted(t.name, among, known) for t in node.inputs) or among.intersection(_captured(node)):
            among.update(t.name for t in node.outputs if t.name)
    return among


def _captured(node: gs.Node) -> set[str]:
    """What the node's bodies read, from outside or not."""
    return {t.name for body in subgraphs(node) for g in walk(body) for n in g.nodes for t in (*n.inputs, *g.outputs)}


# ---- a program: the model with its backward pass, ready to run


@dataclass(frozen=True, eq=False)
class Sums:
    """Of one batch and draw: `projections` of the heads, by tensor, and by spot a float64 array [4, rows, channels].

    They hold, over all positions of a row, the sums of y g, g and g^2, and how many there are. Where rows cannot be told apart, the
    batch counts as one. Of the rows of `feed`, which may be padded, the first `rows` count.
    """

    first: int  # rows before the batch
    feed: Feed
    rows: int
    projections: Mapping[str, np.ndarray]
    spots: Mapping[Spot, np.ndarray]


@dataclass(frozen=True, eq=False)
class Program:
    """Runs forward and backward. `spots`: those whose gradient is known; `stops`: why others are not."""

    spots: tuple[Spot, ...]
    stops: tuple[Stop, ...]
    _model: Model
    _known: Shapes
    _context: Context
    _heads: tuple[Head, ...]
    _proto: onnx.ModelProto
    _fed: tuple[tuple[str, Head], ...]  # inputs that take projections
    _seed: tuple[int, ...]

    def sums(self, draws: int = 2, weights: Mapping[str, float] = MappingProxyType({}), view: View = same) -> Iterator[Sums]:
        """For each batch of calibration rows, draw by draw. Memory is that of a batch. DataError where a gradient is not finite.

        `weights`: factors of heads' projections. `view`: what is made of each feed first. A classifier of
        no more classes than draws is projected to its classes, one by one.
        """
        data, names = self._context.calibration, [f"gradient of {i}" for i in range(len(self.spots))]
        if data is None or not self.spots:
            return
        runner, sizes, done = session(self._proto), _Sizes(self._model, self._known, self._heads), 0
        draws = draws if self._fed else 1
        random = [[np.random.default_rng([*self._seed, draw, i]) for i in range(len(self._fed))] for draw in range(draws)]
        fixed = fixed_batch(data.inputs)
        for number, feed in enumerate(data.batches(_batch(self._model, self._known, next(iter(data.batches(1)))))):
            rows = row_count(feed) or 1
            whole = view(padded(feed, fixed) if fixed else feed)
            places = sizes.of(whole) if self._fed else {}
            for draw in range(min(draws, self._classes(places) or draws)):
                drawn = {}
                for r, (_, head) in zip(random[draw], self._fed, strict=True):
                    one = draw if draws >= (self._classes(places) or draws + 1) else None
                    signs = _projection(r, places[head.tensor], head, self._dtype(head), one)
                    drawn[head.tensor] = _counting(whole, signs * signs.dtype.type(weights.get(head.tensor, 1.0)))
                fed = {name: drawn[head.tensor] for name, head in self._fed}
                found = dict(zip(self.spots, run(runner, {**whole, **fed}, names), strict=True))
                for spot, values in found.items():
                    if not np.isfinite(values).all():
                        raise DataError(f"data {data.where}: batch {number} makes the gradient of '{spot.tensor}' NaN or infinite")
                sums = {spot: _by_row(values, row_count(whole) or 1, rows) for spot, values in found.items()}
                yield Sums(done, whole, rows, drawn, sums)
            done += rows
            self._context.progress("measure gradients", done, data.rows or done)

    def _classes(self, places: Mapping[str, tuple[int, ...]]) -> int | None:
        """Of the only head that takes projections, where it has one class a row."""
        if len(self._fed) != 1 or self._fed[0][1].classes != 1 or len(places[self._fed[0][1].tensor]) != 2:
            return None
        return places[self._fed[0][1].tensor][1]

    def _dtype(self, head: Head) -> np.dtype:
        return self._known.dtype(head.tensor) or np.dtype(np.float32)


def program(model: Model, context: Context, spots: Collection[Spot], *, scalar: Scalar = "projections", seed: int = 0) -> Program:
    """The backward pass from the model's own outputs to the spots; spots of which no gradient is known are left out.

    `projections`: the outputs times random signs, drawn anew for each row and draw; for classifiers the logits, centred. The mean
    of squares of such gradients is the Gauss-Newton matrix's diagonal. `likelihood`: for classifiers the logarithm of the
    probability of the class the model predicts, and projections for other outputs. Several outputs are added.
    PassError without data; ModelError where the opset is too old and cannot be raised.
    """
    if context.calibration is None:
        raise PassError("prune", "calibration data is needed: give --calib PATH (or calibration=...)")
    model, known = prepared(model, context)
    proto = model.proto()
    tape = Tape(set(model.tensors()) | {n.name for n in model.nodes()}, model.opset)
    top, seeds, fed = heads(model, known), dict[str, str](), list[tuple[str, Head]]()
    for head in top:
        seeds[head.tensor] = name = tape.fresh()
        if scalar == "likelihood" and head.classes is not None:
            right, p = (tape.op(kind, head.tensor, axis=head.classes) for kind in ("Hardmax", "Softmax"))
            seeds[head.tensor] = tape.op("Sub", right, p)
        else:
            fed.append((name, head))
            kind = helper.np_dtype_to_tensor_dtype(known.dtypes[head.tensor])
            proto.graph.input.append(helper.make_tensor_value_info(name, kind, [None] * len(known.shapes[head.tensor])))
    found = backward(model, known, tape, seeds, {s.tensor for s in spots})
    del proto.graph.output[:]
    kept, first = list[Spot](), _first_dim(model, known)
    for spot in dict.fromkeys(spots):
        g = found.reads.get((spot.node, spot.input)) if spot.node else found.tensors.get(spot.tensor)
        shape = known.shape(spot.tensor)
        if g is not None and shape is not None and len(shape) > 1 and _row_axis(shape, first) != spot.axis % len(shape):
            _reduce(tape, spot, g, known, first, f"gradient of {len(kept)}")
            proto.graph.output.add(name=f"gradient of {len(kept)}")
            kept.append(spot)
    proto.graph.node.extend(tape.nodes)
    proto.graph.initializer.extend(tape.constants)
    stops = found.stops or (() if top else (Stop("", "output", "no type and rank of a float output is known"),))
    return Program(tuple(kept), stops, model, known, context, tuple(top), proto, tuple(fed), (seed,))


def prepared(model: Model, context: Context) -> tuple[Model, Shapes]:
    """A model of an opset that the rules can be written in, and of operators that have rules: the same one, or a copy.

    Operators without a rule that ONNX defines by others are written out; tensors that were there keep their names.
    """
    same = model
    if model.opset < OPSET:
        model = from_proto(model.proto())
        raise_opset(model, OPSET, Context(calibration=context.calibration))
    known = context.get(shapes, model) if model is same else shapes(model)
    composed = {("", node.op) for node in model.graph.nodes if _composed(node, known)}
    if composed:
        with contextlib.suppress(TypeError, RuntimeError, ModelError):  # an onnx without the option, or one that fails at it
            model = from_proto(onnx.inliner.inline_selected_functions(_typed(model), sorted(composed), False, True))
            known = shapes(model)
    return model, known


def _composed(node: gs.Node, known: Shapes) -> bool:
    """Whether ONNX says what the operator is made of, and gradients need it."""
    if node.domain or node.op in VJP_RULES or not onnx.defs.has(node.op) or not any(_float(t.name, known) for t in node.inputs):
        return False
    schema: Any = onnx.defs.get_schema(node.op)
    return bool(schema.has_function or schema.has_context_dependent_function)


def _float(name: str, known: Shapes) -> bool:
    dtype = known.dtype(name)
    return dtype is not None and dtype.kind == "f"


def _typed(model: Model) -> onnx.ModelProto:
    """With the types of all tensors, initializers too: bodies of operators depend on them."""
    proto = model.proto()
    for constant in proto.graph.initializer:
        proto.graph.value_info.append(helper.make_tensor_value_info(constant.name, constant.data_type, constant.dims))
    return onnx.shape_inference.infer_shapes(proto)


def _first_dim(model: Model, known: Shapes) -> str | int | None:
    """The number of rows, as shapes name it."""
    shape = known.shape(model.graph.inputs[0].name) if model.graph.inputs else None
    return shape[0] if shape else None


def _row_axis(shape: Shape, first: str | int | None) -> int:
    """The axis along which rows lie: the one of that name, else the first."""
    return shape.index(first) if isinstance(first, str) and first in shape else 0


def _reduce(tape: Tape, spot: Spot, g: str, known: Shapes, first: str | int | None, output: str) -> None:
    """[4, rows, channels]: the sums of y g, g and g^2 over all other axes, and the number of positions they are over."""
    shape = known.shapes[spot.tensor]
    rows, axis = _row_axis(shape, first), spot.axis % len(shape)
    others = [i for i in range(len(shape)) if i not in (rows, axis)]
    y = spot.tensor
    if known.dtype(y) == np.float16:  # sums of squares would overflow
        y, g = (tape.op("Cast", t, to=TensorProto.FLOAT) for t in (y, g))
    parts = [tape.sum(term, others, keep=False) for term in (tape.op("Mul", y, g), g, tape.op("Mul", g, g))]
    size = tape.op("Div", tape.op("Size", y), tape.op("Size", parts[0]))
    parts.append(tape.op("Expand", tape.op("CastLike", size, parts[0]), tape.shape(parts[0])))
    if axis < rows:
        parts = [tape.op("Transpose", part, perm=[1, 0]) for part in parts]
    both = [tape.op("Unsqueeze", part, tape.integers(0)) for part in parts]
    tape.nodes.append(helper.make_node("Concat", both, [output], axis=0))


def _by_row(values: np.ndarray, ran: int, rows: int) -> np.ndarray:
    """[4, rows, channels] of the rows that count, from sums along an axis of which each row has an equal part."""
    if values.shape[1] % ran:
        return np.asarray(values.sum(1, keepdims=True, dtype=np.float64))
    return np.asarray(values.reshape(len(values), ran, -1, values.shape[2]).sum(2, dtype=np.float64)[:, :rows])


def _projection(random: np.random.Generator, shape: tuple[int, ...], head: Head, dtype: np.dtype, one: int | None) -> np.ndarray:
    """Signs, or the class `one`; of a classifier, less their mean over the classes."""
    signs = (
        np.where(random.random(shape) < 0.5, -1.0, 1.0) if one is None else np.broadcast_to(np.arange(shape[1]) == one, shape) * 1.0
    )
    if head.classes is not None:
        signs -= signs.mean(head.classes, keepdims=True)
    return np.asarray(signs, dtype)


def _counting(feed: Feed, signs: np.ndarray) -> np.ndarray:
    """Zero at padded tokens."""
    mask = token_mask(feed, signs)
    return signs if mask is None else np.where(mask[..., None], signs, signs.dtype.type(0))


class _Sizes:
    """The shapes of the heads for a feed, from the sizes of the inputs; where those do not tell, from a run."""

    def __init__(self, model: Model, known: Shapes, top: Sequence[Head]) -> None:
        self.model, self.known, self.heads = model, known, top
        self.seen: dict[tuple[tuple[int, ...], ...], dict[str, tuple[int, ...]]] = {}
        self.runner: Any = None

    def of(self, feed: Feed) -> dict[str, tuple[int, ...]]:
        key = tuple(value.shape for value in feed.values())
        if key not in self.seen:
            self.seen[key] = self._bound(feed) or self._run(feed)
        return self.seen[key]

    def _bound(self, feed: Feed) -> dict[str, tuple[int, ...]] | None:
        bound = _bind(self.model, self.known, feed)
        found = {head.tensor: bound.static(head.tensor) for head in self.heads}
        return {n: s for n, s in found.items() if s is not None} if None not in found.values() else None

    def _run(self, feed: Feed) -> dict[str, tuple[int, ...]]:
        names = [head.tensor for head in self.heads]
        if self.runner is None:
            self.runner = session(with_outputs(self.model, names))
        return {n: v.shape for n, v in zip(names, run(self.runner, feed, names), strict=True)}


def _bind(model: Model, known: Shapes, feed: Feed) -> Shapes:
    """Shapes with the sizes of the feed."""
    return bind(model, known, {f"{n}[{i}]": size for n, value in feed.items() for i, size in enumerate(value.shape)})[0]


def _batch(model: Model, known: Shapes, row: Feed) -> int:
    """As many rows as fit the budget, should all activations and their gradients be held at once."""
    bound, total = _bind(model, known, row), 0
    for name in {t.name for node in model.graph.nodes for t in node.outputs}:
        shape, dtype = bound.static(name), bound.dtype(name)
        total += 2 * prod(shape) * dtype.itemsize if shape is not None and dtype is not None else 0
    return int(min(max(BUDGET // max(total // max(row_count(row) or 1, 1), 1), 1), MAX_BATCH))
