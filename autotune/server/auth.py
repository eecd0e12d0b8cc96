"""Who may come in: nobody without a key but for a look at the health, and nobody further than the key's scopes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Annotated

import anyio
from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from autotune.server.limits import check_body, origin
from autotune.server.problems import RETRY_S, answer
from autotune.server.service import Service
from autotune.store import Key, StoreError

__all__ = ["OPEN_PATH", "Canceller", "Gate", "Promoter", "Reader", "Submitter"]

OPEN_PATH = "/healthz"
LOOKERS = 4  # threads that look keys up, whatever keeps the others waiting
BEARER = HTTPBearer(auto_error=False, description="A key from `autotune keys create`.")


class Gate:
    """Before anything of a request is read: its key, how often it comes, how large it says it is.

    An address that has come too often without a good key is turned away before the database is asked, but for keys
    that were good here before: those who hold them may have the same address, as behind a proxy.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service
        self._good: set[bytes] = set()
        self._lookers = anyio.CapacityLimiter(LOOKERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != OPEN_PATH:
            request = Request(scope)
            try:
                key = await self._key(request)
                self._service.rate.count(str(key.id))
                check_body(request.method, request.headers, self._service.settings.max_body_bytes)
            except HTTPException as error:
                await answer(error.status_code, str(error.detail), error.headers)(scope, receive, send)
                return
            request.state.key = key
        await self._app(scope, receive, send)

    async def _key(self, request: Request) -> Key:
        scheme, _, text = request.headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(text.encode()).digest()
        whence = origin(request.client.host if request.client else "")
        if digest not in self._good:
            self._service.failed.check(whence)
        try:
            key = await self._found(text) if scheme.lower() == "bearer" else None
        except StoreError as error:
            again = {"Retry-After": str(RETRY_S)}
            raise HTTPException(503, "the database could not be asked; try again", again) from error
        if key is None:
            self._good.discard(digest)
            self._service.failed.count(whence)
            rule = "a key must come along that is known, not revoked and not over: Authorization: Bearer KEY"
            raise HTTPException(401, rule, {"WWW-Authenticate": "Bearer"})
        self._good.add(digest)
        return key

    async def _found(self, text: str) -> Key | None:
        return await anyio.to_thread.run_sync(self._service.keys.find, text, limiter=self._lookers)


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
