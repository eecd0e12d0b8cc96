"""How much one may ask for: requests in a time, by key, and failed attempts, by address; and bytes in one request.

Counted in memory, by each server for itself.
"""

from __future__ import annotations

import time

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from autotune.config import AutotuneError

__all__ = ["Rate", "check_body"]

BODIES = ("POST", "PUT", "PATCH")


class Rate:
    """So many in a time, for each name. Raises AutotuneError for a text that does not say so."""

    def __init__(self, text: str) -> None:
        try:
            self._item = parse(text)
        except ValueError:
            raise AutotuneError(f"--rate must be a number in a time, got {text!r}; try 120/minute") from None
        self._counter = MovingWindowRateLimiter(MemoryStorage())

    def count(self, name: str) -> None:
        """Count one. Raises HTTPException where it is one too many."""
        if not self._counter.hit(self._item, name):
            again_s = max(1, round(self._counter.get_window_stats(self._item, name).reset_time - time.time()))
            raise HTTPException(429, f"{self._item} are allowed; wait {again_s} s", {"Retry-After": str(again_s)})


def check_body(method: str, headers: Headers, max_bytes: int) -> None:
    """Raise HTTPException for a body that is known to be too large before it is read, or is no JSON.

    One that comes in chunks is counted while it is read.
    """
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise HTTPException(413, f"a body may have {max_bytes} bytes, got {length}; send less")
    has_body = length != "0" or "transfer-encoding" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if method in BODIES and has_body and kind != "application/json":
        raise HTTPException(415, f"a body must be application/json, got {kind or 'no content type'}")
