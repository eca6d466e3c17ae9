"""Node counts after simplification, against onnxslim and onnxsim: `python bench/nodes.py [MODEL.onnx ...] [--zoo] [--light]`.

Each tool runs with its defaults in a process of its own, all on the same files in the same run. Every node counts, also in
bodies; a Constant node is a node. `stored` is graphopt told to store every constant, as the peers do, whatever the file
grows to.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

PASSES = "fold"  # the preset: cleanup with fold-bn and fold-scales
STORED = "fold-constants max_bytes=1000000000 compact_bytes=1000000000, fold"  # filled and cast weights too, as the peers do
TOOLS = {
    "onnxslim": "import sys, onnx, onnxslim; onnx.save(onnxslim.slim(sys.argv[1]), sys.argv[2])",
    "onnxsim": "import sys, onnx, onnxsim; onnx.save(onnxsim.simplify(onnx.load(sys.argv[1]))[0], sys.argv[2])",
    "graphopt": f"import sys, graphopt; graphopt.optimize(sys.argv[1], passes='{PASSES}').save(sys.argv[2])",
    "stored": f"import sys, graphopt; graphopt.optimize(sys.argv[1], passes='{STORED}').save(sys.argv[2])",
}
OURS = ("graphopt", "stored")


@dataclass(frozen=True)
class Counts:
    """Nodes by op, those of bodies too, and the size of the file in bytes."""

    ops: Counter[str]
    size: int


@dataclass(frozen=True)
class Row:
    """The file, and what each tool made of it; None where the tool failed or took too long."""

    name: str
    original: Counts
    results: dict[str, Counts | None]

    def total(self, tool: str) -> int | None:
        """Nodes left by the tool."""
        found = self.results[tool]
        return None if found is None else found.ops.total()

    @property
    def lost_to(self) -> list[str]:
        """The tools that leave fewer nodes than graphopt."""
        ours = self.total("graphopt")
        totals = {tool: self.total(tool) for tool in TOOLS if tool not in OURS}
        return [tool for tool, total in totals.items() if total is not None and (ours is None or total < ours)]

    def explain(self, tool: str) -> str:
        """How graphopt and the tool differ: by op, and in what they store (folding weights saves nodes and costs bytes)."""
        ours, theirs = self.results["graphopt"], self.results[tool]
        if ours is None or theirs is None:
            return "no result"
        ops = {op: ours.ops[op] - theirs.ops[op] for op in sorted({*ours.ops, *theirs.ops}) if ours.ops[op] != theirs.ops[op]}
        return f"{ops}; stores {ours.size / 1e6:.1f} MB, {tool} {theirs.size / 1e6:.1f} MB"


def count(path: Path) -> Counts:
    """What is in the file."""
    return Counts(Counter(_ops(onnx.load(str(path), load_external_data=False).graph)), path.stat().st_size)


def _ops(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _ops(attribute.g)


def simplify(tool: str, path: Path, *, seconds: float = 120) -> Counts | None:
    """What the tool leaves of the model; None where it fails or does not come back in time."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "model.onnx"
        command = [sys.executable, "-c", TOOLS[tool], str(path), str(result)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=seconds, env=environment)
            return count(result)
        except (subprocess.SubprocessError, OSError):
            return None


def rows(models: Iterable[tuple[str, Path]], *, seconds: float = 120) -> Iterator[Row]:
    """One row a model, as soon as all tools are done with it."""
    for name, path in models:
        yield Row(name, count(path), {tool: simplify(tool, path, seconds=seconds) for tool in TOOLS})


def zoo(light: bool) -> Iterator[tuple[str, Path]]:
    """The real models of the tests (or onnx's light ones), those that can be had."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import zoo as models

    if light:
        yield from models.light_models().items()
        return
    for id in models.MODELS:
        try:
            yield id, models.fetch(id)
        except models.Unavailable as reason:
            print(f"{id}: left out: {reason}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--zoo", action="store_true", help="the real models of the tests")
    parser.add_argument("--light", action="store_true", help="the light models inside the onnx package")
    parser.add_argument("--seconds", type=float, default=120, help="time limit for each tool and model")
    options = parser.parse_args(arguments)
    models = [(path.stem, path) for path in options.models]
    for wanted, light in ((options.zoo, False), (options.light, True)):
        models += list(zoo(light)) if wanted else []
    print(f"{'model':28} {'file':>6}" + "".join(f" {tool:>9}" for tool in TOOLS))
    lost = []
    for row in rows(models, seconds=options.seconds):
        cells = [row.total(tool) for tool in TOOLS]
        print(f"{row.name:28} {row.original.ops.total():6}" + "".join(f" {'-' if c is None else c:>9}" for c in cells), flush=True)
        lost += [(row, tool) for tool in row.lost_to]
    for row, tool in lost:
        print(f"{row.name}: more than {tool}: {row.explain(tool)}")


if __name__ == "__main__":
    main()
