"""Memory of a model in a fresh process, and the energy counters of the machine where it shows them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ModelError

RAPL = Path("/sys/class/powercap")
_MEMORY = """
import json, sys, numpy as np, onnxruntime as ort, psutil
from graphopt.operators import choose
def high():
    try:
        for line in open("/proc/self/status"):
            if line.startswith("VmHWM"): return int(line.split()[1]) * 1024
    except OSError: pass
    info = psutil.Process().memory_info()
    return getattr(info, "peak_wset", info.rss)
rss = lambda: psutil.Process().memory_info().rss
options = ort.SessionOptions(); options.intra_op_num_threads = 1; options.log_severity_level = 4
how = choose(options, sys.argv[1], None, fallback=True)
feed = dict(np.load(sys.argv[2])); before, top = rss(), high()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
loaded = rss()
for _ in range(3): session.run(None, feed)
peak = high() if high() > top else rss()
found = {"load": loaded - before, "run": rss() - before, "peak": peak - before}
print(json.dumps({**{k: max(v, 0) for k, v in found.items()}, "operators": str(how)}))
"""


def memory(model: Path, feed: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Bytes that loading (`load`) and three runs (`run`) of one thread leave in a fresh process, and the `peak` between.

    What graphopt's operators take to be compiled is not counted; `operators` says how they ran. Raises ModelError.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        path = Path(folder) / "feed.npz"
        np.savez(path, **dict(feed))  # type: ignore[arg-type]
        command = [sys.executable, "-c", _MEMORY, str(model), str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        except (OSError, subprocess.SubprocessError) as error:
            raise ModelError(f"no fresh process could be run: {error}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
        raise ModelError(f"onnxruntime failed in a fresh process: {said[-1][:300]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@dataclass(frozen=True)
class Energy:
    """RAPL's package counters: (counter file, where it wraps), or the reason why there are none."""

    counters: tuple[tuple[Path, int], ...]
    said: str

    def joules(self, run: Callable[[], Any], seconds: float) -> float | None:
        """Of one run, over as many as take `seconds`; None where there are no counters."""
        if not self.counters:
            return None
        before, count, deadline = self._read(), 0, time.perf_counter() + seconds
        while not count or time.perf_counter() < deadline:
            run()
            count += 1
        after = self._read()
        used = sum((b - a) % top for a, b, (_, top) in zip(before, after, self.counters, strict=True))
        return used / 1e6 / count

    def _read(self) -> list[int]:
        return [int(path.read_text()) for path, _ in self.counters]


def energy_counters(root: Path = RAPL) -> Energy:
    """The counters of whole CPU packages that this process may read."""
    zones = [z for z in sorted(root.glob("*rapl:*")) if z.name.count(":") == 1]
    if not zones:
        return Energy((), "energy was not measured: this machine exposes no RAPL counters")
    found = []
    for zone in zones:
        try:
            int((zone / "energy_uj").read_text())
            found.append((zone / "energy_uj", int((zone / "max_energy_range_uj").read_text()) + 1))
        except (OSError, ValueError) as error:
            return Energy((), f"energy was not measured: {zone.name} cannot be read ({error}); its counters are for root only")
    return Energy(tuple(found), f"joules of {len(found)} CPU packages as RAPL counts them, whatever else the machine did included")
