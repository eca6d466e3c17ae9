"""Latency and memory of models in onnxruntime, measured so that a noisy machine cancels out."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ModelError
from graphopt.runtime import run, session

_PEAK = """
import sys, numpy as np, onnxruntime as ort, psutil
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"): return int(line.split()[1]) * 1024
def now():
    try: return peak()
    except OSError: pass
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"): return info.peak_wset  # Windows
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: in bytes
options = ort.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 4
feed = dict(np.load(sys.argv[2])); before = psutil.Process().memory_info().rss
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(3): session.run(None, feed)
print(max(now() - before, 0))
"""


ROUNDS = 9  # of `paired`, at least: fewer say nothing about the median at 99 %


@dataclass(frozen=True)
class Latency:
    """Milliseconds over `runs` runs of one feed of `batch` rows; `speedup` is the median of paired ratios to the first model."""

    p50_ms: float
    p95_ms: float
    runs: int
    batch: int
    threads: int
    speedup: float


def latency(
    models: Sequence[bytes | Path], feed: Mapping[str, np.ndarray], *, threads: int = 1, seconds: float = 2.0, rounds: int = 10
) -> list[Latency]:
    """Time the models interleaved in this process; each timed run follows an untimed one of the same model.

    Runs at least `rounds` rounds and about `seconds` in all. Ratios are paired round by round, so that whatever slows the
    machine slows all models alike. Raises ModelError where a model does not load or run.
    """
    runners = [session(m, threads=threads) for m in models]
    times: list[list[float]] = [[] for _ in runners]
    for runner in runners:
        run(runner, feed)
    deadline = time.perf_counter() + seconds
    while len(times[0]) < rounds or time.perf_counter() < deadline:
        for runner, taken in zip(runners, times, strict=True):
            run(runner, feed)  # caches and threads of the previous model are not this one's to pay for
            began = time.perf_counter()
            run(runner, feed)
            taken.append(time.perf_counter() - began)
    batch = next((int(v.shape[0]) for v in feed.values() if v.ndim), 1)
    first = np.array(times[0])
    return [
        Latency(
            p50_ms=float(np.median(t)) * 1e3,
            p95_ms=float(np.percentile(t, 95)) * 1e3,
            runs=len(t),
            batch=batch,
            threads=threads,
            speedup=float(np.median(first / np.array(t))),
        )
        for t in times
    ]


@dataclass(frozen=True)
class Paired:
    """Milliseconds of two models timed in turns. `speed`: of the second, as a multiple of the first's, the median over `rounds`
    pairs; it lies between `low` and `high` with about 99 % probability."""

    first_ms: float
    second_ms: float
    speed: float
    low: float
    high: float
    rounds: int


def paired(
    first: Any,
    second: Any,
    feed: Mapping[str, np.ndarray],
    *,
    border: float = 1.0,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Paired:
    """Time two sessions in turns until it is clear on which side of `border` the speed lies, or `seconds` are over.

    At least ROUNDS rounds; each timed run follows an untimed one of the same session. Raises ModelError where one does not run.
    """
    taken: tuple[list[float], list[float]] = ([], [])
    for runner in (first, second):
        run(runner, feed)
    deadline = clock() + seconds
    while True:
        for runner, times in zip((first, second), taken, strict=True):
            run(runner, feed)
            began = clock()
            run(runner, feed)
            times.append(max(clock() - began, 1e-9))
        if len(taken[0]) >= ROUNDS:
            found = _judged(np.array(taken))
            if found.low > border or found.high < border or clock() > deadline:
                return found


def _judged(taken: np.ndarray) -> Paired:
    """Medians of seconds [2, rounds], and the order statistics around the median of the ratios."""
    ratios, rounds = np.sort(taken[0] / taken[1]), taken.shape[1]
    edge = max(0, int(rounds / 2 - 1.3 * rounds**0.5))  # 2.6 standard deviations of the binomial distribution
    ends = float(ratios[edge]), float(ratios[-1 - edge])
    first, second = (float(t) * 1e3 for t in np.median(taken, axis=1))
    return Paired(first, second, float(np.median(ratios)), *ends, rounds)


def peak_memory(model: Path, feed: Mapping[str, np.ndarray]) -> int:
    """Bytes by which loading and running the model raises a fresh process's peak memory (one thread, three runs)."""
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "feed.npz"
        np.savez(path, **dict(feed))  # type: ignore[arg-type]
        command = [sys.executable, "-c", _PEAK, str(model), str(path)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise ModelError(f"{model}: onnxruntime failed in a fresh process: {done.stderr.strip().splitlines()[-1][:300]}")
    return int(done.stdout)


def cpu_features() -> dict[str, object]:
    """Model name and the instruction sets that decide INT8 speed, as the operating system reports them."""
    interesting = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "amx_tile", "asimddp", "i8mm")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        import platform

        return {"name": platform.processor() or platform.machine(), "features": []}
    fields = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {"name": fields.get("model name", "unknown"), "features": [f for f in interesting if f in flags]}
