"""One progress bar on stderr for work that takes over a second."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from graphopt.context import Progress as Callback

_DELAY = 1.0  # seconds before the bar appears


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[Callback]:
    """A progress callback `(what, done, total)`; draws a bar for what is being done now once the work has lasted a second.

    A total of 0 is not known: the bar only shows that something moves. The bar is gone when the block ends.
    """
    if not shown:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"), TimeRemainingColumn())
    display = Progress(*columns, console=Console(stderr=True), transient=True)
    began = time.monotonic()
    current = ("", 0)  # what is being done, and how much of it was

    def update(what: str, done: int, total: int) -> None:
        nonlocal current
        if what != current[0] or done < current[1]:  # something else, or the same from its start: a bar of its own
            for task in display.task_ids:
                display.remove_task(task)
            display.add_task(what, total=total or None, count="")
        current = (what, done)
        display.update(display.task_ids[0], completed=done, total=total or None, count=f"{done}/{total}" if total else "")
        if time.monotonic() - began >= _DELAY:
            display.start()  # more than once is harmless

    try:
        yield update
    finally:
        display.stop()
