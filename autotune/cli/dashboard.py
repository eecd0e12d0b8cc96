"""The dashboard alone, for who looks at their own studies: no service, and no key to make."""

from __future__ import annotations

import getpass
import os
import socket
from pathlib import Path
from typing import Annotated

import typer

from autotune.cli.console import errors
from autotune.cli.options import DebugOption, RegistryOption, StorageOption
from autotune.config import AutotuneError

__all__ = ["app", "registry_beside", "studies_at"]

app = typer.Typer()
DEMO = Path("runs/demo")
PATIENCE_S = 5.0  # with a database that is away
SQLITE = "sqlite:///"


@app.command()
def dashboard(
    out: Annotated[
        Path | None,
        typer.Option(help=f"Folder that autotune tune or demo wrote; default: {DEMO}, without --storage."),
    ] = None,
    storage: StorageOption = None,
    registry: RegistryOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; others than this host's show it to others.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")] = 8001,
    debug: DebugOption = False,
) -> None:
    """Compare studies, look at trials and promote profiles in a browser, by the one address that is printed."""
    with errors(debug):
        from autotune import server
        from autotune.server.entry import Guest
        from autotune.submitted import Place

        found = studies_at(out, storage)
        place = Place(home=out or DEMO, registry=registry or registry_beside(out, found) or "")
        settings = server.Settings(storage=found, place=place, rate="100000/minute")
        guest = Guest(_who())

        def say(address: str) -> None:
            print(f"open {address}/login?token={guest.token}", flush=True)

        server.serve(settings, host, port, say, guest)


def studies_at(out: Path | None, storage: str | None) -> str:
    """The address of a database with studies in it. Raises AutotuneError."""
    from autotune.store import Database
    from autotune.store.progress import has_tables

    found = storage or f"sqlite:///{(out or DEMO).absolute() / 'study.db'}"
    database = Database(found, PATIENCE_S)
    if not has_tables(database):
        raise AutotuneError(
            f"there must be a database with studies in it, got {database}; run autotune demo or autotune tune "
            "first, or name their folder with --out, or the database with --storage"
        )
    return found


def registry_beside(out: Path | None, storage: str) -> str | None:
    """MLflow's own database in the folder, or else beside the studies'; beside a server, what its newest study names.

    None where that names none, or a file that is not here.
    """
    from autotune.store import Database, Studies

    database = Database(storage, PATIENCE_S)
    folder = out or (None if database.file is None else database.file.parent)
    if folder is not None:
        return f"sqlite:///{folder.absolute() / 'mlflow.db'}"
    newest = Studies(database).newest(1)
    address = str(newest[0].context.get("registry") or "") if newest else ""
    is_here = not address.startswith(SQLITE) or Path(address.removeprefix(SQLITE)).exists()
    return address if address and is_here else None


def _who() -> str:
    """Who promotes, for the log."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # nobody in the list of users, as in some containers
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
