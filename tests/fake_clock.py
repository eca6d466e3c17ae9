"""Clocks under which `measure.paired` finds what a test wants."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from graphopt.measure import Paired, paired

Timer = Callable[..., Paired]


def ticking(first: float, second: float) -> Callable[[], float]:
    """A clock under which two sessions in turns take these seconds."""
    times = itertools.chain([0.0], itertools.cycle([0.0, first, 0.0, second]))
    return lambda: next(times)


def timer(*speeds: float) -> Timer:
    """`paired` under a clock that gives one comparison after the other these speeds; the last one for all that follow."""
    left = itertools.chain(speeds, itertools.repeat(speeds[-1]))
    return lambda first, second, given, **options: paired(first, second, given, **options, clock=ticking(1.0, 1 / next(left)))
