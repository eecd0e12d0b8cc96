"""The process that runs a job: what it says, what became of it, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from autotune.redaction import redacted

__all__ = ["SILENCE_S", "JobProcess"]

SIGN_S = 1.0  # between two signs that whoever started it lives
SILENCE_S = 25.0  # without one, and it ends; with the time that it has for that, less than a claim lasts
STOP_S = 20.0  # for one that was asked to end
LISTEN_S = 5.0  # to the end of what it said, which a process that it left behind may keep open
LAST_WORDS = 20  # lines of its error output that are kept


class JobProcess:
    """A process that runs a job, with all that it starts, and what it has said that is of use elsewhere.

    It leads a group of its own. Its standard input has a sign from time to time that this process lives, and closes
    with it, however that ends.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.progress: deque[dict[str, Any]] = deque(maxlen=1)  # what it said last, until it is taken
        self.outcome: dict[str, Any] | None = None
        self._driven: str | None = None
        self._said: deque[str] = deque(maxlen=LAST_WORDS)
        self._is_ended = threading.Event()
        pipes = self._process.stdin, self._process.stdout, self._process.stderr
        each = zip((self._show_life, self._read, self._listen), pipes, strict=True)
        self._threads = [threading.Thread(target=act, args=(pipe,), daemon=True) for act, pipe in each]
        for thread in self._threads:
            thread.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        return self._process.poll()

    @property
    def study_of_another(self) -> str | None:
        """The study that it was refused, because another process drives it: a job with almost the same settings."""
        return self._driven if self.status == 2 else None

    @property
    def reason(self) -> str:
        """Why it failed: the last that it said."""
        said = [line for line in self._said if line]
        words = redacted(said[-1].removeprefix("error: ")) if said else "it said nothing"
        return words if self.status == 2 else f"its process ended with status {self.status}: {words}"

    def kill(self) -> None:
        """End it at once, with all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def end(self) -> None:
        """Ask it to end where it has not; have it end where it does not, with all that it started."""
        if self.is_alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_S)
        self.kill()
        self._is_ended.set()
        for thread in self._threads:
            thread.join(timeout=LISTEN_S)

    def _show_life(self, pipe: IO[bytes]) -> None:
        with suppress(OSError), pipe:
            while not self._is_ended.wait(SIGN_S):
                os.write(pipe.fileno(), b"\n")

    def _read(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                said = _event(line)
                match said.pop("event", None):
                    case "progress":
                        self.progress.append(said)
                    case "outcome":
                        said.pop("paths", None)  # of use on this host alone
                        self.outcome = said
                    case "driven":
                        self._driven = str(said.get("study"))

    def _listen(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                self._said.append(line.decode(errors="replace").strip())


def _event(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; empty for anything else. What is no number in JSON is null."""
    try:
        said = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return {}
    return redacted(said) if isinstance(said, dict) else {}
