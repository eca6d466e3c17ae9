"""How long a region would take with graphopt's operators and with onnxruntime, from a table: for models that are not timed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from graphopt.region_find import Region
from graphopt.region_units import Unit

SEVEN_BITS = 64  # the largest weight of which two, times 255, fit int16: onnxruntime without VNNI adds pairs in 16 bits


@dataclass(frozen=True)
class Rate:
    """GMAC a second, ns for each byte written, us for each operator."""

    gmacs: float
    byte: float
    op: float

    def microseconds(self, macs: int, written: int) -> float:
        return macs / self.gmacs / 1e3 + written * self.byte / 1e3 + self.op


# One thread of an AMD Zen 3 at about 3.4 GHz (AVX2, no VNNI), onnxruntime 1.32: bench/bench_kernels.py, fitted. Only ratios matter.
OURS: Mapping[str, Rate] = {
    "dense": Rate(105.0, 0.30, 0.3),
    "depthwise": Rate(26.0, 0.05, 0.3),
    "other": Rate(1.0, 0.15, 0.3),
}
THEIRS: Mapping[str, Rate] = {
    "dense": Rate(93.0, 0.14, 2.0),
    "depthwise": Rate(16.0, 0.05, 2.0),
    "other": Rate(1.0, 0.35, 2.0),
}


def saturates(region: Region) -> bool:
    """Whether onnxruntime's kernels, on a CPU without INT8 dot products, may compute something else than these integers."""
    return any(unit.weight is not None and bool((abs(unit.weight.values.astype(int)) > SEVEN_BITS).any()) for unit in region.units)


def _kind(unit: Unit) -> str:
    if not unit.heavy:
        return "other"
    return "depthwise" if unit.kind == "conv" and int(unit.node.attrs.get("group", 1)) > 1 and _thin(unit) else "dense"


def _thin(unit: Unit) -> bool:
    return unit.weight is not None and len(unit.weight.values.shape) > 2 and unit.weight.values.shape[1] == 1


def estimate(region: Region, macs: Mapping[str, int]) -> tuple[float, float] | None:
    """Microseconds of one row (onnxruntime's, graphopt's); None where a size is not known. `macs`: of each node, by name."""
    theirs = ours = 0.0
    for unit in region.units:
        written = 0
        for tensor in unit.outputs:
            sizes = [d if isinstance(d, int) else None for d in region.site.shapes.shape(tensor.name) or (None, None)]
            if None in sizes[1:]:
                return None
            written += prod(d for d in sizes[1:] if d)
        kind, count = _kind(unit), macs.get(unit.node.name, 0)
        if unit.heavy and not count:
            return None
        theirs += THEIRS[kind].microseconds(count if unit.heavy else 0, written)
        ours += OURS[kind].microseconds(count if unit.heavy else 0, written)
    return theirs, ours
