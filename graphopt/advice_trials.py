"""The techniques that `graphopt advise` tries: what each makes of the model, and what can be said of it untried."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from graphopt import emit
from graphopt.advice_machine import weight_bytes
from graphopt.advice_report import Figure
from graphopt.audit_report import NodeAudit
from graphopt.context import Context, Progress
from graphopt.data import Dataset
from graphopt.errors import GraphoptError, PassError
from graphopt.external import LIMIT
from graphopt.gains import DOT_PRODUCTS
from graphopt.model import Model, from_proto
from graphopt.pipeline import StepResult, parse, run
from graphopt.quant import quantised_ops
from graphopt.targets import Target, find_target

GRAPHOPT = "ort-cpu+graphopt"
ONNXRUNTIME = "ort-cpu"
WITHOUT_DOT_PRODUCTS = "ort-cpu-no-vnni"
ZEROS = (0.7, 0.8, 0.9)  # shares of zeros that are tried: where sparse kernels begin to pay is between them
MACS = 0.8  # that pruning is to keep
BLOCK = 32  # weights of one scale, of 4-bit weights


@dataclass
class Case:
    """The model, what is known of it, and where results go. `folded`: after the exact passes; `profile`: of that."""

    model: Model
    folded: Model
    folder: Path
    calibration: Dataset
    target: Target
    operators: str  # why graphopt's library cannot run here, or ""
    features: Sequence[str] = ()
    progress: Progress = lambda what, done, total: None
    profile: Sequence[NodeAudit] = ()
    changes: int = 0  # that the exact passes made

    @property
    def here(self) -> bool:
        """Whether what runs on this machine says anything about the target."""
        return self.target.onnxruntime

    def plain(self) -> str:
        """The target for onnxruntime's own INT8: the one asked for, or what fits this CPU."""
        if self.target.name != GRAPHOPT:
            return self.target.name
        return ONNXRUNTIME if DOT_PRODUCTS & set(self.features) else WITHOUT_DOT_PRODUCTS

    @property
    def compiled(self) -> str:
        """Why the library's kernels are no choice, or ""."""
        if not self.here:
            return f"graphopt's library runs inside onnxruntime, not in {self.target.name}"
        return self.operators and f"graphopt's library cannot run here: {self.operators}"


@dataclass(frozen=True)
class Made:
    """A file that a technique made: `of` says how, `share` is the parameter where several are tried."""

    path: Path
    bytes: int
    of: str
    share: float | None = None
    results: tuple[StepResult, ...] = ()


@dataclass(frozen=True)
class Technique:
    """A row of the table. `affects`: nodes whose time and weights it changes, for estimates; `gain`: times as fast as these become,
    from the least to the most; `weights`: bytes of their weights over what they were.

    `passes` behind the exact ones; `asked`: what a user would run, where that is not the same.
    """

    name: str
    what: str
    make: Callable[[Case, Technique], list[Made]]
    risk: str
    needs: str
    passes: str = ""
    affects: frozenset[str] = frozenset()
    gain: tuple[float, float] = (1.0, 1.0)
    weights: float = 1.0
    exact: bool = False
    asked: str = ""
    ours: bool = False  # needs graphopt's library
    proxy: bool = False  # the trial is as fast as what a user would run, and not as good: its quality says nothing

    def command(self) -> str:
        """The pipeline for --passes."""
        return self.asked or (f"fold, {self.passes}" if self.passes else "fold")


def saved(case: Case, model: Model, name: str, of: str, share: float | None = None, results: Sequence[StepResult] = ()) -> Made:
    """Write the model into the folder of trials."""
    files = emit.save(model, case.folder / f"{name}.onnx", overwrite=True)
    return Made(files[0], sum(f.stat().st_size for f in files), of, share, tuple(results))


def _piped(case: Case, passes: str, target: str, name: str, share: float | None = None) -> Made:
    """Run the passes on a copy of the folded model. PassError where they change nothing."""
    work = from_proto(case.folded.proto())
    results = run(work, parse(passes), Context(case.calibration, find_target(target), case.progress))
    last = results[-1]
    if not last.changes:
        reasons = ", ".join(dict.fromkeys(f"{r.reason} ({r.count} {r.op})" for r in last.rejected[:3]))
        raise PassError(last.name, "changes nothing here" + (f": {reasons}" if reasons else ""))
    return saved(case, work, name, f"the model as `fold, {passes}` makes it", share, results)


def _cleanup(case: Case, technique: Technique) -> list[Made]:
    if not case.changes:
        raise PassError("fold", "finds nothing to clean up or to fold")
    return [saved(case, case.folded, technique.name, "the model as `fold` makes it")]


def _float_only(case: Case, technique: Technique) -> None:
    found = quantised_ops(case.model)
    if found:
        named = ", ".join(f"{count} {op}" for op, count in found.most_common(3))
        raise PassError(technique.name, f"the model is quantised already ({named}); give the float model it was made from")


def _int8(case: Case, technique: Technique) -> list[Made]:
    _float_only(case, technique)
    return [_piped(case, technique.passes, case.plain(), technique.name)]


def _compiled(case: Case, technique: Technique) -> list[Made]:
    if case.compiled:
        raise PassError(technique.name, case.compiled)
    already = bool(quantised_ops(case.model))
    passes = "compile-int8" if already else technique.passes
    return [_piped(case, f"{passes} boundaries=estimated", GRAPHOPT, technique.name)]


def _pruned(case: Case, technique: Technique) -> list[Made]:
    _float_only(case, technique)
    return [_piped(case, technique.passes, case.plain(), technique.name, MACS)]


def _sparse(case: Case, technique: Technique) -> list[Made]:
    """With more and more zeros; or as it is, where the model has zeros already."""
    if case.compiled:
        raise PassError(technique.name, case.compiled)
    if _zeros(case.folded) >= min(ZEROS) - 0.2:
        return [_piped(case, "compile-sparse choose=table", GRAPHOPT, "sparse-as-it-is")]
    made, problem = [], ""
    for share in ZEROS:
        passes = technique.passes.format(share)
        try:
            made.append(_piped(case, passes, GRAPHOPT, f"{technique.name}{100 * share:.0f}", share))
        except PassError as error:  # too dense for any layer to pay
            problem = str(error)
    if not made:
        raise PassError(technique.name, problem)
    return made


def _zeros(model: Model) -> float:
    """Share of zeros in the weights of layers."""
    weights = {id(t): t for n in model.graph.nodes if n.op in HEAVY for t in n.inputs if _is_matrix(t)}
    sizes = [(t.values.size, int(np.count_nonzero(t.values))) for t in weights.values() if t.dtype == np.float32]
    total = sum(size for size, _ in sizes)
    return 1 - sum(filled for _, filled in sizes) / total if total else 0.0


def _is_matrix(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and len(tensor.shape) > 1


def _nbits(case: Case, technique: Technique) -> list[Made]:
    from graphopt.advice_nbits import to_nbits

    _float_only(case, technique)
    work = from_proto(case.folded.proto())
    count = to_nbits(work, BLOCK)
    if not count:
        raise PassError(technique.name, "no float32 product has a constant weight matrix that nothing else reads")
    of = f"{count} products with 4-bit weights rounded to nearest"
    made = [saved(case, work, technique.name, f"{of}, onnxruntime's kernels")]
    if not case.compiled:
        ours = from_proto(work.proto())
        run(ours, parse(f"{technique.passes} measure=false"), Context(case.calibration, find_target(GRAPHOPT), case.progress))
        made.append(saved(case, ours, f"{technique.name}-compiled", f"{of}, graphopt's kernels"))
    return made


def _fp16(case: Case, technique: Technique) -> list[Made]:
    _float_only(case, technique)
    try:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        converted = convert_float_to_float16(case.folded.proto(), keep_io_types=True)
    except Exception as error:  # a part of onnxruntime that not every build has, and that fails in its own ways
        raise PassError(technique.name, f"onnxruntime's converter fails: {' '.join(str(error).split())[:200]}") from error
    return [saved(case, from_proto(converted), technique.name, "the model as onnxruntime's own converter makes it")]


HEAVY = frozenset({"Conv", "Gemm", "MatMul", "ConvTranspose"})
_ROWS = "100 or more typical rows for calibration (no labels)"
_LABELS = "; labelled rows to measure what is lost"
_MEASURE = "labelled rows to measure what is lost"
TECHNIQUES = (
    Technique(
        name="cleanup",
        what="fewer nodes, BatchNormalization and scales folded: the same outputs",
        make=_cleanup,
        risk="none: exact",
        needs="nothing",
        exact=True,
    ),
    Technique(
        name="int8",
        what="INT8 by the runtime's own kernels",
        make=_int8,
        passes="quantize",
        risk="small where ranges are well known",
        needs=f"{_ROWS}; {_MEASURE}",
        affects=HEAVY,
        gain=(0.7, 4.0),
        weights=0.25,
    ),
    Technique(
        name="int8-compiled",
        what="INT8 by graphopt's kernels inside onnxruntime",
        make=_compiled,
        passes="quantize, compile-int8",
        risk="small where ranges are well known",
        needs=f"{_ROWS}; {_MEASURE}",
        affects=HEAVY,
        gain=(1.0, 4.0),
        weights=0.25,
        ours=True,
    ),
    Technique(
        name="nbits",
        what="4-bit weights of matrix products",
        make=_nbits,
        passes="compile-nbits",
        risk="grows as models get smaller",
        needs=f"onnxruntime's quantiser, with its package onnx_ir; {_MEASURE}",
        affects=frozenset({"MatMul"}),
        gain=(0.3, 4.0),
        weights=5 / 32,
        ours=True,
    ),
    Technique(
        name="prune",
        what=f"units removed until {100 * MACS:.0f} % of the MACs stay",
        make=_pruned,
        passes=f"prune-channels macs={MACS} scope=global",
        risk="about a point for a fifth of the MACs, repaired; much more without repair",
        needs=f"{_ROWS}; {_MEASURE}",
        affects=HEAVY,
        gain=(1.0, 1 / MACS),
        weights=MACS,
        asked=f"prune macs={MACS}",
        proxy=True,
    ),
    Technique(
        name="sparse",
        what="zeros among the weights, skipped by graphopt's kernels",
        make=_sparse,
        passes="sparsify ratio={}, compile-sparse choose=table",
        risk="large without retraining, less where zeros are fitted to calibration rows",
        needs=f"a model that was trained sparse, or {_ROWS}; {_MEASURE}",
        affects=HEAVY,
        gain=(1.0, 4.0),
        weights=0.125,
        ours=True,
        proxy=True,
    ),
    Technique(
        name="fp16",
        what="float16 throughout",
        make=_fp16,
        risk="small",
        needs=_MEASURE,
        affects=HEAVY,
        gain=(0.3, 1.0),
        weights=0.5,
    ),
)


def attempt(case: Case, technique: Technique) -> tuple[list[Made], str]:
    """What the technique makes, or why it makes nothing."""
    if case.model.weight_bytes() > LIMIT:
        return [], "models over 2 GB are not tried"
    try:
        return technique.make(case, technique), ""
    except (GraphoptError, MemoryError) as error:
        return [], str(error).removeprefix(f"{technique.name}: ")


def estimated(case: Case, technique: Technique) -> tuple[Figure | None, Figure | None]:
    """(speed, size) without trying it: by the share of the profiled time, and of the weights, of the nodes that it changes."""
    if not case.here or not case.profile or technique.exact:
        return None, None
    nodes = {str(n.name): n for n in case.folded.graph.nodes}
    mine = [r for r in case.profile if r.name in nodes and nodes[r.name].op in technique.affects and weight_bytes(nodes[r.name])]
    share = sum(r.us for r in mine) / (sum(r.us for r in case.profile) or 1.0)
    part = sum(weight_bytes(nodes[r.name]) for r in mine) / max(case.model.weight_bytes(), 1)
    low, high = (1 / (1 - share + share / g) for g in technique.gain)
    least, most = technique.gain
    said = f"{100 * share:.0f} % of the time is in nodes that it changes, taken to become {least:g} to {most:g} times as fast"
    speed = Figure(value=sqrt(low * high), low=low, high=high, basis="estimated", of=said)
    size = 1 - part + part * technique.weights
    held = f"{100 * part:.0f} % of the weights are in these nodes"
    return speed, Figure(value=size, low=0.9 * size, high=1.1 * size, basis="estimated", of=held)
