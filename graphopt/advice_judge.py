"""Speed and quality of the models that `graphopt advise` made, and what follows from them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.advice_report import Figure, Quality, Verdict
from graphopt.compare import OutputDifference, differences
from graphopt.data import Dataset
from graphopt.errors import ModelError
from graphopt.evaluate import paired, score
from graphopt.runtime import Feed, run, session

BLOCKS = 3  # of sessions made anew: one is some per cent faster or slower than another for its whole life
ROUNDS = 5  # of a block, at least
FASTER, SMALLER = 1.02, 0.9  # ratios from which a difference is worth naming
NOT_SLOWER, NO_GAIN = 0.97, 1.05
LOUD = 6.0  # dB: an error half as large as the outputs
CHANCE = 0.05


def timed(paths: Sequence[Path], feed: Feed, seconds: float) -> list[Figure | None]:
    """The speed of each model over the first's, interleaved, one thread, the first itself among them; None where one does not run.

    The interval is that of the median of all paired ratios, with about 99 % probability, widened to the medians of all blocks.
    """
    usable = [i for i, p in enumerate(paths) if _runs(p, feed)]
    blocks = [_block([paths[0], *(paths[i] for i in usable)], feed, seconds / BLOCKS, number) for number in range(BLOCKS)]
    found: list[Figure | None] = [None] * len(paths)
    for place, i in enumerate(usable, 1):
        ratios = [taken[0] / taken[place] for taken in blocks]
        every = np.sort(np.concatenate(ratios))
        middle = float(np.median(every))
        ends = [*_ends(every), middle, *(float(np.median(r)) for r in ratios)]
        said = f"{len(every)} paired runs, one row, one thread"
        found[i] = Figure(value=middle, low=min(ends), high=max(ends), basis="measured", of=said)
    return found


def _runs(path: Path, feed: Feed) -> bool:
    try:
        run(session(path), feed)
    except ModelError:
        return False
    return True


def _block(paths: Sequence[Path], feed: Feed, seconds: float, seed: int) -> np.ndarray:
    """Seconds [models, rounds]; each timed run follows an untimed one of the same model."""
    random, runners = np.random.default_rng(seed), [session(p) for p in paths]
    for runner in runners:
        run(runner, feed)
    taken: list[list[float]] = [[] for _ in runners]
    deadline = time.perf_counter() + seconds
    while len(taken[0]) < ROUNDS or time.perf_counter() < deadline:
        for i in random.permutation(len(runners)):
            run(runners[i], feed)
            began = time.perf_counter()
            run(runners[i], feed)
            taken[i].append(max(time.perf_counter() - began, 1e-9))
    return np.array(taken)


def _ends(ratios: np.ndarray) -> tuple[float, float]:
    """Order statistics around the median of sorted ratios: 2.6 standard deviations of the binomial distribution."""
    edge = max(0, int(len(ratios) / 2 - 1.3 * math.sqrt(len(ratios))))
    return float(ratios[edge]), float(ratios[-1 - edge])


# ---- quality


@dataclass(frozen=True)
class Original:
    """The original's answers on the rows that judge, and its scores where these have labels."""

    rows: Dataset
    metric: str
    names: list[str]
    answers: list[list[Any]]
    scores: np.ndarray | None


def original(path: Path, rows: Dataset, metric: str) -> Original:
    """Raises DataError where the metric does not fit labels and outputs."""
    runner = session(path)
    names = [o.name for o in runner.get_outputs()]
    scores = None if rows.labels is None else score(runner, rows, metric)
    return Original(rows, metric, names, [run(runner, feed, names) for feed in rows.batches(1)], scores)


def quality(known: Original, path: Path) -> Quality:
    """Of the model on the same rows. Raises ModelError where it does not run."""
    runner = session(path)
    answers = [run(runner, feed, known.names) for feed in known.rows.batches(1)]
    worst = max(differences(known.names, zip(known.answers, answers, strict=True)), key=_error)
    labelled: Mapping[str, Any] = {}
    if known.scores is not None:
        p = paired(known.scores, score(runner, known.rows, known.metric))
        labelled = {"original": p.original, "result": p.optimized, "lost": p.lost, "won": p.won, "p_value": p.p_value}
    fields = ("original", "result", "lost", "won", "p_value")
    return Quality(
        rows=len(answers),
        agreement=worst.argmax_agreement,
        sqnr_db=worst.sqnr_db if math.isfinite(worst.sqnr_db) else None,
        metric=known.metric if labelled else None,
        **{f: labelled.get(f) for f in fields},
    )


def _error(difference: OutputDifference) -> float:
    return -difference.sqnr_db


# ---- what follows


def said(figure: Figure) -> str:
    """'1.74x (1.70 .. 1.78, measured)'."""
    return f"{figure.value:.2f}x ({figure.low:.2f} .. {figure.high:.2f}, {figure.basis})"


def verdict(speed: Figure, size: Figure, found: Quality | None, *, exact: bool, slack: float) -> tuple[Verdict, str]:
    """What the figures say, and in words why. `exact`: quality cannot change. `slack`: of quality that may be lost."""
    smaller = size.value < SMALLER
    if speed.high < NOT_SLOWER:
        return "refuse", f"slower: {said(speed)}" + (f", although the file shrinks to {100 * size.value:.0f} %" if smaller else "")
    lost = _lost(found, exact, slack)
    if lost is not None and lost[0] == "refuse":
        return lost
    faster = speed.low > FASTER
    if not faster and exact:
        return "do", f"costs nothing, and other techniques build on it: {said(speed)}"
    if not faster and not (smaller and speed.low > NOT_SLOWER):
        sure = speed.high < NO_GAIN
        return ("refuse", f"no gain: {said(speed)}") if sure else ("unsure", f"the figures do not decide: {said(speed)}")
    gains = f"faster: {said(speed)}" if faster else f"as fast: {said(speed)}"
    gains += f"; smaller: {100 * size.value:.0f} % of the file" if smaller else ""
    kind, words = lost or ("try", "what it costs in quality is not known")
    return kind, f"{gains}; {words}"


def _lost(found: Quality | None, exact: bool, slack: float) -> tuple[Verdict, str] | None:
    """What is known of quality; None: nothing."""
    if exact:
        return "do", "the outputs stay the same"
    if slack <= 0:
        return "refuse", "no quality may be lost (slack 0), and this changes the outputs"
    if found is None:
        return None
    if found.original is None or found.result is None:
        agree = "" if found.agreement is None else f"same argmax on {100 * found.agreement:.0f} % of {found.rows} rows, "
        error = "no error" if found.sqnr_db is None else f"SQNR {found.sqnr_db:.1f} dB"
        loud = found.sqnr_db is not None and found.sqnr_db < LOUD
        return ("refuse", f"the outputs are lost: {agree}{error}") if loud else ("try", f"{agree}{error}; measure with labels")
    drop, p = found.original - found.result, found.p_value or 1.0
    words = f"{found.metric} {found.original:.3f} -> {found.result:.3f} on {found.rows} rows ({found.lost} lost, {found.won} won)"
    if drop <= slack:
        return "do", words
    if p < CHANCE:
        return "refuse", f"loses more quality than the slack of {slack:g}: {words}, p = {p:.2g}"
    return "try", f"{words}: over the slack of {slack:g}, but within chance (p = {p:.2g}): measure on more rows"
