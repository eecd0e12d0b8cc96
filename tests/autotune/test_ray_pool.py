"""Workers that Ray places: one of them is killed, Ray starts it again, and the study has exactly its trials."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from autotune.config import AutotuneError
from autotune.ray_pool import RayPool
from autotune.study import Study
from autotune.worker import Overrides
from benchmarks.replayed_worker import open_study
from tests.autotune.formula_bench import config

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own sockets and logs
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
NUM_TRIALS = 16


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield
    ray.shutdown()


def serving(died: Path) -> Callable[..., int]:
    """A worker on the recorded table, the first of which is killed at its third trial."""

    def serve(storage: str, name: str, here: Overrides, stop: Callable[[], bool], say: Callable[[str], None]) -> int:
        from benchmarks.replayed_worker import work

        told = 0

        def count(what: str) -> None:
            nonlocal told
            told += 1
            say(what)
            if told == 2:
                try:
                    died.touch(exist_ok=False)
                except FileExistsError:
                    return
                os.kill(os.getpid(), signal.SIGKILL)

        return work(storage, name, 0.2, stop, count)[0]

    return serve


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_two_workers_finish_a_study_through_the_death_of_one(storage: str, tmp_path: Path) -> None:
    study = open_study(storage, "ray", NUM_TRIALS, "qmc")
    said: list[str] = []
    pool = RayPool(num_workers=2, address="local", serve=serving(tmp_path / "died"))
    pool(study, replace(config(tmp_path, NUM_TRIALS), storage=storage), said.append)
    assert (tmp_path / "died").exists()
    assert [t.number for t in study.told()] == list(range(NUM_TRIALS))
    assert study.leases.counts()["told"] == NUM_TRIALS
    assert len({each.worker for each in study.leases.all() if each.state == "told"}) >= 2
    assert said


@pytest.mark.parametrize(
    ("pool", "named"),
    [
        (RayPool(num_workers=1, address="127.0.0.1:1"), "start one with ray start --head"),
        (RayPool(num_workers=1, address="local", gpus_per_worker=64), "needs 64 GPU"),
        (RayPool(num_workers=1, address="local", gpus_per_worker=0.5), "must be a whole number"),
    ],
    ids=["no cluster", "too few GPUs", "a shared GPU"],
)
def test_a_cluster_that_cannot_serve_is_refused_at_once(pool: RayPool, named: str, tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study: Study = open_study(storage, "ray", NUM_TRIALS, "qmc")
    with pytest.raises(AutotuneError, match=named):
        pool(study, replace(config(tmp_path, NUM_TRIALS), storage=storage), lambda _: None)
