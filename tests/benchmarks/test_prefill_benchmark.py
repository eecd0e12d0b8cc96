"""The prefill benchmark on tiny shapes: its figures against the plans and against slower ways to the same."""

import json
import math
import subprocess
import sys
import time
from statistics import median

import pytest
import torch

from benchmarks import prefill, shapes, table
from btp import presets
from btp.capture import CaptureError
from btp.cost import image_token_flops, mean_tokens, tokens_per_layer
from btp.plan import Plan, Stage
from btp.selection import SELECTORS

pytestmark = pytest.mark.alone

TINY = shapes.SHAPES["small"]
NUM_SYSTEMS = len(presets.SYSTEMS) + 1


def run_of(folder, *arguments):
    """What one run wrote. Who else measures here, or works beside us, is none of the tests' business."""
    path, threads, measure = folder / "small.json", torch.get_num_threads(), prefill.measure
    arguments = ["--small", "--batches", "2", "--budget", "60", "--out", str(path), *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BTP_LOCK_DIR", str(folder / "locks"))
        patch.setattr(prefill, "measure", lambda *args, **settings: measure(*args, **settings | {"max_others": 1.0}))
        patch.setattr(prefill, "MAX_PAIRS", prefill.MIN_PAIRS)
        try:
            assert prefill.main(arguments) == 0
        finally:
            torch.set_num_threads(threads)
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_of(tmp_path_factory.mktemp("prefill"))


def rows_of(found, system):
    return [row for row in found["rows"] if row["system"] == system]


def test_every_system_is_measured_on_every_shape(found):
    assert len(found["rows"]) == NUM_SYSTEMS * len(TINY)
    assert {row["system"] for row in found["rows"]} == {*presets.SYSTEMS, "btp_released_drop"}
    assert {row["launch"] for row in found["rows"]} == {"eager"}
    assert not [row["note"] for row in found["rows"] if "note" in row]
    assert {"command", "date", "commit", "machine", "versions", "device"} <= found.keys()
    assert found["versions"]["torch"] == torch.__version__


def test_rows_count_what_their_plan_keeps(found):
    sizes = {shape.name: shape for shape in TINY}
    for row in found["rows"]:
        shape, plan = sizes[row["shape"]], Plan.from_dict(row["plan"])
        assert row["image_tokens"] == shape.num_image_tokens == row["key"]["image_tokens"]
        counts = [
            tokens_per_layer(plan, shape.text["num_hidden_layers"], row["image_tokens"], conditional=carried_out)
            for carried_out in (True, False)
        ]
        assert row["mean_tokens"] in {mean_tokens(of) for of in counts}
        text = shape.text
        flops = {image_token_flops(of, text["hidden_size"], text["intermediate_size"]) / 1e12 for of in counts}
        assert row["image_tflops"] in flops


def test_ideal_speedup_and_its_share(found):
    for row in found["rows"]:
        ratio = row["prefill"]["ratio_p50"][0]
        assert row["share_of_ideal"] * row["ideal_speedup"] * ratio == pytest.approx(1)
    for row in rows_of(found, "dense"):
        assert row["ideal_speedup"] == 1
        assert row["selector_ms"] == 0
    dense, vtw = rows_of(found, "dense")[0], rows_of(found, "vtw")[0]
    # VTW has image tokens in 4 of 8 layers, so half of their multiplications and half of their cache.
    assert vtw["image_tflops"] == pytest.approx(dense["image_tflops"] / 2)
    per_token = 2 * 8 * 64 * 4 * 2  # keys and values, layers, hidden size, bytes, batch
    assert dense["cache_bytes"] == per_token * (36 + 64)
    assert vtw["cache_bytes"] == per_token * (36 / 2 + 64)


def test_times_are_in_order(found):
    for row in found["rows"]:
        prefills, firsts = row["prefill"], row["first_token"]
        assert len(prefills["dense_ms"]) == len(prefills["pruned_ms"]) >= prefill.MIN_PAIRS
        for kind in ("dense", "pruned"):
            without = zip(prefills[f"{kind}_ms"], firsts[f"{kind}_ms"], strict=True)
            assert all(0 < inner < outer for inner, outer in without)
            assert prefills[f"{kind}_p50_ms"] <= prefills[f"{kind}_p95_ms"]
        for summary in (prefills, firsts):
            value, low, high = summary["ratio_p50"]
            assert value == pytest.approx(median(summary["pruned_ms"]) / median(summary["dense_ms"]))
            assert min(summary["pruned_ms"]) / max(summary["dense_ms"]) <= low <= high


def test_the_last_drop_is_the_paper_s_budget():
    _, plan = prefill.systems(32)["btp_released_drop"]
    assert round(image_token_flops(tokens_per_layer(plan, 32, 576), 4096, 11008) / 1e12, 3) == 0.847


@pytest.mark.parametrize(("index", "num_tokens"), [(0, 576), (1, 576 + 48 * 49)])
def test_published_shapes_have_the_published_sizes(index, num_tokens):
    shape = shapes.SHAPES["7b"][index]
    model = shape.build("meta", torch.bfloat16)
    newline = 4096 if shape.tiled else 0
    assert shape.num_image_tokens == num_tokens
    assert sum(parameter.numel() for parameter in model.parameters()) == 7_063_427_072 + newline
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_selectors_are_timed_and_put_back(monkeypatch):
    def slow(tokens, num_keep, stage):
        time.sleep(0.03)
        return SELECTORS["uniform"](tokens, num_keep, stage)

    monkeypatch.setitem(SELECTORS, "slow", slow)
    before = dict(SELECTORS)
    model, inputs = TINY[0].build("cpu", torch.float32), TINY[0].inputs(1, "cpu", torch.float32)
    plan = Plan(stages=(Stage(layer=1, keep=0.5, selector="slow"), Stage(layer=3, keep=0.25, selector="slow")))
    own_ms, run_s = prefill.selector_ms(model, inputs, plan)
    assert 60 <= own_ms <= 1e3 * run_s
    assert before == SELECTORS


def test_a_cache_of_another_size_is_an_error(monkeypatch):
    model, inputs = TINY[0].build("cpu", torch.float32), TINY[0].inputs(1, "cpu", torch.float32)
    monkeypatch.setattr(prefill, "kv_cache_bytes", lambda *args, **settings: 1)
    with pytest.raises(RuntimeError, match=r"must hold what btp.cost counts, 1 bytes, got \d+"):
        prefill.realised(model, inputs, presets.fastv(8))


def test_graphs_are_measured_where_they_can_be(monkeypatch):
    """The rows of a CUDA device, on a CPU: what has no graph says why."""
    monkeypatch.setattr(prefill, "launches", lambda device: ("eager", "graphs"))
    launched = []
    monkeypatch.setattr(prefill, "measured", lambda *args: launched.append(args[3]) or graphless(args[3]))
    rows = list(prefill.run(TINY[:1], [1], "cpu", seconds=100.0))
    assert [row["launch"] for row in rows] == launched == ["eager"] * NUM_SYSTEMS + ["graphs"] * NUM_SYSTEMS
    assert len({(row["launch"], row["system"]) for row in rows}) == 2 * NUM_SYSTEMS
    assert {row.get("note") for row in rows} == {None, "not measured: no graph here"}
    assert table.of_run({"device": "x", "rows": [row for row in rows if "note" in row]}).count("graphs") == NUM_SYSTEMS


def graphless(launch):
    if launch == "graphs":
        raise CaptureError("no graph here")
    return {"run_s": 0.01}


def test_rows_of_graphs_are_launched_by_graphs(monkeypatch):
    model, inputs = TINY[0].build("cpu", torch.float32), TINY[0].inputs(1, "cpu", torch.float32)
    asked = []
    monkeypatch.setattr(prefill, "measure", lambda *args, launch, **settings: asked.append(launch) or 1 / 0)
    for launch in ("eager", "graphs"):
        with pytest.raises(ZeroDivisionError):
            prefill.measured(model, inputs, presets.fastv(8), launch, 1.0, 0.01)
    assert asked == ["eager", "graphs"]


def test_a_spent_budget_leaves_rows_without_figures():
    rows = list(prefill.run(TINY[:1], [1], "cpu", seconds=0.0))
    assert len(rows) == NUM_SYSTEMS
    assert {row["note"] for row in rows} == {"not measured: the budget was spent"}
    assert table.of_run({"device": "x", "rows": rows}).count("the budget was spent") == NUM_SYSTEMS


def test_seconds_left_are_shared_by_the_root_of_the_tokens():
    budget = prefill.Budget(100.0, [(TINY[0], 1), (TINY[0], 4)], rows_per_cell=2)
    shares = [budget.next_share_s() for _ in range(4)]
    # Weights 1, 1, 2, 2; next to nothing of the time is spent here, so each share is of the same 100 s.
    assert shares == pytest.approx([100 / 6, 100 / 5, 200 / 4, 100], rel=1e-2)


def test_needs_nothing_of_the_tuner():
    code = "import benchmarks.prefill, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert "torch" in done.stdout.split()
    assert not {"autotune", "mlflow", "optuna", "pandas", "ray", "sqlalchemy"} & set(done.stdout.split())


def test_the_printed_table_has_a_line_a_row(found):
    lines = table.of_run(found).splitlines()
    assert len([line for line in lines if line.startswith("| tiny")]) == len(found["rows"])
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def result(name="dense", batch=1, ratio=0.5, device="d", threads=1, **row):
    figures = {"prefill": {"ratio_p50": [ratio, ratio - 0.01, ratio + 0.02]}, "share_of_ideal": 0.9, "mean_tokens": 7}
    key = {"name": device, "threads": threads}
    return {"rows": [{"shape": "s", "launch": "eager", "name": name, "batch": batch, "key": key, **figures, **row}]}


def test_block_has_measured_ratios_and_says_what_is_missing():
    lines = table.block([result(), result("FastV", 8, 0.4)]).splitlines()
    assert lines[2].startswith("| NVIDIA H200 | LLaVA-1.5-7B | eager | every system |")
    assert [line.count(table.NOT_MEASURED) for line in lines[2:]] == [3, 3, 3, 3, 2, 2]
    assert lines[6] == "| d, 1 thread | s | eager | dense | 7 | 0.50 [0.49, 0.52], 90% | not measured | not measured |"
    assert lines[7] == "| d, 1 thread | s | eager | FastV | 7 | not measured | 0.40 [0.39, 0.42], 90% | not measured |"


def test_block_fills_in_what_a_target_speaks_of():
    lines = table.block([result(shape="LLaVA-1.5-7B", device="NVIDIA H200", threads=0)]).splitlines()
    assert [line.split(" | ")[2:4] for line in lines[2:4]] == [["eager", "dense"], ["graphs", "every system"]]
    assert len(lines) == 2 + 4


def test_check_tells_another_table(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- performance -->\nold\n<!-- /performance -->\nafter\n")
    (tmp_path / "prefill-d.json").write_text(json.dumps(result()))
    paths = ["--results", str(tmp_path), "--readme", str(readme)]
    assert table.main([*paths, "--check"]) == 1
    assert "run python -m benchmarks.table" in capsys.readouterr().err
    assert "old" in readme.read_text()
    assert table.main(paths) == 0
    assert table.main([*paths, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "| d, 1 thread | s | eager | dense |" in text
    with pytest.raises(ValueError, match="must have <!-- performance -->"):
        table.written("no block", "")


def test_the_readme_has_this_table():
    assert table.main(["--check"]) == 0


@pytest.mark.gpu
def test_on_cuda(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    rows = run_of(tmp_path, "--device", "cuda")["rows"]
    assert len(rows) == 2 * NUM_SYSTEMS * len(TINY)
    without = {row["system"] for row in rows if row["launch"] == "graphs" and "note" in row}
    conditional = {row["system"] for row in rows if any(stage["attention_below"] for stage in row["plan"]["stages"])}
    assert without == conditional
    for row in rows:
        if "note" in row:
            continue
        assert row["peak_bytes"] > row["cache_bytes"] > 0
        assert math.isfinite(row["selector_ms"])
        assert row["key"]["dtype"] == "bfloat16"
