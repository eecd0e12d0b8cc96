"""Errors as problem details (RFC 9457): what each kind of error is over HTTP, and how it is declared in the OpenAPI.

Where somebody looks at pages, an error is a page.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import iter_route_contexts
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from autotune.config import AutotuneError
from autotune.redaction import redacted, without_passwords
from autotune.registered import GateError, NotRegisteredError, RegistryError
from autotune.store import ConflictError, NoSubmissionError, StoreError
from btp.errors import ProfileError

__all__ = [
    "HEADERS",
    "MEDIA_TYPE",
    "RETRY_S",
    "Problem",
    "declared",
    "handle_errors",
    "is_api",
    "is_page",
    "reply",
    "title",
]

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
RETRY_S = 5  # until what is away is asked for again
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer"}
API = ("v1", "metrics", "openapi.json", "healthz")
PAGES = ("", "compare.csv", "dashboard", "login", "logout", "profiles", "studies")
STATUSES: Mapping[type[Exception], int] = {
    AutotuneError: 422,
    ConflictError: 409,
    GateError: 409,
    NoSubmissionError: 404,
    NotRegisteredError: 404,
    ProfileError: 503,
    RegistryError: 503,
    StoreError: 503,
}


class FieldProblem(BaseModel):
    """One thing that is wrong with a request. pointer: where, such as /body/limit."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """Why a request was not answered. type: title and status say all there is to the kind of problem."""

    type: str = "about:blank"
    title: str
    status: int = Field(ge=400, le=599)
    detail: str
    errors: list[FieldProblem] | None = Field(None, description="All that is wrong with the request, where it is that.")


def declared(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that are problems, beside those that all have: 401, 403, 429, 500 and 503."""
    schema = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    everywhere = (401, 403, 429, 500, 503)
    return {status: {"description": title(status), "content": schema} for status in sorted({*everywhere, *statuses})}


def is_api(request: Request) -> bool:
    """Whether it is for programs, by its path."""
    return _first_word(request) in API


def is_page(request: Request) -> bool:
    """Whether it comes from somebody who looks at pages: by its path, or where that says nothing, by what is wanted."""
    if is_api(request):
        return False
    return _first_word(request) in PAGES or "text/html" in request.headers.get("accept", "")


def _first_word(request: Request) -> str:
    return str(request.scope["path"]).lstrip("/").partition("/")[0]


def reply(
    request: Request,
    status: int,
    detail: str,
    headers: Mapping[str, str] | None = None,
    errors: list[FieldProblem] | None = None,
) -> Response:
    """What is said of an error: a page where pages are looked at, a problem elsewhere."""
    if is_page(request):
        page: Response = request.app.state.error_page(request, status, detail, {**HEADERS, **(headers or {})})
        return page
    problem = Problem(title=title(status), status=status, detail=detail, errors=errors)
    body = problem.model_dump_json(exclude_none=True)
    return Response(body, status, {**HEADERS, **(headers or {})}, MEDIA_TYPE)


def handle_errors(app: FastAPI) -> None:
    """Have every error of the app be a problem."""
    app.exception_handler(HTTPException)(_http)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(Exception)(_unexpected)
    for kind, status in STATUSES.items():
        app.exception_handler(kind)(_known(status))


def title(status: int) -> str:
    return HTTPStatus(status).phrase


async def _http(request: Request, error: HTTPException) -> Response:
    if error.status_code != HTTPStatus.METHOD_NOT_ALLOWED:
        return reply(request, error.status_code, str(error.detail), error.headers)
    path = request.scope["route"].path  # the first route there may not be the only one
    routes = [route for route in iter_route_contexts(request.app.routes) if route.path == path]
    allowed = ", ".join(sorted({method for route in routes for method in route.methods or ()}))
    return reply(request, 405, f"the method must be one of {allowed}, got {request.method}", {"Allow": allowed})


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    """What was sent is not sent back: it may be anything."""
    errors = [FieldProblem(pointer=_pointer(each["loc"]), detail=str(each["msg"])) for each in error.errors()]
    detail = "; ".join(f"{each.pointer}: {each.detail}" for each in errors)
    return reply(request, 422, f"the request must be as the OpenAPI says, but {detail}", errors=errors)


def _pointer(place: tuple[int | str, ...]) -> str:
    """As a JSON pointer; a name may hold half a letter, which no answer can."""
    words = (str(word).replace("~", "~0").replace("/", "~1") for word in place)
    return "".join(f"/{word}" for word in words).encode(errors="replace").decode()


def _known(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def handle(request: Request, error: Exception) -> Response:
        if status != HTTPStatus.SERVICE_UNAVAILABLE:
            return reply(request, status, redacted(str(error)) if isinstance(error, RegistryError) else str(error))
        logger.error("%s %s: %s", request.method, request.url.path, without_passwords(str(error)))
        what = "database" if isinstance(error, StoreError) else "registry"
        return reply(request, status, f"the {what} could not be asked; try again", {"Retry-After": str(RETRY_S)})

    return handle


async def _unexpected(request: Request, error: Exception) -> Response:
    number = uuid.uuid4().hex
    logger.error("error %s: %s %s", number, request.method, request.url.path, exc_info=error)
    detail = f"something went wrong that is not yours to mend; whoever runs this finds it as error {number}"
    return reply(request, 500, detail)
