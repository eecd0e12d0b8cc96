"""The truth on SQLite and on PostgreSQL: who holds a trial, what was told once, what came too late, what is kept."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, create_engine, event, inspect, text
from sqlalchemy.exc import IntegrityError

from autotune.config import AutotuneError
from autotune.scores import Scores
from autotune.store import (
    Database,
    Evaluation,
    LeaseLostError,
    Leases,
    Results,
    StoreError,
    this_worker,
)
from autotune.store.tables import metadata

FORK = multiprocessing.get_context("fork")
ELSEWHERE = "another-host/pid:[1]/1/1"


def leases(storage: str, study: str = "study", **terms: Any) -> Leases:
    found = Leases(Database(storage), study, **terms)
    found.create()
    found.open({"model": "m"}, 1000)
    return found


@contextmanager
def looked_into(storage: str) -> Iterator[Connection]:
    engine = create_engine(storage)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def run_out(storage: str) -> None:
    """Have every lease be over by the database's clock."""
    with looked_into(storage) as connection:
        connection.execute(text("UPDATE lease SET expires = 1 WHERE state = 'held'"))


def killed(work: Callable[[], object]) -> None:
    """Do something in a process that is killed right after."""

    def and_die() -> None:
        work()
        os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_migrations_come_to_the_tables_and_leave_other_tables_alone(storage: str) -> None:
    with looked_into(storage) as connection:
        connection.execute(text("CREATE TABLE trials (id INTEGER)"))
    for _ in range(2):  # nothing is to be done the second time
        Database(storage).run(lambda connection: None)
    with looked_into(storage) as connection:
        ours = {"include_name": lambda name, kind, _: kind != "table" or name in metadata.tables}
        assert compare_metadata(MigrationContext.configure(connection, opts=ours), metadata) == []
        assert "trials" in inspect(connection).get_table_names()


def test_eight_processes_make_the_tables_at_once(storage: str) -> None:
    processes = [FORK.Process(target=lambda: leases(storage)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert leases(storage).opened == {"model": "m"}


def test_what_waits_comes_first_and_then_new_trials_up_to_the_target(storage: str) -> None:
    study = leases(storage)
    for _ in range(2):
        study.enqueue("first", {"p": 1})
        study.enqueue("second", {"p": 2})
    study.enqueue("one too many", {"p": 3}, within=2)
    claimed = [study.claim("w", 4, first_index=7) for _ in range(5)]
    assert [c and (c.number, c.name, c.work, c.draw_index) for c in claimed] == [
        (0, "first", {"p": 1}, None),
        (1, "second", {"p": 2}, None),
        (2, None, None, 7),
        (3, None, None, 8),
        None,
    ]


def test_a_trial_is_told_once_however_often_it_is_sent(storage: str) -> None:
    study = leases(storage)
    held = study.claim("w", 1)
    assert held is not None
    for _ in range(2):  # as where the answer to the first was lost
        study.tell(held, {"score": 0.5}, "key")
    assert [(e.number, e.key, e.record) for e in study.told_after(0)] == [(0, "key", {"score": 0.5})]
    assert study.counts() == {"told": 1}
    assert study.claim("w", 1) is None


def test_a_lease_that_ran_out_goes_to_another_and_what_comes_late_is_for_the_audit(storage: str) -> None:
    study = leases(storage)
    slow = study.claim("slow", 1)
    assert slow is not None
    study.started(slow, {"x": 1})
    assert study.claim("quick", 1) is None
    run_out(storage)
    again = study.claim("quick", 1)
    assert again is not None
    assert (again.number, again.work, again.retry_of, again.attempt) == (0, {"x": 1}, slow.token, 1)
    study.tell(again, {"score": 0.7}, "")
    for late in (lambda: study.tell(slow, {"score": 0.1}, ""), lambda: study.beat(slow)):
        with pytest.raises(LeaseLostError, match="trial 0 was given to another"):
            late()
    study.fail(slow, "too late to fail, too")
    assert [e.record for e in study.told_after(0)] == [{"score": 0.7}]
    assert [(row["token"], row["worker"], row["record"]) for row in study.late()] == [
        (slow.token, "slow", {"score": 0.1})
    ]
    assert study.counts() == {"expired": 1, "told": 1}


def test_what_comes_late_but_was_given_to_nobody_counts(storage: str) -> None:
    study = leases(storage)
    held = study.claim("w", 1)
    assert held is not None
    run_out(storage)
    study.tell(held, {"score": 0.5}, "")
    assert study.counts() == {"told": 1}


def test_a_sign_of_life_is_counted_by_the_databases_clock(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = leases(storage, seconds=1.0)
    held = study.claim(ELSEWHERE, 1)
    assert held is not None
    monkeypatch.setattr(time, "time", lambda: 1e12)  # this worker's own clock is far ahead
    assert study.claim("w", 1) is None
    for _ in range(3):
        time.sleep(0.5)
        study.beat(held)
    assert study.claim("w", 1) is None
    time.sleep(1.1)
    again = study.claim("w", 1)
    assert again is not None
    assert again.retry_of == held.token


def test_a_dead_process_of_this_host_is_not_waited_for_and_one_elsewhere_is(storage: str) -> None:
    study = leases(storage)
    assert study.claim(ELSEWHERE, 2) is not None
    killed(lambda: leases(storage).claim(this_worker(), 2))
    again = study.claim("w", 2)
    assert again is not None
    assert (again.number, again.attempt) == (1, 1)
    assert study.claim("w", 2) is None
    assert "its worker died" in [each.reason for each in study.all()]


def test_a_trial_that_kills_its_workers_fails_in_the_end(storage: str) -> None:
    study = leases(storage, max_attempts=3)
    for attempt in range(3):
        held = study.claim(ELSEWHERE, 1)
        assert held is not None
        assert held.attempt == attempt
        run_out(storage)
    assert study.claim(ELSEWHERE, 1) is None
    assert study.counts() == {"expired": 2, "failed": 1}
    assert "for the last of 3 attempts" in (study.all()[-1].reason or "")


def test_a_trial_handed_back_has_lost_no_attempt(storage: str) -> None:
    study = leases(storage, max_attempts=1)
    for _ in range(4):
        held = study.claim("w", 1)
        assert held is not None
        assert (held.number, held.attempt) == (0, 0)
        study.release(held, "stopped")
    assert study.counts() == {"released": 4, "waiting": 1}


def test_two_reapers_at_once_give_a_trial_up_once(storage: str) -> None:
    study = leases(storage)
    for _ in range(4):
        study.claim(ELSEWHERE, 4)
    run_out(storage)
    processes = [FORK.Process(target=lambda: leases(storage).claim(this_worker(), 4)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    retried = Counter(each.retry_of for each in study.all() if each.retry_of is not None and each.attempt == 1)
    assert set(retried.values()) == {1}
    assert len(retried) == 4


def test_eight_workers_reach_the_number_and_no_more(storage: str) -> None:
    study = leases(storage)

    def work() -> None:
        mine = leases(storage)
        while (held := mine.claim(this_worker(), 40)) is not None:
            mine.tell(held, {"pid": os.getpid()}, "")

    processes = [FORK.Process(target=work) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    told = study.told_after(0)
    assert sorted(e.number for e in told) == list(range(40))
    assert [e.place for e in told] == sorted(e.place for e in told)
    assert sorted(each.draw_index or 0 for each in study.all()) == list(range(40))
    assert study.counts() == {"told": 40}


def test_what_was_told_is_read_in_order_while_others_tell(storage: str) -> None:
    study = leases(storage)

    def work() -> None:
        mine = leases(storage)
        while (held := mine.claim(this_worker(), 60)) is not None:
            mine.tell(held, {}, "")

    processes = [FORK.Process(target=work) for _ in range(3)]
    for process in processes:
        process.start()
    seen: list[Evaluation] = []
    deadline = time.monotonic() + 60
    while len(seen) < 60 and time.monotonic() < deadline:
        seen += study.told_after(seen[-1].place if seen else 0)
    for process in processes:
        process.join()
    assert seen == study.told_after(0)
    assert sorted(e.number for e in seen) == list(range(60))


def test_draws_are_found_by_state_once_they_are_made(storage: str) -> None:
    study = leases(storage)
    study.enqueue("fixed", {"p": 1})
    claimed = [each for each in (study.claim("w", 5) for _ in range(5)) if each is not None]
    for each in claimed[:4]:
        study.started(each, {"x": each.number})
    _, told, failed, _, _ = claimed
    study.tell(told, {}, "")
    study.fail(failed, "broken")
    assert [(each.state, each.work) for each in study.drawn("held", "failed")] == [
        ("failed", {"x": 2}),
        ("held", {"x": 3}),
    ]


def test_what_was_said_of_dense_stays_when_a_study_is_opened_again(storage: str) -> None:
    study = Leases(Database(storage), "s")
    study.create()
    study.open({"seed": 0, "dense": {"ms": 30.0}}, 3)
    study.add("dense", {"score": 0.9})
    study.close()
    study.open({"seed": 0, "dense": {"ms": 40.0}}, 5)
    assert study.opened == {"seed": 0, "dense": {"ms": 30.0, "score": 0.9}}
    study.close()
    study.add("dense", {"gflops": 1.0})
    study.open({"seed": 0}, 5)
    assert study.opened == {"seed": 0, "dense": {"ms": 30.0, "score": 0.9, "gflops": 1.0}}


def test_a_latency_is_of_the_model_it_was_measured_with(storage: str) -> None:
    database = Database(storage)
    for scope, dense_ms in (("one", 50.0), ("other", 95.0)):
        Results(database, scope).measured({"name": "cpu"}, "plan", "prefill_p50<=0.6x", [dense_ms], [30.0])
    (block,) = Results(database, "one").blocks("plan")
    assert (block.dense_ms, block.pruned_ms) == ((50.0,), (30.0,))


def test_a_closed_study_is_not_open_to_workers(storage: str) -> None:
    study = leases(storage)
    assert study.opened == {"model": "m"}
    study.close()
    assert study.opened is None
    assert Leases(Database(storage), "unknown").opened is None


def test_forgetting_a_study_leaves_the_others(storage: str) -> None:
    one, two = leases(storage, "one"), leases(storage, "two")
    for study in (one, two):
        held = study.claim("w", 1)
        assert held is not None
        study.tell(held, {}, "")
    one.forget()
    assert one.all() == []
    assert one.told_after(0) == []
    assert len(two.told_after(0)) == 1


SCORES = Scores(answers=("red", "two"), scores=(1.0, 0.0), realised=(((4, 4, 2), 2),), kl=(0.1, 1 / 3), nll=(2.0, 1e-9))


def test_what_is_computed_is_kept_to_the_last_digit_and_computed_once(storage: str) -> None:
    results = Results(Database(storage), "scope")
    assert results.answers("part", lambda: SCORES) == SCORES
    assert results.answers("part", lambda: pytest.fail("computed again")) == SCORES
    assert Results(Database(storage), "scope").answers("part", lambda: pytest.fail("computed again")) == SCORES
    assert results.once("layers", lambda: {"layers": (1, 2)}) == {"layers": [1, 2]}
    assert results.once("layers", lambda: pytest.fail("computed again")) == {"layers": [1, 2]}
    assert Results(Database(storage), "another").once("layers", lambda: {"layers": [3]}) == {"layers": [3]}
    results.forget()
    assert results.once("layers", lambda: {"layers": [4]}) == {"layers": [4]}
    assert Results(Database(storage), "another").once("layers", lambda: pytest.fail("forgotten")) == {"layers": [3]}


def test_of_two_who_compute_the_same_the_first_counts(storage: str) -> None:
    first, second = (Results(Database(storage), "scope") for _ in range(2))

    def slow() -> dict[str, int]:
        first.once("value", lambda: {"by": 1})
        return {"by": 2}

    assert second.once("value", slow) == {"by": 1}


def test_pairs_are_noted_by_device(storage: str) -> None:
    database = Database(storage)
    results = Results(database, "scope")
    for key in ({"gpu": "a"}, {"gpu": "a"}, {"gpu": "b"}):
        results.measured(key, "plan", "prefill_p50<=1x", [1.0, 2.0], [0.5, 0.75])
    with looked_into(storage) as connection:
        blocks = connection.execute(text("SELECT device, plan FROM latency_block ORDER BY id")).all()
        assert [tuple(block) for block in blocks] == [(1, "plan"), (1, "plan"), (2, "plan")]


@pytest.mark.parametrize(
    "url", ["mysql://me:secret@x/y", "nonsense secret", "postgres://me:secret@db/x", "sqlite+what:///x"]
)
def test_an_address_of_something_else_is_refused_and_its_password_not_repeated(url: str) -> None:
    with pytest.raises(AutotuneError, match="--storage") as raised:
        Database(url).run(lambda connection: None)
    assert "secret" not in str(raised.value)


def test_a_lower_target_of_the_study_counts_for_workers_that_began_with_a_higher_one(storage: str) -> None:
    study = leases(storage)
    study.open({}, 2)
    assert [study.claim("w", 5) is not None for _ in range(3)] == [True, True, False]


def test_one_driver_at_a_time_and_a_dead_one_is_followed(storage: str) -> None:
    study = leases(storage)
    assert study.drive(this_worker()) is None
    assert study.drive(this_worker()) is None
    assert study.drive(ELSEWHERE) == this_worker()
    study.leave(ELSEWHERE)
    assert study.drive(ELSEWHERE) == this_worker()
    study.leave(this_worker())
    assert study.drive(ELSEWHERE) is None
    with looked_into(storage) as connection:
        connection.execute(text("UPDATE job SET driver_expires = 1"))
    killed(lambda: leases(storage).drive(this_worker()))
    assert study.drive(this_worker()) is None


def test_an_attempt_that_its_worker_could_not_go_on_with_counts(storage: str) -> None:
    study = leases(storage, max_attempts=2)
    for _ in range(2):
        held = study.claim("w", 1)
        assert held is not None
        study.give_up(held, "a process died")
    assert study.counts() == {"expired": 1, "failed": 1}


def test_what_the_tables_do_not_take_is_an_error_and_not_kept(tmp_path: Path) -> None:
    results = Results(Database(f"sqlite:///{tmp_path / 'study.db'}"), "scope")
    broken = Scores(("x",), (1.0,), (), (0.0,), (float("nan"),))
    with pytest.raises(IntegrityError):
        results.answers("part", lambda: broken)
    assert results.answers("part", lambda: SCORES) == SCORES


def test_a_letter_that_postgresql_does_not_have_is_left_out(storage: str) -> None:
    odd = Scores(("a\0b",), (1.0,), (), (0.0,), (0.0,))
    assert Results(Database(storage), "scope").answers("part", lambda: odd).answers == ("ab",)


def test_a_server_that_is_not_there_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autotune.store.database.FIRST_PATIENCE_S", 0.5)
    with pytest.raises(StoreError, match="must be within reach") as raised:
        Database("postgresql+psycopg://me:secret@127.0.0.1:1/db").run(lambda connection: None)
    assert "secret" not in str(raised.value)


def test_a_full_disk_is_said_at_once_and_nothing_is_half_written(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    database = Database(storage)
    results = Results(database, "scope")
    with database.engine.begin() as connection:
        pages = connection.execute(text("PRAGMA page_count")).scalar_one()
    many = Scores(("x" * 5000,) * 500, (1.0,) * 500, (), (0.0,) * 500, (0.0,) * 500)
    full = Database(storage)
    full.engine.dispose()
    event.listen(full.engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count = {pages + 5}"))
    began = time.monotonic()
    with pytest.raises(StoreError, match=r"must have room to write.*full"):
        Results(full, "scope").answers("part", lambda: many)
    assert time.monotonic() - began < 10
    assert results.answers("part", lambda: SCORES) == SCORES
