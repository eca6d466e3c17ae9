"""Whatever can be computed now is a constant: nodes on constants, shape arithmetic, reshape targets, branches never taken."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import attribute, op_key
from graphopt.context import Context
from graphopt.edit import constant_value, remove_nodes, replace_uses, set_input, set_output
from graphopt.folding import evaluate, nbytes
from graphopt.liveness import remove_dead
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.proto import subgraphs
from graphopt.registry import register
from graphopt.shapes import Dim, Shape, Shapes, shapes

ROUNDS = 4  # each opens what the one before found out; three are the most a model of our zoo needs
DOMAINS = frozenset({"", "ai.onnx.ml", "com.microsoft"})  # what onnxruntime brings along
RANDOM = frozenset(
    "Bernoulli Multinomial RandomNormal RandomNormalLike RandomUniform RandomUniformLike com.microsoft::SampleOp".split()
)
# DequantizeLinear of a constant is how quantised weights are stored; Constant already is one
KEPT = frozenset({"Constant", "DequantizeLinear", "com.microsoft::DequantizeLinear"})
# a stored result would be larger than what it is computed from, and onnxruntime computes it at load time anyway
COMPACT = frozenset({"Cast", "CastLike", "ConstantOfShape", "EyeLike", "Expand", "Range"})
MAX_SHAPE = 1024  # elements of a known integer tensor


@dataclass(frozen=True)
class _Limits:
    """Bytes by which a stored result may exceed what it is made from: any, and one that is only filled, cast or expanded."""

    growth: int
    compact: int


@register("fold-constants", exact=True)
def fold_constants(model: Model, context: Context, *, max_bytes: int = 1 << 20, compact_bytes: int = 4096) -> int:
    """Nodes whose results are known become constants; counts the nodes folded and inputs simplified.

    - Shape arithmetic: integer tensors all of whose elements are known (`graphopt.shapes`), and tensors proved equal to an earlier
      one; a computed Reshape target with one unknown element becomes a constant with -1, or 0 where the axis is copied (sizes of
      graph inputs are taken to be at least 1 where both are needed); a computed Expand target that only repeats its input's axes.
    - Nodes on constants, as onnxruntime computes them; not random ones, not DequantizeLinear (quantised weights stay), and not
      where the result is over `max_bytes` larger than what it is made from, or over `compact_bytes` where it is only filled, cast
      or expanded: such weights stay as they are stored, or the file would grow (raise both to have everything folded).
    - If with a constant condition becomes the branch taken.
    - Declared shapes that contradict what the nodes compute are corrected (onnxruntime only warns about them, but with constants
      in the place of computed targets ONNX's own check finds the contradiction).

    Exact: values are proved or computed by the runtime itself.
    """
    limits = _Limits(max_bytes, compact_bytes)
    if not model.opset:  # ai.onnx.ml alone: a result could not be written as a Constant node
        return 0
    changes = _correct_declarations(model, context.get(shapes, model))
    failed: set[int] = set()
    for _ in range(ROUNDS):
        known = context.get(shapes, model)
        changed = _fold_shapes(model, known) + _simplify_targets(model, known)
        opened = _fold_nodes(model, known, context, limits, failed) + _inline_branches(model)
        changes += changed + opened
        if changed or opened:
            remove_dead(model)  # what was folded need not fit the constants it now reads
            context.drop()
            model.sort()
        if not opened:
            break
    return changes


def _correct_declarations(model: Model, known: Shapes) -> int:
    """Shapes declared with another rank or another number than inference gives; unknown axes are left open."""
    changes = 0
    for tensor in model.tensors().values():
        shape = known.shape(tensor.name)
        if isinstance(tensor, gs.Constant) or tensor.shape is None or shape is None:
            continue
        pairs = list(zip(tensor.shape, shape, strict=False))
        if len(tensor.shape) != len(shape) or any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs):
            tensor.shape = [d if isinstance(d, int) else None for d in shape]
            changes += 1
    return changes


# --- known integers


def _fold_shapes(model: Model, known: Shapes) -> int:
    """Replace integer tensors whose elements are known, and reuse the first of those that are provably equal."""
    names = Names(model)
    outputs = model.wiring().outputs
    changes = 0
    for graph in model.graphs():
        first: dict[tuple[object, ...], gs.Tensor] = {}
        for node in graph.nodes:
            if op_key(node) in KEPT or subgraphs(node):
                continue
            for tensor in node.outputs:
                value, dtype, shape = known.value(tensor.name), known.dtype(tensor.name), known.static(tensor.name)
                if not tensor.name or value is None or dtype is None or shape is None or None in value or id(tensor) in outputs:
                    continue
                same = first.setdefault((value, shape, dtype), tensor)
                if all(isinstance(v, int) for v in value) and len(value) <= MAX_SHAPE:
                    changes += _use(tensor, names.constant(f"{tensor.name}_value", np.array(value, dtype).reshape(shape)))
                elif same is not tensor:
                    changes += _use(tensor, same)
    return changes


def _use(old: gs.Tensor, new: gs.Tensor) -> int:
    return 1 if old.outputs and replace_uses(old, new) else 0


def _simplify_targets(model: Model, known: Shapes) -> int:
    names = Names(model)
    changes = 0
    for node in model.nodes():
        simplify = {"Reshape": _reshape_target, "Expand": _expand_target}.get(op_key(node))
        if simplify is None or len(node.inputs) < 2 or constant_value(node.inputs[1]) is not None:
            continue
        target = known.value(node.inputs[1].name)
        new = None if target is None else simplify(node, target, known.shape(node.inputs[0].name), model.opset)
        if new is not None:
            set_input(node, 1, names.constant(f"{node.inputs[1].name}_target", np.array(new, np.int64)))
            changes += 1
    return changes


def _reshape_target(node: gs.Node, target: Shape, source: Shape | None, opset: int) -> list[int] | None:
    """The target with 0 for axes it copies from the input and at most one -1; None where more is unknown."""
    zeros_are_sizes = bool(attribute(node, "allowzero", opset))
    if zeros_are_sizes and not all(isinstance(t, int) and t for t in target):
        return None
    result: list[int] = []
    for axis, size in enumerate(target):
        copied = source is not None and axis < len(source) and size == source[axis]
        result.append(size if isinstance(size, int) else 0 if isinstance(size, str) and copied else -1)
    return result if result.count(-1) <= 1 else None


def _expand_target(node: gs.Node, target: Shape, source: Shape | None, opset: int) -> list[int] | None:
    """The target with 1 for axes that only repeat the input's size; None where it names a size the input has not."""
    if source is None:
        return None
    padded: list[Dim] = [*[1] * max(0, len(target) - len(source)), *source]
    aligned = padded[len(padded) - len(target) :]
    result = [t if isinstance(t, int) else 1 if t is not None and t == s else None for t, s in zip(target, aligned, strict=True)]
    return [r for r in result if r is not None] if None not in result else None


# --- nodes on constants


@dataclass
class _Plan:
    """Nodes that can be evaluated, and per tensor how many bytes it is made from."""

    nodes: list[gs.Node] = field(default_factory=list)
    sources: dict[int, int] = field(default_factory=dict)  # id(tensor) -> bytes of the constants it comes from
    unpacked: set[int] = field(default_factory=set)  # id(tensor) made from weights stored in a smaller type
    graphs: list[gs.Graph] = field(default_factory=list)


def _fold_nodes(model: Model, known: Shapes, context: Context, limits: _Limits, failed: set[int]) -> int:
    """Evaluate and replace; nodes that could not be evaluated go into `failed`, and those around them get another chance."""
    outputs = model.wiring().outputs
    while True:
        plan = _plan(model, known, context, limits, failed)
        targets = _targets(model, plan, known, context, outputs, limits)
        if not targets:
            return 0
        wanted = {t.name for tensors in targets.values() for t in tensors}
        broken: list[gs.Node] = []
        values = evaluate(model, _needed(plan.nodes, targets), wanted, broken.append)
        if not broken:
            break
        for node in broken:
            context.reject(node, "cannot be evaluated by onnxruntime")
            failed.add(id(node))
    changes = 0
    for graph in model.graphs():
        done = [n for n in graph.nodes if id(n) in targets and _stored(n, targets[id(n)], values, plan, known, context, limits)]
        changes += _replace(model, graph, done, targets, values, outputs) if done else 0
    return changes


def _targets(
    model: Model, plan: _Plan, known: Shapes, context: Context, outputs: frozenset[int], limits: _Limits
) -> dict[int, list[gs.Tensor]]:
    """id(node) -> the results to store, of nodes that others than the plan's read and that are worth storing."""
    inside = {id(n) for n in plan.nodes}
    targets: dict[int, list[gs.Tensor]] = {}
    for node in plan.nodes:
        used = [t for t in node.outputs if t.name and (id(t) in outputs or t.outputs)]
        leaves = any(id(t) in outputs or any(id(u) not in inside for u in t.outputs) for t in used)
        if leaves and model.opset < 9 and any(id(t) in outputs for t in used):
            context.reject(node, "Constant nodes write no outputs of all types before opset 9")
        elif leaves and all(_worth_storing(node, t, plan, known, context, limits) for t in used):
            targets[id(node)] = used
    return targets


def _plan(model: Model, known: Shapes, context: Context, limits: _Limits, failed: set[int]) -> _Plan:
    """All nodes whose inputs are constants or results of such nodes, outer graphs first, in order."""
    plan = _Plan()
    for graph in model.graphs():
        for node in graph.nodes:
            inputs = [t for t in node.inputs if t.name]
            if (
                not inputs
                or id(node) in failed
                or subgraphs(node)
                or not all(isinstance(t, gs.Constant) or id(t) in plan.sources for t in inputs)
            ):
                continue
            reason = _unfit(node, model.opset, known)
            if reason:
                context.reject(node, reason)
                continue
            source = sum(nbytes(t) if isinstance(t, gs.Constant) else plan.sources[id(t)] for t in inputs)
            sizes = [_bytes(t, known) for t in node.outputs if t.name]
            if any(size is not None and size - source > limits.growth for size in sizes):
                context.reject(node, "the result is much larger than what it is made from")
                continue
            plan.nodes.append(node)
            plan.sources.update({id(t): source for t in node.outputs if t.name})
            if any(id(t) in plan.unpacked for t in inputs) or _unpacks(node, known):
                plan.unpacked.update(id(t) for t in node.outputs)
    return plan


def _unfit(node: gs.Node, opset: int, known: Shapes) -> str:
    """Why a node on constants is not evaluated; empty where it can be."""
    key = op_key(node)
    if key in KEPT:
        return "quantised weights stay quantised" if key != "Constant" else "it is a constant already"
    if key in RANDOM or (key == "Dropout" and len(node.inputs) > 2):
        return "its results are random"
    if (node.domain or "") not in DOMAINS:
        return "an operator of an unknown domain"
    kinds = [known.dtype(t.name) for t in node.outputs if t.name]
    return "" if all(k is not None and k.kind in "iubf" for k in kinds) else "its results are no plain numbers"


def _bytes(tensor: gs.Tensor, known: Shapes) -> int | None:
    shape, dtype = known.static(tensor.name), known.dtype(tensor.name)
    return None if shape is None or dtype is None else int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _unpacks(node: gs.Node, known: Shapes) -> bool:
    """A Cast of a whole stored tensor to a wider type: how compressed weights are kept."""
    before, after = (known.dtype(t.name) for t in (node.inputs[0], node.outputs[0]))
    wider = before is not None and after is not None and before.itemsize < after.itemsize
    return node.op in ("Cast", "CastLike") and wider and isinstance(node.inputs[0], gs.Constant)


def _worth_storing(node: gs.Node, tensor: gs.Tensor, plan: _Plan, known: Shapes, context: Context, limits: _Limits) -> bool:
    size = _bytes(tensor, known)
    if op_key(node) not in COMPACT and id(tensor) not in plan.unpacked:
        return True
    if size is not None and size - plan.sources[id(tensor)] <= limits.compact:
        return True
    context.reject(node, "the result would be stored larger than it is now")
    return False


def _needed(nodes: list[gs.Node], targets: dict[int, list[gs.Tensor]]) -> list[gs.Node]:
    """The nodes the targets depend on, in order."""
    wanted: set[int] = set()
    needed = []
    for node in reversed(nodes):
        if id(node) in targets or any(id(t) in wanted for t in node.outputs):
            wanted.update(id(t) for t in node.inputs)
            needed.append(node)
    return needed[::-1]


def _stored(
    node: gs.Node,
    used: list[gs.Tensor],
    values: dict[str, np.ndarray],
    plan: _Plan,
    known: Shapes,
    context: Context,
    limits: _Limits,
) -> bool:
    """Every result is there, of the type inference says, and not too large (its size may not have been known before)."""
    for tensor in used:
        value = values.get(tensor.name)
        if value is None or value.dtype != known.dtype(tensor.name):
            return False
        if value.nbytes - plan.sources[id(tensor)] > limits.growth:
            context.reject(node, "the result is much larger than what it is made from")
            return False
    return True


def _replace(
    model: Model,
    graph: gs.Graph,
    nodes: list[gs.Node],
    targets: dict[int, list[gs.Tensor]],
    values: dict[str, np.ndarray],
    outputs: frozenset[int],
) -> int:
    """The results become constants of the same names and the nodes go; a graph's output is written by a Constant node."""
    fixed, names = [], Names(model)
    for node in nodes:
        for tensor in targets[id(node)]:
            constant = gs.Constant(tensor.name, values[tensor.name])
            if id(tensor) not in outputs:
                replace_uses(tensor, constant)
                continue
            index = next(i for i, t in enumerate(node.outputs) if t is tensor)
            set_output(node, index, gs.Variable.empty())
            fixed.append(gs.Node("Constant", names.fresh(f"{tensor.name}_constant"), {"value": constant}, [], [tensor]))
    remove_nodes(graph, nodes)
    graph.nodes = [*fixed, *graph.nodes]
    return len(nodes)


# --- branches


def _inline_branches(model: Model) -> int:
    """If with a constant condition: the nodes of the branch taken move into the graph around it."""
    changes = 0
    for graph in reversed(model.graphs()):  # inner first: nodes of a branch that moves out are final then
        chosen = {id(n): n for n in graph.nodes if op_key(n) == "If" and _taken(n) is not None}
        if not chosen:
            continue
        outputs = {id(t) for t in graph.outputs}
        nodes: list[gs.Node] = []
        for node in graph.nodes:
            nodes.extend(_branch(node, outputs) if id(node) in chosen else [node])
        graph.nodes = nodes
        remove_nodes(graph, list(chosen.values()))
        changes += len(chosen)
    return changes


def _taken(node: gs.Node) -> str | None:
    """Which branch an If of a constant condition takes; None where it is computed, or where that branch is malformed."""
    condition = constant_value(node.inputs[0])
    if condition is None or condition.size != 1:
        return None
    name = "then_branch" if condition.reshape(-1)[0] else "else_branch"
    branch = node.attrs.get(name)
    return name if isinstance(branch, gs.Graph) and len(branch.outputs) == len(node.outputs) else None


def _branch(node: gs.Node, outputs: Iterable[int]) -> list[gs.Node]:
    """The nodes of the branch taken, wired to the If's outputs; the If is left with its other branch."""
    taken: gs.Graph = node.attrs.pop(_taken(node))
    moved = list(taken.nodes)
    for index, (target, source) in enumerate(zip(list(node.outputs), taken.outputs, strict=True)):
        if not target.name:
            continue
        if id(target) in outputs:
            set_output(node, index, gs.Variable.empty())
            moved.append(gs.Node("Identity", f"{target.name}_from_branch", {}, [source], [target]))
        else:
            replace_uses(target, source)
    return moved
