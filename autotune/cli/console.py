"""What the commands put on the screen: tables, progress, and one line for what a user can mend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from autotune.config import NO_ROOM, AutotuneError
from btp.errors import BTPError

__all__ = ["bar", "errors", "plain", "print_tables"]

stderr = Console(stderr=True)
WIDE = 1000  # a table is as wide as what stands in it


def bar() -> Progress:
    columns = (
        TextColumn("{task.description}", table_column=Column(width=30, no_wrap=True)),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[told]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr)


def plain(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def print_tables(
    tables: Sequence[Table],
    headings: Sequence[str],
    rows: Sequence[Sequence[Sequence[str]]],
    lines: Sequence[str],
    width: int,
) -> None:
    """The tables with their rows, whole, then the lines, broken at `width` or the terminal's where that is wider."""
    console = Console(highlight=False)
    width = max(console.width, width)
    console.width = WIDE
    for table, own in zip(tables, rows, strict=True):
        for index, heading in enumerate(headings):
            text = not any(character.isdigit() for character in own[0][index][:1])
            table.add_column(heading, justify="left" if text else "right", no_wrap=True)
        for cells in own:
            table.add_row(*cells)
        console.print(table)
    console.width = width
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def errors(debug: bool) -> Iterator[None]:
    """One line and exit code 2 for what a user can mend; the traceback only on request."""
    try:
        yield
    except KeyboardInterrupt:
        stderr.print("interrupted; what is finished is kept: run the same command again to resume", style="red")
        raise typer.Exit(130) from None
    except OSError as error:
        if debug or error.errno not in NO_ROOM:
            raise
        stderr.print(f"error: no room to write: {error}; free some, and run the same command again", style="red")
        raise typer.Exit(2) from error
    except ModuleNotFoundError as error:
        if debug:
            raise
        stderr.print(
            f"error: this command needs more than is installed: {error}; pip install 'btp-autotune[tune,serve]'",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(2) from error
    except (AutotuneError, BTPError) as error:
        if debug:
            raise
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error
