"""The workers benchmark in small: it runs on both databases, and its arithmetic is right."""

import json

import pytest

from benchmarks import workers
from benchmarks.tabular import Table

pytestmark = pytest.mark.alone


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one small run wrote."""
    path = tmp_path_factory.mktemp("workers") / "small.json"
    assert workers.main(["--small", "--commit", "abc", "--out", str(path)]) == 0
    return json.loads(path.read_text())


def test_every_number_of_workers_has_a_row_on_each_database(found):
    assert found["storage"] == "postgresql"
    for rows in (found["throughput"], found["sqlite"]):
        assert [(row["workers"], row["trials"]) for row in rows] == [(1, 12), (2, 12)]


def test_efficiency_is_throughput_to_linear(found):
    for row in (*found["throughput"], *found["sqlite"]):
        assert row["trials_per_s"] == pytest.approx(row["trials"] / row["wall_s"])
        assert row["efficiency"] == pytest.approx(row["trials_per_s"] * found["seconds"] / row["workers"])
        assert 0 < row["efficiency"] < 1  # trials sleep that long, and are asked for and told besides
        assert 0 < row["ask_p50_ms"] <= row["ask_p95_ms"]
        assert 0 < row["tell_p50_ms"] <= row["tell_p95_ms"]


def test_growth_is_the_last_window_to_the_first(found):
    (growth,) = found["growth"]
    assert list(growth["windows"]) == ["20", "40"]
    first, last = (window["ask_and_tell_p50_ms"] for window in growth["windows"].values())
    assert growth["ratio"] == pytest.approx(last / first)


def test_where_it_was_measured_is_told(found):
    assert {"command", "date", "machine", "versions", "device"} <= found.keys()
    assert found["commit"] == "abc"


def test_the_tables_and_targets_are_printed(found):
    text = workers.table_of(found)
    assert text.count("| 2 | 1 | 12 |") == 2
    assert f"{found['growth'][0]['ratio']:.2f}x, at most 3x wanted" in text


@pytest.mark.parametrize(("efficiency", "ratio", "met"), [(0.9, 3.0, True), (0.899, 3.01, False)])
def test_targets_are_judged_by_the_figures(efficiency, ratio, met):
    rows = [
        {"workers": num, "studies": studies, "efficiency": came}
        for num, studies, came in ((32, 1, efficiency), (64, 1, 0.1), (32, 2, 0.1))
    ]
    growth = [{"sampler": "random", "windows": {"100": {}, "2000": {}}, "ratio": ratio}]
    targets = workers.judged({"seconds": 2.0, "throughput": rows, "growth": growth})
    assert [target["met"] for target in targets.values()] == [met, met]
    assert len(workers.judged({"seconds": 0.2, "throughput": rows, "growth": growth})) == 1  # for other trials, none


def test_a_worker_that_fails_is_no_worker_that_is_slow(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no database")

    monkeypatch.setattr(workers, "work", fail)
    with pytest.raises(RuntimeError, match=r"exit codes \[1"):
        workers.timed(f"sqlite:///{tmp_path / 'study.db'}", "random", 1, 2, 0.0, Table.load())
