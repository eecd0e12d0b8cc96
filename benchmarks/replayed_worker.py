"""A worker of a study whose every trial is looked up in the recorded table: real processes and databases, no model.

    AUTOTUNE_STORAGE=sqlite:///study.db python -m benchmarks.replayed_worker --study NAME [--seconds 2]

Takes what `autotune worker` takes, so a pool can start it in that one's place. A trial takes `--seconds` of sleep, with
a sign of life at every look, and comes to what the table says of the plan: how often it is tried, by whom, and beside
whom makes no difference to it, so a study that was disturbed can be held against one that was not.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from autotune.config import STORAGE
from autotune.stopping import StoppedError, stopping
from autotune.store import Database, LeaseLostError
from autotune.study import Asked, Study
from benchmarks.grid import GRID
from benchmarks.tabular import Table

__all__ = ["main", "open_study", "work"]

IDLE_S = 0.05
BEAT_S = 0.25


def open_study(storage: str, name: str, target: int, sampler: str, seed: int = 0, lease_s: float = 20.0) -> Study:
    """A study that replayed workers can ask."""
    study = Study(Database(storage), name, seed, seconds=lease_s)
    study.leases.open({"sampler": sampler, "seed": seed, "target": target, "lease_s": lease_s}, target)
    return study


def work(
    storage: str,
    name: str,
    seconds: float,
    stop: Callable[[], bool],
    say: Callable[[str], None] = lambda what: None,
    table: Table | None = None,
) -> tuple[int, list[tuple[float, float]]]:
    """Try trials until the study has them all: how many, and the seconds that each one's ask and tell took.

    Raises StoppedError once `stop` says so, with the trial handed back.
    """
    table = table or Table.load()
    database = Database(storage)
    opened = Study(database, name, 0).leases.opened
    if opened is None:
        return 0, []
    study = Study(database, name, opened["seed"], seconds=opened["lease_s"])
    times: list[tuple[float, float]] = []
    while True:
        if stop():
            raise StoppedError
        began = time.perf_counter()
        asked = study.ask(GRID.ranges, opened["sampler"], opened["target"])
        if asked is None:
            if study.is_done(opened["target"]):
                study.mirror.flush()
                return len(times), times
            time.sleep(IDLE_S)
            continue
        between = time.perf_counter()
        try:
            _pass_time(study, asked, seconds, stop)
            told_at = time.perf_counter()
            assert isinstance(asked.work, dict)
            told = table.told(table.number(GRID.cell(asked.work)))
            study.tell(asked, replace(told, number=asked.number, name=asked.name, draw=asked.work))
        except LeaseLostError:
            continue
        times.append((between - began, time.perf_counter() - told_at))
        say(f"trial {asked.number}")


def _pass_time(study: Study, asked: Asked, seconds: float, stop: Callable[[], bool]) -> None:
    """What a trial would take, with signs of life."""
    until = time.perf_counter() + seconds
    beaten = time.perf_counter()
    while (left := until - time.perf_counter()) > 0:
        if stop():
            study.release(asked, "stopped")
            raise StoppedError
        if time.perf_counter() - beaten > study.leases.seconds / 4:
            study.beat(asked)
            beaten = time.perf_counter()
        time.sleep(min(left, BEAT_S))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", required=True)
    parser.add_argument("--seconds", type=float, default=float(os.environ.get("REPLAYED_SECONDS", "0")))
    parser.add_argument("--answerers", type=int, help="as autotune worker's; of no matter here")
    parser.add_argument("--until-stdin-closes", action="store_true")
    given = parser.parse_args(arguments)
    with stopping(with_parent=given.until_stdin_closes) as stop:
        try:
            told, _ = work(os.environ[STORAGE], given.study, given.seconds, stop)
        except StoppedError:
            print("stopped; what it was at is handed back", file=sys.stderr)
            return 0
    print(f"done: {told} trials told by this worker", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
