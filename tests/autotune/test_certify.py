"""Intervals and tests: against naive ones, exact ones, and the truth they are meant to cover."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from autotune.certify import MAX_FINALISTS, Interval, ScoreTable, certify, finalists, holm
from autotune.config import AutotuneError
from btp.plan import Plan, Stage

MARGIN = 0.02
NUM_TASKS = 6
Scores = NDArray[np.float64]


def test_macro_is_the_mean_over_tasks_not_over_samples() -> None:
    table = ScoreTable(["a", "a", "b", "b"], ["read", "count", "read", "read"])
    assert table.macro([1, 0, 1, 1]).value == pytest.approx(0.5)
    assert table.by_task([1, 0, 1, 1]) == {"read": 1.0, "count": 0.0}


def test_the_interval_agrees_with_a_naive_bootstrap_over_pictures() -> None:
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(60), 4)
    tasks = np.tile(["read", "count"], 120)
    skill = rng.random(60)[images]
    scores = (rng.random(240) < skill).astype(float)
    naive = []
    for _ in range(2000):
        chosen = rng.integers(60, size=60)
        rows = np.concatenate([np.flatnonzero(images == image) for image in chosen])
        naive.append(np.mean([scores[rows][tasks[rows] == task].mean() for task in ("read", "count")]))
    found = ScoreTable([str(i) for i in images], list(tasks)).macro(scores)
    low, high = np.quantile(naive, (0.025, 0.975))
    assert found.low == pytest.approx(low, abs=0.012)
    assert found.high == pytest.approx(high, abs=0.012)


def test_pairing_sees_a_difference_that_the_two_intervals_hide() -> None:
    rng = np.random.default_rng(1)
    better = (rng.random(400) < 0.7).astype(float)
    worse = better.copy()
    worse[np.flatnonzero(better)[:20]] = 0
    table = ScoreTable([str(i) for i in range(400)], ["read"] * 400)
    first, second = table.macro(better), table.macro(worse)
    assert first.low < second.high
    assert table.difference(better, worse).excludes_zero
    assert not table.difference(better, better).excludes_zero


def test_the_worst_task_is_the_one_that_keeps_least_of_dense() -> None:
    table = ScoreTable(["a", "b"] * 2, ["read", "read", "count", "count"])
    name, interval = table.worst_task(scores=[1, 0, 1, 1], dense=[1, 1, 1, 1])
    assert (name, interval.value) == ("read", 0.5)


def test_of_equally_kept_tasks_the_least_accurate_is_the_worst() -> None:
    table = ScoreTable(["a", "b"] * 3, ["read", "read", "count", "count", "blind", "blind"])
    dense = [1, 1, 1, 0, 0, 0]
    name, interval = table.worst_task(dense, dense)
    assert (name, interval.value) == ("count", 0.5)  # "blind" has nothing to keep


def test_a_rare_task_has_an_interval_of_its_own_pictures() -> None:
    images, tasks = [str(i) for i in range(40)], ["read"] * 38 + ["count"] * 2
    table = ScoreTable(images, tasks)
    scores = [1.0] * 39 + [0.0]
    assert table.worst_task(scores, [1.0] * 40)[0] == "count"
    for interval in (table.macro(scores), table.worst_task(scores, [1.0] * 40)[1]):
        assert 0 <= interval.low <= interval.value <= interval.high <= 1


def test_retention_is_paired_by_picture() -> None:
    rng = np.random.default_rng(2)
    dense = (rng.random(300) < 0.6).astype(float)
    ours = dense * (rng.random(300) < 0.9)
    table = ScoreTable([str(i) for i in range(300)], ["read"] * 300)
    found = table.retention("read", ours, dense)
    assert found.value == pytest.approx(ours.sum() / dense.sum())
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.9 * 0.1 / dense.sum()), rel=0.25)
    assert table.retention("read", dense, dense) == Interval(1.0, 1.0, 1.0)
    assert table.retention("read", dense, np.zeros(300)) == Interval(1.0, 1.0, 1.0)


def test_a_score_is_needed_for_every_sample() -> None:
    with pytest.raises(AutotuneError, match="got 3 for 4"):
        ScoreTable(["a", "b"] * 2, ["read"] * 4).macro([1, 0, 1])


# Plans that are worse than dense by exactly `lost`: (num_pictures, NUM_TASKS) of score differences, a plan each.


def whole_pictures(rng: np.random.Generator, num_pictures: int, lost: float) -> Scores:
    """Whatever is lost is lost with its whole picture, and nothing is gained."""
    return -np.repeat(rng.random((num_pictures, 1)) < lost, NUM_TASKS, axis=1).astype(float)


def single_questions(rng: np.random.Generator, num_pictures: int, lost: float) -> Scores:
    return -(rng.random((num_pictures, NUM_TASKS)) < lost).astype(float)


def clustered(rng: np.random.Generator, num_pictures: int, lost: float) -> Scores:
    """Questions are lost and gained, and pictures differ in how many."""
    shape, size = (num_pictures, NUM_TASKS), (num_pictures, 1)
    loses, gains = (rng.beta(0.3, 0.3 * (1 / rate - 1), size) for rate in (0.04 + lost, 0.04))
    return (rng.random(shape) < gains) * 1.0 - (rng.random(shape) < loses)


def full_table(num_pictures: int) -> ScoreTable:
    images = np.repeat(np.arange(num_pictures), NUM_TASKS)
    return ScoreTable([str(i) for i in images], [f"task {i % NUM_TASKS}" for i in range(len(images))])


def p_values(table: ScoreTable, drawn: list[Scores]) -> list[float]:
    return [table.non_inferiority(one.ravel(), np.zeros(one.size), MARGIN) for one in drawn]


@pytest.mark.parametrize("num_pictures", [150, 340])
@pytest.mark.parametrize("draw", [whole_pictures, single_questions, clustered])
def test_plans_that_are_worse_by_the_margin_are_seldom_certified(
    draw: Callable[[np.random.Generator, int, float], Scores], num_pictures: int
) -> None:
    """Any of eight, in 250 data sets: at most alpha of the time, and what chance adds to a share of 250."""
    rng, table, erred = np.random.default_rng(3), full_table(num_pictures), 0
    for _ in range(250):
        drawn = p_values(table, [draw(rng, num_pictures, MARGIN) for _ in range(MAX_FINALISTS)])
        erred += min(holm({str(i): p for i, p in enumerate(drawn)}).values()) <= 0.05
    assert erred / 250 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 250)


@pytest.mark.parametrize("draw", [whole_pictures, single_questions, clustered])
def test_a_single_p_is_no_smaller_than_chance(draw: Callable[[np.random.Generator, int, float], Scores]) -> None:
    rng, table = np.random.default_rng(4), full_table(340)
    found = np.array(p_values(table, [draw(rng, 340, MARGIN) for _ in range(2000)]))
    for alpha in (0.05, 0.025):
        assert (found <= alpha).mean() <= alpha + 2.5 * np.sqrt(alpha / 2000)


def test_a_t_test_errs_where_losses_are_rare() -> None:
    """Why there is no t test: of 40 pictures, 45 % show none of the losses of one picture in fifty."""
    rng, table = np.random.default_rng(5), full_table(40)
    drawn = [whole_pictures(rng, 40, MARGIN) for _ in range(200)]
    means = np.array([one.mean(1) for one in drawn])
    spread = means.std(1, ddof=1) / np.sqrt(40)
    with np.errstate(divide="ignore"):
        student = stats.t.sf((means.mean(1) + MARGIN) / spread, 39)
    assert (student <= 0.05).mean() > 0.3
    assert min(p_values(table, drawn)) > 0.05


def test_plans_as_good_as_dense_are_mostly_certified() -> None:
    """340 pictures and 6 questions about each; 4 % of the answers lost and as many gained, by whole clusters."""
    rng, table = np.random.default_rng(6), full_table(340)
    alone = np.array(p_values(table, [clustered(rng, 340, 0.0) for _ in range(400)]))
    assert (alone <= 0.05).mean() > 0.7
    assert (np.array(p_values(table, [single_questions(rng, 340, 0.002) for _ in range(50)])) <= 0.05 / 8).all()


@pytest.mark.parametrize("num_pictures", [340, 1000])
def test_where_nothing_is_gained_the_test_is_the_binomial(num_pictures: int) -> None:
    table = ScoreTable([str(i) for i in range(num_pictures)], ["read"] * num_pictures)
    for num_lost in range(int(MARGIN * num_pictures)):
        ours = np.ones(num_pictures)
        ours[:num_lost] = 0
        exact = stats.binom.cdf(num_lost, num_pictures, MARGIN)
        found = table.non_inferiority(ours, np.ones(num_pictures), MARGIN)
        assert found == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize(("lost", "gained"), [(4, 20), (20, 4), (12, 11), (2, 14), (30, 34), (0, 8), (40, 15)])
def test_the_interval_decides_as_the_exact_mcnemar_test(lost: int, gained: int) -> None:
    """One question a picture: only answers that differ tell which is better, and they are tosses of a coin."""
    ours, dense = np.zeros(200), np.zeros(200)
    ours[:gained], dense[gained : gained + lost] = 1, 1
    table = ScoreTable([str(i) for i in range(200)], ["read"] * 200)
    differ = stats.binomtest(lost, lost + gained).pvalue < 0.05
    assert table.difference(ours, dense).excludes_zero == differ


def test_a_rare_task_counts_as_if_all_were_rare() -> None:
    images, tasks = [str(i) for i in range(400)], ["read"] * 380 + ["count"] * 20
    table = ScoreTable(images, tasks)
    assert table.num_pictures == 40
    assert table.non_inferiority(np.ones(400), np.ones(400), MARGIN) == pytest.approx(0.98**40)
    assert full_table(50).num_pictures == 50


@pytest.mark.parametrize("margin", [0.0, -0.02, 1.0, 2.0])
def test_a_margin_is_a_fraction(margin: float) -> None:
    with pytest.raises(AutotuneError, match=r"two points are 0\.02"):
        full_table(4).non_inferiority(np.ones(24), np.ones(24), margin)


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert list(holm({"late": 0.5, "early": 0.1})) == ["late", "early"]
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({"only": 0.04}) == {"only": 0.04}
    assert holm({}) == {}


@pytest.fixture(scope="module")
def dense_scores() -> Scores:
    return (np.random.default_rng(7).random(340 * NUM_TASKS) < 0.9).astype(float)


def test_what_is_as_good_and_fast_is_certified(dense_scores: Scores) -> None:
    table, fast = full_table(340), Interval(0.5, 0.48, 0.52)
    both = {"best": dense_scores, "other": dense_scores}
    found = certify(both, dense_scores, table, {"best": fast}, limit=0.6, margin=MARGIN, guard=0.9)
    assert list(found) == ["best", "other"]
    assert (found["best"].certified, found["best"].reasons) == (True, ())
    assert found["best"].minus_dense == Interval(0.0, 0.0, 0.0)
    assert found["best"].macro == table.macro(dense_scores)
    assert found["best"].adjusted_p == pytest.approx(2 * found["best"].p)
    assert found["other"].as_good
    assert found["other"].reasons == ("its latency was not measured in a fresh process",)
    plain = json.loads(json.dumps(found["best"].to_dict()))
    assert plain["certified"] is True
    assert plain["latency"] == {"value": 0.5, "low": 0.48, "high": 0.52}


def test_every_reason_is_told_in_words(dense_scores: Scores) -> None:
    table = full_table(340)
    worse = dense_scores.copy()
    worse[np.flatnonzero(np.arange(worse.size) % NUM_TASKS == 2)[:60]] = 0
    found = certify({"it": worse}, dense_scores, table, {"it": Interval(1.1, 0.9, 1.2)}, 0.7, MARGIN, guard=0.95)["it"]
    margin, guard, over, slower = found.reasons
    assert f"may be as low as {found.minus_dense.low:+.3f}, and the margin is 0.02" in margin
    assert "where the number of finalists is 1" in margin
    assert guard.startswith("the guard is broken: task 2 keeps 0.8")
    assert found.retention.value == pytest.approx(
        table.by_task(worse)["task 2"] / table.by_task(dense_scores)["task 2"]
    )
    assert over == "its latency may be as high as 1.200 of dense, and the limit is 0.700"
    assert "no faster than dense" in slower
    assert found.to_dict()["reasons"] == list(found.reasons)
    assert found.to_dict()["certified"] is False
    assert replace(found, guard=0.5, latency=Interval(0.5, 0.4, 0.7)).reasons == (margin,)


def test_a_latency_that_is_no_number_is_not_within_the_limit(dense_scores: Scores) -> None:
    unknown = {"it": Interval(0.5, 0.4, float("nan"))}
    assert not certify({"it": dense_scores}, dense_scores, full_table(340), unknown, 0.7)["it"].certified


def test_too_few_pictures_are_told_how_many_it_takes() -> None:
    scores, fast = [1.0] * 100 * NUM_TASKS, {"it": Interval(0.5, 0.5, 0.5)}
    found = certify({"it": scores}, scores, full_table(100), fast, 0.7)["it"]
    assert found.reasons[1].startswith("100 held-out pictures are too few")
    assert found.reasons[1].endswith("takes at least 149, the number of finalists being 1")
    assert 0.98**149 <= 0.05 < 0.98**148
    perfect = [1.0] * 149 * NUM_TASKS
    assert certify({"it": perfect}, perfect, full_table(149), fast, 0.7)["it"].certified


def test_a_certificate_is_refused_for_too_many_and_for_no_alpha() -> None:
    table, scores = full_table(2), [1.0] * 2 * NUM_TASKS
    with pytest.raises(AutotuneError, match="at most 8 finalists can be certified, got 9"):
        certify({str(i): scores for i in range(9)}, scores, table, {}, 0.7)
    with pytest.raises(AutotuneError, match="alpha must be in"):
        certify({"it": scores}, scores, table, {}, 0.7, alpha=5)


@dataclass(frozen=True)
class Trial:
    name: str
    plan: Plan
    score: float
    ratio: float
    feasible: bool = True
    proxy: float = 0.0


def trial(
    name: str, score: float, ratio: float, keep: float | None = None, feasible: bool = True, proxy: float = 0.0
) -> Trial:
    keep = ratio if keep is None else keep
    return Trial(name, Plan(stages=(Stage(layer=1, keep=keep),)), score, ratio, feasible, proxy)


def names(found: list[Trial]) -> list[str]:
    return [t.name for t in found]


def test_finalists_are_the_front_and_then_what_is_near_it() -> None:
    told = [
        trial("fast", 0.85, 0.30),
        trial("best", 0.90, 0.60),
        trial("beaten", 0.89, 0.65),
        trial("beaten too", 0.84, 0.40),
        trial("hopeless", 0.70, 0.10),
        trial("late", 0.95, 0.50, feasible=False),
        trial("over", 0.95, 0.80),
    ]
    assert names(finalists(told, limit=0.7)) == ["best", "beaten", "fast", "beaten too"]
    assert names(finalists(told, limit=0.7, num=3)) == ["best", "beaten", "fast"]
    assert names(finalists(told, limit=0.7, num=2)) == ["best", "fast"]
    assert names(finalists(reversed(told), limit=0.7)) == ["best", "beaten", "fast", "beaten too"]
    assert finalists(told, limit=0.05) == []


def test_of_those_that_score_alike_the_nearest_to_dense_comes_first() -> None:
    told = [
        trial("best", 0.900, 0.60, proxy=0.03),
        trial("alike", 0.892, 0.61, proxy=0.01),
        trial("worse", 0.889, 0.59, proxy=0.001),
        trial("worst", 0.880, 0.58, proxy=0.0),
    ]
    assert names(finalists(told, limit=0.7)) == ["alike", "best", "worse", "worst"]
    assert names(finalists(told, limit=0.7, num=1)) == ["alike"]


def test_finalists_have_plans_of_their_own_and_are_eight_at_most() -> None:
    twins = [trial("again", 0.9, 0.52, keep=0.5), trial("first", 0.9, 0.5, keep=0.5)]
    assert names(finalists(twins, limit=0.7)) == ["first"]
    many = [trial(str(i), 0.9 - i / 1000, 0.6 - i / 100) for i in range(20)]
    assert names(finalists(many, limit=0.7)) == [str(i) for i in range(MAX_FINALISTS)]
