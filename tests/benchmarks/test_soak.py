"""The soak in small, on both databases; and that each of its checks fails where what it looks at is not so."""

import json
import shutil
import sqlite3
from contextlib import closing

import pytest
from optuna.storages import RDBStorage

from autotune.store import this_worker
from benchmarks import soak
from benchmarks.replayed_worker import open_study, work
from benchmarks.tabular import Table

NUM_TRIALS = 6
GONE = 999_999_999  # no process has this number


@pytest.mark.parametrize("database", [[], ["--postgresql"]], ids=["sqlite", "postgresql"])
def test_workers_are_killed_and_the_study_comes_out_as_if_they_were_not(database, capsys):
    status = soak.main(["--small", *database])
    said = capsys.readouterr().out
    assert "FAILED" not in said
    assert "ok      kills: 4 of 4" in said
    assert "ok      as the undisturbed study: 24 of 24 alike, 0 others" in said
    assert status == 0


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """An SQLite file with a study of which one worker was gone before it began, and the same study undisturbed."""
    path = tmp_path_factory.mktemp("soak") / "study.db"
    storage = f"sqlite:///{path}"
    study = open_study(storage, "soak", NUM_TRIALS, soak.SAMPLER)
    host = this_worker().rsplit("/", 2)[0]
    study.leases.claim(f"{host}/{GONE}/1", NUM_TRIALS)
    work(storage, "soak", 0.0, lambda: False, table=Table.load())
    study.mirror.sweep()
    return path, soak.undisturbed(NUM_TRIALS, 0)


def failed(path, wanted, kills=1):
    checks = soak.checked(f"sqlite:///{path}", "soak", NUM_TRIALS, [GONE], kills, wanted)
    return {check.name for check in checks if not check.ok}


def test_what_is_as_it_should_be_passes(ended):
    assert failed(*ended) == set()


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        ("DELETE FROM evaluation WHERE number = 3", "every number told once"),
        ("UPDATE evaluation SET number = 99 WHERE number = 3", "every number told once"),
        ("UPDATE lease SET state = 'failed' WHERE number = 3", "exact count"),
        (
            "INSERT INTO lease (study, number, attempt, state, settled) VALUES ('soak', 3, 0, 'told', 1)",
            "attempts follow one another",
        ),
        ("UPDATE lease SET retry_of = NULL", "attempts follow one another"),
        ("UPDATE lease SET state = 'held' WHERE number = 3", "all leases given back"),
        ("UPDATE lease SET settled = 0 WHERE number = 3", "all leases settled"),
        ("UPDATE lease SET worker = 'host/pid/1/1'", "only killed workers lost leases"),
        (
            "INSERT INTO late_result (study, token, worker, record, told) "
            "SELECT study, token, worker, '{}', 0 FROM lease WHERE state = 'told' LIMIT 1",
            "nothing late but of lost leases",
        ),
        ("UPDATE trial_values SET value = value + 1 WHERE trial_id = 3", "Optuna has what was told"),
        ("UPDATE trials SET state = 'RUNNING' WHERE trial_id = 3", "Optuna has what was told"),
    ],
)
def test_a_check_fails_where_the_database_says_otherwise(ended, tmp_path, wrong, check):
    path, wanted = ended
    copy = shutil.copy(path, tmp_path / "study.db")
    with closing(sqlite3.connect(copy)) as connection:
        assert connection.execute(wrong).rowcount > 0
        connection.commit()
    assert check in failed(copy, wanted)


def test_a_check_fails_where_a_trial_came_to_something_else(ended, tmp_path):
    path, wanted = ended
    copy = shutil.copy(path, tmp_path / "study.db")
    with closing(sqlite3.connect(copy)) as connection:
        (text,) = connection.execute("SELECT record FROM evaluation WHERE number = 3").fetchone()
        changed = json.dumps({**json.loads(text), "score": 2.0})
        connection.execute("UPDATE evaluation SET record = ? WHERE number = 3", (changed,))
        connection.commit()
    assert {"as the undisturbed study", "Optuna has what was told"} <= failed(copy, wanted)


def test_a_check_fails_where_optuna_has_a_trial_of_nobodys(ended, tmp_path):
    path, wanted = ended
    copy = shutil.copy(path, tmp_path / "study.db")
    theirs = RDBStorage(f"sqlite:///{copy}")
    theirs.create_new_trial(theirs.get_study_id_from_name("soak"))
    theirs.engine.dispose()
    assert failed(copy, wanted) == {"Optuna's others failed with a reason"}


def test_a_check_fails_where_fewer_were_killed_than_wanted(ended):
    assert failed(*ended, kills=2) == {"kills"}
