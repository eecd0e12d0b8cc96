"""The command line: reads what the user typed, wires the concrete parts, prints. The only place that does."""

from __future__ import annotations

import typer

from autotune.cli import tuning

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, prove and hand out image-token pruning plans for vision-language models.",
)
app.add_typer(tuning.app)


def main() -> None:
    app()
