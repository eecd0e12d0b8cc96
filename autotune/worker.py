"""Workers: processes that try a study's trials until it has them all; and a pool of them on this machine.

A worker knows no other. What it needs to begin lies in the database, and so does all that it finds.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from autotune import data
from autotune.bench import Bench
from autotune.config import STORAGE, AutotuneError, JobConfig
from autotune.job import identity
from autotune.search import Search
from autotune.space import SearchSpace
from autotune.store import Database, Leases
from autotune.study import Study

__all__ = ["LocalPool", "Overrides", "serve"]

logger = logging.getLogger(__name__)

MAX_DEATHS = 5  # of workers, one after the other, without a trial told in between
LAST_WORDS = 20  # lines of its error output that are kept of a worker
POLL_S = 0.2
STOP_S = 60.0  # for the batch it is at


@dataclass(frozen=True, kw_only=True, slots=True)
class Overrides:
    """What is otherwise on this host than where the study was begun; None where it is not."""

    model: str | None = None
    data: Path | None = None
    device: str | None = None
    answerers: int = 1


def serve(storage: str, name: str, here: Overrides, stop: Callable[[], bool], say: Callable[[str], None]) -> int:
    """Try trials of a study until it has them all, or is closed; how many this worker told.

    Raises AutotuneError for a study that is not known, or not of this model, data and device, and StoppedError once
    `stop` says so.
    """
    database = Database(storage)
    opened = Leases(database, name).opened if database.exists else None
    if opened is None:
        raise AutotuneError(
            f"--study must name a study that is open in {database}, got {name!r}; begin it with autotune tune, which "
            "prints its name, and let it run"
        )
    with tempfile.TemporaryDirectory(prefix="btp-worker-") as folder:
        config = _here(JobConfig.from_dict(opened["settings"], Path(folder), storage), here)
        bench = Bench(config, data.load_splits(config.data), config.limit)
        _check_fits(opened["fits"], identity(bench))
        study = Study(database, name, config.seed)
        mine = _Count(study, say)
        Search(config, bench, study, SearchSpace.load(config.space), mine).run(stop)
    return mine.told


def _here(config: JobConfig, here: Overrides) -> JobConfig:
    given = {key: value for key, value in asdict(here).items() if value is not None}
    return replace(config, **given)


def _check_fits(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    different = [
        f"{key} {wanted.get(key)!r}, got {given.get(key)!r}" for key in wanted if wanted.get(key) != given.get(key)
    ]
    if different:
        raise AutotuneError(
            f"a worker must have the study's model, data and device: {'; '.join(different)}; latency is not to be "
            "compared across devices, so tune there as a study of its own"
        )


class _Count:
    """Says how far the study is, whenever this worker has told a trial."""

    def __init__(self, study: Study, say: Callable[[str], None]) -> None:
        self._study, self._say, self.told = study, say, 0

    def __call__(self, what: str) -> None:
        if what == "searching":
            self.told += 1
            what = f"{self.told} trials told by this worker, {self._study.num_done} finished"
        self._say(what)


@dataclass
class LocalPool:
    """So many workers on this machine. Those that die are started again; all end with this process, however it ends.

    command: what starts one; the database's address is in its environment. cores: divided among the workers.
    """

    num_workers: int
    cores: int = 1
    command: tuple[str, ...] = (sys.executable, "-m", "autotune.cli", "worker")
    _workers: list[_Child] = field(default_factory=list, init=False)

    def __call__(self, study: Study, config: JobConfig, say: Callable[[str], None]) -> None:
        """Return once the study has its trials. Raises AutotuneError where workers only die, or it is closed."""
        answerers = max(1, self.cores // self.num_workers)
        command = [*self.command, "--study", study.name, "--answerers", str(answerers), "--until-stdin-closes"]
        environment = {**os.environ, STORAGE: study.storage, "OMP_NUM_THREADS": str(config.threads)}
        deaths, num_told = 0, len(study.told())
        self._workers = [_Child(command, environment) for _ in range(self.num_workers)]
        try:
            while True:
                is_done = study.is_done(config.num_trials)
                if (now := len(study.told())) != num_told:
                    deaths, num_told = 0, now
                    say("searching")
                if is_done:
                    break
                if study.leases.opened is None:
                    raise AutotuneError("another process closed the study; run the same command again to go on with it")
                for place, worker in enumerate(self._workers):
                    if worker.poll() is None or (worker.poll() == 0 and self.process_ids):
                        continue  # one that ended well found nothing to ask for: the others finish
                    deaths += 1
                    logger.warning("a worker ended with status %d; %d in a row by now", worker.poll(), deaths)
                    if deaths > MAX_DEATHS:
                        raise AutotuneError(
                            f"workers must live, but {deaths} died without a trial told in between, the last with "
                            f"status {worker.poll()}: {worker.last_words}; mend that, and run the same command again "
                            "to resume"
                        )
                    self._workers[place] = _Child(command, environment)
                time.sleep(POLL_S)
        finally:
            for worker in self._workers:
                worker.ask_to_stop()
            for worker in self._workers:
                worker.stop()

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker.poll() is None]


class _Child:
    """A worker, and the end of what it said."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        self._said: deque[str] = deque(maxlen=LAST_WORDS)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                self._said.append(line.decode(errors="replace").strip())

    def poll(self) -> int | None:
        status = self.process.poll()
        if status is not None:
            self.ask_to_stop()  # nobody is there to ask: its end of the pipe is closed
        return status

    @property
    def last_words(self) -> str:
        self._listener.join(timeout=1.0)
        said = [line for line in self._said if line]
        return said[-1] if said else "it said nothing"

    def ask_to_stop(self) -> None:
        """Have it hand back what it is at."""
        assert self.process.stdin is not None
        self.process.stdin.close()

    def stop(self) -> None:
        """Wait for it to end; have it end where it does not."""
        self.ask_to_stop()
        try:
            self.process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join(timeout=1.0)
