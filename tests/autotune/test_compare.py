"""The comparison as a user runs it: real processes on the reference model, resumed, and everything typed wrongly."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from autotune import reference
from autotune.certify import Interval
from autotune.cli import app
from autotune.config import CompareConfig
from autotune.data import from_dataset
from autotune.evaluation import Evaluator, load_model
from autotune.report import LABEL_GAP, _spread, describe
from autotune.results import HEADINGS, Comparison, Result
from btp import presets
from btp.budget import fit_flops
from btp.cost import image_token_flops
from btp.plan import Plan, Stage
from btp.presets import SYSTEMS

pytestmark = [pytest.mark.alone, pytest.mark.timeout(200)]

Kept = Callable[..., list[tuple[Any, ...]]]
TASKS = ("existence", "reading")
SYSTEMS_RUN = "btp_paper,vtw,todre_max_sum"
TARGET = image_token_flops([round(0.25 * 256)] * 8, 192, 512) / 1e9


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of PNGs: 24 questions about 12 pictures."""
    folder = tmp_path_factory.mktemp("questions")
    names: dict[bytes, str] = {}
    rows = []
    for row in list(reference.dataset("select", seed=12))[: 12 * 6]:
        name = names.setdefault(row["image"].tobytes(), f"{len(names)}.png")
        row["image"].save(folder / name)
        if row["task"] in TASKS:
            rows.append({**row, "image": name})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def arguments(questions: Path, out: Path, *more: str) -> list[str]:
    return [
        *("compare", "--model", str(reference.WEIGHTS), "--data", str(questions), "--out", str(out)),
        *("--systems", SYSTEMS_RUN, "--tokens", "0.25", "--repeats", "4", "--workers", "1", *more),
    ]


def command(questions: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "autotune.cli", *arguments(questions, out, *more)]


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        line, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    )


@pytest.fixture(scope="module")
def finished(questions: Path, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A comparison interrupted by Ctrl-C after its first scores, and run again to its end; what that printed."""
    out = tmp_path_factory.mktemp("compare") / "out"
    process = subprocess.Popen(
        command(questions, out),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job may have it ignored
    )
    deadline = time.monotonic() + 100
    while not kept(out, "select-%") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "run the same command again to resume" in " ".join(told.split())
    assert not (out / "compare.json").exists()
    first = kept(out)
    done = run(command(questions, out))
    assert done.returncode == 0, done.stderr
    assert kept(out)[: len(first)] == first
    return out, done.stdout


@pytest.fixture(scope="module")
def found(finished: tuple[Path, str]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished[0] / "compare.json").read_text())
    return content


def test_every_system_meets_the_same_flops_and_dense_runs_once(found: dict[str, Any]) -> None:
    dense, *rest = found["results"]
    assert [row["name"] for row in rest] == SYSTEMS_RUN.split(",")
    assert (dense["flops_share"], dense["tokens_mean"], dense["latency"]["value"]) == (1.0, 256, 1.0)
    assert dense["minus_dense"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    paper, vtw, todre = rest
    assert 0.95 * TARGET <= paper["image_gflops"] <= TARGET
    assert vtw["image_gflops"] <= TARGET  # moves by whole layers
    assert todre["image_gflops"] <= TARGET
    for row in rest:
        assert Plan.from_dict(row["plan"]).digest == row["plan_digest"]
        assert row["latency"]["low"] <= row["latency"]["value"] <= row["latency"]["high"]
        assert set(row["by_task"]) == set(TASKS)
        assert row["macro"]["value"] == pytest.approx(sum(row["by_task"].values()) / 2)
        assert row["minus_dense"]["value"] == pytest.approx(row["macro"]["value"] - dense["macro"]["value"])
        assert row["cache_bytes"] < dense["cache_bytes"]


def test_layers_are_the_models_own(found: dict[str, Any]) -> None:
    assert len(found["calibrated_layers"]) == 3
    own = presets.btp_paper(8, layers=found["calibrated_layers"])
    sizes = {"num_layers": 8, "num_image_tokens": 256, "hidden_size": 192, "intermediate_size": 512}
    assert found["results"][1]["plan"] == json.loads(fit_flops(own, TARGET * 1e9, **sizes).to_json())
    assert found["withdrawal_layer"] in range(1, 8)
    assert f"VTW's layer search found layer {found['withdrawal_layer']} of 8" in " ".join(found["notes"])


def test_a_conditional_drop_is_counted_as_it_was_carried_out(found: dict[str, Any]) -> None:
    todre = found["results"][3]
    stages = todre["plan"]["stages"]
    kept = round(stages[0]["keep"] * 256)
    dropped_layers = 8 - stages[1]["layer"]
    assert 0 <= todre["carried_out"] <= 1
    assert todre["tokens_mean"] == pytest.approx(kept * (8 - todre["carried_out"] * dropped_layers) / 8)
    assert todre["tokens_literal"] == kept


def test_the_cache_is_that_of_the_median_prompt(found: dict[str, Any]) -> None:
    per_token = 2 * 6 * 32 * 4  # keys and values of six heads of 32 in float32
    dense = found["results"][0]
    assert dense["cache_bytes"] == 8 * per_token * (256 + found["num_text_tokens"])


def test_the_table_fits_and_the_files_say_the_same(finished: tuple[Path, str], found: dict[str, Any]) -> None:
    out, printed = finished
    table = printed.partition("accuracy by task")[0]
    for row in found["results"]:
        (line,) = (line for line in table.splitlines() if line.strip().startswith(row["title"]))
        assert len(line.rstrip()) <= 100
        assert f"{100 * row['macro']['value']:.1f} [" in line
        assert f"| {row['title']} |" in (out / "compare.md").read_text()
    assert found["command"] in (out / "compare.md").read_text()
    for picture in ("compare.png", "compare-tasks.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_accuracy_by_task_is_printed(finished: tuple[Path, str], found: dict[str, Any]) -> None:
    by_task = finished[1].partition("accuracy by task, %")[2].partition(" questions of ")[0]
    for row in found["results"]:
        (line,) = (line for line in by_task.splitlines() if line.strip().startswith(row["title"]))
        assert line.split()[-len(TASKS) :] == [f"{100 * row['by_task'][task]:.1f}" for task in row["by_task"]]


def test_running_again_computes_nothing_twice(
    questions: Path, finished: tuple[Path, str], found: dict[str, Any], kept: Kept
) -> None:
    out, _ = finished
    before = kept(out)
    result = CliRunner().invoke(app, arguments(questions, out, "--json"))
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout) == found
    assert kept(out) == before


def a_result(**changes: Any) -> Result:
    sure = Interval(0.8812, 0.8123, 0.9456)
    given = Result(
        name="todre_k_center",
        title=max((system.name for system in SYSTEMS.values()), key=len),
        reference="",
        fraction=0.5,
        plan=Plan(stages=()),
        tokens_mean=2879.96,
        tokens_literal=2880,
        image_gflops=1234.5,
        flops_share=0.333,
        latency=sure,
        dense_ms=1.0,
        macro=sure,
        minus_dense=sure,
        worst_task="existence",
        worst=sure,
        by_task={},
        cache_bytes=1503.4 * 2**20,
        carried_out=None,
        moved_out=False,
    )
    return replace(given, **changes)


def test_the_widest_row_fits_100_characters() -> None:
    row = a_result()
    widths = [max(len(cell), len(heading)) for cell, heading in zip(row.cells(), HEADINGS, strict=True)]
    assert sum(widths) + 2 * (len(widths) - 1) <= 100


def test_the_notes_name_who_had_to_cut_before_the_first_layer(found: dict[str, Any]) -> None:
    assert not any(row["moved_out"] for row in found["results"])
    rows = (a_result(title="FastV", moved_out=True), a_result(title="DART", moved_out=True), a_result(title="DivPrune"))
    setting = {name: found[name] for name in (field.name for field in fields(Comparison)) if name in found}
    notes = Comparison(**{**setting, "dense": a_result(fraction=None), "results": rows}).notes()
    assert [note for note in notes if note.startswith("FastV, DART had to cut before the first layer")]


def test_conditional_plans_are_answered_prompt_by_prompt() -> None:
    evaluator = Evaluator(*load_model(str(reference.WEIGHTS), "cpu"), from_dataset(reference.dataset("select"), "")[:8])
    never, always = (
        Plan(stages=(Stage(layer=4, keep=0.0, selector="uniform", attention_below=share),)) for share in (0.0, 1.0)
    )
    dense, dropped = (256,) * 8, (256,) * 4 + (0,) * 4
    assert evaluator(never).realised == ((dense, 8),)
    assert evaluator(always).realised == ((dropped, 8),)
    assert evaluator(always).answers == evaluator(replace(always, stages=(Stage(layer=4, keep=0.0),))).answers
    assert evaluator(never).answers == evaluator(Plan(stages=())).answers


def test_labels_keep_their_order_their_distance_and_their_panel() -> None:
    heights = _spread([0.2, 0.5, 0.5, 0.5, 0.98, 0.99])
    gaps = [below - above for above, below in pairwise(heights)]
    assert min(gaps) >= LABEL_GAP - 1e-9
    assert max(heights) <= 1.0
    assert heights[0] == 0.2


def test_lambda_is_told_only_where_it_means_something() -> None:
    stages = (Stage(layer=1, keep=0.5, selector="joint"), Stage(layer=2, keep=0.3, selector="attention"))
    joint, attention = describe(Plan(stages=stages)).split("<br>")
    assert "lambda 0.50" in joint
    assert "lambda" not in attention


@pytest.mark.parametrize("tokens", ["", "0", "1.5", "-0.2", "half", "0.3,,0.2", "0.3,0.3", "nan"])
def test_budgets_that_are_none(tmp_path: Path, tokens: str) -> None:
    assert "--tokens must be different fractions in (0, 1]" in refused(tmp_path, "--tokens", tokens)


def test_a_system_that_is_none(tmp_path: Path) -> None:
    text = refused(tmp_path, "--systems", "fastv,slowv")
    assert "got 'slowv'" in text
    assert all(name in text for name in SYSTEMS)


def test_a_model_without_data_and_the_other_way_round(tmp_path: Path) -> None:
    assert "must be given together" in refused(tmp_path, "--model", str(reference.WEIGHTS))
    assert "must be given together" in refused(tmp_path, "--data", "data.jsonl")


def test_an_out_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "--out must be a folder" in refused(tmp_path)
    assert "--out must be a folder that can be written" in refused(tmp_path / "out")


def test_the_command_is_told_as_it_can_be_typed() -> None:
    config = CompareConfig(
        model="my model", data=Path("d.jsonl"), out=Path("o"), fractions=(0.5, 0.25), systems=("fastv",), answerers=2
    )
    assert config.command == (
        "autotune compare --model 'my model' --data d.jsonl --tokens 0.5,0.25 --systems fastv --out o "
        "--split select --seed 0 --repeats 12 --threads 1 --workers 2 --device cpu"
    )


def refused(folder: Path, *more: str) -> str:
    result = CliRunner().invoke(app, ["compare", "--out", str(folder / "out"), *more])
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())
