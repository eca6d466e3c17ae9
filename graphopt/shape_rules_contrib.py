"""Shapes and types of the outputs of onnxruntime's transformer operators (com.microsoft), which ONNX's inference does not know.

The layouts are those of onnxruntime's ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt.onnx_inference import Typed
from graphopt.shape_rules import Site
from graphopt.symbols import Size, Sizes, broadcast_all, divide_exactly, multiply

ContribRule = Callable[[Site], list[Typed]]


def _dtype(site: Site, index: int = 0) -> np.dtype | None:
    return site.known.dtypes.get(site.node.inputs[index].name)


def _skip_layer_normalization(site: Site) -> list[Typed]:
    """Normalised, mean, inverse deviation, and the sum that was normalised."""
    x, dtype = site.shape(), _dtype(site)
    statistics: Sizes | None = None if x is None else (*x[:-1], 1)
    return [(dtype, x), (np.dtype(np.float32), statistics), (np.dtype(np.float32), statistics), (dtype, x)]


def _embed_layer_normalization(site: Site) -> list[Typed]:
    """Normalised [batch, length, hidden], mask lengths [batch], and the sum that was normalised."""
    ids, words, dtype = site.shape(), site.shape(2), _dtype(site, 2)
    y: Sizes | None = None if ids is None or words is None else (*ids, words[1])
    return [(dtype, y), (np.dtype(np.int32), None if ids is None else ids[:1]), (dtype, y)]


def _attention(site: Site) -> list[Typed]:
    """[batch, length, hidden of v], and keys and values [2, batch, heads, length with past, width]."""
    x, w, sizes = site.shape(), site.shape(1), site.node.attrs.get("qkv_hidden_sizes")
    if x is None or w is None:
        return [(_dtype(site), None)] * 2
    hidden = [*sizes] if sizes else [divide_exactly(w[1], 3)] * 3
    heads = int(site.node.attrs["num_heads"])
    return [(_dtype(site), (*x[:2], hidden[2])), (_dtype(site), (2, x[0], heads, None, divide_exactly(hidden[1], heads)))]


def _multi_head_attention(site: Site) -> list[Typed]:
    """[batch, length, hidden of v], and keys and values [batch, heads, length with past, width]."""
    q, k, v, heads = site.shape(), site.shape(1), site.shape(2), int(site.node.attrs["num_heads"])
    source = v or k or q  # values of their own, packed with the keys, or with keys and queries
    if q is None or source is None:
        return [(_dtype(site), None)] * 3
    width = divide_exactly(source[2], heads) if len(source) == 3 else source[-1]
    cache = (_dtype(site), (q[0], heads, None, width))
    return [(_dtype(site), (*q[:2], multiply(width, heads))), cache, cache]


def _group_query_attention(site: Site) -> list[Typed]:
    """[batch, length, hidden of q], and keys and values [batch, key heads, length with past, width]."""
    q, heads, groups = site.shape(), int(site.node.attrs["num_heads"]), int(site.node.attrs["kv_num_heads"])
    if q is None:
        return [(_dtype(site), None)] * 3
    width: Size = divide_exactly(q[2], heads if site.has(1) else heads + 2 * groups)
    cache = (_dtype(site), (q[0], groups, None, width))
    return [(_dtype(site), (*q[:2], multiply(width, heads))), cache, cache]


def _fused_matmul(site: Site) -> list[Typed]:
    """MatMul with the last two axes of either operand swapped."""
    a, b = site.shape(), site.shape(1)
    if a is None or b is None or site.node.attrs.get("transBatchA") or site.node.attrs.get("transBatchB"):
        return [(_dtype(site), None)]
    a = (*a[:-2], a[-1], a[-2]) if site.node.attrs.get("transA") and len(a) > 1 else a
    b = (*b[:-2], b[-1], b[-2]) if site.node.attrs.get("transB") and len(b) > 1 else b
    batch = broadcast_all([a[:-2], b[:-2]])
    return [(_dtype(site), None if batch is None else (*batch, *a[-2:-1], *(b[-1:] if len(b) > 1 else ())))]


def _simplified_layer_normalization(site: Site) -> list[Typed]:
    """As ONNX's RMSNormalization, and the inverse deviation."""
    x = site.shape()
    return [(_dtype(site), x), (np.dtype(np.float32), None if x is None else (*x[:-1], 1))]


CONTRIB_RULES: dict[str, ContribRule] = {
    "SimplifiedLayerNormalization": _simplified_layer_normalization,  # which onnxruntime has in ONNX's domain
    "com.microsoft::Attention": _attention,
    "com.microsoft::EmbedLayerNormalization": _embed_layer_normalization,
    "com.microsoft::FusedMatMul": _fused_matmul,
    "com.microsoft::GroupQueryAttention": _group_query_attention,
    "com.microsoft::MultiHeadAttention": _multi_head_attention,
    "com.microsoft::SimplifiedLayerNormalization": _simplified_layer_normalization,
    "com.microsoft::SkipLayerNormalization": _skip_layer_normalization,
    "com.microsoft::SkipSimplifiedLayerNormalization": _skip_layer_normalization,
}
