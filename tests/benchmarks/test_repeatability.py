"""The repeatability benchmark: its counts against hand-counted ones, and a small run to its JSON."""

import json

import pytest
import torch

from benchmarks import repeatability
from benchmarks.repeatability import around_the_others, inside, lag_one
from btp.intervals import Interval

pytestmark = pytest.mark.alone

THREE = [Interval(1.0, 0.9, 1.1), Interval(1.05, 1.04, 1.06), Interval(2.0, 0.0, 3.0)]


def test_pairs_are_counted_in_both_orders():
    assert inside(THREE) == 3 / 6  # the second in the first, and both others in the third
    assert inside(THREE[:2]) == 1 / 2


def test_each_interval_is_held_against_the_others_median():
    assert around_the_others(THREE) == 1 / 3  # 1.525, 1.5 and 1.025 in turn
    assert around_the_others([Interval(1.0, 1.0, 1.0)] * 3) == 1.0


def test_lag_one_tells_drift_from_noise():
    assert lag_one([float(i) for i in range(100)]) > 0.9
    assert lag_one([1.0, -1.0] * 50) < -0.9
    assert lag_one([2.0, 2.0]) == 0.0


def test_a_small_run_writes_what_it_found(tmp_path, monkeypatch):
    monkeypatch.setenv("BTP_LOCK_DIR", str(tmp_path / "locks"))
    path, threads = tmp_path / "results" / "small.json", torch.get_num_threads()
    try:
        assert repeatability.main(["--small", "--out", str(path)]) in (0, 1)
    finally:
        torch.set_num_threads(threads)
    found = json.loads(path.read_text())
    assert {(row["plan"], row["metric"], row["quantile"]) for row in found["rows"]} == {
        (plan, metric, quantile)
        for plan in repeatability.plans()
        for metric in ("prefill", "first_token")
        for quantile in ("p50", "p95")
    }
    assert all(row["times"] == 3 and 0 < row["median"] < 1.5 for row in found["rows"])
    shares = [row["pairs_inside"] for row in found["rows"] if row["quantile"] == "p50"]
    assert found["p50_pairs_inside"] == pytest.approx(sum(shares) / len(shares))
    assert [len(entries) for entries in found["measurements"].values()] == [3, 3, 3]
    assert "benchmarks.repeatability --small" in found["command"]
    assert found["threads"] == 1
