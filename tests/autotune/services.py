"""The service as processes of its own: servers, workers whose jobs take moments, and keys."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from autotune import jobs
from autotune.config import STORAGE
from autotune.store import Database, Keys
from autotune.submitted import Place

REGISTRY = "http://tuner:secret@127.0.0.1:9"
OUTCOME = {"certified": True, "worst": None, "failures": {"p": "no …/y.json"}}
FORK = multiprocessing.get_context("fork")
SETTINGS = {"limit": "prefill_p50<=0.7x"}

# Says what a tuning command would, as the seed has it; a name is for what is not to end well.
FAKE = """
import json, os, signal, subprocess, sys, time
options = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
out, seed, what = options["out"], int(options["seed"]), options.get("name")
os.makedirs(out, exist_ok=True)
with open(os.path.join(out, "runs"), "a") as file:
    print(os.getpid(), *sys.argv[1:], os.environ["HF_HUB_OFFLINE"], file=file)
with open(os.path.join(out, "registry"), "w") as file:
    file.write(os.environ["MLFLOW_TRACKING_URI"])
def told(n):
    print(json.dumps({"event": "progress", "what": "searching", "told": n, "target": seed, "study": "s-" + out[-4:]}))
    sys.stdout.flush()
if what == "broken":
    print("error: the limit must be met, got none; raise it", file=sys.stderr)
    sys.exit(2)
if what == "second" and len(open(os.path.join(out, "runs")).readlines()) == 1:
    print(json.dumps({"event": "driven", "study": "driven twice"}))
    sys.exit(2)
if what == "leaky":
    print(f"error: API request to {os.environ['MLFLOW_TRACKING_URI']}/api failed, see {out}/x.json", file=sys.stderr)
    sys.exit(2)
if what == "crashing":
    raise ValueError("what nobody thought of")
if what == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told(1)
    time.sleep(60)
if what == "watched":
    from autotune.cli import progress
    progress.SILENCE_S = 1.0
    progress.end_with_parent()
    told(1)
    time.sleep(60)
if what == "slow":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    with open(os.path.join(out, "child"), "w") as file:
        print(child.pid, file=file)
    told(1)
    sys.stdin.read()
    sys.exit(143)
for n in range(seed):
    told(n + 1)
    time.sleep(0.05)
print("not a line for a program")
found = {"certified": True, "worst": float("nan"), "failures": {"p": f"no {out}/y.json"}}
print(json.dumps({"event": "outcome", **found, "paths": {"profile": out}}))
sys.exit(1 if what == "missed" else 0)
"""


def wait_until(is_so: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run_jobs(
    storage: str, home: Path, stop: Callable[[], bool] = lambda: False, *, once: bool = True, **terms: Any
) -> int:
    """Be a worker whose jobs are `FAKE`."""
    place = Place(home=home, registry=REGISTRY)
    command = (sys.executable, "-c", FAKE)
    return jobs.work(Database(storage), place, stop, lambda _: None, command=command, once=once, **terms)


@contextmanager
def working(storage: str, home: Path) -> Iterator[None]:
    """With such a worker as a process, which is killed in the end."""
    worker = FORK.Process(target=run_jobs, args=(storage, home), kwargs={"once": False}, daemon=True)
    worker.start()
    try:
        yield
    finally:
        worker.kill()
        worker.join()


@contextmanager
def serving(storage: str, home: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The address of a server, and its process, which is killed in the end."""
    command = [sys.executable, "-m", "autotune.cli", "serve", "--port=0", f"--home={home}", *options]
    environment = {**os.environ, STORAGE: storage, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        said = process.stdout.readline()
        assert said.startswith("serving on http://127.0.0.1:"), process.communicate()[1]
        yield said.split()[-1], process
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def key_of(storage: str, *scopes: str, name: str = "tests", expires_s: float | None = None) -> str:
    """A new key; for everything where no scope is named."""
    return Keys(Database(storage)).create(name, scopes or ("read", "submit", "promote"), expires_s)


def caller(url: str, key: str) -> httpx2.Client:
    """Somebody who comes with a key."""
    return httpx2.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=30.0, trust_env=False)
