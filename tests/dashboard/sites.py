"""A service with something to look at: studies, a registry, and a key for everything and one to read with."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from autotune.registry import Registry
from benchmarks.replayed_worker import open_study, work
from btp.sealed import sha256_of
from tests.autotune.registries import CERTIFIED, PROFILE, UNCERTIFIED, register, save_profile
from tests.autotune.services import key_of, serving

MODEL = "tiny"
STUDIES = ("replayed-0", "replayed-1", "replayed-2")
LATENCY: dict[str, Any] = {
    "ratio": {"value": 0.5, "low": 0.4, "high": 0.6},
    "ms": {"value": 5.0, "low": 4.0, "high": 6.0},
    "metric": "prefill",
    "quantile": "p50",
    "dense_ms": 10.0,
    "device_key": sha256_of(asdict(PROFILE.device)),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """key: for everything; reader: to look only. storage: the database's address, in the folder home."""

    url: str
    key: str
    reader: str
    storage: str
    home: Path


def storage_of(home: Path) -> str:
    return f"sqlite:///{home / 'study.db'}"


def fill(home: Path) -> None:
    """Three studies of 14 trials that differ in seed, and three versions, two of them certified."""
    for seed, name in enumerate(STUDIES):
        open_study(storage_of(home), name, 14, "random", seed=seed)
        work(storage_of(home), name, 0.0, lambda: False)
    registry = Registry(f"sqlite:///{home / 'mlflow.db'}")
    for layer, certificate in enumerate((CERTIFIED, CERTIFIED, UNCERTIFIED)):
        saved = save_profile(home / "profile.json", layer, certificate=certificate, latency=LATENCY)
        register(registry, MODEL, saved)


@contextmanager
def open_site(home: Path, *options: str) -> Iterator[Site]:
    """A server on what a folder holds. options: of `autotune serve`."""
    storage = storage_of(home)
    key, reader = key_of(storage, name=f"all {home.name}"), key_of(storage, "read", name=f"reader {home.name}")
    with serving(storage, home, "--rate=100000/minute", *options) as (url, _):
        yield Site(url=url, key=key, reader=reader, storage=storage, home=home)


@contextmanager
def watched(browser: Browser, allowed: str = "", **terms: Any) -> Iterator[Page]:
    """A page in a context of its own; what its console or a script says that is wrong fails the test in the end.

    allowed: a pattern of what it may say, as of the status of a page that is to be an error. terms: of the context,
    such as viewport or color_scheme.
    """
    complaints: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        known = allowed and re.search(allowed, message.text)
        if message.type in ("error", "warning") and not known:
            complaints.append(f"{message.type}: {message.text} ({message.location.get('url', '')})")

    context = browser.new_context(**terms)
    page = context.new_page()
    page.on("console", hear)
    page.on("pageerror", lambda error: complaints.append(f"error: {error}"))
    try:
        yield page
    finally:
        context.close()
    assert not complaints, "\n".join(complaints)


def assert_accessible(page: Page) -> None:
    """By axe-core's rules."""
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()


def log_in(page: Page, url: str, key: str, then: str = "/studies") -> None:
    page.goto(f"{url}/login?next={quote(then, safe='')}")
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Log in").click()
    expect(page).not_to_have_url(re.compile("/login"))
