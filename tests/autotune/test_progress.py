"""How studies stand, as those see it who only look: of both kinds of databases, and of Optuna's tables."""

from __future__ import annotations

import re
import sqlite3
import time
from pathlib import Path

import optuna
import pytest

from autotune import importance as matters
from autotune.config import AutotuneError
from autotune.importance import importance, reading_storage
from autotune.objective import Told
from autotune.store import Database, Leases, Studies
from autotune.store.progress import Overview, Progress, has_optuna, has_tables
from autotune.study import Study
from benchmarks.grid import GRID
from benchmarks.replayed_worker import open_study, work
from tests.dashboard.made_up import make_study


def test_best_is_what_the_objective_calls_feasible(storage: str) -> None:
    database = Database(storage)
    make_study(database, "made up", 80, 3, limit=0.5)
    make_study(database, "none", 3, 3, limit=0.01)
    told = [Told.from_dict(record) for record in Studies(database).records("made up")]
    assert Overview(database).best(["made up", "none"]) == {
        "made up": pytest.approx(max(t.score for t in told if t.complete and t.feasible))
    }


def test_pages_of_studies_lead_to_every_one(storage: str) -> None:
    database = Database(storage)
    for number in range(7):
        make_study(database, f"s{number}", 1, number)
    overview = Overview(database)
    found = [overview.page("", first, 3) for first in (0, 3, 6)]
    assert [num for _, num in found] == [7, 7, 7]
    assert {each.name for rows, _ in found for each in rows} == {f"s{number}" for number in range(7)}


def test_a_lease_that_runs_out_and_a_worker_that_dies_are_told(storage: str) -> None:
    database = Database(storage)
    study = Study(database, "s", 0, worker="far/away/host/7/1", seconds=0.2)
    study.leases.open({}, 5)
    study.ask(GRID.ranges, "random", 5)
    progress = Progress(database, "s")
    before = progress.mark()
    (held,) = progress.attempts()
    assert (held.state, held.worker, held.told) == ("held", "far/away/host/7/1", None)
    assert held.left is not None
    assert held.left <= 0.2
    overview = Overview(database)
    time.sleep(0.3)
    standing = overview.get("s")
    assert standing is not None
    assert standing.state == "waiting for workers"  # who holds a lease that has run out is not at work
    Leases(database, "s").give_up_dead()
    assert progress.mark() != before
    expired, waiting = progress.attempts()
    assert (expired.state, waiting.state, waiting.retry_of) == ("expired", "waiting", expired.token)
    standing = Overview(database).get("s")
    assert standing is not None
    assert standing.state == "waiting for workers"
    study.leases.close()
    assert [each.state for each in Overview(database).page("", 0, 9)[0]] == ["closed"]


def test_importance_finds_the_parameter_that_matters(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(storage)
    Study(database, "s", 0).mirror.flush()
    storage = optuna.storages.RDBStorage(database.url)
    study = optuna.create_study(storage=storage, study_name="known", directions=["maximize", "minimize"])

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        score, ratio = trial.suggest_float("score", 0, 1), trial.suggest_float("ratio", 0, 1)
        return score + 0.001 * ratio, ratio + 0.001 * score

    study.optimize(objective, n_trials=60)
    found = importance(database, "known")
    assert found.num_trials == 60
    assert max(found.merit, key=found.merit.__getitem__) == "score"
    assert max(found.latency, key=found.latency.__getitem__) == "ratio"
    assert sum(found.merit.values()) == pytest.approx(1)
    with pytest.raises(AutotuneError, match="none named 'unknown'"):
        importance(database, "unknown")
    monkeypatch.setattr(matters, "MIN_TRIALS", 61)
    with pytest.raises(AutotuneError, match="got 60; wait for more"):
        importance(database, "known")
    storage.engine.dispose()


def test_optunas_tables_are_read_and_never_written(storage: str) -> None:
    database = Database(storage)
    assert not has_optuna(database)
    study = open_study(storage, "s", 2, "random")
    work(storage, "s", 0.0, lambda: False)
    study.mirror.flush()
    assert has_optuna(database)
    reading = reading_storage(database)
    number = reading.get_study_id_from_name("s")
    assert len(reading.get_all_trials(number)) == 2
    for write in (
        lambda: reading.create_new_study([optuna.study.StudyDirection.MINIMIZE], "new"),
        lambda: reading.set_study_user_attr(number, "key", 1),
        lambda: reading.delete_study(number),
    ):
        with pytest.raises(optuna.exceptions.StorageInternalError) as refused:
            write()
        assert re.search("read.?only", str(refused.value.__cause__))
    assert len(reading.get_all_studies()) == 1
    reading.engine.dispose()


def test_an_empty_database_has_no_studies_and_is_left_empty(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    assert not has_tables(Database(f"sqlite:///{file}"))
    assert not file.exists()
    sqlite3.connect(file).close()
    assert not has_tables(Database(f"sqlite:///{file}"))
    assert file.stat().st_size == 0
