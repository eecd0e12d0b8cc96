"""The comparison as one file: written by the command, opened where there is no network."""

from __future__ import annotations

import base64
import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, expect

from autotune.objective import front
from autotune.store import Database
from tests.dashboard import sites
from tests.dashboard.made_up import certify, make_study, told_trials

STUDIES = ("seed 0", "größer <60 %>")
NUM_TRIALS = 40
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    for seed, name in enumerate(STUDIES):
        make_study(Database(sites.storage_of(folder)), name, NUM_TRIALS, seed)
    certify(folder, STUDIES[0], front(told_trials(NUM_TRIALS, 0))[-1])
    return folder


def write(home: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "autotune.cli", "report", *words],
        capture_output=True,
        text=True,
        cwd=home,
        env={**os.environ, "OMP_NUM_THREADS": "1", "AUTOTUNE_STORAGE": sites.storage_of(home), **environment},
    )


@pytest.fixture(scope="module")
def report(home: Path) -> Path:
    done = write(home, *STUDIES, "--out=report.html")
    assert (done.returncode, done.stdout, done.stderr) == (0, "report.html\n", "")
    return home / "report.html"


def look(page: Page, report: Path) -> list[str]:
    """Open the file; the list of what it asks for, which goes on to grow."""
    asked: list[str] = []

    def note(request: Request) -> None:
        if not request.url.startswith("data:"):
            asked.append(request.url)

    page.on("request", note)
    page.goto(report.as_uri())
    page.locator("html[data-ready]").wait_for(state="attached")
    return asked


def test_the_file_asks_for_nothing_and_has_the_same_controls(report: Path, browser: Browser, shots: Path) -> None:
    with sites.watched(browser, offline=True) as page:
        asked = look(page, report)
        drawn = "document.getElementById('chart').data.map(t => t.name)"
        assert {*STUDIES, "published", "certified", "dense", "median of 2 seeds, made-up"} <= set(page.evaluate(drawn))
        sites.assert_accessible(page)
        page.screenshot(path=shots / "report.png", full_page=True)
        before = page.locator("#worth").inner_text()
        page.get_by_label("Vertical").select_option("worst")
        page.get_by_label("Horizontal").select_option("cache")
        expect(page.locator("#worth")).not_to_have_text(before)
        page.get_by_role("checkbox", name=STUDIES[1]).uncheck()
        assert STUDIES[1] not in page.evaluate(drawn)
        expect(page.locator("#worth tr")).to_have_count(1)
        page.locator("#fronts button").first.click()
        expect(page.locator("#chosen")).to_contain_text(f"of {STUDIES[0]}")
        expect(page.locator("#chosen a")).to_have_count(0)  # there are no pages to lead to
        with page.expect_download() as saved:
            page.get_by_role("button", name="PNG").click()
        assert saved.value.path().read_bytes().startswith(b"\x89PNG")
        assert [url for url in asked if not url.startswith("blob:")] == [report.as_uri()]
    text = report.read_text(encoding="utf-8")
    assert not re.search(
        r"""(?:src|href)\s*=\s*["'](?!data:|#)""", re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    )


def test_it_tells_how_the_studies_were_asked_and_what_is_certified(home: Path, report: Path, browser: Browser) -> None:
    with sites.watched(browser, java_script_enabled=False) as page:
        page.goto(report.as_uri())
        sheet = page.get_by_role("region", name="Studies")
        for words in ("prefill_p50<=0.6x", "org/made-up-vlm", "84.00 ms", "40 of 40", "float32", "torch device"):
            expect(sheet).to_contain_text(words)
        expect(sheet.get_by_role("row", name="dense, reading")).to_contain_text("0.840")
        expect(page.get_by_role("heading", name="Certificate of models:/made-up/1")).to_be_visible()
        expect(page.get_by_role("main")).to_contain_text(re.compile(r"Written \d{4}-\d\d-\d\d .* by BTP Autotune \d"))
        address = page.get_by_role("button", name="CSV").get_attribute("href") or ""
    rows = list(csv.DictReader(io.StringIO(base64.b64decode(address.partition("base64,")[2]).decode())))
    assert [row["study"] for row in rows] == [name for name in STUDIES for _ in range(NUM_TRIALS)]
    assert [row["trial"] for row in rows if row["versions"] == "models:/made-up/1"] == [
        str(front(told_trials(NUM_TRIALS, 0))[-1].number)
    ]


def test_what_cannot_be_written_is_said(home: Path, tmp_path: Path) -> None:
    for words, storage, said in (
        (["gone", STUDIES[0]], sites.storage_of(home), "has no gone; it has größer <60 %>, seed 0"),
        ([STUDIES[0], f"--out={home}"], sites.storage_of(home), "--out must be a file that can be written"),
        ([STUDIES[0]], sites.storage_of(tmp_path), "there must be a database with studies in it"),
    ):
        done = write(home, *words, AUTOTUNE_STORAGE=storage)
        assert done.returncode == 2
        assert said in done.stderr


def test_a_registry_that_is_away_or_not_there_leaves_the_fronts(home: Path) -> None:
    for registry, said in (
        ("http://tuner:secret@127.0.0.1:9", "The registry could not be asked"),
        (f"sqlite:///{home / 'none.db'}", "There was no registry"),
    ):
        waiting = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        done = write(home, STUDIES[0], "--out=other.html", f"--registry={registry}", **waiting)
        assert done.returncode == 0, done.stderr
        text = (home / "other.html").read_text(encoding="utf-8")
        assert said in text
        assert "secret" not in text
    assert not (home / "none.db").exists()
