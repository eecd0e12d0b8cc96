"""The HTTP service as its users meet it: real servers on real databases, and everything that can be wrong."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine

from autotune import objective
from autotune.profiles import Profiles
from autotune.registered import RegistryError
from autotune.registry import Registry
from autotune.server import Settings, create_app, limits, service
from autotune.server.limits import origin
from autotune.store import Database, Key, Keys, StoreError, Submissions
from autotune.submitted import Place
from benchmarks.replayed_worker import open_study, work
from btp.profile import Profile
from tests.autotune.registries import CERTIFIED, UNCERTIFIED, register, save_profile
from tests.autotune.services import OUTCOME, SETTINGS, caller, key_of, serving, wait_until, working

JSON = "application/json"
NOBODY = "0" * 32
MODEL = "tiny"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a service with a study, a registry, and folders for models and data."""
    folder = tmp_path_factory.mktemp("service")
    for name in ("models/mine", "data", "out/model"):
        (folder / name).mkdir(parents=True)
    (folder / "data" / "questions.jsonl").write_text("")
    (folder / "models" / "out").symlink_to(folder / "out" / "model")
    open_study(storage_of(folder), "replayed", 14, "qmc")
    work(storage_of(folder), "replayed", 0.0, lambda: False)
    registry = Registry(f"sqlite:///{folder / 'mlflow.db'}")
    latency = {"ratio": {"value": 0.5, "low": 0.4, "high": 0.6}, "ms": {"value": 5.0, "low": 4.0, "high": 6.0}}
    latency |= {"metric": "prefill", "quantile": "p50", "dense_ms": 10.0}
    for layer, certificate in enumerate((CERTIFIED, CERTIFIED, UNCERTIFIED)):
        saved = save_profile(folder / "profile.json", layer, certificate=certificate, latency=latency)
        register(registry, MODEL, saved)
    return folder


def storage_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


@pytest.fixture(scope="module")
def url(home: Path) -> Iterator[str]:
    with serving(storage_of(home), home, f"--models={home / 'models'}", f"--data={home / 'data'}") as (address, _):
        yield address


@pytest.fixture
def anybody(url: str, home: Path) -> Iterator[httpx2.Client]:
    """With a key for everything, of this test alone."""
    with caller(url, key_of(storage_of(home), name=f"anybody {uuid.uuid4().hex}")) as client:
        yield client


def assert_problem(response: httpx2.Response, status: int, *said: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail"} <= set(problem)
    assert problem["status"] == status
    for words in said:
        assert words in problem["detail"]
    return problem


def test_the_server_imports_nothing_that_tunes() -> None:
    code = (
        "import sys, autotune.server, autotune.cli\n"
        "print([name for name in ('torch', 'transformers', 'optuna', 'ray', 'mlflow', 'scipy') if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


TEMPLATES = [
    ("GET", "/v1/jobs"),
    ("POST", "/v1/jobs"),
    ("GET", "/v1/jobs/{job}"),
    ("GET", "/v1/jobs/{job}/events"),
    ("POST", "/v1/jobs/{job}/cancel"),
    ("GET", "/v1/studies"),
    ("GET", "/v1/studies/{study}"),
    ("GET", "/v1/studies/{study}/front"),
    ("GET", "/v1/profiles"),
    ("GET", "/v1/profiles/best"),
    ("GET", "/v1/profiles/{name}/aliases/{alias}"),
    ("GET", "/v1/profiles/{name}/versions/{version}"),
    ("GET", "/v1/profiles/{name}/promotions"),
    ("POST", "/v1/profiles/{name}/promotions"),
    ("POST", "/v1/profiles/{name}/rollbacks"),
]
WORDS = {"job": NOBODY, "study": "s", "name": "m", "alias": "a", "version": "1"}
ROUTES = [(method, template.format(**WORDS)) for method, template in TEMPLATES]
PLAIN = [("GET", "/openapi.json"), ("GET", "/metrics")]


def test_every_route_is_looked_at_here(anybody: httpx2.Client) -> None:
    """So that a new one cannot be left open."""
    paths = anybody.get("/openapi.json").json()["paths"]
    declared = {(method.upper(), path) for path, methods in paths.items() for method in methods}
    assert declared == {*TEMPLATES, ("GET", "/healthz")}


def test_nothing_is_open_without_a_good_key_but_the_health(home: Path) -> None:
    storage = storage_of(home)
    revoked, over = key_of(storage, name="revoked"), key_of(storage, name="over", expires_s=0.01)
    Keys(Database(storage)).revoke("revoked")
    wrong = [{}, {"Authorization": "Bearer"}, {"Authorization": "Basic YTpi"}, {"Authorization": "Bearer btp_x_y"}]
    wrong += [{"Authorization": f"Bearer {key}"} for key in (revoked, over)]
    app = create_app(Settings(storage=storage, place=place(home), failed_rate="1000/second"))
    with TestClient(app) as client:
        for method, path in [*ROUTES, *PLAIN, ("GET", "/nowhere")]:
            for headers in wrong:
                response = client.request(method, path, headers=headers)
                assert_problem(response, 401, "a key must come along")
                assert response.headers["www-authenticate"] == "Bearer"
        assert client.get("/healthz").json() == {"status": "ok"}


def place(home: Path) -> Place:
    return Place(home=home, registry=f"sqlite:///{home / 'mlflow.db'}")


def test_a_key_goes_no_further_than_its_scopes(url: str, home: Path) -> None:
    needed = {"POST /v1/jobs": "submit", f"POST /v1/jobs/{NOBODY}/cancel": "submit or promote"}
    needed |= {f"POST /v1/profiles/m/{what}": "promote" for what in ("promotions", "rollbacks")}
    for own in ("read", "submit", "promote"):
        with caller(url, key_of(storage_of(home), own, name=f"only {own}")) as client:
            for method, path in [*ROUTES, *PLAIN]:
                scope = needed.get(f"{method} {path}", "read")
                sent = {"json": {}} if method == "POST" and not path.endswith("cancel") else {}
                response = client.request(method, path, **sent)
                if own in scope.split(" or "):
                    assert response.status_code not in (401, 403)
                else:
                    assert_problem(response, 403, f"must have {scope} among them, got {own}")


@pytest.mark.parametrize(
    ("method", "path", "sent", "status", "said"),
    [
        ("GET", "/nowhere", {}, 404, "Not Found"),
        ("GET", f"/v1/jobs/{NOBODY}", {}, 404, "there must be a job"),
        ("GET", f"/v1/jobs/{NOBODY}/events", {}, 404, "there must be a job"),
        ("POST", f"/v1/jobs/{NOBODY}/cancel", {}, 404, "there must be a job"),
        ("GET", f"/v1/jobs?after={NOBODY}", {}, 404, "there must be a job"),
        ("GET", "/v1/studies/none", {}, 404, "there must be a study 'none'"),
        ("GET", "/v1/profiles/none/versions/1", {}, 404, "'none'"),
        ("GET", f"/v1/profiles/{MODEL}/aliases/none", {}, 404, "has no alias 'none'"),
        ("GET", "/v1/profiles?name=none", {}, 404, "'none'"),
        ("GET", "/v1/profiles/best?max_latency_ms=0.001", {}, 404, ""),
        ("DELETE", "/v1/jobs", {}, 405, "must be one of GET, POST"),
        ("GET", "/v1/jobs/x", {}, 422, "/path/job"),
        ("GET", "/v1/jobs?limit=0", {}, 422, "/query/limit"),
        ("GET", "/v1/studies/a%00b", {}, 422, "/path/study"),
        ("POST", "/v1/jobs", {"json": {"limit": "fast"}}, 422, "/body/limit"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "trials": 5}}, 422, "/body/trials"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "storage": "x"}}, 422, "/body/storage"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "margin": 0.11}}, 422, "/body/margin"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "seed": "1"}}, 422, "/body/seed"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "name": "-x"}}, 422, "/body/name"),
        ("POST", "/v1/jobs", {"json": {**SETTINGS, "device": "cuda;rm"}}, 422, "/body/device"),
        ("POST", "/v1/jobs", {"content": b"{", "headers": {"content-type": JSON}}, 422, "/body"),
        ("POST", "/v1/jobs", {"content": b"[" * 20000, "headers": {"content-type": JSON}}, 400, "parsing the body"),
        ("POST", "/v1/jobs", {"content": b"\xff", "headers": {"content-type": JSON}}, 400, "parsing the body"),
        ("POST", "/v1/jobs", {"content": b"limit=1", "headers": {"content-type": "text/plain"}}, 415, "text/plain"),
        ("POST", "/v1/jobs", {"content": b"{}"}, 415, "no content type"),
        ("POST", "/v1/jobs", {"content": b" " * 65537, "headers": {"content-type": JSON}}, 413, "65536 bytes"),
        ("POST", f"/v1/profiles/{MODEL}/promotions", {"json": {"version": 9, "why": "w"}}, 404, ""),
        ("POST", f"/v1/profiles/{MODEL}/promotions", {"json": {"version": 1}}, 422, "/body/why"),
        ("POST", f"/v1/profiles/{MODEL}/promotions", {"json": {"version": 1, "why": " "}}, 422, "/body/why"),
        ("POST", f"/v1/profiles/{MODEL}/rollbacks", {"json": {"alias": "latest", "why": "w"}}, 422, "an alias is"),
        ("POST", f"/v1/profiles/{MODEL}/promotions", {"json": {"version": 3, "why": "w"}}, 409, "it is not certified"),
        (
            "POST",
            f"/v1/profiles/{MODEL}/rollbacks",
            {"json": {"alias": "other", "why": "w"}},
            404,
            "has no alias 'other'",
        ),
    ],
)
def test_what_is_wrong_is_a_problem_that_says_so(
    anybody: httpx2.Client, method: str, path: str, sent: dict[str, Any], status: int, said: str
) -> None:
    problem = assert_problem(anybody.request(method, path, **sent), status, said)
    assert ("errors" in problem) == said.startswith("/")  # which says where


def test_a_body_that_comes_in_pieces_is_no_larger_than_another(anybody: httpx2.Client) -> None:
    pieces = (b" " * 8192 for _ in range(9))
    response = anybody.post("/v1/jobs", content=pieces, headers={"content-type": JSON})
    assert_problem(response, 413)
    fits = iter([b'{"limit": ', b'"prefill_p50<=0.7x"', b"}" + b" " * 65000])
    assert anybody.post("/v1/jobs", content=fits, headers={"content-type": JSON}).status_code == 202


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
        "mine/../../out",
    ],
)
def test_no_path_leads_out_of_the_folders(anybody: httpx2.Client, name: str) -> None:
    for files in ({"model": name, "data": "questions.jsonl"}, {"model": "mine", "data": name}):
        assert_problem(anybody.post("/v1/jobs", json={**SETTINGS, **files}), 422, "what lies in the service's folder")
    files = {"model": "mine", "data": "questions.jsonl"}
    assert anybody.post("/v1/jobs", json={**SETTINGS, **files}).status_code == 202
    for half in ({"model": "mine"}, {"data": "questions.jsonl"}):
        assert_problem(anybody.post("/v1/jobs", json={**SETTINGS, **half}), 422, "data must be left out")


def test_a_key_may_ask_so_often_and_an_address_may_fail_so_often(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    busy, idle = key_of(storage, name="busy"), key_of(storage, name="idle")
    with (
        serving(storage, tmp_path, "--rate=5/minute") as (url, _),
        caller(url, busy) as one,
        caller(url, idle) as other,
    ):
        assert [one.get("/v1/jobs").status_code for _ in range(5)] == [200] * 5
        refused = one.get("/v1/jobs")
        assert_problem(refused, 429, "5 per 1 minute")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert other.get("/v1/jobs").status_code == 200
        with caller(url, "btp_0123456789ab_" + "A" * 43) as stranger:
            assert [stranger.get("/v1/jobs").status_code for _ in range(20)] == [401] * 20
            assert_problem(stranger.get("/v1/jobs"), 429)
            assert other.get("/v1/jobs").status_code == 200  # who has a key may have the same address, as by a proxy
            assert stranger.get("/healthz").status_code == 200
        told = subprocess.run(
            [sys.executable, "-m", "autotune.cli", "serve", "--rate=often"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert told.returncode == 2
        assert "--rate must be a number in a time" in told.stderr


def test_who_has_failed_too_often_reaches_the_database_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = storage_of(tmp_path)
    known, unseen = key_of(storage, name="known"), key_of(storage, name="unseen")
    client = TestClient(create_app(Settings(storage=storage, place=place(tmp_path), failed_rate="3/minute")))
    asked: list[str] = []
    find = Keys.find

    def counted(self: Keys, text: str) -> Key | None:
        asked.append(text)
        return find(self, text)

    monkeypatch.setattr(Keys, "find", counted)

    def status(key: str) -> int:
        return client.get("/v1/jobs", headers={"Authorization": f"Bearer {key}"}).status_code

    assert [status(known), *(status("x") for _ in range(5))] == [200, 401, 401, 401, 429, 429]
    assert asked == [known, "x", "x", "x"]
    assert [status(unseen), status(known)] == [429, 200]  # who guesses is not told apart from who has not come before
    Keys(Database(storage)).revoke("known")
    assert [status(known), status(known)] == [429, 429]
    assert asked == [known, "x", "x", "x", known, known]


def test_failed_attempts_are_counted_by_network_and_fill_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert origin("2001:db8:1:2:a::1") == origin("2001:db8:1:2:b::2")
    assert origin("::ffff:10.0.0.1") == origin("10.0.0.1")
    assert len({origin(f"2001:db8:1:{network}::1") for network in range(100)}) > 90
    assert len({origin(f"10.0.0.{host}") for host in range(100)}) > 90
    monkeypatch.setattr(limits, "MAX_ORIGINS", 16)
    assert len({origin(f"10.0.{net}.{host}") for net in range(10) for host in range(100)}) == 16


def test_a_key_may_follow_so_many_at_a_time(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    busy, idle = key_of(storage, name="busy"), key_of(storage, name="idle")
    with serving(storage, tmp_path) as (url, _), caller(url, busy) as one, caller(url, idle) as other:
        path = f"/v1/jobs/{one.post('/v1/jobs', json=SETTINGS).json()['id']}/events"
        with contextlib.ExitStack() as opened:
            for _ in range(8):
                assert opened.enter_context(one.stream("GET", path)).status_code == 200
            refused = one.get(path)
            assert_problem(refused, 429, "8 streams at a time")
            assert int(refused.headers["retry-after"]) > 0
            assert one.get("/v1/jobs").status_code == 200
            with other.stream("GET", path) as another:
                assert another.status_code == 200

        def is_open() -> bool:
            with one.stream("GET", path) as again:
                return again.status_code == 200

        wait_until(is_open)  # once the server has seen that they are gone
        one.post(f"{path.removesuffix('/events')}/cancel")
        assert [one.get(path).status_code for _ in range(10)] == [200] * 10  # what has ended is not open


def test_a_job_is_cancelled_by_its_own_key_or_by_one_that_may_promote(url: str, home: Path) -> None:
    keys = {name: key_of(storage_of(home), *scopes, name=name) for name, scopes in CANCELLERS.items()}
    clients = {name: caller(url, key) for name, key in keys.items()}
    jobs = [clients["owner"].post("/v1/jobs", json=SETTINGS).json()["id"] for _ in range(2)]
    paths = [f"/v1/jobs/{job}/cancel" for job in jobs]
    assert_problem(clients["stranger"].post(paths[0]), 403, "of the key that cancels it", "owner's")
    assert_problem(clients["reader"].post(paths[0]), 403, "submit or promote")
    assert Submissions(Database(storage_of(home))).get(jobs[0]).state == "queued"
    assert [clients["owner"].post(paths[0]).status_code, clients["promoter"].post(paths[1]).status_code] == [202, 202]
    assert {Submissions(Database(storage_of(home))).get(job).state for job in jobs} == {"cancelled"}
    for client in clients.values():
        client.close()


CANCELLERS = {"owner": ["submit"], "stranger": ["submit", "read"], "reader": ["read"], "promoter": ["promote"]}


def test_pages_of_jobs_lead_to_every_one(anybody: httpx2.Client) -> None:
    ids = [anybody.post("/v1/jobs", json=SETTINGS).json()["id"] for _ in range(5)]
    first = anybody.get("/v1/jobs?limit=3").json()
    second = anybody.get("/v1/jobs", params={"limit": 3, "after": first["next"]}).json()
    assert [job["id"] for job in (*first["jobs"], *second["jobs"])][:5] == ids[::-1]


def test_studies_and_fronts_are_told_from_the_database(anybody: httpx2.Client, home: Path) -> None:
    (listed,) = anybody.get("/v1/studies").json()["studies"]
    assert (listed["name"], listed["num_told"], listed["target"]) == ("replayed", 14, 14)
    assert anybody.get("/v1/studies?after=replayed").json() == {"studies": [], "next": None}
    study = open_study(storage_of(home), "replayed", 14, "qmc")
    best = objective.front(study.told())
    told = anybody.get("/v1/studies/replayed/front").json()["front"]
    assert [(row["name"], row["score"], row["ratio"]) for row in told] == [(t.name, t.score, t.ratio) for t in best]
    assert told[0]["plan"] == best[0].plan.to_dict()
    detail = anybody.get("/v1/studies/replayed").json()
    assert detail["best"] == max(t.score for t in study.told() if t.complete and t.feasible)


def test_profiles_are_found_promoted_and_rolled_back_by_who_holds_the_key(anybody: httpx2.Client, home: Path) -> None:
    listed = anybody.get("/v1/profiles", params={"name": MODEL}).json()["versions"]
    assert [version["version"] for version in listed] == [3, 2, 1]
    assert anybody.get("/v1/profiles/best?max_latency_ms=6").json()["certified"] is True
    path = f"/v1/profiles/{MODEL}"
    for version in (1, 2):
        done = anybody.post(f"{path}/promotions", json={"version": version, "why": "it is good"})
        assert done.status_code == 201, done.text
        assert (done.json()["after"], done.json()["alias"]) == (version, "champion-cpu")
    named = anybody.get(f"{path}/aliases/champion-cpu").json()
    assert named["version"] == 2
    copy = home / "copy.json"
    copy.write_text(json.dumps(named["profile"]))
    assert Profile.load(copy).digest == named["sha256"]
    assert anybody.get(f"{path}/versions/2").json()["profile"] == named["profile"]
    back = anybody.post(f"{path}/rollbacks", json={"alias": "champion-cpu", "why": "it was better"})
    assert (back.status_code, back.json()["before"], back.json()["after"]) == (201, 2, 1)
    log = anybody.get(f"{path}/promotions", params={"alias": "champion-cpu"}).json()["promotions"]
    assert [(row["kind"], row["after"]) for row in log] == [("rollback", 1), ("promote", 2), ("promote", 1)]
    assert [row["who"] for row in log] == [Keys(Database(storage_of(home))).all()[-1].name] * 3


def test_what_is_counted_is_told_to_prometheus(anybody: httpx2.Client) -> None:
    anybody.get("/v1/jobs")
    anybody.get("/nowhere/at/all")
    for method, path in (("GET", f"/v1/jobs/{uuid.uuid4().hex}"), ("GET", f"/v1/studies/{NOBODY}/x"), ("BREW", "/v1")):
        anybody.request(method, path)
    said = anybody.get("/metrics").text
    for line in (
        'autotune_http_requests_total{method="GET",route="/v1/jobs",status="200"}',
        'autotune_http_requests_total{method="GET",route="none",status="404"}',
        'autotune_http_request_duration_seconds_bucket{le="0.1",method="GET",route="/v1/jobs"}',
        'autotune_jobs{state="queued"}',
        "process_resident_memory_bytes",
    ):
        assert line in said
    known = {"none", "/healthz", "/metrics", "/openapi.json", *(template for _, template in TEMPLATES)}
    assert set(re.findall(r'route="([^"]*)"', said)) <= known  # however many paths are made up
    assert set(re.findall(r'method="([^"]*)"', said)) <= {"GET", "POST", "DELETE", "other"}


def test_what_is_away_is_a_503_and_what_nobody_thought_of_a_500_that_tells_nothing(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app = create_app(Settings(storage=storage_of(home), place=Place(home=home, registry="http://127.0.0.1:9")))
    headers = {"Authorization": f"Bearer {key_of(storage_of(home), name='unlucky')}"}
    client = TestClient(app, raise_server_exceptions=False, headers=headers)
    response = client.get("/v1/profiles")
    assert_problem(response, 503, "the registry could not be asked")
    assert int(response.headers["retry-after"]) > 0

    def fail(*_: object, **__: object) -> None:
        raise ValueError("the secret")

    monkeypatch.setattr(Submissions, "page", fail)
    problem = assert_problem(client.get("/v1/jobs"), 500)
    assert "secret" not in problem["detail"]
    assert problem["detail"].split()[-1] in caplog.text

    def away(*_: object) -> None:
        raise StoreError("postgresql://somewhere must be within reach")

    monkeypatch.setattr(Submissions, "get", away)
    response = client.get(f"/v1/jobs/{NOBODY}")
    assert_problem(response, 503, "the database could not be asked; try again")
    monkeypatch.setattr(Keys, "find", away)
    assert_problem(client.get("/v1/jobs"), 503, "the database could not be asked")
    assert "somewhere" not in response.text


@pytest.mark.parametrize(
    ("storage", "hung"),
    [("sqlite", "connections"), ("postgresql", "connections"), ("sqlite", "lock")],
    indirect=["storage"],
)
def test_nobody_is_kept_waiting_for_a_database_that_hangs(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hung: str
) -> None:
    monkeypatch.setattr(service, "PATIENCE_S", 1.0)
    app = create_app(Settings(storage=storage, place=place(tmp_path)))
    headers = {"Authorization": f"Bearer {key_of(storage)}"}
    engine = app.state.service.database.engine
    with TestClient(app, raise_server_exceptions=False, headers=headers) as client:
        with contextlib.ExitStack() as held:
            if hung == "lock":
                held.enter_context(create_engine(storage).connect()).exec_driver_sql("BEGIN IMMEDIATE")
            else:
                for _ in range(4):
                    held.enter_context(engine.connect())
            began = time.monotonic()
            assert_problem(client.get("/v1/jobs"), 503, "the database could not be asked")
            assert time.monotonic() - began < 5
        assert client.get("/v1/jobs").status_code == 200


def test_a_server_that_starts_has_aliases_follow_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, registry = storage_of(tmp_path), Registry(f"sqlite:///{tmp_path / 'mlflow.db'}")
    latency = {"ratio": {"value": 0.5, "low": 0.4, "high": 0.6}, "metric": "prefill", "quantile": "p50"}
    saved = save_profile(tmp_path / "profile.json", 0, certificate=CERTIFIED, latency=latency)
    version = register(registry, MODEL, saved)

    def broken_off(*_: object) -> None:
        raise RegistryError("gone")

    profiles = Profiles(registry, Database(storage))
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "point", broken_off)
        with pytest.raises(RegistryError, match="gone"):
            profiles.promote(version, who="me", why="it is good")
    assert registry.pointed(MODEL, "champion-cpu") is None
    with serving(storage, tmp_path, "--registry=http://127.0.0.1:9"):  # one that is away keeps no server from starting
        pass
    with serving(storage, tmp_path):
        wait_until(lambda: registry.pointed(MODEL, "champion-cpu") == version.version)


def events(client: httpx2.Client, job: str, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
    headers = {"Last-Event-ID": str(after)}
    with client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
        assert response.status_code == 200
        for event in httpx2.EventSource(response):
            yield int(event.id), event.event, json.loads(event.data)


def test_a_job_is_followed_to_its_end_and_from_wherever_one_left_off(storage: str, tmp_path: Path) -> None:
    key = key_of(storage)
    with serving(storage, tmp_path) as (url, _), caller(url, key) as client, working(storage, tmp_path):
        handed_in = client.post("/v1/jobs", json={**SETTINGS, "seed": 25})
        job = handed_in.json()["id"]
        assert handed_in.headers["location"] == f"/v1/jobs/{job}"
        seen = list(events(client, job))
        assert [data["state"] for _, kind, data in seen if kind == "state"] == ["queued", "running", "succeeded"]
        assert [data["told"] for _, kind, data in seen if kind == "progress"][-1] == 25
        assert list(events(client, job, seen[1][0])) == seen[2:]
        assert list(events(client, job, seen[-1][0] + 1000)) == []
        done = client.get(f"/v1/jobs/{job}").json()
        assert (done["state"], done["outcome"]) == ("succeeded", OUTCOME)
        slow = client.post("/v1/jobs", json={**SETTINGS, "name": "slow"}).json()["id"]
        wait_until(lambda: client.get(f"/v1/jobs/{slow}").json()["state"] == "running")
        assert client.post(f"/v1/jobs/{slow}/cancel").status_code == 202
        *_, (_, _, last) = events(client, slow)
        assert last["state"] == "cancelled"


def test_eight_clients_at_once_hand_in_exactly_what_they_mean(storage: str, tmp_path: Path) -> None:
    key = key_of(storage)
    with serving(storage, tmp_path, "--rate=10000/minute") as (url, _):

        def hand_in(number: int) -> list[str]:
            with caller(url, key) as client:
                asked = [("shared", 0), *((f"own-{number}-{each}", each) for each in range(4)), ("shared", 0)]
                answers = [
                    client.post("/v1/jobs", json={**SETTINGS, "seed": seed}, headers={"Idempotency-Key": name})
                    for name, seed in asked
                ]
            assert {answer.status_code for answer in answers} == {202}
            return [answer.json()["id"] for answer in answers]

        with ThreadPoolExecutor(8) as pool:
            ids = [found for each in pool.map(hand_in, range(8)) for found in each]
        with caller(url, key) as client:
            rows = [job["id"] for job in client.get("/v1/jobs?limit=200").json()["jobs"]]
            clash = client.post("/v1/jobs", json={**SETTINGS, "seed": 9}, headers={"Idempotency-Key": "shared"})
            assert_problem(clash, 409, "an idempotency key must stay with its settings")
    assert sorted(rows) == sorted(set(ids))
    assert sorted(Counter(ids).values()) == [1] * 32 + [16]


@pytest.mark.parametrize("storage", ["postgresql"], indirect=True)
def test_a_job_outlives_its_server_and_another_one_goes_on_telling_of_it(storage: str, tmp_path: Path) -> None:
    key, asked, named = key_of(storage), {**SETTINGS, "seed": 40}, {"Idempotency-Key": "mine"}
    with (
        serving(storage, tmp_path) as (one, first),
        serving(storage, tmp_path) as (two, _),
        caller(one, key) as client,
        caller(two, key) as other,
        working(storage, tmp_path),
    ):
        job = client.post("/v1/jobs", json=asked, headers=named).json()["id"]
        seen = []
        with contextlib.suppress(httpx2.TransportError):
            for number, kind, _ in events(client, job):
                seen.append(number)
                if kind == "progress":
                    first.kill()
        assert first.wait(10) == -signal.SIGKILL
        assert other.post("/v1/jobs", json=asked, headers=named).json()["id"] == job  # it is asked again, of another
        rest = list(events(other, job, seen[-1]))
    assert min(number for number, _, _ in rest) > seen[-1]
    assert rest[-1][2]["state"] == "succeeded"


def test_a_server_lets_go_of_those_who_follow_and_ends_well(tmp_path: Path) -> None:
    storage = storage_of(tmp_path)
    key = key_of(storage)
    with serving(storage, tmp_path) as (url, process), caller(url, key) as client:
        job = client.post("/v1/jobs", json=SETTINGS).json()["id"]
        seen: list[Any] = []
        follower = threading.Thread(target=lambda: seen.extend(events(client, job)))
        follower.start()
        time.sleep(1.0)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        follower.join(10)
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
    assert [data["state"] for _, _, data in seen] == ["queued"]  # the stream ended as streams do


def test_a_server_that_cannot_be_started_says_why(tmp_path: Path) -> None:
    def refused(*options: str, **variables: str) -> str:
        command = [sys.executable, "-m", "autotune.cli", "serve", f"--home={tmp_path}", *options]
        ended = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables})
        assert ended.returncode == 2
        return ended.stderr

    with serving(storage_of(tmp_path), tmp_path) as (url, _):
        assert "--host and --port must be free to listen on" in refused(f"--port={url.rpartition(':')[2]}")
    (tmp_path / "no.db").write_text("this is no database")
    assert "must be an SQLite database" in refused("--port=0", AUTOTUNE_STORAGE=f"sqlite:///{tmp_path / 'no.db'}")
