"""How much one may ask for: requests in a time and open streams, by key, and failed attempts, by address; and bytes in
one request.

Counted in memory, by each server for itself.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.exceptions import HTTPException
from starlette.requests import Request

from autotune.config import AutotuneError

__all__ = ["Rate", "Streams", "check_body", "origin"]

BODIES = ("POST", "PUT", "PATCH")
FORM, JSON = "application/x-www-form-urlencoded", "application/json"
NETWORK_BITS = 64  # of an IPv6 address: what one customer has for their own
MAX_ORIGINS = 2**16  # that are told apart: whoever has many addresses fills no memory
STREAM_RETRY_S = 10  # until one of the streams may have ended


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
            self._refuse(name)

    def check(self, name: str) -> None:
        """Raise HTTPException where one more would be one too many."""
        if not self._counter.test(self._item, name):
            self._refuse(name)

    def _refuse(self, name: str) -> NoReturn:
        again_s = max(1, round(self._counter.get_window_stats(self._item, name).reset_time - time.time()))
        raise HTTPException(429, f"{self._item} are allowed; wait {again_s} s", {"Retry-After": str(again_s)})


class Streams:
    """So many open at a time, for each name."""

    def __init__(self, most: int) -> None:
        self._most, self._open = most, Counter[str]()

    @contextmanager
    def opened(self, name: str) -> Iterator[None]:
        """Have one open. Raises HTTPException where it is one too many."""
        if self._open[name] >= self._most:
            raise HTTPException(
                429,
                f"{self._most} streams at a time are allowed; close one, or wait for one to end",
                {"Retry-After": str(STREAM_RETRY_S)},
            )
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1


def origin(host: str) -> str:
    """Whom failed attempts from an address count for: all who might be the same, and a few who are not."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:  # no address, as where a server listens on a socket
        return host
    if isinstance(address, ipaddress.IPv6Address):
        address = address.ipv4_mapped or ipaddress.ip_network((address, NETWORK_BITS), strict=False).network_address
    return str(hash(address) % MAX_ORIGINS)


def check_body(request: Request, max_bytes: int, *, is_form: bool) -> None:
    """Raise HTTPException for a body that is known to be too large before it is read, or is no JSON, or else no form.

    One that comes in chunks is counted while it is read.
    """
    headers = request.headers
    length = headers.get("content-length", "0")
    if length.isdigit() and int(length) > max_bytes:
        raise HTTPException(413, f"a body may have {max_bytes} bytes, got {length}; send less")
    has_body = length != "0" or "transfer-encoding" in headers
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    wanted = FORM if is_form else JSON
    if request.method in BODIES and has_body and kind != wanted:
        raise HTTPException(415, f"a body must be {wanted}, got {kind or 'no content type'}")
