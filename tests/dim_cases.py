"""Small models, one for each way in which dimensions couple: ONNX text, and the sizes of the groups that must come out.

The text is a graph; inputs whose name does not start with x are weights (see `soundness.model`).
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Case:
    """`units`: units of each group, in order. `symbols`: sizes of dynamic axes to run with."""

    text: str
    units: tuple[int, ...]
    symbols: dict[str, int] = field(default_factory=dict)
    opset: int = 17


CONVOLUTIONS = {
    "conv-bn-relu-conv": Case(
        """g (float[1,3,8,8] x, float[6,3,3,3] w1, float[6] b1, float[6] s, float[6] b, float[6] m, float[6] v, float[4,6,1,1] w2)
        => (float[1,4,6,6] y) { a = Conv(x, w1, b1)  n = BatchNormalization(a, s, b, m, v)  r = Relu(n)  y = Conv(r, w2) }""",
        (6,),
    ),
    "sigmoid of zero is not zero": Case(
        """g (float[N,3,8,8] x, float[6,3,3,3] w1, float[4,6,1,1] w2) => (float[N,4,6,6] y)
        { a = Conv(x, w1)  s = Sigmoid(a)  e = Exp(s)  y = Conv(e, w2) }""",
        (6,),
    ),
    "residual": Case(
        """g (float[1,3,8,8] x, float[6,3,1,1] w1, float[6,6,3,3] w2, float[5,6,3,3] w3, float[6,5,3,3] w4, float[6,1,1] s,
        float[2,6,1,1] w5) => (float[1,2,8,8] y) { a = Conv(x, w1)  b = Conv<pads=[1,1,1,1]>(a, w2)  c = Add(a, b)
        d = Conv<pads=[1,1,1,1]>(c, w3)  e = Conv<pads=[1,1,1,1]>(d, w4)  f = Mul(e, s)  h = Add(f, c)  y = Conv(h, w5) }""",
        (6, 5),
    ),
    "grouped": Case(
        """g (float[1,3,5,5] x, float[8,3,1,1] w1, float[12,4,3,3] w2, float[2,12,1,1] w3) => (float[1,2,3,3] y)
        { a = Conv(x, w1)  b = Conv<group=2>(a, w2)  y = Conv(b, w3) }""",
        (4, 6),
    ),
    "depthwise": Case(
        """g (float[1,3,5,5] x, float[4,3,1,1] w1, float[4,1,3,3] w2, float[4] b2, float[2,4,1,1] w3) => (float[1,2,3,3] y)
        { a = Conv(x, w1)  b = Conv<group=4>(a, w2, b2)  y = Conv(b, w3) }""",
        (4,),
    ),
    "depthwise with multiplier": Case(
        """g (float[1,3,5,5] x, float[4,3,1,1] w1, float[8,1,3,3] w2, float[2,8,1,1] w3) => (float[1,2,3,3] y)
        { a = Conv(x, w1)  b = Conv<group=4>(a, w2)  y = Conv(b, w3) }""",
        (4,),
    ),
    "one and three spatial axes": Case(
        """g (float[1,3,8] x, float[4,3,3] w1, float[5,4,1] w2, float[6,5,1,1,1] w3, float[2,6,1,1,1] w4) => (float[1,2,6,1,1] y)
        <int64[2] i = {3, 4}> { a = Conv(x, w1)  b = Conv(a, w2)  c = Unsqueeze(b, i)  d = Conv(c, w3)  y = Conv(d, w4) }""",
        (4, 5, 6),
    ),
    "transposed": Case(
        """g (float[1,3,5,5] x, float[3,4,2,2] w1, float[4] b1, float[4,6,2,2] w2, float[6,1,2,2] w3, float[6,3,1,1] w4,
        float[6] b4, float[2,6,1,1] w5) => (float[1,2,8,8] y) { a = ConvTranspose(x, w1, b1)  b = ConvTranspose(a, w2)
        c = ConvTranspose<group=6>(b, w3)  d = ConvTranspose<group=2>(c, w4, b4)  y = Conv(d, w5) }""",
        (4, 3, 3),
    ),
    "depthwise transposed with multiplier": Case(
        """g (float[1,3,4,4] x, float[4,3,1,1] w1, float[4,2,2,2] w2, float[8] b2, float[2,8,1,1] w3) => (float[1,2,5,5] y)
        { a = Conv(x, w1)  b = ConvTranspose<group=4>(a, w2, b2)  y = Conv(b, w3) }""",
        (4,),
    ),
    "squeeze and excitation": Case(
        """g (float[1,3,5,5] x, float[6,3,1,1] w1, float[4,6,1,1] w2, float[4] b2, float[6,4,1,1] w3, float[6] b3,
        float[2,6,1,1] w4) => (float[1,2,5,5] y)
        { a = Conv(x, w1)  p = GlobalAveragePool(a)  q = Conv(p, w2, b2)  r = Relu(q)  s = Conv(r, w3, b3)
        t = HardSigmoid(s)  u = Mul(a, t)  y = Conv(u, w4) }""",
        (6, 4),
    ),
    "channel shuffle": Case(
        """g (float[1,3,5,5] x, float[8,3,1,1] w1, float[8,4,1,1] w2, float[8,4,1,1] w3, float[2,8,1,1] w4) => (float[1,2,5,5] y)
        <int64[5] i1 = {1,2,4,5,5}, int64[4] i2 = {1,8,5,5}> { a = Conv(x, w1)  b = Conv<group=2>(a, w2)  c = Reshape(b, i1)
        d = Transpose<perm=[0,2,1,3,4]>(c)  e = Reshape(d, i2)  f = Conv<group=2>(e, w3)  y = Conv(f, w4) }""",
        (4, 2, 4),
    ),
    "pad of a shortcut": Case(
        """g (float[1,3,8,8] x, float[4,3,1,1] w1, float[8,4,1,1] w2, float[2,8,1,1] w3) => (float[1,2,4,4] y)
        <int64[8] p = {0,2,0,0,0,2,0,0}, int64[2] s = {0,0}, int64[2] e = {99,99}, int64[2] d = {2,2}, int64[2] n = {2,3}>
        { a = Conv(x, w1)  b = Slice(a, s, e, n, d)  c = Pad(b, p)  f = Conv<strides=[2,2]>(a, w2)  h = Add(c, f)
        y = Conv(h, w3) }""",
        (4, 4),
    ),
    "depth to space": Case(
        """g (float[1,3,4,4] x, float[12,3,1,1] w1, float[3,3,1,1] w2, float[12,3,1,1] w3, float[2,3,1,1] w4)
        => (float[1,2,16,16] y) { a = Conv(x, w1)  b = DepthToSpace<blocksize=2>(a)  c = Conv(b, w2)  d = Conv(c, w3)
        e = DepthToSpace<blocksize=2, mode="CRD">(d)  y = Conv(e, w4) }""",
        (3, 3, 3),
    ),
    "space to depth": Case(
        """g (float[1,3,4,4] x, float[5,3,1,1] w1, float[2,20,1,1] w2) => (float[1,2,2,2] y)
        { a = Conv(x, w1)  b = SpaceToDepth<blocksize=2>(a)  y = Conv(b, w2) }""",
        (5,),
    ),
    "focus": Case(
        """g (float[1,3,4,4] x, float[5,3,1,1] w1, float[2,20,1,1] w2) => (float[1,2,2,2] y)
        <int64[2] i00 = {0,0}, int64[2] i01 = {0,1}, int64[2] i10 = {1,0}, int64[2] i11 = {1,1}, int64[2] e = {99,99},
        int64[2] n = {2,3}, int64[2] d = {2,2}> { a = Conv(x, w1)  p = Slice(a, i00, e, n, d)  q = Slice(a, i01, e, n, d)
        r = Slice(a, i10, e, n, d)  s = Slice(a, i11, e, n, d)  c = Concat<axis=1>(p, r, q, s)  y = Conv(c, w2) }""",
        (5,),
    ),
    "resize with sizes": Case(
        """g (float[1,3,4,4] x, float[5,3,1,1] w1, float[2,5,1,1] w2) => (float[1,2,8,8] y) <int64[4] i = {1,5,8,8}>
        { a = Conv(x, w1)  b = Resize<mode="nearest">(a, , , i)  y = Conv(b, w2) }""",
        (5,),
    ),
    "instance norm and prelu": Case(
        """g (float[1,3,4,4] x, float[5,3,1,1] w1, float[5] s, float[5] b, float[5,1,1] p, float[2,5,1,1] w2) => (float[1,2,4,4] y)
        { a = Conv(x, w1)  c = InstanceNormalization(a, s, b)  d = PRelu(c, p)  y = Conv(d, w2) }""",
        (5,),
    ),
    "dequantised weights": Case(
        """g (float[1,3,4,4] x, int8[4,3,1,1] i1, float[4] v1, int8[2,4,1,1] i2, float[2] v2) => (float[1,2,4,4] y)
        { a = DequantizeLinear<axis=0>(i1, v1)  b = DequantizeLinear<axis=0>(i2, v2)  c = Conv(x, a)  y = Conv(c, b) }""",
        (4,),
    ),
}

MATRICES = {
    "gemm": Case(
        """g (float[N,3] x, float[4,3] w1, float[4] b1, float[4,5] w2, float[1,5] b2, float[5,2] w3) => (float[N,2] y)
        { a = Gemm<transB=1>(x, w1, b1)  b = Gemm<alpha=0.5>(a, w2, b2)  y = Gemm(b, w3) }""",
        (4, 5),
    ),
    "gemm of a transposed activation": Case(
        """g (float[3,7] x, float[3,4] w1, float[4,5] w2) => (float[7,5] y)
        { a = Gemm<transA=1>(w1, x)  y = Gemm<transA=1>(a, w2) }""",
        (4,),
    ),
    "matmul": Case(
        """g (float[N,S,3] x, float[3,4] w1, float[4] b1, float[2,1,4,6] w2, float[6] w3) => (float[2,N,S] y)
        { a = MatMul(x, w1)  b = Add(a, b1)  c = MatMul(b, w2)  d = Tanh(c)  y = MatMul(d, w3) }""",
        (4, 6),
    ),
    "tied weights": Case(
        """g (float[N,6] x, float[6,4] w1) => (float[N,6] y)
        { a = MatMul(x, w1)  b = Relu(a)  y = Gemm<transB=1>(b, w1)  }""",
        (4,),
    ),
    "square weights used twice": Case(
        """g (float[N,3] x, float[3,4] w0, float[4,4] w1, float[4,2] w2) => (float[N,2] y)
        { a = MatMul(x, w0)  b = MatMul(a, w1)  c = Relu(b)  d = MatMul(c, w1)  y = MatMul(d, w2) }""",
        (4,),
    ),
    "computed weights": Case(
        """g (float[N,3] x, float[4,3] w1, float[4,1] s, float[5,4] w2) => (float[N,5] y)
        { m = Mul(w1, s)  t = Transpose(m)  u = Transpose(w2)  a = MatMul(x, t)  y = MatMul(a, u) }""",
        (4,),
    ),
    "concat, split, slice, gather": Case(
        """g (float[N,3] x, float[3,6] w1, float[3,4] w2, float[2] c1, float[5,2] w3, float[5,2] w4, float[3,2] w5, float[4,2] w6)
        => (float[N,2] y) <int64[2] i = {5,5}, int32[1] s = {-8}, int32[1] e = {-5}, int32[1] n = {1}, int64[4] p = {8,-3,6,0}>
        { a = MatMul(x, w1)  b = MatMul(x, w2)  c = Concat<axis=-1>(a, b)  l, r = Split<axis=1>(c, i)  f = MatMul(l, w3)
        h = MatMul(r, w4)  j = Slice(c, s, e, n)  k = MatMul(j, w5)  m = Gather<axis=1>(c, p)  q = MatMul(m, w6)
        t = Sum(f, h, k, q)  u = Add(t, c1)  y = Relu(u) }""",
        (3, 3),
    ),
    "flatten": Case(
        """g (float[N,3,4,4] x, float[5,3,1,1] w1, float[80,6] w2, float[6,2] w3) => (float[N,2] y) <int64[2] i = {-1, 80}>
        { a = Conv(x, w1)  b = Flatten(a)  c = MatMul(b, w2)  d = Reshape(a, i)  e = MatMul(d, w2)  f = Add(c, e)
        y = MatMul(f, w3) }""",
        (5, 6),
    ),
    "reshape of several axes into several": Case(
        """g (float[N,8,3] x, float[3,6] w1, float[12,5] w2, float[5,2] w3) => (float[N,4,2] y) <int64[3] i = {0,4,12}>
        { a = MatMul(x, w1)  b = Reshape(a, i)  c = MatMul(b, w2)  y = MatMul(c, w3) }""",
        (6, 5),
    ),
    "tile and expand": Case(
        """g (float[1,3] x, float[3,4] w1, float[8,5] w2, float[5,2] w3) => (float[3,2] y) <int64[2] i = {1,2}, int64[2] e = {3,1}>
        { a = MatMul(x, w1)  b = Tile(a, i)  c = MatMul(b, w2)  d = Expand(c, e)  y = MatMul(d, w3) }""",
        (4, 5),
    ),
    "softmax and layer norm stay": Case(
        """g (float[N,3] x, float[3,4] w1, float[4,5] w2, float[5] s, float[5] b, float[5,6] w3, float[6,2] w4) => (float[N,2] y)
        { a = MatMul(x, w1)  p = Softmax(a)  c = MatMul(p, w2)  n = LayerNormalization(c, s, b)  d = MatMul(n, w3)  r = Relu(d)
        y = MatMul(r, w4) }""",
        (6,),
    ),
    "reductions": Case(
        """g (float[N,7,3] x, float[3,4] w1, float[4,2] w2, float[7,5] w3, float[5,2] w4) => (float[N,2] y) <int64[1] one = {1}>
        { a = MatMul(x, w1)  m = ReduceMean<axes=[1], keepdims=0>(a)  c = MatMul(m, w2)  t = Transpose<perm=[0,2,1]>(x)
        d = MatMul(t, w3)  k = ReduceSum(d, one)  s = Squeeze(k, one)  e = MatMul(s, w4)  y = Add(c, e) }""",
        (4, 5),
    ),
    "embedding": Case(
        """g (int64[N] x, float[9,4] w1, float[9] b, float[4,9] w2) => (float[N,9] y)
        { a = Gather(w1, x)  t = Transpose(w1)  c = MatMul(a, t)  d = MatMul(a, w2)  e = Add(c, d)  y = Add(e, b) }""",
        (4,),
    ),
    "where and clip": Case(
        """g (float[N,3] x, float[3,4] w1, float[4] l, float[4] h, float[4,2] w2) => (float[N,2] y)
        <float lo = {0.5}, float hi = {2.0}>
        { a = MatMul(x, w1)  c = Greater(a, l)  d = Where(c, a, h)  e = Clip(d, lo, hi)  f = Div(e, h)  y = MatMul(f, w2) }""",
        (4,),
    ),
    "branches": Case(
        """g (float[N,3] x, bool xc, float[3,4] w1, float[4,2] w2, float[3,5] w3, float[5,2] w4) => (float[N,2] y)
        { y = If (xc) <then_branch = t () => (float[N,2] p) { a = MatMul(x, w1)  b = Relu(a)  p = MatMul(b, w2) },
        else_branch = e () => (float[N,2] q) { c = MatMul(x, w3)  d = Sigmoid(c)  q = MatMul(d, w4) }> }""",
        (4, 5),
    ),
}

RECURRENT = {
    "bidirectional lstm": Case(
        """g (float[N,3] x, float[3,4] w0, float[2,20,4] w, float[2,20,5] r, float[2,40] b, float[2,15] p, float[10,2] w1)
        => (float[7,N,2] y) <int64[3] t = {7,1,1}, int64[3] s = {0,0,-1}, int64[1] zero = {0}>
        { a = MatMul(x, w0)  u = Unsqueeze(a, zero)  v = Tile(u, t)
        h, hn, cn = LSTM<hidden_size=5, direction="bidirectional">(v, w, r, b, , , , p)
        q = Transpose<perm=[0,2,1,3]>(h)  k = Reshape(q, s)  y = MatMul(k, w1) }""",
        (4, 5),
        {"N": 2},
    ),
    "gru": Case(
        """g (float[7,N,3] x, float[1,15,3] w, float[1,15,5] r, float[1,30] b, float[5,2] w1) => (float[7,1,N,2] y, float[1,N,2] z)
        { h, l = GRU<hidden_size=5, linear_before_reset=1>(x, w, r, b)  y = MatMul(h, w1)  z = MatMul(l, w1) }""",
        (5,),
    ),
    "rnn": Case(
        """g (float[7,N,3] x, float[1,5,3] w, float[1,5,5] r, float[5,2] w1) => (float[7,1,N,2] y)
        { h = RNN<hidden_size=5>(x, w, r)  y = MatMul(h, w1) }""",
        (5,),
    ),
}

# heads of 4 features: q, k, v and the output projection lose whole heads, the feed-forward layer single neurons
_QKV = "float[6,12] w1, float[12] b1, float[6,12] w2, float[6,12] w3, float[12,6] w4, float[6,10] w5, float[10] b5, float[10,6] w6"
_MLP = "o = MatMul(om, w4)  r = Add(o, x)  h = MatMul(r, w5)  hb = Add(h, b5)  hr = Relu(hb)  m = MatMul(hr, w6)  y = Add(m, r)"

TRANSFORMERS = {
    "attention": Case(
        f"""g (float[1,5,6] x, {_QKV}) => (float[1,5,6] y) <int64[4] i = {{1,5,3,4}}, int64[3] j = {{1,5,12}}>
        {{ q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)  qb = Add(q, b1)  q1 = Reshape(qb, i)  k1 = Reshape(k, i)
        v1 = Reshape(v, i)  q2 = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,3,1]>(k1)
        v2 = Transpose<perm=[0,2,1,3]>(v1)  s = MatMul(q2, k2)  p = Softmax<axis=-1>(s)  c = MatMul(p, v2)
        c1 = Transpose<perm=[0,2,1,3]>(c)  om = Reshape(c1, j)
        {_MLP} }}""",
        (3, 10),
    ),
    "attention as exported, sizes computed": Case(
        f"""g (float[B,S,6] x, {_QKV}) => (float[B,S,6] y)
        <int64 i0 = {{0}}, int64 i1 = {{1}}, int64[1] z = {{0}}, int64[1] n3 = {{3}}, int64[1] n4 = {{4}}, int64[1] n12 = {{12}}>
        {{ q = MatMul(x, w1)  k = MatMul(x, w2)  v = MatMul(x, w3)  qb = Add(q, b1)
        s0 = Shape(qb)  a0 = Gather(s0, i0)  a1 = Gather(s0, i1)  u0 = Unsqueeze(a0, z)  u1 = Unsqueeze(a1, z)
        i = Concat<axis=0>(u0, u1, n3, n4)  q1 = Reshape(qb, i)  k1 = Reshape(k, i)  v1 = Reshape(v, i)
        q2 = Transpose<perm=[0,2,1,3]>(q1)  k2 = Transpose<perm=[0,2,3,1]>(k1)  v2 = Transpose<perm=[0,2,1,3]>(v1)
        t = Shape(q2)  e = Slice(t, n3, n4)  f = Cast<to=1>(e)  root = Sqrt(f)
        s = MatMul(q2, k2)  sd = Div(s, root)  p = Softmax<axis=-1>(sd)  c = MatMul(p, v2)  c1 = Transpose<perm=[0,2,1,3]>(c)
        j = Concat<axis=0>(u0, u1, n12)  om = Reshape(c1, j)  {_MLP} }}""",
        (3, 10),
        {"B": 2, "S": 5},
    ),
    "packed": Case(
        f"""g (float[B,S,6] x, float[6,36] w1, float[36] b1, {_QKV[_QKV.index("float[12,6] w4") :]}) => (float[B,S,6] y)
        <int64[5] i = {{0,0,3,3,4}}, int64[3] j = {{0,0,-1}}, int64 i0 = {{0}}, int64 i1 = {{1}}, int64 i2 = {{2}}>
        {{ a = MatMul(x, w1)  ab = Add(a, b1)  a1 = Reshape(ab, i)  a2 = Transpose<perm=[2,0,3,1,4]>(a1)
        q = Gather<axis=0>(a2, i0)  k = Gather<axis=0>(a2, i1)  v = Gather<axis=0>(a2, i2)  kt = Transpose<perm=[0,1,3,2]>(k)
        s = MatMul(q, kt)  p = Softmax<axis=-1>(s)  c = MatMul(p, v)  c1 = Transpose<perm=[0,2,1,3]>(c)  om = Reshape(c1, j)
        {_MLP} }}""",
        (3, 10),
        {"B": 2, "S": 5},
    ),
    "packed by head, split": Case(
        f"""g (float[B,S,6] x, float[6,36] w1, {_QKV[_QKV.index("float[12,6] w4") :]}) => (float[B,S,6] y)
        <int64[4] i = {{0,0,3,12}}, int64[3] n = {{4,4,4}}, int64[3] j = {{0,0,12}}>
        {{ a = MatMul(x, w1)  a1 = Reshape(a, i)  a2 = Transpose<perm=[0,2,1,3]>(a1)  q, k, v = Split<axis=-1>(a2, n)
        kt = Transpose<perm=[0,1,3,2]>(k)  s = MatMul(q, kt)  p = Softmax<axis=-1>(s)  c = MatMul(p, v)
        c1 = Transpose<perm=[0,2,1,3]>(c)  om = Reshape(c1, j)  {_MLP} }}""",
        (3, 10),
        {"B": 2, "S": 5},
    ),
    "heads merged into the batch stay": Case(
        f"""g (float[B,S,6] x, {_QKV}) => (float[B,S,6] y)
        <int64 i0 = {{0}}, int64 i1 = {{1}}, int64[1] z = {{0}}, int64[1] n3 = {{3}}, int64[1] n4 = {{4}}, int64[1] n12 = {{12}}>
        {{ v = MatMul(x, w3)  s0 = Shape(x)  a0 = Gather(s0, i0)  a1 = Gather(s0, i1)  u0 = Unsqueeze(a0, z)  u1 = Unsqueeze(a1, z)
        i = Concat<axis=0>(u0, u1, n3, n4)  v1 = Reshape(v, i)  v2 = Transpose<perm=[0,2,1,3]>(v1)  bh = Mul(u0, n3)
        m1 = Concat<axis=0>(bh, u1, n4)  v3 = Reshape(v2, m1)  v4 = Softmax<axis=1>(v3)  v5 = Transpose<perm=[0,2,1,3]>(v2)
        l = ReduceMean<axes=[0,1,2], keepdims=1>(v4)  j = Concat<axis=0>(u0, u1, n12)  v6 = Reshape(v5, j)  om = Add(v6, l)
        {_MLP} }}""",
        (10,),
        {"B": 2, "S": 5},
    ),
    "mask expanded over heads": Case(
        """g (float[B,S,6] x, float[6,12] w1, float[12,6] w2) => (float[B,S,6] y)
        <int64 i0 = {0}, int64 i1 = {1}, int64[1] z = {0}, int64[1] n3 = {3}, int64[1] n4 = {4}, int64[4] i = {0,0,3,4},
        int64[3] j = {0,0,12}, float h = {0.5}>
        { s0 = Shape(x)  a0 = Gather(s0, i0)  a1 = Gather(s0, i1)  u0 = Unsqueeze(a0, z)  u1 = Unsqueeze(a1, z)
        t = Concat<axis=0>(u0, u1, n3, n4)  e = Expand(h, t)  c = ConstantOfShape<value=float[1] {2.0}>(t)
        a = MatMul(x, w1)  b = Reshape(a, i)  d = Add(b, e)  f = Mul(d, c)  k = Reshape(f, j)  y = MatMul(k, w2) }""",
        (3,),
        {"B": 2, "S": 5},
    ),
    "sizes in arithmetic": Case(
        """g (float[N,3,H,W] x, float[6,3,1,1] w1, float[6,6,1,1] w2, float[2,6,1,1] w3) => (float[N,2,H,W] y)
        <int64 i1 = {1}, int64[1] p1 = {1}, int64[1] p2 = {2}, int64[1] two = {2}>
        { a = Conv(x, w1)  s = Shape(a)  c = Gather(s, i1)  f = Cast<to=1>(c)  b = Div(a, f)  t = Slice(s, p1, p2)
        h = Div(t, two)  hf = Cast<to=1>(h)  d = Conv(b, w2)  e = Mul(d, hf)  r = Reshape(e, s)  y = Conv(r, w3) }""",
        (6, 6),
        {"N": 2, "H": 3, "W": 4},
    ),
}
