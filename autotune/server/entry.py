"""Whose key it is that somebody comes with; an address that comes too often with none is asked no more."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import Protocol

import anyio
from starlette.exceptions import HTTPException

from autotune.server.limits import Rate, origin
from autotune.server.problems import RETRY_S
from autotune.store import Key, StoreError

__all__ = ["Entry", "Guest", "KnowsKeys"]

LOOKERS = 4  # threads that look keys up, whatever keeps the others waiting
TOKEN_BYTES = 32


class KnowsKeys(Protocol):
    def find(self, text: str) -> Key | None:
        """Whose key this is; None for nobody's."""
        ...


class Guest:
    """The one who started a dashboard alone: let in by a token that nobody has to make or to keep."""

    def __init__(self, name: str) -> None:
        self.token = secrets.token_urlsafe(TOKEN_BYTES)
        now, scopes = time.time(), ("read", "promote")
        self._key = Key(id=0, name=name, prefix="", scopes=scopes, created=now, expires=None, revoked=None)

    def find(self, text: str) -> Key | None:
        return self._key if hmac.compare_digest(text.encode(), self.token.encode()) else None


class Entry:
    """Looks keys up.

    An address that has failed too often is turned away before the database is asked, but for keys that were good here
    before: those who hold them may have the same address, as behind a proxy.
    """

    def __init__(self, keys: KnowsKeys, failed: Rate) -> None:
        self._keys, self._failed = keys, failed
        self._good: set[bytes] = set()
        self._lookers = anyio.CapacityLimiter(LOOKERS)

    async def key(self, text: str, host: str) -> Key:
        """Raises HTTPException: 401 for a key that opens nothing, 429 for an address, 503 where nobody can tell."""
        digest, whence = hashlib.sha256(text.encode()).digest(), origin(host)
        if digest not in self._good:
            self._failed.check(whence)
        try:
            key = await anyio.to_thread.run_sync(self._keys.find, text, limiter=self._lookers)
        except StoreError as error:
            again = {"Retry-After": str(RETRY_S)}
            raise HTTPException(503, "the database could not be asked; try again", again) from error
        if key is None:
            self._good.discard(digest)
            self._failed.count(whence)
            raise HTTPException(401, "a key must be known, not revoked and not over; ask for another")
        self._good.add(digest)
        return key
