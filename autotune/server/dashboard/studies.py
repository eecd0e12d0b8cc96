"""Studies: which there are, and how one goes, live."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import anyio
from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import Response

from autotune import pages
from autotune.config import AutotuneError
from autotune.pages import words
from autotune.pages.figures import percent
from autotune.pages.profile import version_line
from autotune.pages.studies import Listing, entry
from autotune.server.dashboard import optuna_ui
from autotune.server.dashboard.asking import AwayError, within_patience
from autotune.server.dashboard.sessions import Viewer, render
from autotune.server.jobs import POLL_S, STREAM_S
from autotune.server.schemas import LARGEST, StudyPath
from autotune.server.service import Service, ServiceParameter
from autotune.store import Database, StoreError
from autotune.store.progress import Notes, Overview, Progress, Standing

if TYPE_CHECKING:
    from autotune.importance import Importance
    from autotune.objective import Told
    from autotune.pages.study import Live

__all__ = ["router"]

router = APIRouter(include_in_schema=False)
PAGE = 50
QUIET_S = 3.0  # then what is held is told again: leases run out meanwhile
KEPT = 64  # importances

After = Annotated[int, Query(ge=0, lt=2**63)]


@router.get("/studies")
def studies(
    request: Request,
    key: Viewer,
    service: ServiceParameter,
    q: Annotated[str, Query(max_length=250, pattern=r"^[^\x00]*$")] = "",
    page: Annotated[int, Query(ge=1, le=LARGEST // PAGE)] = 1,
) -> Response:
    found, num_studies = Overview(service.database).page(q.strip(), PAGE * (page - 1), PAGE)
    best = service.told.best(found)
    listing = Listing(
        entries=tuple(entry(each, best[each.name]) for each in found),
        text=q.strip(),
        number=page,
        num_pages=-(-num_studies // PAGE),
        num_studies=num_studies,
    )
    return render(request, "studies.html.jinja", listing=listing, percent=percent)


@router.get("/studies/{study}")
def study(study: StudyPath, request: Request, key: Viewer, service: ServiceParameter) -> Response:
    from autotune.objective import steering
    from autotune.pages.study import dense_facts, settings
    from autotune.pages.study_trials import picture, trials

    row, notes = service.studies.get(study), Progress(service.database, study).notes()
    live, told, place = _live(service, study)
    context = {} if row is None else row.context
    return render(
        request,
        "study.html.jinja",
        **_shown(live),
        name=study,
        place=place,
        trials=trials(told, _front(told)),
        steering=steering(told),
        picture=picture(told),
        settings=settings(live.standing.settings, context.get("fits", {})),
        dense=dense_facts(context.get("dense", {})),
        notes=_rests(notes),
        optuna_link=f"/dashboard/studies/{notes.optuna_id}" if notes and optuna_ui.is_there(service.database) else "",
        mlflow_link=_mlflow(context, live.standing),
    )


def _found(study: StudyPath, service: ServiceParameter) -> Standing:
    found = Overview(service.database).get(study)
    if found is None:
        raise HTTPException(404, f"there must be a study {study!r}, but there is none; choose one of the studies")
    return found


async def _counted(key: Viewer, service: ServiceParameter) -> AsyncIterator[None]:
    """As one of the key's open streams, until the answer has ended."""
    with service.streams.opened(key.name):
        yield


@router.get("/studies/{study}/events", response_class=EventSourceResponse, dependencies=[Depends(_counted)])
async def events(
    standing: Annotated[Standing, Depends(_found)],
    service: ServiceParameter,
    after: After = 0,
    last_event_id: Annotated[int, Header(ge=0, lt=2**63)] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """What has changed since a place in the order of telling, and what changes; until it is finished."""
    last, mark, until = max(after, last_event_id), None, time.monotonic() + STREAM_S
    progress, said = Progress(service.database, standing.name), 0.0
    while not service.stopping.is_set() and time.monotonic() < until:
        try:
            seen = await run_in_threadpool(progress.mark)
            if seen != mark or time.monotonic() - said > QUIET_S:
                news, last = await run_in_threadpool(_news, service, standing.name, last)
                yield ServerSentEvent(event="progress", id=str(last), data=news)
                mark, said = seen, time.monotonic()
                if news["over"]:
                    return
        except (StoreError, HTTPException):  # whoever follows comes again
            return
        await anyio.sleep(POLL_S)


@router.get("/studies/{study}/importance")
def importance(
    standing: Annotated[Standing, Depends(_found)], request: Request, key: Viewer, service: ServiceParameter
) -> Response:
    found: Importance | None = None
    try:
        found, why = _importance(service.database, standing.name, standing.created, standing.num_told), ""
    except ModuleNotFoundError:
        why = "Optuna is not installed where this server runs: pip install 'btp-autotune[tune]'."
    except StoreError:
        raise
    except AutotuneError as error:
        why = f"Not yet: {error}."
    return render(request, "study_importance.html.jinja", importance=found, why=why)


@router.get("/studies/{study}/versions")
def versions(
    standing: Annotated[Standing, Depends(_found)], request: Request, key: Viewer, service: ServiceParameter
) -> Response:
    address, away = service.settings.place.registry, ""
    found = []
    try:
        found = [each for each in within_patience(service, service.profiles.list) if each.study == standing.name]
        address = service.profiles.registry.address
    except AwayError as error:
        away = f"Which versions are of this study is not known: {error}."
    lines = [version_line(version, address) for version in found]
    return render(request, "study_versions.html.jinja", versions=lines, away=away)


@functools.lru_cache(maxsize=KEPT)
def _importance(database: Database, study: str, created: float, num_told: int) -> Importance:
    """Worked out once for as many trials as there are."""
    from autotune.importance import importance

    return importance(database, study)


def _live(service: Service, name: str) -> tuple[Live, tuple[Told, ...], int]:
    from autotune.pages.study import live

    standing = _found(name, service)
    told, place = service.told.of(name, standing.created)
    attempts = Progress(service.database, name).attempts()
    return live(standing, told, _front(told), attempts), tuple(told), place


def _front(told: Any) -> list[Told]:
    from autotune.objective import front

    return front(told)


def _news(service: Service, name: str, last: int) -> tuple[dict[str, Any], int]:
    """For who has seen what was told up to `last`; and up to where they have now."""
    from autotune.pages.study_trials import trials

    live, _, _ = _live(service, name)
    told, place = service.told.of(name, live.standing.created, last)
    templates = pages.environment()
    return {
        "live": templates.get_template("study_live.html.jinja").render(**_shown(live)),
        "rows": templates.get_template("study_rows.html.jinja").render(name=name, trials=trials(told, ())),
        "front": live.front,
        "over": live.standing.state == "finished",
    }, place


def _shown(live: Live) -> dict[str, Any]:
    return {"live": live, "words": words, "percent": percent}


def _rests(found: Notes | None) -> dict[str, Any]:
    notes = {} if found is None else found.notes
    latency = notes.get("latency", {})
    return {
        **{name: notes.get(name) for name in ("calibrated_layers", "withdrawal_layer", "limit")},
        "error": latency.get("error"),
    }


def _mlflow(context: Any, standing: Standing) -> str:
    registry, name = str(context.get("registry", "")), standing.settings.get("name")
    if not registry.startswith(("http://", "https://")) or not name:
        return ""
    return f"{registry}/#/models/{quote(str(name), safe='')}"
