"""Named pipelines. A preset is used wherever a pass name is: on the command line, in TOML, in other presets."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`repeat`: run again until no pass of it changes anything (its passes enable each other).

    `options_of`: the pass that options of the preset are meant for; without one it takes none.
    """

    passes: str
    summary: str
    repeat: bool = False
    options_of: str = ""


SIMPLIFY = "fold-constants, remove-noops, drop-defaults, merge-reshapes, fuse-pads"
MERGE = "common-subexpressions, merge-initializers, flush-denormals, dead-code"
CLEANUP = f"{SIMPLIFY}, {MERGE}"
FOLD = f"{SIMPLIFY}, fold-bn, fold-scales, {MERGE}"  # folding before merging: a weight that several nodes share cannot take a scale

PRESETS: dict[str, Preset] = {
    "cleanup": Preset(CLEANUP, "exact simplification: fewer nodes, the same outputs", repeat=True),
    "fold": Preset(FOLD, "cleanup, and per-channel scales folded into the weights", repeat=True),
    "int8": Preset("fold, quantize", "fold, then INT8 (needs calibration data)"),
    "int8-compiled": Preset(
        "fold, quantize, compile-int8",
        "the same, and INT8 regions compiled for graphopt's library (give --target ort-cpu+graphopt)",
    ),
    "prune": Preset(
        "fold, prune-search macs=0.8, cleanup",
        "fold, then units removed and layers repaired until 80 % of the MACs stay, or `prune macs=0.6` (needs calibration data)",
        options_of="prune-search",
    ),
    "sparse": Preset(
        "fold, sparsify ratio=0.8, compile-sparse",
        "fold, four of five weights made zero, and stored and run sparse where that is faster (give --target ort-cpu+graphopt)",
    ),
    "prune-int8": Preset(
        "fold, prune-search macs=0.8, cleanup, quantize",
        "the same, then INT8",
        options_of="prune-search",
    ),
}
