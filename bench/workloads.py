"""Named models for benchmarks and scale tests: generated graphs of any size, the shipped digits model, real models, big files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZES = (2_500, 5_000, 10_000, 20_000, 40_000)  # nodes of the generated graphs
CHANNELS, SIDE = 16, 8  # of the images in them
ALIGN = 4096  # where external weights may begin
WIDTH, HIDDEN = 2048, 8192  # of the layers in an external-data model: 64 MiB a weight


@dataclass
class Builder:
    """Nodes and weights of a graph under construction; names are numbered."""

    random: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[TensorProto] = field(default_factory=list)

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node; the name of its output."""
        number = len(self.nodes)
        self.nodes.append(helper.make_node(op, inputs, [f"t{number}"], f"{op}_{number}", **attributes))
        return f"t{number}"

    def weight(self, values: object, dtype: type = np.float32) -> str:
        """An initializer; its name."""
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def normal(self, *shape: int, scale: float) -> str:
        return self.weight(scale * self.random.standard_normal(shape))


def convolution(b: Builder, x: str) -> str:
    """Pad -> Conv -> BatchNormalization -> Relu; one weight in a hundred is a denormal."""
    padded = b.add("Pad", x, b.weight([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
    values = 0.05 * b.random.standard_normal((CHANNELS, CHANNELS, 3, 3))
    values[b.random.random(values.shape) < 0.01] = 1e-40
    y = b.add("Conv", padded, b.weight(values), b.normal(CHANNELS, scale=0.1))
    scale, shift, mean = (b.normal(CHANNELS, scale=0.1) for _ in range(3))
    return b.add("Relu", b.add("BatchNormalization", y, scale, shift, mean, b.weight(np.ones(CHANNELS))))


def views(b: Builder, x: str) -> str:
    """A reshape by shape arithmetic, two transposes that cancel, and the way back: nothing in all."""
    batch = b.add("Gather", b.add("Shape", x), b.weight(0, np.int64), axis=0)
    target = b.add("Concat", b.add("Unsqueeze", batch, b.weight([0], np.int64)), b.weight([CHANNELS, -1], np.int64), axis=0)
    y = b.add("Transpose", b.add("Reshape", x, target), perm=[0, 2, 1])
    y = b.add("Transpose", b.add("Identity", y), perm=[0, 2, 1])
    return b.add("Reshape", y, b.weight([0, CHANNELS, SIDE, SIDE], np.int64))


def duplicates(b: Builder, x: str) -> str:
    """Two equal branches, with weights of equal bytes under two names, added; a third is dead."""
    values = 0.1 * b.random.standard_normal((CHANNELS, CHANNELS, 1, 1))
    first, second, dead = (b.add("Sigmoid", b.add("Conv", x, b.weight(values))) for _ in range(3))
    b.add("Mul", dead, dead)
    return b.add("Add", first, second)


def constants(b: Builder, x: str) -> str:
    """Arithmetic on constants, and operators that do nothing."""
    factor = b.add("Mul", b.add("Add", b.weight(0.25), b.weight(0.5)), b.weight(np.full((1, CHANNELS, 1, 1), 0.5)))
    y = b.add("Cast", b.add("Mul", x, factor), to=TensorProto.FLOAT)
    return b.add("Dropout", b.add("Identity", y))


def window(b: Builder, x: str, source: str) -> str:
    """A slice to the size of the graph's input, read through its Shape each time as exporters do."""
    height = b.add("Gather", b.add("Shape", source), b.weight([2], np.int64), axis=0)
    return b.add("Slice", x, b.weight([0], np.int64), height, b.weight([2], np.int64))


def generated(nodes: int, *, seed: int = 0) -> onnx.ModelProto:
    """A deep graph of about (at least) that many nodes with work for every cleanup pass; runs in onnxruntime, batch dynamic.

    Each block adds its branches to its input and bounds the sum by Tanh, so that values neither vanish nor explode.
    """
    b, x = Builder(np.random.default_rng(seed)), "x"
    while len(b.nodes) < nodes:
        y = constants(b, duplicates(b, views(b, convolution(b, x))))
        x = b.add("Tanh", b.add("Add", x, window(b, y, "x")))
    shape: list[str | int | None] = ["batch", CHANNELS, SIDE, SIDE]
    graph = helper.make_graph(
        b.nodes,
        f"generated_{nodes}",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, shape)],
        b.weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def digits() -> Path:
    """The model that ships in the package; beside it lie digits_calib.npz and digits_eval.npz."""
    return Path(str(resources.files("graphopt") / "assets" / "digits.onnx"))


def real(id: str) -> Path:
    """A model of tests/zoo.py, which must be on the path. Raises zoo.Unavailable where it is neither cached nor to be had."""
    from zoo import fetch

    return fetch(id)


def external(folder: Path, size: int, *, width: int = WIDTH, hidden: int = HIDDEN) -> Path:
    """A residual MLP of about `size` bytes (at least) in `folder`/big.onnx with its weights in big.onnx.data.

    Weights are random and streamed to disk one block of rows at a time. Between the layers stand no-ops, equal subexpressions
    and dead branches; every hidden dimension can be pruned.
    """
    path = folder / "big.onnx"
    b, x = Builder(), "x"
    with path.with_name("big.onnx.data").open("wb") as file:

        def matrix(rows: int, columns: int) -> str:
            offset = file.tell() + -file.tell() % ALIGN
            file.seek(offset)
            for block in _blocks(b.random, rows, columns):
                file.write(block.tobytes())
            tensor = TensorProto(name=f"m{len(b.weights)}", data_type=TensorProto.FLOAT, dims=[rows, columns])
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", "big.onnx.data"), ("offset", str(offset)), ("length", str(4 * rows * columns))):
                tensor.external_data.add(key=key, value=value)
            b.weights.append(tensor)
            return tensor.name

        while file.tell() < size:
            y = b.add("Add", b.add("MatMul", b.add("Identity", x), matrix(width, hidden)), b.normal(hidden, scale=0.1))
            first, second = b.add("Relu", y), b.add("Relu", y)
            b.add("Sigmoid", first)
            y = b.add("MatMul", b.add("Max", first, second), matrix(hidden, width))
            x = b.add("Tanh", b.add("Add", x, b.add("Dropout", y)))
    graph = helper.make_graph(
        b.nodes,
        "big",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, ["batch", width])],
        b.weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def _blocks(random: np.random.Generator, rows: int, columns: int) -> Iterator[np.ndarray]:
    """Rows of a random matrix, about 8 MB at a time."""
    step = max(1, (8 << 20) // (4 * columns))
    for start in range(0, rows, step):
        yield random.standard_normal((min(step, rows - start), columns), np.float32) * np.float32(rows**-0.5)
