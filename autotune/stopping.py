"""How a process is asked to stop, and how it says that it did."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["StoppedError", "stopping"]


class StoppedError(Exception):
    """The search was asked to stop, and has handed back what it was at."""


@contextmanager
def stopping(*, with_parent: bool = False) -> Iterator[Callable[[], bool]]:
    """Whether SIGINT or SIGTERM has come. A second one, of either, ends the process at once.

    with_parent: also when standard input ends, which it does with the process that holds its other end, however that
    ends.
    """
    came = threading.Event()
    numbers = (signal.SIGINT, signal.SIGTERM)

    def note(*_: Any) -> None:
        came.set()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        came.set()

    before = {number: signal.signal(number, note) for number in numbers}
    if with_parent:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
