"""The main job as a stranger runs it: their folder, their JSONL, real processes, and everything that can be wrong."""

import base64
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect
from pyarrow import parquet
from transformers import BlipConfig, BlipForConditionalGeneration, BlipTextConfig, BlipVisionConfig
from typer.testing import CliRunner

import btp
from autotune import data, job, reference
from autotune.bench import Bench
from autotune.cli import app
from autotune.config import JobConfig, Limit
from autotune.objective import Told
from autotune.registry import Registry
from autotune.sights import SAMPLES, sight_name
from autotune.store import Database, Results, Studies
from autotune.study import Study
from btp.cost import tokens_per_layer
from btp.errors import ProfileError
from btp.plan import Plan
from btp.profile import Profile
from tests.autotune.registries import register
from tests.dashboard import sites

pytestmark = [pytest.mark.alone, pytest.mark.timeout(450)]

Kept = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def handed_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a saved model and a JSONL of PNGs: 60 questions about 20 pictures."""
    folder = tmp_path_factory.mktemp("stranger")
    shutil.copytree(reference.WEIGHTS, folder / "model")
    names: dict[bytes, str] = {}
    rows = []
    for row in list(reference.dataset("select", seed=11))[: 20 * 6]:
        name = names.setdefault(row["image"].tobytes(), f"{len(names)}.png")
        row["image"].save(folder / name)
        if row["task"] in ("existence", "attribute", "caption", "reading"):
            rows.append({**row, "image": name})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(folder: Path, out: Path, *more: str) -> list[str]:
    return [
        *("tune", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--out", str(out)),
        *(
            "--limit",
            "prefill_p50<=0.9x",
            "--trials",
            "7",
            "--repeats",
            "6",
            "--threads",
            "1",
            "--workers",
            "1",
            "--json",
            *more,
        ),
    ]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "autotune.cli", *command]
    return subprocess.run(line, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def finished(handed_in: Path, kept: Kept, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A job of two workers: itself killed in the middle of its search, run again, and a worker of it killed then."""
    out = tmp_path_factory.mktemp("job") / "out"
    first = started(handed_in, out)
    wait_until(lambda: len(kept(out, "select-%")) >= 3)
    workers = holders(out)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    wait_until(lambda: not any(Path(f"/proc/{process}").exists() for process in workers))  # they end with it
    assert not (out / "study.parquet").exists()
    again = started(handed_in, out)
    wait_until(lambda: any(process not in workers for process in holders(out)))
    os.kill(next(process for process in holders(out) if process not in workers), signal.SIGKILL)
    told, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    return out, json.loads(told)


def trials_in(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = parquet.read_table(out / "study.parquet").to_pylist()
    return rows


def started(folder: Path, out: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "autotune.cli", *arguments(folder, out, "--workers", "2")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def holders(out: Path) -> set[int]:
    """The processes that hold a lease."""
    held = [each for each in study_of(out).leases.all() if each.state == "held"]
    return {int((each.worker or "").split("/")[-2]) for each in held}


def study_of(out: Path) -> Study:
    with closing(sqlite3.connect(out / "study.db", timeout=30.0)) as connection:
        ((name,),) = connection.execute("SELECT study FROM job").fetchall()
    return Study(Database(f"sqlite:///{out / 'study.db'}"), name, 0)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 150
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_job_ends_with_a_registered_profile_that_does_what_it_says(finished: tuple[Path, dict[str, Any]]) -> None:
    out, outcome = finished
    assert outcome["num_trials"] == 7
    assert outcome["reproduced"] is True
    assert [row["name"] for row in outcome["rows"]] == [
        "dense",
        "hand-set",
        "hand-set at limit",
        "random",
        "uniform",
        "tuned",
    ]
    assert all(Path(path).exists() for path in outcome["paths"].values())
    profile = Profile.load(out / "profile.json")
    assert profile.plan == Plan.from_dict(outcome["rows"][-1]["plan"])
    assert outcome["fresh_ratio"]["value"] <= 0.9
    assert outcome["met"] is True


def test_what_too_few_pictures_cannot_certify_is_registered_as_a_candidate(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, outcome = finished
    assert outcome["certified"] is False
    assert "held-out pictures are too few" in " ".join(outcome["reasons"])
    assert "@candidate-" in outcome["alias"]
    assert Profile.load(out / "profile.json").uncertified_because == tuple(outcome["reasons"])


def test_the_papers_say_what_was_measured_answered_and_tried(finished: tuple[Path, dict[str, Any]]) -> None:
    out, outcome = finished
    profile = Profile.load(out / "profile.json")
    latency = json.loads((out / "latency.json").read_text())
    assert latency["plan"] == profile.plan.digest
    dense_ms, pruned_ms = (
        [run for block in latency["blocks"] for run in block[key]] for key in ("dense_ms", "pruned_ms")
    )
    assert latency["ms"]["value"] == pytest.approx(median(pruned_ms))
    assert latency["ratio"]["value"] == pytest.approx(median(pruned_ms) / median(dense_ms))
    assert profile.evidence["latency"] == {
        key: latency[key] for key in ("metric", "quantile", "device_key", "ratio", "ms", "dense_ms")
    }
    assert latency["device"] == asdict(profile.device)
    assert profile.evidence["certificate"]["latency"] == latency["ratio"]
    answered = parquet.read_table(out / "evidence.parquet").to_pydict()
    assert {"dense", "tuned", "uniform"} < set(answered)
    assert len(set(answered["image_id"])) == profile.evidence["certificate"]["num_pictures"]
    card = (out / "CARD.md").read_text()
    assert f"# model: {outcome['champion']}" in card
    assert "**Not certified**" in card
    for paper in (outcome["study"], *profile.evidence["data"].values(), profile.evidence["code_version"]):
        assert paper in card


def test_what_the_plans_look_at_is_kept_as_they_keep_it(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    plan = Profile.load(out / "profile.json").plan
    row = Studies(Database(f"sqlite:///{out / 'study.db'}")).page(1)[0]
    results = Results(Database(f"sqlite:///{out / 'study.db'}"), row.context["scope"])
    samples, seen = results.found(SAMPLES), results.found(sight_name(plan))
    assert samples is not None
    assert seen is not None
    assert {sample["task"] for sample in samples["samples"]} == {"existence", "attribute", "reading", "caption"}
    counts = tokens_per_layer(plan, 8, 256)
    for sample, shown in zip(seen["samples"], samples["samples"], strict=True):
        assert [(each["layer"], len(each["tokens"])) for each in sample["stages"]] == [
            (stage.layer, counts[stage.layer]) for stage in plan.stages
        ]
        assert sum(width * height for _, _, width, height in sample["grid"]) == pytest.approx(1, abs=1e-3)
        picture = Image.open(io.BytesIO(base64.b64decode(shown["image"])))
        assert picture.size == (shown["width"], shown["height"])


def test_who_looks_is_told_what_dense_comes_to_and_what_a_trial_differs_by(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    out, outcome = finished
    studies = Studies(Database(f"sqlite:///{out / 'study.db'}"))
    dense = studies.page(1)[0].context["dense"]
    assert dense["ms"] > 0
    assert dense["score_low"] <= dense["score"] <= dense["score_high"]
    told = [Told.from_dict(record) for record in studies.records(outcome["study"])]
    complete = [t for t in told if t.complete]
    assert complete
    for t in complete:
        assert t.minus_dense["macro"][0] == pytest.approx(t.score - dense["score"])
        assert {task: t.minus_dense[task][0] for task in t.by_task} == pytest.approx(
            {task: t.by_task[task] - dense["by_task"][task] for task in t.by_task}
        )
        assert t.score_low is not None
        assert t.score_high is not None
        assert t.score_low <= t.score <= t.score_high
        assert t.image_gflops is not None
        assert 0 < t.image_gflops < dense["gflops"]


def test_from_the_front_to_the_champion_in_a_browser(
    finished: tuple[Path, dict[str, Any]], browser: Browser, shots: Path, tmp_path: Path
) -> None:
    """Choose, filter, look at a plan, follow it to its profile and promote it; only the certificate is made up."""
    out, outcome = finished
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(out / "study.db", home)
    profile = Profile.load(out / "profile.json")
    latency, dense = profile.evidence["latency"], profile.evidence["rows"][0]
    certificate = {**profile.evidence["certificate"], "certified": True, "reasons": [], "limit": 0.99}
    certificate |= {"latency": {"value": 0.5, "low": 0.4, "high": 0.6}}
    evidence = {**profile.evidence, "certificate": certificate, "latency": {**latency, "ratio": certificate["latency"]}}
    replace(profile, evidence=evidence).save(home / "profile.json")
    register(Registry(f"sqlite:///{home / 'mlflow.db'}"), "model", home / "profile.json")
    with sites.open_site(home) as site, sites.watched(browser, viewport={"width": 1280, "height": 900}) as page:
        sites.log_in(page, site.url, site.key, "/studies")
        page.get_by_role("searchbox").fill("model")
        page.keyboard.press("Enter")
        page.get_by_role("link", name=outcome["study"]).first.click()
        page.get_by_role("link", name="Compare", exact=True).last.click()
        expect(page.locator("html[data-ready]")).to_be_attached()
        page.get_by_label("Vertical").select_option("retention")
        expect(page).to_have_url(re.compile("y=retention"))
        certified = page.get_by_role("row").filter(has_text="certified as model 1")
        expect(certified).to_be_visible(timeout=15_000)
        certified.get_by_role("button", name="Show").click()
        page.screenshot(path=shots / "journey-compare.png", full_page=True)
        page.get_by_role("link", name="Trial", exact=True).click()
        expect(page.get_by_role("heading", name="What it looks at")).to_be_visible()
        page.screenshot(path=shots / "journey-trial.png", full_page=True)
        page.get_by_role("link", name="model version 1").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("model")
        assert dense["name"] in page.get_by_role("group", name="What it was held against").inner_text()
        page.get_by_label("Why, for the log").fill("it is on the front")
        page.get_by_role("button", name="Promote").click()
        expect(page.get_by_text(f"champion-{profile.device.slug} names version 1 now")).to_be_visible(timeout=30_000)
        page.screenshot(path=shots / "journey-profile.png", full_page=True)
        page.goto(f"{site.url}/profiles/model")
        expect(page.get_by_role("group", name="Versions")).to_contain_text(f"champion-{profile.device.slug}")


def test_the_search_tells_how_it_went(finished: tuple[Path, dict[str, Any]]) -> None:
    search = finished[1]["search"]
    assert "trials" in search["steering"]
    assert 0 <= search["saved"] < 1
    assert 0 < search["latency_model_error"]["median"] <= search["latency_model_error"]["worst"]


def test_a_killed_job_and_a_killed_worker_lose_no_trial_and_count_none_twice(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    leases = study_of(finished[0]).leases
    assert leases.counts()["told"] == 7
    assert leases.counts()["expired"] >= 1
    assert leases.unsettled() == []
    assert {each.reason for each in leases.all() if each.state == "expired"} == {"its worker died"}
    trials = trials_in(finished[0])
    assert len(trials) == 7
    names = [trial["name"] for trial in trials]
    assert {"hand-set", "hand-set at limit", "hand-set, calibrated layers", "random", "uniform"} < set(names)
    assert len(set(names)) == 7


def test_the_registry_hands_the_profile_out_by_alias(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, outcome = finished
    name, _, alias = outcome["alias"].removeprefix("models:/").partition("@")
    registry = Registry(f"sqlite:///{out / 'mlflow.db'}")
    pulled = registry.pull(name, alias, tmp_path / "pulled.json")
    assert Profile.load(pulled).digest == Profile.load(out / "profile.json").digest
    (version,) = registry.versions(name)
    assert version.uri == outcome["version"]
    again = ["--to", str(tmp_path / "again.json"), "--registry", registry.tracking_uri]
    result = CliRunner().invoke(app, ["profiles", "pull", outcome["alias"], *again])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "again.json").read_bytes() == pulled.read_bytes()


def test_on_another_device_the_registered_plan_is_measured_and_not_asked_again(
    handed_in: Path, finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    plan = Profile.load(out / "profile.json").plan
    config = JobConfig(
        model=str(handed_in / "model"),
        data=handed_in / "data.jsonl",
        limit=Limit.parse("prefill_p50<=0.9x"),
        out=tmp_path,
        space=Path(__file__).parents[2] / "search_spaces" / "reference.yaml",
        name="model",
        threads=1,
        tracking_uri=f"sqlite:///{out / 'mlflow.db'}",
    )
    bench = Bench(config, data.load_splits(config.data), config.limit)
    monkeypatch.setattr(bench, "_evaluate", lambda: pytest.fail("asked again"))
    assert list(job.registered(config, bench).values()) == [plan]
    champion = next(trial for trial in trials_in(out) if Plan.from_dict(json.loads(trial["plan"])) == plan)
    *_, scores = bench.running_scores(plan, "select")
    assert len(scores.answers) == len(bench.splits["select"]) == champion["num_samples"]
    assert sum(scores.kl) / len(scores.kl) == pytest.approx(champion["proxy"])


def test_the_offline_page_needs_no_network(finished: tuple[Path, dict[str, Any]]) -> None:
    page = (finished[0] / "front.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert "<script src=" not in page


def test_a_disk_that_is_full_while_the_results_are_written_costs_nothing_that_was_found(
    handed_in: Path, finished: tuple[Path, dict[str, Any]], kept: Kept
) -> None:
    out, outcome = finished
    before, card = kept(out), (out / "CARD.md").read_bytes()
    (out / "CARD.md").unlink()
    (out / "CARD.md").symlink_to("/dev/full")
    done = run(*arguments(handed_in, out))
    assert done.returncode == 2
    assert "no room to write" in done.stderr
    assert "Traceback" not in done.stderr
    (out / "CARD.md").unlink()
    (out / "CARD.md").write_bytes(card)
    assert kept(out)[: len(before)] == before
    assert [v.uri for v in Registry(f"sqlite:///{out / 'mlflow.db'}").versions("model")] == [outcome["version"]]


def test_running_again_resumes_and_computes_nothing_twice(
    handed_in: Path, finished: tuple[Path, dict[str, Any]], kept: Kept
) -> None:
    out, outcome = finished
    before, context = kept(out), Studies(Database(f"sqlite:///{out / 'study.db'}")).page(1)[0].context
    done = run(*arguments(handed_in, out))
    assert done.returncode == 0, done.stderr
    again = json.loads(done.stdout)
    assert (again["study"], again["num_trials"]) == (outcome["study"], 7)
    assert kept(out) == before
    assert Studies(Database(f"sqlite:///{out / 'study.db'}")).page(1)[0].context == context
    with closing(sqlite3.connect(out / "mlflow.db")) as connection:
        runs = connection.execute("SELECT value FROM tags WHERE key = 'study'").fetchall()
    assert runs == [(outcome["study"],)]
    (version,) = Registry(f"sqlite:///{out / 'mlflow.db'}").versions("model")
    assert version.uri == outcome["version"] == again["version"]


def refused(*command: str) -> str:
    result = CliRunner().invoke(app, list(command))
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


def test_a_limit_that_no_plan_meets(handed_in: Path, tmp_path: Path) -> None:
    text = refused(*arguments(handed_in, tmp_path / "out", "--limit", "prefill_p50<=0.01x"))
    assert "the fastest" in text
    assert "x of dense" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", ["fast", "prefill_p50<=fast", "prefill_p50<=0x"])
def test_a_limit_that_cannot_be_read(handed_in: Path, tmp_path: Path, limit: str) -> None:
    assert "a limit reads" in refused(*arguments(handed_in, tmp_path / "out", "--limit", limit))


def test_a_missing_image_and_an_unknown_task_are_named_by_row(handed_in: Path, tmp_path: Path) -> None:
    row = {"image": "none.png", "question": "what?", "answer": "red", "task": "attribute"}
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(row) + "\n")
    text = refused(*arguments(handed_in, tmp_path / "out", "--data", str(path)))
    assert "row 1" in text
    assert "none.png" in text
    path.write_text(json.dumps({**row, "task": "poetry"}) + "\n")
    assert "unknown task 'poetry'" in refused(*arguments(handed_in, tmp_path / "out", "--data", str(path)))
    assert not (tmp_path / "out").exists()


def test_an_unreadable_model_folder(handed_in: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{")
    text = refused(*arguments(handed_in, tmp_path / "out", "--model", str(tmp_path / "model")))
    assert "--model must be a folder" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (("--device", "cuda:77"), "--device must be"),
        (("--device", "abacus"), "--device must be"),
        (("--registry", "foo://x"), "sqlite:///FILE or the http"),
        (("--name", "a/b:c"), "--name must be"),
        (("--sampler", "luck"), "--sampler must be one of gp"),
        (("--margin", "0"), "--margin must be in (0, 1)"),
        (("--guard", "best_task>=2"), "a guard reads worst_task>="),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(
    handed_in: Path, tmp_path: Path, more: tuple[str, ...], named: str
) -> None:
    assert named in refused(*arguments(handed_in, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_an_out_that_is_a_file(handed_in: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "--out must be a folder" in refused(*arguments(handed_in, tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_a_model_folder_that_is_not_there(handed_in: Path, tmp_path: Path) -> None:
    text = refused(*arguments(handed_in, tmp_path / "out", "--model", str(tmp_path / "nowhere")))
    assert "which is no folder" in text


def test_a_profile_is_refused_by_a_model_of_other_sizes(finished: tuple[Path, dict[str, Any]]) -> None:
    profile = Profile.load(finished[0] / "profile.json")
    model, _ = reference.load()
    with btp.prune(model, profile):
        pass
    other = replace(profile, model=replace(profile.model, num_layers=12))
    with pytest.raises(ProfileError, match="num_layers 12, here 8"), btp.prune(model, other):
        pass


def test_truncated_weights(handed_in: Path, tmp_path: Path) -> None:
    shutil.copytree(handed_in / "model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    text = refused(*arguments(handed_in, tmp_path / "out", "--model", str(tmp_path / "model")))
    assert "--model must be a folder" in text


def test_pulling_from_a_registry_that_is_not_there(tmp_path: Path) -> None:
    address = f"sqlite:///{tmp_path / 'typo' / 'mlflow.db'}"
    assert "must exist" in refused("profiles", "pull", "models:/a@b", "--registry", address)
    assert not (tmp_path / "typo").exists()


def test_an_unsupported_architecture(handed_in: Path, tmp_path: Path) -> None:
    shutil.copytree(handed_in / "model", tmp_path / "model")
    model = BlipForConditionalGeneration(
        BlipConfig(
            text_config=BlipTextConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=464
            ).to_dict(),
            vision_config=BlipVisionConfig(
                hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=320, patch_size=20
            ).to_dict(),
        )
    )
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "model" / name).unlink()
    model.save_pretrained(tmp_path / "model")
    text = refused(*arguments(handed_in, tmp_path / "out", "--model", str(tmp_path / "model")))
    assert "the model must be one of" in text
    assert "LlavaForConditionalGeneration" in text
    assert "got BlipForConditionalGeneration" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{", "JSON"),
        ('{"hello": 1}', "hello"),
        ('{"stages": [{"layer": 1, "keep": 2}]}', "keep must be a number in [0, 1]"),
        ('{"stages": [{"layer": 99, "keep": 0.5}]}', "below the model's 8 layers"),
    ],
)
def test_a_profile_that_is_none(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    assert named in refused("measure", str(path), "--threads", "1", "--repeats", "4")


def test_a_tampered_profile(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    text = (finished[0] / "profile.json").read_text()
    path = tmp_path / "profile.json"
    path.write_text(text.replace('"architecture": "Llava', '"architecture": "Other'))
    assert "profile.json" in refused("measure", str(path), "--threads", "1", "--repeats", "4")
