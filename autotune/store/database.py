"""One database: brought to the newest tables, reached again after it went away, asked in whole transactions."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import tenacity
from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError, TimeoutError
from sqlalchemy.pool import NullPool

from autotune.config import AutotuneError, check_sqlite

__all__ = ["BusyError", "Database", "StoreError", "begin_immediately"]

logger = logging.getLogger(__name__)

PATIENCE_S = 300.0  # how long a database may be away in the middle of a study
FIRST_PATIENCE_S = 10.0  # and at first, when the address may be wrong
SQLITE_WAIT_S = 60.0  # for another process's transaction
IDLE_S = 15.0  # in a transaction, between two statements
POOL_WAIT_S = 30.0  # for a connection that another thread has
MIGRATIONS = Path(__file__).parent / "migrations"
TABLES = "tables"  # the lock of whoever makes some
LOCK_NOT_AVAILABLE = "55P03"  # PostgreSQL's, once lock_timeout is over
FULL = ("database or disk is full", "No space left on device", "could not extend file")

Result = TypeVar("Result")
_RULE = "--storage must begin with sqlite:/// or postgresql+psycopg://, got {}; give the address of a database"


class StoreError(AutotuneError):
    """The database stayed away, or is full."""


class BusyError(StoreError):
    """Another process holds a lock, for longer than one was to wait."""


class Database:
    """An SQLite file or a PostgreSQL server, connected to when it is first used, with the newest tables in it.

    url: as SQLAlchemy's, such as sqlite:///runs/study.db or postgresql+psycopg://user@host/name. Raises AutotuneError
    for any other and for a file that is no database, StoreError where the database is full, or stays away for longer
    than `patience_s`.
    """

    def __init__(self, url: str, patience_s: float = PATIENCE_S) -> None:
        try:
            self._url = make_url(url)
        except ArgumentError:
            raise AutotuneError(_RULE.format("something else")) from None  # it may have a password in it
        if self._url.get_backend_name() not in ("sqlite", "postgresql"):
            raise AutotuneError(_RULE.format(self._url.get_backend_name()))
        if self._url.get_backend_name() == "sqlite":  # workers may have another working directory
            self._url = self._url.set(database=str(Path(self._url.database or "study.db").absolute()))
        self._patience_s = patience_s

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    @property
    def url(self) -> str:
        return self._url.render_as_string(hide_password=False)

    @property
    def file(self) -> Path | None:
        """Where an SQLite database lies."""
        return Path(self._url.database or "") if self._url.get_backend_name() == "sqlite" else None

    @property
    def exists(self) -> bool:
        """Whether there is something to read yet; a server always is."""
        return self.file is None or self.file.exists()

    @functools.cached_property
    def engine(self) -> Engine:
        """Connected, and its tables up to date."""
        if self.file is not None:
            check_sqlite(self.file)
            self.file.parent.mkdir(parents=True, exist_ok=True)
        try:
            engine = create_engine(self._url, pool_size=2, max_overflow=2, **self.waits)
        except (ImportError, NoSuchModuleError) as error:
            raise AutotuneError(
                f"--storage needs a driver for {self}: {error}; try pip install 'psycopg[binary]'"
            ) from error
        if self.file is not None:
            begin_immediately(engine, min(SQLITE_WAIT_S, self._patience_s))
        weakref.finalize(self, engine.dispose)
        self._patiently(functools.partial(self._set_up, engine), FIRST_PATIENCE_S)
        return engine

    @property
    def waits(self) -> dict[str, Any]:
        """Settings of an engine that is not waited for much longer than the patience lasts, nor has others wait.

        A process that is paused in the middle of a transaction loses it after `IDLE_S`, and with it what it locks.
        """
        pool = {"pool_timeout": min(POOL_WAIT_S, self._patience_s)}
        if self.file is not None:
            return pool
        own = self._url.query.get("options", "")
        options = f"{own} -c idle_in_transaction_session_timeout={int(1000 * IDLE_S)}"
        connect_timeout = max(2, int(min(FIRST_PATIENCE_S, self._patience_s)))
        return {**pool, "connect_args": {"connect_timeout": connect_timeout, "options": options}}

    def run(self, work: Callable[[Connection], Result]) -> Result:
        """What `work` returns, all it did in one transaction.

        Done again, from its beginning, where the database went away in the middle: even where only the answer to the
        commit was lost. So `work` must come to the same when it is done twice.
        """
        engine = self.engine

        def once() -> Result:
            with engine.begin() as connection:
                return work(connection)

        return self._patiently(once, self._patience_s)

    def redo(self, work: Callable[[], Result]) -> Result:
        """As `run`, for what brings its own transactions."""
        return self._patiently(work, self._patience_s)

    @contextmanager
    def locked(self, key: str, wait_s: float | None = None) -> Iterator[None]:
        """One process at a time inside, of all that name this key; one that dies lets go of it.

        So does one that PostgreSQL loses the connection of, which is not told: nothing may hang on the lock alone.
        Raises BusyError where another holds it for longer than `wait_s`, by default never.
        """
        _ = self.engine  # the folder of an SQLite file is there then
        with self._patiently(functools.partial(self._lock, key, wait_s), self._patience_s):
            yield

    def setting_up(self) -> AbstractContextManager[None]:
        """One process at a time makes tables, whoever else starts at the same moment."""
        return self.locked(TABLES)

    def _lock(self, key: str, wait_s: float | None = None) -> AbstractContextManager[Any]:
        """Wait for the lock; what this returns lets go of it. Not of the pool: all its connections may be waiting."""
        digest = hashlib.sha256(key.encode()).digest()
        if self.file is not None:
            try:
                lock = FileLock(f"{self.file}.{digest.hex()[:16]}.lock", mode=0o666)
                return lock.acquire(timeout=-1 if wait_s is None else wait_s)
            except Timeout:
                raise _busy(key, wait_s) from None
        with ExitStack() as stack:
            engine = create_engine(self._url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
            connection = stack.enter_context(engine.connect())
            number = int.from_bytes(digest[:8], "big") >> 1
            if wait_s is not None:
                connection.execute(text(f"SET lock_timeout = {max(1, round(1000 * wait_s))}"))  # 0 is without end
            try:
                connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": number})
            except OperationalError as error:
                if getattr(error.orig, "sqlstate", None) != LOCK_NOT_AVAILABLE:
                    raise
                raise _busy(key, wait_s) from None
            return stack.pop_all()  # the lock falls with the connection

    def _set_up(self, engine: Engine) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        with self._lock(TABLES), engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _patiently(self, work: Callable[[], Result], patience_s: float) -> Result:
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_transient),
            wait=tenacity.wait_random_exponential(multiplier=0.05, max=3.0),
            stop=tenacity.stop_after_delay(patience_s),
            before_sleep=_say_once,
            reraise=True,
        )
        try:
            return retrying(work)
        except Exception as error:  # Optuna and its proxy wrap what the driver says; what is about nothing else goes on
            cause = _cause(error)
            if cause is None:
                raise
            reason = str(cause.orig).strip().splitlines()[0] if isinstance(cause, DBAPIError) else str(cause)
            if any(word in str(cause) for word in FULL):
                raise StoreError(
                    f"{self} must have room to write, but: {reason}; free some, and run the same command again"
                ) from error
            raise StoreError(
                f"{self} must be within reach, but: {reason}; mend that, and run the same command again"
            ) from error


def begin_immediately(engine: Engine, wait_s: float = SQLITE_WAIT_S) -> None:
    """Have every transaction on SQLite wait for the write lock first: none fails half-way for another's."""

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout = {int(1000 * wait_s)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


def _cause(error: BaseException) -> BaseException | None:
    """What the driver said, or Optuna's proxy, where an error is about reaching the database."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, (OperationalError, InterfaceError, TimeoutError)) or type(found).__module__.startswith(
            "grpc"
        ):
            return found
        if isinstance(found, DBAPIError) and found.connection_invalidated:
            return found
        found = found.__cause__
    return None


def _busy(key: str, wait_s: float | None) -> BusyError:
    return BusyError(f"one process at a time may {key}, and another has been at it for {wait_s:g} s; try again later")


def _is_transient(error: BaseException) -> bool:
    cause = _cause(error)
    return cause is not None and not any(word in str(cause) for word in FULL)


def _say_once(state: tenacity.RetryCallState) -> None:
    if state.attempt_number == 1:
        logger.warning(
            "waiting for the database (process %d): %s", os.getpid(), state.outcome and state.outcome.exception()
        )
