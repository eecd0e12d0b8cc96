"""Jobs that were handed in: claimed under a lease, followed by their events, ended once.

Whoever changes a job, or adds to its events, holds its row until the transaction ends. So a job's events have one
order, and a reader who asks for what came after the last one it saw misses none.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, RowMapping, func, insert, select, tuple_, update
from sqlalchemy.exc import IntegrityError

from autotune.config import AutotuneError
from autotune.store.database import Database
from autotune.store.leases import EXPIRED, MAX_ATTEMPTS, LeaseLostError
from autotune.store.tables import Now, api_key, submission, submission_event
from btp.sealed import sha256_of

__all__ = [
    "FINAL",
    "STATES",
    "ConflictError",
    "JobEvent",
    "NoSubmissionError",
    "Submission",
    "Submissions",
]

STATES = ("queued", "running", "succeeded", "failed", "cancelled")
FINAL = ("succeeded", "failed", "cancelled")
LEASE_S = 60.0  # from one sign of life to the next; a process that is to end has to end in it


class ConflictError(AutotuneError):
    """What was asked does not go with what was asked before."""


class NoSubmissionError(AutotuneError):
    """There is no such job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One job; times in seconds since 1970. by: the name of the key it was handed in with.

    may_promote: whether that key has the scope for it, and is not revoked; its scopes never change.
    attempt: how often it was claimed and not handed back. worker: who has it, or had it last.
    """

    id: str
    by: str
    may_promote: bool
    settings: Mapping[str, Any]
    state: str
    cancel_requested: bool
    attempt: int
    worker: str | None
    study: str | None
    outcome: Mapping[str, Any] | None
    reason: str | None
    created: float
    started: float | None
    finished: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobEvent:
    """What happened to a job. kind: "state", or "progress" of the process that runs it."""

    id: int
    kind: str
    data: Mapping[str, Any]
    at: float


class Submissions:
    """All jobs of one service. seconds: how long a claim lasts without a sign of life, by the database's clock."""

    def __init__(self, database: Database, seconds: float = LEASE_S, max_attempts: int = MAX_ATTEMPTS) -> None:
        self._database, self.seconds, self._max_attempts = database, seconds, max_attempts

    def submit(self, settings: Mapping[str, Any], key: int, idempotency_key: str | None = None) -> Submission:
        """Put a job into the queue; or the one that this key has handed in under this idempotency key before.

        Raises ConflictError where that one has other settings.
        """
        new, digest = uuid.uuid4().hex, sha256_of(settings)
        asked = {"key": key, "idempotency_key": idempotency_key, "digest": digest, "settings": dict(settings)}
        mine = submission.c.id == new
        if idempotency_key is not None:
            mine = (submission.c.key == key) & (submission.c.idempotency_key == idempotency_key)

        def work(connection: Connection) -> Submission:
            known = connection.execute(select(submission.c.id, submission.c.digest).where(mine)).first()
            if known is not None and known.digest != digest:
                raise ConflictError(
                    f"an idempotency key must stay with its settings, got others for {idempotency_key!r}; "
                    "use a new key for a new job"
                )
            if known is None:
                state = {"state": "queued", "cancel_requested": False, "attempt": 0, "created": Now()}
                connection.execute(insert(submission).values(id=new, **asked, **state))
                _note(connection, new, "state", {"state": "queued"})
            return _found(connection, known.id if known else new)

        try:
            return self._database.run(work)
        except IntegrityError:  # the same key came twice at once, and the other was first
            return self._database.run(work)

    def get(self, number: str) -> Submission:
        """Raises NoSubmissionError."""
        return self._database.run(lambda connection: _found(connection, number))

    def page(self, limit: int, after: str | None = None) -> list[Submission]:
        """Newest first. after: the last one of the page before. Raises NoSubmissionError where there is no such one."""
        order = tuple_(submission.c.created, submission.c.id)
        query = _JOBS.order_by(submission.c.created.desc(), submission.c.id.desc()).limit(limit)

        def work(connection: Connection) -> list[Submission]:
            older = query
            if after is not None:
                last = _found(connection, after)
                older = query.where(order < tuple_(last.created, last.id))
            return [_submission(row) for row in connection.execute(older).mappings().all()]

        return self._database.run(work)

    def counts(self) -> dict[str, int]:
        """The number of jobs in every state."""
        grouped = select(submission.c.state, func.count()).group_by(submission.c.state)
        rows = self._database.run(lambda c: c.execute(grouped).all())
        return dict.fromkeys(STATES, 0) | {str(state): int(num) for state, num in rows}

    def cancel(self, number: str) -> Submission:
        """End a job that waits, or have its worker end it. One that has ended stays as it is."""

        def work(connection: Connection) -> Submission:
            row = _locked(connection, number)
            if row["state"] == "queued" or (row["state"] == "running" and row["is_over"]):
                _end(connection, number, "cancelled", None, None)
            elif row["state"] == "running" and not row["cancel_requested"]:
                connection.execute(_set(number, cancel_requested=True))
                _note(connection, number, "state", {"state": "running", "cancel_requested": True})
            return _found(connection, number)

        return self._database.run(work)

    def claim(self, worker: str) -> Submission | None:
        """A job to run now, oldest first: one that waits, or whose worker gave no sign of life for too long.

        A worker has one at a time: asked again, it gets the same. One that has lost its worker for the last time fails.
        """

        def work(connection: Connection) -> Submission | None:
            held = submission.c.state == "running"
            mine = connection.execute(select(submission.c.id).where(held, submission.c.worker == worker)).scalar()
            if mine is not None:  # done again: the answer to the commit was lost
                return _found(connection, mine)
            while (free := _free(connection)) is not None and self._is_given_up(connection, free):
                pass
            if free is None:
                return None
            number, attempt = free["id"], free["attempt"] + 1
            granted = {"worker": worker, "attempt": attempt, "expires": Now() + self.seconds}
            started = func.coalesce(submission.c.started, Now())
            connection.execute(_set(number, state="running", started=started, **granted))
            _note(connection, number, "state", {"state": "running", "attempt": attempt})
            return _found(connection, number)

        return self._database.run(work)

    def _is_given_up(self, connection: Connection, free: RowMapping) -> bool:
        """Whether a job that nobody has is not to be run again, and was ended."""
        if free["state"] == "queued":
            return False
        if free["cancel_requested"]:
            _end(connection, free["id"], "cancelled", None, None)
            return True
        if free["attempt"] >= self._max_attempts:
            _end(connection, free["id"], "failed", None, f"{EXPIRED}, for the last of {self._max_attempts} attempts")
            return True
        return False

    def beat(self, mine: Submission) -> bool:
        """A sign of life; whether the job is to be cancelled. Raises LeaseLostError."""

        def work(connection: Connection) -> bool:
            row = _held(connection, mine)
            connection.execute(_set(mine.id, expires=Now() + self.seconds))
            return bool(row["cancel_requested"])

        return self._database.run(work)

    def progress(self, mine: Submission, data: Mapping[str, Any], study: str | None = None) -> None:
        """Note how far it is; what says the same as the last event is not noted again. Raises LeaseLostError."""

        def work(connection: Connection) -> None:
            if _held(connection, mine)["study"] is None and study is not None:
                connection.execute(_set(mine.id, study=study))
            last = select(submission_event.c.kind, submission_event.c.data)
            last = last.where(submission_event.c.submission == mine.id).order_by(submission_event.c.id.desc()).limit(1)
            if tuple(connection.execute(last).one()) != ("progress", dict(data)):
                _note(connection, mine.id, "progress", data)

        self._database.run(work)

    def finish(
        self, mine: Submission, state: str, outcome: Mapping[str, Any] | None = None, reason: str | None = None
    ) -> None:
        """End it, in one of `FINAL`. Raises LeaseLostError where it is another worker's by now."""

        def work(connection: Connection) -> None:
            row = _locked(connection, mine.id)
            if row["state"] != state or (row["worker"], row["attempt"]) != (mine.worker, mine.attempt):
                _held(connection, mine)
                _end(connection, mine.id, state, outcome, reason)

        self._database.run(work)

    def release(self, mine: Submission) -> None:
        """Hand it back to the queue, as if it had never been claimed. One that was lost is left alone."""

        def work(connection: Connection) -> None:
            row = _locked(connection, mine.id)
            if not _holds(row, mine):
                return
            if row["cancel_requested"]:
                _end(connection, mine.id, "cancelled", None, None)
                return
            connection.execute(_set(mine.id, state="queued", worker=None, expires=None, attempt=mine.attempt - 1))
            _note(connection, mine.id, "state", {"state": "queued"})

        self._database.run(work)

    def events(self, number: str, after: int = 0) -> list[JobEvent]:
        """What happened since the event of this number, oldest first."""
        return self.news(number, after)[1]

    def news(self, number: str, after: int = 0) -> tuple[bool, list[JobEvent]]:
        """Whether it has ended, and its events since the one of this number, as of one moment: asked with one query."""
        later = (submission_event.c.submission == submission.c.id) & (submission_event.c.id > after)
        query = select(submission.c.state, submission_event).join(submission_event, later, isouter=True)
        query = query.where(submission.c.id == number).order_by(submission_event.c.id)
        rows = self._database.run(lambda c: c.execute(query).mappings().all())
        events = [row for row in rows if row["id"] is not None]
        told = [JobEvent(**{name: row[name] for name in JobEvent.__dataclass_fields__}) for row in events]
        return any(row["state"] in FINAL for row in rows), told


_MAY_PROMOTE = (api_key.c.scopes, api_key.c.revoked)
_JOBS = select(submission, api_key.c.name.label("by"), *_MAY_PROMOTE).join(api_key, api_key.c.id == submission.c.key)


def _found(connection: Connection, number: str) -> Submission:
    row = connection.execute(_JOBS.where(submission.c.id == number)).mappings().first()
    if row is None:
        raise NoSubmissionError(f"there must be a job {number!r}, but there is none; list them to see which there are")
    return _submission(row)


def _locked(connection: Connection, number: str) -> RowMapping:
    """The row, held until the transaction ends. On SQLite the transaction itself is the lock."""
    is_over = (submission.c.expires <= Now()).label("is_over")
    query = select(submission, is_over).where(submission.c.id == number).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise NoSubmissionError(f"there must be a job {number!r}, but there is none; list them to see which there are")
    return row


def _held(connection: Connection, mine: Submission) -> RowMapping:
    row = _locked(connection, mine.id)
    if not _holds(row, mine):
        raise LeaseLostError(f"job {mine.id} is no longer this worker's")
    return row


def _holds(row: RowMapping, mine: Submission) -> bool:
    return (row["state"], row["worker"], row["attempt"]) == ("running", mine.worker, mine.attempt)


def _free(connection: Connection) -> RowMapping | None:
    """The oldest job that waits or was lost, and that nobody else is about to take."""
    lost = (submission.c.state == "running") & (submission.c.expires <= Now())
    query = select(submission).where((submission.c.state == "queued") | lost)
    query = query.order_by(submission.c.created, submission.c.id).limit(1)
    return connection.execute(query.with_for_update(skip_locked=True)).mappings().first()


def _set(number: str, **values: Any) -> Any:
    return update(submission).where(submission.c.id == number).values(values)


def _end(
    connection: Connection, number: str, state: str, outcome: Mapping[str, Any] | None, reason: str | None
) -> None:
    text = None if reason is None else reason.replace("\0", "")  # PostgreSQL has no such letter
    found = None if outcome is None else dict(outcome)
    ended = {"state": state, "outcome": found, "reason": text, "expires": None, "finished": Now()}
    connection.execute(_set(number, **ended))
    _note(connection, number, "state", {"state": state} if text is None else {"state": state, "reason": text})


def _note(connection: Connection, number: str, kind: str, data: Mapping[str, Any]) -> None:
    connection.execute(insert(submission_event).values(submission=number, kind=kind, data=dict(data), at=Now()))


def _submission(row: RowMapping) -> Submission:
    may_promote = "promote" in row["scopes"] and row["revoked"] is None
    told = {name: row[name] for name in Submission.__dataclass_fields__ if name != "may_promote"}
    return Submission(**told, may_promote=may_promote)
