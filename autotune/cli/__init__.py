"""The command line: reads what the user typed, wires the concrete parts, prints. The only place that does."""

from __future__ import annotations

import typer

from autotune.cli import dashboard, profile_files, profiles, promotions, reporting, service, tuning

__all__ = ["app", "main"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, prove and hand out image-token pruning plans for vision-language models.",
)
app.add_typer(tuning.app)
app.add_typer(service.app)
app.add_typer(dashboard.app)
app.add_typer(reporting.app)
registered = typer.Typer(no_args_is_help=True, help="Registered profiles: find, fetch, check, compare, promote them.")
for module in (profiles, profile_files, promotions):
    registered.add_typer(module.app)
app.add_typer(registered, name="profiles")


def main() -> None:
    app()
