"""Who may look at the pages, and how they log in and out."""

from __future__ import annotations

import gzip
import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi.testclient import TestClient
from playwright.sync_api import Browser, Page, expect
from sqlalchemy import select

from autotune.server import Settings, create_app
from autotune.store import Database, Keys
from autotune.store.tables import session
from autotune.submitted import Place
from tests.autotune.services import key_of
from tests.dashboard import sites
from tests.dashboard.sites import MODEL, STUDIES, Site

PAGES = (
    "/",
    "/studies",
    f"/studies/{STUDIES[0]}",
    f"/studies/{STUDIES[0]}/events",
    f"/studies/{STUDIES[0]}/importance",
    f"/studies/{STUDIES[0]}/versions",
    f"/studies/{STUDIES[0]}/trials/0",
    "/profiles",
    f"/profiles/{MODEL}",
    "/dashboard",
    "/dashboard/studies/1",
)
DATA = ("/api/studies", "/api/meta", "/static/bundle.js", "/csv/1", "/favicon.ico", "/nowhere")
FORMS = ("/logout", f"/profiles/{MODEL}/promote", f"/profiles/{MODEL}/rollback")
PROGRAMS = ("/v1/studies", "/v1/jobs", "/metrics", "/openapi.json")


@pytest.fixture
def stranger(site: Site) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=site.url, timeout=30.0, trust_env=False) as client:
        yield client


@pytest.fixture
def known(site: Site, stranger: httpx2.Client) -> httpx2.Client:
    """One who is logged in."""
    assert stranger.post("/login", data={"key": site.key}).status_code == 303
    return stranger


def test_no_page_and_no_data_is_shown_without_a_key(stranger: httpx2.Client) -> None:
    for path in PAGES:
        answer = stranger.get(path)
        assert (answer.status_code, answer.text) == (303, ""), path
        assert answer.headers["location"] == f"/login?next={path.replace('/', '%2F')}"
    for path in DATA:
        assert stranger.get(path).status_code == 401, path
    for path in FORMS:
        assert stranger.post(path, data={"csrf": ""}).status_code == 401, path
    for path in PAGES:
        assert stranger.post(path).status_code == 401


def test_a_cookie_opens_pages_and_nothing_that_programs_ask_for(known: httpx2.Client, site: Site) -> None:
    assert known.get("/studies").status_code == 200
    for path in PROGRAMS:
        assert known.get(path).status_code == 401, path
        assert known.get(path, headers={"Authorization": f"Bearer {site.key}"}).status_code == 200
    sent = {"json": {"version": 1, "why": "because"}}
    assert known.post(f"/v1/profiles/{MODEL}/promotions", **sent).status_code == 401
    for path in ("/%76%31/studies", "//v1/studies", "/v1/../v1/studies"):
        assert known.get(site.url + path).status_code in (401, 404), path


def csrf_of(page: str) -> str:
    found = re.search(r'name="csrf" value="([0-9a-f]{64})"', page)
    assert found is not None
    return found[1]


@pytest.fixture
def storage(tmp_path: Path) -> str:
    return sites.storage_of(tmp_path)


@pytest.fixture
def pair(tmp_path: Path, storage: str) -> Iterator[tuple[TestClient, TestClient]]:
    """Two servers on one database."""
    place = Place(home=tmp_path, registry=f"sqlite:///{tmp_path / 'mlflow.db'}")
    one, other = (TestClient(create_app(Settings(storage=storage, place=place)), follow_redirects=False) for _ in "12")
    with one, other:
        yield one, other


def test_the_cookie_is_a_session_and_not_the_key(pair: tuple[TestClient, TestClient], storage: str) -> None:
    one, other = pair
    key = key_of(storage)
    assert one.post("/login", data={"key": key}).status_code == 303
    assert list(one.cookies) == ["autotune_session"]
    token = one.cookies["autotune_session"]
    assert len(token) >= 40
    assert token not in key
    assert key.split("_", 2)[2] not in token
    for client in pair:
        for path in PROGRAMS:
            assert client.get(path, headers={"Authorization": f"Bearer {token}"}).status_code == 401, path
        assert client.get("/studies", headers={"Authorization": f"Bearer {token}"}).status_code == 303
    as_cookie = other.get("/studies", headers={"Cookie": f"autotune_session={key}"})
    assert as_cookie.headers["location"] == "/login?next=%2Fstudies"
    assert other.get("/studies", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert one.get("/studies").status_code == 200
    with Database(storage).engine.begin() as connection:
        assert connection.execute(select(session.c.hash)).scalars().all() == [_digest(token)]


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


def test_a_session_dies_when_it_is_logged_out(pair: tuple[TestClient, TestClient], storage: str) -> None:
    one, other = pair
    one.post("/login", data={"key": key_of(storage)})
    other.cookies.update(one.cookies)
    csrf = csrf_of(other.get("/studies").text)
    assert one.post("/logout", data={"csrf": csrf}).status_code == 303
    assert (list(one.cookies), list(other.cookies)) == ([], ["autotune_session"])
    assert other.get("/studies").status_code == 303
    assert other.post("/logout", data={"csrf": csrf}).status_code == 401


def test_a_session_is_good_on_every_server_until_its_key_is_revoked(
    pair: tuple[TestClient, TestClient], storage: str
) -> None:
    one, other = pair
    one.post("/login", data={"key": key_of(storage, name="roaming")})
    other.cookies.update(one.cookies)
    pages = [client.get("/studies") for client in pair]
    assert [page.status_code for page in pages] == [200, 200]
    assert csrf_of(pages[0].text) == csrf_of(pages[1].text)
    Keys(Database(storage)).revoke("roaming")
    assert [client.get("/studies").status_code for client in pair] == [303, 303]


def test_a_session_ends_with_its_time_or_its_keys(storage: str) -> None:
    database = Database(storage)
    keys = Keys(database)
    key = keys.find(keys.create("lasting", ["read"]))
    brief = keys.find(keys.create("brief", ["read"], expires_s=0.3))
    assert key is not None
    assert brief is not None
    short, long, of_brief = keys.open_session(key, 0.3), keys.open_session(key, 60), keys.open_session(brief, 60)
    assert [keys.session(token) for token in (short, long, of_brief)] == [key, key, brief]
    time.sleep(0.4)
    assert [keys.session(token) for token in (short, long, of_brief, "", "x")] == [None, key, None, None, None]
    newest = keys.open_session(key, 60)
    with database.engine.begin() as connection:
        kept = set(connection.execute(select(session.c.hash)).scalars())
    assert kept == {_digest(token) for token in (long, of_brief, newest)}
    keys.close_session(long)
    keys.close_session(long)
    assert [keys.session(token) for token in (long, newest)] == [None, key]


def test_a_proxys_own_login_does_not_hide_the_cookie(pair: tuple[TestClient, TestClient], storage: str) -> None:
    one, _ = pair
    one.post("/login", data={"key": key_of(storage)})
    for header in ("Basic bWU6c2VjcmV0", "Negotiate x", ""):
        assert one.get("/studies", headers={"Authorization": header}).status_code == 200
    wrong = one.get("/studies", headers={"Authorization": "Bearer wrong"})
    assert (wrong.status_code, wrong.headers["location"]) == (303, "/login?next=%2Fstudies")


def test_the_cookie_is_kept_from_scripts_and_other_sites(stranger: httpx2.Client, site: Site) -> None:
    plain = stranger.post("/login", data={"key": f" {site.key}\n", "next": "/profiles"})
    assert (plain.status_code, plain.headers["location"]) == (303, "/profiles")
    words = [word.strip().lower() for word in plain.headers["set-cookie"].split(";")]
    assert words[0].startswith("autotune_session=")
    assert {"httponly", "path=/", "samesite=lax", "max-age=43200"} <= set(words)
    assert "secure" not in words
    behind = stranger.post("/login", data={"key": site.key}, headers={"X-Forwarded-Proto": "https"})
    assert "Secure" in behind.headers["set-cookie"]


@pytest.mark.parametrize(
    "elsewhere",
    [
        "//evil.example",
        "https://evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "javascript:alert(1)",
        "/a\nb",
        "",
    ],
)
def test_login_leads_nowhere_but_here(stranger: httpx2.Client, site: Site, elsewhere: str) -> None:
    answer = stranger.post("/login", data={"key": site.key, "next": elsewhere})
    assert (answer.status_code, answer.headers["location"]) == (303, "/")


def test_a_key_that_opens_nothing_is_told_so_and_counted(tmp_path: Path) -> None:
    storage = sites.storage_of(tmp_path)
    good, unseen = key_of(storage, name="good"), key_of(storage, name="unseen")
    place = Place(home=tmp_path, registry=f"sqlite:///{tmp_path / 'mlflow.db'}")
    app = create_app(Settings(storage=storage, place=place, failed_rate="3/minute"))
    with TestClient(app, follow_redirects=False) as client:

        def status(key: str) -> int:
            return client.post("/login", data={"key": key}).status_code

        for _ in range(10):
            assert client.get("/studies").status_code == 303  # who only has no key has not failed
        assert [status(good), *(status("x") for _ in range(4))] == [303, 401, 401, 401, 429]
        assert [status(unseen), status(good)] == [429, 303]
        assert client.get("/studies").status_code == 200
        Keys(Database(storage)).revoke("good")
        assert client.get("/studies").status_code == 429
        refused = client.post("/login", data={"key": "x"})
        assert "<h1>Too Many Requests</h1>" in refused.text
        assert int(refused.headers["retry-after"]) > 0
        over = create_app(Settings(storage=storage, place=place))
        with TestClient(over, follow_redirects=False, cookies=dict(client.cookies)) as again:
            assert again.get("/studies").headers["location"] == "/login?next=%2Fstudies"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 303),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "SELF"}, 303),
    ],
)
def test_a_form_comes_from_a_page_of_this_site(
    known: httpx2.Client, site: Site, headers: dict[str, str], status: int
) -> None:
    headers = {name: site.url if value == "SELF" else value for name, value in headers.items()}
    token = re.search(r'name="csrf" value="([0-9a-f]{64})"', known.get("/studies").text)
    assert token is not None
    for wrong in ("", "0" * 64, token[1][:-1]):
        assert known.post("/logout", data={"csrf": wrong}, headers=headers).status_code == 403
    assert known.post("/logout", data={"csrf": token[1]}, headers=headers).status_code == status
    assert known.post("/login", data={"key": site.key}, headers=headers).status_code == status


def test_the_token_of_a_form_is_of_one_key(known: httpx2.Client, site: Site) -> None:
    own = known.get("/studies").text
    assert known.post("/login", data={"key": site.reader}).status_code == 303
    tokens = [re.findall(r'name="csrf" value="([0-9a-f]+)"', text)[0] for text in (own, known.get("/studies").text)]
    assert tokens[0] != tokens[1]
    assert known.post("/logout", data={"csrf": tokens[0]}).status_code == 403


def test_what_a_form_sends_is_a_form_of_a_bearable_size(known: httpx2.Client) -> None:
    assert known.post("/logout", json={"csrf": ""}).status_code == 415
    assert known.post("/logout", data={"csrf": "x" * 70_000}).status_code == 413


def test_a_key_without_the_right_to_read_sees_no_page(site: Site, stranger: httpx2.Client) -> None:
    only = key_of(site.storage, "submit", name="submits only")
    assert stranger.post("/login", data={"key": only}).status_code == 303
    answer = stranger.get("/studies")
    assert answer.status_code == 403
    assert "must have read among them" in answer.text
    assert "/profiles" in answer.text
    out = stranger.post("/logout", data={"csrf": csrf_of(answer.text)})
    assert (out.status_code, out.headers["location"]) == (303, "/login")
    assert stranger.get("/studies").status_code == 303


def test_errors_of_pages_are_pages_and_those_of_programs_are_problems(known: httpx2.Client, site: Site) -> None:
    for path, status in (
        ("/studies/none", 404),
        ("/studies/a%00b", 422),
        ("/studies?page=0", 422),
        ("/studies/x/y", 404),
    ):
        answer = known.get(path)
        assert answer.status_code == status
        assert answer.headers["content-type"].startswith("text/html")
        assert "<h1>" in answer.text
        assert answer.headers["cache-control"] == "no-store"
    refused = known.delete("/studies")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET")
    assert "<h1>Method Not Allowed</h1>" in refused.text
    problem = known.get("/nowhere")
    assert (problem.status_code, problem.headers["content-type"]) == (404, "application/problem+json")
    assert known.get("/nowhere", headers={"Accept": "text/html"}).headers["content-type"].startswith("text/html")


def test_what_is_asked_for_is_escaped(known: httpx2.Client) -> None:
    text = "<script>alert(1)</script>\"'"
    answer = known.get("/studies", params={"q": text})
    assert "<script>alert" not in answer.text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;" in answer.text
    assert "<script>alert" not in known.get(f"/studies/{text.replace('/', '')}").text


def test_pages_let_in_no_script_of_others(known: httpx2.Client) -> None:
    for path in ("/studies", "/login", "/studies/none"):
        policy = dict(part.split(" ", 1) for part in known.get(path).headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert policy["form-action"] == "'self'"
    page = known.get("/studies").text
    assert not re.search(r"<script(?![^>]*\bsrc=)(?![^>]*application/json)|\son[a-z]+=", page)
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_assets_are_open_compressed_and_kept_where_their_address_names_the_content(stranger: httpx2.Client) -> None:
    page = stranger.get("/login").text
    addresses = re.findall(r'(?:src|href)="(/assets/[^"]+)"', page)
    assert len(addresses) >= 4
    for address in addresses:
        answer = stranger.get(address)
        assert answer.status_code == 200
        assert answer.headers["content-encoding"] == "gzip"
        assert "immutable" in answer.headers["cache-control"]
        bare = stranger.get(address.partition("?")[0], headers={"Accept-Encoding": "identity"})
        assert bare.headers["cache-control"] == "no-cache"
        assert bare.content == answer.content
        again = stranger.get(address, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/assets/none.js", "/assets/LICENSES.md", "/assets/..%2F__init__.py", "/assets/../app.py"):
        assert stranger.get(path).status_code in (401, 404)


def test_pages_are_compressed(known: httpx2.Client) -> None:
    with known.stream("GET", f"/studies/{STUDIES[0]}") as answer:
        assert answer.headers["content-encoding"] == "gzip"
        raw = b"".join(answer.iter_raw())
    assert b"<h1>" in gzip.decompress(raw)


def test_logging_in_and_out(browser: Browser, site: Site, shots: Path) -> None:
    with sites.watched(browser, allowed="status of 401") as page:
        page.goto(f"{site.url}/studies?q=replayed")
        expect(page).to_have_title("Log in · BTP Autotune")
        page.get_by_label("Key").fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("unknown, revoked or over")
        page.screenshot(path=shots / "login.png")
        page.get_by_label("Key").fill(site.reader)
        page.keyboard.press("Enter")
        expect(page).to_have_url(f"{site.url}/studies?q=replayed")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", name="Log in")).to_be_visible()
        page.goto(f"{site.url}/studies")
        expect(page).to_have_title("Log in · BTP Autotune")


@pytest.mark.parametrize("system", ["light", "dark"])
def test_colours_follow_the_system_until_one_chooses(browser: Browser, site: Site, system: Any) -> None:
    other = {"light": "dark", "dark": "light"}[system]
    with sites.watched(browser, color_scheme=system) as page:
        sites.log_in(page, site.url, site.reader)
        before = _background(page)
        page.evaluate(
            "addEventListener('theme', () => {}); document.addEventListener('theme', e => window.told = e.detail)"
        )
        toggle = page.get_by_role("button", name="Dark")
        assert toggle.get_attribute("aria-pressed") == str(system == "dark").lower()
        toggle.click()
        assert page.evaluate("window.told") == other
        chosen = _background(page)
        assert chosen != before
        page.goto(f"{site.url}/profiles")
        assert _background(page) == chosen
        assert page.evaluate("document.documentElement.dataset.theme") == other


def _background(page: Page) -> Any:
    return page.evaluate("getComputedStyle(document.documentElement).backgroundColor")


def test_the_keyboard_reaches_the_content_at_once(page: Page) -> None:
    page.reload()
    page.keyboard.press("Tab")
    skip = page.get_by_role("link", name="Skip to the content")
    expect(skip).to_be_focused()
    box = skip.bounding_box()
    assert box is not None
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
