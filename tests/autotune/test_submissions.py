"""Keys and jobs in the database, and the worker that sees jobs through: claims, fences, events, all kinds of ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, event, text
from typer.testing import CliRunner

from autotune import job_process, jobs
from autotune.cli import app
from autotune.config import STORAGE, AutotuneError
from autotune.redaction import redacted
from autotune.samplers import SAMPLERS
from autotune.store import ConflictError, Database, Keys, LeaseLostError, Leases, NoSubmissionError, Submissions
from autotune.submitted import JobSettings, Roots
from tests.autotune.services import FORK, OUTCOME, REGISTRY, SETTINGS, run_jobs, wait_until

HELD = 1.0  # seconds that a claim lasts here


def queue(storage: str, **terms: Any) -> tuple[Submissions, int]:
    """The jobs of a database, and a key to hand them in with."""
    database = Database(storage)
    keys = Keys(database)
    if not keys.all():
        keys.create("tests", ["read", "submit"])
    return Submissions(database, **terms), keys.all()[0].id


@contextmanager
def looked_into(storage: str) -> Iterator[Connection]:
    engine = create_engine(storage)
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def run_out(storage: str) -> None:
    with looked_into(storage) as connection:
        connection.execute(text("UPDATE submission SET expires = 1 WHERE state = 'running'"))


def states(submissions: Submissions, number: str) -> list[str]:
    return [str(event.data["state"]) for event in submissions.events(number) if event.kind == "state"]


def test_a_key_is_shown_once_and_opens_until_it_is_revoked_or_over(storage: str) -> None:
    keys = Keys(Database(storage))
    shown = keys.create("ci", ["submit", "read"])
    brief = keys.create("brief", ["read"], expires_s=0.3)
    found = keys.find(shown)
    assert found is not None
    assert (found.name, found.scopes) == ("ci", ("read", "submit"))
    assert keys.find(brief) is not None
    wrong = [shown[:-1] + ("A" if shown[-1] != "A" else "B"), shown[:-1], shown + "A", "", "btp_", "btp_\0", "é" * 60]
    assert [keys.find(word) for word in [*wrong, "btp_0123456789ab_" + "A" * 43]] == [None] * (len(wrong) + 1)
    nowhere = Keys(Database("postgresql+psycopg://127.0.0.1:9/none"))
    assert nowhere.find("x") is None  # nobody is asked for what is no key
    with looked_into(storage) as connection:
        rows = str(connection.execute(text("SELECT * FROM api_key")).all())
    assert shown.split("_", 2)[2] not in rows
    for _ in range(2):
        keys.revoke("ci")
    time.sleep(0.4)
    assert keys.find(shown) is None
    assert keys.find(brief) is None
    assert [(key.name, key.revoked is None) for key in keys.all()] == [("ci", False), ("brief", True)]


@pytest.mark.parametrize(
    ("name", "scopes", "expires_s", "named"),
    [
        ("ci", ["read"], None, "a key's name must be new"),
        ("a\nb", ["read"], None, "up to 100 letters"),
        ("b", ["write"], None, "--scopes must be some of read,submit,promote, got 'write'"),
        ("b", [], None, "--scopes must be some of"),
        ("b", ["read"], 0.0, "must last for some time"),
    ],
)
def test_a_key_that_breaks_a_rule_is_refused(
    tmp_path: Path, name: str, scopes: list[str], expires_s: float | None, named: str
) -> None:
    keys = Keys(Database(f"sqlite:///{tmp_path / 'study.db'}"))
    keys.create("ci", ["read"])
    keys.revoke("ci")  # its name stays taken: it stands in the log
    with pytest.raises(AutotuneError, match=named):
        keys.create(name, scopes, expires_s)
    with pytest.raises(AutotuneError, match="must be there to be revoked, got 'nobody'"):
        keys.revoke("nobody")


def test_keys_are_made_listed_and_revoked_from_the_command_line(tmp_path: Path) -> None:
    def ran(*words: str) -> str:
        result = CliRunner().invoke(app, ["keys", *words, "--home", str(tmp_path)])
        assert result.exit_code == 0, result.output
        return result.output

    text = ran("create", "alice", "--scopes", "read, promote", "--expires-days", "1").strip()
    found = Keys(Database(f"sqlite:///{tmp_path / 'study.db'}")).find(text)
    assert found is not None
    assert (found.name, found.scopes) == ("alice", ("read", "promote"))
    assert found.expires is not None
    assert round(found.expires - found.created) == 86400
    ran("revoke", "alice")
    listed = ran("list")
    assert "alice" in listed
    assert text not in listed
    assert Keys(Database(f"sqlite:///{tmp_path / 'study.db'}")).find(text) is None


def test_a_job_goes_from_the_queue_to_its_end(storage: str) -> None:
    submissions, key = queue(storage)
    handed_in = submissions.submit(SETTINGS, key)
    assert (handed_in.state, handed_in.by, handed_in.attempt) == ("queued", "tests", 0)
    mine = submissions.claim("w")
    assert mine is not None
    assert (mine.id, mine.state, mine.attempt, mine.settings) == (handed_in.id, "running", 1, SETTINGS)
    assert submissions.claim("w") == mine  # one at a time: its answer may have been lost
    assert submissions.claim("other") is None
    assert submissions.beat(mine) is False
    for told in (1, 2, 2):
        submissions.progress(mine, {"told": told}, study="s")
    for _ in range(2):
        submissions.finish(mine, "succeeded", {"met": True})
    done = submissions.get(mine.id)
    assert (done.state, done.outcome, done.study) == ("succeeded", {"met": True}, "s")
    assert done.created <= (done.started or 0) <= (done.finished or 0)
    events = submissions.events(mine.id)
    assert [(e.kind, e.data.get("state", e.data.get("told"))) for e in events] == [
        ("state", "queued"),
        ("state", "running"),
        ("progress", 1),
        ("progress", 2),
        ("state", "succeeded"),
    ]
    assert submissions.events(mine.id, events[2].id) == events[3:]
    with pytest.raises(LeaseLostError):
        submissions.beat(mine)
    assert submissions.counts() == {"queued": 0, "running": 0, "succeeded": 1, "failed": 0, "cancelled": 0}


def test_an_idempotency_key_is_one_job_of_one_key_with_its_settings(storage: str) -> None:
    submissions, key = queue(storage)
    Keys(Database(storage)).create("another", ["submit"])
    another = Keys(Database(storage)).all()[1].id
    first = submissions.submit(SETTINGS, key, "k")
    assert submissions.submit(dict(SETTINGS), key, "k").id == first.id
    assert submissions.submit(SETTINGS, another, "k").id != first.id
    assert len({submissions.submit(SETTINGS, key).id for _ in range(2)}) == 2
    with pytest.raises(ConflictError, match="must stay with its settings"):
        submissions.submit({**SETTINGS, "seed": 1}, key, "k")
    assert submissions.counts()["queued"] == 4


def test_pages_are_newest_first_and_do_not_overlap(storage: str) -> None:
    submissions, key = queue(storage)
    ids = [submissions.submit(SETTINGS, key).id for _ in range(5)]
    first = submissions.page(2)
    second = submissions.page(2, first[-1].id)
    third = submissions.page(2, second[-1].id)
    assert [job.id for job in (*first, *second, *third)] == ids[::-1]
    for ask in (submissions.get, submissions.cancel, lambda number: submissions.page(2, number)):
        with pytest.raises(NoSubmissionError, match="there must be a job 'none'"):
            ask("none")


def test_what_waits_is_cancelled_at_once_and_what_runs_by_its_worker(storage: str) -> None:
    submissions, key = queue(storage)
    runs, waits = (submissions.submit(SETTINGS, key) for _ in range(2))
    mine = submissions.claim("w")
    assert mine is not None
    assert mine.id == runs.id
    assert submissions.cancel(waits.id).state == "cancelled"
    for _ in range(2):
        asked = submissions.cancel(runs.id)
        assert (asked.state, asked.cancel_requested) == ("running", True)
    assert submissions.beat(mine) is True
    submissions.finish(mine, "cancelled")
    assert submissions.cancel(runs.id).state == "cancelled"
    assert states(submissions, runs.id) == ["queued", "running", "running", "cancelled"]
    lost = submissions.submit(SETTINGS, key)
    assert submissions.claim("dead") is not None
    run_out(storage)
    assert submissions.cancel(lost.id).state == "cancelled"  # nobody is there to do it


def test_a_job_whose_worker_is_gone_is_claimed_again_and_the_first_is_fenced_off(storage: str) -> None:
    submissions, key = queue(storage)
    submissions.submit(SETTINGS, key)
    first = submissions.claim("slow")
    assert first is not None
    run_out(storage)
    second = submissions.claim("quick")
    assert second is not None
    assert (second.id, second.attempt) == (first.id, 2)
    for late in (
        lambda: submissions.beat(first),
        lambda: submissions.progress(first, {"told": 9}),
        lambda: submissions.finish(first, "succeeded"),
    ):
        with pytest.raises(LeaseLostError):
            late()
    submissions.release(first)
    assert submissions.get(first.id).worker == "quick"
    assert "progress" not in [event.kind for event in submissions.events(first.id)]
    submissions.finish(second, "succeeded")


def test_what_kills_its_workers_fails_and_what_is_handed_back_does_not(storage: str) -> None:
    submissions, key = queue(storage, max_attempts=2)
    number = submissions.submit(SETTINGS, key).id
    for _ in range(4):
        mine = submissions.claim("polite")
        assert mine is not None
        assert mine.attempt == 1
        submissions.release(mine)
    for worker in ("one", "two"):
        assert submissions.claim(worker) is not None
        run_out(storage)
    waits = submissions.submit(SETTINGS, key).id
    claimed = submissions.claim("three")
    assert claimed is not None
    assert claimed.id == waits
    assert submissions.claim("four") is None
    failed = submissions.get(number)
    assert failed.state == "failed"
    assert "for the last of 2 attempts" in (failed.reason or "")


def test_a_job_that_lost_its_worker_comes_before_those_that_were_handed_in_later(storage: str) -> None:
    submissions, key = queue(storage)
    unwanted, lost = (submissions.submit(SETTINGS, key).id for _ in range(2))
    for worker in ("one", "two"):
        assert submissions.claim(worker) is not None
    submissions.cancel(unwanted)
    run_out(storage)
    waits = submissions.submit(SETTINGS, key).id
    first, second = submissions.claim("three"), submissions.claim("four")
    assert first is not None
    assert second is not None
    assert [(job.id, job.attempt) for job in (first, second)] == [(lost, 2), (waits, 1)]
    assert submissions.get(unwanted).state == "cancelled"  # while others wait


def test_what_is_new_of_a_job_is_asked_for_with_one_query(storage: str) -> None:
    submissions, key = queue(storage)
    number = submissions.submit(SETTINGS, key).id
    seen: list[str] = []
    engine = submissions._database.engine
    event.listen(engine, "before_cursor_execute", lambda *told: seen.append(told[2]))
    is_over, (queued,) = submissions.news(number)
    assert (is_over, queued.data) == (False, {"state": "queued"})
    assert submissions.news(number, queued.id) == (False, [])
    submissions.cancel(number)
    seen_before = len([each for each in seen if each.startswith("SELECT")])
    is_over, (cancelled,) = submissions.news(number, queued.id)
    assert (is_over, cancelled.data) == (True, {"state": "cancelled"})
    assert len([each for each in seen if each.startswith("SELECT")]) == seen_before + 1


def test_eight_processes_claim_forty_jobs_once_each(storage: str, tmp_path: Path) -> None:
    submissions, key = queue(storage)
    ids = [submissions.submit(SETTINGS, key).id for _ in range(40)]

    def work(number: int) -> None:
        mine, claimed = queue(storage)[0], []
        while (job := mine.claim(f"worker {number}")) is not None:
            claimed.append(job.id)
            mine.finish(job, "succeeded", {"by": number})
        (tmp_path / f"{number}.json").write_text(json.dumps(claimed))

    processes = [FORK.Process(target=work, args=(number,)) for number in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    claimed = [number for file in tmp_path.glob("?.json") for number in json.loads(file.read_text())]
    assert Counter(claimed) == Counter(ids)
    assert {submissions.get(number).attempt for number in ids} == {1}


def test_eight_processes_hand_in_one_job_under_one_key(storage: str) -> None:
    submissions, key = queue(storage)
    processes = [FORK.Process(target=lambda: queue(storage)[0].submit(SETTINGS, key, "same")) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert submissions.counts()["queued"] == 1


def test_samplers_are_the_ones_that_there_are() -> None:
    assert set(JobSettings.model_json_schema()["properties"]["sampler"]["enum"]) == set(SAMPLERS)


@pytest.mark.parametrize(
    "name",
    [
        "../out/model",
        "..",
        ".",
        "/etc",
        "out",
        "https://example.com/m",
        "org/model",
        "m\0",
        "%2e%2e/out",
        "loop",
        "none",
    ],
)
def test_what_does_not_lie_under_the_root_is_refused_alike(tmp_path: Path, name: str) -> None:
    root, outside = tmp_path / "models", tmp_path / "out"
    (root / "mine").mkdir(parents=True)
    (outside / "model").mkdir(parents=True)
    (root / "out").symlink_to(outside / "model")
    (root / "loop").symlink_to(root / "loop")
    (root / "alias").symlink_to(root / "mine")
    roots = Roots(models=root, data=root)
    assert roots.files(JobSettings(limit="prefill_p50<=1x", model="alias", data="mine")) == (root / "mine",) * 2
    for files in ({"model": name, "data": "mine"}, {"model": "mine", "data": name}):
        with pytest.raises(AutotuneError, match="must be a relative path of what lies in the service's folder for it"):
            roots.check(JobSettings(limit="prefill_p50<=1x", **files))
    with pytest.raises(AutotuneError, match="this service has no folder for it"):
        Roots().check(JobSettings(limit="prefill_p50<=1x", model="mine", data="mine"))


def runs(tmp_path: Path, number: str) -> list[list[str]]:
    file = tmp_path / "home" / "jobs" / number / "runs"
    return [line.split() for line in file.read_text().splitlines()] if file.exists() else []


def test_a_worker_runs_what_waits_and_says_how_each_came_out(storage: str, tmp_path: Path) -> None:
    submissions, key = queue(storage)
    asked = [{"seed": 12}, {"seed": 0, "name": "missed"}, {"name": "broken"}, {"name": "crashing"}, {"model": "m"}]
    ids = [submissions.submit({**SETTINGS, **each}, key).id for each in asked]
    assert run_jobs(storage, tmp_path / "home") == 5
    well, missed, broken, crashing, impossible = map(submissions.get, ids)
    assert well.state == missed.state == "succeeded"
    assert well.outcome == missed.outcome == OUTCOME
    assert (broken.state, broken.reason) == ("failed", "the limit must be met, got none; raise it")
    assert (crashing.state, crashing.reason) == (
        "failed",
        "its process ended with status 1: ValueError: what nobody thought of",
    )
    assert impossible.state == "failed"
    assert "data must be left out" in (impossible.reason or "")
    assert well.study == f"s-{well.id[-4:]}"
    told = [event.data["told"] for event in submissions.events(well.id) if event.kind == "progress"]
    assert told[-1] == 12
    assert len(told) < 12  # about two a second
    (words,) = runs(tmp_path, well.id)
    assert words[1] == "demo"
    assert words[-1] == "1"  # no hub
    assert {"--limit=prefill_p50<=0.7x", "--no-promote", "--progress=jsonl"} < set(words)


def test_a_job_promotes_only_for_a_key_that_may_and_in_its_name(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, no = queue(storage)
    keys = Keys(Database(storage))
    for name in ("alice", "bob"):
        keys.create(name, ["submit", "promote"])
    _, alice, bob = (key.id for key in keys.all())
    ids = [submissions.submit({**SETTINGS, "seed": 1}, key).id for key in (no, alice, bob)]
    keys.revoke("bob")
    assert run_jobs(storage, tmp_path / "home") == 3
    (without,), (with_it,), (revoked,) = ([set(words) for words in runs(tmp_path, number)] for number in ids)
    assert {"--promote", "--who=alice"} < with_it
    for words in (without, revoked):
        assert "--no-promote" in words
        assert not [word for word in words if word.startswith(("--promote", "--who"))]


def test_no_password_and_no_folder_of_a_host_gets_further_than_its_process(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "leaky"}, key).id
    run_jobs(storage, tmp_path / "home")
    (words,) = runs(tmp_path, number)
    assert "secret" not in " ".join(words)
    assert (tmp_path / "home" / "jobs" / number / "registry").read_text() == REGISTRY
    assert submissions.get(number).reason == "API request to http://127.0.0.1:9/api failed, see …/x.json"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("at https://u:p@h:1/a/b and http://p@ss@h/c", "at https://h:1/a/b and http://h/c"),
        ("postgresql+psycopg://me:x@host/db", "postgresql+psycopg://host/db"),
        ("no file '/srv/a/b.json'; see /etc/x/", "no file '…/b.json'; see …/x/"),
        ("in sqlite:////srv/a/mlflow.db, file:///srv/a/b", "in sqlite:///…/mlflow.db, file://…/b"),
        (
            "models:/NAME/3 at models:/NAME@champion, 3/4/5 or a/b/c",
            "models:/NAME/3 at models:/NAME@champion, 3/4/5 or a/b/c",
        ),
        ({"a": ["/b/c/d", 1, None], "b": {"c": "(/x/y z)"}}, {"a": ["…/d", 1, None], "b": {"c": "(…/y z)"}}),
    ],
)
def test_what_is_told_to_others_has_no_passwords_and_no_folders(said: Any, kept: Any) -> None:
    assert redacted(said) == kept


def is_there(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return status not in "ZX"


def test_a_cancelled_job_ends_with_all_that_it_started(storage: str, tmp_path: Path) -> None:
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "slow"}, key).id
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"), kwargs={"seconds": HELD})
    worker.start()
    child = tmp_path / "home" / "jobs" / number / "child"
    wait_until(lambda: submissions.get(number).study)
    submissions.cancel(number)
    worker.join(30)
    assert worker.exitcode == 0
    assert submissions.get(number).state == "cancelled"
    assert not is_there(int(child.read_text()))


def test_one_that_does_not_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_process, "STOP_S", 0.5)
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "stubborn"}, key).id
    assert run_jobs(storage, tmp_path / "home", lambda: submissions.get(number).study is not None) == 0
    job = submissions.get(number)
    assert (job.state, job.attempt) == ("queued", 0)  # handed back, as the worker was asked to stop
    assert not is_there(int(runs(tmp_path, number)[0][0]))


def test_a_job_whose_worker_is_killed_is_run_again_by_another(storage: str, tmp_path: Path) -> None:
    submissions, key = queue(storage, seconds=HELD)
    number = submissions.submit({**SETTINGS, "name": "slow"}, key).id
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"), kwargs={"seconds": HELD})
    worker.start()
    wait_until(lambda: submissions.get(number).study)
    first = int(runs(tmp_path, number)[0][0])
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    wait_until(lambda: not is_there(first))  # its standard input is closed
    again = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"), kwargs={"seconds": HELD})
    time.sleep(1.2 * HELD)
    again.start()
    wait_until(lambda: len(runs(tmp_path, number)) == 2)
    submissions.cancel(number)
    again.join(30)
    assert submissions.get(number).attempt == 2
    assert states(submissions, number) == ["queued", "running", "running", "running", "cancelled"]
    one, other = ([word for word in words[1:] if word != "1"] for words in runs(tmp_path, number))
    assert one == other  # the same command, which resumes


def test_a_process_ends_at_once_where_its_job_is_another_workers(storage: str, tmp_path: Path) -> None:
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "stubborn"}, key).id
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"), kwargs={"seconds": HELD})
    worker.start()
    wait_until(lambda: submissions.get(number).study)
    with looked_into(storage) as connection:
        connection.execute(text("UPDATE submission SET worker = 'another', attempt = 2, expires = 1e12"))
    worker.join(job_process.STOP_S / 2)
    assert worker.exitcode == 0
    assert not is_there(int(runs(tmp_path, number)[0][0]))
    assert (submissions.get(number).state, submissions.get(number).worker) == ("running", "another")


def test_a_process_ends_while_its_worker_is_stopped_and_is_started_again_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_process, "SIGN_S", 0.1)
    monkeypatch.setattr(jobs, "SILENCE_S", 1.0)  # as in the process
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "watched"}, key).id
    stop = FORK.Event()
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home", stop.is_set), kwargs={"once": False})
    worker.start()
    assert worker.pid is not None
    wait_until(lambda: submissions.get(number).study)
    time.sleep(1.5)
    first = int(runs(tmp_path, number)[0][0])
    assert is_there(first)
    os.kill(worker.pid, signal.SIGSTOP)
    wait_until(lambda: not is_there(first))
    time.sleep(0.5)
    os.kill(worker.pid, signal.SIGCONT)
    wait_until(lambda: len(runs(tmp_path, number)) == 2)
    stop.set()
    worker.join(30)
    assert (submissions.get(number).state, submissions.get(number).attempt) == ("queued", 0)
    assert states(submissions, number) == ["queued", "running", "queued", "running", "queued"]


def test_a_study_that_another_drives_is_waited_for(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "seed": 1}, key).id
    dead = submissions.claim("another-host/x/1/1")
    assert dead is not None
    submissions.progress(dead, {"told": 0}, study="s")
    leases = Leases(Database(storage), "s")
    leases.create()
    leases.drive("another-host/x/2/1")
    run_out(storage)
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"))
    worker.start()
    wait_until(lambda: submissions.get(number).attempt == 2)
    time.sleep(1.0)
    assert runs(tmp_path, number) == []
    leases.leave("another-host/x/2/1")
    worker.join(30)
    assert submissions.get(number).state == "succeeded"
    assert leases.drive("anybody") is None


def test_two_jobs_of_one_study_are_run_one_after_the_other(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit({**SETTINGS, "name": "second"}, key).id
    leases = Leases(Database(storage), "driven twice")
    leases.create()
    leases.drive("another-host/x/2/1")
    worker = FORK.Process(target=run_jobs, args=(storage, tmp_path / "home"))
    worker.start()
    wait_until(lambda: submissions.get(number).study == "driven twice")
    time.sleep(0.7)
    assert len(runs(tmp_path, number)) == 1
    leases.leave("another-host/x/2/1")
    worker.join(30)
    assert (submissions.get(number).state, submissions.get(number).attempt) == ("succeeded", 1)


def test_a_worker_from_the_command_line_hands_its_job_back_on_a_signal(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    submissions, key = queue(storage)
    number = submissions.submit(SETTINGS, key).id
    words = [*jobs.COMMAND, "worker", "--jobs", "--home", str(tmp_path)]
    environment = {**os.environ, STORAGE: storage, "OMP_NUM_THREADS": "1"}
    worker = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    wait_until(lambda: submissions.get(number).state == "running")
    worker.send_signal(signal.SIGTERM)
    _, said = worker.communicate(timeout=60)
    assert worker.returncode == 0
    assert f"job {number}: queued" in said
    assert (submissions.get(number).state, submissions.get(number).attempt) == ("queued", 0)
    for words in (["worker"], ["worker", "--jobs", "--study", "s"]):
        result = CliRunner().invoke(app, words, env={STORAGE: storage})
        assert result.exit_code == 2
        assert "takes --study NAME to try its trials, or --jobs" in " ".join(result.output.split())
