"""Region plans: an INT8 part of a graph as a flat list of integers and one of floats, which the compiled engine runs.

A plan says what to compute, not how: it knows no shapes but those of weights, no addresses, no instruction set. The engine packs
the weights for the CPU it finds, and lays out memory for the shapes it is given. Plans are stored in the model, as the attributes
`plan` (int64s) and `scales` (float32s) of a node `graphopt.Int8Region<n>`, whose inputs are the activations, then the constants.

    header   8 slots: MAGIC, VERSION, tensors, steps, activations, outputs, constants, packed weights
    tensors  2 slots each: channels, zero point
    steps    32 slots each: the kind, then the fields of SLOTS
    packed   10 slots each: K_VALUES, ..., of weights that are stored in blocks, without those that are zero: constant `values`
             is int8 [blocks, rows * columns], `gaps` uint8 [blocks], as in sparse_plan.py, of the matrix [outputs, the rest]
             of the weight (turned: of its transpose). Steps find the dense weight in the place of `values`

A tensor is u8 [H, W, C], one image of the batch. Signed activations are stored with 128 added, and so are their zero points.
Fields that name nothing hold -1. `*_scale` fields are positions in `scales`; constants are numbered from 0.

Arithmetic is onnxruntime's, bit for bit (round half to even; every product, quotient and sum in float32):

    input    q = sat(rint(x / scale) + zero)
    conv     q = sat(rint(float(acc) * ((sx * sw[n]) / sy)) + mid_zero), acc = bias[n] + sum (x - zx) w
             with a residual r: q = sat(rint(fma(r, rb, fma(q, ra, fx)))); then low <= q <= high
             float output: float(acc) * (sx * sw[n]) + float_bias[n]
    add      q = sat(rint(fma(b, rb, fma(a, ra, fx)))); then low <= q <= high
    mul      q = sat(rint(float((a - za)(b - zb)) * ratio + zero)); then low <= q <= high
    average  q = sat(rint(mean / sy + zero)), mean = sum(sx * float(x - zx)) / count, added in window order
    global   q = sat(rint(float(sum - n zx) * (sx / (sy * n))) + zero)
    max      q = max(x); padding never wins
    copy     q = table[x] where a table is given, else x
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

MAGIC = 0x67706F  # "gpo"
VERSION = 1
HEADER = 8
TENSOR = 2
STEP = 32
PACK = 10
(K_VALUES, K_GAPS, K_ROWS, K_COLUMNS, K_TURNED, K_RANK, K_DIMS) = range(7)  # up to four dimensions
MAX_REGIONS = 64  # operators Int8Region0 ... Int8Region63: onnxruntime before 1.24 confuses overloads of one function name
MAX_CHANNELS = 65536
DOMAIN = "graphopt"
NBITS = ("NBitsGemm", "NBitsGemmZeros")  # operators of 4-bit weights, without and with zero points: nbits_op

INPUT, OUTPUT, CONV, POOL, BINARY, COPY = 1, 2, 3, 4, 5, 6
MAX_POOL, AVERAGE_POOL, GLOBAL_POOL = 0, 1, 2
ADD, MUL = 0, 1
FLOAT, UINT8, INT8, INT32 = 1, 2, 3, 6  # ONNX element types
CHANNELS_FIRST, ROWS, CHANNELS_LAST = 0, 1, 2  # [N, C, spatial...]; [..., C], all but the last are rows; [N, H, W, C]
OIHW, KN, IOHW = 0, 1, 2  # weights: [OC, IC / groups, KH, KW] (missing axes are 1); [K, N] of MatMul; of ConvTranspose

_WINDOW = {
    "kh": 7,
    "kw": 8,
    "sh": 9,
    "sw": 10,
    "dh": 11,
    "dw": 12,
    "pt": 13,
    "pl": 14,
    "pb": 15,
    "pr": 16,
}
SLOTS: Mapping[int, Mapping[str, int]] = {
    # activation `index` of the node becomes tensor `out`: quantised if it is float, else copied
    INPUT: {"index": 1, "out": 3, "type": 4, "layout": 5, "rank": 6, "x_scale": 7},
    # tensor `x` becomes output `index` of the node: dequantised if it is float; ROWS take their leading axes from activation `like`
    OUTPUT: {"x": 1, "index": 2, "type": 4, "layout": 5, "rank": 6, "x_scale": 7, "like": 8},
    # `scale`: sx, sy; `sum_scale`: ra, rb, fx; `out` is -1 and `index` the node's output where it is float (layout ROWS)
    CONV: {
        "x": 1,
        "residual": 2,
        "out": 3,
        "weight": 4,
        "weight_scale": 5,
        "bias": 6,
        **_WINDOW,
        "groups": 17,
        "order": 18,
        "oph": 19,
        "opw": 20,
        "scale": 21,
        "mid_zero": 22,
        "low": 23,
        "high": 24,
        "sum_scale": 25,
        "index": 26,
        "float_bias": 27,
        "rank": 28,
        "like": 29,
    },
    # `scale`: sx, sy
    POOL: {"x": 1, "out": 3, "op": 4, **_WINDOW, "include_pad": 17, "ceil": 18, "scale": 21},
    # `scale`: ra, rb, fx of ADD; ratio of MUL. An input of 1 x 1 pixels is used for every pixel
    BINARY: {"x": 1, "y": 2, "out": 3, "op": 4, "scale": 21, "low": 23, "high": 24},
    # channels [c0, c0 + count) of pixels (h0 + i * hs, w0 + j * ws), each repeated rh x rw times, go to channel `offset` of `out`,
    # behind pt rows and pl columns of zero point; hn, wn: how many rows and columns, -1: to the end. `fill`: `out` is set to its
    # zero point first; needed where padding or unwritten channels are left
    COPY: {
        "x": 1,
        "out": 3,
        "table": 4,
        "c0": 5,
        "count": 6,
        "h0": 7,
        "hs": 8,
        "hn": 9,
        "w0": 10,
        "ws": 11,
        "wn": 12,
        "pt": 13,
        "pl": 14,
        "pb": 15,
        "pr": 16,
        "rh": 17,
        "rw": 18,
        "offset": 19,
        "fill": 20,
    },
}
DEFAULTS: Mapping[str, int] = {
    **dict.fromkeys(("kh", "kw", "sh", "sw", "dh", "dw", "groups", "hs", "ws", "rh", "rw"), 1),
    **dict.fromkeys(("pt", "pl", "pb", "pr", "oph", "opw", "order", "low", "c0", "h0", "w0", "offset", "fill", "op"), 0),
    **dict.fromkeys(("include_pad", "ceil", "mid_zero"), 0),
    "high": 255,
}  # every other field that is not given is -1


@dataclass(frozen=True)
class Tensor:
    """A quantised activation: u8 [H, W, channels]."""

    channels: int
    zero: int


@dataclass(frozen=True)
class Step:
    """One step; `fields` by the names of SLOTS[kind]."""

    kind: int
    fields: Mapping[str, int]

    def __getattr__(self, name: str) -> int:
        slots = SLOTS[self.__dict__["kind"]]
        if name not in slots:
            raise AttributeError(name)
        return self.fields.get(name, DEFAULTS.get(name, -1))


@dataclass(frozen=True)
class Packed:
    """A weight that is stored in blocks: positions of its constants, and what is made of them."""

    values: int
    gaps: int
    block: tuple[int, int]
    shape: tuple[int, ...]
    turned: bool = False

    def encode(self) -> list[int]:
        """Its slots."""
        row = [self.values, self.gaps, *self.block, int(self.turned), len(self.shape), *self.shape]
        return row + [0] * (PACK - len(row))


@dataclass(frozen=True)
class Plan:
    """What a region computes. `scales` are float32 values; constants and activations are only counted here."""

    tensors: Sequence[Tensor]
    steps: Sequence[Step]
    scales: Sequence[float]
    activations: int
    outputs: int
    constants: int
    packed: Sequence[Packed] = ()

    def encode(self) -> list[int]:
        """The integers of the attribute `plan`."""
        row = [MAGIC, VERSION, len(self.tensors), len(self.steps), self.activations, self.outputs, self.constants, len(self.packed)]
        for tensor in self.tensors:
            row += [tensor.channels, tensor.zero]
        for step in self.steps:
            slots = [0] * STEP
            slots[0] = step.kind
            for name, slot in SLOTS[step.kind].items():
                slots[slot] = getattr(step, name)
            row += slots
        return row + [number for packed in self.packed for number in packed.encode()]


def step(kind: int, **fields: int) -> Step:
    """A step; raises KeyError on a field that the kind does not have."""
    unknown = set(fields) - set(SLOTS[kind])
    if unknown:
        raise KeyError(f"a step of kind {kind} has no fields {sorted(unknown)}")
    return Step(kind, {name: int(value) for name, value in fields.items()})


def decode(row: Sequence[int], scales: Sequence[float]) -> Plan:
    """The plan in the attributes of a node. ValueError where they are not one (the engine checks far more)."""
    if len(row) < HEADER or row[0] != MAGIC or row[1] != VERSION:
        raise ValueError("not a region plan of this version")
    tensors, steps, packs = row[2], row[3], row[7]
    if min(tensors, steps, packs) < 0 or len(row) != HEADER + TENSOR * tensors + STEP * steps + PACK * packs:
        raise ValueError(f"a region plan of {tensors} tensors and {steps} steps cannot have {len(row)} integers")
    start = HEADER + TENSOR * tensors
    found = []
    for index in range(steps):
        slots = row[start + STEP * index : start + STEP * (index + 1)]
        if slots[0] not in SLOTS:
            raise ValueError(f"step {index} is of unknown kind {slots[0]}")
        found.append(Step(slots[0], {name: slots[slot] for name, slot in SLOTS[slots[0]].items()}))
    listed = [Tensor(*row[HEADER + TENSOR * i : HEADER + TENSOR * (i + 1)]) for i in range(tensors)]
    packed = []
    for first in range(len(row) - PACK * packs, len(row), PACK):
        values, gaps, rows, columns, turned, rank, *dims = row[first : first + PACK]
        packed.append(Packed(values, gaps, (rows, columns), tuple(dims[:rank]), bool(turned)))
    return Plan(listed, found, list(scales), row[4], row[5], row[6], packed)
