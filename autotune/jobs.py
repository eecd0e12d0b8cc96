"""The worker of the service: takes jobs from the queue, one at a time, and sees each through in a process of its own.

What a job finds lies in its folder and in the database, so whoever claims it after a worker has died runs the same
command, and that resumes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from autotune.config import STORAGE, AutotuneError
from autotune.job_process import SILENCE_S, JobProcess
from autotune.redaction import redacted
from autotune.store import Database, LeaseLostError, Leases, Studies, Submission, Submissions, this_worker
from autotune.submitted import JobSettings, Place

__all__ = ["COMMAND", "work"]

COMMAND = (sys.executable, "-m", "autotune.cli")
IDLE_S = 0.5  # between two looks at an empty queue
POLL_S = 0.1
PROGRESS_S = 0.5  # between two notes of how far a job is
BEATS = 30  # signs of life in the time that a claim lasts
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
        self._looked, self._was_away = time.monotonic(), False

    def run(self, place: Place, command: Sequence[str]) -> str:
        """The state that the job is in then. Raises LeaseLostError."""
        try:
            settings = JobSettings.model_validate(dict(self._mine.settings))
            promoter = self._mine.by if self._mine.may_promote else None
            words = [*command, *place.arguments(settings, self._mine.id, promoter)]
        except (AutotuneError, ValidationError) as error:
            return self._finish("failed", reason=f"this worker cannot run it: {redacted(str(error))}")
        environment = {**os.environ, **OFFLINE, **place.environment(), STORAGE: self._database.url}
        study = self._mine.study
        while True:
            if study is not None:
                self._wait_for_driver(study)
            if self._is_to_end():
                return self._ended(None)
            child = self._followed(JobProcess(words, environment))
            study = child.study_of_another
            if study is None:
                return self._ended(child)
            self._submissions.progress(self._mine, {"what": "waiting for who drives its study", "study": study}, study)

    def _followed(self, child: JobProcess) -> JobProcess:
        """The process, once it has ended, or was ended: at once where the job is another worker's by now."""
        try:
            while not self._is_to_end() and child.is_alive:
                self._note(child)
                time.sleep(POLL_S)
        except LeaseLostError:
            child.kill()
            raise
        finally:
            child.end()
        self._next_note = 0.0
        self._note(child)
        return child

    def _is_to_end(self) -> bool:
        """Whether to end the process: on request, or for this worker's end. A sign of life, from time to time."""
        now = time.monotonic()
        self._was_away |= now - self._looked > SILENCE_S
        self._looked = now
        if now >= self._next_beat:
            self._is_cancelled = self._submissions.beat(self._mine)
            self._next_beat = now + self._submissions.seconds / BEATS
        return self._is_cancelled or self._stop()

    def _note(self, child: JobProcess) -> None:
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

    def _ended(self, child: JobProcess | None) -> str:
        if child is not None and (child.status == 0 or (child.status == 1 and child.outcome is not None)):
            return self._finish("succeeded", outcome=child.outcome)
        if self._is_cancelled:
            return self._finish("cancelled")
        if child is None or self._stop() or self._was_away:  # then the process may have ended for the silence
            self._submissions.release(self._mine)
            return "queued"
        return self._finish("failed", reason=child.reason)

    def _finish(self, state: str, outcome: Mapping[str, Any] | None = None, reason: str | None = None) -> str:
        self._submissions.finish(self._mine, state, outcome, reason)
        return state
