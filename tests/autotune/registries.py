"""Profiles to register, and a server to register them with, for every test of the registry."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

from autotune.profiles import Profiles
from autotune.registered import Version
from autotune.registry import Registry
from autotune.store import Database
from btp.plan import Plan, Stage
from btp.profile import DeviceKey, ModelIdentity, Profile, Workload

LATENCY = {"value": 0.5, "low": 0.4, "high": 0.6}
CERTIFIED = {"certified": True, "reasons": [], "margin": 0.02, "latency": LATENCY, "limit": 0.7}
UNCERTIFIED = {**CERTIFIED, "certified": False, "reasons": ["it may be no faster than dense", "the guard is broken"]}

KERNEL = {"dtype": "float32", "attention": "sdpa"}
SIZE = {"batch_size": 1, "image_tokens": 16, "prompt_tokens": 24}
SOFTWARE = {"driver": "", "cuda": "", "torch": "2.13.0", "transformers": "5.23.0"}
PROFILE = Profile(
    plan=Plan(stages=(Stage(layer=0, keep=0.5),)),
    model=ModelIdentity(architecture="Tiny", num_layers=4, hidden_size=8, num_image_tokens=16),
    workload=Workload(**KERNEL, **SIZE),
    device=DeviceKey(name="cpu", threads=1, **SOFTWARE, **KERNEL, **SIZE),
)


def save_profile(
    path: Path, layer: int, device: str = "cpu", num_layers: int = 4, certificate: Any = None, **evidence: Any
) -> Path:
    replace(
        PROFILE,
        plan=Plan(stages=(Stage(layer=layer, keep=0.5),)),
        model=replace(PROFILE.model, num_layers=num_layers),
        device=replace(PROFILE.device, name=device),
        evidence={**evidence, **({"certificate": certificate} if certificate else {})},
    ).save(path)
    return path


def register(registry: Registry, name: str, profile: Path, **changes: Any) -> Version:
    arguments: dict[str, Any] = {
        "name": name,
        "profile_path": profile,
        "evidence": {},
        "tags": {"seed": "3"},
        "metrics": {"prefill_ms": 12.5},
        "params": {"layer": "2"},
        "experiment": name,
    }
    return registry.register(**arguments | changes)


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of an MLflow server that hands artifacts through, as docker-compose.yml starts it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    options = [f"--port={port}", "--host=127.0.0.1", "--workers=1", "--serve-artifacts"]
    stores = [f"--backend-store-uri=sqlite:///{folder}/server.db", f"--artifacts-destination={folder}/served"]
    command = [sys.executable, "-m", "mlflow", "server", *options, *stores]
    with (
        (folder / "server.log").open("wb") as log,
        subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True) as process,
    ):
        try:
            _wait_until_healthy(address)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def _wait_until_healthy(address: str) -> None:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=2):
                return
        except (urllib.error.URLError, TimeoutError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def register_and_die(
    address: str, name: str, profile: Path, finalists: dict[str, dict[str, float | str]], late: bool = False
) -> None:
    """A registration that is killed when its runs are made, and its version is not; or late, before it is candidate."""
    registry = Registry(address)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if late:
        registry._store.client.set_registered_model_alias = die  # type: ignore[method-assign]
    else:
        registry._store.make_model = die  # type: ignore[method-assign]
    register(registry, name, profile, finalists=finalists)


def promote_together(address: str, storage: str, name: str, number: int, start: Barrier) -> None:
    """One of several processes that promote at the same moment, each another version."""
    profiles = Profiles(Registry(address), Database(storage))
    version = profiles.find(f"models:/{name}/{number}")
    start.wait(60)
    profiles.promote(version, who=f"racer {number}", why="first come")


def promote_and_die(address: str, storage: str, name: str, number: int) -> None:
    """A promotion that is killed when the log is written, and the alias does not follow any more."""
    registry = Registry(address)
    registry.point = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    profiles = Profiles(registry, Database(storage))
    profiles.promote(profiles.find(f"models:/{name}/{number}"), who="the victim", why="to be killed")
