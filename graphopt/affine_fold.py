"""Applies affine plans: rounds once, writes the new weights, takes the affine nodes out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.affine import SOURCES, Affine, Scene, Source
from graphopt.affine_moves import Edit
from graphopt.affine_plan import Insert, Plan, Walk, best_plan, chain, nodes_needed
from graphopt.attributes import op_key
from graphopt.context import Context
from graphopt.edit import bypass, detach, set_input, set_inputs
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.shapes import shapes

SWEEPS = 16  # a fold can make another possible; real models need two or three
LOST = 4  # times eps: how much of a weight's precision rounding may take (float16 underflow takes more)


@dataclass
class Fold:
    """The state of one run of a pass over one model."""

    scene: Scene
    graphs: dict[int, gs.Graph]
    names: Names
    sources: dict[int, Source | str | None] = field(default_factory=dict)
    dead: dict[int, gs.Node] = field(default_factory=dict)
    added: list[gs.Node] = field(default_factory=list)


def fold(model: Model, context: Context, *, ops: frozenset[str]) -> int:
    """Move every run of affine nodes that has one of `ops` to where it takes the fewest nodes; the number of runs moved.

    Raises nothing; what is left is recorded with its reason. Linear in the nodes: a walk looks at a bounded number of them.
    """
    state = Fold(
        Scene.of(model, context.get(shapes, model)),
        {id(g): g for g in model.graphs()},
        Names(model),
    )
    changes = 0
    for _ in range(SWEEPS):
        moved, left = _sweep(model, context, state, ops)
        changes += moved
        if not moved:
            break
    for node, reason in left:
        context.reject(node, reason)
    for graph in state.graphs.values():
        if state.dead:
            graph.nodes = [n for n in graph.nodes if id(n) not in state.dead]
    return changes


def _sweep(model: Model, context: Context, state: Fold, ops: frozenset[str]) -> tuple[int, list[tuple[gs.Node, str]]]:
    nodes = [n for n in model.nodes() if op_key(n) in SOURCES and id(n) not in state.dead]
    moved = 0
    done: set[int] = set()
    left: list[tuple[gs.Node, str]] = []
    for index, node in enumerate(nodes):
        if index % 256 == 0:
            context.progress("folding", index, len(nodes))
        if id(node) in done or id(node) in state.dead:
            continue
        walk = Walk(state.scene, state.sources)
        found = walk.source(node)
        if isinstance(found, str) and op_key(node) in ops:
            left.append((node, found))
        if not isinstance(found, Source):
            continue
        run, total = chain(walk, node)
        done.update(id(n) for n, _ in run)
        if not any(op_key(n) in ops for n, _ in run):
            continue
        plan = best_plan(state.scene, state.sources, run, total)
        reason = plan.why if plan.cost >= 0 else apply(state, plan, total.dtype)
        left.extend([(n, reason) for n, _ in run if op_key(n) in ops] if reason else [])
        moved += not reason
    return moved, left


def apply(state: Fold, plan: Plan, dtype: np.dtype) -> str:
    """Carry the plan out; a reason, with nothing changed, where the new numbers do not fit their type."""
    try:
        weights = [
            (edit, slot, _edited(edit, slot, values, dtype)) for edit in plan.edits for slot, values in edit.compute().items()
        ]
        written = [(insert, _terms(insert.affine)) for insert in plan.inserts]
    except (ValueError, IndexError):  # a malformed model
        return "the sizes of its parameters contradict each other"
    if any(array is None for *_, array in weights) or any(terms is None for _, terms in written):
        return f"the folded numbers do not fit {dtype}"
    for edit, slot, array in weights:
        _write(state, edit, slot, array)
    for edit in plan.edits:
        edit.node.op = edit.op or edit.node.op
        edit.node.attrs.update(edit.attrs)
        state.sources.pop(id(edit.node), None)
    for insert, terms in written:
        _insert(state, insert, terms or [])
    for node, slot in plan.drops:
        _drop(state, node, slot)
    return ""


def _edited(edit: Edit, slot: int, values: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    old = edit.node.inputs[slot] if slot < len(edit.node.inputs) else None
    return rounded(values, np.dtype(old.dtype) if isinstance(old, gs.Constant) else dtype)


def rounded(values: np.ndarray, dtype: np.dtype) -> np.ndarray | None:
    """Rounded once to `dtype`; None where that is not finite or loses more than rounding does (underflow of a whole row)."""
    with np.errstate(over="ignore", under="ignore"):
        result = np.ascontiguousarray(values.astype(dtype))
    if not np.isfinite(result).all():
        return None
    if dtype != np.float64 and values.size:
        rows = values.shape[0] if values.ndim > 1 else 1
        error = result.astype(np.float64).reshape(rows, -1)
        values = values.reshape(rows, -1)
        error -= values  # in place: weights may be large
        error, largest = (np.maximum(v.max(axis=1), -v.min(axis=1)) for v in (error, values))
        if ((error > LOST * np.finfo(dtype).eps * largest) & (error > 1e-30)).any():
            return None
    return result


def _terms(a: Affine) -> list[np.ndarray] | None:
    """The rounded scale and shift, each index by itself."""
    made = [rounded(v.reshape(-1, 1), a.dtype) for v in (a.scale, a.shift)]
    return None if any(m is None for m in made) else [m.ravel() for m in made if m is not None]


def _write(state: Fold, edit: Edit, slot: int, array: np.ndarray | None) -> None:
    node = edit.node
    old = node.inputs[slot] if slot < len(node.inputs) else None
    if isinstance(old, gs.Constant) and len(old.outputs) == 1 and not state.scene.is_output(old):
        old.values = array
    else:
        base = old.name if isinstance(old, gs.Constant) else f"{node.name or node.op}_bias"
        set_input(node, slot, gs.Constant(state.names.fresh(base), array))


def _insert(state: Fold, insert: Insert, terms: list[np.ndarray]) -> None:
    """Mul, Add, both, or a BatchNormalization on the way from the tensor to the reader."""
    a, source, rank = insert.affine, insert.tensor, state.scene.rank(insert.tensor)
    if nodes_needed(a, rank) == 1 and a.has_scale and a.has_shift:
        parts = [("BatchNormalization", [*terms, np.zeros_like(terms[0]), np.ones_like(terms[0])])]
    else:
        shape = () if a.axis is None else (-1,) + (1,) * ((rank or 0) - a.axis - 1)
        wanted = [("Mul", terms[0])] * a.has_scale + [("Add", terms[1])] * a.has_shift
        parts = [(op, [values.reshape(shape)]) for op, values in wanted]
    for op, values in parts:
        name = state.names.fresh(f"{insert.reader.name or insert.reader.op}_{op.lower()}")
        result = gs.Variable(state.names.fresh(f"{name}_out"), a.dtype, state.scene.dims(insert.tensor))
        constants = [gs.Constant(state.names.fresh(f"{name}_{i}"), v) for i, v in enumerate(values)]
        node = gs.Node(op, name, {"epsilon": 0.0} if len(values) > 1 else {})
        set_inputs(node, [source, *constants])
        node.outputs.append(result)
        home = state.scene.home(insert.reader)
        state.scene.wiring.home[id(node)] = home
        state.graphs[home].nodes.append(node)
        source = result
    set_input(insert.reader, insert.slot, source)


def _drop(state: Fold, node: gs.Node, slot: int) -> None:
    """Its readers read its input; a graph output that must keep its name becomes a plain copy where nothing else can write it."""
    source = node.inputs[slot]
    state.sources.pop(id(node), None)
    if bypass(node, source, state.scene.wiring):
        detach(node)
        state.dead[id(node)] = node
    else:
        node.op, node.attrs = "Identity", type(node.attrs)()
        while len(node.outputs) > 1:  # the unread statistics of a BatchNormalization
            node.outputs.pop()
        set_inputs(node, [source])
