"""Who tries what: trials are claimed under a lease, told once, and given to another where the lease runs out.

A lease is one attempt of one worker at one trial. It is `held` until it is `told` or `failed`; or it is `expired` or
`released`, and another attempt at the same trial waits. Every change is one transaction that holds the study's row, so
however many workers there are, they happen one after the other, and the number of trials is exact.
"""

from __future__ import annotations

import functools
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Insert, RowMapping, and_, case, delete, func, insert, or_, select, true, update
from sqlalchemy.exc import IntegrityError

from autotune.store.database import Database
from autotune.store.tables import Now, evaluation, job, late_result, lease

__all__ = ["EXPIRED", "LEASE_S", "MAX_ATTEMPTS", "Evaluation", "Lease", "LeaseLostError", "Leases", "this_worker"]

LEASE_S = 120.0  # from one sign of life to the next; a batch, or a block of a measurement, has to fit in
DRIVER_S = 600.0  # what a job does after its trials has long steps
MAX_ATTEMPTS = 3  # of a trial whose workers die
ADDED = ("dense",)  # parts of a study's config that workers say more of
SUPERSEDED = ("expired", "released")
OPEN = ("waiting", "held")
EXPIRED = "its worker gave no sign of life before the lease ran out"


class LeaseLostError(Exception):
    """The lease ran out, and the trial is another worker's by now: what this one found does not count."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease:
    """One attempt at a trial. number: the trial's; name: of a fixed plan; draw_index: place among the draws, else.

    work: the fixed plan, or the draw where an attempt before made it, as plain data. trial_id: Optuna's.
    """

    token: int
    number: int
    attempt: int
    retry_of: int | None
    name: str | None
    draw_index: int | None
    work: Mapping[str, Any] | None
    state: str
    trial_id: int | None
    worker: str | None
    reason: str | None
    settled: bool

    @property
    def title(self) -> str:
        """The fixed plan's name, or what a draw is called."""
        return self.name or f"trial {self.number}"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a trial was told with. place: rises in the order of telling."""

    place: int
    number: int
    key: str
    record: Mapping[str, Any]


class Leases:
    """The trials of one study. seconds: how long a lease lasts without a sign of life.

    All methods may be called again after they failed. Where the database is away, they wait for it, and raise
    StoreError in the end.
    """

    def __init__(self, database: Database, study: str, seconds: float = LEASE_S, max_attempts: int = MAX_ATTEMPTS):
        self._database, self._study = database, study
        self.seconds, self._max_attempts = seconds, max_attempts

    def create(self) -> None:
        """Make the study's row, where there is none yet."""

        def work(connection: Connection) -> None:
            if self._locked(connection) is None:
                values = {"study": self._study, "config": {}, "target": 0, "is_open": False, "created": Now()}
                connection.execute(insert(job).values(values))

        try:
            self._database.run(work)
        except IntegrityError:  # another made it at the same moment
            self._database.run(work)

    def drive(self, worker: str) -> str | None:
        """Become the one process that begins the study and ends it, or stay it; who is it instead, where one lives.

        It lasts for `DRIVER_S` without a sign of life, or until the process is seen to be dead.
        """

        def act(connection: Connection) -> str | None:
            self._locked(connection)
            now = select(job.c.driver, job.c.driver_expires > Now()).where(job.c.study == self._study)
            driver, lives = connection.execute(now).one()
            if driver not in (None, worker) and lives and not _is_dead(driver):
                return str(driver)
            mine = update(job).where(job.c.study == self._study)
            connection.execute(mine.values(driver=worker, driver_expires=Now() + DRIVER_S))
            return None

        return self._database.run(act)

    def leave(self, worker: str) -> None:
        """Be the driver no more."""
        mine = update(job).where(job.c.study == self._study, job.c.driver == worker)
        self._database.run(lambda c: c.execute(mine.values(driver=None, driver_expires=None)))

    def open(self, config: Mapping[str, Any], target: int) -> None:
        """Let workers ask, until there are `target` trials, if they were not started with fewer. config: for them.

        What `add` has said before stays, and wins.
        """

        def act(connection: Connection) -> None:
            self._locked(connection)
            mine = job.c.study == self._study
            known = connection.execute(select(job.c.config).where(mine)).scalar_one()
            both = {name: {**config.get(name, {}), **known[name]} for name in ADDED if name in known}
            values = {"config": {**config, **both}, "target": target, "is_open": True}
            connection.execute(update(job).where(mine).values(values))

        self._database.run(act)

    def add(self, name: str, more: Mapping[str, Any]) -> None:
        """Say more under a name of the config, one of `ADDED`, for whoever looks at the study."""
        assert name in ADDED, f"what is added must be one of {', '.join(ADDED)}, got {name}"

        def act(connection: Connection) -> None:
            self._locked(connection)
            config = connection.execute(select(job.c.config).where(job.c.study == self._study)).scalar_one()
            mine = update(job).where(job.c.study == self._study)
            connection.execute(mine.values(config={**config, name: {**config.get(name, {}), **more}}))

        self._database.run(act)

    def close(self) -> None:
        """Have workers end, whatever is left to try."""
        self._set_job(is_open=False)

    @property
    def opened(self) -> Mapping[str, Any] | None:
        """The config that workers are to start from; None while they may not ask."""
        row = self._row(select(job.c.config, job.c.is_open).where(job.c.study == self._study))
        return row["config"] if row is not None and row["is_open"] else None

    def enqueue(self, name: str, work: Mapping[str, Any], within: int | None = None) -> None:
        """Have a fixed plan tried before anything is drawn, once. within: only while there are fewer trials."""

        def act(connection: Connection) -> None:
            self._locked(connection)
            known = select(lease.c.token).where(self._mine, lease.c.name == name)
            num_trials = self._num_trials(connection)
            if connection.execute(known).first() is None and (within is None or num_trials < within):
                self._insert(connection, number=num_trials, name=name, work=dict(work), state="waiting")

        self._database.run(act)

    def claim(self, worker: str, target: int, first_index: int = 0) -> Lease | None:
        """A trial to try now: what waits, oldest first, or a new one while there are fewer than `target`; else None.

        Leases that ran out, and those of processes of this host that are dead, are given up first. target: no new one
        beyond it, nor beyond what the study was opened for. first_index: the least place among the draws that a new
        trial may have; it has the one after the last, or this one.
        """
        request = uuid.uuid4().hex

        def act(connection: Connection) -> Lease | None:
            self._locked(connection)
            mine = connection.execute(select(lease).where(lease.c.request == request)).mappings().first()
            if mine is not None:  # done again: the answer to the commit was lost
                return _lease(mine)
            self._give_up_dead(connection)
            waiting = select(lease.c.token).where(self._mine, lease.c.state == "waiting")
            token = connection.execute(waiting.order_by(lease.c.number, lease.c.token).limit(1)).scalar()
            granted = {"state": "held", "worker": worker, "request": request, "expires": Now() + self.seconds}
            if token is not None:
                held = update(lease).where(lease.c.token == token).values(granted).returning(lease)
                return _lease(connection.execute(held).mappings().one())
            superseded = case((lease.c.state.in_(SUPERSEDED), 1))
            known = select(func.count() - func.count(superseded), func.max(lease.c.draw_index)).where(self._mine)
            num_trials, last = connection.execute(known).one()
            if num_trials >= min(target, self._target(connection) or target):
                return None
            index = max(first_index, 0 if last is None else last + 1)
            new = self._new(number=num_trials, draw_index=index, **granted).returning(lease)
            return _lease(connection.execute(new).mappings().one())

        return self._database.run(act)

    def give_up_dead(self) -> None:
        """As `claim` begins: end the leases that ran out, and those of processes of this host that are dead."""

        def act(connection: Connection) -> None:
            self._locked(connection)
            self._give_up_dead(connection)

        self._database.run(act)

    def started(self, held: Lease, work: Mapping[str, Any]) -> None:
        """Note what is tried. Raises LeaseLostError."""
        self._extended(held, work=dict(work))

    def mirrored(self, token: int, trial_id: int) -> bool:
        """Note the attempt's Optuna trial; false where it has another one."""
        free = or_(lease.c.trial_id.is_(None), lease.c.trial_id == trial_id)
        noted = update(lease).where(lease.c.token == token, free).values(trial_id=trial_id)
        return self._database.run(lambda connection: connection.execute(noted).rowcount) > 0

    def beat(self, held: Lease) -> None:
        """A sign of life: the lease lasts `seconds` from now. Raises LeaseLostError."""
        self._extended(held)

    def tell(self, held: Lease, record: Mapping[str, Any], key: str) -> None:
        """Finish the trial with what it came to. Raises LeaseLostError, and keeps the record for an audit alone.

        The lease is lost once the trial was given to another; as long as nobody has it, what comes late still counts.
        """

        def act(connection: Connection) -> bool:
            self._locked(connection)
            known = {"study": self._study, "token": held.token, "record": dict(record), "told": Now()}
            state = connection.execute(select(lease.c.state).where(lease.c.token == held.token)).scalar()
            if state == "held":
                connection.execute(insert(evaluation).values(known | {"number": held.number, "key": key}))
                ended = {"state": "told", "expires": Now() + self.seconds}  # until then its worker settles it
                connection.execute(update(lease).where(lease.c.token == held.token).values(ended))
            elif state != "told" and not self._is_late(connection, held.token):
                connection.execute(insert(late_result).values(known | {"worker": held.worker or ""}))
            return state in ("held", "told")

        if not self._database.run(act):
            raise LeaseLostError(f"trial {held.number} was given to another worker before this one told it")

    def fail(self, held: Lease, reason: str) -> None:
        """Finish a trial that cannot be scored; it is not tried again. One whose lease is lost is left alone."""
        self._end(held, "failed", reason)

    def release(self, held: Lease, reason: str) -> None:
        """Hand the trial back, for another worker to try anew."""
        self._end(held, "released", reason)

    def give_up(self, held: Lease, reason: str) -> None:
        """As `release`, but that it was an attempt: the trial may be the reason that its worker could not go on."""
        self._end(held, "expired", reason)

    def settled(self, ended: Lease) -> None:
        """Note that the Optuna trial says what the lease does."""
        self._database.run(lambda c: c.execute(update(lease).where(lease.c.token == ended.token).values(settled=True)))

    def unsettled(self, token: int | None = None) -> list[Lease]:
        """Ended leases whose Optuna trial may not know it yet; or one of them."""
        return self._leases(self._unsettled if token is None else self._unsettled.where(lease.c.token == token))

    def abandoned(self, worker: str) -> list[Lease]:
        """Those of the unsettled that no other living worker is about to settle: not all workers at once try to."""
        query = self._unsettled.add_columns(func.coalesce(lease.c.expires <= Now(), true()).label("is_over"))
        rows = self._database.run(lambda c: c.execute(query).mappings().all())
        return [_lease(row) for row in rows if row["is_over"] or row["worker"] == worker or _is_dead(row["worker"])]

    def drawn(self, *states: str) -> list[Lease]:
        """Attempts at draws that were made, in these states, oldest first."""
        made = select(lease).where(self._mine, lease.c.state.in_(states), lease.c.draw_index.is_not(None))
        return [each for each in self._leases(made.order_by(lease.c.token)) if each.work is not None]

    def names(self) -> set[str]:
        """Of the fixed plans, whatever has become of them."""
        named = select(lease.c.name).where(self._mine, lease.c.name.is_not(None)).distinct()
        return set(self._database.run(lambda c: c.execute(named).scalars().all()))

    def all(self) -> list[Lease]:
        """Every attempt, oldest first."""
        return self._leases(select(lease).where(self._mine).order_by(lease.c.token))

    def record(self, token: int) -> Evaluation | None:
        """What a lease's trial was told with."""
        row = self._row(select(evaluation).where(evaluation.c.token == token))
        return None if row is None else _evaluation(row)

    def told_after(self, place: int) -> list[Evaluation]:
        """What was told since, in the order of telling."""
        later = select(evaluation).where(evaluation.c.study == self._study, evaluation.c.id > place)
        rows = self._database.run(lambda c: c.execute(later.order_by(evaluation.c.id)).mappings().all())
        return [_evaluation(row) for row in rows]

    def late(self) -> list[Mapping[str, Any]]:
        """What came too late, oldest first: token, worker and record."""
        found = select(late_result).where(late_result.c.study == self._study).order_by(late_result.c.id)
        return [dict(row) for row in self._database.run(lambda c: c.execute(found).mappings().all())]

    def counts(self) -> dict[str, int]:
        """The number of leases by state."""
        grouped = select(lease.c.state, func.count()).where(self._mine).group_by(lease.c.state)
        rows = self._database.run(lambda c: c.execute(grouped).all())
        return {str(state): int(num) for state, num in rows}

    def forget(self) -> None:
        """Delete the study's rows, whoever still works on it."""

        def act(connection: Connection) -> None:
            self._locked(connection)
            for table in (late_result, evaluation, lease, job):
                connection.execute(delete(table).where(table.c.study == self._study))

        self._database.run(act)

    def _is_late(self, connection: Connection, token: int) -> bool:
        return connection.execute(select(late_result.c.id).where(late_result.c.token == token)).first() is not None

    @property
    def _mine(self) -> Any:
        return lease.c.study == self._study

    @property
    def _unsettled(self) -> Any:
        return select(lease).where(self._mine, lease.c.state.not_in(OPEN), lease.c.settled.is_(False))

    def _locked(self, connection: Connection) -> Any:
        """Hold the study's row until the transaction ends. On SQLite the transaction itself is the lock."""
        return connection.execute(select(job.c.study).where(job.c.study == self._study).with_for_update()).scalar()

    def _set_job(self, **values: Any) -> None:
        self._database.run(lambda c: c.execute(update(job).where(job.c.study == self._study).values(values)))

    def _target(self, connection: Connection) -> int:
        return int(connection.execute(select(job.c.target).where(job.c.study == self._study)).scalar_one())

    def _num_trials(self, connection: Connection) -> int:
        counted = select(func.count()).where(self._mine, lease.c.state.not_in(SUPERSEDED))
        return int(connection.execute(counted).scalar_one())

    def _insert(self, connection: Connection, **values: Any) -> None:
        connection.execute(self._new(**values))

    def _new(self, **values: Any) -> Insert:
        return insert(lease).values({"study": self._study, "attempt": 0, "settled": False, **values})

    def _give_up_dead(self, connection: Connection) -> None:
        held = select(lease.c.token, lease.c.worker, lease.c.expires <= Now())
        for token, worker, is_over in connection.execute(held.where(self._mine, lease.c.state == "held")).all():
            if is_over or _is_dead(worker):
                row = connection.execute(select(lease).where(lease.c.token == token)).mappings().one()
                self._give_up(connection, row, "expired", EXPIRED if is_over else "its worker died")

    def _give_up(self, connection: Connection, row: RowMapping, state: str, reason: str) -> None:
        """End a held lease without a result, and let the trial wait for another attempt, if it has one left."""
        attempt = row["attempt"] + (state == "expired")
        if attempt >= self._max_attempts:
            state, reason = "failed", f"{reason}, for the last of {self._max_attempts} attempts"
        ended = {"state": state, "reason": reason, "expires": None}
        connection.execute(update(lease).where(lease.c.token == row["token"]).values(ended))
        if state != "failed":
            same = {name: row[name] for name in ("number", "name", "draw_index", "work")}
            self._insert(connection, **same, attempt=attempt, retry_of=row["token"], state="waiting")

    def _extended(self, held: Lease, **values: Any) -> None:
        mine = and_(lease.c.token == held.token, lease.c.state == "held")
        longer = update(lease).where(mine).values(expires=Now() + self.seconds, **values)
        if self._database.run(lambda connection: connection.execute(longer).rowcount) == 0:
            raise LeaseLostError(f"trial {held.number} was given to another worker")

    def _end(self, held: Lease, state: str, reason: str) -> None:
        def act(connection: Connection) -> None:
            self._locked(connection)
            mine = select(lease).where(lease.c.token == held.token, lease.c.state == "held")
            row = connection.execute(mine).mappings().first()
            if row is None:
                return
            if state in SUPERSEDED:
                self._give_up(connection, row, state, reason)
            else:
                ended = {"state": state, "reason": reason, "expires": None}
                connection.execute(update(lease).where(lease.c.token == held.token).values(ended))

        self._database.run(act)

    def _leases(self, query: Any) -> list[Lease]:
        rows: Sequence[RowMapping] = self._database.run(lambda c: c.execute(query).mappings().all())
        return [_lease(row) for row in rows]

    def _row(self, query: Any) -> RowMapping | None:
        found: RowMapping | None = self._database.run(lambda c: c.execute(query).mappings().first())
        return found


def this_worker() -> str:
    """This process, so that others on this host can tell whether it still lives."""
    return f"{_host()}/{os.getpid()}/{_began(os.getpid())}"


@functools.cache
def _host() -> str:
    """The host, and the process numbers that this process sees there: hosts and containers may share a name."""
    numbers, boot = Path("/proc/self/ns/pid"), Path("/proc/sys/kernel/random/boot_id")
    booted = boot.read_text(encoding="ascii")[:8] if boot.exists() else ""
    return f"{socket.gethostname()}/{booted}/{numbers.readlink() if numbers.exists() else ''}"


def _began(process: int) -> str:
    """When a process began, in ticks: a number is given out again. Empty where it is dead, or a zombie."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


def _is_dead(worker: str | None) -> bool:
    """Whether a worker was a process of this host and is gone; false for another host's."""
    here = f"{_host()}/"
    if worker is None or not worker.startswith(here):
        return False
    process, _, began = worker.removeprefix(here).partition("/")
    return _began(int(process)) != began


def _lease(row: RowMapping) -> Lease:
    return Lease(**{name: row[name] for name in Lease.__dataclass_fields__})


def _evaluation(row: RowMapping) -> Evaluation:
    return Evaluation(row["id"], row["number"], row["key"], row["record"])
