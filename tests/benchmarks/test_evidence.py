"""The evidence in small: it runs, resumes and judges by its own numbers; its arithmetic on numbers known before."""

from __future__ import annotations

import copy
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autotune import bench, reference
from autotune.certify import Interval, ScoreTable
from autotune.config import AutotuneError
from autotune.data import from_dataset
from benchmarks import evidence, evidence_report
from benchmarks.evidence_experiments import CROSSED, with_one_selector
from benchmarks.evidence_findings import depth_lines, lambda_lines, variance_shares, weighted_stages
from benchmarks.evidence_goals import OTHERS, TUNER, goals, tried_line
from benchmarks.evidence_pace import Pace
from benchmarks.evidence_plans import CALIBRATED, HAND_SET, ROUNDS, TOLERANCE, brought, presets_of
from btp import presets
from btp.cost import image_token_flops, tokens_per_layer
from btp.plan import Plan, Stage

pytestmark = pytest.mark.timeout(200)

DENSE = image_token_flops([256] * 8, 192, 512)


def formula(plan: Plan) -> float:
    """A device whose latency is counted: FLOPs, and a little for every stage."""
    counts = tokens_per_layer(plan, 8, 256, conditional=False)
    return 0.2 + 0.8 * image_token_flops(counts, 192, 512) / DENSE + 0.01 * len(plan.stages)


class Device:
    """Stands for the measurement, and counts what was measured."""

    def __init__(self) -> None:
        self.measured: Counter[str] = Counter()

    def __call__(
        self, model: Any, inputs: Any, plan: Plan, limit: Any, repeats: int, width: float | None = None, *_: Any
    ) -> tuple[Interval, float]:
        self.measured[plan.digest] += 1
        return Interval(formula(plan), formula(plan) - 0.002, formula(plan) + 0.002), 40.0


@pytest.fixture(scope="module")
def device() -> Device:
    return Device()


@pytest.fixture(scope="module")
def small(device: Device) -> Iterator[None]:
    """Few pictures, one thread, and a device that is a formula."""
    examples = from_dataset(reference.dataset("calibrate"), "calibrate")
    parts = {"calibrate": examples[:6], "select": examples[6:18], "certify": examples[18:36]}  # 1, 2 and 3 pictures
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure_ratio", device)
        patch.setitem(evidence.SUBJECTS, "reference", evidence.Subject(lambda: (str(reference.WEIGHTS), parts), 5))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, device: Device, small: None) -> Path:
    """What one small run wrote."""
    out = tmp_path_factory.mktemp("evidence")
    assert evidence.main(["--small", "--out", str(out), "--commit", "abc"]) == 0
    first = Counter(device.measured)
    next(out.glob("evidence-*.json")).rename(out / "first.json")
    assert evidence.main(["--small", "--out", str(out), "--commit", "abc"]) == 0
    assert device.measured == first, "a second run measures nothing anew"
    return out


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(next(folder.glob("evidence-*.json")).read_text())
    return content


def test_a_second_run_finds_the_same(folder: Path, found: dict[str, Any]) -> None:
    first = json.loads((folder / "first.json").read_text())
    assert {**first, "date": 0, "seconds": 0, "machine": 0} == {**found, "date": 0, "seconds": 0, "machine": 0}
    assert found["commit"] == "abc"
    assert {"command", "machine", "versions", "device", "key", "model_digest", "data_digests"} <= found.keys()


def test_every_plan_is_judged_at_the_limit(found: dict[str, Any]) -> None:
    (at,) = found["limits"]
    rows = {row["name"]: row for row in at["rows"]}
    assert list(rows) == ["dense", *evidence.SMALL_SYSTEMS, "tuned, seed 0", "learned"]
    for name in ("btp_paper", HAND_SET, "random", "uniform", "learned"):
        assert rows[name]["reached"]
        assert 0.6 * (1 - TOLERANCE) <= formula(Plan.from_dict(rows[name]["plan"])) <= 0.6
    assert formula(Plan.from_dict(rows["vtw"]["plan"])) <= 0.6
    assert [stage["keep"] for stage in rows["vtw"]["plan"]["stages"]] == [0.0]
    tuned = rows["tuned, seed 0"]
    assert formula(Plan.from_dict(tuned["plan"])) + 0.002 <= 0.6
    assert len(at["studies"][0]["trials"]) == 8


def test_the_champion_is_the_best_on_select_and_not_a_control(found: dict[str, Any]) -> None:
    (study,) = found["limits"][0]["studies"]
    able = [t for t in study["trials"] if t["feasible"] and t["complete"] and t["name"] not in ("random", "uniform")]
    chosen = next(t for t in able if t["name"] == study["champion"])
    assert chosen["score"] == max(t["score"] for t in able)
    assert chosen["plan"] == next(r["plan"] for r in found["limits"][0]["rows"] if r["kind"] == "tuned")


def test_the_raw_scores_give_the_accuracies_and_differences(found: dict[str, Any]) -> None:
    at = found["limits"][0]
    tasks = found["tasks"].split()
    table = ScoreTable(found["pictures"].split(), tasks)
    scores = {row["name"]: [float(word) for word in row["scores"].split()] for row in at["rows"]}
    assert found["num_questions"] == len(tasks) == 6 * found["num_pictures"] == 18
    for row in at["rows"]:
        means = {t: np.array(scores[row["name"]])[np.array(tasks) == t].mean() for t in set(tasks)}
        assert row["by_task"] == pytest.approx(means, abs=1e-4)
        assert row["macro"]["value"] == pytest.approx(np.mean(list(means.values())), abs=1e-4)
        value = row["macro"]["value"] - next(r["macro"]["value"] for r in at["rows"] if r["name"] == HAND_SET)
        assert row["minus_hand_set"]["value"] == pytest.approx(value)
    for name, minus in at["minus"]["tuned"].items():
        naive = at["tuned"]["macro"]["value"] - next(r["macro"]["value"] for r in at["rows"] if r["name"] == name)
        assert minus["value"] == pytest.approx(naive, abs=1e-4)
        paired = table.difference(scores["tuned, seed 0"], scores[name])
        assert (minus["low"], minus["high"]) == pytest.approx((paired.low, paired.high), abs=1e-3)


def test_the_page_says_what_the_numbers_say(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / "evidence.md").read_text()
    for row in found["limits"][0]["rows"]:
        assert f"| {row['title']} |" in page
    assert all(f"**{evidence_report.VERDICTS[goal.met]}**: {goal.text}" in page for goal in goals(found, []))
    assert tried_line(found) in page
    assert "1 searches of 8 trials" in page
    for picture in ("evidence-front.png", "evidence-lambda.png"):
        assert f"({picture})" in page
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_what_is_written_by_hand_stays(folder: Path) -> None:
    page = folder / "evidence.md"
    by_hand = "<!-- judgement -->\nThe second limit is \\1 hard.\n<!-- /judgement -->"
    before = page.read_text()
    page.write_text(before.replace(evidence_report.NO_JUDGEMENT, by_hand))
    assert evidence.main(["--small", "--report-only", "--out", str(folder)]) == 0
    assert page.read_text() == before.replace(evidence_report.NO_JUDGEMENT, by_hand)


def test_a_report_without_numbers_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(["--report-only", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")]) == 2
    assert "leave out --report-only" in capsys.readouterr().err
    assert not (tmp_path / "docs").exists()


def share_plan(keep: float) -> Plan:
    return Plan(stages=(Stage(layer=1, keep=min(1.0, max(0.0, keep))),))


@pytest.mark.parametrize("wrong_by", [0.8, 1.0, 1.3])
def test_a_wrong_model_is_corrected_by_measuring(wrong_by: float) -> None:
    def measure(plan: Plan) -> Interval:
        value = wrong_by * plan.stages[0].keep ** 1.1
        return Interval(value, value, value)

    found = brought(share_plan, 0.6, measure)
    assert found.reached
    assert 0.6 * (1 - TOLERANCE) <= found.measured.value <= 0.6
    assert measure(found.plan) == found.measured
    assert len(found.rounds) <= ROUNDS


def test_what_moves_by_steps_stays_under_the_limit() -> None:
    def measure(plan: Plan) -> Interval:
        value = math.ceil(plan.stages[0].keep * 5) / 5 - 0.05
        return Interval(value, value, value)

    found = brought(share_plan, 0.6, measure)
    assert not found.reached
    assert found.measured.value == pytest.approx(0.55)
    never = brought(share_plan, 0.6, lambda plan: Interval(0.7, 0.7, 0.7))
    assert not never.reached
    assert never.measured.value == 0.7


def test_presets_are_every_system_with_its_calibration() -> None:
    found = presets_of(8, (1, 3, 5), 4)
    assert set(found) == {*presets.SYSTEMS, CALIBRATED} - {"dense"}
    assert [s.layer for s in found["btp_paper"].stages] == [s.layer for s in found["random"].stages] == [1, 3, 5]
    assert [s.layer for s in found[CALIBRATED].stages] == [1, 3, 5]
    assert found[HAND_SET] == presets.btp_released(8)
    assert [s.layer for s in found["vtw"].stages] == [4]


def test_swapping_the_selector_leaves_the_counts() -> None:
    plan = Plan(stages=(Stage(layer=0, keep=0.5, selector="max_sum"), Stage(layer=4, keep=0.0, selector="uniform")))
    swapped = with_one_selector(plan, "joint")
    assert [s.selector for s in swapped.stages] == ["joint", "uniform"]
    assert tokens_per_layer(swapped, 8, 256) == tokens_per_layer(plan, 8, 256)
    assert {"random", "uniform"}.isdisjoint(CROSSED)


def test_variance_is_split_as_it_was_put_in() -> None:
    rng = np.random.default_rng(0)
    row, column = rng.normal(size=4), rng.normal(size=5)
    row, column = row - row.mean(), column - column.mean()
    mixed = np.outer(row, column)
    table = 3 + row[:, None] + 2 * column[None, :] + mixed
    scores = {f"{i}": {f"{j}": float(table[i, j]) for j in range(5)} for i in range(4)}
    parts = np.array([5 * (row**2).sum(), 4 * 4 * (column**2).sum(), (mixed**2).sum()])
    assert list(variance_shares(scores).values()) == pytest.approx(parts / parts.sum())
    assert list(variance_shares(scores)) == ["schedule", "selector", "both together"]
    assert set(variance_shares({"a": {"x": 1.0, "y": 1.0}}).values()) == {0.0}


def interval(value: float, half: float = 0.01) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half}


def made_up(above_hand_set: float, above_other: float, kept: float, hand_set_kept: float) -> dict[str, Any]:
    """Raw numbers of one limit, with nothing but what the goals read."""

    def row(name: str, kind: str, retention: float) -> dict[str, Any]:
        title = name.upper()
        return {"name": name, "title": title, "kind": kind, "worst_task": "reading", "retention": interval(retention)}

    minus = {"dense": interval(-0.01), HAND_SET: interval(above_hand_set), "fastv": interval(above_other)}
    rows = [row("dense", "dense", 1.0), row(HAND_SET, "published", hand_set_kept), row("fastv", "published", 0.9)]
    rows.append(row("tuned, seed 0", "tuned", kept))
    tuned = {"worst_task": "counting", "retention": interval(kept)}
    return {"limits": [{"limit": 0.5, "rows": rows, "tuned": tuned, "minus": {"tuned": minus, "tuned, seed 0": minus}}]}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (made_up(0.05, 0.0, 0.96, 0.9), [True, True, True]),
        (made_up(0.05, -0.001, 0.96, 0.9), [False, True, True]),
        (made_up(0.029, 0.1, 0.96, 0.9), [True, False, True]),
        (made_up(0.05, 0.1, 0.95, 0.9), [True, True, False]),
        (made_up(0.05, 0.1, 1.0, 1.0), [True, True, True]),
    ],
)
def test_goals_are_held_against_the_numbers(found: dict[str, Any], expected: list[bool]) -> None:
    assert [goal.met for goal in goals(found, [])] == [*expected, None]


def test_three_points_with_an_interval_over_zero_are_not_enough() -> None:
    found = made_up(0.05, 0.1, 0.96, 0.9)
    found["limits"][0]["minus"]["tuned"][HAND_SET] = interval(0.05, 0.06)
    goal = goals(found, [])[1]
    assert goal.met is False
    assert "the interval holds zero" in goal.told[0]


def test_goals_tell_by_how_much_they_are_missed() -> None:
    above_all, above_hand_set, worst, _ = goals(made_up(0.01, -0.02, 0.9, 0.9), [])
    assert "FASTV is above it: tuned minus it is -2.0" in above_all.told[0]
    assert "0 of 1 seeds" in above_all.told[0]
    assert "2.0 points short" in above_hand_set.told[0]
    assert "5.0 too much" in worst.told[0]


def test_every_limit_counts_and_the_tightest_alone_for_the_three_points() -> None:
    wide, tight = made_up(0.0, 0.1, 0.96, 0.9), made_up(0.05, 0.1, 0.96, 0.9)
    wide["limits"][0]["limit"] = 0.8
    both = {"limits": [*wide["limits"], *tight["limits"]]}
    assert [goal.met for goal in goals(both, [])[:3]] == [True, True, True]
    spoilt = copy.deepcopy(both)
    spoilt["limits"][0]["minus"]["tuned"]["fastv"] = interval(-0.01)
    assert [goal.met for goal in goals(spoilt, [])[:3]] == [False, True, True]


@pytest.mark.parametrize(
    ("reached", "met"), [([10, 40, 400], True), ([10, 41, 41], False), ([None, None, 5], False), ([None, 7, 8], True)]
)
def test_hypervolume_is_read_from_the_search_benchmark(reached: list[int | None], met: bool) -> None:
    raced = {"trials_to_target": reached}
    search = {
        "device": "a CPU",
        "spaces": {"whole": {"searchers": {name: {"raced": raced} for name in (TUNER, *OTHERS)}}},
    }
    goal = goals(made_up(0.05, 0.1, 0.96, 0.9), [search])[3]
    assert goal.met is met
    assert f"{sum(number is not None and number <= 40 for number in reached)} of 3 seeds" in goal.told[0]


def plan_row(name: str, kind: str, stages: list[Stage]) -> dict[str, Any]:
    return {"name": name, "kind": kind, "plan": Plan(stages=tuple(stages)).to_dict()}


def test_lambda_is_read_from_stages_that_have_one() -> None:
    first = [
        Stage(layer=0, keep=0.9, selector="max_sum"),
        Stage(layer=2, keep=0.5, selector="joint", attention_weight=0.3),
        Stage(layer=4, keep=0.2, selector="attention", attention_weight=0.1),
        Stage(layer=6, keep=0.0, selector="joint"),
    ]
    falls = [Stage(layer=1, keep=0.5, selector="joint", attention_weight=0.4), Stage(layer=5, keep=0.1, selector="dpp")]
    falls.append(Stage(layer=7, keep=0.05, selector="balanced", attention_weight=0.2))
    rows = [plan_row("tuned, seed 0", "tuned", first), plan_row("learned", "learned", falls)]
    found = {"num_layers": 8, "limits": [{"limit": 0.5, "rows": rows}]}
    stages = weighted_stages(found)
    assert [(s.set_by, s.depth, s.weight) for s in stages] == [
        ("tuned", 0.0, 0.0),
        ("tuned", 0.25, 0.3),
        ("tuned", 0.5, 1.0),
        ("learned", 0.125, 0.4),
        ("learned", 0.875, 0.2),
    ]
    paper, tuned, learned, _ = lambda_lines(found)
    assert "0.6, 0.8, 1." in paper
    assert "0.15 (of 2), 1.00 (of 1), no stage" in tuned
    assert "rank correlation with depth +1.00" in tuned
    assert "rises in 1, falls in 0 and stays in 0 of the 1" in tuned
    assert "too few different stages" in learned
    assert "rises in 0, falls in 1" in learned


def test_depth_is_where_a_task_does_without_image_tokens_for_good() -> None:
    without = {0: (0.5, 0.0, 0.2), 1: (0.96, 0.0, 0.5), 2: (0.9, 0.96, 0.6), 3: (0.97, 1.0, 0.7)}
    tasks = ("existence", "attribute", "reading")
    found = {
        "depth": {
            "num_layers": 4,
            "dense": dict.fromkeys(tasks, 1.0),
            "without": {str(layer): dict(zip(tasks, values, strict=True)) for layer, values in without.items()},
        }
    }
    existence, attribute, reading = depth_lines(found)
    assert existence.endswith("before layer 3")  # layer 1 was chance
    assert attribute.endswith("before layer 2")
    assert reading.endswith("needs them to the end: dropping all before layer 3 of 4 leaves 70.0 %")


def test_the_time_left_falls_to_nothing_and_kept_steps_do_not_speed_it_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("benchmarks.evidence_pace.time.monotonic", lambda: now[0])
    lines: list[str] = []
    pace = Pace(Counter(trial=3, row=1), lines.append)
    guessed = pace.seconds_left
    pace("trial", "kept")
    assert pace.seconds_left < guessed
    now[0] += 10.0
    pace("trial", "twice as long as guessed")
    assert pace.seconds_left == pytest.approx(2 * (5.0 + 12.0))
    pace("trial", "kept")
    pace("row", "kept")
    assert pace.seconds_left == 0.0
    assert len(lines) == 5


def test_the_options_are_of_the_model(small: None) -> None:
    given = evidence._arguments(["--limits", "0.7,0.4"])
    config, splits, options = evidence._of("reference", given)
    assert config.model == str(reference.WEIGHTS)
    assert (options.limits, options.seeds, options.trials) == ((0.7, 0.4), (0, 1, 2, 3, 4), 40)
    assert len(splits["certify"]) == 18
    assert options.steps["trial"] == 2 * 5 * 40
    assert options.steps["row"] == 2 * (1 + len(presets.SYSTEMS) + 5 + 1)
    with pytest.raises(SystemExit):
        evidence._arguments(["--models", "gpt"])


def test_a_study_without_a_feasible_plan_is_told_the_way_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.evidence_plans.finalists", lambda *_: [])
    config, splits, options = evidence._of("reference", evidence._arguments(["--small", "--out", str(folder)]))
    with pytest.raises(AutotuneError, match="raise the limit or the number of trials"):
        evidence.gather(config, splits, options, Pace(options.steps, lambda line: None))
