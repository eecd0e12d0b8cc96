"""Intervals: against a naive bootstrap, and against the truth they are meant to cover."""

import numpy as np
import pytest

from autotune.certify import ScoreTable


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
