"""Jobs over HTTP: handed in, looked at, followed, cancelled."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated

import anyio
from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from autotune.server.auth import Canceller, Reader, Submitter
from autotune.server.problems import declared
from autotune.server.schemas import JobId, JobPage, JobView
from autotune.server.service import ServiceParameter
from autotune.store import StoreError, Submission
from autotune.submitted import JobSettings

__all__ = ["router"]

POLL_S = 0.5
STREAM_S = 600.0  # then whoever follows comes again, with a key that must still be good
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

IdempotencyKey = Annotated[
    str | None,
    Header(
        pattern="^[!-~]{1,255}$",
        description="Any text of the sender's: sent again with the same settings, it is the same job.",
    ),
]
After = Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="The last job of the page before.")]


@router.post(
    "",
    status_code=202,
    operation_id="submitJob",
    responses={
        202: {"headers": {"Location": {"description": "Where the job is.", "schema": {"type": "string"}}}},
        **declared(400, 409, 413, 415, 422),
    },
)
def submit(
    settings: JobSettings,
    key: Submitter,
    service: ServiceParameter,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> JobView:
    """Put a tuning job into the queue."""
    service.settings.place.roots.check(settings)
    job = service.submissions.submit(settings.model_dump(mode="json"), key.id, idempotency_key)
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return JobView.model_validate(job)


@router.get("", operation_id="listJobs", responses=declared(404, 422))
def page(
    key: Reader,
    service: ServiceParameter,
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    after: After = None,
) -> JobPage:
    """List jobs, newest first."""
    jobs = service.submissions.page(limit + 1, after)
    views = [JobView.model_validate(job) for job in jobs[:limit]]
    return JobPage(jobs=views, next=views[-1].id if len(jobs) > limit else None)


@router.get("/{job}", operation_id="getJob", responses=declared(404, 422))
def get(job: JobId, key: Reader, service: ServiceParameter) -> JobView:
    """Look at a job."""
    return JobView.model_validate(service.submissions.get(job))


@router.post("/{job}/cancel", status_code=202, operation_id="cancelJob", responses=declared(404, 413, 415, 422))
def cancel(job: JobId, key: Canceller, service: ServiceParameter) -> JobView:
    """Have a job end, if it has not: at once where it waits, soon where it runs. Another key's job takes `promote`."""
    by = service.submissions.get(job).by
    if by != key.name and "promote" not in key.scopes:
        raise HTTPException(
            403, f"a job must be of the key that cancels it, or that key have promote among its scopes; it is {by}'s"
        )
    return JobView.model_validate(service.submissions.cancel(job))


def _found(job: JobId, key: Reader, service: ServiceParameter) -> Submission:
    return service.submissions.get(job)


async def _counted(key: Reader, service: ServiceParameter) -> AsyncIterator[None]:
    """As one of the key's open streams, until the answer has ended."""
    with service.streams.opened(key.name):
        yield


@router.get(
    "/{job}/events",
    operation_id="followJob",
    response_class=EventSourceResponse,
    dependencies=[Depends(_counted)],
    responses={
        200: {"description": "Server-sent events `state` and `progress`, with JSON as data, until the job has ended."},
        **declared(404, 422),
    },
)
async def follow(
    job: Annotated[Submission, Depends(_found)],
    service: ServiceParameter,
    last_event_id: Annotated[int, Header(ge=0, lt=2**63, description="Of the last event that was seen.")] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Follow a job: what has happened since the last event that was seen, and what happens."""
    last, until = last_event_id, time.monotonic() + STREAM_S
    while not service.stopping.is_set() and time.monotonic() < until:
        try:
            is_over, events = await run_in_threadpool(service.submissions.news, job.id, last)
        except StoreError:  # whoever follows comes again
            return
        for event in events:
            yield ServerSentEvent(event=event.kind, id=str(event.id), data={**event.data, "at": event.at})
            last = event.id
        if is_over:
            return
        await anyio.sleep(POLL_S)
