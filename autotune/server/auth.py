"""Who may come in: nobody without a key but for a look at the health, and nobody further than the key's scopes."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from typing import Annotated
from urllib.parse import quote

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from autotune.server.limits import check_body
from autotune.server.problems import is_api, is_page, reply
from autotune.server.service import Service
from autotune.store import Key

__all__ = ["OPEN_PATH", "Canceller", "Gate", "Promoter", "Reader", "Submitter"]

OPEN_PATH = "/healthz"
OPEN_PAGES = ("/login", "/assets/")
BEARER = HTTPBearer(auto_error=False, description="A key from `autotune keys create`.")
FORM = b"a form of the dashboard"


class Gate:
    """Before anything of a request is read: its key, how often it comes, how large it says it is.

    A key comes as a bearer's; on the way to a page, a session's token may come as a cookie instead. What programs ask
    for takes no cookie: no page of another site can have a browser send what it does not hold itself.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN_PATH:
            request = Request(scope)
            try:
                if not scope["path"].startswith(OPEN_PAGES):
                    await self._enter(request)
                check_body(request, self._service.settings.max_body_bytes, is_form=not is_api(request))
            except HTTPException as error:
                await self._refused(request, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    async def _enter(self, request: Request) -> None:
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        is_bearer = scheme.lower() == "bearer"
        if not is_bearer:
            text = "" if is_api(request) else request.cookies.get(self._service.cookie, "")
        if is_page(request) and not text:
            raise HTTPException(401)
        entry = self._service.entry
        look = entry.key if is_bearer or is_api(request) else entry.session
        request.state.key = await look(text, _host(request))
        request.state.csrf = hmac.digest(text.encode(), FORM, hashlib.sha256).hex()
        self._service.rate.count(str(request.state.key.id))

    def _refused(self, request: Request, error: HTTPException) -> Response:
        if error.status_code != 401:
            return reply(request, error.status_code, error.detail, error.headers)
        if is_page(request) and request.method in ("GET", "HEAD"):
            whence = quote(request.scope["path"]) + (f"?{request.url.query}" if request.url.query else "")
            return RedirectResponse(f"/login?next={quote(whence, safe='')}", 303)
        rule = "a key must come along that is known, not revoked and not over: Authorization: Bearer KEY"
        return reply(request, 401, rule, {"WWW-Authenticate": "Bearer"})


def _host(request: Request) -> str:
    return request.client.host if request.client else ""


def _needs(*any_of: str) -> Callable[..., Key]:
    def check(request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]) -> Key:
        key: Key = request.state.key
        if not set(any_of) & set(key.scopes):
            raise HTTPException(
                403,
                f"the key's scopes must have {' or '.join(any_of)} among them, got {', '.join(key.scopes)}; "
                "ask for another key",
            )
        return key

    return check


Reader = Annotated[Key, Security(_needs("read"))]
Submitter = Annotated[Key, Security(_needs("submit"))]
Promoter = Annotated[Key, Security(_needs("promote"))]
Canceller = Annotated[Key, Security(_needs("submit", "promote"))]
