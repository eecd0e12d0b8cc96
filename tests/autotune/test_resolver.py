"""From a reference to a model that runs by it: what is pulled, kept, refused and applied, with a network or without."""

import ast
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("mlflow")

import autotune
import btp
from autotune import mlflow_store, profile_cache
from autotune.profile_cache import CACHE, ProfileCache
from autotune.registered import NotRegisteredError, RegistryError
from autotune.registry import Registry
from autotune.resolver import OFFLINE, TRACKING_URI, resolve
from btp.errors import BTPError, ProfileError, RealizationError
from btp.profile import Profile, Workload
from btp.pruning import is_pruned
from tests.autotune.registries import register, save_profile, serving
from tests.btp.families import FAMILIES

PLAN = btp.Plan(stages=(btp.Stage(layer=1, keep=0.4),))
LLAVA = FAMILIES["llava"]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ProfileCache:
    monkeypatch.setenv(CACHE, str(tmp_path / "cache"))
    for variable in (OFFLINE, TRACKING_URI):
        monkeypatch.delenv(variable, raising=False)
    return ProfileCache()


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.originalname)


@pytest.fixture(scope="module")
def model() -> Any:
    return LLAVA.build()


@pytest.fixture
def fitting(model: Any) -> Profile:
    """A profile that was made for the model, here."""
    key = asdict(btp.device_key(model, LLAVA.inputs(1)))
    return Profile(
        plan=PLAN,
        model=btp.anatomy_of(model).identity,
        workload=Workload(**{field.name: key[field.name] for field in fields(Workload)}),
        device=btp.DeviceKey(**key),
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**LLAVA.inputs(1), logits_to_keep=1).logits


class TestFit:
    def test_a_profile_that_fits_is_applied_in_silence(self, model: Any, fitting: Profile) -> None:
        with btp.prune(model, fitting) as trace:
            logits(model)
        assert trace.counts == (25, 10, 10, 10)

    def test_another_prompt_is_no_matter(self, model: Any, fitting: Profile) -> None:
        other = replace(fitting, workload=replace(fitting.workload, prompt_tokens=99, batch_size=7))
        with btp.prune(model, other):
            pass

    @pytest.mark.parametrize(
        ("part", "change", "told"),
        [
            ("model", {"num_layers": 12}, "num_layers 12, here 4"),
            ("workload", {"dtype": "bfloat16"}, "dtype bfloat16, here float32"),
            ("workload", {"attention": "eager"}, "attention eager, here sdpa"),
            ("device", {"name": "NVIDIA H200"}, "name NVIDIA H200, here "),
            ("device", {"torch": "2.11.0"}, f"torch 2.11.0, here {torch.__version__}"),
            ("device", {"transformers": "5.1.0"}, "transformers 5.1.0, here "),
            ("device", {"threads": 99}, "threads 99, here "),
            ("device", {"driver": "570"}, "driver 570, here none"),
            ("device", {"cuda": "12.8"}, "cuda 12.8, here none"),
        ],
    )
    def test_what_does_not_fit_is_spelled_out(
        self, model: Any, fitting: Profile, part: str, change: dict[str, Any], told: str
    ) -> None:
        other = replace(fitting, **{part: replace(getattr(fitting, part), **change)})
        with (
            pytest.raises(ProfileError, match=f"but it was made for {re.escape(told)}[^;]*; "),
            btp.prune(model, other),
        ):
            pass
        if part == "device":
            with (
                pytest.warns(UserWarning, match=f"not certified here: .* on {re.escape(told)}"),
                btp.prune(model, other, allow_device=True) as trace,
            ):
                logits(model)
            assert trace.counts[-1] == 10
        else:
            with pytest.raises(ProfileError, match=told), btp.prune(model, other, allow_device=True):
                pass

    def test_every_difference_is_told_at_once(self, model: Any, fitting: Profile) -> None:
        other = replace(
            fitting,
            model=replace(fitting.model, hidden_size=7),
            workload=replace(fitting.workload, dtype="float16"),
            device=replace(fitting.device, torch="2.9.0", threads=3),
        )
        with pytest.raises(ProfileError) as raised, btp.prune(model, other):
            pass
        for told in ("hidden_size 7", "dtype float16", "torch 2.9.0", "threads 3", "allow_device=True"):
            assert told in str(raised.value)

    @pytest.mark.parametrize(
        ("change", "told"),
        [
            ({"threads": 99}, r"; call torch\.set_num_threads\(99\), or pass allow_device=True to go without [^;,]*$"),
            ({"threads": 99, "torch": "2.9.0"}, r"; call torch\.set_num_threads\(99\) and pass allow_device=True "),
            ({"threads": 0}, r"; pass allow_device=True "),
            ({"torch": "2.9.0"}, r"; pass allow_device=True "),
        ],
    )
    def test_other_threads_can_be_set(self, model: Any, fitting: Profile, change: dict[str, Any], told: str) -> None:
        other = replace(fitting, device=replace(fitting.device, **change))
        with pytest.raises(ProfileError, match=told), btp.prune(model, other):
            pass

    def test_files_are_read(self, model: Any, fitting: Profile, tmp_path: Path) -> None:
        PLAN.save(tmp_path / "plan.json")
        replace(fitting, device=replace(fitting.device, threads=99)).save(tmp_path / "profile.json")
        with btp.prune(model, tmp_path / "plan.json") as trace:
            logits(model)
        assert trace.counts[-1] == 10
        with pytest.raises(ProfileError, match="threads 99"), btp.prune(model, str(tmp_path / "profile.json")):
            pass
        with pytest.raises(ProfileError, match=r"none\.json: cannot be read"), btp.prune(model, "none.json"):
            pass

    def test_a_reference_takes_someone_to_resolve_it(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("btp.pruning.entry_points", lambda **_: ())
        with (
            pytest.raises(BTPError, match=r"nothing is installed that does; pip install 'btp-autotune\[registry\]'"),
            btp.prune(model, "models:/x@champion-cpu"),
        ):
            pass


@pytest.fixture
def served(
    registry: Registry,
    name: str,
    fitting: Profile,
    cache: ProfileCache,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> str:
    """A reference to the fitting profile, and the variable that names its registry."""
    fitting.save(tmp_path / "fitting.json")
    version = register(registry, name, tmp_path / "fitting.json")
    monkeypatch.setenv(TRACKING_URI, registry.tracking_uri)
    return f"models:/{name}@{version.alias}"


class TestApply:
    def test_prune_takes_a_reference(self, model: Any, served: str) -> None:
        with btp.prune(model, served) as trace:
            logits(model)
        assert trace.counts[-1] == 10

    def test_applied_until_removed_whoever_holds_it(self, model: Any, served: str) -> None:
        dense = logits(model)
        applied = autotune.apply(model, served)
        pruned = logits(model)
        assert applied.trace.counts == (25, 10, 10, 10)
        assert applied.profile.plan == PLAN
        with pytest.raises(RealizationError, match="one plan at a time"):
            autotune.apply(model, served)
        applied.remove()
        applied.remove()
        assert not is_pruned(model)
        assert torch.equal(logits(model), dense)
        autotune.apply(model, served)
        gc.collect()
        assert torch.equal(logits(model), pruned)
        _remove_all()

    def test_a_profile_that_does_not_fit_is_refused_and_leaves_no_trace(self, model: Any, fitting: Profile) -> None:
        other = replace(fitting, device=replace(fitting.device, torch="2.9.0"))
        with pytest.raises(ProfileError, match=r"torch 2\.9\.0"):
            autotune.apply(model, other)
        assert not is_pruned(model)
        with pytest.warns(UserWarning, match="not certified here"):
            autotune.apply(model, other, allow_device=True).remove()

    def test_no_registry_is_told(self, cache: ProfileCache) -> None:
        with pytest.raises(RegistryError, match=f"that {TRACKING_URI} names, which is not set"):
            resolve("models:/x@champion-cpu")

    def test_the_variable_takes_it_offline(
        self, served: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        online = resolve(served)
        monkeypatch.setenv(OFFLINE, "1")
        monkeypatch.delenv(TRACKING_URI)
        monkeypatch.setattr(mlflow_store, "MlflowStore", None)
        assert resolve(served) == online
        assert "resolved 0 s ago" in caplog.text


def _remove_all() -> None:
    from autotune import resolver

    for applied in list(resolver._APPLIED):
        applied.remove()


class TestCache:
    @pytest.fixture
    def reference(self, registry: Registry, name: str, tmp_path: Path) -> Iterator[str]:
        (tmp_path / "evidence.txt").write_text("paired")
        path = save_profile(tmp_path / "profile.json", 2)
        version = register(registry, name, path, evidence={"evidence.txt": tmp_path / "evidence.txt"})
        return f"models:/{name}@{version.alias}"

    def test_what_is_here_is_not_downloaded_again(
        self, registry: Registry, cache: ProfileCache, reference: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = cache.pull(reference, registry)
        assert first.downloaded
        assert (first.folder / "evidence.txt").read_text() == "paired"
        monkeypatch.setattr(Registry, "download", None)
        again = cache.pull(reference, registry)
        assert (again.downloaded, again.profile, again.folder) == (False, first.profile, first.folder)
        by_number = cache.pull(first.resolution.uri, registry)
        assert by_number.folder == first.folder

    @pytest.mark.parametrize("damage", ["altered", "deleted", "added", "manifest"])
    def test_a_damaged_entry_is_fetched_anew_and_refused_offline(
        self, registry: Registry, cache: ProfileCache, reference: str, damage: str
    ) -> None:
        folder = cache.pull(reference, registry).folder
        if damage == "altered":
            (folder / "evidence.txt").write_text("forged")
        elif damage == "deleted":
            (folder / "profile.json").unlink()
        elif damage == "added":
            (folder / "more.json").write_text("{}")
        else:
            manifest = json.loads((folder / "manifest.json").read_text())
            manifest["files"]["evidence.txt"]["sha256"] = "0" * 64
            (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(RegistryError, match=r"must be whole in the cache .* is damaged"):
            cache.pull(reference, registry, offline=True)
        assert cache.pull(reference, registry).downloaded
        assert cache.pull(reference, registry, offline=True).folder == folder
        assert sorted(path.name for path in folder.iterdir()) == ["evidence.txt", "manifest.json", "profile.json"]
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]

    def test_offline_goes_by_the_last_resolution_and_tells_its_age(
        self, registry: Registry, cache: ProfileCache, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = cache.pull(reference, registry)
        register(registry, first.resolution.name, save_profile(tmp_path / "newer.json", 3))
        now = time.time()
        monkeypatch.setattr(profile_cache.time, "time", lambda: now + 3 * 3600)
        nowhere = Registry(registry.tracking_uri)
        monkeypatch.setattr(nowhere, "_store", None, raising=True)
        monkeypatch.setattr(Registry, "address", registry.address)
        offline = cache.pull(reference, nowhere, offline=True)
        assert offline.profile == first.profile
        assert offline.resolution.age == "resolved 3 h ago"
        assert cache.pull(reference, None, offline=True).profile == first.profile

    def test_what_offline_does_not_know_is_refused_with_what_there_is(
        self, registry: Registry, cache: ProfileCache, reference: str, tmp_path: Path
    ) -> None:
        with pytest.raises(NotRegisteredError, match=r"is not in the cache .*; it has: nothing"):
            cache.pull(reference, None, offline=True)
        cache.pull(reference, registry)
        with pytest.raises(NotRegisteredError, match=f"models:/other@x is not in the cache .*; it has: {reference}$"):
            cache.pull("models:/other@x", None, offline=True)
        elsewhere = Registry(f"sqlite:///{tmp_path}/elsewhere.db")
        with pytest.raises(NotRegisteredError):
            cache.pull(reference, elsewhere, offline=True)

    @pytest.mark.parametrize("digest", ["../../etc", "", "ABC"])
    def test_a_tag_is_no_path(self, registry: Registry, cache: ProfileCache, reference: str, digest: str) -> None:
        version = replace(registry.find(reference), manifest=digest, sha256=digest)
        with pytest.raises(RegistryError, match="a version is kept by its SHA-256"):
            cache._fetched(version, registry)

    def test_the_default_folder_is_the_systems(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(CACHE, raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert ProfileCache().folder == tmp_path / "btp-autotune"


def test_nothing_is_unpickled(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import autotune.mlflow_store\n"
        "from mlflow.environment_variables import MLFLOW_ALLOW_PICKLE_DESERIALIZATION as allowed\n"
        "print(allowed.get())"
    )
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    package = Path(autotune.__file__ or "").parent
    modules = ["registry", "registered", "version_folder", "mlflow_store", "profile_cache", "resolver", "bundle"]
    for module in modules:
        tree = ast.parse((package / f"{module}.py").read_text())
        imported = {
            alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in ([*node.names] if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert not imported & {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        assert not {"load_model", "unsafe_load"} & {
            node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)
        }


def test_importing_the_package_imports_nothing_of_it() -> None:
    code = "import sys, autotune; print(len({'torch', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
    with pytest.raises(AttributeError, match="has no attribute 'aply'"):
        _ = autotune.aply


SLIM = """
import pickle, sys
from importlib.machinery import PathFinder

HIDDEN = {"optuna", "ray", "alembic", "matplotlib", "plotly", "scipy", "sqlalchemy", "joblib", "datasets"}

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in HIDDEN else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]

def refuse(*_, **__):
    raise AssertionError("something was unpickled")

import torch, transformers
pickle.load = pickle.loads = refuse
import autotune, btp
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1]).eval()
processor = AutoProcessor.from_pretrained(sys.argv[1])
asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many shapes are there?"}]}]
picture = Image.new("RGB", (64, 64), "red")
text = processor.apply_chat_template(asked, add_generation_prompt=True)
inputs = processor(images=[picture], text=[text], return_tensors="pt")
applied = autotune.apply(model, sys.argv[2])
with torch.inference_mode():
    answer = model.generate(**inputs, max_new_tokens=4)
print(applied.trace.counts[-1], answer.shape[0], sorted(HIDDEN & set(sys.modules)))
"""


@pytest.mark.slow
def test_a_machine_without_the_tuner_pulls_from_a_server_applies_and_answers(tmp_path: Path) -> None:
    from autotune.evaluation import load_model
    from autotune.reference import WEIGHTS

    model, _ = load_model(str(WEIGHTS), "cpu")
    torch.set_num_threads(1)
    anatomy = btp.anatomy_of(model)
    inputs = {"input_ids": torch.full((1, anatomy.identity.num_image_tokens), anatomy.image_token_id)}
    key = btp.device_key(model, inputs)
    Profile(
        plan=PLAN,
        model=anatomy.identity,
        workload=Workload(**{field.name: getattr(key, field.name) for field in fields(Workload)}),
        device=key,
    ).save(tmp_path / "profile.json")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", CACHE: str(tmp_path / "cache")}
    with serving(tmp_path) as address:
        version = register(Registry(address), "slim", tmp_path / "profile.json")
        environment[TRACKING_URI] = address
        command = [sys.executable, "-c", SLIM, str(WEIGHTS), f"models:/slim@{version.alias}"]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr
    counts, answers, loaded = done.stdout.split(maxsplit=2)
    assert (counts, answers, loaded.strip()) == (str(PLAN.num_kept(anatomy.identity.num_image_tokens)[0]), "1", "[]")
    offline = (
        "import socket; socket.socket = None\n"
        "from autotune.resolver import resolve\n"
        f"print(resolve('models:/slim@{version.alias}').digest)"
    )
    environment = {key: value for key, value in environment.items() if key != TRACKING_URI} | {OFFLINE: "1"}
    done = subprocess.run([sys.executable, "-c", offline], capture_output=True, text=True, env=environment, timeout=60)
    assert done.stdout.strip() == version.sha256, done.stderr
    assert "resolved " in done.stderr
