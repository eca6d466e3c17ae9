"""`graphopt evaluate`: the quality of a model on labelled rows, paired with the model it came from, by class and by group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from graphopt.data import Dataset, open_dataset
from graphopt.errors import CheckError, DataError, OptionError
from graphopt.evaluate import paired
from graphopt.feeds import fixed_batch, padded, row_count
from graphopt.gates import requirement
from graphopt.gold import GoldRow, against_gold
from graphopt.metrics import Batch, Metric, find_metric
from graphopt.report import Environment, Row, Versioned
from graphopt.runtime import run

_RESAMPLES = 1000
REQUIREMENTS = ("value", "drop", "worst", "gold")


class GroupRow(Row):
    """Rows that belong together."""

    group: str
    rows: int
    value: float
    base: float | None


class PairedRow(Row):
    """The model and its base on the same rows."""

    base: str
    value: float = Field(description="of the base")
    difference: float = Field(description="the model's figure less the base's")
    low: float | None = Field(description="95 % interval of the difference, rows resampled together; null: cannot be resampled")
    high: float | None
    lost: list[int] | None = Field(description="rows on which the model is worse; null: the metric has no score for one row")
    won: list[int] | None
    p_value: float | None = Field(description="exact two-sided sign test on lost and won rows")


class SetRow(Row):
    """One set of rows."""

    data: str
    digest: str = Field(description="SHA-256 of the rows as the model gets them")
    preprocessing: str | None = Field(description="SHA-256 of the declared preprocessing; null: the rows are given as they are")
    rows: int
    value: float
    paired: PairedRow | None
    classes: list[GroupRow]
    groups: list[GroupRow]
    worst: GroupRow | None = Field(description="the worst of groups, or of classes where there are no groups")


class EvaluationReport(Versioned):
    """What `graphopt evaluate` found."""

    environment: Environment
    model: str
    file_bytes: int = Field(description="of the model, external weights included")
    base_file_bytes: int | None = Field(description="null: there is no base")
    metric: str
    higher_is_better: bool
    evaluation: SetRow
    hard: SetRow | None = Field(description="the hard set, scored apart")
    gold: GoldRow | None
    warnings: list[str]


@dataclass(frozen=True)
class EvaluationSettings:
    """See `evaluate`."""

    metric: str = "top1"
    base: str | Path | None = None
    hard: Any = None
    groups: Any = None
    gold: str | Path | None = None
    batch: int = 16
    threads: int = 0
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


def evaluate(model: str | Path, data: Any, **options: Any) -> EvaluationReport:
    """Score a model on labelled rows; options are the fields of `EvaluationSettings`.

    base: a model to pair it with, row by row. hard: rows that are scored apart. groups: one value a row (array, or a .npy file);
    the worst group is reported. gold: outputs stored by `graphopt.gold.write_gold`, compared with the model's. metric: see
    `graphopt.metrics`. Raises GraphoptError.
    """
    settings = EvaluationSettings(**options)
    metric = find_metric(settings.metric)
    from graphopt.emit import file_size
    from graphopt.gains import environment

    main = _scored(model, data, metric, settings, _groups(settings.groups))
    hard = None if settings.hard is None else _scored(model, settings.hard, metric, settings, None)
    if hard is not None and hard.preprocessing != main.preprocessing:
        raise DataError("the hard set is preprocessed in another way than the evaluation rows; declare one preprocessing for both")
    return EvaluationReport(
        environment=environment(),
        model=str(model),
        file_bytes=file_size(Path(model)),
        base_file_bytes=None if settings.base is None else file_size(Path(settings.base)),
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        evaluation=main,
        hard=hard,
        gold=None if settings.gold is None else against_gold(model, settings.gold),
        warnings=_warnings(main, hard, metric),
    )


def require(report: EvaluationReport, wanted: Sequence[str]) -> None:
    """Raise CheckError where a figure falls short of `value=0.85`, `drop=0.01` (against the base, at most), `worst=0.7` (of the
    worst group) or `gold=0.05` (error of the outputs over their scale, at most); OptionError where it cannot be read."""
    sign = 1 if report.higher_is_better else -1
    main, short = report.evaluation, []
    figures: dict[str, tuple[float | None, bool]] = {  # figure, whether it must not be lower
        "value": (main.value, report.higher_is_better),
        "drop": (None if main.paired is None else -sign * main.paired.difference, False),
        "worst": (None if main.worst is None else main.worst.value, report.higher_is_better),
        "gold": (None if report.gold is None else report.gold.relative_error, False),
    }
    for text in wanted:
        key, limit = requirement(text, REQUIREMENTS)
        found, least = figures[key]
        if found is None:
            raise OptionError(
                f"--require {text}: that was not measured (drop needs --base, worst --groups or classes, gold --gold)"
            )
        if not (found >= limit if least else found <= limit):
            short.append(f"{key} is {found:.4g}, required at {'least' if least else 'most'} {limit:g}")
    if short:
        raise CheckError(f"evaluation of {report.model}: {'; '.join(short)}")


# ---- one set of rows


@dataclass(frozen=True)
class _Kept:
    """What a metric kept of every row."""

    kept: np.ndarray
    labels: np.ndarray


def _scored(model: str | Path, data: Any, metric: Metric, settings: EvaluationSettings, groups: np.ndarray | None) -> SetRow:
    dataset = _dataset(model, data)
    mine = _collect(model, dataset, metric, settings)
    base = None
    if settings.base is not None:
        theirs = _dataset(settings.base, data)
        if theirs.preprocessing != dataset.preprocessing:
            raise DataError("the two models' rows are preprocessed in different ways")
        base = _collect(settings.base, theirs, metric, settings)
    classes = _by(mine.labels, mine, base, metric) if _has_classes(mine.labels) else []
    if groups is not None and len(groups) != len(mine.labels):
        raise DataError(f"groups: {len(groups)} values for {len(mine.labels)} rows; give one a row")
    grouped = [] if groups is None else _by(groups, mine, base, metric)
    candidates = grouped or classes
    pick = min if metric.higher_is_better else max
    return SetRow(
        data=dataset.where,
        digest=dataset.digest(),
        preprocessing=dataset.preprocessing,
        rows=len(mine.labels),
        value=metric.total(mine.kept, mine.labels),
        paired=None if base is None else _pair(str(settings.base), mine, base, metric),
        classes=classes,
        groups=grouped,
        worst=pick(candidates, key=lambda g: g.value) if len(candidates) > 1 else None,
    )


def _dataset(model: str | Path, data: Any) -> Dataset:
    from graphopt.feeds import input_specs
    from graphopt.model import load

    return open_dataset(data, input_specs(load(model).interface()))


def _collect(model: str | Path, dataset: Dataset, metric: Metric, settings: EvaluationSettings) -> _Kept:
    """What the metric keeps of every row. Raises DataError without labels."""
    from graphopt.operators import opened

    labels = dataset.labels
    if labels is None:
        raise DataError(f"{dataset.where} has no 'labels'; add one a row")
    session, _ = opened(Path(model), threads=settings.threads, fallback=True)
    fixed = fixed_batch(dataset.inputs)
    parts: list[np.ndarray] = []
    done = 0
    for feed in dataset.batches(settings.batch):
        count = row_count(feed) or 1
        outputs = run(session, padded(feed, fixed) if fixed and count < fixed else feed)
        part = Batch([np.asarray(o)[:count] for o in outputs], labels[done : done + count], feed)
        if part.rows != count:
            raise DataError(f"{dataset.where} has more rows than its {len(labels)} labels")
        parts.append(np.asarray(metric.keep(part)))
        done += count
        settings.progress(f"evaluate {Path(model).name}", done, len(labels))
    if done != len(labels):
        raise DataError(f"{dataset.where} has {done} rows and {len(labels)} labels")
    return _Kept(np.concatenate(parts), labels)


def _pair(base: str, mine: _Kept, theirs: _Kept, metric: Metric) -> PairedRow:
    before, after = metric.total(theirs.kept, theirs.labels), metric.total(mine.kept, mine.labels)
    low, high = _difference(mine, theirs, metric)
    lost = won = p_value = None
    if metric.score is not None:
        first, second = metric.score(theirs.kept, theirs.labels), metric.score(mine.kept, mine.labels)
        lost, won = np.flatnonzero(second < first).tolist(), np.flatnonzero(second > first).tolist()
        p_value = paired(first, second).p_value
    return PairedRow(base=base, value=before, difference=after - before, low=low, high=high, lost=lost, won=won, p_value=p_value)


def _difference(mine: _Kept, theirs: _Kept, metric: Metric) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of the difference of the figures: the percentile bootstrap over rows, the same rows for both."""
    if metric.whole:
        return None, None
    random = np.random.default_rng(0)
    rows = len(mine.labels) // (2 if metric.pairs else 1)
    found = []
    for _ in range(_RESAMPLES):
        drawn = random.integers(0, rows, rows)
        if metric.pairs:
            drawn = np.stack([2 * drawn, 2 * drawn + 1], 1).reshape(-1)
        try:
            found.append(
                metric.total(mine.kept[drawn], mine.labels[drawn]) - metric.total(theirs.kept[drawn], theirs.labels[drawn])
            )
        except DataError:  # a resample of one class only
            continue
    if not found:
        return None, None
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


# ---- classes and groups


def _has_classes(labels: np.ndarray) -> bool:
    return labels.ndim == 1 and labels.dtype.kind in "biuUSO" and 1 < len(np.unique(labels)) <= max(2, len(labels) // 2)


def _by(groups: np.ndarray, mine: _Kept, base: _Kept | None, metric: Metric) -> list[GroupRow]:
    """The figure of each group; groups that have none (an AUC of one class) are left out."""
    if metric.pairs or metric.whole:
        return []
    made = []
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        try:
            value = _figure(mine, rows, metric)
            other = None if base is None else _figure(base, rows, metric)
        except DataError:
            continue
        made.append(GroupRow(group=str(group), rows=len(rows), value=value, base=other))
    return made


def _figure(kept: _Kept, rows: np.ndarray, metric: Metric) -> float:
    return metric.total(kept.kept[rows], kept.labels[rows])


def _groups(given: Any) -> np.ndarray | None:
    if given is None or isinstance(given, np.ndarray):
        return given
    if isinstance(given, str | Path):
        try:
            loaded = np.load(given, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"groups '{given}': cannot be read: {error}; save one value a row with numpy.save") from error
        return np.asarray(loaded[next(iter(loaded.files))] if hasattr(loaded, "files") else loaded)
    return np.asarray(given)


def _warnings(main: SetRow, hard: SetRow | None, metric: Metric) -> list[str]:
    said = []
    sign = 1 if metric.higher_is_better else -1
    for name, found in (("", main), ("hard set: ", hard)):
        if found is None or found.paired is None:
            continue
        p = found.paired
        if sign * p.difference < 0 and (p.p_value is not None and p.p_value < 0.05):
            said.append(f"{name}worse than the base by {abs(p.difference):.4g}, significant (p = {p.p_value:.2g})")
        worse = [g for g in (*found.groups, *found.classes) if g.base is not None and sign * (g.value - g.base) < -0.05]
        said += [f"{name}group {g.group} ({g.rows} rows) went from {g.base:.4g} to {g.value:.4g}" for g in worse[:3]]
    return said
