"""Optuna's own dashboard, at the paths that it insists on: behind the same gate, and to look at only."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from fastapi import APIRouter
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autotune.server.auth import Reader
from autotune.server.service import ServiceParameter
from autotune.store import Database
from autotune.store.progress import has_optuna

__all__ = ["is_installed", "is_there", "router"]

router = APIRouter(include_in_schema=False)
PATHS = ("/dashboard{rest:path}", "/api/{rest:path}", "/static/{rest:path}", "/csv/{rest:path}", "/favicon.ico")
WORKERS = 4  # threads that answer
POLICY = "; ".join(
    (
        "default-src 'self'",
        "script-src 'self' 'unsafe-eval'",  # of its picture of parallel coordinates
        "style-src 'self' 'unsafe-inline'",  # of its index and of Plotly
        "img-src 'self' data: blob:",
        "object-src 'none'",
        "form-action 'self'",
        "frame-ancestors 'none'",
        "base-uri 'none'",
    )
)


class _Passed(Response):
    """Answers as another app does, under the policy here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        super().__init__()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def under_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        await self._app(scope, receive, under_policy)


@functools.cache
def is_installed() -> bool:
    return all(importlib.util.find_spec(name) for name in ("a2wsgi", "optuna_dashboard"))


def is_there(database: Database) -> bool:
    return is_installed() and has_optuna(database)


def optuna(key: Reader, service: ServiceParameter) -> Response:
    if not is_there(service.database):
        raise HTTPException(404, "Optuna's dashboard must be installed, and a study begun, before it can be looked at")
    return _Passed(_made(service.database))


for path in PATHS:
    router.add_api_route(path, optuna, methods=["GET", "HEAD"])


@functools.lru_cache(maxsize=4)
def _made(database: Database) -> Any:
    """Made when it is first asked for, which takes seconds, by the thread that asks."""
    from a2wsgi import WSGIMiddleware
    from optuna_dashboard import wsgi

    from autotune.importance import reading_storage

    return WSGIMiddleware(wsgi(reading_storage(database)), workers=WORKERS)
