"""Where to stop on a curve of quality over cost: two rules, both told with their reason, so that the user decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.report import KneeRow, PointRow, SweepReport

WITHIN, CHORD = "within loss", "chord"


@dataclass(frozen=True)
class Spot:
    """A model on the curve: its share of the original's cost, and a value that is better when higher. `keep` None: the original."""

    keep: float | None
    cost: float
    value: float


def curve(report: SweepReport) -> tuple[list[Spot], str, str]:
    """The original and the points reached, the most expensive first; what is the value, and what the cost.

    Cost is MACs, or parameters where MACs are not known; value is quality, or minus the error at the outputs without labelled rows.
    Points without a value are left out.
    """
    reached = [p for p in report.points if p.failed is None]
    by_macs = bool(report.original.macs) and all(p.macs is not None for p in reached)
    by_quality = report.original.quality is not None
    spots = [Spot(None, 1.0, report.original.quality or 0.0)]
    for point in reached:
        value, cost = (_quality(point) if by_quality else _error(point)), _cost(point, report, by_macs)
        if value is not None and cost is not None:
            spots.append(Spot(point.keep, cost, value))
    spots[1:] = sorted(spots[1:], key=lambda s: -s.cost)
    return spots, "quality" if by_quality else "error", "MACs" if by_macs else "parameters"


def _quality(point: PointRow) -> float | None:
    return point.quality.optimized if point.quality is not None else None


def shown_error(point: PointRow) -> float | None:
    """The error at the outputs on rows that no fit had seen; without fits, of the finished model."""
    return point.held_out_error if point.held_out_error is not None else point.error


def _error(point: PointRow) -> float | None:
    found = shown_error(point)
    return -found if found is not None else None


def _cost(point: PointRow, report: SweepReport, by_macs: bool) -> float | None:
    if by_macs:
        return point.macs_ratio
    return point.parameters / report.original.parameters if point.parameters is not None and report.original.parameters else None


def knees(report: SweepReport, loss: float) -> list[KneeRow]:
    """The smallest model whose quality is within the loss, and the point farthest above the chord of the curve."""
    spots, what, cost = curve(report)
    return [_within(spots, what, cost, loss), _chord(spots, what, cost)]


def _within(spots: Sequence[Spot], what: str, cost: str, loss: float) -> KneeRow:
    if what != "quality":
        return KneeRow(rule=WITHIN, keep=None, why="quality was not measured: give labelled rows (--eval)")
    first = spots[0].value
    inside = [s for s in spots[1:] if s.value >= first - loss - 1e-12]
    if not inside:
        return KneeRow(rule=WITHIN, keep=None, why=f"no point is within {loss:g} of the original's quality, {first:.4f}")
    found = inside[-1]
    dearer = sum(s.value < first - loss - 1e-12 for s in spots[1:] if s.cost > found.cost)
    but = f"; {dearer} larger than it {'is' if dearer == 1 else 'are'} not, so this may be chance" if dearer else ""
    why = f"the fewest {cost} with quality within {loss:g} of the original's ({found.value:.4f} against {first:.4f}){but}"
    return KneeRow(rule=WITHIN, keep=found.keep, why=why)


def _chord(spots: Sequence[Spot], what: str, cost: str) -> KneeRow:
    """Both axes scaled to the curve's own range; the chord goes from the original to the cheapest point."""
    last = spots[-1]
    width, height = spots[0].cost - last.cost, spots[0].value - last.value
    if len(spots) < 3 or width <= 0 or height <= 0:
        return KneeRow(rule=CHORD, keep=None, why=f"the curve has no knee: {what} does not fall over three points or more")
    above = [(s.value - last.value) / height - (s.cost - last.cost) / width for s in spots]
    best = max(range(1, len(spots) - 1), key=lambda i: above[i])
    if above[best] <= 0:
        return KneeRow(rule=CHORD, keep=None, why=f"the curve has no knee: {what} falls at least as fast as {cost} from the start")
    why = (
        f"farthest above the line from the original to the smallest model, {above[best]:.2f} of the range of {what}; "
        "it moves with the smallest target"
    )
    return KneeRow(rule=CHORD, keep=spots[best].keep, why=why)
