"""The service from the command line: the HTTP server, the workers of its jobs, and the keys that open it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from autotune.cli.console import errors, print_tables, stderr
from autotune.cli.options import DebugOption, RegistryOption, StorageOption

if TYPE_CHECKING:
    from autotune.store import Database, Key

__all__ = ["HomeOption", "ModelsOption", "app", "run_jobs"]

app = typer.Typer()
keys = typer.Typer(no_args_is_help=True, help="API keys of the service.")
app.add_typer(keys, name="keys")

HomeOption = Annotated[Path, typer.Option(help="Folder of the service: its jobs, and what is not said otherwise.")]
ModelsOption = Annotated[Path | None, typer.Option(help="The only folder that jobs may name models in.")]
DAY_S = 86400.0


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this host's: behind a proxy with TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8000,
    home: HomeOption = Path("runs/service"),
    models: ModelsOption = None,
    data: Annotated[Path | None, typer.Option(help="The only folder that jobs may name data in.")] = None,
    storage: StorageOption = None,
    registry: RegistryOption = None,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Largest request that is read.")] = 65536,
    rate: Annotated[str, typer.Option(help="Requests that a key may make.")] = "120/minute",
    debug: DebugOption = False,
) -> None:
    """Serve jobs, studies and profiles over HTTP; autotune worker --jobs runs the jobs, autotune keys opens it."""
    with errors(debug):
        from autotune import server
        from autotune.submitted import Place, Roots

        settings = server.Settings(
            storage=_storage(storage, home),
            place=Place(home=home, registry=registry or _default_registry(home), roots=Roots(models=models, data=data)),
            max_body_bytes=max_body_bytes,
            rate=rate,
        )
        server.serve(settings, host, port, lambda address: print(f"serving on {address}", flush=True))


@keys.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="Who it is for; it stands in the promotion log.")],
    scopes: Annotated[str, typer.Option(help="Some of read, submit and promote, separated by commas.")],
    expires_days: Annotated[float | None, typer.Option(help="Days until it ends; default: never.")] = None,
    home: HomeOption = Path("runs/service"),
    storage: StorageOption = None,
    debug: DebugOption = False,
) -> None:
    """Make a key, and show it this one time."""
    with errors(debug):
        from autotune.store import Keys

        expires_s = None if expires_days is None else DAY_S * expires_days
        print(Keys(_database(storage, home)).create(name, [word.strip() for word in scopes.split(",")], expires_s))


@keys.command("list")
def list_keys(
    home: HomeOption = Path("runs/service"), storage: StorageOption = None, debug: DebugOption = False
) -> None:
    """Show what is known of every key; none of them can be shown again."""
    with errors(debug):
        from autotune.store import Keys

        rows = [_cells(key) for key in Keys(_database(storage, home)).all()]
    if rows:
        print_tables([Table()], ("name", "begins with", "scopes", "created", "expires", "revoked"), [rows], [], 100)


@keys.command("revoke")
def revoke_key(
    name: Annotated[str, typer.Argument(help="As it was created with.")],
    home: HomeOption = Path("runs/service"),
    storage: StorageOption = None,
    debug: DebugOption = False,
) -> None:
    """Have a key open nothing any more."""
    with errors(debug):
        from autotune.store import Keys

        Keys(_database(storage, home)).revoke(name)


def run_jobs(
    home: Path,
    models: Path | None,
    data: Path | None,
    storage: str | None,
    registry: str | None,
    once: bool,
    until_stdin_closes: bool,
) -> None:
    """Take jobs from the queue until SIGINT or SIGTERM, or `once` nothing waits."""
    from autotune import jobs, stopping
    from autotune.submitted import Place, Roots

    place = Place(home=home, registry=registry or _default_registry(home), roots=Roots(models=models, data=data))
    with stopping.stopping(with_parent=until_stdin_closes) as stop:
        num_done = jobs.work(_database(storage, home), place, stop, stderr.print, once=once)
    stderr.print(f"done: {num_done} jobs seen through by this worker")


def _database(storage: str | None, home: Path) -> Database:
    from autotune.store import Database

    return Database(_storage(storage, home))


def _storage(storage: str | None, home: Path) -> str:
    return storage or f"sqlite:///{home.absolute() / 'study.db'}"


def _default_registry(home: Path) -> str:
    return f"sqlite:///{home.absolute() / 'mlflow.db'}"


def _cells(key: Key) -> tuple[str, ...]:
    return key.name, f"btp_{key.prefix}", ",".join(key.scopes), *map(_day, (key.created, key.expires, key.revoked))


def _day(at: float | None) -> str:
    return "-" if at is None else time.strftime("%Y-%m-%d", time.gmtime(at))
