"""The pages of registered profiles: what they tell, and aliases that are moved from them."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, expect

from autotune.objective import Told, front
from autotune.pages.profile import chosen_of, model_lines, version_line
from autotune.profiles import Profiles
from autotune.registered import NotRegisteredError, RegistryError, Version
from autotune.registry import Registry
from autotune.server import create_app
from autotune.server.dashboard import asking
from autotune.server.dashboard import profiles as profiles_pages
from autotune.server.dashboard.asking import AwayError, LateError, see_through, within_patience
from autotune.server.service import Service, Settings
from autotune.store import Database
from autotune.store.promotions import Promotions
from autotune.submitted import Place
from btp.plan import Plan, Stage
from btp.profile import Profile
from tests.autotune.registries import CERTIFIED, PROFILE, UNCERTIFIED, register
from tests.autotune.services import caller, key_of
from tests.dashboard import made_up, sites
from tests.dashboard.sites import Site

STUDY = "größer 60 %"
NAME, ELSEWHERE = "tiny", "llava-1.5"
FULL: dict[str, Any] = {
    **CERTIFIED,
    "macro": {"value": 0.925, "low": 0.913, "high": 0.935},
    "minus_dense": {"value": -0.004, "low": -0.012, "high": 0.004},
    **{"p": 0.004, "adjusted_p": 0.016, "alpha": 0.05, "num_finalists": 4, "num_pictures": 340},
    "worst_task": "counting",
    "retention": {"value": 0.953, "low": 0.911, "high": 1.0},
    "guard": 0.9,
}
ROWS = [
    {"name": "dense", "macro": {"value": 0.929, "low": 0.92, "high": 0.94}, "by_task": {"counting": 0.8}},
    {"name": "tuned", "macro": FULL["macro"], "by_task": {"counting": 0.76}, "image_gflops": 0.3},
]
WITHIN = 30_000  # ms, for a promotion, which checks every file


def profile_of(plan: Plan, certificate: dict[str, Any], device: str = "cpu", **evidence: Any) -> Profile:
    told = {**evidence, "certificate": certificate, "latency": sites.LATENCY}
    model = replace(PROFILE.model, num_layers=24, num_image_tokens=576)
    return replace(PROFILE, plan=plan, model=model, device=replace(PROFILE.device, name=device), evidence=told)


@pytest.fixture(scope="module")
def best() -> Told:
    """The slowest trial on the front of the study."""
    return front(made_up.told_trials(20, 0))[-1]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, best: Told) -> Path:
    """With a study, and versions of two names: of one, two are certified and the newest is not."""
    folder = tmp_path_factory.mktemp("profiles")
    made_up.make_study(Database(sites.storage_of(folder)), STUDY, 20, 0)
    registry = Registry(f"sqlite:///{folder / 'mlflow.db'}")
    one = Plan(stages=(Stage(layer=1, keep=0.5),))
    papers = {"study": STUDY, "limit": "prefill_p50<=0.6x", "rows": ROWS, "tuned_minus": {"dense": FULL["minus_dense"]}}
    for name, profile in (
        (NAME, profile_of(best.plan, FULL, **papers)),
        (NAME, profile_of(one, CERTIFIED, study="away")),
        (NAME, profile_of(one, UNCERTIFIED)),
        (ELSEWHERE, profile_of(one, UNCERTIFIED, "NVIDIA H200")),
    ):
        profile.save(folder / "profile.json")
        register(registry, name, folder / "profile.json")
    return folder


@pytest.fixture(scope="module")
def site(home: Path, open_site: Callable[[Path], AbstractContextManager[Site]]) -> Iterator[Site]:
    with open_site(home) as opened:
        yield opened


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with sites.watched(browser) as opened:
        sites.log_in(opened, site.url, site.key, "/profiles")
        yield opened


def cells(page: Page, group: str) -> list[list[str]]:
    rows = page.get_by_role("group", name=group, exact=True).locator("tbody tr").all()
    return [[text.strip() for text in row.locator("th, td").all_inner_texts()] for row in rows]


def promote(page: Page, version: int, why: str) -> None:
    page.goto(f"{page.url.partition('/profiles')[0]}/profiles/{NAME}?version={version}")
    form = page.locator("form[action$='/promote']")
    form.get_by_label("Why, for the log").fill(why)
    form.get_by_role("button", name="Promote").click()


def test_names_are_listed_and_filtered(page: Page) -> None:
    listed = cells(page, "Registered profiles")
    assert [row[0] for row in listed] == [ELSEWHERE, NAME]
    assert listed[1][1:3] == ["version 3", "✗ no (2 of 3 versions)"]
    page.get_by_role("searchbox").fill("h200")
    page.get_by_role("button", name="Filter").click()
    assert [row[0] for row in cells(page, "Registered profiles")] == [ELSEWHERE]
    page.get_by_label("certified only").check()
    page.get_by_role("button", name="Filter").click()
    expect(page.get_by_text("Nothing fits the filter.")).to_be_visible()
    page.goto(f"{page.url.partition('?')[0]}?certified=1")
    page.get_by_role("link", name=NAME, exact=True).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(NAME)


def test_a_version_is_told_with_its_certificate_and_its_trial(page: Page, site: Site, best: Told, shots: Path) -> None:
    page.goto(f"{site.url}/profiles/{NAME}?version=1")
    assert [row[0] for row in cells(page, "Versions")] == ["3", "2", "1"]
    page.get_by_role("button", name="Worst task").click()
    assert [row[0] for row in cells(page, "Versions")] == ["1", "3", "2"]  # what is not known comes last
    page.get_by_role("button", name="Version").click()
    assert cells(page, "Versions")[0][2] == "✗ not certified: it may be no faster than dense; the guard is broken"
    expect(page.get_by_text("Certified: as accurate as dense on 340 held-out pictures")).to_be_visible()
    margin = "surely above −2: p = 0.016 must be at most 0.05"
    assert cells(page, "Certificate") == [
        ["Macro accuracy", "0.925 [0.913, 0.935]", "–", "–"],
        ["Difference to dense, points", "−0.4 [−1.2, +0.4]", margin, "✓ yes"],
        ["Worst task, counting, keeps", "95.3 [91.1, 100.0] %", "at least 90.0 %", "✓ yes"],
        ["Latency, of dense", "0.500 [0.400, 0.600]", "upper bound at most 0.700", "✓ yes"],
        ["Faster than dense", "0.600 at most", "below 1", "✓ yes"],
        ["Held-out pictures", "340", "–", "–"],
        ["Finalists that were held against it", "4", "–", "–"],
    ]
    against = [row[:3] for row in cells(page, "What it was held against")]
    assert against == [["dense", "0.929 [0.920, 0.940]", "−0.4 [−1.2, +0.4]"], ["tuned", "0.925 [0.913, 0.935]", "–"]]
    expect(page.get_by_text('btp.prune(model, "models:/tiny/1")')).to_be_visible()
    sites.assert_accessible(page)
    page.screenshot(path=shots / "profile.png", full_page=True)
    page.get_by_role("link", name=f"trial {best.number}").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(best.name)
    page.get_by_role("link", name="tiny version 1").click()
    expect(page.get_by_role("heading", name="Version 1", exact=True)).to_be_visible()


def test_two_versions_are_held_against_each_other(page: Page, site: Site, best: Told) -> None:
    page.goto(f"{site.url}/profiles/{NAME}?version=1")
    page.get_by_label("Hold version 1 against").select_option("version 2")
    page.get_by_role("button", name="Show").click()
    assert "diff=2..1" in page.url
    expect(page.get_by_text("The plans differ")).to_be_visible()
    told = {row[0]: row[1:] for row in cells(page, "Difference")}
    assert told["stage 0"][0].startswith("before 1: keep 0.500 by balanced")
    assert told["stage 0"][1].startswith(f"before {best.plan.stages[0].layer}: keep")
    assert told["its study"] == ["away", STUDY]
    assert "certified" not in told
    page.goto(f"{site.url}/profiles/{NAME}?version=2&diff=2..3")
    expect(page.get_by_text("The plans are the same")).to_be_visible()
    assert {row[0] for row in cells(page, "Difference")} == {"stage 0", "certified", "its study"}


def test_a_version_is_promoted_and_rolled_back(browser: Browser, site: Site, shots: Path) -> None:
    alias = "champion-cpu"
    with sites.watched(browser, allowed="409|422") as page:
        page.set_default_timeout(WITHIN)
        sites.log_in(page, site.url, site.key, "/profiles")
        promote(page, 1, "the first <b>one</b>")
        expect(page.locator("#happened")).to_have_text(f"{alias} names version 1 now, it named nothing before.")
        assert cells(page, "Versions")[2][1] == alias
        expect(page.get_by_text(f'btp.prune(model, "models:/{NAME}@{alias}")')).to_be_visible()
        promote(page, 2, "a better one")
        expect(page.locator("#happened")).to_have_text(f"{alias} names version 2 now, version 1 before.")
        assert [row[1] for row in cells(page, "Versions")] == ["candidate-cpu", alias, "–"]
        promote(page, 3, "whatever")
        expect(page.get_by_role("alert")).to_contain_text(f"Not done. models:/tiny/3 must not be {alias}: it is not")
        expect(page.locator("form[action$='/promote'] [name=why]")).to_have_value("whatever")
        sites.assert_accessible(page)
        page.screenshot(path=shots / "profile-refused.png")
        promote(page, 2, "   ")
        expect(page.get_by_role("alert")).to_contain_text("why must be a text")
        back = page.locator("form[action$='/rollback']")
        expect(back.locator("option")).to_have_text([f"{alias}, to version 1"])
        back.get_by_label("Why, for the log").fill("worse after all")
        back.get_by_role("button", name="Roll back").click()
        expect(page.locator("#happened")).to_have_text(f"{alias} names version 1 now, version 2 before.")
        log = cells(page, "Promotions")
        assert [row[2:5] for row in log] == [["rollback", "2", "1"], ["promote", "1", "2"], ["promote", "–", "1"]]
        assert log[2][5:] == [f"all {site.home.name}", "the first <b>one</b>", "yes"]
    registry = Registry(f"sqlite:///{site.home / 'mlflow.db'}")
    assert Profiles(registry, Database(site.storage)).find(f"models:/{NAME}@{alias}").version == 1


def test_who_may_only_read_is_shown_no_button_and_promotes_nothing(browser: Browser, site: Site) -> None:
    with sites.watched(browser) as page:
        sites.log_in(page, site.url, site.reader, f"/profiles/{NAME}")
        expect(page.get_by_text("To promote takes a key with the scope promote.")).to_be_visible()
        assert page.locator("main form[method=post]").count() == 0
        csrf = page.locator("[name=csrf]").first.input_value()
    form = {"version": "1", "why": "not mine to do", "csrf": csrf, "alias": "mine"}
    with caller(site.url, site.reader) as reader:
        assert reader.post(f"/profiles/{NAME}/promote", data=form).status_code == 403
        assert reader.post(f"/profiles/{NAME}/rollback", data=form).status_code == 403
    with caller(site.url, site.key) as client:  # with everything but the page's own token
        response = client.post(f"/profiles/{NAME}/promote", data=form)
        assert response.status_code == 403
        assert "a form must be of a page of this session" in response.text
    registry = Registry(f"sqlite:///{site.home / 'mlflow.db'}")
    with pytest.raises(NotRegisteredError):
        registry.find(f"models:/{NAME}@mine")


def test_what_is_not_registered_is_said(browser: Browser, site: Site) -> None:
    with sites.watched(browser, allowed="404|422") as page:
        sites.log_in(page, site.url, site.reader, f"/profiles/{NAME}")
        for path, said in (
            ("nowhere", "no profile is registered as 'nowhere'"),
            (f"{NAME}?version=9", "has no version 9; it has: 3, 2, 1"),
            (f"{NAME}?diff=1..9", "has no version 9"),
            (f"{NAME}?diff=1-2", "the request must be"),
        ):
            page.goto(f"{site.url}/profiles/{path}")
            expect(page.get_by_role("alert")).to_contain_text(said)


def test_a_registry_that_is_away_is_said_and_the_log_is_shown(
    browser: Browser, tmp_path: Path, open_site: Callable[..., AbstractContextManager[Site]]
) -> None:
    database = Database(sites.storage_of(tmp_path))
    made_up.make_study(database, STUDY, 12, 0)
    log = Promotions(database, "made 1", "gone", address="http://127.0.0.1:9", made=0.0)
    for before, after in ((None, 1), (1, 2)):
        row = log.write(alias="champion-cpu", kind="promote", before=before, after=after, who="me", why="so")
        log.applied("champion-cpu", row.id)
    with open_site(tmp_path, "--registry=http://tuner:secret@127.0.0.1:9") as site, sites.watched(browser) as page:
        page.set_default_timeout(WITHIN)
        sites.log_in(page, site.url, site.key, "/profiles")
        expect(page.get_by_text("The registry")).to_be_visible()
        assert [row[:4] for row in cells(page, "Promoted, by the log")] == [["gone", "champion-cpu", "2", "me"]]
        page.get_by_role("link", name="gone").click()
        expect(page.get_by_text("This is what the database knows.")).to_be_visible()
        assert [row[3:5] for row in cells(page, "Promotions")] == [["1", "2"], ["–", "1"]]
        page.goto(f"{site.url}/studies/{STUDY.replace('%', '%25')}/trials/0")
        expect(page.get_by_text("Which versions have this plan is not known: the registry")).to_be_visible()
        assert "secret" not in page.content()


# --------------------------------------------------------------------------------------------------- without a browser


def version(**changes: Any) -> Version:
    told = {"name": "a b", "version": 2, "aliases": (), "run_id": "r", "sha256": "s", "uri": "models:/a b/2"}
    return Version(**{**told, "certified": False, "reasons": "", **changes})


def test_mlflow_is_linked_where_it_is_a_server() -> None:
    assert version_line(version(), "http://h:5000/x").mlflow == "http://h:5000/x/#/models/a%20b/versions/2"
    assert version_line(version(), "sqlite:////tmp/mlflow.db").mlflow == ""


def test_champions_are_those_that_have_such_an_alias() -> None:
    there = [version(version=3), version(aliases=("champion-cpu",)), version(version=1, aliases=("candidate-cpu",))]
    (line,) = model_lines(there, "", "", False)
    assert (line.newest.number, line.num_versions, [each.number for each in line.champions]) == (3, 3, [2])
    assert model_lines(there, "", "", True) == []


def test_evidence_that_says_little_is_told_as_far_as_it_goes() -> None:
    plan = Plan(stages=())
    bare = chosen_of(version(), profile_of(plan, {"certified": False, "macro": "high", "limit": None}), "")
    assert bare.claims == ()
    assert bare.verdict == "Not certified: its certificate says so."
    stopped = profile_of(plan, {**UNCERTIFIED, "latency": {"value": 0.9, "low": 0.8, "high": 1.1}, "adjusted_p": 0.2})
    assert [claim.holds for claim in chosen_of(version(), stopped, "").claims] == [False, False]


@pytest.fixture
def service(tmp_path: Path) -> Service:
    place = Place(home=tmp_path, registry=f"sqlite:///{tmp_path / 'mlflow.db'}")
    return Service(Settings(storage=f"sqlite:///{tmp_path / 'study.db'}", place=place))


def fail(error: Exception) -> None:
    raise error


def test_the_registry_is_waited_for_so_long_and_then_left_alone(service: Service) -> None:
    began = time.monotonic()
    with pytest.raises(AwayError, match=r"has not answered within 0\.05 s"):
        within_patience(service, lambda: time.sleep(2), 0.05)
    with pytest.raises(AwayError, match="a moment ago"):
        within_patience(service, lambda: time.sleep(2))
    assert time.monotonic() - began < 1
    assert see_through(service, lambda: "a promotion") == "a promotion"
    assert within_patience(service, lambda: "there again") == "there again"


@pytest.fixture
def held() -> Iterator[threading.Event]:
    """Let go of in the end."""
    event = threading.Event()
    yield event
    event.set()


def test_who_only_looks_keeps_no_promotion_waiting(service: Service, held: threading.Event) -> None:
    for _ in range(2 * asking.ASKERS):
        with pytest.raises(AwayError):
            within_patience(Service(service.settings), held.wait, 0.01)
    assert see_through(service, lambda: "a promotion", 5.0) == "a promotion"


def test_a_promotion_that_could_not_be_begun_in_time_never_is(
    service: Service, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, moved = ThreadPool(1), threading.Event()
    monkeypatch.setattr(asking, "_movers", lambda: one)
    with pytest.raises(LateError, match=r"not over after 0\.05 s; it may still happen; look at the log"):
        see_through(service, held.wait, 0.05)
    with pytest.raises(AwayError, match=r"it was not begun; try again") as refused:
        see_through(service, moved.set, 0.05)
    assert not isinstance(refused.value, LateError)
    held.set()
    one.close()
    one.join()
    assert not moved.is_set()


def test_a_promotion_that_takes_too_long_is_said_to_go_on(
    service: Service, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles_pages, "see_through", lambda service, _: see_through(service, held.wait, 0.05))
    with TestClient(create_app(service.settings)) as client:
        client.post("/login", data={"key": key_of(service.settings.storage)})
        csrf = re.findall(r'name="csrf" value="([0-9a-f]+)"', client.get("/studies").text)[0]
        for form in ("promote", "rollback"):
            sent = {"csrf": csrf, "version": "1", "alias": "champion-cpu", "why": "so"}
            answer = client.post(f"/profiles/{NAME}/{form}", data=sent)
            assert answer.status_code == 503
            assert "It is not over after 0.05 s; it may still happen; look at the log." in answer.text
            assert '<h2 id="log">Promotions</h2>' in answer.text


def test_errors_of_the_registry_are_told_apart(service: Service) -> None:
    with pytest.raises(NotRegisteredError, match="gone"):
        within_patience(service, lambda: fail(NotRegisteredError("gone")))
    with pytest.raises(ZeroDivisionError):
        within_patience(service, lambda: fail(ZeroDivisionError()))
    with pytest.raises(AwayError, match=r"^the registry could not be asked; load the page again$"):
        within_patience(service, lambda: fail(RegistryError("http://me:secret@host is down")))


def test_a_registry_that_never_answers_keeps_no_server_alive() -> None:
    code = (
        "import time\n"
        "from autotune.server.dashboard.asking import AwayError, see_through, within_patience\n"
        "class Service: pass\n"
        "for wait in (within_patience, see_through):\n"
        "    try:\n        wait(Service(), lambda: time.sleep(60), 0.05)\n"
        "    except AwayError:\n        print('away')\n"
    )
    began = time.monotonic()
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=40)
    assert said.stdout == "away\naway\n"
    assert time.monotonic() - began < 30
