"""The typed client: what it asks again and what not, against a server that fails by script; and the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune import client as clients
from autotune import data, job
from autotune.cli import app
from autotune.client import Client, Event, ServiceError
from autotune.config import DrivenError
from autotune.jobs import COMMAND
from autotune.registry import Registry
from benchmarks.replayed_worker import open_study, work
from btp.errors import ProfileError
from btp.profile import Profile
from tests.autotune.registries import CERTIFIED, PROFILE, register, save_profile
from tests.autotune.services import OUTCOME, SETTINGS, key_of, serving, working

JOB = {
    **{"id": "j", "by": "me", "settings": {}, "state": "queued", "cancel_requested": False, "attempt": 0},
    **{"study": None, "outcome": None, "reason": None, "created": 1.0, "started": None, "finished": None, "new": 1},
}
ROW = {"id": 1, "name": "m", "alias": "a", "kind": "promote", "before": None, "after": 1, "who": "me", "why": "w"}
ROW |= {"at": 1.0, "applied": True}
AWAY = (503, {}, {"title": "Service Unavailable", "status": 503, "detail": "the database could not be asked"})
GONE = "gone"  # the connection breaks off without an answer


class Script(ThreadingHTTPServer):
    """Answers with what comes next; keeps what it was asked."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers, self.asked = list(answers), list[Any]()


class _Handler(BaseHTTPRequestHandler):
    server: Script
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((f"{self.command} {self.path}", dict(self.headers), body))
        answer = self.server.answers.pop(0)
        if answer == GONE:
            self.close_connection = True
            return
        status, headers, said = answer
        sent = said if isinstance(said, bytes) else json.dumps(said).encode()
        kind = "text/event-stream" if isinstance(said, bytes) else "application/json"
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(sent)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(sent)
        self.close_connection = True

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def scripted(*answers: Any) -> Iterator[tuple[Client, Script]]:
    script = Script(*answers)
    thread = threading.Thread(target=script.serve_forever, args=(0.02,))
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{script.server_address[1]}/", "btp_k") as client:
            yield client, script
    finally:
        script.shutdown()
        thread.join()
        script.server_close()
    assert script.answers == []


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(clients, "POLL_S", 0.05)


def test_handing_in_is_asked_again_under_the_same_key_whatever_broke() -> None:
    with scripted(AWAY, GONE, (502, {}, b"<html>"), (202, {}, JOB)) as (client, script):
        assert client.submit(limit="prefill_p50<=0.7x").id == "j"
    assert {path for path, _, _ in script.asked} == {"POST /v1/jobs"}
    assert len({headers["Idempotency-Key"] for _, headers, _ in script.asked}) == 1
    assert {headers["Authorization"] for _, headers, _ in script.asked} == {"Bearer btp_k"}
    assert json.loads(script.asked[-1][2]) == {"limit": "prefill_p50<=0.7x"}


def test_two_jobs_are_handed_in_under_two_keys_unless_one_is_named() -> None:
    with scripted(*[(202, {}, JOB)] * 3) as (client, script):
        for key in (None, None, "mine"):
            client.submit(idempotency_key=key, limit="x")
    keys = [headers["Idempotency-Key"] for _, headers, _ in script.asked]
    assert len(set(keys)) == 3
    assert keys[-1] == "mine"


@pytest.mark.parametrize("answer", [AWAY, GONE, (500, {}, {}), (504, {}, {})])
def test_a_promotion_that_may_have_happened_is_not_asked_for_again(answer: Any) -> None:
    for ask in ("promote", "rollback"):
        with scripted(answer) as (client, _), pytest.raises(ServiceError):
            client.promote("m", 1, why="w") if ask == "promote" else client.rollback("m", "a", why="w")


def test_a_promotion_that_cannot_have_happened_is_asked_for_again_when_the_server_says() -> None:
    busy = (429, {"Retry-After": "1"}, {"detail": "5 per 1 minute are allowed"})
    began = time.monotonic()
    with scripted(busy, (201, {}, ROW)) as (client, script):
        assert asdict(client.promote("a/b", 1, why="w", alias="c")) == ROW
    assert time.monotonic() - began >= 1
    assert script.asked[-1][0] == "POST /v1/profiles/a%2Fb/promotions"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 500])
def test_what_is_refused_is_not_asked_again_and_is_told_with_its_problem(status: int) -> None:
    problem = {"title": "t", "status": status, "detail": "the rule"}
    with scripted((status, {}, problem)) as (client, _), pytest.raises(ServiceError, match=f"{status}: the rule") as e:
        client.job("j")
    assert (e.value.status, e.value.problem) == (status, problem)


def test_a_service_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clients, "ATTEMPTS", 3)
    with scripted(AWAY, AWAY, AWAY) as (client, _), pytest.raises(ServiceError, match="503: the database"):
        client.job("j")
    with Client("http://127.0.0.1:9", "k") as client, pytest.raises(ServiceError, match="within reach") as error:
        client.promote("m", 1, why="w")
    assert error.value.status == 0


def told(*events: tuple[int, str, dict[str, Any]]) -> bytes:
    return "".join(
        f"event: {kind}\ndata: {json.dumps(data)}\nid: {number}\n\n" for number, kind, data in events
    ).encode()


def test_each_event_comes_once_however_often_the_stream_breaks_off() -> None:
    first, second = (3, "state", {"state": "queued"}), (5, "progress", {"told": 1})
    last = (9, "state", {"state": "failed"})
    looked = (200, {}, JOB)
    cut = (200, {"Content-Length": "1000"}, told(first))
    answers = [looked, cut, looked, AWAY, (200, {}, told(second)), looked, GONE, (200, {}, told(last))]
    with scripted(*answers) as (client, script):
        assert list(client.follow("j")) == [
            Event(id=n, kind=kind, data=data) for n, kind, data in (first, second, last)
        ]
    streams = [headers for path, headers, _ in script.asked if path.endswith("/events")]
    assert [headers["Last-Event-ID"] for headers in streams] == ["0", "3", "3", "5", "5"]


def test_one_who_has_seen_the_end_is_not_kept() -> None:
    with scripted((200, {}, {**JOB, "state": "failed"}), (200, {}, b"")) as (client, _):
        assert list(client.follow("j", after=9)) == []


def test_waiting_ends_with_the_job_or_the_time() -> None:
    with scripted((200, {}, JOB), (200, {}, {**JOB, "state": "succeeded"})) as (client, _):
        assert client.wait("j").is_over
    with scripted((200, {}, JOB)) as (client, _), pytest.raises(TimeoutError, match="within 0 s, but is queued"):
        client.wait("j", timeout_s=0)


def test_a_profile_that_was_changed_on_its_way_is_refused() -> None:
    sealed = PROFILE.to_dict()
    changed = {"profile": {**sealed, "evidence": {"x": 1}}, "sha256": sealed["sha256"]}
    with scripted((200, {}, changed)) as (client, _), pytest.raises(ProfileError):
        client.profile("m", "a")
    other = {"profile": sealed, "sha256": "0" * 64}
    with scripted((200, {}, other)) as (client, _), pytest.raises(ProfileError, match="digest that is registered"):
        client.profile("m", "a")
    with scripted((200, {}, {"profile": sealed, "sha256": sealed["sha256"]})) as (client, _):
        assert client.profile("m", "a") == PROFILE


def test_the_client_needs_neither_the_tuner_nor_the_server() -> None:
    code = (
        "import sys, autotune.client\n"
        "heavy = ('fastapi', 'pydantic', 'sqlalchemy', 'optuna', 'mlflow', 'scipy', 'numpy', 'typer', 'torch')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_the_whole_of_the_real_service_is_within_reach(tmp_path: Path) -> None:
    storage, registry = f"sqlite:///{tmp_path / 'study.db'}", Registry(f"sqlite:///{tmp_path / 'mlflow.db'}")
    latency = {"ratio": {"value": 0.5, "low": 0.4, "high": 0.6}, "ms": {"value": 5.0, "low": 4.0, "high": 6.0}}
    for layer in range(2):
        saved = save_profile(
            tmp_path / "profile.json", layer, certificate=CERTIFIED, latency=latency | {"dense_ms": 10.0}
        )
        register(registry, "tiny", saved)
    open_study(storage, "replayed", 14, "qmc")
    work(storage, "replayed", 0.0, lambda: False)
    with serving(storage, tmp_path) as (url, _), working(storage, tmp_path), Client(url, key_of(storage)) as client:
        job = client.submit(**SETTINGS, seed=8)
        assert [event.data["state"] for event in client.follow(job.id) if event.kind == "state"][-1] == "succeeded"
        assert client.wait(job.id, timeout_s=5).outcome == OUTCOME
        others = [client.submit(**SETTINGS, name="slow").id for _ in range(2)]
        assert [each.id for each in client.jobs()] == [*others[::-1], job.id]
        assert [client.cancel(number).id for number in others] == others
        assert {client.wait(number, timeout_s=30).state for number in others} == {"cancelled"}
        assert [study.name for study in client.studies()] == ["replayed"]
        assert client.study("replayed").num_told == 14
        front = client.front("replayed")
        assert [trial.ratio or 0 for trial in front] == sorted(trial.ratio or 0 for trial in front)
        assert [version.version for version in client.profiles("tiny")] == [2, 1]
        assert client.best(6.0).name == "tiny"
        for version in (1, 2):
            assert client.promote("tiny", version, why="it is good").after == version
        assert client.profile("tiny", "champion-cpu").digest == Profile.load(tmp_path / "profile.json").digest
        assert client.rollback("tiny", "champion-cpu", why="it was better").after == 1
        assert [row.kind for row in client.promotions("tiny")] == ["rollback", "promote", "promote"]
        with pytest.raises(ServiceError, match=r"404: .*'none'"):
            client.profile("tiny", "none")


def test_a_job_says_how_far_it_is_in_lines_for_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Done:
        met = reproduced = True

        def to_dict(self) -> dict[str, Any]:
            return {"study": "s", "met": True}

    def run(config: Any, splits: Any, step: Any, pool: Any, opened: Any) -> Done:
        step("loading", 0, 0, None)
        opened("s")
        step("searching", 3, 4, 0.5)
        return Done()

    def said(*options: str) -> list[Any]:
        result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--trials", "6", *options])
        assert result.exit_code == 0, result.output
        return [json.loads(line) for line in result.output.splitlines()]

    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(data, "load_splits", lambda _: {})
    assert said("--progress=none", "--json") == [{"study": "s", "met": True}]
    line = {"event": "progress", "target": 6, "steps": 6 + job.STEPS_AFTER}
    assert said("--progress=jsonl") == [
        {**line, "what": "loading", "told": 0, "done": 0, "best": None, "study": None},
        {**line, "what": "searching", "told": 3, "done": 4, "best": 0.5, "study": "s"},
        {"event": "outcome", "study": "s", "met": True},
    ]


def test_a_job_whose_study_another_drives_says_so_in_a_line_for_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any) -> None:
        raise DrivenError("a study", "host/x/1/2")

    monkeypatch.setattr(job, "run", run)
    monkeypatch.setattr(data, "load_splits", lambda _: {})
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path), "--trials", "6", "--progress=jsonl"])
    assert result.exit_code == 2
    assert json.loads(result.stdout) == {"event": "driven", "study": "a study"}


def test_a_job_ends_with_who_started_it(tmp_path: Path) -> None:
    command = [*COMMAND, "demo", f"--out={tmp_path / 'out'}", "--progress=jsonl", "--until-stdin-closes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["event"] == "progress"
    process.communicate(timeout=60)
    assert process.returncode == 143
