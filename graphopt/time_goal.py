"""Targets in milliseconds: what nodes cost on this machine, and the plan whose model really is that much faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from graphopt.context import Context
from graphopt.cost import Costs, Term
from graphopt.data import generated
from graphopt.errors import PassError
from graphopt.feeds import Feed, fixed_batch, input_specs, padded, row_count
from graphopt.measure import paired
from graphopt.model import Model
from graphopt.runtime import session

_RUNS = 20  # of the profile
_TRIES = 6
_CLOSE = 0.02  # of the asked share: near enough
_SECONDS = 1.0  # of timing a candidate


def one_row(model: Model, context: Context) -> Feed:
    """A row of the calibration data, else a random one; padded to a fixed batch."""
    specs = input_specs(model.interface())
    data = context.calibration or generated(specs, 1)
    feed = next(iter(data.batches(1)))
    fixed = fixed_batch(specs)
    if fixed is not None:
        return padded(feed, fixed)
    return {n: v[:1] for n, v in feed.items()} if row_count(feed) else feed


def time_terms(model: Model, context: Context, counted: Costs) -> list[Term]:
    """Picoseconds of a run as a sum of terms: of each node that multiplies, in proportion to its MACs; of all others, fixed.

    Measured by onnxruntime's profile on one thread, once a state of the model. ModelError where it does not run.
    """
    spent = context.cached("node times", lambda: _measured(model, one_row(model, context)))
    terms, fixed = [], sum(spent.values())
    for node in counted.nodes:
        time = spent.get(node.name, 0.0)
        each = round(1e6 * time / node.macs)
        if each:
            fixed -= time
            terms += [Term(term.axes, term.factor * each) for term in node.terms]
    return [*terms, Term((), max(round(1e6 * fixed), 0))]


def _measured(model: Model, feed: Feed) -> Mapping[str, float]:
    """Microseconds by node; what belongs to none of them has the name ''."""
    from graphopt.audit_map import place
    from graphopt.audit_profile import profiles

    (profile,) = profiles([model.proto().SerializeToString()], [feed], runs=_RUNS, threads=1)
    placed = place(model.graph.nodes, profile)
    found = {name: where.kernel.us for name, where in placed.nodes.items() if where.kernel is not None and where.how != "part"}
    return {**found, "": max(profile.us - sum(found.values()), 0.0)}


def aim(share: float, made: Callable[[float], Model], model: Model, context: Context, name: str) -> tuple[float, float]:
    """The largest share of the planned time whose model takes at most `share` of the original's, and what it was measured to take.

    `made` prunes a copy to a planned share; it raises PassError where that is out of reach. PassError where no try gets there.
    """
    feed, original = one_row(model, context), session(model.proto(), threads=1)
    planned, best, fastest = share, None, float("inf")
    for _ in range(_TRIES):
        try:
            pruned = session(made(planned).proto(), threads=1)
        except PassError:  # so few units cannot stay; more may be fast enough all the same
            planned = (planned + 1) / 2
            continue
        # twice, and the slower counts: on a busy machine one pause can fill half the pairs of a short measurement
        taken = max(1 / paired(original, pruned, feed, border=1 / share, seconds=_SECONDS).speed for _ in range(2))
        fastest = min(fastest, taken)
        if taken <= share and (best is None or planned > best[0]):
            best = planned, taken
        if share * (1 - _CLOSE) <= taken <= share:
            break
        planned = min(max(planned * share * (1 - _CLOSE / 2) / taken, planned * 0.5), (planned + 1) / 2)
    if best is None:
        reached = (
            f"the fastest model took {fastest:.2g} of the original's time" if fastest < float("inf") else "too few units can go"
        )
        raise PassError(name, f"latency={share:g} cannot be reached: {reached}; use macs=")
    return best
