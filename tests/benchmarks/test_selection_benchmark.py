"""The selection benchmark on tiny shapes: what it writes, and that the ways it compares do the same.

Shapes: B batch, N image tokens, S tokens of the prompt, D features.
"""

import json

import pytest
import torch

from benchmarks import selection
from benchmarks.layer import Layer
from benchmarks.turns import Bench
from btp import ops, presets

pytestmark = pytest.mark.alone


@pytest.fixture(autouse=True)
def _same_threads_after():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    return Layer.random(64, 4, "cpu", torch.float32)


def bench(**settings):
    return Bench(**{"size": selection.SMALL, "device": "cpu", "repeats": 4, "seconds": 60.0, **settings})


def test_one_command_writes_figures_and_a_table(tmp_path, capsys):
    path = tmp_path / "deep" / "selection.json"
    assert selection.main(["--small", "--device", "cpu", "--repeats", "4", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert {"command", "commit", "date", "device", "machine", "rows", "threads", "versions"} <= found.keys()
    assert found["threads"] == 1
    assert found["command"].startswith("python -m benchmarks.selection --small")
    rows = found["rows"]
    assert {row["what"] for row in rows} == {"farthest-first", "grid seeds", "attention row", "stages"}
    for row in rows:
        assert row.get("way") != "triton" or row["note"] == "not measured: no CUDA device"
        assert "note" in row or 0 < row["p50_ms"] <= row["p95_ms"]
        assert "note" in row or row["repeats"] == 4
    cases = {(row["case"], row["dtype"], row["batch"]) for row in rows if row["what"] == "farthest-first"}
    assert len(cases) == 2 * 2 * 2
    loops = [row for row in rows if row.get("way") == selection.LOOP]
    assert [row["speedup"] for row in loops] == [1.0] * len(cases)
    table = capsys.readouterr().out
    assert table.count("\n| ") == len(rows) + 1
    assert table.count("not measured") == len(cases)


def test_the_published_loop_picks_what_ours_picks():
    feature_BND = bench().random(2, 72, 64)
    assert torch.equal(selection.published_loop(feature_BND, 18), ops.farthest_first(feature_BND, 18))


def test_torch_is_forced_and_given_back(monkeypatch):
    seen = []
    monkeypatch.setattr(ops, "_kernels_for", seen.append)
    feature_BND = bench().random(1, 9, 4)
    with selection.backend(selection.TORCH):
        ops.farthest_first(feature_BND, 2)
    assert not seen
    with selection.backend(selection.TRITON):
        ops.farthest_first(feature_BND, 2)
    assert len(seen) == 1


def test_the_row_is_the_last_of_eager_attention(layer):
    hidden_BSD = bench().random(2, 50, 64)
    torch.testing.assert_close(layer.row(hidden_BSD).softmax, layer.whole(hidden_BSD).softmax)


@pytest.mark.parametrize("given", [True, False])
def test_stages_leave_what_the_plan_says(layer, given):
    plan = presets.btp_paper(32)
    hidden_BSD = bench().random(2, 36 + selection.NUM_TEXT, 64)
    left_BK = selection.run_stages(plan, layer, hidden_BSD, 6, given=given)
    assert left_BK.shape == (2, plan.num_kept(36)[-1])
    assert (left_BK.diff(dim=1) > 0).all()


def test_ways_take_turns_until_the_time_is_up():
    calls = []
    runs = {"one": lambda: calls.append("one"), "other": lambda: calls.append("other")}
    found = bench(repeats=100, seconds=0.0).times(runs)
    assert calls == ["one", "other"] * 4  # a round that is not counted, and the three that are always there
    assert found["one"]["repeats"] == 3
