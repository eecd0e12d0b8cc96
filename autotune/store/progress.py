"""How studies stand: for who only looks at them, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    and_,
    case,
    column,
    create_engine,
    func,
    inspect,
    or_,
    select,
    table,
)
from sqlalchemy.pool import NullPool

from autotune.config import check_sqlite
from autotune.store.database import Database
from autotune.store.leases import LEASE_S
from autotune.store.tables import Now, evaluation, job, lease

__all__ = ["Attempt", "Notes", "Overview", "Progress", "Standing", "has_optuna", "has_tables"]

_optuna_studies = table("studies", column("study_id"), column("study_name"))
_optuna_notes = table("study_user_attributes", column("study_id"), column("key"), column("value_json"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Standing:
    """A study in a list of them. num_held: leases that have not run out. last: when a trial was told, since 1970.

    now: by the database's clock.
    """

    name: str
    settings: Mapping[str, Any]
    device: str
    num_told: int
    num_failed: int
    num_held: int
    target: int
    is_open: bool
    created: float
    last: float | None
    now: float

    @property
    def state(self) -> str:
        if self.target == 0:
            return "being prepared"
        if self.num_told + self.num_failed >= self.target and not self.num_held:
            return "finished"
        if not self.is_open:
            return "closed"
        return "running" if self.num_held else "waiting for workers"


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """One attempt of one worker at one trial. left: seconds until its lease runs out; told: seconds since 1970."""

    token: int
    number: int
    name: str | None
    attempt: int
    retry_of: int | None
    state: str
    worker: str | None
    reason: str | None
    left: float | None
    told: float | None

    @property
    def title(self) -> str:
        return self.name or f"trial {self.number}"

    @property
    def silent(self) -> float | None:
        """Seconds since its worker's last sign of life, of a lease that lasts as leases do."""
        return None if self.left is None or self.left > LEASE_S else LEASE_S - self.left


@dataclass(frozen=True, slots=True)
class Notes:
    """What Optuna's tables say of a study: its number there, and what the study rests on."""

    optuna_id: int
    notes: Mapping[str, Any]


def has_optuna(database: Database) -> bool:
    """Whether Optuna's tables lie there beside ours."""
    return database.run(lambda c: inspect(c).has_table(_optuna_notes.name))


def has_tables(database: Database) -> bool:
    """Whether studies may lie there. Writes nothing. Raises AutotuneError for a file that is no database."""
    if database.file is not None:
        if not database.exists:
            return False
        check_sqlite(database.file)

    def look() -> bool:
        with create_engine(database.url, poolclass=NullPool).connect() as connection:
            return inspect(connection).has_table(job.name)

    return database.redo(look)


class Overview:
    """All studies of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, text: str, first: int, num: int) -> tuple[list[Standing], int]:
        """Newest first, and how many there are. text: a part of the name, the model or the device."""
        known = _like(text)
        page = select(*_STANDINGS).where(known).order_by(job.c.created.desc(), job.c.study).offset(first).limit(num)
        counted = select(func.count()).select_from(job).where(known)

        def act(connection: Connection) -> tuple[list[Standing], int]:
            rows = connection.execute(page).mappings().all()
            return [_standing(row) for row in rows], int(connection.execute(counted).scalar_one())

        return self._database.run(act)

    def get(self, name: str) -> Standing | None:
        """None where there is no such study."""
        row = self._database.run(lambda c: c.execute(select(*_STANDINGS).where(job.c.study == name)).mappings().first())
        return None if row is None else _standing(row)

    def best(self, names: Collection[str]) -> dict[str, float]:
        """The highest score of those trials that are feasible; none for a study that has none, or no labels."""
        best = func.max(evaluation.c.record["score"].as_float())
        found = select(evaluation.c.study, best).where(evaluation.c.study.in_(names), _FEASIBLE, _LABELLED)
        rows = self._database.run(lambda c: c.execute(found.group_by(evaluation.c.study)).all())
        return {str(name): float(score) for name, score in rows}


class Progress:
    """How far one study is."""

    def __init__(self, database: Database, study: str) -> None:
        self._database, self._study = database, study

    def mark(self) -> tuple[Any, ...]:
        """Another one whenever a trial was claimed, told, given up, or the study opened or closed."""
        told = select(func.max(evaluation.c.id)).where(evaluation.c.study == self._study)
        states = select(lease.c.state, func.count(), func.max(lease.c.token)).where(lease.c.study == self._study)
        opened = select(job.c.is_open, job.c.target).where(job.c.study == self._study)

        def act(connection: Connection) -> tuple[Any, ...]:
            grouped = connection.execute(states.group_by(lease.c.state).order_by(lease.c.state)).all()
            return (connection.execute(told).scalar(), *grouped, connection.execute(opened).first())

        return self._database.run(act)

    def attempts(self) -> list[Attempt]:
        """Every one, oldest first."""
        left = case((lease.c.state == "held", lease.c.expires - Now())).label("left")
        names = [name for name in Attempt.__dataclass_fields__ if name not in ("left", "told")]
        told = lease.outerjoin(evaluation, evaluation.c.token == lease.c.token)
        query = select(*(lease.c[name] for name in names), left, evaluation.c.told).select_from(told)
        query = query.where(lease.c.study == self._study).order_by(lease.c.token)
        return [Attempt(**row) for row in self._database.run(lambda c: c.execute(query).mappings().all())]

    def notes(self) -> Notes | None:
        """None where Optuna knows nothing of the study."""
        mine = select(_optuna_studies.c.study_id).where(_optuna_studies.c.study_name == self._study)
        kept = select(_optuna_notes.c.key, _optuna_notes.c.value_json)

        def act(connection: Connection) -> Notes | None:
            if not inspect(connection).has_table(_optuna_notes.name):
                return None
            number = connection.execute(mine).scalar()
            if number is None:
                return None
            rows = connection.execute(kept.where(_optuna_notes.c.study_id == number)).all()
            return Notes(number, {key: json.loads(value) for key, value in rows})

        return self._database.run(act)


def _leases(*which: ColumnElement[bool]) -> ColumnElement[int]:
    mine = and_(lease.c.study == job.c.study, *which)
    return select(func.count()).select_from(lease).where(mine).correlate(job).scalar_subquery()


def _told(what: Any) -> ColumnElement[Any]:
    return (
        select(what).select_from(evaluation).where(evaluation.c.study == job.c.study).correlate(job).scalar_subquery()
    )


_STANDINGS = (
    job.c.study,
    job.c.config,
    job.c.target,
    job.c.is_open,
    job.c.created,
    _told(func.count()).label("num_told"),
    _told(func.max(evaluation.c.told)).label("last"),
    _leases(lease.c.state == "failed").label("num_failed"),
    _leases(lease.c.state == "held", lease.c.expires > Now()).label("num_held"),
    Now().label("now"),
)
_record = evaluation.c.record
_guard = _record["guard"].as_float()
_FEASIBLE = and_(
    _record["complete"].as_boolean(),
    _record["ratio_high"].as_float() <= _record["limit"].as_float(),
    or_(_guard.is_(None), _record["worst_task"].as_float() >= _guard),
)
"""As `objective.Told.feasible` has it, of complete trials."""
_LABELLED = _record["by_task"].as_string() != "{}"
"""Without labels every score is 0."""


def _like(text: str) -> ColumnElement[bool]:
    parts = (job.c.study, job.c.config["settings"]["model"].as_string(), job.c.config["fits"]["name"].as_string())
    return or_(*(func.lower(part).contains(text.lower(), autoescape=True) for part in parts))


def _standing(row: Any) -> Standing:
    config = row["config"]
    settings = config.get("settings", {})
    same = ("target", "is_open", "created", "num_told", "num_failed", "num_held", "last", "now")
    device = config.get("fits", {}).get("name") or settings.get("device") or ""
    return Standing(name=row["study"], settings=settings, device=device, **{name: row[name] for name in same})
