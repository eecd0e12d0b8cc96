"""The page of a trial: what the database has of it, alone or beside another trial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.exceptions import HTTPException

from autotune.registered import Version
from autotune.server.dashboard.asking import AwayError, within_patience
from autotune.server.dashboard.sessions import Viewer, render
from autotune.server.schemas import LARGEST, StudyPath
from autotune.server.service import Service, ServiceParameter
from autotune.store import Results, StudyRow

if TYPE_CHECKING:
    from autotune.pages.trial import Subject

__all__ = ["router"]

router = APIRouter(include_in_schema=False)

Number = Annotated[int, Path(ge=0, le=LARGEST)]
Other = Annotated[str, Query(max_length=300, pattern=r"^([^\x00-\x1f\x7f-\x9f/]{1,250}/[0-9]{1,9})?$")]
Layer = Annotated[int | None, Query(ge=-1, le=LARGEST)]


@router.get("/studies/{study}/trials/{number}")
def trial(
    study: StudyPath,
    number: Number,
    request: Request,
    key: Viewer,
    service: ServiceParameter,
    other: Other = "",
    layer: Layer = None,
) -> Response:
    from autotune.pages.trial import choices_of, trial_page  # with SciPy, which no server has to wait for

    versions, away = _versions(service)
    subjects = [_subject(service, study, number, versions)]
    if other:
        name, _, text = other.rpartition("/")
        subjects.append(_subject(service, name, int(text), versions))
    found = trial_page(subjects, _results(service, subjects[0].study).found("sights"))
    return render(
        request,
        "trial.html.jinja",
        trial=found,
        layer=found.layer if layer is None else min(layer, found.last_layer),
        choices=choices_of(study, subjects[0].told_in_study, number),
        chosen=other,
        away=away,
    )


def _results(service: Service, study: StudyRow) -> Results:
    return Results(service.database, str(study.context.get("scope", "")))


def _versions(service: Service) -> tuple[list[Version], str]:
    try:
        return within_patience(service, service.profiles.list), ""
    except AwayError as error:
        return [], f"Which versions have this plan is not known: {error}."


def _subject(service: Service, study: str, number: int, versions: Sequence[Version]) -> Subject:
    from autotune.pages.trial import Subject

    row = service.studies.get(study)
    if row is None:
        raise HTTPException(404, f"there must be a study {study!r}, but there is none; choose one of the studies")
    told, _ = service.told.of(row.name, row.created)
    mine = next((each for each in told if each.number == number), None)
    if mine is None:
        raise HTTPException(
            404,
            f"a trial must have finished before it can be looked at, but {study!r} has no finished trial {number}; "
            "choose one from its study's page",
        )
    digest, results = mine.plan.digest, _results(service, row)
    return Subject(
        study=row,
        told=mine,
        told_in_study=told,
        blocks=results.blocks(digest),
        sight=results.found(f"sight-{digest[:20]}"),
        versions=[version for version in versions if version.plan == digest],
    )
