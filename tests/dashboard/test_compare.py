"""The page that compares studies, as a browser shows it: what is drawn, told, chosen, exported, and how fast."""

from __future__ import annotations

import csv
import io
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect

from autotune.objective import Told, front
from autotune.pages.fronts import PUBLISHED
from autotune.store import Database, Studies
from tests.autotune.services import caller, wait_until
from tests.dashboard import sites
from tests.dashboard.made_up import DENSE, certify, make_study, told_trials
from tests.dashboard.sites import Site

ALIKE = ("seed 0", "seed 1", "größer 60 %")
ELSEWHERE = "elsewhere"
NUM_TRIALS = 60
ALL = (*ALIKE, ELSEWHERE)
COLOR = """color => {
  const probe = Object.assign(document.createElement("p"), { style: `color: ${color}` });
  document.body.append(probe);
  const computed = getComputedStyle(probe).color;
  probe.remove();
  return computed;
}"""


@pytest.fixture(scope="module")
def best() -> Told:
    """Of the first study; it is registered and certified."""
    return front(told_trials(NUM_TRIALS, 0))[-1]


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, open_site: Callable[[Path], AbstractContextManager[Site]], best: Told
) -> Iterator[Site]:
    """With three studies that differ in seed, one elsewhere with another limit, and a certified plan of the first."""
    home = tmp_path_factory.mktemp("compare")
    database = Database(sites.storage_of(home))
    for seed, name in enumerate(ALIKE):
        make_study(database, name, NUM_TRIALS, seed)
    make_study(database, ELSEWHERE, NUM_TRIALS, 5, limit=0.5, device="another")
    certify(home, ALIKE[0], best)
    with open_site(home) as opened:
        with caller(opened.url, opened.key) as client:
            wait_until(lambda: 'id="late"' not in client.get("/").text)  # the registry has answered once
        yield opened


def address(*studies: str, **view: Any) -> str:
    words = [("study", study) for study in studies] + [
        (k, v) for k, vs in view.items() for v in ([vs] if isinstance(vs, str) else vs)
    ]
    return "/?" + "&".join(f"{name}={quote(value, safe='')}" for name, value in words)


def look(page: Page, site: Site, path: str) -> None:
    page.goto(site.url + path)
    ready(page)


def ready(page: Page) -> None:
    page.locator("html[data-ready]").wait_for(state="attached")


def texts(page: Page, table: str) -> list[list[str]]:
    """A table's cells, row by row, without what only a script or only the server puts in between."""
    rows: list[list[str]] = page.evaluate(
        "id => [...document.getElementById(id).rows].map(row => [...row.cells].map(cell => cell.textContent.trim()))",
        table,
    )
    return rows


def told_by(site: Site, path: str) -> dict[str, list[list[str]]]:
    """What the server writes for an address, before any script."""
    with caller(site.url, site.key) as client:
        text = client.get(path, headers={"Accept": "text/html"}).raise_for_status().text
    found = {}
    for table in ("worth", "fronts", "bands"):
        body = text.partition(f'<tbody id="{table}">')[2].partition("</tbody>")[0]
        rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
        cells = (re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows)
        found[table] = [
            [re.sub(r"<[^>]+>|\s+(?= )", "", cell).strip().replace("&lt;", "<").replace("&#39;", "'") for cell in row]
            for row in cells
        ]
    return found


def traces(page: Page) -> dict[str, int]:
    """How many points each trace has, by name."""
    return dict(
        page.evaluate("document.getElementById('chart').data.filter(t => t.name).map(t => [t.name, t.x.length])")
    )


def test_the_tables_are_there_before_any_script_and_right(site: Site, browser: Browser) -> None:
    with sites.watched(browser, java_script_enabled=False) as page:
        sites.log_in(page, site.url, site.key)
        page.goto(site.url + address(*ALL))
        members = front(told_trials(NUM_TRIALS, 0))
        rows = page.locator("#fronts tr", has_text=ALIKE[0])
        expect(rows).to_have_count(len(members))
        expect(rows.first).to_contain_text(f"{members[0].ratio:.3f} [{members[0].ratio_low:.3f}")
        expect(rows.last).to_contain_text("made-up 1")  # certified
        expect(page.locator("#worth tr")).to_have_count(5)
        expect(page.locator("#worth")).to_contain_text("3 seeds of made-up, prefill_p50<=0.6x, made-up")
        expect(page.get_by_role("link", name=ALIKE[2])).to_have_attribute(
            "href", "/studies/gr%C3%B6%C3%9Fer%2060%20%25"
        )


VIEWS = [
    {"x": x, "y": y, "task": tasks}
    for x in ("latency", "ms", "gflops", "cache")
    for y in ("accuracy", "retention", "worst")
    for tasks in ((), ("reading", "caption"))
]


def test_what_changes_in_the_browser_is_what_the_server_says(site: Site, page: Page) -> None:
    """Fronts, hypervolumes and attainment are worked out twice: by moocore, and by the page's script."""
    look(page, site, address(*ALL))
    page.get_by_text("Tasks, devices, limits").click()
    for view in VIEWS:
        page.get_by_label("Horizontal").select_option(view["x"])
        page.get_by_label("Vertical").select_option(view["y"])
        for task in page.locator("[name=task]").all():
            task.set_checked(task.get_attribute("value") in view["task"])
        path = page.evaluate("location.pathname + location.search")
        assert {name: set(values) for name, values in parse_qs(urlsplit(path).query).items()} == {
            "study": set(ALL),
            **({"x": {view["x"]}} if view["x"] != "latency" else {}),
            **({"y": {view["y"]}} if view["y"] != "accuracy" else {}),
            **({"task": set(view["task"])} if view["task"] else {}),
        }
        page.wait_for_timeout(30)  # the tables come after the picture
        told = told_by(site, path)
        assert len(told["fronts"]) > 10
        assert {table: texts(page, table) for table in told} == told, view


def test_the_address_keeps_what_is_shown_and_back_leads_back(site: Site, page: Page) -> None:
    look(page, site, address(ALIKE[0]))
    page.get_by_label("Vertical").select_option("retention")
    page.get_by_text("Tasks, devices, limits").click()
    page.get_by_label("stopped by racing").check()
    page.get_by_text("Studies: 1 chosen").click()
    page.get_by_role("checkbox", name=ELSEWHERE).check()
    page.get_by_role("button", name="Load the chosen studies").click()
    ready(page)
    assert {ALIKE[0], ELSEWHERE} <= set(traces(page))
    expect(page.get_by_label("Vertical")).to_have_value("retention")
    expect(page.get_by_label("stopped by racing")).to_be_checked()
    page.get_by_label("Horizontal").select_option("ms")
    shown = page.url
    page.reload()
    ready(page)
    assert page.url == shown
    expect(page.get_by_label("Horizontal")).to_have_value("ms")
    page.go_back()
    ready(page)
    assert parse_qs(urlsplit(page.url).query)["study"] == [ALIKE[0]]
    assert ELSEWHERE not in traces(page)
    expect(page.get_by_label("Vertical")).to_have_value("retention")
    page.go_forward()
    ready(page)
    expect(page.get_by_label("Horizontal")).to_have_value("ms")


def test_devices_and_limits_and_studies_can_be_left_out_at_once(site: Site, page: Page) -> None:
    look(page, site, address(*ALL))
    limit = "document.getElementById('chart').layout.annotations.length"
    assert page.evaluate(limit) == 0  # two limits, no line
    page.get_by_text("Tasks, devices, limits").click()
    page.get_by_role("group", name="Devices").get_by_label("made-up").check()
    assert set(ALIKE) <= set(traces(page))
    assert ELSEWHERE not in traces(page)
    assert page.evaluate(limit) == 1
    expect(page.locator("#legend li:visible")).to_have_count(3)
    expect(page.locator("#worth tr")).to_have_count(4)
    page.get_by_role("group", name="Devices").get_by_label("made-up").uncheck()
    page.get_by_role("group", name="Limits").get_by_label("0.5x").check()
    assert ELSEWHERE in traces(page)
    assert ALIKE[0] not in traces(page)
    page.get_by_role("group", name="Limits").get_by_label("0.5x").uncheck()
    page.get_by_text("Studies: 4 chosen").click()
    page.get_by_role("checkbox", name=ALIKE[1]).uncheck()
    assert {ALIKE[0], ALIKE[2], ELSEWHERE} <= set(traces(page))
    assert ALIKE[1] not in traces(page)


def test_what_is_dimmed_or_marked_can_be_hidden(site: Site, page: Page) -> None:
    look(page, site, address(*ALIKE))
    told = [trial for seed in range(3) for trial in told_trials(NUM_TRIALS, seed)]
    published = sum(trial.name in PUBLISHED for trial in told)
    drawn = traces(page)
    assert drawn["published"] == published
    assert drawn["certified"] == drawn["dense"] == 1
    assert sum(count for name, count in drawn.items() if name in (*ALIKE, "others")) + published >= len(told)
    page.get_by_text("Tasks, devices, limits").click()
    stopped = sum(not trial.complete for trial in told)
    page.get_by_label("stopped by racing").check()
    assert traces(page)["others"] == drawn["others"] - stopped
    shapes = page.evaluate("document.getElementById('chart').layout.shapes.length")
    page.get_by_label("confidence bars").check()
    assert page.evaluate("document.getElementById('chart').layout.shapes.length") == shapes - 3  # one a colour
    for label, name in (
        ("certified versions", "certified"),
        ("dense", "dense"),
        ("bands over seeds", "median of 3 seeds, made-up"),
    ):
        assert name in traces(page)
        page.get_by_label(label, exact=True).check()
        assert name not in traces(page)
    page.get_by_label("published plans and controls").check()
    assert "published" not in traces(page)


def test_a_point_is_chosen_by_mouse_or_keyboard_and_leads_to_its_profile(site: Site, page: Page, best: Told) -> None:
    look(page, site, address(ALIKE[0]))
    page.get_by_role("button", name=f"Show {best.name} of").focus()
    page.keyboard.press("Enter")
    panel = page.locator("#chosen")
    expect(panel).to_have_attribute("aria-live", "polite")
    expect(panel.get_by_role("heading")).to_have_text(f"{best.name} of {ALIKE[0]}")
    stage = best.plan.stages[0]
    expect(panel.get_by_role("listitem").first).to_have_text(
        f"before layer {stage.layer}: keep {stage.keep:.2f}, {stage.selector}"
        + (f", lambda {stage.attention_weight:.2f}" if stage.selector in ("joint", "balanced") else "")
    )
    expect(panel).to_contain_text(f"{best.ratio:.3f} [{best.ratio_low:.3f}, {best.ratio_high:.3f}]")
    expect(panel.get_by_role("row", name="reading")).to_contain_text(f"{best.by_task['reading']:.3f}")
    expect(panel.get_by_role("link", name="Trial")).to_have_attribute("href", f"/studies/seed%200/trials/{best.number}")
    assert parse_qs(urlsplit(page.url).query)["point"] == [f"{ALIKE[0]}/{best.number}"]
    page.reload()
    ready(page)
    expect(panel).to_contain_text("Certified: made-up 1")
    panel.get_by_role("link", name="Profile made-up 1").click()
    expect(page).to_have_url(re.compile(r"/profiles/made-up\?version=1"))
    page.go_back()
    ready(page)
    panel.get_by_role("button", name="Close").click()
    expect(panel).to_be_hidden()
    other = next(t for t in told_trials(NUM_TRIALS, 0) if not t.complete)
    click(page, other.ratio, other.score)
    expect(panel).to_be_visible()
    expect(panel).to_contain_text("stopped by racing")


def click(page: Page, x: float, y: float) -> None:
    """On a place of the picture."""
    page.locator("#chart").scroll_into_view_if_needed()
    place = page.evaluate(
        """([x, y]) => {
          const chart = document.getElementById("chart");
          const box = chart.getBoundingClientRect();
          const { xaxis, yaxis } = chart._fullLayout;
          return [box.x + xaxis._offset + xaxis.d2p(x), box.y + yaxis._offset + yaxis.d2p(y)];
        }""",
        [x, y],
    )
    page.mouse.move(place[0] - 1, place[1])
    page.mouse.move(*place)
    page.locator("#chart .hovertext").first.wait_for()
    page.mouse.click(*place)


def test_the_picture_and_its_points_can_be_taken_along(site: Site, page: Page, tmp_path: Path) -> None:
    look(page, site, address(*ALL, x="ms", y="retention"))
    begins = {"PNG": b"\x89PNG", "SVG": b"<svg"}
    for name, begin in begins.items():
        with page.expect_download() as saved:
            page.get_by_role("button", name=name).click()
        assert saved.value.suggested_filename == f"fronts.{name.lower()}"
        content = saved.value.path().read_bytes()
        assert content.startswith(begin)
        if name == "SVG":
            assert all(study.encode() in content for study in ALL)  # in its legend
    with page.expect_download() as saved:
        page.get_by_role("button", name="CSV").click()
    rows = list(csv.DictReader(io.StringIO(saved.value.path().read_text())))
    assert len(rows) == 4 * NUM_TRIALS
    told = told_trials(NUM_TRIALS, 0)
    for row, trial in zip((row for row in rows if row["study"] == ALIKE[0]), told, strict=True):
        assert row["name"] == trial.name
        assert float(row["x"]) == pytest.approx(84 * trial.ratio)
        assert float(row["y"]) == pytest.approx(trial.score / DENSE["score"])
        assert row["on_front"] == str(trial in front(told))


def test_zoom_is_kept_until_it_is_reset(site: Site, page: Page) -> None:
    look(page, site, address(*ALIKE))
    whole = page.evaluate("document.getElementById('chart').layout.xaxis.range")
    box = page.locator("#chart .nsewdrag").first.bounding_box()
    assert box
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 250, steps=4)
    page.mouse.up()
    page.get_by_text("Tasks, devices, limits").click()
    page.get_by_label("stopped by racing").check()
    low, high = page.evaluate("document.getElementById('chart').layout.xaxis.range")
    assert whole[0] < low < high < whole[1]
    page.get_by_role("button", name="Reset the zoom").click()
    low, high = page.evaluate("document.getElementById('chart').layout.xaxis.range")
    assert high - low > 0.9 * (whole[1] - whole[0])


def test_what_cannot_be_shown_is_said(site: Site, browser: Browser, page: Page) -> None:
    look(page, site, address(ALIKE[0], "gone"))
    expect(page.get_by_role("status").filter(has_text="There is no study 'gone'.")).to_be_visible()
    page.goto(site.url + "/?study=")
    expect(page.get_by_text("Studies: 0 chosen")).to_be_visible()
    page.goto(site.url + "/")  # the newest question
    ready(page)
    assert ELSEWHERE in traces(page)
    with sites.watched(browser, allowed="422") as wrong:
        sites.log_in(wrong, site.url, site.key)
        wrong.goto(site.url + "/?x=height")
        expect(wrong.get_by_role("main")).to_contain_text("x must be one of latency, ms, gflops, cache, got 'height'")


def test_a_registry_that_is_away_takes_nothing_else_along(
    browser: Browser,
    tmp_path: Path,
    open_site: Callable[..., AbstractContextManager[Site]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_study(Database(sites.storage_of(tmp_path)), "alone", 20, 0)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with open_site(tmp_path, "--registry=http://tuner:secret@127.0.0.1:9") as away, sites.watched(browser) as page:
        sites.log_in(page, away.url, away.key)
        look(page, away, address("alone"))
        assert "alone" in traces(page)
        notes = page.locator("main .note")
        said = re.compile("^The registry could not be asked for certified versions: ")
        expect(notes).to_have_text(said, timeout=15_000)
        page.wait_for_timeout(2000)  # longer than until the script would ask again
        expect(notes).to_have_text(said)
        look(page, away, address("alone"))
        expect(notes).to_have_text(said, timeout=1)  # at once, as it was learnt a moment ago
        assert "secret" not in notes.inner_text()


def test_while_a_registry_does_not_answer_its_note_stays(
    browser: Browser, tmp_path: Path, open_site: Callable[..., AbstractContextManager[Site]]
) -> None:
    make_study(Database(sites.storage_of(tmp_path)), "alone", 20, 0)
    late = re.compile("^The registry has not answered yet")
    with (
        closing(socket.create_server(("127.0.0.1", 0))) as silent,
        open_site(tmp_path, f"--registry=http://127.0.0.1:{silent.getsockname()[1]}") as away,
        sites.watched(browser, allowed="ERR_FAILED") as page,
    ):
        sites.log_in(page, away.url, away.key)
        look(page, away, address("alone"))
        note = page.locator("#late")
        expect(note).to_have_text(late)
        with page.expect_response(re.compile("study=alone")):  # it has asked again, to no avail
            pass
        expect(note).to_have_text(late)
        page.route("**/*study=alone*", lambda route: route.abort())
        with page.expect_event("requestfailed"):
            pass
        expect(note).to_have_text(late)


def test_the_newest_question_is_shown_however_many_studies_there_are(
    tmp_path: Path, open_site: Callable[..., AbstractContextManager[Site]]
) -> None:
    database = Database(sites.storage_of(tmp_path))
    for number in range(200):
        make_study(database, f"old {number:03}", 2, 0)
    make_study(database, "z", 2, 0, device="another")
    assert [row.name for row in Studies(database).newest(2)] == ["z", "old 199"]
    with open_site(tmp_path) as many, caller(many.url, many.key) as client:
        text = client.get("/").raise_for_status().text
        listed = re.findall(r'name="study" value="([^"]+)"', text)
        assert sorted(listed) == [*(f"old {number:03}" for number in range(1, 200)), "z"]
        assert re.findall(r'name="study" value="([^"]+)"[^>]* checked', text) == ["z"]
        assert "Only the newest 200 studies" in text
        assert {row["study"] for row in csv.DictReader(io.StringIO(client.get("/compare.csv").text))} == {"z"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)])
def test_it_fits_the_screen_in_both_colours(
    site: Site, browser: Browser, shots: Path, scheme: Any, size: tuple[int, int]
) -> None:
    viewport = {"width": size[0], "height": size[1]}
    with sites.watched(browser, viewport=viewport, color_scheme=scheme) as page:
        sites.log_in(page, site.url, site.key)
        look(page, site, address(*ALL, point=f"{ALIKE[0]}/30"))
        back = page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
        drawn = page.evaluate("document.getElementById('chart').layout.paper_bgcolor")
        assert page.evaluate(COLOR, drawn) == back
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        sites.assert_accessible(page)
        page.screenshot(path=shots / f"compare-{scheme}-{size[0]}.png", full_page=True)
        page.get_by_role("button", name="Dark").click()
        other = page.evaluate("document.getElementById('chart').layout.paper_bgcolor")
        assert other != drawn


MEASURE = """async ([name, value]) => {
  const chart = document.getElementById("chart");
  const form = document.getElementById("view");
  const control = form.querySelector(`select[name=${name}], [name=${name}][value="${value}"]`);
  await new Promise((done) => setTimeout(done, 80));
  return new Promise((done) => {
    const began = performance.now();
    let painted = null;
    chart.once("plotly_afterplot", () => (painted = performance.now() - began));
    const filled = new MutationObserver(() => {
      filled.disconnect();
      document.getElementById("fronts").getBoundingClientRect();
      done([painted, performance.now() - began]);
    });
    filled.observe(document.getElementById("fronts"), { childList: true });
    if (control.tagName === "SELECT") control.value = value;
    else control.checked = !control.checked;
    control.dispatchEvent(new Event("change", { bubbles: true }));
  });
}"""


@pytest.mark.alone
def test_2000_trials_in_20_studies_are_painted_within_1_s_and_redrawn_within_100_ms(
    browser: Browser, tmp_path: Path, open_site: Callable[..., AbstractContextManager[Site]]
) -> None:
    names = [f"study {number:02}" for number in range(20)]
    database = Database(sites.storage_of(tmp_path))
    for number, name in enumerate(names):
        make_study(database, name, 100, number, device=f"device {number % 4}")
    hide = ("stopped", "infeasible", "uncertain", "beaten", "published", "certified", "dense", "bars", "bands")
    controls = [("x", x) for x in ("ms", "gflops", "cache", "latency")] + [
        ("y", y) for y in ("retention", "worst", "accuracy")
    ]
    controls += [("hide", name) for name in hide for _ in range(2)] + [("task", "reading"), ("task", "caption")] * 2
    controls += [("device", "device 1")] * 2 + [("study", names[3])] * 2
    with open_site(tmp_path) as large, sites.watched(browser) as page:
        sites.log_in(page, large.url, large.key)
        paints = []
        for _ in range(3):  # the first one loads what the server needs for it
            look(page, large, address(*names))
            paints.append(page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime"))
        assert sum(traces(page).get(name, 0) for name in names) > 100
        took: dict[tuple[str, str], list[tuple[float, float]]] = {}  # until it is drawn, and the tables are filled
        for _ in range(5):
            for control in controls:
                took.setdefault(control, []).append(page.evaluate(MEASURE, list(control)))
    drawn, filled = ({control: [both[end] for both in times] for control, times in took.items()} for end in (0, 1))
    print("first paint, ms:", [round(paint) for paint in paints])
    print("ms, median and worst of", len(next(iter(took.values()))), "or more, until it is")
    for what, times in (("redrawn", drawn), ("redrawn, with its tables filled", filled)):
        print(what, json.dumps({" ".join(c): [round(median(each)), round(max(each))] for c, each in times.items()}))
    assert sorted(paints)[1] < 1000  # the first one waits for the server's imports too
    assert max(median(each) for each in drawn.values()) < 100
    assert max(median(each) for each in filled.values()) < 250  # they follow the picture
