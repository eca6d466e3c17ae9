"""Attention as one operator, of ONNX and of onnxruntime, and rotary positions. Heads are free, features inside a head are summed.

Queries of several heads may share a head of keys and values: then a head of keys goes with all its queries, or, where there is one
head of keys only, single heads of queries go.
"""

from __future__ import annotations

import numpy as np

from graphopt.dim_labels import ONE, Labels, is_one
from graphopt.dim_rules import Axes, PinError, Result, Site, rule
from graphopt.dim_rules_linear import contract
from graphopt.dim_rules_reshape import fold, unfold

_INSIDE = "features inside a head are summed"
_LENGTH = "attention looks at all positions"
_BATCH = "rows of a batch that masks and caches belong to"


def _heads(site: Site, labels: Labels, count: int) -> tuple[Labels, Labels]:
    """An axis of heads x width as its two parts."""
    if count < 1 or labels.size % count or labels.size == 1:
        raise PinError("the number of heads is not known, or does not divide the axis")
    width = labels.size // count
    if count == 1 or width == 1:
        return (ONE, labels) if count == 1 else (labels, ONE)
    heads, features = unfold(site, labels, [count, width])
    return heads, features


def _joined(site: Site, heads: Labels, features: Labels) -> Labels:
    """heads x width as one axis."""
    parts = [labels for labels in (heads, features) if not is_one(labels)]
    return parts[0] if len(parts) == 1 else fold(site, parts) if parts else ONE


def _attend(site: Site, queries: tuple[Labels, Labels], keys: tuple[Labels, Labels], values: tuple[Labels, Labels]) -> None:
    """Heads and features of the three: what is summed inside a head stays, heads that work together go together."""
    site.pin_axes([queries[1], keys[1]], _INSIDE)
    for index in range(3):
        if site.has(index) and len(axes := site.axes(index)) > 2:
            site.pin(axes[0], _BATCH)
    site.tie(keys[0], values[0])
    many, few = queries[0].size, keys[0].size
    if many % few:
        raise PinError("the heads of the queries are no multiple of those of the keys")
    if many == few:
        site.tie(queries[0], keys[0])
    else:  # query head h reads key head h // (many // few)
        site.tie(queries[0], _joined(site, keys[0], site.dims.classes.fresh(many // few)))


def _bias(site: Site, index: int, heads: Labels) -> None:
    """A mask or bias on the scores: [batch, heads, queries, keys], the first two of which may be missing or of size 1."""
    if site.has(index):
        axes = site.axes(index)
        site.pin_axes([*axes[:-3], *axes[-2:]], _LENGTH)
        if len(axes) > 2 and not is_one(axes[-3]):
            site.tie(axes[-3], heads)


def _cache(site: Site, index: int, heads: Labels, features: Labels) -> None:
    """Keys or values from before, [..., heads, length, width]: all but the heads stays."""
    if site.has(index):
        axes = site.axes(index)
        site.pin_axes([*axes[:-3], *axes[-2:]], "kept from earlier steps")
        site.tie(axes[-3], heads)
        site.tie(axes[-1], features)


@rule("Attention")
def attention(site: Site) -> Result:
    """[batch, heads, length, width] three times, or [batch, length, heads * width]."""
    q, k, v = (site.axes(i) for i in range(3))
    flat = len(q) == 3
    for x in (q, k, v):
        site.pin(x[1 if flat else 2], _LENGTH)
    if flat:
        many, few = int(site.attr("q_num_heads") or 0), int(site.attr("kv_num_heads") or 0)
        queries, keys, values = _heads(site, q[2], many), _heads(site, k[2], few), _heads(site, v[2], few)
    else:
        queries, keys, values = ((x[1], x[3]) for x in (q, k, v))
    _attend(site, queries, keys, values)
    _bias(site, 3, queries[0])
    _cache(site, 4, *keys)
    _cache(site, 5, *values)
    length = site.pinned(None, _LENGTH)
    y = [q[0], q[1], _joined(site, queries[0], values[1])] if flat else [*q[:3], values[1]]
    caches = [[q[0], keys[0], length, part[1]] for part in (keys, values)]
    return [y, *caches, [q[0], queries[0], length, length]][: len(site.node.outputs)]


@rule("com.microsoft::Attention")
def packed_attention(site: Site) -> Result:
    """[batch, length, hidden] times [hidden, q + k + v], each of them heads * width."""
    x, w, count = site.axes(), site.axes(1), int(site.attr("num_heads") or 0)
    if not site.vanishes(1):
        raise PinError("the weights of an Attention are not constant")
    contract(site, x[2], w[0], (0, 1))
    if site.has(2):
        site.tie(site.axes(2)[0], w[1])
    sizes = site.node.attrs.get("qkv_hidden_sizes") or [w[1].size // 3] * 3
    if sum(sizes) != w[1].size:
        raise PinError("the weights are not as wide as queries, keys and values")
    queries, keys, values = (_heads(site, part, count) for part in np.split(w[1], np.cumsum(sizes)[:2]))
    _attend(site, queries, keys, values)
    site.pin(x[1], _LENGTH)
    _cache(site, 4, *keys)
    _bias(site, 5, queries[0])
    if len(site.node.outputs) > 1 or site.has(4):
        site.pin(values[1], "kept from earlier steps")
    length = site.pinned(None, _LENGTH)
    y = [*x[:2], _joined(site, queries[0], values[1])]
    return [y, [site.pinned(2, "keys and values"), x[0], keys[0], length, keys[1]]][: len(site.node.outputs)]


@rule("com.microsoft::MultiHeadAttention")
def multi_head_attention(site: Site) -> Result:
    """Queries [batch, length, heads * width], keys and values alike, [batch, heads, length, width], or packed for each head."""
    count = int(site.attr("num_heads") or 0)
    x = [site.axes(i) if site.has(i) else None for i in range(3)]
    first = x[0] or []
    parts = [_part(site, axes, count) for axes in x if axes is not None]
    queries, keys, values = parts[0], parts[min(1, len(parts) - 1)], parts[-1]
    _attend(site, queries, keys, values)
    if site.has(3):
        site.tie(site.axes(3)[0], np.concatenate([_joined(site, *part) for part in (queries, keys, values)]))
    _bias(site, 5, queries[0])
    _cache(site, 6, *keys)
    _cache(site, 7, *values)
    length = site.pinned(None, _LENGTH)
    caches = [[first[0], keys[0], length, part[1]] for part in (keys, values)]
    y = [first[0], first[1], _joined(site, queries[0], values[1])]
    return [y, *caches, [first[0], queries[0], length, length]][: len(site.node.outputs)]


def _part(site: Site, axes: Axes, count: int) -> tuple[Labels, Labels]:
    """Heads and features of one input of a MultiHeadAttention; all else stays."""
    if len(axes) == 3:  # [batch, length, heads * width]
        site.pin(axes[1], _LENGTH)
        return _heads(site, axes[2], count)
    if len(axes) == 4:  # [batch, heads, length, width]
        site.pin(axes[2], _LENGTH)
        return axes[1], axes[3]
    site.pin_axes([axes[1], *axes[3:]], _INSIDE)  # [batch, length, heads, 3 or 2, width]
    return axes[2], axes[4]


@rule("com.microsoft::GroupQueryAttention")
def group_query_attention(site: Site) -> Result:
    """Queries [batch, length, heads * width] and fewer heads of keys and values, or all three side by side in one input."""
    x, many, few = site.axes(), int(site.attr("num_heads") or 0), int(site.attr("kv_num_heads") or 0)
    site.pin(x[1], _LENGTH)
    if site.has(1):
        k, v = site.axes(1), site.axes(2)
        site.pin_axes([k[1], v[1]], _LENGTH)
        flat = [x[2], k[2], v[2]]
    else:
        width = x[2].size // max(many + 2 * few, 1)
        flat = np.split(x[2], [many * width, (many + few) * width])
    queries, keys, values = (_heads(site, labels, n) for labels, n in zip(flat, (many, few, few), strict=True))
    _attend(site, queries, keys, values)
    _cache(site, 3, *keys)
    _cache(site, 4, *values)
    _bias(site, 10, queries[0])
    if site.has(11):  # one more logit for each head
        site.tie(site.axes(11)[0], queries[0])
    length = site.pinned(None, _LENGTH)
    site.pin(values[1], _INSIDE)  # the width is one for all three
    caches = [[x[0], keys[0], length, part[1]] for part in (keys, values)]
    y = [x[0], x[1], _joined(site, queries[0], values[1])]
    return [y, *caches, [x[0], queries[0], length, length]][: len(site.node.outputs)]


@rule("RotaryEmbedding", "com.microsoft::RotaryEmbedding")
def rotary_embedding(site: Site) -> Result:
    """[batch, heads, length, width] or [batch, length, heads * width]: features of a head turn in pairs, heads on their own."""
    x, count = site.axes(), int(site.attr("num_heads") or 0)
    site.pin(x[0], _BATCH)
    if len(x) == 4:
        site.pin_axes(x[2:], "rotated by position, in pairs")
        return [x]
    if not count:
        raise PinError("the number of heads is not known")
    site.pin(x[1], "rotated by position")
    heads, features = _heads(site, x[2], count)
    site.pin(features, "rotated in pairs")
    return [[*x[:2], _joined(site, heads, features)]]
