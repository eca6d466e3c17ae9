"""Progress bars on stderr for work that takes over a second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from graphopt.context import Progress as Callback

_DELAY = 1.0  # seconds before a bar appears


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[Callback]:
    """A progress callback `(what, done, total)`; draws one bar for each `what` once the work has lasted a second."""
    if not shown:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=True)
    tasks: dict[str, object] = {}
    began = time.monotonic()
    started = False

    def update(what: str, done: int, total: int) -> None:
        nonlocal started
        if time.monotonic() - began < _DELAY:
            return
        if not started:
            display.start()
            started = True
        if what not in tasks:
            tasks[what] = display.add_task(what, total=total or None)
        display.update(tasks[what], completed=done, total=total or None)  # type: ignore[arg-type]

    try:
        yield update
    finally:
        if started:
            display.stop()
