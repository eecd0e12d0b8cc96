"""A site, and a browser to look at it with, for every test of the dashboard."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.dashboard import sites
from tests.dashboard.sites import Site

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """The one that every test looks at; whoever changes what others look at opens their own."""
    home = tmp_path_factory.mktemp("site")
    sites.fill(home)
    with sites.open_site(home) as opened:
        yield opened


@pytest.fixture(scope="session")
def open_site() -> Callable[..., AbstractContextManager[Site]]:
    """Opens a site of one's own: told the folder, with study.db and mlflow.db in it, and options of the server."""
    return sites.open_site


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    assert chromium, "a browser must be there to look at pages with; apt-get install chromium"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Logged in; a script that fails, and whatever the console complains of, fails the test."""
    with sites.watched(browser) as opened:
        sites.log_in(opened, site.url, site.key)
        yield opened


@pytest.fixture(scope="session")
def shots() -> Path:
    """Where screenshots are kept for who looks at them: in build/screenshots."""
    folder = Path("build/screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
