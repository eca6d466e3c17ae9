"""How each layer with zeros among its weights is best run: dense by onnxruntime, or sparse in blocks of some shape.

By measurement on this machine, layer by layer and then as a whole, or by a table (`expected`) where the model will run elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from graphopt.errors import ModelError
from graphopt.kernels.sparse_plan import CONV, stored
from graphopt.measure import latency
from graphopt.model import Model, from_proto
from graphopt.nominal import bind
from graphopt.operands import Names
from graphopt.proto import Exporter, encode_inline
from graphopt.shapes import shapes
from graphopt.sparse_layers import STORAGES, Layer, Site, Storage, find_layers
from graphopt.sparse_replace import replace_layer

MOST = 0.75  # density above which nothing is tried: no format was ever faster there
MARGIN = 1.05  # how much faster a layer must be measured to be taken
NEAR = 0.85  # of the best gain, with which a form is taken that needs fewer bytes
SEVERAL = 1.15  # and how much faster by the table, which knows neither the machine nor the neighbours
# time relative to dense, a + b * stored density, of single weights and of blocks of four rows: medians over nine shapes on AVX2
EXPECTED = {1: (0.05, 2.5), 4: (0.03, 1.2)}
BITMAP = (1.0, 0.0)  # waits for memory or not: nothing is promised without measuring
SINGLE = Storage((1, 1))
FEW = 16  # pixels or rows below which dense products wait for memory, and the table does not hold
LAYER_SECONDS, MODEL_SECONDS, ROUNDS = 0.15, 1.5, 7
UNSURE, REPEATS = 0.1, 3  # gains as near to what decides are measured again, so often in all, and the median counts


@dataclass(frozen=True)
class Form:
    """A way to store a layer, the share of weights stored, bytes."""

    storage: Storage
    stored: float
    size: int

    @property
    def rows(self) -> int:
        """Of blocks as the kernels see them."""
        return 1 if self.storage.block[0] == 1 else 4


@dataclass(frozen=True)
class Choice:
    """What was decided for a layer, and why. `storage` None: dense."""

    layer: str
    storage: Storage | None
    density: float
    stored: float
    expected: float | None
    measured: float | None
    why: str

    def row(self) -> dict[str, object]:
        """For the report."""
        form = "dense" if self.storage is None else self.storage.name
        figures = {"density": self.density, "stored": self.stored, "expected_gain": self.expected, "measured_gain": self.measured}
        return {
            "layer": self.layer,
            "format": form,
            **{k: None if v is None else round(v, 4) for k, v in figures.items()},
            "why": self.why,
        }


def forms(layer: Layer) -> list[Form]:
    """The smallest way to store the layer for each kind of kernel: single weights, a bitmap of them, blocks of four rows."""
    matrix = layer.matrix()
    found: dict[tuple[bool, int], Form] = {}
    for storage in STORAGES:
        if not storage.fits(layer):
            continue
        values, places = stored(matrix, layer.plan(storage))
        form = Form(storage, values.size / matrix.size, values.nbytes + places.nbytes)
        kernel = storage.bitmap, form.rows
        if kernel not in found or form.size < found[kernel].size:
            found[kernel] = form
    return list(found.values())


def expected(layer: Layer, form: Form) -> float:
    """How many times faster than dense the table says it is."""
    base, slope = BITMAP if form.storage.bitmap else EXPECTED[form.rows]
    matrix = layer.matrix()
    columns = matrix.reshape(matrix.shape[0] // form.rows, form.rows, -1).any(1)  # what the kernels walk: zero columns are left out
    return float(1 / (base + slope * columns.mean()))


def density(layer: Layer) -> float:
    """The share of weights that are not zero."""
    matrix = layer.matrix()
    return float(np.count_nonzero(matrix) / matrix.size)


def by_table(layer: Layer, pixels: int | None) -> Choice:
    """The choice without measuring; `pixels` (or rows) of one run, if known."""
    options = [(expected(layer, form), form) for form in forms(layer)]
    gain, best = max(options, key=lambda o: o[0])
    filled = density(layer)
    if pixels is not None and pixels < FEW and filled > 0.35:
        return Choice(layer.name, None, filled, best.stored, gain, None, f"fewer than {FEW} pixels or rows: too dense to pay")
    if gain < SEVERAL:
        return Choice(layer.name, None, filled, best.stored, gain, None, f"expected gain below {SEVERAL}")
    return Choice(layer.name, best.storage, filled, best.stored, gain, None, "expected to be the fastest")


# ---- one layer in onnxruntime


def alone(site: Site, layer: Layer, static: Mapping[str, tuple[int, ...]]) -> onnx.ModelProto | None:
    """A model of the layer by itself, with fixed shapes; None where a shape is not known."""
    tensors = [layer.node.inputs[0], *([layer.residual] if layer.residual is not None else [])]
    if any(t.name not in static for t in tensors):
        return None
    constants = {t.name: t for n in layer.nodes for t in n.inputs if isinstance(t, gs.Constant)}
    exporter = Exporter(gs.Graph([], [], []), site.model.leftovers, encode_inline)
    inputs = [helper.make_tensor_value_info(t.name, 1, static[t.name]) for t in tensors]
    output = onnx.ValueInfoProto(name=layer.output.name)
    output.type.tensor_type.elem_type = 1
    graph = helper.make_graph([exporter.node(n) for n in layer.nodes], "layer", inputs, [output])
    graph.initializer.extend(encode_inline(c) for c in constants.values())
    imports = [o for o in site.model.shell.opset_import if o.domain in ("", "ai.onnx")]
    return helper.make_model(graph, opset_imports=imports, ir_version=max(site.model.shell.ir_version, 8))


def converted(proto: onnx.ModelProto, form: Storage) -> onnx.ModelProto:
    """The model of one layer with the layer sparse."""
    model = from_proto(proto)
    site = Site(model, shapes(model), model.wiring())
    (layer,) = find_layers(site).layers
    problem = replace_layer(site, layer, form, Names(model))
    assert not problem, problem
    return model.proto()


def steady(contents: Sequence[bytes], feed: Mapping[str, np.ndarray], seconds: float, *, between: bool = False) -> list[float]:
    """How many times faster than the first model the others run in turns, one thread.

    Measured again where one is near MARGIN, or, `between`, where the two fastest are near each other.
    """
    taken: list[list[float]] = []
    while True:
        taken.append([t.speedup for t in latency(contents, feed, seconds=seconds, rounds=ROUNDS)[1:]])
        gains = [float(g) for g in np.median(taken, axis=0)]
        first, second = sorted([*gains, 0.0])[-1:-3:-1]
        close = any(abs(gain / MARGIN - 1) <= UNSURE for gain in gains) or (between and second > first * (1 - UNSURE))
        if len(taken) == REPEATS or not close:
            return gains


def by_measuring(site: Site, layer: Layer, static: Mapping[str, tuple[int, ...]]) -> Choice:
    """The fastest of dense and sparse in onnxruntime, one thread; by the table where the layer's shapes are not known."""
    filled, options = density(layer), forms(layer)
    if filled > MOST:
        return Choice(layer.name, None, filled, options[0].stored, None, None, f"denser than {MOST:.0%}")
    dense = alone(site, layer, static)
    if dense is None:
        return by_table(layer, None)
    candidates = [converted(dense, form.storage) for form in options]
    random = np.random.default_rng(0)
    feed = {i.name: random.standard_normal(static[i.name]).astype(np.float32) for i in dense.graph.input}
    models = [m.SerializeToString() for m in (dense, *candidates)]
    gains = steady(models, feed, LAYER_SECONDS)
    near = [(gain, form) for gain, form in zip(gains, options, strict=True) if gain >= NEAR * max(gains)]
    gain, best = min(near, key=lambda o: (o[0] < MARGIN, o[1].size))
    made = Choice(layer.name, best.storage, filled, best.stored, expected(layer, best), gain, "the fastest by itself")
    return made if gain >= MARGIN else replace(made, storage=None, why=f"measured gain below {MARGIN}")


# ---- the whole model


def static_shapes(model: Model, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """The shapes with every dynamic axis at its nominal size, or as `sizes` says."""
    bound, _ = bind(model, shapes(model), sizes)
    found = {name: bound.static(name) for name in bound.shapes}
    return {name: shape for name, shape in found.items() if shape is not None}


def apply(model: Model, chosen: Mapping[str, Storage]) -> dict[str, str]:
    """Make these layers sparse; the layers that could not be, and why. The graph is sorted."""
    site = Site(model, shapes(model), model.wiring())
    names, problems = Names(model), {}
    for layer in find_layers(site).layers:
        if layer.name in chosen:
            problem = replace_layer(site, layer, chosen[layer.name], names)
            if problem:
                problems[layer.name] = problem
    model.sort()
    return problems


def plain(layers: Sequence[Layer]) -> dict[str, Storage]:
    """Grouped convolutions (depthwise above all), with all their weights: sparse only in layout, so that neighbours share one."""
    return {layer.name: SINGLE for layer in layers if layer.kind == CONV and layer.window.groups > 1}


def whole_gains(model: Model, feed: Mapping[str, np.ndarray], variants: Sequence[Mapping[str, Storage]]) -> list[float]:
    """How many times faster than the model as it is each variant runs, one thread; 0 for one that does not run."""
    contents = [model.proto().SerializeToString()]
    for chosen in variants:
        copy = from_proto(model.proto())
        apply(copy, chosen)
        contents.append(copy.proto().SerializeToString())
    try:
        return steady(contents, feed, MODEL_SECONDS * len(contents), between=True)
    except ModelError:
        return [0.0 for _ in variants]
