"""Sparse kernels against onnxruntime's dense ones: `python bench/bench_sparse.py [layers gemv int8 models FILE...]`.

layers: graphopt's convolution (1x1, channel-major) and product of rows (which transposes), with single weights (csr) and blocks of
four rows (4x1), against the faster of onnxruntime's MatMul and 1x1 Conv; gemv: one row, against its float32 and INT8 products;
int8: INT8 convolutions with blocks of zeros
against the same with dense weights; models: whole files with magnitude sparsity, dense and compiled. One thread; medians of
interleaved runs in one process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_kernels import medians, session
from onnx import helper

from graphopt.kernels import isa, native
from graphopt.kernels.functions import QConv
from graphopt.kernels.functions import Scale as QScale
from graphopt.kernels.sparse_functions import SparseConv, SparseGemm

SHAPES = [
    (128, 384, 384), (128, 384, 1536), (128, 1536, 384), (256, 768, 3072), (3136, 64, 64), (784, 128, 512), (196, 256, 1024),
    (49, 512, 2048), (3136, 256, 64),
]  # fmt: skip
GEMV = [(768, 768, 1), (768, 3072, 1), (1280, 1000, 1), (768, 3072, 12), (4096, 4096, 1), (4096, 4096, 3)]  # K, N, weights in turn
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
RNG = np.random.default_rng(0)
Array = np.ndarray


def prepared(layer: SparseConv | SparseGemm, x: Array) -> Callable[[], Any]:
    """One run of a bound layer: no look-up of shapes, no allocation."""
    inner = layer._layer
    inner(x)
    records, error = native._records([x]), np.zeros(256, np.uint8)
    instance = inner._call["acquire"](inner._handle, records.ctypes.data, 1, error.ctypes.data)
    out = inner._allocate(instance, 0)
    addresses, run = np.array([out.ctypes.data], np.int64), inner._call["run"]
    return lambda kept=(layer, x, out): run(instance, records.ctypes.data, addresses.ctypes.data, 0)  # type: ignore[misc]


def masked(weight: Array, sparsity: float, rows: int) -> Array:
    """With as many blocks of `rows` outputs zero."""
    kept = RNG.random((weight.shape[0] // rows, weight.shape[1])) >= sparsity
    found: Array = weight * np.repeat(kept, rows, 0)
    return found


def layer(m: int, k: int, n: int, sparsity: float) -> dict[str, float]:
    """Gains over the best dense one."""
    weight, x = RNG.normal(size=(n, k)).astype(np.float32), RNG.normal(size=(m, k)).astype(np.float32)
    side = int(m**0.5)
    shape = (1, k, side, side) if side * side == m else (1, k, m // 16, 16)
    image = np.ascontiguousarray(x.T).reshape(shape)
    runs = {
        "dense rows": session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ascontiguousarray(weight.T)}, x),
        "dense conv": session([helper.make_node("Conv", ["x", "w"], ["y"])], {"w": weight.reshape(n, k, 1, 1)}, image),
    }
    for name, rows in (("csr", 1), ("4x1", 4)):
        cut = masked(weight, sparsity, rows)
        runs[f"{name} conv"] = prepared(SparseConv(cut.reshape(n, k, 1, 1), block=(rows, 1)), image)
        runs[f"{name} rows"] = prepared(SparseGemm(cut, block=(rows, 1)), x)
    times = medians(runs)
    best = min(times["dense rows"], times["dense conv"])
    return {name: best / t for name, t in times.items() if not name.startswith("dense")}


def layers() -> None:
    print("| sparsity | shape (M, K, N) | csr conv | csr rows | 4x1 conv | 4x1 rows |\n|---|---|---|---|---|---|")
    for sparsity in SPARSITIES:
        found = []
        for shape in SHAPES:
            gains = layer(*shape, sparsity)
            found.append([gains[f"{name} {kind}"] for name in ("csr", "4x1") for kind in ("conv", "rows")])
            print(f"| {sparsity:.0%} | {shape} | {' | '.join(f'{g:.2f}' for g in found[-1])} |", flush=True)
        print(f"| {sparsity:.0%} | median | {' | '.join(f'{g:.2f}' for g in np.median(found, axis=0))} |", flush=True)


def gemv() -> None:
    """One row; `sets` distinct weights in turn, so that they come from memory as in a network larger than the caches."""
    names = ("csr", "4x1", "bitmap", "bitmap int8", "onnxruntime int8")
    print(f"\n| sparsity | K, N, sets | {' | '.join(names)} |\n|---|---|{'---|' * len(names)}")
    for sparsity in SPARSITIES:
        for k, n, sets in GEMV:
            runs: dict[str, list[Callable[[], Any]]] = {name: [] for name in ("fp32", *names)}
            for _ in range(sets):
                one_row(runs, k, n, sparsity)
            times = medians({name: in_turn(found) for name, found in runs.items()}, 0.6)
            gains = [times["fp32"] / times[name] for name in names]
            rate = k * n * sets / times["fp32"]
            cells = " | ".join(f"{g:.2f}" for g in gains)
            print(f"| {sparsity:.0%} | {k}, {n}, {sets} (fp32 {rate:.1f} GMAC/s) | {cells} |", flush=True)


def one_row(runs: dict[str, list[Callable[[], Any]]], k: int, n: int, sparsity: float) -> None:
    """One weight for each way to run it."""
    weight, x = RNG.normal(size=(n, k)).astype(np.float32), RNG.normal(size=(1, k)).astype(np.float32)
    cut = masked(weight, sparsity, 1)
    levels, scale = np.where(cut == 0, 0, RNG.integers(1, 128, (n, k))).astype(np.int8), np.full(n, 0.1, np.float32)
    runs["fp32"].append(session([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": np.ascontiguousarray(weight.T)}, x))
    runs["onnxruntime int8"].append(integers(x, RNG.integers(-127, 128, (k, n), dtype=np.int8)))
    runs["csr"].append(prepared(SparseGemm(cut), x))
    runs["4x1"].append(prepared(SparseGemm(masked(weight, sparsity, 4), block=(4, 1)), x))
    runs["bitmap"].append(prepared(SparseGemm(cut, bitmap=True), x))
    runs["bitmap int8"].append(prepared(SparseGemm(levels, scale=scale, bitmap=True), x))


def in_turn(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    return lambda: [run() for run in runs]


def integers(x: Array, weight: Array) -> Callable[[], Any]:
    """onnxruntime's own way with int8 weights and a float32 row."""
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s"], ["y"], domain="com.microsoft")
    return session([node], {"w": weight, "s": np.float32(0.1)}, x)


def int8() -> None:
    """graphopt's INT8 convolution (1x1, u8 in and out) with blocks of zeros against itself with dense weights."""
    print("\n| zeros | shape (M, K, N) | 4x4 | 4x1 | 16x1 |\n|---|---|---|---|---|")
    for sparsity in (0.5, 0.7, 0.8, 0.9):
        found = []
        for m, k, n in SHAPES[1:]:
            weight = RNG.integers(-127, 128, (n, k)).astype(np.int8)
            x = RNG.integers(0, 256, (1, k, m // 7 if m % 7 == 0 else m // 16, 7 if m % 7 == 0 else 16)).astype(np.uint8)
            runs = {"dense": convolution(weight, x)}
            for name, (rows, columns) in {"4x4": (4, 4), "4x1": (4, 1), "16x1": (16, 1)}.items():
                kept = RNG.random((n // rows, k // columns)) >= sparsity
                runs[name] = convolution((weight * np.kron(kept, np.ones((rows, columns), np.int8))).astype(np.int8), x)
            times = medians(runs, 0.3)
            found.append([times["dense"] / times[name] for name in ("4x4", "4x1", "16x1")])
            print(f"| {sparsity:.0%} | {m, k, n} | {' | '.join(f'{g:.2f}' for g in found[-1])} |", flush=True)
        print(f"| {sparsity:.0%} | median | {' | '.join(f'{g:.2f}' for g in np.median(found, axis=0))} |", flush=True)


def convolution(weight: Array, x: Array) -> Callable[[], Any]:
    layer = QConv(weight[:, :, None, None], weight_scale=0.01, given=QScale(0.02, 128), out=QScale(2.0, 100))
    return lambda: layer(x)


def models(paths: list[str]) -> None:
    import graphopt
    from graphopt.api import check_feeds
    from graphopt.measure import latency

    print("\n| model | sparsity | file dense -> compiled | layers | speed over dense |\n|---|---|---|---|---|")
    for path in paths:
        for sparsity in (0.8, 0.9):
            dense = graphopt.optimize(path, f"fold, sparsify ratio={sparsity}").model
            made = graphopt.optimize(dense, "compile-sparse")
            contents = [m.proto().SerializeToString() for m in (dense, made.model)]
            feed = check_feeds(dense, None, 1)[0]
            gain = latency(contents, feed, seconds=6)[1].speedup
            row = (
                f"{len(contents[0]) / 1e6:.2f} -> {len(contents[1]) / 1e6:.2f} MB | {made.report.passes[-1].changes} | {gain:.2f}x"
            )
            print(f"| {Path(path).stem} | {sparsity:.0%} | {row} |", flush=True)


def main() -> None:
    chosen = sys.argv[1:] or ["layers", "gemv"]
    print(f"instruction set of graphopt's kernels: {isa.detect()}; one thread; gains over dense onnxruntime\n")
    if "layers" in chosen:
        layers()
    if "gemv" in chosen:
        gemv()
    if "int8" in chosen:
        int8()
    if "models" in chosen:
        models([a for a in chosen if a not in ("layers", "gemv", "int8", "models")])


if __name__ == "__main__":
    main()
