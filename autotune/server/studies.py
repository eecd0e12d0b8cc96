"""Studies over HTTP: how far they are, and their fronts."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException

from autotune.server.auth import Reader
from autotune.server.problems import declared
from autotune.server.schemas import PlanView, StudyDetail, StudyFront, StudyPage, StudyPath, StudyView
from autotune.server.service import Service, ServiceParameter
from autotune.store import StudyRow

if TYPE_CHECKING:
    from autotune.objective import Told

__all__ = ["router"]

router = APIRouter(prefix="/v1/studies", tags=["studies"])

After = Annotated[str, Query(max_length=250, pattern=r"^[^\x00]*$", description="The last study of the page before.")]


@router.get("", operation_id="listStudies", responses=declared(422))
def page(
    key: Reader, service: ServiceParameter, limit: Annotated[int, Query(ge=1, le=200)] = 50, after: After = ""
) -> StudyPage:
    """List studies by name."""
    rows = service.studies.page(limit + 1, after)
    views = [StudyView(**_told_of(row)) for row in rows[:limit]]
    return StudyPage(studies=views, next=views[-1].name if len(rows) > limit else None)


@router.get("/{study}", operation_id="getStudy", responses=declared(404, 422))
def get(study: StudyPath, key: Reader, service: ServiceParameter) -> StudyDetail:
    """Look at a study."""
    row = _row(service, study)
    complete = [told for told in _told(service, study) if told.complete]
    feasible = [told.score for told in complete if told.feasible]
    best = max(feasible, default=None)
    return StudyDetail(**_told_of(row), num_complete=len(complete), num_feasible=len(feasible), best=best)


@router.get("/{study}/front", operation_id="getFront", responses=declared(404, 422))
def front(study: StudyPath, key: Reader, service: ServiceParameter) -> StudyFront:
    """The best trials of a study, as far as it is."""
    from autotune import objective

    _row(service, study)
    return StudyFront(study=study, front=[_plan(told) for told in objective.front(_told(service, study))])


def _row(service: Service, study: str) -> StudyRow:
    row = service.studies.get(study)
    if row is None:
        raise HTTPException(
            404, f"there must be a study {study!r}, but there is none; list them to see which there are"
        )
    return row


def _told_of(row: StudyRow) -> dict[str, Any]:
    """Of its settings those that mean something elsewhere than on its host."""
    settings = {name: row.settings.get(name) for name in ("limit", "sampler", "seed", "guard", "device")}
    return {**settings, **{name: value for name, value in asdict(row).items() if name not in ("settings", "context")}}


def _told(service: Service, study: str) -> list[Told]:
    from autotune.objective import Told  # with SciPy, which no server has to wait for when it starts

    return [Told.from_dict(record) for record in service.studies.records(study)]


def _plan(told: Told) -> PlanView:
    kept = {name: getattr(told, name) for name in PlanView.model_fields}
    return PlanView(**{**kept, "plan": told.plan.to_dict(), "by_task": dict(told.by_task)})
