"""A site to look at, for every test of the dashboard."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest
from playwright.sync_api import Browser, Page

from tests.dashboard import sites
from tests.dashboard.sites import Site


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


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    """Logged in; a script that fails, and whatever the console complains of, fails the test."""
    with sites.watched(browser) as opened:
        sites.log_in(opened, site.url, site.key)
        yield opened
