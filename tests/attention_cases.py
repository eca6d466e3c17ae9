"""Attention as single operators and in layouts that the exports in tests/models do not have; see `dim_cases`."""

from __future__ import annotations

from dim_cases import Case

_MICROSOFT = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>\n'
_23 = '<ir_version: 11, opset_import: ["" : 23]>\n'
_SIZES = {"B": 2, "S": 5, "T": 6}

ATTENTION = {
    "Attention, flat, two key heads for four": Case(
        _23
        + """g (float[B,S,6] x, float[6,16] w1, float[6,8] w2, float[6,12] w3, float[24,2] w4) => (float[B,S,2] y)
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        a = Attention<q_num_heads=4, kv_num_heads=2, is_causal=1>(q, k, v)  y = MatMul(a, w4) }""",
        (2,),
        _SIZES,
    ),
    "Attention, flat, one key head for all": Case(
        _23
        + """g (float[B,S,6] x, float[6,12] w1, float[6,4] w2, float[6,4] w3, float[12,2] w4, float[3,5,5] m) => (float[B,S,2] y)
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        a = Attention<q_num_heads=3, kv_num_heads=1>(q, k, v, m)  y = MatMul(a, w4) }""",
        (3,),
        _SIZES,
    ),
    "Attention by head, values of another width": Case(
        _23
        + """g (float[B,3,S,6] x, float[3,6,4] w1, float[3,6,4] w2, float[3,6,5] w3, float[3,5,2] w4) => (float[B,1,S,2] y)
        <int64[1] one = {1}>
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)  a = Attention(q, k, v)  h = MatMul(a, w4)
        y = ReduceSum(h, one) }""",
        (5,),
        _SIZES,
    ),
    "Attention with a cache that is given on: query heads go equally": Case(
        _23
        + """g (float[2,S,6] x, float[2,2,P,4] xk, float[2,2,P,4] xv, float[6,4,4] w1, float[6,2,4] w2, float[6,2,4] w3,
        float[4,4,2] w4) => (float[2,S,2] y, float[2,2,Q,4] k2, float[2,2,Q,4] v2)
        { q = Einsum<equation="bsc,chd->bhsd">(x, w1)  k = Einsum<equation="bsc,chd->bhsd">(x, w2)
        v = Einsum<equation="bsc,chd->bhsd">(x, w3)  a, k2, v2 = Attention(q, k, v, , xk, xv)
        y = Einsum<equation="bhsd,hdo->bso">(a, w4) }""",
        (2,),
        {"S": 5, "P": 3},
    ),
    "rotary positions, flat": Case(
        _23
        + """g (float[B,5,6] x, float[6,12] w1, float[6,12] w2, float[6,12] w3, float[9,2] c, float[9,2] s, float[12,2] w4,
        int64[B,5] xi) => (float[B,5,2] y)
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)  qr = RotaryEmbedding<num_heads=3>(q, c, s, xi)
        kr = RotaryEmbedding<num_heads=3>(k, c, s, xi)  a = Attention<q_num_heads=3, kv_num_heads=3>(qr, kr, v)
        y = MatMul(a, w4) }""",
        (3,),
        _SIZES,
    ),
    "packed weights, wide values, bias on the scores": Case(
        _MICROSOFT
        + """g (float[B,5,6] x, float[6,39] w1, float[39] b1, float[15,2] w2, float[1,3,5,5] m) => (float[B,5,2] y)
        { a = com.microsoft.Attention<num_heads=3, qkv_hidden_sizes=[12,12,15]>(x, w1, b1, , , m)  y = MatMul(a, w2) }""",
        (3,),
        _SIZES,
    ),
    "packed weights, equal": Case(
        _MICROSOFT
        + """g (float[B,S,6] x, float[6,36] w1, float[36] b1, float[12,2] w2) => (float[B,S,2] y)
        { a = com.microsoft.Attention<num_heads=3, unidirectional=1>(x, w1, b1)  y = MatMul(a, w2) }""",
        (3,),
        _SIZES,
    ),
    "multi-head, cross": Case(
        _MICROSOFT
        + """g (float[B,S,6] x, float[B,T,6] x2, float[6,12] w1, float[6,12] w2, float[6,12] w3, float[36] b, float[12,2] w4)
        => (float[B,S,2] y) { q = MatMul(x, w1)  k = MatMul(x2, w2)  v = MatMul(x2, w3)
        a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k, v, b)  y = MatMul(a, w4) }""",
        (3,),
        _SIZES,
    ),
    "multi-head, keys and values by head": Case(
        _MICROSOFT
        + """g (float[B,S,6] x, float[6,12] w1, float[6,12] w2, float[6,12] w3, float[12,2] w4) => (float[B,S,2] y)
        <int64[4] i = {0,0,3,4}>
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)  k1 = Reshape(k, i)  v1 = Reshape(v, i)
        k2 = Transpose<perm=[0,2,1,3]>(k1)  v2 = Transpose<perm=[0,2,1,3]>(v1)
        a = com.microsoft.MultiHeadAttention<num_heads=3>(q, k2, v2)  y = MatMul(a, w4) }""",
        (3,),
        _SIZES,
    ),
    "grouped queries": Case(
        _MICROSOFT
        + """g (float[2,5,6] x, float[6,64] w1, float[6,32] w2, float[6,32] w3, float[64,2] w4) => (float[2,5,2] y)
        <int32[2] n = {4,4}, int32 t = {5}>
        { q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        a, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2>(q, k, v, , , n, t)  y = MatMul(a, w4) }""",
        (2,),
    ),
    "grouped queries, packed, rotary": Case(
        _MICROSOFT
        + """g (float[2,5,6] x, float[6,128] w1, float[9,8] c, float[9,8] s, float[64,2] w4) => (float[2,5,2] y)
        <int32[2] n = {4,4}, int32 t = {5}>
        { q = MatMul(x, w1)
        a, pk, pv = com.microsoft.GroupQueryAttention<num_heads=4, kv_num_heads=2, do_rotary=1>(q, , , , , n, t, c, s)
        y = MatMul(a, w4) }""",
        (2,),
    ),
    "fused products and rotary of onnxruntime": Case(
        _MICROSOFT
        + """g (float[B,5,6] x, float[12,6] w1, float[6,12] w2, float[6,12] w3, float[12,2] w4, float[9,2] c, float[9,2] s,
        int64[B,5] xi) => (float[B,5,2] y) <int64[4] i = {0,0,3,4}, int64[3] j = {0,0,12}>
        { q = com.microsoft.FusedMatMul<transB=1, alpha=0.5>(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)
        qr = com.microsoft.RotaryEmbedding<num_heads=3, rotary_embedding_dim=4>(q, xi, c, s)
        kr = com.microsoft.RotaryEmbedding<num_heads=3, rotary_embedding_dim=4>(k, xi, c, s)
        q1 = Reshape(qr, i)  k1 = Reshape(kr, i)  v1 = Reshape(v, i)  q2 = Transpose<perm=[0,2,1,3]>(q1)
        k2 = Transpose<perm=[0,2,1,3]>(k1)  v2 = Transpose<perm=[0,2,1,3]>(v1)
        p = com.microsoft.FusedMatMul<transB=1>(q2, k2)  z = Softmax<axis=-1>(p)  a = MatMul(z, v2)
        a1 = Transpose<perm=[0,2,1,3]>(a)  a2 = Reshape(a1, j)  y = MatMul(a2, w4) }""",
        (3,),
        _SIZES,
    ),
    "einsum": Case(
        """g (float[B,S,6] x, float[6,3,4] w1, float[6,3,4] w2, float[6,3,5] w3, float[3,5,2] w4) => (float[B,S,2] y)
        { q = Einsum<equation="bsc,chd->bshd">(x, w1)  k = Einsum<equation="bsc, chd -> bhsd">(x, w2)
        v = Einsum<equation="bsc,chd->bshd">(x, w3)  s = Einsum<equation="bqhd,bhkd->bhqk">(q, k)  p = Softmax<axis=-1>(s)
        a = Einsum<equation="bhqk,bkhd->bqhd">(p, v)  y = Einsum<equation="bqhd,hdo->bqo">(a, w4) }""",
        (3, 5),
        _SIZES,
    ),
    "embedding and normalisation of onnxruntime": Case(
        _MICROSOFT
        + """g (int32[B,S] x, float[9,6] w1, float[9,6] w2, float[6] s1, float[6] b1, float[6,10] w3, float[10] b3, float[10,6] w4,
        float[6] s2, float[6] b2, float[6] b4, float[6,2] w5) => (float[B,S,2] y)
        { e, m = com.microsoft.EmbedLayerNormalization(x, , w1, w2, , s1, b1)  h = MatMul(e, w3)  g1 = com.microsoft.BiasGelu(h, b3)
        d = MatMul(g1, w4)  n, , , t = com.microsoft.SkipLayerNormalization(d, e, s2, b2, b4)  u = Add(n, t)
        y = MatMul(u, w5) }""",
        (10,),
        {"B": 2, "S": 5},
    ),
}

# onnxruntime runs these on GPUs only
PACKED = {
    "all": """g (float[B,S,6] x, float[6,36] w1, float[36] b1, float[12,2] w2) => (float[B,S,2] y) <int64[5] i = {0,0,3,3,4}>
        { q = MatMul(x, w1)  qb = Add(q, b1)  p = Reshape(qb, i)  a = com.microsoft.MultiHeadAttention<num_heads=3>(p)
        y = MatMul(a, w2) }""",
    "keys and values": """g (float[B,S,6] x, float[6,12] w0, float[6,24] w1, float[12,2] w2) => (float[B,S,2] y)
        <int64[5] i = {0,0,3,2,4}> { q = MatMul(x, w0)  k = MatMul(x, w1)  p = Reshape(k, i)
        a = com.microsoft.MultiHeadAttention<num_heads=3>(q, p)  y = MatMul(a, w2) }""",
}
PACKED = {name: _MICROSOFT + text for name, text in PACKED.items()}
