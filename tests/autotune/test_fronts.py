"""What a comparison of studies rests on, against the plainest way to work it out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune import objective
from autotune.config import AutotuneError
from autotune.objective import Told
from autotune.pages.attainment import attained, levels
from autotune.pages.compare import Comparison
from autotune.pages.figures import Range
from autotune.pages.fronts import PUBLISHED, Axes, Place, Point, StudySeries, front, hypervolume, places
from autotune.pages.styles import MOST, style
from autotune.pages.view import View
from autotune.search import CONTROLS, title
from autotune.search import PUBLISHED as SYSTEMS
from autotune.store import StudyRow
from tests.dashboard.made_up import DENSE, TASKS, told_trials

TOLD = told_trials(60, 3)
GRID = st.integers(0, 12).map(lambda n: n / 10)  # coarse, so that many are equal
STAIRS = st.lists(st.tuples(GRID, GRID), max_size=12)
FITS = {"model": "0", "name": "a device"}
SETTINGS = {"model": "org/tiny", "limit": "prefill_p50<=0.6x", "seed": 0}


def row(name: str = "s", settings: Mapping[str, Any] = SETTINGS, **context: Any) -> StudyRow:
    told = {"num_told": 0, "target": 60, "is_open": False, "created": 0.0}
    return StudyRow(name=name, settings=settings, context={"fits": FITS, **context}, **told)


def series(told: Sequence[Told] = TOLD, **context: Any) -> StudySeries:
    return StudySeries.of(row(**{"dense": DENSE, **context}), told)


def placed(points: Sequence[tuple[float, float]]) -> list[Place]:
    return [Place(Point(replace(TOLD[0], number=i), "within"), Range(x), Range(y)) for i, (x, y) in enumerate(points)]


def beats(a: Place, b: Place) -> bool:
    better = a.x.value < b.x.value or a.y.value > b.y.value
    return a.x.value <= b.x.value and a.y.value >= b.y.value and better


@given(STAIRS)
def test_a_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    all_of_them = placed(points)
    best = {(p.x.value, p.y.value) for p in all_of_them if not any(beats(other, p) for other in all_of_them)}
    found = front(all_of_them)
    assert [(p.x.value, p.y.value) for p in found] == sorted(best)  # each place once, by x


def test_a_front_is_the_objective_s_where_the_axes_are() -> None:
    study = series()
    found = front(places(study, Axes()))
    assert [place.point.told for place in found] == objective.front(TOLD)
    assert len(found) > 3


@given(STAIRS, st.sampled_from([1.0, 0.7, 8.0]))
def test_a_hypervolume_is_the_cells_that_a_front_covers(points: list[tuple[float, float]], unit: float) -> None:
    members = front(placed(points))
    xs = sorted({0.0, unit, *(p.x.value for p in members if p.x.value < unit)})
    area = 0.0
    for left, right in pairwise(xs):
        area += (right - left) / unit * max((p.y.value for p in members if p.x.value <= left), default=0.0)
    assert hypervolume(members, unit) == pytest.approx(area)


@given(st.lists(STAIRS, min_size=1, max_size=6))
def test_what_is_attained_is_counted(sets: list[list[tuple[float, float]]]) -> None:
    fronts = [front(placed(points)) for points in sets]
    few, half, most = levels(len(fronts))

    def reach(level: int, x: float) -> float | None:
        heights = [max((p.y.value for p in members if p.x.value <= x), default=None) for members in fronts]
        there = sorted((height for height in heights if height is not None), reverse=True)
        return there[level - 1] if len(there) >= level else None

    found = attained(fronts)
    xs = sorted({p.x.value for members in fronts for p in members})
    steps = [(x, reach(half, x)) for x in xs]
    rises = [step for before, step in zip([(0.0, None), *steps], steps, strict=False) if step[1] != before[1]]
    assert [(step.x, step.y) for step in found] == rises
    assert [(step.y_few, step.y_most) for step in found] == [(reach(few, x), reach(most, x)) for x, _ in rises]


def test_few_and_most_are_quartiles_from_four_seeds_on() -> None:
    assert [levels(n) for n in (1, 2, 3, 4, 5, 8)] == [(1, 1, 1), (1, 1, 2), (1, 2, 3), (1, 2, 3), (2, 3, 4), (2, 4, 6)]


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({}, "within"),
        ({"measured": False}, "uncertain"),
        ({"ratio_low": 0.55, "ratio_high": 0.65}, "uncertain"),
        ({"ratio_low": 0.61, "ratio_high": 0.65}, "infeasible"),
        ({"guard": 0.99}, "infeasible"),
        ({"guard": 0.99, "ratio_low": 0.55, "ratio_high": 0.65}, "infeasible"),
        ({"complete": False, "ratio_low": 0.61, "ratio_high": 0.65}, "stopped"),
    ],
)
def test_how_much_of_a_trial_is_to_be_believed(changes: dict[str, Any], status: str) -> None:
    base = {"complete": True, "measured": True, "limit": 0.6, "guard": None, "worst_task": 0.9}
    told = replace(TOLD[0], **{**base, "ratio": 0.5, "ratio_low": 0.49, "ratio_high": 0.51, **changes})
    assert Point.of(told).status == status


def test_what_nobody_drew_is_published() -> None:
    assert {title(name) for name in SYSTEMS} <= PUBLISHED
    assert {"hand-set", "hand-set at limit", "learned by gradient", *CONTROLS} <= PUBLISHED
    assert not {"trial 3", "diversity in stages"} & PUBLISHED


def place_of(axes: Axes, study: StudySeries, number: int) -> Place:
    found = axes.place(study, study.points[number])
    assert found is not None
    return found


def test_axes_are_what_they_are_called() -> None:
    study, number = series(), next(t.number for t in TOLD if t.complete and t.measured)
    told = TOLD[number]
    by_task = {task: told.by_task[task] / DENSE["by_task"][task] for task in TASKS}
    accuracy = place_of(Axes(), study, number)
    assert accuracy.x == Range(told.ratio, told.ratio_low, told.ratio_high)
    assert accuracy.y == Range(told.score, told.score_low, told.score_high)
    ms = place_of(Axes(x="ms"), study, number)
    assert ms.x.value == pytest.approx(84.0 * told.ratio)
    assert ms.x.ends == pytest.approx((84.0 * told.ratio_low, 84.0 * told.ratio_high))
    assert place_of(Axes(x="gflops"), study, number).x == Range(told.image_gflops or 0)
    assert place_of(Axes(x="cache"), study, number).x == Range(told.cache_mib or 0)
    retention = place_of(Axes(y="retention"), study, number).y
    value, low, high = (1 + part / DENSE["score"] for part in told.minus_dense["macro"])
    assert (retention.value, *retention.ends) == pytest.approx((value, low, high))
    assert retention.value == pytest.approx(told.score / DENSE["score"])
    assert place_of(Axes(y="worst"), study, number).y.value == pytest.approx(min(by_task.values()))
    assert [Axes(x=x).dense(study) for x in ("latency", "ms", "gflops", "cache")] == [
        (x, pytest.approx(DENSE["score"])) for x in (1.0, 84.0, 310.0, 54.0)
    ]
    assert Axes(y="worst").dense(study) == (1.0, 1.0)


def test_chosen_tasks_alone_count_and_have_no_interval() -> None:
    study, told = series(), TOLD[0]
    two = frozenset({"reading", "spatial"})
    accuracy = place_of(Axes(tasks=two), study, 0).y
    assert accuracy == Range(pytest.approx((told.by_task["reading"] + told.by_task["spatial"]) / 2))
    dense = DENSE["by_task"]
    shares = [told.by_task[task] / dense[task] for task in two]
    assert place_of(Axes(y="worst", tasks=two), study, 0).y == Range(pytest.approx(min(shares)))
    kept = (told.by_task["reading"] + told.by_task["spatial"]) / (dense["reading"] + dense["spatial"])
    assert place_of(Axes(y="retention", tasks=two), study, 0).y == Range(pytest.approx(kept))
    assert places(study, Axes(tasks=frozenset({"unheard of"}))) == []


def test_a_study_from_before_tells_what_it_can() -> None:
    bare = [
        replace(t, minus_dense={}, image_gflops=None, cache_mib=None, score_low=None, score_high=None) for t in TOLD
    ]
    study = series(bare, dense={})
    assert len(places(study, Axes())) == len(places(study, Axes(y="worst"))) == len(TOLD)
    for axes in (Axes(x="ms"), Axes(x="cache"), Axes(x="gflops"), Axes(y="retention")):
        assert places(study, axes) == []
        assert Comparison(view=View(x=axes.x, y=axes.y), studies=(study,)).without == ["s"]
    assert Axes().dense(study) is None
    assert Axes(y="worst").dense(study) == (1.0, 1.0)
    assert places(series([replace(t, by_task={}) for t in TOLD]), Axes()) == []


def test_dense_is_found_by_the_paired_differences_where_it_is_not_told() -> None:
    assert series(dense={"ms": 3.0}).dense.by_task == pytest.approx(DENSE["by_task"])


def test_studies_that_differ_in_seed_alone_ask_one_question() -> None:
    def question(settings: Mapping[str, Any] = SETTINGS, **context: Any) -> str:
        return StudySeries.of(row(settings=settings, **context), ()).question

    assert question() == question({**SETTINGS, "seed": 7}) != ""
    assert question({**SETTINGS, "limit": "prefill_p50<=0.5x"}) != question()
    assert question(fits={**FITS, "name": "another"}) != question()
    assert question({}) == question(fits={}) == ""


def test_the_table_is_sorted_and_has_the_seeds_together() -> None:
    rows = [row(f"s{seed}", {**SETTINGS, "seed": seed}, dense=DENSE) for seed in range(3)]
    studies = tuple(StudySeries.of(each, told_trials(60, seed)) for seed, each in enumerate(rows))
    found = Comparison(view=View(), studies=studies).table
    areas = {line.name: line.hypervolume.value for line in found if line.hypervolume and line.number is not None}
    values = [line.hypervolume.value for line in found if line.hypervolume]
    assert values == sorted(values, reverse=True)
    (together,) = (line for line in found if line.number is None)
    assert together.name.startswith("3 seeds of tiny")
    assert together.hypervolume == Range(float(np.median([*areas.values()])), min(areas.values()), max(areas.values()))
    some = Comparison(view=View(limit=("prefill_p50<=0.1x",)), studies=studies)
    assert some.table == []
    assert some.shown == {}


def test_a_view_is_what_its_address_says() -> None:
    view = View(
        study=("a b", "ü/%"), device=("x",), task=("reading",), x="ms", y="worst", hide=frozenset({"bars", "stopped"})
    )
    assert view.query == "study=a%20b&study=%C3%BC%2F%25&device=x&task=reading&x=ms&y=worst&hide=bars&hide=stopped"
    assert View().query == ""
    assert View.of([("study", "")]).study == ()
    assert View.of([("study", "a"), ("study", "a")]).study == ("a",)
    for wrong, said in (
        ("x", "x must be one of latency, ms"),
        ("y", "y must be"),
        ("hide", "hide must be one of stop"),
    ):
        with pytest.raises(AutotuneError, match=said):
            View.of([(wrong, "nothing")])
    with pytest.raises(AutotuneError, match="at most 30"):
        View.of([("study", str(n)) for n in range(31)])


def test_no_two_studies_look_alike_even_without_colour() -> None:
    assert len({(style(place).symbol, style(place).dash) for place in range(MOST)}) == MOST
