"""Random chains of data-moving nodes mean the same after the cleanup passes, for other batch sizes too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from cases import run
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt.context import Context
from graphopt.model import Model, from_proto
from graphopt.registry import find

PASSES = (
    "remove-noops",
    "drop-defaults",
    "merge-reshapes",
    "fuse-pads",
    "common-subexpressions",
    "merge-initializers",
    "dead-code",
)
BATCH = 3  # the axis of this length is dynamic; the reference shape is followed with it


@dataclass
class Chain:
    """A model that grows node by node; `shape` is that of the last tensor when the batch is BATCH."""

    draw: Any
    shape: tuple[int, ...]
    batch: int | None = 0  # the axis that is the batch; None once it is mixed with others
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    last: str = "x"

    def integer(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    def add(self, op: str, shape: tuple[int, ...], *values: list[int], inputs: tuple[str, ...] = (), **attributes: Any) -> None:
        names = []
        for value in values:
            names.append(f"c{len(self.constants)}")
            self.constants.append(numpy_helper.from_array(np.array(value, np.int64), names[-1]))
        result = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *inputs, *names], [result], **attributes))
        self.last, self.shape = result, shape


def transpose(chain: Chain) -> None:
    perm = list(chain.draw(st.permutations(range(len(chain.shape)))))
    if chain.batch is not None:
        chain.batch = perm.index(chain.batch)
    chain.add("Transpose", tuple(chain.shape[p] for p in perm), perm=perm)


def unsqueeze(chain: Chain) -> None:
    if len(chain.shape) < 5:
        axis = chain.integer(0, len(chain.shape))
        if chain.batch is not None and axis <= chain.batch:
            chain.batch += 1
        stored = axis - len(chain.shape) - 1 if chain.integer(0, 1) else axis
        chain.add("Unsqueeze", (*chain.shape[:axis], 1, *chain.shape[axis:]), [stored])


def squeeze(chain: Chain) -> None:
    ones = [i for i, d in enumerate(chain.shape) if d == 1 and i != chain.batch]
    if ones and len(chain.shape) > 1:
        axis = ones[chain.integer(0, len(ones) - 1)]
        if chain.batch is not None and axis < chain.batch:
            chain.batch -= 1
        chain.add("Squeeze", (*chain.shape[:axis], *chain.shape[axis + 1 :]), [axis])


def split_axis(chain: Chain) -> None:
    """Reshape that takes a factor 2 out of an axis, written with 0 and -1 where that is possible."""
    even = [i for i, d in enumerate(chain.shape) if d % 2 == 0 and i != chain.batch]
    if even and len(chain.shape) < 5 and chain.batch is not None:
        axis = even[chain.integer(0, len(even) - 1)]
        target = [0] * axis + [2, chain.shape[axis] // 2] + list(chain.shape[axis + 1 :])
        if chain.batch > axis:
            chain.batch += 1
            target[chain.batch] = -1
        result = (*chain.shape[:axis], 2, chain.shape[axis] // 2, *chain.shape[axis + 1 :])
        chain.add("Reshape", result, target)


def flatten(chain: Chain) -> None:
    axis = chain.integer(0, len(chain.shape))
    result = (int(np.prod(chain.shape[:axis], dtype=int)), int(np.prod(chain.shape[axis:], dtype=int)))
    chain.batch = None
    chain.add("Flatten", result, axis=axis)


def slice_(chain: Chain) -> None:
    free = [i for i, d in enumerate(chain.shape) if d > 1 and i != chain.batch]
    if free and chain.batch is not None:
        axis = free[chain.integer(0, len(free) - 1)]
        size = chain.shape[axis]
        start, end, step = chain.integer(0, size - 1), chain.integer(-1, size + 1), chain.integer(1, 2)
        length = len(range(size)[start:end:step])
        if length:
            result = (*chain.shape[:axis], length, *chain.shape[axis + 1 :])
            chain.add("Slice", result, [start], [end], [axis], [step])


def pad(chain: Chain) -> None:
    axis, amount = chain.integer(0, len(chain.shape) - 1), chain.integer(0, 1)
    if axis != chain.batch and chain.batch is not None:
        pads = [0] * (2 * len(chain.shape))
        pads[axis] = amount
        chain.add("Pad", (*chain.shape[:axis], chain.shape[axis] + amount, *chain.shape[axis + 1 :]), pads)


def double(chain: Chain) -> None:
    axis = chain.integer(0, len(chain.shape) - 1)
    if axis != chain.batch and chain.batch is not None and np.prod(chain.shape) < 500:
        result = (*chain.shape[:axis], 2 * chain.shape[axis], *chain.shape[axis + 1 :])
        chain.add("Concat", result, inputs=(chain.last,), axis=axis)


def relu(chain: Chain) -> None:
    chain.add("Relu", chain.shape)


STEPS = (transpose, unsqueeze, squeeze, split_axis, flatten, slice_, pad, double, relu)


@st.composite
def models(draw: Any) -> onnx.ModelProto:
    chain = Chain(draw, (BATCH, 1, 4, 2))
    for step in draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=9)):
        step(chain)
    chain.add("Sigmoid", chain.shape)
    chain.nodes[-1].output[0] = "y"
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 1, 4, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(chain.shape))
    graph = helper.make_graph(chain.nodes, "g", [x], [y], chain.constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@settings(max_examples=60, deadline=None)
@given(models())
def test_chains_mean_the_same(proto: onnx.ModelProto) -> None:
    model, context = from_proto(proto), Context()
    before = len(model.nodes())
    while sum(_apply(name, model, context) for name in PASSES):
        pass
    assert len(model.nodes()) <= before
    for batch in (BATCH, 1, 2):
        x = np.random.default_rng(batch).standard_normal((batch, 1, 4, 2)).astype(np.float32)
        np.testing.assert_array_equal(run(model.proto(), {"x": x})[0], run(proto, {"x": x})[0])


def _apply(name: str, model: Model, context: Context) -> int:
    changes = find(name).fn(model, context)
    model.sort()
    model.verify()
    context.drop()
    return changes
