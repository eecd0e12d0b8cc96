"""The registry, asked for no longer than somebody waits for a page: one that does not answer is said to be away."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.pool import ThreadPool
from typing import TypeVar
from weakref import WeakKeyDictionary

from autotune.redaction import without_passwords
from autotune.registered import GateError, NotRegisteredError, RegistryError
from autotune.server.service import Service

__all__ = ["AwayError", "wait_for", "within_patience"]

logger = logging.getLogger(__name__)

PATIENCE_S = 8.0  # MLflow's import, which the first to ask waits for, takes a third of it
REST_S = 10.0  # in which a registry that was away is taken to be so still
ASKERS = 4  # at a time; whoever comes while all are kept waiting waits no longer for it
Answer = TypeVar("Answer")
_away_since: WeakKeyDictionary[Service, float] = WeakKeyDictionary()


class AwayError(RegistryError):
    """The registry could not be asked, which its text tells anybody."""


def within_patience(service: Service, ask: Callable[[], Answer], seconds: float = PATIENCE_S) -> Answer:
    """As `wait_for`, for a page that can do without; where the registry was away a moment ago, it is not asked."""
    if time.monotonic() < _away_since.get(service, -REST_S) + REST_S:
        raise AwayError("the registry was away a moment ago; load the page again in a while")
    return wait_for(service, ask, seconds)


def wait_for(service: Service, ask: Callable[[], Answer], seconds: float = PATIENCE_S) -> Answer:
    """What the registry answers. Raises AwayError where it fails or takes longer, NotRegisteredError and GateError.

    Its threads end with the process, however long the registry keeps them.
    """
    try:
        found = _askers().apply_async(ask).get(seconds)
    except multiprocessing.TimeoutError:
        _away_since[service] = time.monotonic()
        raise AwayError(f"the registry has not answered within {seconds:g} s; load the page again") from None
    except (NotRegisteredError, GateError):
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
