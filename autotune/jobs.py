"""The worker of the service: takes jobs from the queue, one at a time, and sees each through in a process of its own.

What a job finds lies in its folder and in the database, so whoever claims it after a worker has died runs the same
command, and that resumes.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from pydantic import ValidationError

from autotune.config import STORAGE, AutotuneError
from autotune.store import Database, LeaseLostError, Leases, Studies, Submission, Submissions, this_worker
from autotune.submitted import JobSettings, Place

__all__ = ["COMMAND", "work"]

COMMAND = (sys.executable, "-m", "autotune.cli")
IDLE_S = 0.5  # between two looks at an empty queue
POLL_S = 0.1
PROGRESS_S = 0.5  # between two notes of how far a job is
BEATS = 30  # signs of life in the time that a claim lasts
STOP_S = 20.0  # for a process that was asked to end
LISTEN_S = 5.0  # to the end of what it said, which a process that it left behind may keep open
LAST_WORDS = 20  # lines of its error output that are kept of a process
DRIVEN = re.compile(r"one process at a time may drive a study, but \S+ drives (\S+);")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def work(
    database: Database,
    place: Place,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    *,
    command: Sequence[str] = COMMAND,
    once: bool = False,
    **terms: Any,
) -> int:
    """Run jobs until `stop` says so, and hand back the one it is at; how many were seen through.

    command: what runs a job, given its arguments. once: end as soon as nothing waits. terms: of `Submissions`.
    """
    submissions, worker, num_done = Submissions(database, **terms), this_worker(), 0
    while not stop():
        mine = submissions.claim(worker)
        if mine is None:
            if once:
                break
            time.sleep(IDLE_S)
            continue
        say(f"job {mine.id}, attempt {mine.attempt}")
        try:
            state = _Attempt(database, submissions, mine, stop).run(place, command)
        except LeaseLostError:
            state = "lost to another worker"
        num_done += state != "queued"
        say(f"job {mine.id}: {state}")
    return num_done


class _Attempt:
    """One job, as long as this worker has it."""

    def __init__(
        self, database: Database, submissions: Submissions, mine: Submission, stop: Callable[[], bool]
    ) -> None:
        self._database, self._submissions, self._mine, self._stop = database, submissions, mine, stop
        self._is_cancelled, self._next_beat, self._next_note = False, 0.0, 0.0

    def run(self, place: Place, command: Sequence[str]) -> str:
        """The state that the job is in then. Raises LeaseLostError."""
        try:
            settings = JobSettings.model_validate(dict(self._mine.settings))
            arguments = place.arguments(settings, self._mine.id)
        except (AutotuneError, ValidationError) as error:
            return self._finish("failed", reason=f"this worker cannot run it: {error}")
        study = self._mine.study
        while True:
            if study is not None:
                self._wait_for_driver(study)
            if self._is_to_end():
                return self._ended(None)
            child = self._followed([*command, *arguments])
            study = child.study_of_another
            if study is None:
                return self._ended(child)
            self._submissions.progress(self._mine, {"what": "waiting for who drives its study", "study": study}, study)

    def _followed(self, command: Sequence[str]) -> _Child:
        """A process that has ended, or was ended."""
        child = _Child(command, {**os.environ, **OFFLINE, STORAGE: self._database.url})
        try:
            while child.is_alive and not self._is_to_end():
                self._note(child)
                time.sleep(POLL_S)
        finally:
            child.end()
        self._next_note = 0.0
        self._note(child)
        return child

    def _is_to_end(self) -> bool:
        """Whether to end the process: on request, or for this worker's end. A sign of life, from time to time."""
        if time.monotonic() >= self._next_beat:
            self._is_cancelled = self._submissions.beat(self._mine)
            self._next_beat = time.monotonic() + self._submissions.seconds / BEATS
        return self._is_cancelled or self._stop()

    def _note(self, child: _Child) -> None:
        if time.monotonic() >= self._next_note and child.progress:
            self._next_note = time.monotonic() + PROGRESS_S
            progress = child.progress.pop()
            self._submissions.progress(self._mine, progress, progress.get("study"))

    def _wait_for_driver(self, study: str) -> None:
        """Until nobody drives the study: the process of a worker before may be dying, or be dead with its host."""
        if Studies(self._database).get(study) is None:
            return
        leases, me = Leases(self._database, study), this_worker()
        while leases.drive(me) is not None and not self._is_to_end():
            time.sleep(IDLE_S)
        leases.leave(me)

    def _ended(self, child: _Child | None) -> str:
        if child is not None and (child.status == 0 or (child.status == 1 and child.outcome is not None)):
            return self._finish("succeeded", outcome=child.outcome)
        if self._is_cancelled:
            return self._finish("cancelled")
        if child is None or self._stop():
            self._submissions.release(self._mine)
            return "queued"
        return self._finish("failed", reason=child.reason)

    def _finish(self, state: str, outcome: Mapping[str, Any] | None = None, reason: str | None = None) -> str:
        self._submissions.finish(self._mine, state, outcome, reason)
        return state


class _Child:
    """A process that runs a job, with all that it starts, and what it has said.

    It leads a group of its own, and its standard input closes with this process, however that ends.
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
        self._said: deque[str] = deque(maxlen=LAST_WORDS)
        self._listeners = [threading.Thread(target=self._read), threading.Thread(target=self._listen)]
        for listener in self._listeners:
            listener.daemon = True
            listener.start()

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    @property
    def status(self) -> int | None:
        return self._process.poll()

    @property
    def study_of_another(self) -> str | None:
        """The study that it was refused, because another process drives it: a job with almost the same settings."""
        driven = DRIVEN.search(self._last_words) if self.status == 2 else None
        return driven and driven[1]

    @property
    def _last_words(self) -> str:
        said = [line for line in self._said if line]
        return said[-1].removeprefix("error: ") if said else "it said nothing"

    @property
    def reason(self) -> str:
        """Why it failed: the last that it said."""
        words = self._last_words
        return words if self.status == 2 else f"its process ended with status {self.status}: {words}"

    def end(self) -> None:
        """Ask it to end where it has not; have it end where it does not, with all that it started."""
        if self.is_alive:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=STOP_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for listener in self._listeners:
            listener.join(timeout=LISTEN_S)
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout:
            for line in self._process.stdout:
                said = _event(line)
                if said.get("event") == "progress":
                    self.progress.append({key: value for key, value in said.items() if key != "event"})
                elif said.get("event") == "outcome":  # where it wrote what is of use on this host alone
                    self.outcome = {key: value for key, value in said.items() if key not in ("event", "paths")}

    def _listen(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr:
            for line in self._process.stderr:
                self._said.append(line.decode(errors="replace").strip())


def _event(line: bytes) -> dict[str, Any]:
    """The JSON object in a line; empty for anything else. What is no number in JSON is null."""
    try:
        said = json.loads(line, parse_constant=lambda _: None)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}
