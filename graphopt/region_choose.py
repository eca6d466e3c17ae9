"""Which regions a model gets: what onnxruntime's own INT8 does faster stays with onnxruntime, by measurement or by estimate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import onnx

from graphopt.context import Context
from graphopt.errors import DataError, ModelError, OptionError, PassError
from graphopt.external import LIMIT
from graphopt.measure import Paired, paired
from graphopt.model import Model
from graphopt.region_estimate import estimate, saturates
from graphopt.region_find import Found, Region, search
from graphopt.region_trial import Trial, emitted, trials
from graphopt.runtime import Feed, run, session

Boundaries = Literal["auto", "measured", "estimated", "all"]
Timer = Callable[..., Paired]
SLOWER = 0.97  # a speed that is surely under this is slower: above, it is within the machine's noise
DOUBTFUL = 0.8  # the same for estimates, which are coarse
ROWS = 3  # rows on which the two are compared; the first is timed
SAME = 0.02  # of the spread of an output: a greater difference is not one of rounding
SECONDS = 20.0  # for all regions together, about
ALONE = "onnxruntime's own INT8 is faster"


@dataclass(frozen=True)
class Decision:
    """One region: whether it is taken, and why. Times of one row; `speed` of graphopt's operators over onnxruntime's."""

    name: str
    taken: bool
    reason: str
    onnxruntime_ms: float | None = None
    graphopt_ms: float | None = None
    speed: float | None = None


@dataclass
class Choice:
    """`how` the regions were chosen and `why` so; `whole`: the speed of the whole model where it was timed."""

    how: Boundaries
    why: str
    decisions: list[Decision] = field(default_factory=list)
    exclude: tuple[str, ...] = ()
    whole: float | None = None

    @property
    def dropped(self) -> list[str]:
        return [d.name for d in self.decisions if not d.taken]

    def facts(self) -> dict[str, Any]:
        """For the report. `recipe` makes the same model again, without timing anything."""
        given = [*self.exclude, *self.dropped]
        recipe = "compile-int8 boundaries=all" + (f" exclude='{','.join(given)}'" if given else "")
        return {
            "how": self.how,
            "why": self.why,
            "recipe": recipe,
            "speed": self.whole and round(self.whole, 3),
            "candidates": [{k: round(v, 4) if isinstance(v, float) else v for k, v in vars(d).items()} for d in self.decisions],
        }


def choose(
    model: Model, context: Context, boundaries: Boundaries, exclude: tuple[str, ...], timer: Timer = paired
) -> tuple[Found, Choice]:
    """The regions to compile. `exclude`: patterns of names of nodes, and of regions (Int8Region3), that stay with onnxruntime.

    `timer` is `measure.paired`, or what stands for it in tests. PassError where boundaries=measured and nothing can be timed.
    """
    found = search(model, context, exclude)
    _check(model, exclude, found.regions)
    named = [r for r in found.regions if any(fnmatchcase(r.name, pattern) for pattern in exclude)]
    found.regions = [r for r in found.regions if r not in named]
    for region in named:
        _leave(found, region, "excluded by name")
    work = _Chooser(model, context, found, exclude, timer)
    choice = work.choice(boundaries) if found.regions else Choice("all", "there is no region to choose")
    choice.exclude = exclude
    gone = set(choice.dropped)
    for region in found.regions:
        if region.name in gone:
            _leave(found, region, next(d.reason for d in choice.decisions if d.name == region.name))
    found.regions = [r for r in found.regions if r.name not in gone]
    return found, choice


def _leave(found: Found, region: Region, reason: str) -> None:
    found.reasons += [(u.node, reason) for u in region.units if u.heavy]


def _check(model: Model, exclude: Sequence[str], regions: Sequence[Region]) -> None:
    """A pattern that fits nothing is a slip of the pen."""
    known = [n.name for n in (*model.nodes(), *regions)]
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in known):
            raise OptionError(f"compile-int8: exclude='{pattern}' fits the name of no node and no region")


@dataclass
class _Chooser:
    model: Model
    context: Context
    found: Found
    exclude: tuple[str, ...]
    timer: Timer

    def choice(self, boundaries: Boundaries) -> Choice:
        if boundaries == "all":
            return Choice("all", "asked for")
        if boundaries == "estimated":
            return Choice("estimated", "asked for", self.estimated())
        feeds, why = self.feeds(asked=boundaries == "measured")
        if feeds:
            try:
                return self.measured(feeds, why)
            except ModelError as error:
                why = f"the model does not run on {why}: {error}"
        if boundaries == "measured":
            raise PassError("compile-int8", f"boundaries=measured: {why}; give rows of data, or boundaries=estimated")
        return Choice("estimated", why, self.estimated())

    # ---- by estimate

    def estimated(self) -> list[Decision]:
        return [self._estimate(region) for region in self.found.regions]

    def _estimate(self, region: Region) -> Decision:
        times = estimate(region, self.found.each)
        if times is None:
            return Decision(region.name, True, "its sizes are not known")
        theirs, ours = (t / 1e3 for t in times)
        speed = theirs / ours
        if speed >= DOUBTFUL:
            return Decision(region.name, True, "as fast or faster", theirs, ours, speed)
        if saturates(region):
            return Decision(region.name, True, "slower, but onnxruntime's may saturate on its weights", theirs, ours, speed)
        return Decision(region.name, False, ALONE, theirs, ours, speed)

    # ---- by measurement

    def feeds(self, *, asked: bool) -> tuple[list[Feed], str]:
        """Rows to time with, and where they come from; or none, and why nothing is timed."""
        from graphopt.api import check_feeds

        why = "" if asked else cannot_time(self.context)
        if why:
            return [], why
        if self.model.weight_bytes() > LIMIT // 4:
            return [], "the model is too large for copies to be timed"
        data = self.context.calibration
        try:
            feeds = check_feeds(self.model, data, ROWS)
        except DataError as error:
            return [], f"there are no rows to time it with ({error})"
        return [dict(f) for f in feeds], f"rows of {data.where}" if data is not None else "random inputs"

    def measured(self, feeds: list[Feed], where: str) -> Choice:
        trial = emitted(self.model, self.exclude, [r.name for r in self.found.regions])
        how = why_no_operators(trial)
        if how:
            return Choice("estimated", f"graphopt's operators cannot be had here: {how}", self.estimated())
        alone = {}
        share = SECONDS / len(self.found.regions)
        for done, one in enumerate(trials(trial, feeds)):
            self.context.progress("time regions", done, len(self.found.regions))
            alone[one.name] = self._measure(one, min(1.0, max(0.2, share)))
        decisions = [alone.get(r.name) or self._estimate(r) for r in self.found.regions]
        choice = Choice("measured", f"on {where}", decisions)
        self._guard(choice, feeds, trial)
        return choice

    def _measure(self, one: Trial, seconds: float) -> Decision:
        theirs, ours = session(one.model, operators=False), session(one.model)
        time = self.timer(theirs, ours, one.feeds[0], border=SLOWER, seconds=seconds)
        figures = time.first_ms, time.second_ms, time.speed
        if time.high >= SLOWER:
            return Decision(one.name, True, "as fast or faster", *figures)
        apart = difference(ours, theirs, one.feeds)
        if apart > SAME:
            reason = f"slower, but onnxruntime's kernels saturate here: outputs differ by {apart:.0%} of their spread"
            return Decision(one.name, True, reason, *figures)
        return Decision(one.name, False, ALONE, *figures)

    def _guard(self, choice: Choice, feeds: list[Feed], trial: onnx.ModelProto) -> None:
        """The whole model: where it is slower than it was, with the same outputs, no region is taken."""
        kept = [d.name for d in choice.decisions if d.taken]
        if not kept:
            return
        proto = trial if not choice.dropped else emitted(self.model, self.exclude, kept)
        theirs, ours = session(self.model.proto()), session(proto)
        time = self.timer(theirs, ours, feeds[0], border=SLOWER, seconds=2.0)
        choice.whole = time.speed
        if time.high >= SLOWER:
            return
        if difference(ours, theirs, feeds) <= SAME:
            reason = f"the whole model is slower with regions: {time.speed:.2f}x"
            choice.decisions = [
                Decision(d.name, False, reason if d.taken else d.reason, d.onnxruntime_ms, d.graphopt_ms, d.speed)
                for d in choice.decisions
            ]
            return
        self.model.notes.append(
            f"compile-int8: {time.speed:.2f}x the speed of onnxruntime's own INT8, whose kernels saturate on this CPU"
        )


def cannot_time(context: Context) -> str:
    """Why what is timed here would say nothing about where the model is to run, or ""."""
    if context.target is None:
        return "no target was named"
    if not context.target.onnxruntime:
        return f"{context.target.name} does not run in onnxruntime here"
    return "" if context.here else "the model is for another machine"


def why_no_operators(proto: onnx.ModelProto) -> str:
    """Why graphopt's operators cannot run here, or ""."""
    import onnxruntime as ort

    from graphopt.operators import choose as choose_operators

    how = choose_operators(ort.SessionOptions(), proto, None, fallback=True)
    return how.reason if how.kind == "functions" else ""


def difference(ours: Any, theirs: Any, feeds: Sequence[Feed]) -> float:
    """The greatest root mean square difference of two sessions' outputs, as a share of the output's spread."""
    worst = 0.0
    for feed in feeds:
        for one, two in zip(run(ours, feed), run(theirs, feed), strict=True):
            a, b = (np.asarray(v, np.float64) for v in (one, two))
            if a.size:
                apart = float(np.sqrt(np.mean((a - b) ** 2)))
                worst = max(worst, apart / max(float(a.std()), 1e-12) if apart else 0.0)
    return worst
