"""What a trial is judged by: one constraint, one front, one objective that steers."""

import math

import numpy as np
import pytest

from autotune.config import AutotuneError
from autotune.objective import Guard, Told, front, rivals, steering
from btp.plan import Plan


def told(number=0, score=0.9, ratio=0.5, **changes):
    settings = {
        "name": f"trial {number}",
        "plan": Plan(stages=()),
        "num_samples": 288,
        "proxy": 0.1,
        "nll": 0.2,
        "by_task": {"reading": score},
        "worst_task": 1.0,
        "ratio_low": ratio - 0.01,
        "ratio_high": ratio + 0.01,
        "measured": True,
        "limit": 0.7,
    }
    return Told(number=number, score=score, ratio=ratio, **{**settings, **changes})


@pytest.mark.parametrize(
    ("changes", "over"),
    [
        ({"ratio_high": 0.7}, 0.0),
        ({"ratio_high": 0.84}, 0.2),
        ({"ratio_high": 0.35}, -0.5),
        ({"ratio_high": 0.35, "guard": 0.8, "worst_task": 0.6}, 0.25),
        ({"ratio_high": 0.84, "guard": 0.8, "worst_task": 0.79}, 0.2),
        ({"ratio_high": 0.7, "guard": 0.8, "worst_task": 0.8}, 0.0),
        ({"ratio_high": 0.35, "worst_task": 0.0}, -0.5),
    ],
)
def test_the_one_constraint_is_the_larger_miss(changes, over):
    assert told(**changes).over == pytest.approx(over, abs=1e-12)
    assert told(**changes).feasible == (over <= 0)


def test_a_guard_is_read_with_or_without_spaces():
    assert Guard.parse(" worst_task >= 0.95 ") == Guard.parse("worst_task>=.95") == Guard(0.95)


@pytest.mark.parametrize("text", ["worst_task>0.9", "worst_task>=x", "0.95", "", "macro>=0.9", "worst_task>=-1"])
def test_what_is_no_guard_is_refused_with_one_that_is(text):
    with pytest.raises(AutotuneError, match=r'got .*; try --guard "worst_task>=0\.95"'):
        Guard.parse(text)


@pytest.mark.parametrize("text", ["worst_task>=0", "worst_task>=95"])
def test_a_guard_is_a_share(text):
    with pytest.raises(AutotuneError, match=r"in \(0, 1\], got (0|95); 0.95 allows"):
        Guard.parse(text)


def test_the_front_is_what_no_feasible_trial_beats():
    rng = np.random.default_rng(0)
    trials = [told(n, *rng.uniform((0.5, 0.3), (1.0, 0.9)).round(2)) for n in range(60)]
    feasible = [t for t in trials if t.ratio + 0.01 <= 0.7]
    naive = [
        t
        for t in feasible
        if not any(
            o.score >= t.score and o.ratio <= t.ratio and (o.score, -o.ratio) > (t.score, -t.ratio) for o in feasible
        )
        and not any((o.score, o.ratio) == (t.score, t.ratio) and o.number < t.number for o in feasible)
    ]
    assert {(t.score, t.ratio) for t in front(trials)} == {(t.score, t.ratio) for t in naive}
    assert [t.ratio for t in front(trials)] == sorted(t.ratio for t in front(trials))


@pytest.mark.parametrize("changes", [{"complete": False}, {"measured": False}, {"limit": 0.3}, {"guard": 1.0}])
def test_neither_stopped_nor_modelled_nor_infeasible_trials_keep_another_off_the_front(changes):
    good = told(1, 0.8, 0.5)
    best = told(2, 0.95, 0.4, worst_task=0.9, **changes)
    assert front([good, best]) == [good]


def test_without_labels_the_front_is_of_those_nearest_to_dense():
    near, far = told(1, 0, 0.5, by_task={}, proxy=0.1), told(2, 0, 0.4, by_task={}, proxy=0.3)
    beaten = told(3, 0, 0.6, by_task={}, proxy=0.2)
    assert front([near, far, beaten]) == [far, near]


def test_rivals_are_the_front_members_that_are_no_slower():
    slow, fast, beaten = told(1, 0.9, 0.6), told(2, 0.7, 0.4), told(3, 0.6, 0.5)
    assert rivals([slow, fast, beaten], 0.6) == [fast, slow]
    assert rivals([slow, fast, beaten], 0.5) == [fast]
    assert rivals([slow, fast, beaten], 0.39) == []


def ranked(proxies, scores, **changes):
    return [told(n, s, 0.5, proxy=p, **changes) for n, (p, s) in enumerate(zip(proxies, scores, strict=True))]


def test_the_proxy_steers_where_it_ranks_as_the_score_does():
    found = steering(ranked(np.linspace(0.9, 0.1, 9), np.linspace(0.1, 0.9, 9)))
    assert (found.by, found.correlation) == ("proxy", pytest.approx(1.0))
    assert "over 9 complete trials" in found.reason
    assert "1.00" in found.reason


def test_the_score_steers_where_the_proxy_ranks_otherwise():
    proxies, scores = np.arange(8) / 10, np.array([7, 6, 1, 4, 3, 2, 5, 0]) / 10
    by_hand = 1 - 6 * (2 * 4**2) / (8 * 63)  # Spearman's formula, without ties
    found = steering(ranked(proxies, scores))
    assert found.by == "score"
    assert found.correlation == pytest.approx(by_hand)
    assert f"{by_hand:.2f} by rank, below 0.8" in found.reason
    assert steering(ranked(proxies, scores), threshold=0.5).by == "proxy"


def test_stopped_trials_say_nothing_of_the_correlation():
    agreeing = ranked(np.linspace(0.9, 0.1, 8), np.linspace(0.1, 0.9, 8))
    stopped = ranked(np.linspace(0.1, 0.9, 8), np.linspace(0.1, 0.9, 8), complete=False)
    assert steering(agreeing + stopped).by == "proxy"


def test_few_trials_or_none_or_no_labels_leave_it_to_the_proxy():
    against = ranked(np.linspace(0.1, 0.9, 7), np.linspace(0.1, 0.9, 7))
    assert steering(against).by == "proxy"
    assert "7 complete trials are too few" in steering(against).reason
    assert steering([]).by == "proxy"
    assert "no labels" in steering(ranked(np.arange(20), np.zeros(20), by_task={})).reason


def test_an_objective_that_never_changes_does_not_steer():
    assert steering(ranked(np.arange(9), np.full(9, 0.5))).by == "proxy"
    assert steering(ranked(np.full(9, 0.5), np.arange(9) / 10)).by == "score"


def test_the_loss_falls_as_trials_get_better():
    for steered in (steering(ranked(np.arange(9), np.full(9, 0.5))), steering(ranked(np.full(9, 0.5), np.arange(9)))):
        better, worse = told(score=0.9, proxy=0.1), told(score=0.8, proxy=0.2)
        assert steered.loss(better) < steered.loss(worse)
        assert np.isfinite(steered.loss(told(proxy=0.0)))


def test_a_trial_that_was_stopped_is_judged_as_if_all_samples_were_as_hard_as_the_complete_ones_found_them():
    easy_start = tuple((32, 0.9, 0.05) for _ in range(1))
    complete = [told(number, 0.8, 0.5, proxy=0.1, looks=(*easy_start, (288, 0.8, 0.1))) for number in range(3)]
    stopped = told(9, 0.9, 0.5, proxy=0.06, complete=False, num_samples=32, looks=((32, 0.9, 0.06),))
    steers = steering([*complete, stopped])
    assert steers.by == "proxy"
    assert steers.loss(stopped) == pytest.approx(math.log(0.06 * 2))
    assert steers.loss(stopped) > steers.loss(complete[0])


def test_a_guard_says_nothing_of_a_trial_that_was_stopped():
    few = told(1, 0.8, 0.5, guard=0.95, worst_task=0.5, complete=False, num_samples=32)
    assert few.over == pytest.approx((few.ratio_high - few.limit) / few.limit)
