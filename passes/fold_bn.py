"""fold-bn: BatchNormalization into the weights around it."""

from __future__ import annotations

from graphopt.affine_fold import fold
from graphopt.context import Context
from graphopt.model import Model
from graphopt.registry import register


@register("fold-bn", exact=True)
def fold_bn(model: Model, context: Context) -> int:
    """Conv -> BatchNormalization becomes Conv; likewise ConvTranspose, Gemm and MatMul, from either side.

    A BatchNormalization in inference form is one scale and one shift a channel. It moves together with the Mul, Add, Sub and
    Div nodes next to it, through operators that commute with it, into weights that only this node uses; what nothing absorbs
    stays. Exact: computed in float64 and rounded once. Every choice and refusal is in docs/folding.md.
    """
    return fold(model, context, ops=frozenset({"BatchNormalization"}))
