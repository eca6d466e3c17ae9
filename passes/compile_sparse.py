"""Layers with zeros among their weights are stored and run sparse where that is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from graphopt.context import Context
from graphopt.errors import DataError, OptionError
from graphopt.feeds import input_specs, random_row
from graphopt.kernels.sparse_plan import ROWS
from graphopt.model import Model
from graphopt.registry import register, suggest
from graphopt.shapes import shapes
from graphopt.sparse_choice import MARGIN, Choice, apply, by_measuring, by_table, density, forms, plain, static_shapes, whole_gains
from graphopt.sparse_layers import STORAGES, Layer, Site, Storage, find_layers

NAME = "compile-sparse"
SURE = 1.5  # gain by itself that is expected to last among dense neighbours
AS_FAST = 0.97  # of the fastest model's gain, with which one is taken that has more layers sparse


@register(NAME, exact=True, after=("sparsify", "prune-channels", "fold-bn", "fold-scales"))
def compile_sparse(
    model: Model,
    context: Context,
    *,
    choose: Literal["measure", "table"] = "measure",
    layers: tuple[str, ...] = (),
    sizes: tuple[str, ...] = (),
) -> int:
    """Layers that run faster with sparse weights become nodes of graphopt's library; returns their number.

    - choose: measure times each layer dense and sparse on this machine, one thread, then the whole model, and keeps what is faster;
      table decides by density alone, for models that will run elsewhere (always so where the target is not onnxruntime).
    - layers: what was decided before, as in `recipe` of the report: name=form, as layers='conv1=4x1,fc=bitmap'.
      Nothing else is changed, and nothing measured.
    - sizes: of dynamic axes while measuring, as sizes=sequence=128; default: of the first calibration row, else nominal ones.

    A layer is a convolution, a Gemm or a MatMul with its bias, residual sum and Relu or Clip. Its node `graphopt.SparseLayer<n>`
    holds only the weights that are not zero, and a function of the same name makes dense ones of them where the library is not
    loaded. Results are equal to rounding of float32.
    """
    site = Site(model, context.get(shapes, model), model.wiring())
    found = find_layers(site)
    for node, reason in found.reasons:
        context.reject(node, reason)
    usable = [layer for layer in found.layers if _finite(layer, context)]
    if layers:
        choices = _given(usable, layers)
    elif choose == "table" or (context.target is not None and not context.target.onnxruntime):
        static = static_shapes(model, _sizes(sizes))
        choices = [by_table(layer, _pixels(layer, static)) for layer in usable]
    else:
        choices = _measured(model, context, site, usable, _sizes(sizes))
    problems = apply(model, {c.layer: c.storage for c in choices if c.storage is not None})
    choices = [replace(c, storage=None, why=problems[c.layer]) if c.layer in problems else c for c in choices]
    taken = [c for c in choices if c.storage is not None]
    context.facts["layers"] = [c.row() for c in choices]
    context.facts["recipe"] = [f"{c.layer}={c.row()['format']}" for c in taken]
    for layer, choice in zip(usable, choices, strict=True):
        if choice.storage is None and not layers:
            context.reject(layer.node, choice.why)
    return len(taken)


def _finite(layer: Layer, context: Context) -> bool:
    numbers = [layer.matrix(), *([layer.bias] if layer.bias is not None else [])]
    fine = all(np.isfinite(n).all() for n in numbers)
    if not fine:
        context.reject(layer.node, "its weights or biases are NaN or infinite")
    return fine


def _sizes(sizes: Sequence[str]) -> dict[str, int]:
    found = {}
    for text in sizes:
        name, _, value = text.rpartition("=")
        if not name or not value.isdigit() or not int(value):
            raise OptionError(f"{NAME}: sizes={text}: expected axis=number, as in sizes=sequence=128")
        found[name] = int(value)
    return found


def _given(usable: Sequence[Layer], decided: Sequence[str]) -> list[Choice]:
    """The choices of a recipe. OptionError where it does not fit the model."""
    known = {layer.name: layer for layer in usable}
    decisions: dict[str, Storage] = {}
    for text in decided:
        name, _, form = text.rpartition("=")
        storage = next((s for s in STORAGES if s.name == form), None)
        if storage is None:
            raise OptionError(
                f"{NAME}: layers={text}: expected name=form, a form being one of {', '.join(s.name for s in STORAGES)}"
            )
        if name not in known:
            raise OptionError(f"{NAME}: layers={text}: no such layer; {suggest(name, known)}")
        if not storage.fits(known[name]):
            why = f"such blocks do not cover weights of shape {known[name].matrix().shape} exactly"
            raise OptionError(f"{NAME}: layers={text}: {'a bitmap is for products of rows' if storage.bitmap else why}")
        decisions[name] = storage
    return [_plain_choice(layer, decisions.get(layer.name), "as the recipe says") for layer in usable]


def _plain_choice(layer: Layer, storage: Storage | None, why: str) -> Choice:
    return Choice(layer.name, storage, density(layer), 1.0 if storage is None else 0.0, None, None, why)


def _pixels(layer: Layer, static: Mapping[str, tuple[int, ...]]) -> int | None:
    """Pixels, or rows, of one run."""
    shape = static.get(layer.output.name)
    return None if shape is None else int(np.prod(shape)) // layer.outputs


def _feed(model: Model, context: Context, sizes: Mapping[str, int]) -> dict[str, np.ndarray] | None:
    """One run's inputs: the first calibration row, else random ones; None where none can be made."""
    if context.calibration is not None and not sizes:
        return dict(next(iter(context.calibration.batches(1))))
    static = static_shapes(model, sizes)
    specs = [replace(s, shape=static.get(s.name, s.shape)) for s in input_specs(model.interface())]
    try:
        return random_row(specs, (0,))
    except DataError:
        return None


def _measured(model: Model, context: Context, site: Site, usable: Sequence[Layer], sizes: dict[str, int]) -> list[Choice]:
    feed = _feed(model, context, sizes)
    if feed is not None:
        named = {f"{name}[{axis}]": size for name, value in feed.items() for axis, size in enumerate(value.shape)}
        sizes = {**_symbols(model, feed), **named, **sizes}
    static = static_shapes(model, sizes)
    choices = []
    for number, layer in enumerate(usable):
        choices.append(by_measuring(site, layer, static))
        context.progress("measure layers", number + 1, len(usable))
    return _judged(model, context, usable, choices, feed)


def _symbols(model: Model, feed: Mapping[str, np.ndarray]) -> dict[str, int]:
    specs = [s for s in input_specs(model.interface()) if s.shape is not None and s.name in feed]
    pairs = [pair for s in specs for pair in zip(s.shape or (), feed[s.name].shape, strict=True)]
    return {dim: int(size) for dim, size in pairs if isinstance(dim, str)}


def _judged(
    model: Model, context: Context, usable: Sequence[Layer], choices: list[Choice], feed: dict[str, np.ndarray] | None
) -> list[Choice]:
    """What is faster in the whole model: all chosen layers, with grouped convolutions in the same layout, the surest, or none."""
    chosen = {c.layer: c.storage for c in choices if c.storage is not None}
    if not chosen or feed is None:
        return choices
    rows = {layer.name for layer in usable if layer.kind == ROWS}  # in the layout of everyone: what they gain alone they gain here
    sure = {c.layer: c.storage for c in choices if c.storage is not None and ((c.measured or 0) >= SURE or c.layer in rows)}
    variants = [chosen, {**plain(usable), **chosen}, sure]
    kept: list[dict[str, Storage]] = []
    for variant in variants:
        if variant and variant not in kept:
            kept.append(variant)
    gains = whole_gains(model, feed, kept)
    context.facts["whole_model"] = [{"layers": len(v), "gain": round(g, 4)} for v, g in zip(kept, gains, strict=True)]
    top = max(gains)
    if top < MARGIN:
        why = f"the whole model is not {MARGIN} times faster with it ({top:.2f})"
        return [replace(c, storage=None, why=why if c.storage is not None else c.why) for c in choices]
    near = [(variant, gain) for variant, gain in zip(kept, gains, strict=True) if gain >= max(MARGIN, AS_FAST * top)]
    best, _ = max(near, key=lambda pair: (len(pair[0].keys() & chosen.keys()), pair[1]))
    return [_after(layer, choice, best) for layer, choice in zip(usable, choices, strict=True)]


def _after(layer: Layer, choice: Choice, best: Mapping[str, Storage]) -> Choice:
    storage = best.get(layer.name)
    if storage == choice.storage:
        return choice
    if storage is None:
        return replace(choice, storage=None, why="the whole model is faster without it")
    stored = next(f.stored for f in forms(layer) if f.storage == storage)
    why = "dense, but in the layout of its neighbours: the whole model is faster so"
    return replace(choice, storage=storage, stored=stored, why=why)
