"""Kills workers of one study at random, and holds what is left against a study that nobody disturbed.

    python -m benchmarks.soak [--kills 50] [--workers 4] [--trials 200] [--seconds 0.3] [--postgresql] [--seed 0]

A pool runs workers of the recorded table, whose trials take `--seconds` of sleep. Each kill is a SIGKILL, at a moment
drawn by the seed, of one worker that holds a lease, wherever in asking, trying or telling that finds it; the pool
starts another. None is killed while a trial is at its last attempt: it would fail, as it should. The sampler draws
alike in whatever order it is asked, so every plan, and what it came to, must be found again. Exits with 1 where a check
fails. Without `--postgresql` or `--storage` the database is an SQLite file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from autotune.config import JobConfig, Limit
from autotune.mirror import TOKEN
from autotune.objective import Told
from autotune.store import Database, Lease, Leases
from autotune.store.leases import MAX_ATTEMPTS
from autotune.study import Study
from autotune.worker import MAX_DEATHS, LocalPool
from benchmarks.machine import ROOT
from benchmarks.postgresql import own_server
from benchmarks.replayed_worker import open_study, work
from benchmarks.tabular import Table

__all__ = ["Check", "Killer", "checked", "disturbed", "main", "outcomes", "undisturbed"]

SAMPLER = "qmc"
UNTIL = 0.8  # of the trials are told when the last kill falls due
AT_ONCE = MAX_DEATHS // 2  # kills without a trial told in between: a pool may count two such rows as one
POLL_S = 0.05
LEASE_S = 60.0  # far more than a trial takes: a lease ends early only with its worker
SMALL = {"kills": 4, "workers": 2, "trials": 24, "seconds": 0.1}
FULL = {"kills": 50, "workers": 4, "trials": 200, "seconds": 0.3}


@dataclass(frozen=True, slots=True)
class Check:
    """What must hold, whether it does, and the figures that say so."""

    name: str
    ok: bool
    figures: str

    def __str__(self) -> str:
        return f"{'ok' if self.ok else 'FAILED':8}{self.name}: {self.figures}"


class Killer(threading.Thread):
    """Kills workers of a pool, as many as it is told to, as a study goes on. killed: the processes, in that order."""

    def __init__(self, pool: LocalPool, leases: Leases, num_kills: int, num_trials: int, seconds: float, seed: int):
        super().__init__(daemon=True)
        self._pool, self._leases, self._seconds = pool, leases, seconds
        self._random = random.Random(seed)
        self._due = sorted(self._random.choices(range(int(UNTIL * num_trials)), k=num_kills))
        self._over = threading.Event()
        self.killed: list[int] = []

    def run(self) -> None:
        last_told, since = -1, 0
        for due in self._due:
            while not self._over.wait(POLL_S):
                told = self._leases.counts().get("told", 0)
                last_told, since = (told, 0) if told != last_told else (told, since)
                if told >= due and since < AT_ONCE and self._kill():
                    since += 1
                    break

    def stop(self) -> None:
        self._over.set()
        self.join()

    def _kill(self) -> bool:
        time.sleep(self._random.uniform(0, self._seconds))
        leases = self._leases.all()
        held = [each for each in leases if each.state == "held"]
        if any(each.attempt >= MAX_ATTEMPTS - 1 for each in leases if each.state in ("held", "waiting")):
            return False
        holders = sorted({_process_of(each) for each in held} & set(self._pool.process_ids))
        if not holders:
            return False
        process = self._random.choice(holders)
        os.kill(process, signal.SIGKILL)
        self.killed.append(process)
        return True


def _process_of(held: Lease) -> int:
    return int((held.worker or "").rsplit("/", 2)[1])


def disturbed(
    storage: str, name: str, *, kills: int, workers: int, trials: int, seconds: float, seed: int
) -> list[int]:
    """Run a study to its end with so many workers killed; the processes that were."""
    study = open_study(storage, name, trials, SAMPLER, seed, LEASE_S)
    pool = LocalPool(workers, command=(sys.executable, "-m", "benchmarks.replayed_worker", "--seconds", str(seconds)))
    killer = Killer(pool, Leases(Database(storage), name), kills, trials, seconds, seed)
    killer.start()
    try:
        pool(study, _config(storage, name, trials), lambda what: None)
    finally:
        killer.stop()
    study.mirror.sweep()
    return killer.killed


def _config(storage: str, name: str, trials: int) -> JobConfig:
    """What a pool reads of a job's: the database, the number of trials, and the threads of a worker."""
    return JobConfig(
        model="replayed",
        data=None,
        limit=Limit.parse("prefill_p50<=0.35x"),
        name=name,
        num_trials=trials,
        space=ROOT / "search_spaces" / "reference.yaml",
        out=ROOT / "runs",
        storage=storage,
    )


def undisturbed(trials: int, seed: int) -> list[Told]:
    """The same study by one worker in this process, and nobody to kill it."""
    with tempfile.TemporaryDirectory(prefix="btp-soak-") as folder:
        storage = f"sqlite:///{folder}/study.db"
        study = open_study(storage, "undisturbed", trials, SAMPLER, seed, LEASE_S)
        work(storage, "undisturbed", 0.0, lambda: False, table=Table.load())
        return study.told()


def outcomes(told: Iterable[Told]) -> Counter[tuple[Any, ...]]:
    """How often each draw came to what."""
    return Counter((json.dumps(t.draw, sort_keys=True), t.score, t.ratio, t.proxy) for t in told)


def checked(
    storage: str, name: str, trials: int, killed: Collection[int], kills: int, wanted: Sequence[Told]
) -> list[Check]:
    """All that must hold of a study that came to its end, however it was disturbed. wanted: as of `undisturbed`."""
    study = Study(Database(storage), name, 0)
    leases = study.leases.all()
    counts, told = study.leases.counts(), study.leases.told_after(0)
    numbers = Counter(each.number for each in told)
    ended_by_kill = [each for each in leases if each.state == "expired"]
    strangers = [each.token for each in ended_by_kill if _process_of(each) not in killed]
    open_leases = counts.get("held", 0) + counts.get("waiting", 0)
    unsettled = study.leases.unsettled()
    late = {row["token"] for row in study.leases.late()}
    found, undone = outcomes(study.told()), outcomes(wanted)
    return [
        Check("kills", len(killed) == kills, f"{len(killed)} of {kills}, {len(ended_by_kill)} of them cost a lease"),
        Check(
            "every number told once",
            numbers == Counter(range(trials)),
            f"{len(told)} told, {len(numbers)} numbers of {trials}",
        ),
        Check(
            "exact count",
            counts.get("told", 0) == trials == sum(map(counts.get, counts)) - len(_superseded(leases)),
            f"leases {dict(sorted(counts.items()))}",
        ),
        Check("all leases given back", open_leases == 0, f"{open_leases} held or waiting"),
        Check("all leases settled", not unsettled, f"{len(unsettled)} of {len(leases)} are not"),
        Check("attempts follow one another", not (odd := _odd_chains(leases)), f"trials with others: {odd}"),
        Check("only killed workers lost leases", not strangers, f"leases of others: {strangers}"),
        Check(
            "nothing late but of lost leases",
            late <= {each.token for each in ended_by_kill},
            f"{len(late)} late",
        ),
        *_of_optuna(storage, name, study, leases),
        Check(
            "as the undisturbed study",
            found == undone,
            f"{(found & undone).total()} of {undone.total()} alike, {(found - undone).total()} others",
        ),
    ]


def _superseded(leases: Iterable[Lease]) -> list[Lease]:
    return [each for each in leases if each.state in ("expired", "released")]


def _odd_chains(leases: Sequence[Lease]) -> list[int]:
    """Trials whose attempts are not one chain: each but the last superseded by the next, and the last one told."""
    by_number: dict[int, list[Lease]] = {}
    for each in leases:
        by_number.setdefault(each.number, []).append(each)
    odd = []
    for number, chain in by_number.items():
        before = [None, *(each.token for each in chain)][:-1]
        states = {each.state for each in chain[:-1]} <= {"expired", "released"} and chain[-1].state == "told"
        if not states or [each.retry_of for each in chain] != before:
            odd.append(number)
    return odd


def _of_optuna(storage: str, name: str, study: Study, leases: Sequence[Lease]) -> list[Check]:
    """Whether Optuna's own study says the same."""
    theirs = RDBStorage(storage)
    trials = theirs.get_all_trials(theirs.get_study_id_from_name(name), deepcopy=False)
    theirs.engine.dispose()
    by_token = {each.token: each for each in leases}
    ended = [trial for trial in trials if trial.state in (TrialState.COMPLETE, TrialState.PRUNED)]
    records = {t.number: t for t in study.told()}
    alike = [trial for trial in ended if _is_alike(trial, by_token, records)]
    rest = [trial for trial in trials if trial not in ended]
    explained = [trial for trial in rest if _is_explained(trial, by_token)]
    return [
        Check(
            "Optuna has what was told",
            len(ended) == len(alike) == len(records),
            f"{len(ended)} finished, {len(alike)} of them with the values told, of {len(records)}",
        ),
        Check(
            "Optuna's others failed with a reason",
            len(explained) == len(rest),
            f"{len(explained)} of {len(rest)} on leases that were lost",
        ),
    ]


def _is_alike(trial: FrozenTrial, by_token: dict[int, Lease], records: dict[int, Told]) -> bool:
    lease, told = by_token.get(trial.user_attrs.get(TOKEN)), records.get(trial.user_attrs.get("number"))
    if lease is None or told is None or (lease.state, lease.number) != ("told", told.number):
        return False
    same = trial.params == told.draw and trial.user_attrs["retry_of"] == lease.retry_of
    if not told.complete:
        return same and trial.state == TrialState.PRUNED
    return same and trial.state == TrialState.COMPLETE and trial.values == [told.merit, told.ratio]


def _is_explained(trial: FrozenTrial, by_token: dict[int, Lease]) -> bool:
    lease = by_token.get(trial.user_attrs.get(TOKEN))
    if lease is None or trial.state != TrialState.FAIL or lease.state not in ("expired", "released"):
        return False
    return bool(lease.reason) and trial.user_attrs.get("reason") == lease.reason


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=None)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--trials", type=int, default=None)
    parser.add_argument("--seconds", type=float, default=None, help="of a trial")
    database = parser.add_mutually_exclusive_group()
    database.add_argument("--storage", default=None, help="by default an SQLite file, gone afterwards")
    database.add_argument("--postgresql", action="store_true", help="a server of its own, gone afterwards")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="a few kills, for a smoke test")
    options = parser.parse_args(arguments)
    for name, value in (SMALL if options.small else FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    sizes = {name: getattr(options, name) for name in FULL}
    name = f"soak-{uuid.uuid4().hex[:12]}"
    with ExitStack() as stack:
        if options.postgresql:
            storage = stack.enter_context(own_server())
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="btp-soak-")))
            storage = options.storage or f"sqlite:///{folder / 'study.db'}"
        began = time.monotonic()
        killed = disturbed(storage, name, **sizes, seed=options.seed)
        took_s = time.monotonic() - began
        wanted = undisturbed(options.trials, options.seed)
        checks = checked(storage, name, options.trials, killed, options.kills, wanted)
    setup = ", ".join(f"{value:g} {name}" for name, value in sizes.items() if name != "seconds")
    print(f"{Database(storage)}: {setup}, {options.seconds:g} s each; {took_s:.0f} s")
    for check in checks:
        print(check)
    return int(not all(check.ok for check in checks))


if __name__ == "__main__":
    sys.exit(main())
