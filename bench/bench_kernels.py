"""The kernels against onnxruntime's, layer by layer: `python bench/bench_kernels.py [gemm conv depthwise gemv nbits]`.

Each row is one layer, one thread: graphopt's kernel over u8 NHWC data, onnxruntime's QLinear operator (the faster of its NCHW
and NHWC forms), and its float32 one. Times are medians of runs interleaved in one process; both sides include the copy of their
input into padded buffers. On CPUs without INT8 dot products (VNNI, AMX) onnxruntime's u8 x s8 kernels add pairs of products in
16 bits, which saturates: they are then fast, but wrong on such weights; graphopt's are exact on every CPU.

nbits: float32 rows times 4-bit weights (M, K, N, block) against MatMulNBits in float32; `int8 activations` is onnxruntime's with
accuracy_level 4, which rounds the rows to 8 bits and so computes something else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, log
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from graphopt.kernels import isa, native
from graphopt.kernels import plan as p

GEMM = [
    (128, 384, 384), (128, 384, 1536), (128, 1536, 384), (256, 768, 3072), (3136, 64, 64), (784, 128, 512), (196, 256, 1024),
    (49, 512, 2048), (3136, 576, 64), (64, 256, 256), (100, 1000, 100), (512, 96, 288),
]  # fmt: skip
GEMV = [(1, 384, 1536), (1, 1024, 1024), (1, 1280, 1000), (1, 256, 256)]
# N, C, H, W, OC, kernel, stride, groups
CONV = [
    (1, 64, 56, 56, 64, 3, 1, 1), (1, 128, 28, 28, 128, 3, 1, 1), (1, 256, 14, 14, 256, 3, 1, 1), (1, 64, 56, 56, 128, 3, 2, 1),
    (1, 64, 56, 56, 256, 1, 1, 1), (1, 256, 14, 14, 1024, 1, 1, 1), (1, 3, 224, 224, 64, 7, 2, 1), (1, 32, 112, 112, 16, 1, 1, 1),
    (1, 24, 56, 56, 144, 1, 1, 1), (1, 16, 32, 32, 16, 3, 1, 1), (1, 40, 20, 30, 56, 3, 1, 1), (1, 96, 14, 14, 96, 5, 1, 1),
]  # fmt: skip
DEPTHWISE = [
    (1, 32, 112, 112, 32, 3, 1, 32), (1, 144, 56, 56, 144, 3, 1, 144), (1, 256, 14, 14, 256, 3, 1, 256),
    (1, 96, 112, 112, 96, 3, 2, 96), (1, 240, 28, 28, 240, 5, 1, 240), (1, 672, 14, 14, 672, 5, 1, 672),
    (1, 64, 48, 48, 64, 3, 2, 64), (1, 240, 28, 28, 240, 5, 2, 240),
]  # fmt: skip
NBITS = [
    (1, 768, 3072, 32), (1, 2048, 2048, 32), (1, 4096, 4096, 32), (1, 4096, 4096, 128), (4, 2048, 2048, 32), (32, 2048, 2048, 32),
    (128, 768, 3072, 32),
]  # fmt: skip
RNG = np.random.default_rng(0)


def drawn(shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Weights as per-channel quantisation leaves them: normal, the largest of each output channel at 127."""
    values = RNG.standard_normal(shape)
    others = tuple(i for i in range(len(shape)) if i != axis)
    scaled: np.ndarray = np.rint(values / np.abs(values).max(axis=others, keepdims=True) * 127)
    return scaled.astype(np.int8)


@dataclass(frozen=True)
class Layer:
    """A layer's names, plan and models."""

    name: str
    macs: int
    ours: Callable[[], Any]
    theirs: dict[str, Callable[[], Any]]


def prepared(plan: p.Plan, constants: list[np.ndarray], x: np.ndarray) -> Callable[[], Any]:
    """One run of a bound plan: no look-up of shapes, no allocation."""
    region = native.Region(plan, constants)
    region(x)
    records, error = native._records([x]), np.zeros(256, np.uint8)
    instance = region._call["acquire"](region._handle, records.ctypes.data, 1, error.ctypes.data)
    out = region._allocate(instance, 0)
    addresses, run = np.array([out.ctypes.data], np.int64), region._call["run"]
    return lambda kept=(region, x, out): run(instance, records.ctypes.data, addresses.ctypes.data, 0)  # type: ignore[misc]


def session(
    nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], x: np.ndarray, precise: bool = False
) -> Callable[[], Any]:
    """One run of a small model in onnxruntime, through its IO binding."""
    import onnxruntime as ort

    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    out = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", kind, x.shape)],
        [out],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    made = ort.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    binding = made.io_binding()
    binding.bind_cpu_input("x", x)
    binding.bind_output("y")
    return lambda: made.run_with_iobinding(binding)


def gemm(m: int, k: int, n: int) -> Layer:
    x, w = RNG.integers(0, 256, (m, k), dtype=np.uint8), drawn((k, n), 1)
    ws = np.full(n, 0.01, np.float32)
    plan = p.Plan(
        [p.Tensor(k, 128), p.Tensor(n, 128)],
        [
            p.step(p.INPUT, index=0, out=0, type=p.UINT8, layout=p.ROWS, rank=2),
            p.step(p.CONV, x=0, out=1, weight=0, weight_scale=1, order=p.KN, scale=0, mid_zero=128),
            p.step(p.OUTPUT, x=1, index=0, type=p.UINT8, layout=p.ROWS, rank=2, like=0),
        ],
        [0.02, 1.0], 1, 1, 2,
    )  # fmt: skip
    zero, one = np.array(128, np.uint8), np.float32(1)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "xz"]
    numbers = {"xs": np.float32(0.02), "xz": zero, "w": w, "ws": ws, "wz": np.zeros(n, np.int8), "ys": one}
    theirs = {
        "int8": session([helper.make_node("QLinearMatMul", names, ["y"])], numbers, x),
        "fp32": session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.astype(np.float32)}, x.astype(np.float32)),
    }
    return Layer(f"{m} x {k} x {n}", m * k * n, prepared(plan, [w, ws], x), theirs)


def conv(n: int, c: int, h: int, w: int, oc: int, kernel: int, stride: int, groups: int) -> Layer:
    pad = kernel // 2
    x = RNG.integers(0, 256, (n, c, h, w), dtype=np.uint8)
    weight = drawn((oc, c // groups, kernel, kernel), 0)
    ws, names = np.full(oc, 0.01, np.float32), ("kh", "kw", "sh", "sw", "pt", "pl", "pb", "pr")
    window = dict(zip(names, [kernel] * 2 + [stride] * 2 + [pad] * 4, strict=True))
    plan = p.Plan(
        [p.Tensor(c, 128), p.Tensor(oc, 128)],
        [
            p.step(p.INPUT, index=0, out=0, type=p.UINT8, layout=p.CHANNELS_LAST, rank=4),
            p.step(p.CONV, x=0, out=1, weight=0, weight_scale=1, groups=groups, scale=0, mid_zero=128, **window),
            p.step(p.OUTPUT, x=1, index=0, type=p.UINT8, layout=p.CHANNELS_LAST, rank=4),
        ],
        [0.02, 1.0], 1, 1, 2,
    )  # fmt: skip
    attributes: dict[str, Any] = {"kernel_shape": [kernel] * 2, "strides": [stride] * 2, "pads": [pad] * 4, "group": groups}
    numbers = {"xs": np.float32(0.02), "xz": np.array(128, np.uint8), "w": weight, "ws": ws, "wz": np.zeros(oc, np.int8)}
    numbers["ys"] = np.float32(1)
    inputs = ["x", "xs", "xz", "w", "ws", "wz", "ys", "xz"]
    last = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    nhwc = helper.make_node("QLinearConv", inputs, ["y"], domain="com.microsoft", channels_last=1, **attributes)
    theirs = {
        "int8": session([helper.make_node("QLinearConv", inputs, ["y"], **attributes)], numbers, x),
        "int8 nhwc": session([nhwc], numbers, last),
        "fp32": session(
            [helper.make_node("Conv", ["x", "w"], ["y"], **attributes)], {"w": weight.astype(np.float32)}, x.astype(np.float32)
        ),
    }
    macs = n * (h // stride) * (w // stride) * oc * c // groups * kernel * kernel
    name = f"{c}->{oc} {kernel}x{kernel}" + (f" s{stride}" if stride > 1 else "") + f" {h}x{w}"
    return Layer(name, macs, prepared(plan, [weight, ws], last), theirs)


def nbits(m: int, k: int, n: int, block: int) -> Layer:
    from graphopt.kernels import NBitsGemm

    x, blocks = RNG.standard_normal((m, k)).astype(np.float32), k // block
    weight, scale = RNG.integers(0, 256, (n, blocks, block // 2), dtype=np.uint8), RNG.random((n, blocks), dtype=np.float32)
    layer = NBitsGemm(weight, scale, k=k)

    def product(level: int) -> Callable[[], Any]:
        sizes: dict[str, Any] = {"K": k, "N": n, "bits": 4, "block_size": block, "accuracy_level": level}
        node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], None, None, "com.microsoft", **sizes)
        return session([node], {"w": weight, "s": scale.ravel()}, x)

    return Layer(f"{m} x {k} x {n} / {block}", m * k * n, lambda: layer(x), {"int8 activations": product(4), "fp32": product(1)})


def medians(runs: dict[str, Callable[[], Any]], seconds: float = 0.6) -> dict[str, float]:
    """Microseconds of each, interleaved."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(next(iter(times.values()))) < 7:
        for name, run in runs.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: float(np.median(t)) * 1e6 for name, t in times.items()}


KINDS: dict[str, tuple[Callable[..., Layer], list[Any]]] = {
    "gemm": (gemm, GEMM),
    "conv": (conv, CONV),
    "depthwise": (conv, DEPTHWISE),
    "gemv": (gemm, GEMV),
    "nbits": (nbits, NBITS),
}


def main() -> None:
    chosen = sys.argv[1:] or list(KINDS)
    print(f"instruction set of graphopt's kernels: {isa.detect()}; one thread; microseconds, medians of interleaved runs\n")
    for kind in chosen:
        make, shapes = KINDS[kind]
        print(f"| {kind} | ours us | GMAC/s | int8 us | fp32 us | x int8 | x fp32 |\n|---|---|---|---|---|---|---|")
        gains: list[tuple[float, float]] = []
        for shape in shapes:
            layer = make(*shape)
            found = medians({"ours": layer.ours, **layer.theirs})
            int8 = min(v for k, v in found.items() if k.startswith("int8"))
            gains.append((int8 / found["ours"], found["fp32"] / found["ours"]))
            speed = layer.macs / found["ours"] / 1e3
            print(
                f"| {layer.name} | {found['ours']:.1f} | {speed:.0f} | {int8:.1f} | {found['fp32']:.1f} |"
                f" {gains[-1][0]:.2f} | {gains[-1][1]:.2f} |",
                flush=True,
            )
        means = [exp(sum(log(g[i]) for g in gains) / len(gains)) for i in (0, 1)]
        print(f"| geometric mean | | | | | {means[0]:.2f} | {means[1]:.2f} |\n")


if __name__ == "__main__":
    main()
