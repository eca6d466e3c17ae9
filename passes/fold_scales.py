"""fold-scales: per-channel scales and shifts into the weights around them."""

from __future__ import annotations

from graphopt.affine import SOURCES
from graphopt.affine_fold import fold
from graphopt.context import Context
from graphopt.model import Model
from graphopt.registry import register


@register("fold-scales", exact=True)
def fold_scales(model: Model, context: Context) -> int:
    """Conv -> Mul -> Add becomes Conv; Sub -> Div -> Conv becomes Conv; MatMul -> Add becomes Gemm.

    Mul, Add, Sub and Div by a constant that varies along one axis at most, and BatchNormalization, are merged where they
    follow each other and moved, through operators that commute with them, into the weights of Conv, ConvTranspose, Gemm or
    MatMul before or behind them, wherever that takes nodes away. Exact: computed in float64 and rounded once; a shift in
    front of zero padding stays where it is. Every choice and refusal is in docs/folding.md.
    """
    return fold(model, context, ops=frozenset(SOURCES))
