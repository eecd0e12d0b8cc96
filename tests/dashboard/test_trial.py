"""The page of a trial: its numbers against naive ones, and what a browser shows of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from autotune.objective import Told, front
from autotune.pages.accuracy import accuracy_of
from autotune.pages.figures import Range, axis
from autotune.pages.latency import measurements_of
from autotune.pages.schedule import HEIGHT, LABEL_GAP, WIDTH, schedule_of
from autotune.pages.sights import sights_of
from autotune.pages.trial import Subject, trial_page
from autotune.store import Block, Database, Results, Studies
from btp.cost import tokens_per_layer
from btp.intervals import ratio_interval
from btp.plan import Plan, Stage
from tests.dashboard import made_up, sites
from tests.dashboard.pictures import GRID, QUESTIONS, keep_sights, samples_of, seen
from tests.dashboard.sites import Site

STUDY = "größer 60 %"
THREE = Plan(
    stages=(
        Stage(layer=1, keep=0.5, selector="balanced", attention_weight=0.3, oversample=3.7, attention="logits"),
        Stage(layer=2, keep=0.0059, selector="diversity"),
        Stage(layer=21, keep=0.0033, selector="joint", attention_weight=1.0),
    )
)


@pytest.fixture(scope="module")
def told() -> list[Told]:
    return made_up.told_trials(20, 0)


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory,
    told: list[Told],
    open_site: Callable[[Path], AbstractContextManager[Site]],
) -> Iterator[Site]:
    """With one study, pictures for its front and its first trial, and blocks of those on two devices."""
    home = tmp_path_factory.mktemp("trials")
    database = Database(sites.storage_of(home))
    made_up.make_study(database, STUDY, len(told), 0)
    row = Studies(database).get(STUDY)
    assert row is not None
    scope = row.context["scope"]
    keep_sights(database, scope, *(trial.plan for trial in front(told)), told[0].plan)
    here = {
        name: value for name, value in row.context["fits"].items() if name.partition(",")[0] not in ("model", "data")
    }
    for trial in (told[0], front(told)[0]):
        for seed in range(2):
            dense, pruned = pairs(trial.ratio, seed)
            Results(database, scope).measured(here, trial.plan.digest, "prefill_p50<=0.6x", dense, pruned)
        elsewhere = {**here, "name": "NVIDIA H200"}
        Results(database, scope).measured(elsewhere, trial.plan.digest, "prefill_p50<=0.6x", [8.0], [5.0])
    with open_site(home) as opened:
        yield opened


def pairs(ratio: float, seed: int) -> tuple[list[float], list[float]]:
    chance = np.random.default_rng(seed)
    dense = 84 + chance.normal(0, 1.5, 12)
    return dense.tolist(), (dense * ratio * (1 + chance.normal(0, 0.02, 12))).tolist()


def address(site: Site, number: int, other: int | None = None) -> str:
    beside = "" if other is None else f"?other={quote(f'{STUDY}/{other}')}"
    return f"{site.url}/studies/{quote(STUDY)}/trials/{number}{beside}"


# ------------------------------------------------------------------------------------------------------------- numbers


def test_a_schedule_counts_as_the_plan_does_and_labels_lie_apart() -> None:
    drawn = schedule_of(THREE, (), 256, 24)
    assert drawn.counts == tokens_per_layer(THREE, 24, 256)
    assert [stage.tokens for stage in drawn.stages] == [128, 2, 1]
    assert [stage.attention_weight for stage in drawn.stages] == [0.3, None, 1.0]
    assert drawn.stages[0].label == "layer 1 · 50 % · balanced · λ 0.30"
    assert drawn.stages[0].others == "3.7 candidates a slot, attention by logits"
    assert drawn.mean_share == pytest.approx(np.mean(drawn.counts) / 256)
    heights = [stage.y for stage in drawn.stages]
    assert all(below - above >= LABEL_GAP for above, below in pairwise(heights))
    assert all(0 < stage.y < HEIGHT and 0 < stage.x < WIDTH for stage in drawn.stages)
    assert [stage.anchor for stage in drawn.stages] == ["start", "start", "end"]


def test_a_schedule_draws_what_it_is_told_and_says_what_it_is_not() -> None:
    bare = schedule_of(THREE)
    assert (bare.counts, bare.depth_known, bare.num_image_tokens, bare.mean_share) == ((), False, None, None)
    assert [stage.tokens for stage in bare.stages] == [None] * 3
    told = schedule_of(Plan(stages=(Stage(layer=0, keep=0.25),)), (30, 30, 30))
    assert (told.num_image_tokens, told.num_layers, told.stages[0].tokens) == (120, 3, 30)
    dense = schedule_of(Plan(stages=()), (), 256, 4)
    assert dense.words == "Dense: 256 image tokens in every layer."
    assert re.fullmatch(r"M[\d.]+,[\d.]+H\d+", dense.line)


def test_a_blocks_ratio_is_that_of_the_quantiles() -> None:
    key = {"name": "here", "threads": 1}
    blocks = [
        Block(device=key, limit=limit, dense_ms=tuple(dense), pruned_ms=tuple(pruned), measured=0.0)
        for limit in ("prefill_p50<=0.6x", "prefill_p95<=0.6x")
        for dense, pruned in (pairs(0.5, 1), pairs(0.5, 2))
    ]
    own, other = measurements_of(blocks, {**key, "model": "m"}, "prefill_p95<=0.6x", Range(0.5, 0.4, 0.6), 0.6)
    assert (own.is_own, other.is_own) == (True, False)
    for found, share in ((own, 0.95), (other, 0.5)):
        for line, (dense, pruned) in zip(found.blocks, (pairs(0.5, 1), pairs(0.5, 2)), strict=True):
            assert line.ratio == pytest.approx(ratio_interval(dense, pruned, share).value)
            assert line.dots.count("M") == line.num_pairs == 12
        both = [[*first, *second] for first, second in zip(pairs(0.5, 1), pairs(0.5, 2), strict=True)]
        assert found.pooled == pytest.approx(ratio_interval(*both, share).value)
    assert own.scale.low < 0.4 < 0.6 < own.scale.high
    assert own.limit_x == own.scale.at(0.6)
    assert other.limit_x is None
    (far,) = measurements_of(blocks[:1], key, "prefill_p50<=0.6x", None, 0.9)
    assert far.limit_x is None
    assert far.scale.high < 0.9


def test_what_became_of_a_trial_is_said_and_latency_by_its_metric(tmp_path: Path) -> None:
    database = Database(sites.storage_of(tmp_path))
    made_up.make_study(database, STUDY, 1, 0)
    row = Studies(database).get(STUDY)
    assert row is not None
    within = {"ratio": 0.5, "ratio_low": 0.49, "ratio_high": 0.51, "measured": True, "complete": True, "guard": 0.9}
    plain = replace(made_up.told_trials(1, 0)[0], **within, worst_task=0.95)
    for change, said in (
        ({}, "Within the limit, but another trial is as good and no slower."),
        ({"measured": False}, "Within the limit by the latency model; it was not measured."),
        ({"ratio_high": 0.61}, "Perhaps over the limit: its latency may be as high as 0.610 of dense, "),
        ({"ratio_low": 0.61, "ratio_high": 0.62}, "Over the limit: its latency is at least 0.610 of dense, "),
        ({"worst_task": 0.8}, "Below the guard: the worst task keeps 80.0 % of dense, and 90.0 % is needed."),
        ({"complete": False, "num_samples": 32}, "Stopped early: after 32 samples it surely could not enter"),
        ({"number": 0}, "On the front: "),
    ):
        told = replace(plain, **{"number": 1, **change})
        (side,) = trial_page([Subject(study=row, told=told, told_in_study=[plain, told], blocks=())], None).sides
        assert side.verdict.startswith(said)
    other = replace(row, settings={**row.settings, "limit": "ttft_p95<=50ms"})
    sides = [Subject(study=study, told=plain, told_in_study=[plain], blocks=()) for study in (row, other)]
    facts = {fact.label: fact.texts for fact in trial_page(sides, None).facts}
    assert (facts["Prefill, ms"], facts["Time to first token, ms"]) == (("42.0", "–"), ("–", "42.0"))


def test_a_devices_newest_blocks_are_shown() -> None:
    key = {"name": "here"}
    blocks = [
        Block(device=key, limit="prefill_p50<=0.6x", dense_ms=(10.0,), pruned_ms=(5.0 + n,), measured=0.0)
        for n in range(20)
    ]
    (found,) = measurements_of(blocks, {}, "prefill_p50<=0.6x", None, 0.6)
    assert [line.number for line in found.blocks] == list(range(9, 21))
    assert (found.num_older, found.blocks[-1].ratio) == (8, 2.4)


def test_differences_are_paired_where_they_are_told_and_never_of_stopped_trials(told: list[Told]) -> None:
    dense = {**made_up.DENSE["by_task"], "macro": made_up.DENSE["score"]}
    stopped = next(trial for trial in told if not trial.complete)
    found = accuracy_of([told[0], stopped], dense)
    assert [line.task for line in found.lines] == [*sorted(made_up.TASKS), "macro"]
    for line in found.lines:
        first, second = line.marks
        assert first is not None
        assert second is not None
        assert first.minus_dense == Range(*told[0].minus_dense[line.task])
        assert second.minus_dense is None
        assert first.y < second.y
    assert accuracy_of([stopped], {}).scale is None


def test_an_axis_has_room_for_all_and_round_ticks() -> None:
    for low, high in ((0.0, 1.0), (0.601, 0.6011), (-3.2, 17.0), (5.0, 5.0)):
        found = axis((low, high), 10, 110)
        assert 10 < found.at(low) <= found.at(high) < 110
        assert 3 <= len(found.ticks) <= 8
        steps = np.diff([value for value, _ in found.ticks])
        assert np.allclose(steps, steps[0])


def covered(path: str, x: float, y: float) -> bool:
    boxes = re.findall(r"M([\d.]+),([\d.]+)H([\d.]+)V([\d.]+)H\1Z", path)
    return any(float(left) < x < float(right) and float(top) < y < float(end) for left, top, right, end in boxes)


def test_what_is_darkened_is_what_was_dropped() -> None:
    plan = Plan(stages=(Stage(layer=0, keep=0.6), Stage(layer=3, keep=0.2), Stage(layer=5, keep=0.0)))
    kept = seen(plan)
    (sight, _) = sights_of(samples_of(), kept)
    (view,) = sight.views
    assert view is not None
    assert [drop.alive for drop in view.drops] == [346, 115, 0]
    assert [view.alive(layer) for layer in (-1, 0, 2, 3, 9)] == [576, 346, 346, 115, 0]
    assert view.words(3) == "115 of 576 image tokens (20 %)"
    alive = set(range(GRID * GRID))
    for drop, stage in zip(view.drops, kept["samples"][0]["stages"], strict=True):
        gone = alive - set(stage["tokens"])
        for index in range(GRID * GRID):
            x, y = (index % GRID + 0.5) * sight.width / GRID, (index // GRID + 0.5) * sight.height / GRID
            assert covered(drop.path, x, y) == (index in gone)
        alive &= set(stage["tokens"])


def test_a_picture_with_thousands_of_tokens_stays_light() -> None:
    plan = Plan(stages=tuple(Stage(layer=layer, keep=1 / (layer + 2)) for layer in range(4)))
    sights = sights_of(samples_of(), seen(plan, grid=54))
    paths = [drop.path for sight in sights for view in sight.views if view for drop in view.drops]
    assert sights[0].views[0] is not None
    assert sights[0].views[0].num_tokens == 2916
    assert len(paths) == 8
    assert sum(map(len, paths)) < 2 * 60_000


def test_what_is_no_picture_is_left_out() -> None:
    samples = samples_of()
    samples["samples"][0]["image"] = "PHN2Zz48L3N2Zz4="
    assert [sight.question for sight in sights_of(samples, seen(THREE))] == [QUESTIONS[1][0]]
    assert sights_of(samples_of(), None) == ()
    assert sights_of(None, seen(THREE)) == ()
    (first, _) = sights_of(samples_of(), None, seen(THREE))
    assert first.views[0] is None


# ------------------------------------------------------------------------------------------------------ in a browser


@pytest.fixture
def page(browser: Browser, site: Site) -> Iterator[Page]:
    with sites.watched(browser, permissions=["clipboard-read", "clipboard-write"]) as opened:
        sites.log_in(opened, site.url, site.reader)
        yield opened


def dark(picture: Locator) -> int:
    return picture.locator("path.drop:not([display])").count()


def test_a_trial_is_told_and_drawn(page: Page, site: Site, told: list[Told]) -> None:
    best = front(told)[0]
    page.goto(address(site, best.number))
    expect(page.get_by_role("heading", level=1)).to_have_text(best.name)
    expect(page.get_by_text("On the front: no other trial beats it")).to_be_visible()
    schedule = page.get_by_role("img", name="Image tokens alive by layer")
    for stage in best.plan.stages:
        expect(schedule.get_by_text(f"layer {stage.layer} · ")).to_be_visible()
    numbers = page.get_by_role("group", name="In numbers")
    expect(numbers).to_contain_text(f"{best.ratio:.3f} [{best.ratio_low:.3f}, {best.ratio_high:.3f}] measured")
    expect(numbers).to_contain_text("288 of 288")
    accuracy = page.get_by_role("group", name="Accuracy by task")
    value, low, high = (f"{100 * part:+.1f}".replace("-", "−") for part in best.minus_dense["macro"])
    expect(accuracy.get_by_role("row").last).to_contain_text(f"{value} [{low}, {high}]")
    blocks = page.get_by_role("group", name="Blocks on made-up")
    expect(blocks.get_by_role("row")).to_have_count(3)
    expect(page.get_by_text("prefill p50 on NVIDIA H200 (not what this study measures)")).to_be_visible()
    expect(page.get_by_role("group", name="Looks of the race")).to_contain_text("96")


def test_the_slider_is_moved_by_keyboard_and_pictures_follow(page: Page, site: Site, told: list[Told]) -> None:
    best = front(told)[0]
    page.goto(address(site, best.number))
    slider, picture = page.get_by_role("slider"), page.locator("svg.picture").first
    slider.focus()
    page.keyboard.press("Home")
    assert dark(picture) == 0
    expect(picture).to_have_attribute("aria-label", re.compile(r"576 of 576 image tokens \(100 %\)$"))
    expect(page.locator("#alive")).to_have_text("before the first layer")
    assert page.locator(".cursor:not([display])").count() == 0
    first = best.plan.stages[0]
    for _ in range(first.layer + 1):
        page.keyboard.press("ArrowRight")
    assert dark(picture) == 1
    (kept, *_) = best.plan.num_kept(GRID * GRID)
    expect(picture).to_have_attribute("aria-label", re.compile(f": {kept} of 576 image tokens"))
    expect(slider).to_have_attribute("aria-valuetext", f"in layer {first.layer}")
    page.keyboard.press("End")
    assert dark(picture) == len(best.plan.stages)
    assert page.locator(".cursor:not([display])").count() == 1
    gone = page.evaluate("performance.now()")
    page.keyboard.press("Home")
    expect(page.locator("#alive")).to_have_text("before the first layer")
    assert page.evaluate("performance.now()") - gone < 100


def test_two_plans_are_shown_beside_each_other(page: Page, site: Site, told: list[Told], shots: Path) -> None:
    best = front(told)[0]
    page.goto(address(site, best.number))
    chooser = page.get_by_label("Hold it against")
    assert chooser.locator("optgroup").evaluate_all("all => all.map(each => each.label)") == [
        "On the front",
        "Fixed plans",
        "Other trials",
    ]
    chooser.select_option(f"{STUDY}/0")
    page.locator("#beside").get_by_role("button", name="Show").click()
    expect(page.get_by_role("heading", level=1)).to_have_text(f"{best.name} beside {told[0].name}")
    expect(page.get_by_text("Over the limit: its latency is at least")).to_be_visible()
    expect(page.locator("svg.picture")).to_have_count(2 * len(QUESTIONS))
    expect(page.locator("svg.picture image")).to_have_count(len(QUESTIONS))  # each picture is sent once
    page.get_by_role("slider").press("End")
    for picture, trial in zip(page.locator("svg.picture").all(), (best, told[0]) * 2, strict=True):
        kept = trial.plan.num_kept(GRID * GRID)[-1]
        expect(picture).to_have_attribute("aria-label", re.compile(f"{re.escape(trial.name)}: {kept} of 576"))
    sites.assert_accessible(page)
    page.screenshot(path=shots / "trial-beside.png", full_page=True)


def test_a_plan_is_copied(page: Page, site: Site, told: list[Told]) -> None:
    page.goto(address(site, 0))
    page.get_by_text("Plan as JSON").click()
    page.get_by_role("button", name="Copy").click()
    expect(page.get_by_text("Copied")).to_be_visible()
    copied = page.evaluate("navigator.clipboard.readText().then(JSON.parse)")
    assert Plan.from_dict(copied) == told[0].plan


def test_a_page_works_without_scripts_and_on_a_phone_in_the_dark(
    browser: Browser, site: Site, told: list[Told], shots: Path
) -> None:
    terms: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with sites.watched(browser, java_script_enabled=False, **terms) as page:
        sites.log_in(page, site.url, site.reader)
        page.goto(f"{address(site, front(told)[0].number)}?layer=-1")
        assert dark(page.locator("svg.picture").first) == 0
        page.get_by_role("slider").press("End")
        page.locator("#layers").get_by_role("button", name="Show").click()
        assert dark(page.locator("svg.picture").first) == len(front(told)[0].plan.stages)
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.screenshot(path=shots / "trial-phone-dark.png", full_page=True)


def test_what_is_not_there_is_said(browser: Browser, site: Site, told: list[Told]) -> None:
    without = next(trial for trial in told if trial.number and trial not in front(told))
    with sites.watched(browser, allowed="404|422") as page:
        sites.log_in(page, site.url, site.reader)
        page.goto(address(site, without.number))
        expect(page.get_by_text("Nothing was kept of what this plan looks at.")).to_be_visible()
        expect(page.get_by_text("No block of this plan was kept.")).to_be_visible()
        for wrong, said in (
            (address(site, 999), "has no finished trial 999"),
            (f"{site.url}/studies/nowhere/trials/0", "there is none"),
            (f"{address(site, 0)}?other=nowhere/0", "there is none"),
            (f"{address(site, 0)}?other=nowhere", "the request must be"),
        ):
            page.goto(wrong)
            expect(page.get_by_role("alert")).to_contain_text(said)
