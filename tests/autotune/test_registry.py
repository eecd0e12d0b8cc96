"""The registry on a real MLflow with a SQLite file: what goes in comes out, and nothing half-written stays."""

import hashlib
import json
import multiprocessing
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from autotune.registered import ANSWERS, NotRegisteredError, RegistryError, Version
from autotune.registry import Registry
from btp.errors import ProfileError
from btp.profile import ModelIdentity, Profile
from btp.sealed import seal, sha256_of
from tests.autotune.registries import (
    CERTIFIED,
    PROFILE,
    UNCERTIFIED,
    register,
    register_and_die,
    save_profile,
    serving,
)

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One database for the file, as creating its tables takes seconds; each test keeps to a model name of its own."""
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")


@pytest.fixture
def client(registry: Registry) -> MlflowClient:
    """MLflow itself, to look past the registry at what it left behind."""
    return MlflowClient(tracking_uri=registry.tracking_uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


def active_runs(client: MlflowClient, experiment: str) -> list[Any]:
    found = client.get_experiment_by_name(experiment)
    return client.search_runs([found.experiment_id]) if found else []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with serving(tmp_path) as address:
        yield address


def artifact(client: MlflowClient, version: Version) -> Path:
    """Where the profile of a version lies on this disk."""
    return Path(client.get_run(version.run_id).info.artifact_uri.removeprefix("file://")) / "profile" / "profile.json"


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return save_profile(tmp_path / "profile.json", 0)


@pytest.fixture
def other_profile(tmp_path: Path) -> Path:
    return save_profile(tmp_path / "other.json", 2)


def test_a_registered_profile_is_pulled_unchanged(registry: Registry, name: str, profile: Path, tmp_path: Path) -> None:
    version = register(registry, name, profile)
    pulled = registry.pull(name, "candidate-cpu", tmp_path / "new" / "pulled.json")
    assert pulled == tmp_path / "new" / "pulled.json"
    assert pulled.read_bytes() == profile.read_bytes()
    assert [path.name for path in pulled.parent.iterdir()] == ["pulled.json"]
    assert version.version == 1
    assert version.alias == "candidate-cpu"
    assert version.uri == f"models:/{name}/1"
    assert version.sha256 == Profile.load(profile).digest


def test_a_folder_receives_profile_json(registry: Registry, name: str, profile: Path, tmp_path: Path) -> None:
    register(registry, name, profile)
    folder = tmp_path / "folder"
    folder.mkdir()
    assert registry.pull(name, "candidate-cpu", folder) == folder / "profile.json"


def test_one_run_holds_evidence_metrics_params_and_tags(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    (tmp_path / "trials").mkdir()
    (tmp_path / "trials" / "part.parquet").write_bytes(b"rows")
    (tmp_path / "picture").write_bytes(b"png")
    evidence = {"front.png": tmp_path / "picture", "study/trials": tmp_path / "trials"}
    version = register(registry, name, profile, evidence=evidence)
    (run,) = active_runs(client, name)
    assert run.info.run_id == version.run_id
    assert run.info.status == "FINISHED"
    assert run.data.metrics == {"prefill_ms": 12.5}
    assert run.data.params == {"layer": "2"}
    assert (run.data.tags["seed"], run.data.tags["device"]) == ("3", "cpu")
    stored = Path(client.download_artifacts(version.run_id, "profile", str(tmp_path)))
    assert (stored / "front.png").read_bytes() == b"png"
    assert (stored / "study" / "trials" / "part.parquet").read_bytes() == b"rows"


def test_the_alias_moves_to_the_second_version(
    registry: Registry, name: str, profile: Path, other_profile: Path, tmp_path: Path
) -> None:
    first = register(registry, name, profile)
    second = register(registry, name, other_profile)
    register(registry, name, save_profile(tmp_path / "gpu.json", 0, device="NVIDIA H200"))
    listed = [(version.version, version.aliases) for version in registry.versions(name)]
    assert listed == [(3, ("candidate-nvidia-h200",)), (2, ("candidate-cpu",)), (1, ())]
    assert registry.versions(name)[2].sha256 == first.sha256 != second.sha256
    assert registry.pull(name, "candidate-cpu", tmp_path / "p.json").read_bytes() == other_profile.read_bytes()


def test_another_process_reads_what_this_one_wrote_and_stays_quiet(
    registry: Registry, name: str, profile: Path, tmp_path: Path
) -> None:
    register(registry, name, profile)
    code = (
        "import sys, pathlib; from autotune.registry import Registry\n"
        "print(Registry(sys.argv[1]).pull(sys.argv[2], 'candidate-cpu', pathlib.Path(sys.argv[3])).name)"
    )
    arguments = [registry.tracking_uri, name, str(tmp_path / "pulled.json")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("pulled.json\n", "")
    assert not (tmp_path / "mlruns").exists()


def test_a_new_database_is_created_in_silence(tmp_path: Path) -> None:
    code = "import sys; from autotune.registry import Registry; Registry(sys.argv[1]).versions('nothing')"
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    done = subprocess.run([sys.executable, "-c", code, uri], capture_output=True, text=True, cwd=tmp_path)
    assert done.stderr.splitlines()[-1].startswith("autotune.registered.NotRegisteredError: no profile is registered")
    assert "INFO" not in done.stderr
    assert done.stdout == ""
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_tampered_artifact_is_refused_and_not_put_in_place(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    version = register(registry, name, profile)
    stored = artifact(client, version)
    stored.write_text(stored.read_text().replace("0.5", "0.6"))
    with pytest.raises(RegistryError, match=f"models:/{name}/1 is damaged"):
        registry.pull(name, "candidate-cpu", tmp_path / "pulled.json")
    assert not (tmp_path / "pulled.json").exists()


def test_an_exchanged_profile_is_refused_though_it_is_valid(
    registry: Registry, client: MlflowClient, name: str, profile: Path, other_profile: Path, tmp_path: Path
) -> None:
    version = register(registry, name, profile)
    artifact(client, version).write_bytes(other_profile.read_bytes())
    with pytest.raises(RegistryError, match=r"is damaged, profile\.json must have SHA-256"):
        registry.pull(name, "candidate-cpu", tmp_path / "pulled.json")
    with pytest.raises(
        RegistryError, match=f"must have SHA-256 {version.sha256}, got .*changed after it was registered"
    ):
        registry.profile(version)


def test_an_unknown_alias_lists_the_known_ones(registry: Registry, name: str, tmp_path: Path) -> None:
    for device in ("H200", "A100"):
        register(registry, name, save_profile(tmp_path / "profile.json", 0, device))
    with pytest.raises(RegistryError, match=r"no alias 'champion-a100'; it has: candidate-a100, candidate-h200$"):
        registry.pull(name, "champion-a100", tmp_path)


def test_an_unknown_name_is_said_to_be_so_and_tells_a_stranger_nothing_else(
    registry: Registry, name: str, profile: Path, tmp_path: Path
) -> None:
    register(registry, name, profile)
    assert registry.file is not None
    nowhere = Registry(f"sqlite:///{tmp_path}/none.db")
    for ask, told in (
        (
            lambda: registry.pull("other", "cpu", tmp_path),
            "no profile is registered as 'other'; autotune profiles list",
        ),
        (lambda: registry.versions("other"), "no profile is registered as 'other'; autotune profiles list"),
        (lambda: registry.find(f"{name}/7"), f"'{name}' has no version 7; it has: 1"),
        (lambda: nowhere.find(f"{name}/7"), "a registry must exist before one can pull from it, got none"),
    ):
        with pytest.raises(NotRegisteredError) as raised:
            ask()
        assert str(raised.value).startswith(told)
        assert str(registry.file.parent) not in str(raised.value)
        assert str(tmp_path) not in str(raised.value)


def test_a_password_is_in_no_error(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(RegistryError, match=f"http://127.0.0.1:{port}") as raised:
            Registry(f"http://somebody:se@cret@127.0.0.1:{port}").pull("x", "cpu", tmp_path)
    for word in ("somebody", "cret"):
        assert word not in str(raised.value)
    with pytest.raises(RegistryError, match="got 'ftp://host'"):
        Registry("ftp://somebody:se@cret@host")


def test_a_name_from_before_is_for_what_its_newest_version_was_made_with(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    register(registry, name, profile)
    for tag in client.get_registered_model(name).tags:
        client.delete_registered_model_tag(name, tag)
    assert client.get_registered_model(name).tags == {}
    deeper = save_profile(tmp_path / "deeper.json", 0, num_layers=5)
    with pytest.raises(RegistryError, match=r"holds profiles of one model .*num_layers is 4 there, 5"):
        register(registry, name, deeper)
    assert client.get_registered_model(name).tags == {}
    register(registry, name, profile)
    assert client.get_registered_model(name).tags["workload"] == sha256_of(asdict(PROFILE.workload))
    client.create_registered_model(f"{name}-empty")
    register(registry, f"{name}-empty", deeper)
    with pytest.raises(RegistryError, match="num_layers is 5 there, 4 here"):
        register(registry, f"{name}-empty", profile)


def test_a_manifest_whose_tag_is_gone_is_not_overlooked(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    register(registry, name, profile)
    client.delete_model_version_tag(name, "1", "manifest")
    with pytest.raises(RegistryError, match="must have its manifest's SHA-256 as a tag, got none"):
        registry.pull(name, "candidate-cpu", tmp_path / "pulled.json")
    artifact(client, registry.versions(name)[0]).with_name("manifest.json").unlink()  # as it was before manifests
    assert registry.pull(name, "candidate-cpu", tmp_path / "pulled.json").read_bytes() == profile.read_bytes()


@pytest.mark.parametrize(
    "evidence",
    [
        {"rows": 7, "data": ["x"], "latency": "fast"},
        {"rows": [1, {"name": "tuned", "macro": 3, "by_task": {"a": "b"}}, {"name": "dense", "by_task": {"a": 1}}]},
        {"rows": [{"name": "dense", "macro": {"value": 0}}, {"name": "tuned", "macro": {"value": "much"}}]},
    ],
)
def test_evidence_may_say_anything(registry: Registry, name: str, tmp_path: Path, evidence: dict[str, Any]) -> None:
    name = name.replace("[", "-")
    path = save_profile(tmp_path / "profile.json", 0, num_layers=61, **evidence)
    version = register(registry, name, path)
    assert (version.retention, version.worst_task_retention, version.latency_ms) == (None, None, None)
    (known, *_) = registry.nearest(Profile.load(path).model)
    assert known.data_digests == {}


def test_a_failure_in_the_last_step_leaves_neither_run_nor_version(
    registry: Registry,
    client: MlflowClient,
    name: str,
    profile: Path,
    other_profile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = register(registry, name, profile)
    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(RegistryError, match=r"could not register .*gone; check that"):
            register(registry, name, other_profile)
    assert [run.info.run_id for run in active_runs(client, name)] == [kept.run_id]
    assert registry.versions(name) == [kept]
    assert registry.pull(name, "candidate-cpu", tmp_path / "p.json").read_bytes() == profile.read_bytes()


def fail(*_: object) -> None:
    raise MlflowException("the registry is gone")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_interrupted_upload_leaves_no_run(
    registry: Registry,
    client: MlflowClient,
    profile: Path,
    failure: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"interrupted-{failure.__name__}"

    def stop(*_: object) -> None:
        raise failure

    monkeypatch.setattr(MlflowClient, "log_artifacts", stop)
    with pytest.raises(failure):
        register(registry, name, profile)
    assert active_runs(client, name) == []
    assert not client.search_registered_models(f"name='{name}'")


def test_a_bad_profile_is_refused_before_anything_is_written(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    changed = tmp_path / "changed.json"
    changed.write_text(profile.read_text().replace("0.5", "0.6"))
    for bad in (changed, tmp_path / "missing.json"):
        with pytest.raises(ProfileError, match=str(bad)):
            register(registry, name, bad)
    assert client.get_experiment_by_name(name) is None


def test_a_parameter_too_long_for_mlflow_is_refused_and_not_cut(
    registry: Registry, client: MlflowClient, name: str, profile: Path
) -> None:
    with pytest.raises(RegistryError, match="6000"):
        register(registry, name, profile, params={"plan": "x" * 6001})
    assert active_runs(client, name) == []


@pytest.mark.parametrize("evidence_name", ["/etc/front.png", "../front.png"])
def test_evidence_stays_in_its_folder(registry: Registry, name: str, profile: Path, evidence_name: str) -> None:
    with pytest.raises(RegistryError, match="inside its folder"):
        register(registry, name, profile, evidence={evidence_name: profile})


def test_missing_evidence_is_refused(registry: Registry, name: str, profile: Path, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"must exist .* for 'front.png'"):
        register(registry, name, profile, evidence={"front.png": tmp_path / "none.png"})


@pytest.mark.parametrize("evidence_name", ["model.pkl", "weights.bin", "deep/script.py", "README", "a.json.gz"])
def test_only_plain_data_is_evidence(registry: Registry, name: str, profile: Path, evidence_name: str) -> None:
    with pytest.raises(RegistryError, match=f"holds plain data only, .* got {evidence_name}; write them"):
        register(registry, name.replace("/", "-"), profile, evidence={evidence_name: profile})


def test_evidence_is_no_profile_and_no_manifest(registry: Registry, name: str, profile: Path) -> None:
    for taken in ("profile.json", "manifest.json"):
        with pytest.raises(RegistryError, match="give it another name"):
            register(registry, name, profile, evidence={taken: profile})


def test_the_manifest_names_every_file_of_the_one_folder(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    (tmp_path / "card").write_text("# Card")
    version = register(registry, name, profile, evidence={"CARD.md": tmp_path / "card", "select.json": profile})
    stored = artifact(client, version).parent
    manifest = json.loads((stored / "manifest.json").read_text())
    assert manifest["sha256"] == version.manifest == client.get_model_version(name, "1").tags["manifest"]
    found = {file.name: {"sha256": sha256(file), "bytes": file.stat().st_size} for file in stored.iterdir()}
    assert manifest["files"] == {key: value for key, value in found.items() if key != "manifest.json"}
    assert client.get_model_version(name, "1").source.endswith("/profile")
    into = tmp_path / "into"
    into.mkdir()
    assert registry.download(version, into).digest == version.sha256
    assert sorted(file.name for file in into.iterdir()) == ["CARD.md", "manifest.json", "profile.json", "select.json"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("damage", ["altered", "deleted", "added", "manifest"])
def test_a_damaged_folder_is_not_downloaded(
    registry: Registry, client: MlflowClient, profile: Path, tmp_path: Path, damage: str
) -> None:
    version = register(registry, f"damaged-{damage}", profile, evidence={"select.json": profile})
    stored = artifact(client, version).parent
    if damage == "altered":
        (stored / "select.json").write_text("{}")
    elif damage == "deleted":
        (stored / "select.json").unlink()
    elif damage == "added":
        (stored / "more.json").write_text("{}")
    else:
        (stored / "manifest.json").write_text(json.dumps(seal({"schema_version": 1, "files": {}})))
    into = tmp_path / "into"
    into.mkdir()
    with pytest.raises(RegistryError, match=f"{version.uri} is damaged, .*(select|more|manifest)"):
        registry.download(version, into)
    assert list(into.iterdir()) == []


def test_a_name_is_for_one_model_and_one_workload(
    registry: Registry, client: MlflowClient, name: str, profile: Path, tmp_path: Path
) -> None:
    register(registry, name, profile)
    tags = client.get_registered_model(name).tags
    assert json.loads(tags["model_identity.text"]) == asdict(PROFILE.model)
    assert tags["workload"] == sha256_of(asdict(PROFILE.workload))
    registry.check_home(name, PROFILE.model, PROFILE.workload)
    registry.check_home(f"{name}-free", replace(PROFILE.model, num_layers=5), PROFILE.workload)
    with pytest.raises(RegistryError, match="num_layers is 4 there, 5 here; use another --name"):
        register(registry, name, save_profile(tmp_path / "deeper.json", 0, num_layers=5))
    other = replace(PROFILE.workload, prompt_tokens=99, dtype="bfloat16")
    with pytest.raises(RegistryError, match="dtype is 'float32' there, 'bfloat16' here; prompt_tokens is 24 there"):
        registry.check_home(name, PROFILE.model, other)
    assert len(active_runs(client, name)) == len(registry.versions(name)) == 1


def test_finalists_are_child_runs_and_go_with_a_failure(
    registry: Registry,
    client: MlflowClient,
    name: str,
    profile: Path,
    other_profile: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finalists: dict[str, dict[str, float | str]] = {
        "hand-set": {"macro": 0.9, "certified": "false", "reasons": "too slow"},
        "draw 7": {"macro": 0.91, "certified": "true"},
    }
    version = register(registry, name, profile, finalists=finalists)
    children = {run.info.run_name: run for run in active_runs(client, name) if run.info.run_id != version.run_id}
    assert children.keys() == finalists.keys()
    for child in children.values():
        assert child.data.tags["mlflow.parentRunId"] == version.run_id
        assert child.info.status == "FINISHED"
    assert children["draw 7"].data.metrics == {"macro": 0.91}
    assert children["hand-set"].data.tags["reasons"] == "too slow"
    before = {run.info.run_id for run in active_runs(client, name)}
    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(RegistryError, match="gone"):
            register(registry, name, other_profile, finalists=finalists)
    assert {run.info.run_id for run in active_runs(client, name)} == before


def test_what_a_killed_process_left_of_a_profile_is_gone_once_it_is_registered(
    registry: Registry, client: MlflowClient, name: str, profile: Path, other_profile: Path
) -> None:
    finalists: dict[str, dict[str, float | str]] = {"hand-set": {"macro": 0.9}}
    other = register(registry, name, other_profile)
    process = FORK.Process(target=register_and_die, args=(registry.tracking_uri, name, profile, finalists))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(active_runs(client, name)) == 3
    version = register(registry, name, profile, finalists=finalists)
    runs = active_runs(client, name)
    assert len(runs) == 3
    assert {run.info.run_id for run in runs} > {other.run_id, version.run_id}
    assert [each.run_id for each in registry.versions(name)] == [version.run_id, other.run_id]


def test_what_was_killed_before_it_was_candidate_is_once_it_is_looked_for(
    registry: Registry, name: str, profile: Path, other_profile: Path
) -> None:
    register(registry, name, other_profile)
    process = FORK.Process(target=register_and_die, args=(registry.tracking_uri, name, profile, {}, True))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert registry.find(f"{name}@candidate-cpu").version == 1
    found = registry.take_up(name, Profile.load(profile).digest)
    assert found is not None
    assert (found.version, found.aliases) == (2, ("candidate-cpu",))
    assert registry.find(f"{name}@candidate-cpu").version == 2
    older = registry.take_up(name, Profile.load(other_profile).digest)
    assert older is not None
    assert (older.version, older.aliases) == (1, ())


def test_a_version_is_searched_by_what_its_profile_says(
    registry: Registry, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    dense = {"name": "dense", "macro": {"value": 0.8}, "by_task": {"reading": 0.5, "counting": 0.8, "none": 0.0}}
    tuned = {"name": "tuned", "macro": {"value": 0.76}, "by_task": {"reading": 0.45, "counting": 0.76, "none": 0.0}}
    interval = {"value": 12.5, "low": 12.0, "high": 13.25}
    evidence = {
        "study": "tiny-0123",
        "limit": "prefill_p50<=0.5x",
        "code_version": "abc",
        "data": {"certify": "def"},
        "rows": [dense, tuned],
        "latency": {"ratio": {"value": 0.45, "low": 0.4, "high": 0.49}, "ms": interval},
    }
    path = save_profile(tmp_path / "profile.json", 0, "NVIDIA H200", certificate=CERTIFIED, **evidence)
    version = register(registry, name, path)
    assert (version.device, version.device_name, version.dtype) == ("nvidia-h200", "NVIDIA H200", "float32")
    assert (version.study, version.limit, version.code_version) == ("tiny-0123", "prefill_p50<=0.5x", "abc")
    assert version.data_digest == sha256_of({"certify": "def"})
    assert (version.retention, version.worst_task_retention) == (0.95, 0.9)
    assert (version.ratio, version.ratio_high, version.latency_ms, version.latency_high_ms) == (0.45, 0.49, 12.5, 13.25)
    assert abs(version.created - time.time()) < 60
    (found,) = client.search_model_versions("tags.device = 'nvidia-h200' and tags.limit = 'prefill_p50<=0.5x'")
    assert found.name == name
    client.set_model_version_tag(name, "1", "retention", "much")  # a tag can be anything
    assert registry.versions(name)[0].retention is None


def test_what_is_not_told_is_empty(registry: Registry, name: str, profile: Path) -> None:
    version = register(registry, name, profile)
    assert (version.ratio, version.latency_ms, version.retention, version.study) == (None, None, None, "")


@pytest.mark.parametrize("bad", ["x", "models:/x", "x@", "@a", "x/y", "x/1@a", "a/b@c", "", "models:/x/-1"])
def test_a_reference_names_an_alias_or_a_version(registry: Registry, bad: str) -> None:
    with pytest.raises(RegistryError, match="a reference reads models:/NAME@ALIAS or models:/NAME/VERSION"):
        registry.find(bad)


def test_the_certificate_is_told_by_tags(registry: Registry, client: MlflowClient, name: str, tmp_path: Path) -> None:
    long = {**UNCERTIFIED, "reasons": ["too slow " * 1000], "essay": "x" * 9000}
    version = register(registry, name, save_profile(tmp_path / "profile.json", 0, certificate=long))
    tags = client.get_model_version(name, str(version.version)).tags
    assert tags["certified"] == "false"
    assert tags["certificate.margin"] == "0.02"
    assert tags["certificate.latency"] == '{"high":0.6,"low":0.4,"value":0.5}'
    assert len(tags["reasons"]) == 5000
    assert tags["reasons"].endswith("(more in the profile)")
    assert "certificate.essay" not in tags
    assert client.get_run(version.run_id).data.tags["certified"] == "false"


def test_profiles_of_the_same_model_are_found_on_any_device(registry: Registry, name: str, tmp_path: Path) -> None:
    evidence = {
        "answers": "0123",
        "data": {"select": "abc"},
        "model_digest": "def",
    }
    shape = {"num_layers": 31}  # of no other test
    old = save_profile(tmp_path / "old.json", 1, **shape)
    register(registry, name, old)
    register(registry, f"{name}-3", save_profile(tmp_path / "other.json", 1, num_layers=32))
    there = save_profile(tmp_path / "there.json", 2, "NVIDIA H200", certificate=CERTIFIED, **shape, **evidence)
    register(registry, f"{name}-2", there)
    found = registry.nearest(Profile.load(old).model)
    assert [(known.version.name, known.device.name) for known in found] == [
        (f"{name}-2", "NVIDIA H200"),
        (name, "cpu"),
    ]
    newest, oldest = found
    assert newest.plan == Profile.load(there).plan
    assert newest.version.certified
    assert (newest.answers_digest, newest.data_digests, newest.model_digest) == tuple(evidence.values())
    assert (oldest.answers_digest, oldest.data_digests, oldest.model_digest) == ("", {}, "")
    assert newest.answered("def", "abc", newest.device.dtype)
    for other in (("xyz", "abc", newest.device.dtype), ("def", "xyz", newest.device.dtype), ("def", "abc", "float8")):
        assert not newest.answered(*other)
    assert not oldest.answered("", "", oldest.device.dtype)
    assert registry.nearest(Profile.load(old).model, num=1) == [newest]
    assert registry.nearest(ModelIdentity(architecture="O'Hara", num_layers=1, hidden_size=1, num_image_tokens=1)) == []


@pytest.mark.parametrize("damage", ["altered", "deleted", "NaN"])
def test_a_damaged_profile_is_left_out_of_what_is_known_and_named(
    registry: Registry,
    client: MlflowClient,
    name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    sound, broken = (
        register(
            registry,
            name,
            save_profile(
                tmp_path / f"{number}.json", number, num_layers={"altered": 41, "deleted": 42, "NaN": 43}[damage]
            ),
        )
        for number in range(2)
    )
    stored = artifact(client, broken)
    if damage == "deleted":
        stored.unlink()
    else:
        stored.write_text("{}" if damage == "altered" else stored.read_text().replace("0.5", "NaN"))
    found = registry.nearest(Profile.load(tmp_path / "0.json").model)
    assert [known.version.version for known in found] == [sound.version]
    assert broken.uri in caplog.text


def test_what_a_plan_answered_comes_back_unless_it_was_changed(
    registry: Registry, client: MlflowClient, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answers = tmp_path / "answers"
    answers.write_text('{"0": {"scores": [1.0]}}')
    digest = hashlib.sha256(answers.read_bytes()).hexdigest()
    profile = save_profile(tmp_path / "profile.json", 0, num_layers=51, answers=digest)
    version = register(registry, name, profile, evidence={ANSWERS: answers})
    (known,) = registry.nearest(Profile.load(profile).model)
    assert registry.answers(known) == {"0": {"scores": [1.0]}}
    stored = artifact(client, version).with_name(ANSWERS)
    before = stored.parent.parent / "evidence" / ANSWERS  # where it lay before there were manifests
    before.parent.mkdir()
    before.write_bytes(stored.read_bytes())
    old = replace(known, version=replace(version, manifest=""))
    assert registry.answers(old) == {"0": {"scores": [1.0]}}
    stored.write_text('{"0": {"scores": [0.5]}}')
    assert registry.answers(known) is None
    assert f"the answers of {version.uri} were changed" in caplog.text
    stored.unlink()
    assert registry.answers(known) is None


def test_a_registry_that_is_not_there_knows_no_profiles(tmp_path: Path) -> None:
    identity = ModelIdentity(architecture="Tiny", num_layers=4, hidden_size=8, num_image_tokens=16)
    assert Registry(f"sqlite:///{tmp_path}/none.db").nearest(identity) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "sqlite:///", "postgresql://host/db", ""])
def test_only_sqlite_and_servers_are_registries(uri: str) -> None:
    with pytest.raises(RegistryError, match="a registry is sqlite:///FILE"):
        Registry(uri)


def test_a_server_keeps_its_own_artifacts(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="keeps the artifacts itself"):
        Registry("http://127.0.0.1:5000", tmp_path)


def test_a_server_that_is_not_there_is_said_to_be_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        with pytest.raises(
            RegistryError, match=f"could not look up models:/x@cpu in {address}: .* check that the registry runs"
        ):
            Registry(address).pull("x", "cpu", tmp_path)


@pytest.mark.slow
def test_a_server_holds_the_same_promises(
    server: str, name: str, profile: Path, other_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(server)
    first = register(registry, name, profile, evidence={"front.png": profile})
    with monkeypatch.context() as failing:
        failing.setattr(MlflowClient, "set_registered_model_alias", fail)
        with pytest.raises(RegistryError, match="gone"):
            register(registry, name, other_profile)
    assert registry.versions(name) == [first]
    (known,) = registry.nearest(Profile.load(profile).model)
    assert known.version.uri == first.uri
    assert registry.pull(name, "candidate-cpu", tmp_path / "p.json").read_bytes() == profile.read_bytes()
    (stored,) = (tmp_path / "served").glob(f"**/{first.run_id}/**/profile.json")
    stored.write_bytes(other_profile.read_bytes())
    with pytest.raises(RegistryError, match=r"profile\.json must have SHA-256"):
        registry.pull(name, "candidate-cpu", tmp_path / "p.json")
    assert (tmp_path / "p.json").read_bytes() == profile.read_bytes()
