"""Workers as processes: signals, a supervisor whose workers die, and studies that a worker is of no use to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
from typer.testing import CliRunner

from autotune import data, job, reference
from autotune.bench import Bench
from autotune.cli import app
from autotune.config import OPTUNA_PROXY, STORAGE, AutotuneError, JobConfig, Limit
from autotune.store import Database
from autotune.study import Study
from autotune.worker import LocalPool, Overrides, serve
from benchmarks.replayed_worker import open_study, work
from tests.autotune.formula_bench import SPACE, config

REPLAYED = (sys.executable, "-m", "benchmarks.replayed_worker")


def started(storage: str, seconds: float) -> subprocess.Popen[str]:
    command = [*REPLAYED, "--study", "study", "--seconds", str(seconds)]
    environment = {**os.environ, STORAGE: storage, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("storage", "number"), [("sqlite", signal.SIGTERM), ("postgresql", signal.SIGINT)], indirect=["storage"]
)
def test_a_signal_has_a_worker_hand_its_trial_back_and_end_well(storage: str, number: signal.Signals) -> None:
    study = open_study(storage, "study", 4, "qmc")
    worker = started(storage, seconds=30.0)
    wait_until(lambda: study.leases.counts().get("held") == 1)
    worker.send_signal(number)
    _, said = worker.communicate(timeout=10)
    assert worker.returncode == 0
    assert "is handed back" in said
    assert study.leases.counts() == {"released": 1, "waiting": 1}
    assert study.leases.unsettled() == []


def test_a_second_signal_ends_a_worker_at_once(tmp_path: Path) -> None:
    """One that does not come to look whether it is to stop, as it would in a long computation."""
    code = (
        "import time\nfrom autotune.stopping import stopping\n"
        "with stopping() as stop:\n    print('ready', flush=True)\n"
        "    until = time.monotonic() + 60\n    while time.monotonic() < until:\n        time.sleep(0.01)"
    )
    worker = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n"
    worker.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert worker.poll() is None
    worker.send_signal(signal.SIGTERM)
    worker.communicate(timeout=10)
    assert worker.returncode == -signal.SIGTERM


def test_workers_that_only_die_end_the_pool_with_what_the_last_one_said(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(storage, "study", 4, "qmc")
    dying = (sys.executable, "-c", "import sys; print('no such library', file=sys.stderr); sys.exit(3)")
    pool = LocalPool(2, command=dying)
    with pytest.raises(AutotuneError, match=r"workers must live.*status 3: no such library"):
        pool(study, replace(config(tmp_path, 4), storage=storage), lambda _: None)
    assert pool.process_ids == []


@pytest.mark.parametrize(("is_closed", "named"), [(False, "status 0: bye"), (True, "closed the study")])
def test_workers_that_all_end_well_before_the_study_does_are_not_waited_for(
    tmp_path: Path, is_closed: bool, named: str
) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(storage, "study", 4, "qmc")
    if is_closed:
        study.leases.close()
    pool = LocalPool(2, command=(sys.executable, "-c", "import sys; print('bye', file=sys.stderr)"))
    with pytest.raises(AutotuneError, match=named):
        pool(study, replace(config(tmp_path, 4), storage=storage), lambda _: None)


def test_a_study_that_a_living_process_drives_is_refused_to_another(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'study.db'}")
    one, other = (Study(database, "study", 0, worker=f"another-host/x/{number}/1") for number in range(2))
    with one.driven() as alive:
        alive()
        with pytest.raises(AutotuneError, match="join it with autotune worker --study study"), other.driven():
            pass
    with other.driven(), pytest.raises(AutotuneError, match="one process at a time"):
        alive()


def test_a_pool_has_the_trials_tried_and_leaves_no_process(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    study = open_study(storage, "study", 12, "qmc")
    said: list[str] = []
    pool = LocalPool(2, command=REPLAYED)
    pool(study, replace(config(tmp_path, 12), storage=storage), said.append)
    assert [t.number for t in study.told()] == list(range(12))
    assert said
    assert pool.process_ids == []


def opened(tmp_path: Path, **fits: str) -> str:
    """A study of the reference VLM that a worker may ask, but for what is said of it otherwise."""
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    settings = JobConfig(
        model=str(reference.WEIGHTS),
        data=None,
        limit=Limit.parse("prefill_p50<=0.9x"),
        out=tmp_path,
        space=SPACE,
        name="model",
        storage=storage,
    )
    bench = Bench(settings, data.load_splits(None), settings.limit)
    study = Study(bench.database, "study", 0)
    study.leases.open({"settings": settings.to_dict(), "fits": {**job.identity(bench), **fits}}, 0)
    return storage


def test_a_worker_of_another_model_or_device_is_refused_with_the_difference(tmp_path: Path) -> None:
    storage = opened(tmp_path, model="another's digest", name="NVIDIA H200")
    with pytest.raises(AutotuneError, match=r"model \"another's digest\", got .*name 'NVIDIA H200', got "):
        serve(storage, "study", Overrides(), lambda: False, lambda _: None)


def test_a_study_that_is_not_open_is_refused(tmp_path: Path) -> None:
    there = f"sqlite:///{tmp_path / 'study.db'}"
    open_study(there, "study", 4, "qmc")
    for storage in (f"sqlite:///{tmp_path / 'none.db'}", there):
        result = CliRunner().invoke(app, ["worker", "--study", "typo"], env={STORAGE: storage})
        assert result.exit_code == 2, result.output
        assert "must name a study that is open" in " ".join(result.output.split())
    assert not (tmp_path / "none.db").exists()


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_workers_may_share_a_proxy_to_optunas_tables(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = open_study(storage, "study", 6, "qmc")
    study.note("made", True)  # Optuna's tables are there
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = "import sys, optuna\noptuna.storages.run_grpc_proxy_server(\n"
    code += "    optuna.storages.RDBStorage(sys.argv[1]), host='127.0.0.1', port=int(sys.argv[2]))"
    proxy = subprocess.Popen([sys.executable, "-c", code, storage, str(port)], stderr=subprocess.DEVNULL)
    try:
        monkeypatch.setenv(OPTUNA_PROXY, f"127.0.0.1:{port}")
        assert work(storage, "study", 0.0, lambda: False)[0] == 6
    finally:
        proxy.terminate()
        proxy.wait(10)
    trials = optuna.load_study(study_name="study", storage=study.mirror.storage).trials
    assert [t.values for t in trials] == [[t.merit, t.ratio] for t in study.told()]
    monkeypatch.setenv(OPTUNA_PROXY, "nowhere")
    with pytest.raises(AutotuneError, match="must be HOST:PORT"):
        open_study(storage, "another", 6, "qmc").note("made", True)
