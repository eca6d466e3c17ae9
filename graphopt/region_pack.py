"""INT8 weights of a region stored in blocks, without the blocks that are zero, where that is smaller."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx

from graphopt.edit import peek
from graphopt.kernels.plan import CONV, IOHW, KN, Packed, Plan
from graphopt.kernels.sparse_plan import BLOCKS, fits, to_sparse
from graphopt.operands import Names
from graphopt.region_values import Given

SMALLER = 0.75  # of the dense size, from which a weight is packed
LEAST = 1024  # weights of a constant that is worth it


def pack_weights(plan: Plan, constants: Sequence[Given], names: Names) -> tuple[Plan, list[Given]]:
    """The plan and constants with weights packed; the body makes the dense ones of them."""
    made, packs = list(constants), []
    packed: list[Given] = []
    for index, turned in _weights(plan).items():
        given = made[index]
        values = peek(given.tensor)
        if values.dtype != np.int8 or values.size < LEAST or not 2 <= values.ndim <= 4 or (turned and values.ndim != 2):
            continue
        matrix = np.ascontiguousarray(values.T) if turned else values.reshape(values.shape[0], -1)
        found = _smallest(matrix)
        if found is None:
            continue
        block, stored, gaps = found
        one, two = (names.constant(f"{given.tensor.name}_{part}", array) for part, array in (("values", stored), ("gaps", gaps)))
        prologue = _decode(matrix.shape, block, values.shape, turned, (one.name, two.name, given.name))
        made[index] = Given(one, one.name, (*prologue, *given.prologue))
        packs.append(Packed(index, len(constants) + len(packed), block, values.shape, turned))
        packed.append(Given(two, two.name))
    return replace(plan, packed=packs), [*made, *packed]


def _weights(plan: Plan) -> dict[int, bool]:
    """Positions of weights that may be packed, and whether they are [inputs, outputs]: of all their readers in one order."""
    orders: dict[int, set[int]] = {}
    for step in plan.steps:
        if step.kind == CONV:
            orders.setdefault(step.weight, set()).add(step.order)
    return {index: order == {KN} for index, order in orders.items() if len(order) == 1 and IOHW not in order}


def _smallest(matrix: np.ndarray) -> tuple[tuple[int, int], np.ndarray, np.ndarray] | None:
    """Block, values and gaps of the smallest form, if it is small enough."""
    if np.count_nonzero(matrix) > SMALLER * matrix.size:
        return None
    found = [(block, *to_sparse(matrix, block)) for block in BLOCKS if fits(matrix.shape, block)]
    best = min(found, key=lambda f: f[1].nbytes + f[2].nbytes)
    return best if best[1].nbytes + best[2].nbytes < SMALLER * matrix.size else None


def _decode(
    matrix: tuple[int, ...], block: tuple[int, int], shape: tuple[int, ...], turned: bool, names: tuple[str, str, str]
) -> list[onnx.NodeProto]:
    """Nodes that make the dense weight, the last of `names`, from values and gaps, the first two."""
    (n, k), (rows, columns), (values, gaps, dense) = matrix, block, names
    down, across = n // rows, k // columns
    made: list[onnx.NodeProto] = []

    def node(op: str, inputs: Sequence[str], output: str = "", **attributes: Any) -> str:
        output = output or f"{dense}_unpacked{len(made)}"
        made.append(onnx.helper.make_node(op, inputs, [output], **attributes))
        return output

    def number(*value: int) -> str:
        return node("Constant", [], value=onnx.numpy_helper.from_array(np.array(value, np.int64)))

    axis = node("Constant", [], value=onnx.numpy_helper.from_array(np.array(0, np.int64)))
    places = node("CumSum", [node("Cast", [gaps], to=onnx.TensorProto.INT64), axis])
    indices = node("Reshape", [node("Sub", [places, number(1)]), number(-1, 1)])
    zero = onnx.helper.make_tensor("", onnx.TensorProto.INT8, [1], [0])
    zeros = node("ConstantOfShape", [number(down * across, rows * columns)], value=zero)
    cut = node("Reshape", [node("ScatterND", [zeros, indices, values]), number(down, across, rows, columns)])
    lines = node("Transpose", [cut], perm=[0, 2, 1, 3])
    if turned:
        node("Transpose", [node("Reshape", [lines, number(n, k)])], dense, perm=[1, 0])
    else:
        node("Reshape", [lines, number(*shape)], dense)
    return made
