"""Tables and figures as the command line prints them: rich on a terminal, plain text elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

_UNBOUNDED = 10_000  # columns


def console(*, wrap: bool = True) -> Console:
    """A terminal's own width; files and pipes get one so large that a row stays one line. Without `wrap` lines stay whole."""
    made = Console(highlight=False, soft_wrap=not wrap)
    return made if made.is_terminal else Console(highlight=False, soft_wrap=not wrap, width=_UNBOUNDED)


def table(*columns: str, first: str = "") -> Table:
    """One column of names, the others of figures."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(first, overflow="fold")
    for column in columns:
        made.add_column(column, justify="right")
    return made


def listing(*columns: str) -> Table:
    """Columns of text; without names there is no header."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(columns))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def print_table(to: Console, shown: Table) -> None:
    """Rows are padded to the table's width, which is noise in a file."""
    if to.is_terminal:
        to.print(shown)
        return
    with to.capture() as captured:
        to.print(shown)
    to.print("\n".join(line.rstrip() for line in captured.get().splitlines()), markup=False)


def plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def ms(value: float) -> str:
    return f"{value:.3f} ms"


def size(value: int) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"


def count(value: int) -> str:
    return f"{value / 1e6:,.2f} M" if value >= 1_000_000 else f"{value:,}"


def percent(value: float) -> str:
    return f"{100 * value:.2f} %"
