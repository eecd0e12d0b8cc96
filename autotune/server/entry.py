"""Whose key or session it is that somebody comes with; an address that comes too often with none is asked no more."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from typing import Protocol

import anyio
from starlette.exceptions import HTTPException

from autotune.server.limits import Rate, origin
from autotune.server.problems import RETRY_S
from autotune.store import Key, StoreError

__all__ = ["SESSION_S", "Entry", "Guest", "KnowsKeys"]

LOOKERS = 4  # threads that look keys up, whatever keeps the others waiting
TOKEN_BYTES = 32
SESSION_S = 12 * 3600  # from logging in on
MOST_GOOD = 10_000  # keys and sessions that are remembered to have been good


class KnowsKeys(Protocol):
    def find(self, text: str) -> Key | None:
        """Whose key this is; None for nobody's."""
        ...

    def open_session(self, key: Key, seconds: float) -> str:
        """A token that stands for the key."""
        ...

    def session(self, token: str) -> Key | None:
        """Whose session this is; None for nobody's."""
        ...

    def close_session(self, token: str) -> None:
        """Have a token stand for nothing any more."""
        ...


class Guest:
    """The one who started a dashboard alone: let in by a token that nobody has to make or to keep.

    The token is the only session too, and stands for as long as the process lasts.
    """

    def __init__(self, name: str) -> None:
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        now, scopes = time.time(), ("read", "promote")
        self._key = Key(id=0, name=name, prefix="", scopes=scopes, created=now, expires=None, revoked=None)

    def find(self, text: str) -> Key | None:
        return self._key if hmac.compare_digest(text.encode(), self.token.encode()) else None

    def open_session(self, key: Key, seconds: float) -> str:
        return self.token

    def session(self, token: str) -> Key | None:
        return self.find(token)

    def close_session(self, token: str) -> None:
        """The browser forgets it, and may be let in by it again."""


class Entry:
    """Looks keys and sessions up.

    An address that has failed too often is turned away before the database is asked, but for keys that were good here
    before: those who hold them may have the same address, as behind a proxy.
    """

    def __init__(self, keys: KnowsKeys, failed: Rate) -> None:
        self._keys, self._failed = keys, failed
        self._good: set[bytes] = set()
        self._lookers = anyio.CapacityLimiter(LOOKERS)

    async def key(self, text: str, host: str) -> Key:
        """Raises HTTPException: 401 for a key that opens nothing, 429 for an address, 503 where nobody can tell."""
        return await self._known(self._keys.find, text, host)

    async def session(self, token: str, host: str) -> Key:
        """Whose session it is. Raises HTTPException as `key` does."""
        return await self._known(self._keys.session, token, host)

    async def open(self, key: Key) -> str:
        """A session's token, for `SESSION_S`. Raises StoreError."""
        token = await anyio.to_thread.run_sync(self._keys.open_session, key, SESSION_S, limiter=self._lookers)
        self._remember(_digest(token))
        return token

    async def close(self, token: str) -> None:
        """Raises StoreError."""
        self._good.discard(_digest(token))
        await anyio.to_thread.run_sync(self._keys.close_session, token, limiter=self._lookers)

    async def _known(self, look: Callable[[str], Key | None], text: str, host: str) -> Key:
        digest, whence = _digest(text), origin(host)
        if digest not in self._good:
            self._failed.check(whence)
        try:
            key = await anyio.to_thread.run_sync(look, text, limiter=self._lookers)
        except StoreError as error:
            again = {"Retry-After": str(RETRY_S)}
            raise HTTPException(503, "the database could not be asked; try again", again) from error
        if key is None:
            self._good.discard(digest)
            self._failed.count(whence)
            raise HTTPException(401, "a key must be known, not revoked and not over; ask for another")
        self._remember(digest)
        return key

    def _remember(self, digest: bytes) -> None:
        if len(self._good) >= MOST_GOOD:
            self._good.clear()
        self._good.add(digest)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
