"""Whether a smaller model is faster in proportion to the MACs that went, and if not, which layers lag behind and why."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from json import loads
from pathlib import Path

import numpy as np

from graphopt.cost import costs
from graphopt.errors import ModelError
from graphopt.layers import Layer, find_layers
from graphopt.model import OWN, Model
from graphopt.runtime import Feed, run, runnable, session

BLOCK = 8  # channels that onnxruntime's blocked convolutions take at a time
PROPORTION = 1.25  # a model is out of step where its time is so many times its share of the MACs
SLOWER = 0.97  # a ratio of latencies under this is called slower: above, it is within the machine's noise
_NAMED = 4  # layers named in a warning
_ROUNDS = 20
_FUSED = frozenset({"Relu", "Clip", "LeakyRelu", "HardSigmoid", "Sigmoid", "Tanh"})  # activations that convolutions take in
_KERNEL = re.compile(r"(?:fused )?(.*?)(?:_nchwc)?(?:_token_\d+)?_kernel_time")  # how onnxruntime names what it makes of a node


@dataclass(frozen=True)
class Lag:
    """A layer whose time fell by clearly less than its MACs: both as shares of the original's, and the milliseconds too many."""

    node: str
    time: float
    macs: float
    excess: float


def out_of_step(macs: float | None, time: float) -> bool:
    """Whether the time, a share of the original's, is clearly above that of the MACs; False where no MACs went."""
    return macs is not None and macs < 1 and time > PROPORTION * macs


def explain(macs: float, time: float, original: Model, work: Model, feed: Feed) -> str:
    """Plain words for a model that is out of step. The layers of both are timed, in turn."""
    what = "it is SLOWER than the original" if time * SLOWER > 1 else "it is not faster in proportion"
    parts = [f"{what}: {time:.2f} of the time for {macs:.2f} of the MACs"]
    odd = ragged(work, original)
    try:
        lags, idle = lagging(original, work, feed)
    except ModelError:  # it ran when it was timed; profiling asks for more, as a place for its file
        lags, idle = [], 0.0
    if lags:
        named = [f"{lag.node}{odd.get(lag.node, '')} {lag.time:.2f} of the time for {lag.macs:.2f}" for lag in lags[:_NAMED]]
        parts.append(f"layers behind: {', '.join(named)}{_more(len(lags))}")
    if odd:
        names = [f"{node}{counts}" for node, counts in odd.items()]
        shown = f": {', '.join(names[:_NAMED])}{_more(len(names))}"
        parts.append(f"channels that are not multiples of {BLOCK}, as fast kernels want them{shown}; give round_to={BLOCK}")
    if idle:
        parts.append(f"{100 * idle:.0f} % of its time is in operators that have no MACs")
    return "; ".join(parts)


def _more(count: int) -> str:
    return f" and {count - _NAMED} more" if count > _NAMED else ""


def ragged(model: Model, original: Model) -> dict[str, str]:
    """Convolutions with a channel count that is not the original's and not a multiple of 8: node -> ' (16 -> 13 channels)'."""
    before, now = channels(original), channels(model)
    found = {}
    for node, counts in now.items():
        if any(n != o and n % BLOCK for n, o in zip(counts, before.get(node, counts), strict=True)):
            found[node] = f" ({counts[0]} -> {counts[1]} channels)"
    return found


def channels(model: Model) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of each convolution of the main graph, by node."""
    shapes = {c.name: c.shape for c in model.constants()}
    layers = [(layer, shapes[layer.weight]) for layer in find_layers(model)[0] if layer.window is not None]
    return {layer.node: (int(shape[1]) * layer.groups, int(shape[0])) for layer, shape in layers}


def lagging(original: Model, work: Model, feed: Feed) -> tuple[list[Lag], float]:
    """Layers that both models have and that lag, the most time first; and the share of the result's time outside of layers, 0 where
    some are quantised: those are not among the layers that are known here."""
    (old, _), (new, idle) = _layer_times((original, work), feed)
    before, after = ({n.name: n.macs for n in costs(m).nodes} for m in (original, work))
    found = []
    for node, time in new.items():
        if node in old and before.get(node) and node in after and old[node] > 0:
            share = after[node] / before[node]
            if out_of_step(share, time / old[node]):
                found.append(Lag(node, time / old[node], share, time - share * old[node]))
    quantised = any(n.op == "DequantizeLinear" or n.domain == OWN for n in work.nodes())
    return sorted(found, key=lambda lag: -lag.excess), 0.0 if quantised else idle


def _layer_times(models: Sequence[Model], feed: Feed) -> list[tuple[dict[str, float], float]]:
    """Of each model: median milliseconds by layer, and the share of the time that is in other nodes."""
    result = []
    for model, times in zip(models, profiled(models, feed), strict=True):
        names = _names(model)
        layers: dict[str, float] = {}
        for name, ms in times.items():
            if name in names:
                layers[names[name]] = layers.get(names[name], 0.0) + ms
        total = sum(times.values())
        result.append((layers, 1 - sum(layers.values()) / total if total else 0.0))
    return result


def _names(model: Model) -> dict[str, str]:
    """What onnxruntime may call a layer, by itself, its output or that of the activation it takes in -> the node."""
    tensors = model.tensors()
    found: dict[str, str] = {}
    for layer in find_layers(model)[0]:
        for name in (layer.node, layer.y, *_activation(layer, tensors)):
            found.setdefault(name, layer.node)
    return found


def _activation(layer: Layer, tensors: Mapping[str, object]) -> list[str]:
    readers = getattr(tensors.get(layer.y), "outputs", [])
    return [readers[0].outputs[0].name] if len(readers) == 1 and readers[0].op in _FUSED else []


def profiled(models: Sequence[Model], feed: Feed, *, rounds: int = _ROUNDS) -> list[dict[str, float]]:
    """Median milliseconds of every node that onnxruntime runs, by the name of what it was made of; the models take turns."""
    runners = []
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        for number, model in enumerate(models):
            with runnable(model) as content:
                runners.append(session(content, profile=Path(folder) / f"{number}"))
        for _ in range(rounds):
            for runner in runners:
                run(runner, feed)
        return [_medians(Path(runner.end_profiling())) for runner in runners]


def _medians(file: Path) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for event in loads(file.read_text("utf8")):
        match = _KERNEL.fullmatch(event["name"]) if event.get("cat") == "Node" else None
        if match is not None:
            times.setdefault(match[1], []).append(event["dur"] / 1e3)
    return {name: float(np.median(taken)) for name, taken in times.items()}
