"""What the service says of itself in its OpenAPI, held against what it does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from autotune.registry import Registry
from autotune.server import Settings, create_app, jobs
from autotune.store import Keys
from autotune.submitted import REFERENCE, Place
from tests.autotune.registries import CERTIFIED, register, save_profile

MAX_EXAMPLES = 8
CONFIG = """
[[operations]]
include-operation-id = "submitJob"
# A path that is as it must be may still name nothing.
checks.positive_data_acceptance.expected-statuses = [202, 409, 422]

[[operations]]
include-operation-id = ["promoteProfile", "rollBackProfile"]
# An alias that is as it must be may still be none that anybody moves, such as a candidate's.
checks.positive_data_acceptance.expected-statuses = [201, 404, 409, 422]
"""


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of an app that is served by a thread."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    registry = f"sqlite:///{tmp_path / 'mlflow.db'}"
    for layer in range(2):
        profile = save_profile(tmp_path / "profile.json", layer, certificate=CERTIFIED)
        register(Registry(registry), REFERENCE, profile)
    return Settings(
        storage=f"sqlite:///{tmp_path / 'study.db'}",
        place=Place(home=tmp_path, registry=registry),
        rate="1000000/second",
        failed_rate="1000000/second",
    )


def test_nothing_that_the_openapi_allows_or_forbids_breaks_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "STREAM_S", 0.05)  # whoever follows is not held
    monkeypatch.setattr(jobs, "POLL_S", 0.05)
    app = create_app(settings)
    key = Keys(app.state.service.database).create("tests", ["read", "submit", "promote"])
    schema, config = tmp_path / "openapi.json", tmp_path / "schemathesis.toml"
    schema.write_text(json.dumps(app.openapi()))
    config.write_text(CONFIG)
    with running(app) as url:
        command = [
            sys.executable,
            "-m",
            "schemathesis.cli",
            "--config-file",
            str(config),
            "run",
            str(schema),
            "--url",
            url,
        ]
        command += [
            "--header",
            f"Authorization: Bearer {key}",
            "--checks=all",
            f"--max-examples={MAX_EXAMPLES}",
            "--seed=7",
        ]
        command += ["--generation-deterministic", "--no-color", "--continue-on-failure"]
        found = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        counted = httpx2.get(f"{url}/metrics", headers={"Authorization": f"Bearer {key}"}, trust_env=False).text
    assert found.returncode == 0, found.stdout[-20000:] + found.stderr
    seen = set(re.findall(r'requests_total{method="(\w+)",route="([^"]+)",status="(\d+)"}', counted))
    assert {status for _, _, status in seen} >= {"200", "201", "202", "401", "404", "405", "409", "415", "422"}
    assert not [each for each in seen if each[2] >= "500"]
    answered = {f"{method} {route}" for method, route, status in seen if status.startswith("2")}
    assert answered >= {"POST /v1/jobs", "GET /v1/jobs/{job}/events", "GET /v1/profiles/{name}/versions/{version}"}
    assert answered >= {"POST /v1/profiles/{name}/promotions", "POST /v1/jobs/{job}/cancel"}
