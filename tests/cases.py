"""One case of an exact pass: ONNX text before, ONNX text after, and both run alike in an unmodified onnxruntime.

Graphs are compared in a canonical form, one line a node: intermediate tensors numbered, initializers by value, dead nodes left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.model import Model, from_proto
from graphopt.registry import find
from graphopt.runtime import session

DYNAMIC = 3  # size of every symbolic axis in the feeds


def parse(body: str, *, opset: int = 17, imports: str = "") -> Model:
    """A model from the text of its graph: `g (float[N,4] x) => (float[N,4] y) <initializers> { nodes }`."""
    return from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}{imports}]> {body}'))


def canonical(model: Model) -> list[str]:
    """One line for each live node, bodies after their node."""
    return _lines(model.graph, {})


def _lines(graph: gs.Graph, names: dict[int, str]) -> list[str]:
    for tensor in (*graph.inputs, *graph.outputs):
        names[id(tensor)] = tensor.name
    live = _live(graph)
    found = []
    for node in (n for n in graph.nodes if id(n) in live):
        given = max((i for i, t in enumerate(node.inputs) if t.name), default=-1) + 1
        inputs = [_name(t, names) for t in node.inputs[:given]]
        outputs = [_name(t, names) for t in node.outputs]
        plain = {k: _plain(v) for k, v in sorted(node.attrs.items()) if not isinstance(v, gs.Graph)}
        found.append(f"{', '.join(outputs)} = {node.op}({', '.join(inputs)})" + (f" {plain}" if plain else ""))
        for key, body in node.attrs.items():
            if isinstance(body, gs.Graph):
                results = ", ".join(_name(t, names) for t in body.outputs)
                found += [f"  {key}: {line}" for line in (*_lines(body, names), f"-> {results}")]
    return found


def _live(graph: gs.Graph) -> set[int]:
    """Nodes that a graph output needs; what bodies read counts."""
    needed = {id(t) for t in graph.outputs}
    live: set[int] = set()
    for node in reversed(graph.nodes):
        if any(id(t) in needed for t in node.outputs):
            live.add(id(node))
            stack = [node]
            while stack:
                current = stack.pop()
                needed |= {id(t) for t in current.inputs}
                bodies = [v for v in current.attrs.values() if isinstance(v, gs.Graph)]
                needed |= {id(t) for b in bodies for t in b.outputs}
                stack += [n for b in bodies for n in b.nodes]
    return live


def _name(tensor: gs.Tensor, names: dict[int, str]) -> str:
    if isinstance(tensor, gs.Constant):
        return f"{np.dtype(tensor.dtype).name}{list(tensor.shape)}{np.asarray(tensor.values).ravel().tolist()}"
    return names.setdefault(id(tensor), f"t{len(names)}") if tensor.name else "_"


def _plain(value: Any) -> Any:
    if isinstance(value, gs.Constant):
        return np.asarray(value.values).tolist()
    return list(value) if isinstance(value, tuple) else value


def feed(model: onnx.ModelProto, seed: int = 0) -> dict[str, np.ndarray]:
    """Random inputs; floats of both signs, integers 0 or 1."""
    random = np.random.default_rng(seed)
    found = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else DYNAMIC for d in tensor.shape.dim]
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        values = random.standard_normal(shape) if dtype.kind == "f" else random.integers(0, 2, shape)
        found[value.name] = np.asarray(values).astype(dtype)
    return found


def run(model: onnx.ModelProto, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs, from onnxruntime without its own optimisations."""
    return [np.asarray(v) for v in session(model, optimize=False).run(None, dict(inputs))]


def assert_pass(name: str, before: str, after: str | None, *, opset: int = 17, imports: str = "", **options: Any) -> Context:
    """Run the pass once on `before`: the graph must become `after` (None: stay as it is), valid, and compute the same.

    The pass must say whether it changed something, and have nothing left to do on its own result.
    """
    model, context = parse(before, opset=opset, imports=imports), Context()
    original, lines = model.proto(), canonical(model)
    changes = find(name).fn(model, context, **options)
    model.sort()
    model.verify()
    expected = lines if after is None else canonical(parse(after, opset=opset, imports=imports))
    assert canonical(model) == expected
    assert (changes == 0) == (after is None)
    result = model.proto()
    assert list(result.graph.output) == list(original.graph.output)
    for seed in range(2):
        inputs = feed(original, seed)
        for a, b in zip(run(original, inputs), run(result, inputs), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)
    assert find(name).fn(model, Context(), **options) == 0
    return context
