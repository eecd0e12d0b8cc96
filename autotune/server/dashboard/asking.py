"""The registry, asked for no longer than somebody waits for a page: one that does not answer is said to be away.

What moves an alias has threads of its own: nobody who only looks keeps it waiting.
"""

from __future__ import annotations

import functools
import logging
import multiprocessing
import threading
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import TypeVar
from weakref import WeakKeyDictionary

from autotune.redaction import without_passwords
from autotune.registered import GateError, NotRegisteredError, RegistryError
from autotune.server.service import AwayError, Service

__all__ = ["AwayError", "LateError", "see_through", "within_patience"]

logger = logging.getLogger(__name__)

PATIENCE_S = 8.0  # MLflow's import, which the first to ask waits for, takes a third of it
REST_S = 10.0  # in which a registry that was away is taken to be so still
MOVE_S = 60.0  # half of it may pass until another's promotion is over
ASKERS = 4  # at a time; whoever comes while all are kept waiting waits no longer for it
MOVERS = 4  # of aliases
Answer = TypeVar("Answer")
_away_since: WeakKeyDictionary[Service, float] = WeakKeyDictionary()


class LateError(AwayError):
    """The registry was asked, and has not answered in time; nobody stops what was begun."""


def within_patience(service: Service, ask: Callable[[], Answer], seconds: float = PATIENCE_S) -> Answer:
    """What the registry answers, for a page that can do without; one that was away a moment ago is not asked.

    Raises AwayError where it fails or takes longer, NotRegisteredError and GateError. Threads end with the process,
    however long the registry keeps them.
    """
    if time.monotonic() < _away_since.get(service, -REST_S) + REST_S:
        raise AwayError("the registry was away a moment ago; load the page again in a while")
    return _waited(service, _askers(), ask, seconds)


def see_through(service: Service, move: Callable[[], Answer], seconds: float = MOVE_S) -> Answer:
    """What moves an alias, seen to its end. Raises LateError where it is not over by then, and as `within_patience`.

    What could not be begun by then is never done.
    """
    turn = threading.Lock()  # taken by who begins, or by who gives up before

    def begin() -> Answer:
        if not turn.acquire(blocking=False):
            raise AwayError("nobody waits for it any more")
        return move()

    try:
        return _waited(service, _movers(), begin, seconds)
    except LateError:
        if not turn.acquire(blocking=False):
            raise LateError(f"it is not over after {seconds:g} s; it may still happen; look at the log") from None
        raise AwayError(f"others were at it for {seconds:g} s, and it was not begun; try again") from None


def _waited(service: Service, threads: ThreadPool, ask: Callable[[], Answer], seconds: float) -> Answer:
    try:
        found = threads.apply_async(ask).get(seconds)
    except multiprocessing.TimeoutError:
        _away_since[service] = time.monotonic()
        raise LateError(f"the registry has not answered within {seconds:g} s; load the page again") from None
    except (NotRegisteredError, GateError, AwayError):
        raise
    except RegistryError as error:
        _away_since[service] = time.monotonic()
        logger.warning("the registry could not be asked: %s", without_passwords(str(error)))
        raise AwayError("the registry could not be asked; load the page again") from error
    _away_since.pop(service, None)
    return found


@functools.cache
def _askers() -> ThreadPool:
    return ThreadPool(ASKERS)


@functools.cache
def _movers() -> ThreadPool:
    return ThreadPool(MOVERS)
