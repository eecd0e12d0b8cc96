"""`autotune profiles`: what a user types, what they read, and with which code it exits."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

pytest.importorskip("mlflow")

from autotune import data, reference
from autotune.cli import app
from autotune.evaluation import Evaluator, load_model
from autotune.profile_cache import CACHE
from autotune.profiles import promotion_database
from autotune.registry import Registry
from autotune.store.promotions import Promotions
from btp.anatomy import Anatomy
from btp.families import anatomy_of
from btp.plan import Plan, Stage
from btp.profile import Profile
from tests.autotune.registries import CERTIFIED, PROFILE, UNCERTIFIED, register, save_profile

NAME = "tiny"
H200 = "NVIDIA H200"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """Two certified versions for an H200, one that is not, and one for a CPU."""
    folder = tmp_path_factory.mktemp("registry")
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    (folder / "CARD.md").write_text("# Card")
    for layer, high_ms, device, certificate in (
        (1, 40.0, H200, {**CERTIFIED, "macro": {"value": 0.8, "low": 0.7, "high": 0.9}}),
        (2, 60.0, H200, CERTIFIED),
        (3, 30.0, H200, UNCERTIFIED),
        (1, 90.0, "cpu", CERTIFIED),
    ):
        latency = {"ratio": CERTIFIED["latency"], "ms": {"value": high_ms - 1, "low": high_ms - 2, "high": high_ms}}
        path = save_profile(folder / "profile.json", layer, device, certificate=certificate, latency=latency)
        register(registry, NAME, path, evidence={"CARD.md": folder / "CARD.md"})
    return registry


@pytest.fixture(autouse=True)
def at_home(registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", registry.tracking_uri)
    monkeypatch.delenv("AUTOTUNE_STORAGE", raising=False)
    monkeypatch.chdir(tmp_path)


def typed(*words: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["profiles", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


def told(*words: object, code: int = 0) -> Any:
    return json.loads(typed(*words, "--json", code=code).splitlines()[-1])


def test_the_list_shows_every_version_and_its_device() -> None:
    text = typed("list")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("tiny/")] == [
        "tiny/4",
        "tiny/3",
        "tiny/2",
        "tiny/1",
    ]
    assert "candidate-nvidia-h200" in text
    assert "39.0 (≤ 40.0)" in text
    assert [version["version"] for version in told("list", NAME, "--device", "H200")] == [3, 2, 1]
    assert "for a device named 'tpu'; --registry names another one" in " ".join(
        typed("list", "--device", "tpu").split()
    )


def test_the_best_answers_from_the_certified_versions() -> None:
    assert told("best", "--max-latency-ms", 60, "--device", "h200")["uri"] == "models:/tiny/1"
    assert "use models:/tiny/1; other certified ones: models:/tiny/4, models:/tiny/2" in typed(
        "best", "--max-latency-ms", 45
    )
    assert "the fastest is models:/tiny/1 with at most 40.0 ms" in typed("best", "--max-latency-ms", 5, code=2)


def test_show_tells_what_is_in_a_profile() -> None:
    text = typed("show", "tiny@candidate-nvidia-h200")
    for line in (
        "models:/tiny/3, SHA-256",
        "before 3: keep 0.500 by balanced",
        "no: it may be no faster than dense",
        "CARD.md, manifest.json, profile.json",
    ):
        assert line in text
    assert told("show", "models:/tiny/1")["profile"]["plan"]["stages"][0]["layer"] == 1


def test_a_pull_is_cached_and_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = told("pull", "models:/tiny/1", "--to", "here.json", "--evidence", "papers")
    assert (first["downloaded"], first["path"]) == (True, "here.json")
    assert Profile.load("here.json").digest == first["sha256"]
    assert sorted(path.name for path in (tmp_path / "papers").iterdir()) == ["CARD.md", "manifest.json"]
    assert told("pull", "tiny/1")["downloaded"] is False
    monkeypatch.setattr(Registry, "find", None)
    (tmp_path / "folder").mkdir()
    text = typed("pull", "tiny/1", "--offline", "--to", "folder")
    assert "offline: tiny/1 is models:/tiny/1, resolved 0 s ago" in text
    assert (tmp_path / "folder" / "profile.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    assert "models:/tiny/2 is not in the cache" in typed("pull", "tiny/2", "--offline", code=2)


def test_diff_shows_stages_side_by_side_and_the_rest_that_differs() -> None:
    text = typed("diff", "tiny/1", "tiny/4")
    (stage,) = (line for line in text.splitlines() if line.strip().startswith("0"))
    assert stage.count("before 1: keep 0.500") == 2
    assert "name NVIDIA H200" in text
    assert "name cpu" in text
    differs = told("diff", "tiny/1", "tiny/2")["differs"]
    assert differs["its latency"][0] != differs["its latency"][1]
    assert "model" not in differs
    assert "nothing differs" in typed("diff", "tiny/1", "tiny/1")


def test_what_cannot_be_rolled_back_is_told_the_way_out(registry: Registry) -> None:
    assert "has no alias 'nobody'" in typed("rollback", NAME, "--alias", "nobody", "--why", "no", code=2)
    for name in (f"{NAME}/1", f"{NAME}@champion-cpu"):
        assert "an alias goes to --alias" in typed("rollback", name, "--alias", "champion-cpu", "--why", "no", code=2)


def test_promotion_rollback_and_log(registry: Registry, tmp_path: Path) -> None:
    storage = ("--storage", f"sqlite:///{tmp_path}/log.db")
    alias = "champion-nvidia-h200"
    first = told("promote", "tiny/1", "--why", "fast enough", "--who", "me@here", *storage)
    assert (first["alias"], first["before"], first["after"], first["who"]) == (alias, None, 1, "me@here")
    assert f"models:/tiny@{alias} is version 2, from version 1; " in typed(
        "promote", "models:/tiny/2", "--why", "better", *storage
    )
    assert "must not be champion-nvidia-h200: it is not certified" in typed(
        "promote", "tiny@candidate-nvidia-h200", "--why", "why not", *storage, code=2
    )
    assert told("rollback", NAME, "--alias", alias, "--why", "no", *storage)["after"] == 1
    rows = told("log", NAME, *storage)
    assert [(row["kind"], row["before"], row["after"]) for row in rows] == [
        ("rollback", 2, 1),
        ("promote", 1, 2),
        ("promote", None, 1),
    ]
    assert "@" in rows[0]["who"]
    text = typed("log", NAME, "--alias", alias, *storage)
    assert "fast enough" in text
    assert "nothing of tiny was promoted yet" in typed("log", NAME, "--alias", "production", *storage)
    assert registry.pointed(NAME, alias) == 1


def test_the_log_lies_beside_a_local_registry_and_must_be_named_beside_a_server(registry: Registry) -> None:
    typed("promote", "tiny/4", "--why", "for the log")
    assert registry.file is not None
    assert registry.file.with_name("study.db").exists()
    server = ("--registry", "http://127.0.0.1:1")
    assert "needs a database beside a server" in typed("promote", "tiny/4", "--why", "x", *server, code=2)


@pytest.fixture
def cut_off(tmp_path: Path) -> Registry:
    """Where a promotion was logged, and its alias did not follow."""
    registry = Registry(f"sqlite:///{tmp_path}/cut-off/mlflow.db")
    register(registry, NAME, save_profile(tmp_path / "cut-off.json", 1, certificate=CERTIFIED))
    made = registry.made(NAME)
    database = promotion_database(registry, None)
    log = Promotions(database, f"made {round(1000 * made)}", NAME, address=registry.tracking_uri, made=made)
    log.write(alias="champion-cpu", kind="promote", before=None, after=1, who="me", why="cut off")
    return registry


@pytest.mark.parametrize("command", ["list", "best", "show", "pull"])
def test_an_alias_follows_its_log_first_where_the_log_is_at_hand(
    cut_off: Registry, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cut_off.tracking_uri)
    champion = f"{NAME}@champion-cpu"
    words = {"best": ["--max-latency-ms", 5], "show": [champion], "pull": [champion]}.get(command, [])
    typed(command, *words, code=2 if command == "best" else 0)
    assert cut_off.pointed(NAME, "champion-cpu") == 1


def test_without_its_log_an_alias_is_where_the_registry_has_it(
    cut_off: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", cut_off.tracking_uri)
    (tmp_path / "broken.db").write_bytes(b"no database at all, but long enough to be seen as such" * 20)
    monkeypatch.setenv("AUTOTUNE_STORAGE", f"sqlite:///{tmp_path}/broken.db")
    text = typed("list", NAME)
    assert "aliases are as the registry has them; the log of promotions could not be asked: " in text
    assert f"{NAME}/1" in text
    assert cut_off.pointed(NAME, "champion-cpu") is None


def test_the_best_is_of_one_kind_of_latency() -> None:
    assert "no certified version with a latency in milliseconds, ttft p95, is there" in typed(
        "best", "--max-latency-ms", 60, "--metric", "ttft", "--quantile", "p95", code=2
    )


def test_a_bundle_goes_to_a_host_without_a_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = told("export", "tiny/4", "--to", "tiny.zip")
    assert "candidate-cpu" in exported["aliases"]
    monkeypatch.setenv(CACHE, str(tmp_path / "other-host"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "in the cache: models:/tiny@candidate-cpu" in typed("import", "tiny.zip")
    assert "is models:/tiny/4, resolved " in typed("show", "tiny@candidate-cpu", "--offline")
    there = f"sqlite:///{tmp_path}/there/mlflow.db"
    assert told("import", "tiny.zip", "--registry", there)["registered"] == "models:/tiny/1"
    assert told("list", "--registry", there)[0]["aliases"] == ["candidate-cpu"]
    (tmp_path / "bad.zip").write_bytes(b"bad")
    assert "bad.zip must be a bundle" in typed("import", "bad.zip", code=2)


def test_errors_are_one_line_with_the_way_out(tmp_path: Path) -> None:
    assert "a reference reads models:/NAME@ALIAS" in typed("show", "tiny", code=2)
    assert "no profile is registered as 'huge'" in typed("show", "huge/1", code=2)
    assert "'tiny' has no alias 'champion-x'; it has: " in typed("pull", "tiny@champion-x", code=2)
    nowhere = f"sqlite:///{tmp_path}/none/mlflow.db"
    assert "a registry must exist" in typed("pull", "tiny/1", "--registry", nowhere, code=2)
    assert "a registry must exist" in typed("promote", "tiny/1", "--why", "x", "--registry", nowhere, code=2)
    assert not (tmp_path / "none").exists()


def test_verify_checks_every_file_and_tells_the_claim(registry: Registry, tmp_path: Path) -> None:
    text = typed("verify", "tiny/1")
    assert "3 files, every one as it was registered" in text
    assert "it claims 0.800 macro accuracy" in text
    assert f"and at most 0.600 of dense's latency on {H200}, limit 0.700" in text
    (card,) = (tmp_path / "cache").rglob("CARD.md")
    card.write_text("forged")
    assert "is damaged, CARD.md must have SHA-256" in typed("verify", "tiny/1", "--offline", code=2)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL of 48 questions about 16 pictures."""
    folder = tmp_path_factory.mktemp("questions")
    rows, names = [], {}
    for row in list(reference.dataset("select", seed=5))[: 16 * 6]:
        name = names.setdefault(row["image"].tobytes(), f"{len(names)}.png")
        row["image"].save(folder / name)
        if row["task"] in ("existence", "attribute", "reading"):
            rows.append({**row, "image": name})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def test_verify_reproduces_the_certified_score_or_says_that_it_does_not(
    registry: Registry, questions: Path, tmp_path: Path
) -> None:
    model, processor = load_model(str(reference.WEIGHTS), "cpu")
    anatomy: Anatomy = anatomy_of(model)
    examples = data.load_splits(questions)["certify"]
    plan = Plan(stages=(Stage(layer=2, keep=0.2),))
    scores = Evaluator(model, processor, examples)(plan).scores
    by_task: dict[str, list[float]] = {}
    for example, score in zip(examples, scores, strict=True):
        by_task.setdefault(example.task, []).append(score)
    macro = sum(sum(each) / len(each) for each in by_task.values()) / len(by_task)
    assert 0 < macro < 1
    shutil.copytree(reference.WEIGHTS, tmp_path / "model")
    for claimed, code in ((macro, 0), (macro + 0.01, 1)):
        certificate = {**CERTIFIED, "macro": {"value": claimed, "low": 0.0, "high": 1.0}}
        evidence = {"certificate": certificate, "data": {"certify": data.digest(examples)}}
        profile = replace(PROFILE, plan=plan, model=anatomy.identity, evidence=evidence)
        profile.save(tmp_path / "profile.json")
        version = register(registry, "scored", tmp_path / "profile.json")
        asked = ("verify", version.uri, "--model", tmp_path / "model", "--data", questions, "--workers", 1)
        if code == 0:
            found = told(*asked)
            assert found["reached"] == pytest.approx(macro, abs=1e-12)
            assert found["reproduced"] is True
        else:
            assert "does NOT reproduce" in typed(*asked, code=1)
    text = typed("verify", version.uri, "--model", tmp_path / "none", "--data", questions, code=2)
    assert "--model must be" in text


def test_other_questions_are_refused_before_they_are_answered(
    registry: Registry, questions: Path, tmp_path: Path
) -> None:
    evidence = {"certificate": CERTIFIED, "data": {"certify": "0" * 64}}
    replace(PROFILE, evidence=evidence).save(tmp_path / "profile.json")
    version = register(registry, "asked", tmp_path / "profile.json")
    text = typed("verify", version.uri, "--data", questions, code=2)
    assert f"--data must be what the profile was certified with, SHA-256 {'0' * 64}" in text
