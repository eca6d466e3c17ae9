"""`graphopt bench`: models side by side in one process, with intervals that say what the figures can carry.

Every figure is of blocks of rounds. Each block loads all models anew, because where a session's buffers happen to lie can make it a
few per cent faster or slower for its whole life; each round runs every model once, in an order that is drawn. A ratio is paired:
the first model's time over this one's, of the same round. The first model takes part twice, to know its spread against itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from graphopt.bench_probe import Energy, energy_counters, memory
from graphopt.errors import DataError, GraphoptError, ModelError, OptionError
from graphopt.feeds import Feed
from graphopt.report import Environment, Row, Versioned

BLOCKS = 6
MIN_ROUNDS = 4  # of a block
_RESAMPLES = 1000
_EXPAND = 2.571 / 1.960 * math.sqrt(BLOCKS / (BLOCKS - 1))  # Student's t of 5 degrees of freedom over the normal quantile
_BUSY = 0.05  # half the width of a model's interval against itself, over which nothing can be concluded
_WARM = 0.02  # warm when five runs are no more than this faster than the five before
_WARM_SECONDS = 1.0
OPENVINO = "openvino"  # OpenVINO's own runtime, next to onnxruntime's execution providers
DEFAULT_PROVIDER = "CPUExecutionProvider"
_ENERGY_SECONDS = 1.0


class Timing(Row):
    """One model with one batch size and thread count."""

    model: str
    provider: str
    batch: int = Field(description="rows of one run")
    threads: int = Field(description="0: all cores")
    runs: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    rows_per_second: float
    speedup: float = Field(description="median of the paired ratios: first model's time over this one's")
    low: float = Field(description="95 % interval of the speed-up, bootstrap over blocks and rounds")
    high: float
    load_ms: float = Field(description="median time to make a session, the file being in the page cache")
    joules: float | None = Field(default=None, description="energy of one run as RAPL counts it, the rest of the machine included")


class Memory(Row):
    """Bytes that loading and running add to a fresh process; `file_bytes` with external weights."""

    model: str
    file_bytes: int
    load_bytes: int | None = Field(description="resident after loading; null: not measured, see the warnings")
    run_bytes: int | None = Field(description="resident after the runs")
    peak_bytes: int | None = Field(description="the most that was resident at any time")
    operators: str = Field(description="how graphopt's regions ran")


class ModelQuality(Row):
    """One model on the labelled rows of --eval, paired with the first."""

    model: str
    metric: str
    higher_is_better: bool
    rows: int
    value: float
    lost: int | None = Field(
        description="rows on which it is worse than the first model; null: it is the first, or rows have no score"
    )
    won: int | None
    p_value: float | None = Field(description="exact two-sided sign test")


class Control(Row):
    """The first model against itself: what the machine's noise alone makes of a ratio of 1."""

    batch: int
    threads: int
    speedup: float
    low: float
    high: float


class BenchReport(Versioned):
    """What `graphopt bench` measured."""

    environment: Environment
    timings: list[Timing]
    memory: list[Memory]
    control: list[Control]
    quality: list[ModelQuality] = Field(default_factory=list, description="empty: no labelled rows were given")
    energy: str = Field(description="what the joules are, or why there are none")
    warnings: list[str]


@dataclass(frozen=True)
class Entrant:
    """One model on one provider."""

    path: Path
    provider: str = DEFAULT_PROVIDER

    @property
    def label(self) -> str:
        return self.path.name


@dataclass(frozen=True)
class BenchSettings:
    """See `bench`."""

    data: Any = None
    batches: Sequence[int] = (1,)
    threads: Sequence[int] = (1,)
    seconds: float = 5.0
    providers: Sequence[str] = (DEFAULT_PROVIDER,)
    memory: bool = True
    evaluation: Any = None
    metric: str = "top1"
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass
class _Taken:
    """Seconds of one entrant: a list of rounds for each block, and of each load."""

    blocks: list[list[float]] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)


def bench(models: Sequence[str | Path], **options: Any) -> BenchReport:
    """Time models against the first of them; options are the fields of `BenchSettings`.

    data: rows as for `graphopt optimize --calib`, else generated from the input types. seconds: for each batch size and threads.
    evaluation, metric: labelled rows, and how every model is scored on them. providers: onnxruntime's, or "openvino" for OpenVINO's
    own runtime; every model runs on each.
    Raises ModelError where a model does not load or run, OptionError for a provider that is not there.
    """
    settings = BenchSettings(**options)
    if not models:
        raise OptionError("bench: name at least one model")
    for provider in settings.providers:
        _check_provider(provider)
    entrants = [Entrant(Path(m), p) for m in models for p in settings.providers]
    warnings: list[str] = []
    timings: list[Timing] = []
    controls: list[Control] = []
    counters = energy_counters()
    for threads in settings.threads:
        for batch in settings.batches:
            settings.progress("bench", len(controls), len(settings.threads) * len(settings.batches))
            feeds = [_feed(e.path, settings.data, batch) for e in entrants]
            fitting = [(e, f) for e, f in zip(entrants, feeds, strict=True) if f is not None]
            warnings += [_fixed(e, batch) for e, f in zip(entrants, feeds, strict=True) if f is None]
            if fitting:
                rows, control = _timed(fitting, batch, threads, settings.seconds, counters)
                timings += rows
                controls.append(control)
    from graphopt.gains import environment

    warnings += [w for c in controls for w in _noise(c)] + _undecided(timings)
    held = list(_memories(models, settings, warnings))
    judged = list(_qualities(models, settings)) if settings.evaluation is not None else []
    return BenchReport(
        environment=environment(),
        timings=timings,
        memory=held,
        control=controls,
        quality=judged,
        energy=counters.said,
        warnings=list(dict.fromkeys(warnings)),
    )


# ---- what is run


def _check_provider(name: str) -> None:
    import onnxruntime as ort

    known = [*ort.get_available_providers(), OPENVINO]
    if name not in known:
        raise OptionError(f"unknown provider '{name}'; this onnxruntime has {', '.join(known[:-1])}, and there is '{OPENVINO}'")
    if name == OPENVINO:
        _openvino()


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise OptionError(f"provider '{OPENVINO}' needs the package openvino: pip install 'graphopt[openvino]'") from error
    return openvino


def _loaded(entrant: Entrant, threads: int) -> Callable[[Feed], Any]:
    """A function that runs one feed."""
    if entrant.provider == OPENVINO:
        core = _openvino().Core()
        try:
            config = {"PERFORMANCE_HINT": "LATENCY", **({"INFERENCE_NUM_THREADS": threads} if threads else {})}
            request = core.compile_model(str(entrant.path), "CPU", config).create_infer_request()
        except Exception as error:  # openvino's exceptions have no common base class of their own
            raise ModelError(f"OpenVINO cannot load {entrant.path.name}: {' '.join(str(error).split())[:300]}") from error
        return lambda feed: request.infer(feed, share_inputs=True)
    from graphopt.operators import opened

    session, _ = opened(entrant.path, threads=threads, providers=[entrant.provider], fallback=True)
    return lambda feed: session.run(None, feed)


def _feed(path: Path, data: Any, batch: int) -> Feed | None:
    """One batch of rows for the model; None where its batch is fixed to another size."""
    from graphopt.data import generated, open_dataset
    from graphopt.feeds import fixed_batch, input_specs, padded
    from graphopt.model import load

    specs = input_specs(load(path).interface())
    fixed = fixed_batch(specs)
    if fixed is not None and fixed != batch:
        return None
    if not specs:
        raise DataError(f"{path.name} has no inputs: there is nothing to run it on")
    dataset = generated(specs, batch) if data is None else open_dataset(data, specs)
    return padded(next(iter(dataset.batches(batch))), batch)


def _fixed(entrant: Entrant, batch: int) -> str:
    return f"{entrant.label} was not run with batch {batch}: its batch is fixed to another size"


# ---- timing


def _timed(
    entrants: Sequence[tuple[Entrant, Feed]], batch: int, threads: int, seconds: float, counters: Energy
) -> tuple[list[Timing], Control]:
    again = [*entrants, entrants[0]]  # the first against itself
    taken = [_Taken() for _ in again]
    joules: list[float | None] = [None] * len(entrants)
    for block in range(BLOCKS):
        runners = _block(again, taken, block, threads, seconds / BLOCKS)
        if block == BLOCKS - 1:
            joules = [counters.joules(partial(r, f), _ENERGY_SECONDS) for r, (_, f) in zip(runners, entrants, strict=False)]
    base = taken[0].blocks
    rows = []
    for (entrant, _), mine, energy in zip(entrants, taken, joules, strict=False):
        flat = np.concatenate([np.array(b) for b in mine.blocks])
        ratio, low, high = speedup(base, mine.blocks)
        p50, p95, p99 = (float(v) * 1e3 for v in np.percentile(flat, (50, 95, 99)))
        rows.append(
            Timing(
                model=entrant.label,
                provider=entrant.provider,
                batch=batch,
                threads=threads,
                runs=len(flat),
                p50_ms=p50,
                p95_ms=p95,
                p99_ms=p99,
                rows_per_second=batch * len(flat) / float(flat.sum()),
                speedup=ratio,
                low=low,
                high=high,
                load_ms=float(np.median(mine.loads)) * 1e3,
                joules=energy,
            )
        )
    ratio, low, high = speedup(base, taken[-1].blocks)
    return rows, Control(batch=batch, threads=threads, speedup=ratio, low=low, high=high)


def _block(
    entrants: Sequence[tuple[Entrant, Feed]], taken: Sequence[_Taken], block: int, threads: int, seconds: float
) -> list[Callable[[Feed], Any]]:
    """One block of rounds with sessions of its own; returns the runners."""
    random = np.random.default_rng(block)
    order = random.permutation(len(entrants))
    runners: dict[int, Callable[[Feed], Any]] = {}
    for i in order:
        began = time.perf_counter()
        runners[i] = _loaded(entrants[i][0], threads)
        taken[i].loads.append(time.perf_counter() - began)
        taken[i].blocks.append([])
    for i in order:
        _warm(runners[i], entrants[i][1], entrants[i][0])
    number, deadline = 0, time.perf_counter() + seconds
    while number < MIN_ROUNDS or time.perf_counter() < deadline:
        for i in random.permutation(len(entrants)):
            run, feed = runners[i], entrants[i][1]
            run(feed)  # caches and threads of the previous model are not this one's to pay for
            began = time.perf_counter()
            run(feed)
            taken[i].blocks[-1].append(time.perf_counter() - began)
        number += 1
    return [runners[i] for i in range(len(entrants))]


def _warm(run: Callable[[Feed], Any], feed: Feed, entrant: Entrant) -> None:
    """Run until five runs are not faster than the five before, at most a second; ModelError where it does not run."""
    try:
        run(feed)
    except Exception as error:  # as above
        raise ModelError(f"{entrant.label} does not run: {' '.join(str(error).split())[:300]}") from error
    deadline, before = time.perf_counter() + _WARM_SECONDS, float("inf")
    while time.perf_counter() < deadline:
        times = []
        for _ in range(5):
            began = time.perf_counter()
            run(feed)
            times.append(time.perf_counter() - began)
        now = float(np.median(times))
        if now > before * (1 - _WARM):
            return
        before = now


# ---- what the figures can carry


def speedup(
    base: Sequence[Sequence[float] | np.ndarray], other: Sequence[Sequence[float] | np.ndarray]
) -> tuple[float, float, float]:
    """(median of the paired ratios base / other, and its 95 % interval) of blocks of rounds.

    Bootstrap in two stages: blocks are drawn, then rounds of each, since the rounds of a block share their sessions. So few blocks
    make the percentile interval too narrow; it is expanded, on the scale of logarithms, as in Hesterberg, "What Teachers Should
    Know About the Bootstrap" (2015). The same figures always give the same interval.
    """
    ratios = [np.log(np.array(a) / np.array(b)) for a, b in zip(base, other, strict=True)]
    random = np.random.default_rng(0)
    medians = np.empty(_RESAMPLES)
    for k in range(_RESAMPLES):
        drawn = random.integers(0, len(ratios), len(ratios))
        medians[k] = np.median(np.concatenate([ratios[i][random.integers(0, len(ratios[i]), len(ratios[i]))] for i in drawn]))
    middle = float(np.median(np.concatenate(ratios)))
    low, high = (middle + _EXPAND * (float(v) - middle) for v in np.percentile(medians, (2.5, 97.5)))
    return math.exp(middle), math.exp(min(low, middle)), math.exp(max(high, middle))


def _noise(control: Control) -> Iterator[str]:
    where = f"batch {control.batch}, {control.threads or 'all'} threads"
    if (control.high - control.low) / 2 > _BUSY or not control.low <= 1 <= control.high:
        yield (
            f"too noisy to conclude ({where}): the first model against itself is {control.speedup:.2f}x, "
            f"{control.low:.2f} to {control.high:.2f}; stop what else runs, or give more --seconds"
        )


def _undecided(timings: Sequence[Timing]) -> list[str]:
    first = {(t.batch, t.threads): t for t in reversed(timings)}
    return [
        f"{t.model} ({t.provider}) and {first[t.batch, t.threads].model}: no difference that these runs can show "
        f"(batch {t.batch}, {t.threads or 'all'} threads: {t.low:.2f} to {t.high:.2f})"
        for t in timings
        if t is not first[t.batch, t.threads] and t.low <= 1 <= t.high
    ]


def _qualities(models: Sequence[str | Path], settings: BenchSettings) -> Iterator[ModelQuality]:
    from graphopt.evaluation import evaluate

    for number, path in enumerate(dict.fromkeys(map(Path, models))):
        base = models[0] if number else None
        found = evaluate(path, settings.evaluation, metric=settings.metric, base=base, progress=settings.progress)
        pair = found.evaluation.paired
        yield ModelQuality(
            model=path.name,
            metric=found.metric,
            higher_is_better=found.higher_is_better,
            rows=found.evaluation.rows,
            value=found.evaluation.value,
            lost=len(pair.lost) if pair and pair.lost is not None else None,
            won=len(pair.won) if pair and pair.won is not None else None,
            p_value=pair.p_value if pair else None,
        )


def _memories(models: Sequence[str | Path], settings: BenchSettings, warnings: list[str]) -> Iterator[Memory]:
    from graphopt.emit import file_size

    for path in dict.fromkeys(map(Path, models)):
        size = file_size(path)
        found: Mapping[str, Any] = {}
        if settings.memory:
            try:
                feed = next(f for f in (_feed(path, settings.data, b) for b in settings.batches) if f is not None)
                found = memory(path, feed)
            except StopIteration:
                warnings.append(f"{path.name}: memory was not measured: its batch fits none of --batch")
            except GraphoptError as error:
                warnings.append(f"{path.name}: memory was not measured: {error}")
        yield Memory(
            model=path.name,
            file_bytes=size,
            load_bytes=found.get("load"),
            run_bytes=found.get("run"),
            peak_bytes=found.get("peak"),
            operators=found.get("operators", "not measured"),
        )
