"""Embedding tables: a large constant that is only looked up is stored as int8, and the rows found are dequantised."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.attributes import op_key
from graphopt.edit import set_input, set_output
from graphopt.model import Model
from graphopt.operands import Names
from graphopt.quant import weight_value
from graphopt.quant_numbers import quantise_weight
from graphopt.quant_plan import Selection

LEAST = 1 << 16  # elements: below, the bytes saved are not worth a node


def quantise_tables(model: Model, selection: Selection) -> list[str]:
    """Gather(table, i) -> DequantizeLinear(Gather(int8 table, i)), one scale a column; returns the names of the tables.

    Weights only: it saves bytes on disk and in memory, and costs the dequantisation of the rows found.
    """
    names, home = Names(model), {id(n) for n in model.graph.nodes}
    done = []
    for table in model.constants():
        large = len(table.shape) == 2 and table.dtype == np.float32 and np.prod(table.shape) >= LEAST
        readers = {id(n): n for n in table.outputs} if large else {}
        if readers and all(id(n) in home and _looks_up(n, table) and not selection.refuses(n) for n in readers.values()):
            _quantise(model, table, list(readers.values()), names)
            done.append(table.name)
    return done


def _looks_up(node: gs.Node, table: gs.Constant) -> bool:
    return op_key(node) == "Gather" and node.attrs.get("axis", 0) == 0 and node.inputs[0] is table


def _quantise(model: Model, table: gs.Constant, readers: list[gs.Node], names: Names) -> None:
    values = weight_value(readers[0], 0)
    assert values is not None  # it is a constant
    weight = quantise_weight(values, 1, bits=8)
    integers = names.constant(f"{table.name}_q", weight.values)
    scale = names.constant(f"{table.name}_scale", weight.scales)
    zero = names.constant(f"{table.name}_zero", np.zeros(weight.scales.shape, np.int8))
    for node in readers:
        found, rows = node.outputs[0], gs.Variable(names.fresh(f"{node.outputs[0].name}_q"))
        set_input(node, 0, integers)
        set_output(node, 0, rows)
        model.graph.nodes.append(
            gs.Node("DequantizeLinear", names.fresh(f"{found.name}_DQ"), {"axis": -1}, [rows, scale, zero], [found])
        )
