"""From figures to advice: which of a technique's trials counts, the verdict and its reasons, the commands."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from graphopt.advice_judge import FASTER, Original, quality, verdict
from graphopt.advice_report import Advice, Figure, Quality, Verdict
from graphopt.advice_rows import Rows
from graphopt.advice_trials import BLOCK, GRAPHOPT, ONNXRUNTIME, Case, Made, Technique, estimated
from graphopt.emit import sources
from graphopt.errors import GraphoptError, ModelError
from graphopt.feeds import Feed
from graphopt.pipeline import parse

if TYPE_CHECKING:
    from graphopt.advice import AdviceSettings, Tried

_ORDER: tuple[Verdict, ...] = ("do", "try", "unsure", "refuse")
_EXPLAINED = 3  # lines of an audit


@dataclass(frozen=True)
class Asked:
    """What was asked for, and what is known beside the trials."""

    path: Path
    case: Case
    rows: Rows
    known: Original | None
    feed: Feed
    settings: AdviceSettings


def ranked(asked: Asked, tried: Sequence[Tried]) -> list[Advice]:
    """One row a technique, the best first."""
    before = asked.path.stat().st_size + sum(f.stat().st_size for f in sources(asked.case.model))
    made = [_tried(asked, t, before) if t.made else _untried(asked, t) for t in tried]
    return sorted(made, key=lambda a: (_ORDER.index(a.verdict), -(a.speed.low if a.speed else 0.0)))


def _tried(asked: Asked, t: Tried, before: int) -> Advice:
    best = chosen(t)
    made, speed = t.made[best], t.speeds[best] if t.speeds else None
    if speed is not None:
        speed = speed.model_copy(update={"of": f"{made.of}; {speed.of}"})
    ratio = made.bytes / max(before, 1)
    size = Figure(value=ratio, low=ratio, high=ratio, basis="measured", of=made.of)
    found = None if t.technique.proxy else _quality(asked.known, made)
    slack = asked.settings.slack
    if not asked.case.here:
        kind, why = _elsewhere(asked.case, t.technique, made, size, found, slack)
    elif speed is None:
        kind, why = "refuse", "onnxruntime does not run what it makes"
    else:
        kind, why = verdict(speed, size, found, exact=t.technique.exact, slack=slack)
    why = "; ".join([why, *_more(asked, t, made, speed)])
    return _advice(asked, t.technique, made, (speed, size, found), (kind, why))


def _untried(asked: Asked, t: Tried) -> Advice:
    speed, size = estimated(asked.case, t.technique) if t.late else (None, None)
    kind: Verdict = "unsure" if t.late else "refuse"
    why = f"{t.problem}: give more --seconds" if t.late else t.problem
    if speed is not None and speed.high <= FASTER:
        kind, why = "refuse", f"{t.problem}, and little can be gained: {speed.of}"
    return _advice(asked, t.technique, None, (speed, size, None), (kind, why))


def _quality(known: Original | None, made: Made) -> Quality | None:
    """Where there are rows; None where it does not run."""
    try:
        return None if known is None else quality(known, made.path)
    except ModelError:
        return None


def _advice(
    asked: Asked,
    technique: Technique,
    made: Made | None,
    figures: tuple[Figure | None, Figure | None, Quality | None],
    judged: tuple[Verdict, str],
) -> Advice:
    pipeline = passes(technique, made, given=asked.rows.given)
    return Advice(
        technique=technique.name,
        what=technique.what,
        passes=pipeline or None,
        speed=figures[0],
        size=figures[1],
        quality=figures[2],
        risk=technique.risk,
        needs=technique.needs,
        verdict=judged[0],
        why=judged[1],
        commands=[] if judged[0] == "refuse" else commands(asked, technique, pipeline),
    )


def chosen(t: Tried) -> int:
    """Of several trials: of shares, the first that pays, else the last; of other kinds the fastest."""
    speeds = [s.low if s is not None else 0.0 for s in t.speeds] or [0.0] * len(t.made)
    if t.made[0].share is None:
        return max(range(len(speeds)), key=speeds.__getitem__)
    return next((i for i, low in enumerate(speeds) if low > FASTER), len(speeds) - 1)


# ---- reasons


def _more(asked: Asked, t: Tried, made: Made, speed: Figure | None) -> list[str]:
    """What else belongs to the reason."""
    found = [_REMARKS.get(t.technique.name, "")]
    if len(t.made) > 1 and made.share is not None:
        each = [f"{s.value:.2f}x at {100 * (m.share or 0):.0f} %" for m, s in zip(t.made, t.speeds, strict=False) if s is not None]
        found.append(f"by share of zeros: {', '.join(each)}" if each else "")
    if t.technique.name == "int8" and speed is not None and speed.low < FASTER:
        found.append(_explained(asked.case, made, asked.feed))
    return [f for f in found if f]


_REMARKS = {
    "prune": "timed with units that magnitude chose, unrepaired; `prune` chooses and repairs by calibration rows",
    "sparse": "timed with zeros by magnitude; zeros fitted to calibration rows lose far less",
}


def _explained(case: Case, made: Made, feed: Feed) -> str:
    """Where INT8 loses its time, by an audit of the trial against the folded model."""
    from graphopt.auditing import audit

    try:
        report = audit(made.path, base=case.folder / "profiled.onnx", data=feed, runs=30)
    except GraphoptError:
        return ""
    lines = [line for line in report.explanation[1:] if line.startswith(("+", "this CPU"))]
    return f"where it loses: {'; '.join(lines[:_EXPLAINED])}" if lines else ""


def _elsewhere(
    case: Case, technique: Technique, made: Made, size: Figure, found: Quality | None, slack: float
) -> tuple[Verdict, str]:
    """For a target that cannot be timed here: what is known is what would run in INT8, and quality."""
    name = case.target.name
    if technique.exact:
        return "do", f"exact; how much faster it is in {name} must be measured there"
    if found is not None:
        one = Figure(value=1.0, low=1.0, high=1.0, basis="estimated", of="")
        kind, why = verdict(one, size, found, exact=False, slack=slack)
        if kind == "refuse":
            return kind, why
    facts = made.results[-1].facts if made.results else {}
    quantized = ", ".join(f"{count} {op}" for op, count in facts.get("quantized_nodes", {}).items())
    if quantized:
        return "try", f"{name} runs these in INT8: {quantized}; measure there how much faster it is"
    return "unsure", f"how fast it is in {name} must be measured there"


# ---- commands


def passes(technique: Technique, made: Made | None, *, given: bool) -> str:
    """The pipeline that a user runs; "" where no pass of graphopt does it. `given`: there are calibration rows."""
    if technique.name == "fp16":
        return ""
    if technique.name == "nbits":
        return technique.passes
    if technique.name == "sparse":
        share = made.share if made is not None else 0.9
        fitted = " criterion=alps scope=sensitivity" * given
        return "fold, compile-sparse" if share is None else f"fold, sparsify ratio={share:g}{fitted}, compile-sparse"
    if technique.name == "int8-compiled" and made is not None and made.of.startswith("the model as `fold, compile-int8"):
        return "fold, compile-int8"
    return technique.command()


def commands(asked: Asked, technique: Technique, pipeline: str) -> list[str]:
    """What to run, word for word; calib.npz stands for rows that were not given as a file."""
    source, output = asked.path, asked.path.with_name(f"{asked.path.stem}.{technique.name}.onnx")
    if not pipeline:
        return [f"python -c {shlex.quote(_FP16.format(repr(str(source)), repr(str(output))))}"]
    found = []
    if technique.name == "nbits":
        middle = asked.path.with_name(f"{asked.path.stem}.4bit.onnx")
        found.append(_NBITS.format(_quoted(source), _quoted(middle), BLOCK))
        source = middle
    command = ["graphopt optimize", _quoted(source), "-o", _quoted(output), "--passes", f'"{pipeline}"']
    target = GRAPHOPT if technique.ours else asked.case.plain()
    quantizes = "quantize" in pipeline.replace(",", " ").split() or technique.ours
    command += ["--target", target] if target != ONNXRUNTIME and (quantizes or not asked.case.here) else []
    data, labelled = asked.settings.data, asked.settings.evaluation
    if any(step.entry.needs_data or "criterion" in step.options for step in parse(pipeline)):
        command += ["--calib", _text(data if data is not None else labelled) or "calib.npz"]
    labelled = labelled if labelled is not None else data if asked.rows.labelled else None
    if not technique.exact and (named := _text(labelled)) is not None:
        command += ["--eval", named]
    return [*found, " ".join(command)]


_NBITS = (
    "python -m onnxruntime.quantization.matmul_nbits_quantizer --input_model {} --output_model {} --block_size {} --symmetric true"
)
_FP16 = (
    "import onnx; from onnxruntime.transformers.float16 import convert_float_to_float16 as convert; "
    "onnx.save(convert(onnx.load({}), keep_io_types=True), {})"
)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _text(source: object) -> str | None:
    """As the command line takes it; None for arrays and functions."""
    return shlex.quote(str(source)) if isinstance(source, str | Path) else None
