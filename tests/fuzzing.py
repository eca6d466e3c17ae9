"""Small models, and ways to damage them.

A mutation is four small integers, so that hypothesis can shrink it; every choice is taken modulo what there is to choose from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import AttributeProto, GraphProto, ModelProto, TensorProto, helper, numpy_helper

Mutation = tuple[int, int, int, int]

_TEXTS = {
    "conv": """(float[N,3,8,8] x) => (float[N,4] y) {
        c = Conv<pads=[1,1,1,1]>(x, w833, b8)  n = BatchNormalization(c, s8, b8, m8, v8)  r = Relu(n)
        d = Conv<group=8, pads=[1,1,1,1]>(r, w8133, b8)  k = Clip(d, lo, hi)  p = GlobalAveragePool(k)  q = Flatten(p)
        y = Gemm<transB=1>(q, w48, b4) }""",
    "residual": """(float[N,4,6,6] x) => (float[N,8,3,3] y, float[N,4,6,6] z) {
        a = Conv<pads=[1,1,1,1]>(x, w443, b4)  r = Relu(a)  z = Add(x, r)  u, v = Split<axis=1>(z, two)
        e = Concat<axis=1>(v, u, x)  f = Mul(e, s8c)  y = MaxPool<kernel_shape=[2,2], strides=[2,2]>(f) }""",
    "reshape": """(float[N,4,6] x) => (float[N,2,12] y) {
        s = Shape(x)  n = Gather<axis=0>(s, zero)  m = Unsqueeze(n, zero1)  t = Concat<axis=0>(m, dims)
        a = Transpose<perm=[0,2,1]>(x)
        b = Transpose<perm=[0,2,1]>(a)  c = Reshape(b, t)  d = Cast<to=1>(c)  e = Identity(d)  y = Sigmoid(e) }""",
    "attention": """(float[N,4,8] x) => (float[N,4,8] y) {
        q = MatMul(x, w88)  k = MatMul(x, w88)  v = MatMul(x, w88)  kt = Transpose<perm=[0,2,1]>(k)  l = MatMul(q, kt)
        g = Div(l, two_f)  p = Softmax<axis=-1>(g)  o = MatMul(p, v)  h = Add(o, x)
        y = LayerNormalization<axis=-1>(h, s8, b8) }""",
    "branch": """(bool c, float[2,8] x) => (float[2,8] y) {
        a = Mul(x, s8)
        y = If (c) < then_branch = t () => (float[2,8] z) { z = Add(a, b8) },
                     else_branch = e () => (float[2,8] z) { u = MatMul(a, w88)  z = Relu(u) } > }""",
    "loop": """(float[8] x) => (float[8] y, float[trips,8] all) {
        y, all = Loop (three, yes, x) < body = b (int64 i, bool go, float[8] h) => (bool on, float[8] o, float[8] each) {
            on = Identity(go)  g = Add(h, b8)  o = Tanh(g)  each = Mul(o, two_f) } > }""",
    "quantized": """(float[N,8] x) => (float[N,8] y) {
        q = QuantizeLinear(x, scale, point)  d = DequantizeLinear(q, scale, point)  m = MatMul(d, w88)  r = Relu(m)
        p = QuantizeLinear(r, scale, point)  y = DequantizeLinear(p, scale, point) }""",
    "indices": """(float[N,8] x, int64[N] i) => (float[K,8] y, int64[R] top) {
        g = Gather<axis=0>(x, i)  s = Slice(g, zero1, one1, zero1)  e = Expand(s, dims2)  w = Where(mask, e, two_f)
        u = Unsqueeze(w, zero1)  y = Squeeze(u, zero1)  r = ReduceMean<axes=[1], keepdims=0>(x)  v, top = TopK(r, one1) }""",
}


def _values() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)

    def floats(*shape: int) -> np.ndarray:
        return (0.5 + random.random(shape)).astype(np.float32) * np.where(random.random(shape) < 0.5, -1, 1).astype(np.float32)

    weights = {"w833": (8, 3, 3, 3), "w8133": (8, 1, 3, 3), "w48": (4, 8), "w443": (4, 4, 3, 3), "w88": (8, 8)}
    vectors = {"b8": (8,), "m8": (8,), "b4": (4,), "s8c": (1, 8, 1, 1)}
    integers = {"two": [2, 2], "zero": 0, "zero1": [0], "one1": [1], "dims": [2, 12], "dims2": [1, 8], "three": 3}
    return {
        **{name: floats(*shape) for name, shape in {**weights, **vectors}.items()},
        **{name: np.abs(floats(8)) for name in ("s8", "v8")},
        **{name: np.array(value, np.int64) for name, value in integers.items()},
        "lo": np.float32(0), "hi": np.float32(6), "two_f": np.float32(2), "scale": np.float32(0.05),
        "point": np.uint8(128), "yes": np.array(True), "mask": np.array([True, False] * 4),
    }  # fmt: skip


@cache
def _seed(name: str) -> bytes:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> {name} {_TEXTS[name]}')
    read = {i for graph in _graphs(proto.graph) for node in graph.node for i in node.input}
    proto.graph.initializer.extend([numpy_helper.from_array(np.asarray(v), n) for n, v in _values().items() if n in read])
    onnx.checker.check_model(proto, full_check=True)
    return bytes(proto.SerializeToString())


SEEDS = tuple(_TEXTS)


def seed(number: int) -> ModelProto:
    """One of the small models."""
    return onnx.load_model_from_string(_seed(SEEDS[number % len(SEEDS)]))


def _graphs(graph: GraphProto) -> list[GraphProto]:
    inner = [a.g for n in graph.node for a in n.attribute if a.type == AttributeProto.GRAPH]
    return [graph, *(g for i in inner for g in _graphs(i))]


# ---- mutations of the protobuf's fields

SIZES = (0, 1, 2, 3, 4, 8, -1, -7, 2**31, 2**62)
TYPES = (0, 1, 6, 7, 9, 2, 3, 8, 10, 11, 14, 16, 22, 99)
OPS = ("Relu", "Add", "Conv", "Reshape", "Transpose", "Concat", "Identity", "Gemm", "BatchNormalization", "Nonsense", "Shape",
       "Pad", "Mul", "Split", "Cast", "Squeeze", "Constant", "Dropout", "Slice", "ConvTranspose", "LSTM", "If", "")  # fmt: skip
VALUES: tuple[Any, ...] = (0, 1, -1, 2**62, 1.5, float("nan"), "text", b"\xff", [0, 1], [-1, 5], [], [0.5], ["a"])


def _graph(proto: ModelProto, which: int) -> GraphProto:
    graphs = _graphs(proto.graph)
    return graphs[which % len(graphs)]


def _pick(items: Any, which: int) -> Any:
    return items[which % len(items)] if len(items) else None


def _names(graph: GraphProto) -> list[str]:
    nodes = [name for n in graph.node for name in (*n.input, *n.output)]
    return [*nodes, *(t.name for t in graph.initializer), *(i.name for i in (*graph.input, *graph.output)), "", "nobody"]


def drop(graph: GraphProto, a: int, b: int, c: int) -> None:
    lists = (graph.node, graph.initializer, graph.input, graph.output)
    items = _pick(lists, a)
    if len(items):
        del items[b % len(items)]


def duplicate(graph: GraphProto, a: int, b: int, c: int) -> None:
    items = _pick((graph.node, graph.initializer, graph.input, graph.output), a)
    if len(items):
        items.add().CopyFrom(items[b % len(items)])


def reorder(graph: GraphProto, a: int, b: int, c: int) -> None:
    nodes = [n for n in graph.node]
    if nodes:
        nodes.insert(b % len(nodes), nodes.pop(a % len(nodes)))
        copies = [ModelProto(graph=GraphProto(node=[n])).graph.node[0] for n in nodes]
        del graph.node[:]
        graph.node.extend(copies)


def rewire(graph: GraphProto, a: int, b: int, c: int) -> None:
    node = _pick(graph.node, a)
    if node is not None and node.input:
        node.input[b % len(node.input)] = _pick(_names(graph), c)


def rename_output(graph: GraphProto, a: int, b: int, c: int) -> None:
    node = _pick(graph.node, a)
    if node is not None and node.output:
        node.output[b % len(node.output)] = _pick(_names(graph), c)


def rename_interface(graph: GraphProto, a: int, b: int, c: int) -> None:
    info = _pick([*graph.input, *graph.output, *graph.initializer], a)
    if info is not None:
        info.name = _pick(_names(graph), c)


def arity(graph: GraphProto, a: int, b: int, c: int) -> None:
    node = _pick(graph.node, a)
    if node is not None:
        names = (node.input, node.output)[b % 2]
        if c % 3 and names:
            names.pop()
        else:
            names.append(_pick(_names(graph), c) if b % 2 == 0 else f"more{c}")


def operator(graph: GraphProto, a: int, b: int, c: int) -> None:
    node = _pick(graph.node, a)
    if node is not None:
        node.op_type = _pick(OPS, b)
        node.domain = ("", "", "custom", "com.microsoft", "ai.onnx.ml")[c % 5]


def attribute(graph: GraphProto, a: int, b: int, c: int) -> None:
    node = _pick(graph.node, a)
    if node is None:
        return
    names: tuple[str, ...] = (
        "axis",
        "pads",
        "perm",
        "to",
        "group",
        "kernel_shape",
        "strides",
        "transB",
        "epsilon",
        "axes",
        "value",
        "keepdims",
    )
    if node.attribute and b % 2:
        names = (node.attribute[c % len(node.attribute)].name,)
        del node.attribute[c % len(node.attribute)]
    if b % 3:
        made = helper.make_attribute(
            names[c % len(names)], _pick(VALUES, b), attr_type=AttributeProto.INTS if _pick(VALUES, b) == [] else None
        )
        node.attribute.append(made)


def integers(graph: GraphProto, a: int, b: int, c: int) -> None:
    """An element of an attribute of integers."""
    lists = [x.ints for n in graph.node for x in n.attribute if x.ints]
    chosen = _pick(lists, a)
    if chosen is not None:
        chosen[b % len(chosen)] = _pick(SIZES, c)


def declared(graph: GraphProto, a: int, b: int, c: int) -> None:
    """A size, or the type, of an input or output."""
    info = _pick([*graph.input, *graph.output], a)
    if info is None:
        return
    dims = info.type.tensor_type.shape.dim
    if b % 3 == 0:
        info.type.tensor_type.elem_type = _pick(TYPES, c)
    elif b % 3 == 1 and len(dims):
        dims[b % len(dims)].dim_value = _pick(SIZES, c)
    elif c % 2 and len(dims):
        del dims[b % len(dims)]
    else:
        info.type.Clear()


def tensor(graph: GraphProto, a: int, b: int, c: int) -> None:
    """Dims, type or bytes of an initializer."""
    chosen = _pick(graph.initializer, a)
    if chosen is None:
        return
    if b % 4 == 0 and chosen.dims:
        chosen.dims[b % len(chosen.dims)] = _pick(SIZES, c)
    elif b % 4 == 1:
        chosen.data_type = _pick(TYPES, c)
    elif b % 4 == 2:
        chosen.raw_data = chosen.raw_data[: c % (len(chosen.raw_data) + 1)]
    else:
        chosen.data_location = TensorProto.EXTERNAL
        chosen.external_data.add(key="location", value=("gone.bin", "/etc/hostname", "..", "")[c % 4])


def values(graph: GraphProto, a: int, b: int, c: int) -> None:
    """The values of an initializer, of its type and shape: zeros, negative or odd ones, another shape of the same size."""
    chosen = _pick(graph.initializer, a)
    if chosen is None:
        return
    array = numpy_helper.to_array(chosen).copy()
    if b % 3 == 0 and array.size:
        array.reshape(-1)[c % array.size] = (0, 1, 2, 100)[c % 4]
    elif b % 3 == 1 and array.dtype.kind == "f" and array.size:
        array.reshape(-1)[c % array.size] = (np.nan, np.inf, 1e-40, -1e30)[c % 4]
    else:
        array = array.reshape([(-1,), (1, -1), (-1, 1), (1, 1, -1)][c % 4])
    chosen.CopyFrom(numpy_helper.from_array(array, chosen.name))


def opset(graph: GraphProto, a: int, b: int, c: int) -> None:
    """Marker: handled on the model, see `mutate`."""


KINDS: tuple[Callable[[GraphProto, int, int, int], None], ...] = (
    drop, duplicate, reorder, rewire, rename_output, rename_interface, arity, operator, attribute, integers, declared,
    tensor, values, opset,
)  # fmt: skip


def mutate(proto: ModelProto, mutations: Sequence[Mutation]) -> ModelProto:
    """The model with the mutations, in order. Those that the earlier ones made impossible do nothing."""
    for kind, a, b, c in mutations:
        change = KINDS[kind % len(KINDS)]
        if change is opset and proto.opset_import:
            proto.opset_import[0].version = (7, 8, 9, 10, 11, 12, 13, 15, 18, 21, 23, 0, -1, 3, 99)[a % 15]
            proto.ir_version = (8, 3, 10, 0, 99)[b % 5]
            continue
        try:
            change(_graph(proto, a // 3), a, b, c)
        except (
            ValueError,
            TypeError,
            KeyError,
            onnx.checker.ValidationError,
        ):  # an earlier mutation left nothing that could be changed so
            continue
    return proto


def damage(content: bytes, changes: Sequence[tuple[int, int, int]]) -> bytes:
    """Bytes flipped, removed or inserted."""
    for kind, place, value in changes:
        at = place % max(1, len(content))
        kept = content[at + (1 + value % 8 if kind % 3 == 1 else 1 if kind % 3 == 0 else 0) :]
        content = content[:at] + (b"" if kind % 3 == 1 else bytes([value % 256])) + kept
    return content
