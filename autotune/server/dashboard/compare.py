"""The page that compares studies, and its points as a table for other programs."""

from __future__ import annotations

import functools
import multiprocessing
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.pool import AsyncResult, ThreadPool
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autotune.redaction import redacted
from autotune.registered import RegistryError, Version
from autotune.server.dashboard.sessions import Viewer, render
from autotune.server.service import Service, ServiceParameter
from autotune.store import StoreError, StudyRow

if TYPE_CHECKING:
    from autotune.pages.fronts import StudySeries
    from autotune.pages.view import View

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

REGISTRY_S = 0.25  # that a page waits for the registry; its script asks again
FRESH_S = 10.0  # in which what the registry said last is not asked for again
MOST_LISTED = 200  # studies to choose from
FIRST = 6  # studies of one question that are shown where the address names none
KEPT = 64  # studies whose trials stay in memory


@router.get("/")
def page(request: Request, key: Viewer, service: ServiceParameter) -> Response:
    """Studies side by side, as the address asks for them."""
    from autotune.pages import compare, points, view

    asked = view.View.of(request.query_params.multi_items())
    listed = service.studies.newest(MOST_LISTED + 1)
    rows, notes = _chosen(service, asked, listed)
    answer = _registry(service).ask()
    comparison = compare.Comparison(view=asked, studies=_series(service, rows), versions=answer.versions)
    notes += [answer.note] if answer.note else []
    if len(listed) > MOST_LISTED:
        notes.append(f"Only the newest {MOST_LISTED} studies are listed here; choose others on the page of studies.")
    return render(
        request,
        "compare.html.jinja",
        comparison=comparison,
        choices=compare.asked_alike([*listed[:MOST_LISTED], *(row for row in rows if row not in listed[:MOST_LISTED])]),
        chosen={row.name for row in rows},
        notes=notes,
        is_late=answer.is_late,
        data=points.data_of(comparison),
        x_names=view.X_NAMES,
        y_names=view.Y_NAMES,
        hideable=view.HIDEABLE,
    )


@router.get("/compare.csv")
def table(request: Request, key: Viewer, service: ServiceParameter) -> Response:
    """Every point that the address asks for."""
    from autotune.pages import compare, points, view

    asked = view.View.of(request.query_params.multi_items())
    rows, _ = _chosen(service, asked, service.studies.newest(MOST_LISTED))
    versions = _registry(service).ask().versions
    comparison = compare.Comparison(view=asked, studies=_series(service, rows), versions=versions)
    headers = {"Content-Disposition": 'attachment; filename="fronts.csv"'}
    return Response(points.csv_of(comparison), media_type="text/csv; charset=utf-8", headers=headers)


def _chosen(service: Service, view: View, listed: Iterable[StudyRow]) -> tuple[list[StudyRow], list[str]]:
    """The studies that a view names, and what is to be said about those that are not there."""
    if view.study is None:
        return _newest(listed), []
    found = {name: service.studies.get(name) for name in view.study}
    missing = [name for name, row in found.items() if row is None]
    return [row for row in found.values() if row is not None], [f"There is no study {name!r}." for name in missing]


def _newest(listed: Iterable[StudyRow]) -> list[StudyRow]:
    """The newest study with a trial, and those that ask as it does but for the seed. listed: newest first."""
    from autotune.pages.fronts import StudySeries

    rows = [row for row in listed if row.num_told]
    questions = [StudySeries.of(row, ()).question for row in rows]
    alike = [row for row, question in zip(rows, questions, strict=True) if question and question == questions[0]]
    return sorted((alike or rows[:1])[:FIRST], key=lambda row: row.name)


def _series(service: Service, rows: Iterable[StudyRow]) -> tuple[StudySeries, ...]:
    """As they are listed to choose from, however the address has them: the same look the same."""
    found = (_told(service, row.name, row.created, row.num_told, row.is_open) for row in rows)
    return tuple(sorted(found, key=lambda study: (*study.kind, study.name)))


@functools.lru_cache(maxsize=KEPT)
def _told(service: Service, name: str, created: float, num_told: int, is_open: bool) -> StudySeries:
    """A study, read anew once there is more to it."""
    from autotune.pages.fronts import StudySeries

    row = service.studies.get(name)
    if row is None:
        raise HTTPException(
            404, f"there must be a study {name!r}, but it was deleted in the middle; load the page again"
        )
    return StudySeries.of(row, service.told.of(name, created)[0])


class _Registry:
    """The registry's versions, for who cannot wait for it: one thread asks, and what it said last is kept."""

    def __init__(self, service: Service) -> None:
        self._service, self._lock = service, threading.Lock()
        self._asker = ThreadPool(1)  # whose thread keeps no server from its end
        self._asked: AsyncResult[None] | None = None
        self._answer, self._learnt = _Answer(), -FRESH_S

    def ask(self) -> _Answer:
        with self._lock:
            if time.monotonic() < self._learnt + FRESH_S:
                return self._answer
            if self._asked is None or self._asked.ready():
                self._asked = self._asker.apply_async(self._ask)
            asked = self._asked
        try:
            asked.get(REGISTRY_S)
        except multiprocessing.TimeoutError:
            return _Answer(self._answer.versions, is_late=True)
        return self._answer

    def _ask(self) -> None:
        try:
            answer = _Answer(tuple(self._service.profiles.list()))
        except (RegistryError, StoreError) as error:
            note = f"The registry could not be asked for certified versions: {redacted(str(error))}"
            answer = _Answer(self._answer.versions, note)
        with self._lock:
            self._answer, self._learnt = answer, time.monotonic()


@dataclass(frozen=True, slots=True)
class _Answer:
    """versions: known by now. note: why there may be others; is_late: there may be in a moment."""

    versions: tuple[Version, ...] = ()
    note: str = ""
    is_late: bool = False


@functools.lru_cache(maxsize=4)
def _registry(service: Service) -> _Registry:
    return _Registry(service)
