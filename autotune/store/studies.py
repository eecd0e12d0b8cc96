"""Which studies a database holds, and what their trials were told with: for who only looks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import RowMapping, func, select

from autotune.store.database import Database
from autotune.store.tables import evaluation, job

__all__ = ["Studies", "StudyRow"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StudyRow:
    """A study. created: seconds since 1970.

    settings: what its workers start from, and context: what it is about (`autotune.job.context`); both are empty
    before it was opened.
    """

    name: str
    settings: Mapping[str, Any]
    context: Mapping[str, Any]
    num_told: int
    target: int
    is_open: bool
    created: float


class Studies:
    """All studies of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def page(self, limit: int, after: str = "") -> list[StudyRow]:
        """By name. after: the last one of the page before."""
        page = _STUDIES.where(job.c.study > after).order_by(job.c.study).limit(limit)
        return [_row(row) for row in self._database.run(lambda c: c.execute(page).mappings().all())]

    def newest(self, limit: int) -> list[StudyRow]:
        """The one that was created last first."""
        page = _STUDIES.order_by(job.c.created.desc(), job.c.study).limit(limit)
        return [_row(row) for row in self._database.run(lambda c: c.execute(page).mappings().all())]

    def get(self, name: str) -> StudyRow | None:
        """None where there is no such study."""
        row = self._database.run(lambda c: c.execute(_STUDIES.where(job.c.study == name)).mappings().first())
        return None if row is None else _row(row)

    def records(self, name: str) -> list[Mapping[str, Any]]:
        """What every finished trial was told with, in the order of telling."""
        told = select(evaluation.c.record).where(evaluation.c.study == name).order_by(evaluation.c.id)
        return list(self._database.run(lambda c: c.execute(told).scalars().all()))


_NUM_TOLD = select(func.count()).where(evaluation.c.study == job.c.study).scalar_subquery()
_STUDIES = select(job, _NUM_TOLD.label("num_told"))


def _row(row: RowMapping) -> StudyRow:
    return StudyRow(
        name=row["study"],
        settings=row["config"].get("settings", {}),
        context={name: value for name, value in row["config"].items() if name != "settings"},
        num_told=row["num_told"],
        target=row["target"],
        is_open=row["is_open"],
        created=row["created"],
    )
