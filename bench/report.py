"""graphopt against its peers as ratios: `python bench/report.py [--only TEXT] [--rounds N] [--model M --calib D] [--json FILE]`.

The tools of a job run in turn, in one process, each round once; ratios are taken within a round, so that whatever slows the
machine slows both, and their median is shown: above 1.00, graphopt is that many times faster. Every row is printed, lost ones too.
`--model` and `--calib` add the calibration and quantisation jobs on a model and data of yours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import jobs

from graphopt.measure import cpu_features

TOOLS = ("graphopt", "onnx", "onnxruntime", "onnx-graphsurgeon", "onnxslim", "onnxsim")
Factory = Callable[[Path], jobs.Jobs]  # from a folder to write in


@dataclass(frozen=True)
class Row:
    """Seconds are medians over the rounds, `ratio` the median of paired ratios (peer / graphopt), with the extremes."""

    job: str
    model: str
    peer: str
    seconds: float
    peer_seconds: float
    ratio: float
    lowest: float
    highest: float
    rounds: int
    failed: str = ""


def plan(models: list[tuple[str, Path, Path]]) -> Iterator[tuple[str, str, Factory]]:
    """(job, model, factory) of everything measured; `models` are (name, file, data) to calibrate and quantise."""
    for name in (*jobs.CLEANUP_MODELS, "generated_20000"):
        yield "load and save", name, lambda f, n=name: jobs.load_and_save(jobs.workload(n, f), f)  # type: ignore[misc]
    for name in jobs.CLEANUP_MODELS:
        yield "cleanup", name, lambda f, n=name: jobs.cleanup(jobs.workload(n, f), f)  # type: ignore[misc]
    for job, make in (("calibrate", jobs.calibration), ("quantize", jobs.quantize), ("end to end", jobs.end_to_end)):
        for name, path, data in models:
            for method in jobs.METHODS:
                yield f"{job} {method}", name, lambda f, m=make, p=path, d=data, how=method: m(p, d, f, how)  # type: ignore[misc]


def measure(job: str, model: str, tools: jobs.Jobs, rounds: int) -> list[Row]:
    """Warm up every tool once, then time them in turn; a peer that fails gets a row that says so."""
    taken: dict[str, list[float]] = {}
    failed = {}
    for tool, run in tools.items():
        try:
            _quiet(run)
            taken[tool] = []
        except Exception as error:  # the peers raise whatever they like
            if tool == "graphopt":
                raise
            failed[tool] = f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    for _ in range(rounds):
        for tool, times in taken.items():
            times.append(_quiet(tools[tool]))
    ours = taken.pop("graphopt")
    rows = [_row(job, model, peer, ours, theirs) for peer, theirs in taken.items()]
    nan = float("nan")
    return rows + [Row(job, model, peer, statistics.median(ours), nan, nan, nan, nan, rounds, why) for peer, why in failed.items()]


def _row(job: str, model: str, peer: str, ours: list[float], theirs: list[float]) -> Row:
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    seconds, peer_seconds, ratio = (statistics.median(x) for x in (ours, theirs, ratios))
    return Row(job, model, peer, seconds, peer_seconds, ratio, min(ratios), max(ratios), len(ratios))


def _quiet(run: Callable[[], object]) -> float:
    """Seconds of one run, with what it prints thrown away."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        began = time.perf_counter()
        run()
        return time.perf_counter() - began


def environment() -> dict[str, object]:
    """Versions and CPU, for the head of the table."""
    return {"cpu": cpu_features(), "python": sys.version.split()[0], "versions": {tool: version(tool) for tool in TOOLS}}


def _line(row: Row) -> str:
    if row.failed:
        return f"| {row.job} | {row.model} | {row.peer} | {row.seconds:.3f} | failed: {row.failed} | | |"
    lost = " (slower)" if row.ratio < 1 else ""
    return (
        f"| {row.job} | {row.model} | {row.peer} | {row.seconds:.3f} | {row.peer_seconds:.3f} | {row.ratio:.2f}{lost} "
        f"| {row.lowest:.2f} .. {row.highest:.2f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="jobs and models whose 'job model' contains this")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="a float model to calibrate and quantise too")
    parser.add_argument("--calib", type=Path, help="its calibration rows")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    models = [("digits", jobs.workload("digits", Path()), jobs.digits_data())]
    if args.model:
        models.append((args.model.stem, args.model, args.calib))
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # where zoo.py lies
    about = environment()
    print(json.dumps(about))
    print("| job | model | peer | graphopt s | peer s | peer / graphopt | range |\n|---|---|---|---|---|---|---|")
    rows = []
    for job, model, factory in plan(models):
        if args.only not in f"{job} {model}":
            continue
        with tempfile.TemporaryDirectory(prefix="graphopt-bench-") as folder:
            rows += (found := measure(job, model, factory(Path(folder)), args.rounds))
        print("\n".join(map(_line, found)), flush=True)
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1))


if __name__ == "__main__":
    main()
