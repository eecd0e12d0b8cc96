"""Bundles: a version carried in one file to a host without a registry, and files that only look like one."""

import io
import json
import stat
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow")

from mlflow import MlflowClient

from autotune import bundle
from autotune.bundle import EPOCH, export_bundle, import_bundle, register_bundle
from autotune.profile_cache import ProfileCache, Pulled
from autotune.registered import RegistryError
from autotune.registry import Registry
from btp.sealed import canonical_json, seal
from tests.autotune.registries import CERTIFIED, register, save_profile

NAME = "carried"


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    return Registry(f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db")


@pytest.fixture(scope="module")
def pulled(registry: Registry, tmp_path_factory: pytest.TempPathFactory) -> Pulled:
    folder = tmp_path_factory.mktemp("handed-in")
    (folder / "notes.txt").write_text("paired results")
    profile = save_profile(folder / "profile.json", 1, certificate=CERTIFIED)
    version = register(registry, NAME, profile, evidence={"deep/notes.txt": folder / "notes.txt"})
    return ProfileCache(folder / "cache").pull(f"{NAME}@{version.alias}", registry)


@pytest.fixture
def exported(pulled: Pulled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(EPOCH, "1700000000")
    export_bundle(pulled, ["champion-cpu", "candidate-cpu"], tmp_path / "bundle.zip")
    return tmp_path / "bundle.zip"


@pytest.fixture
def cache(tmp_path: Path) -> ProfileCache:
    return ProfileCache(tmp_path / "elsewhere")


@pytest.mark.parametrize("reference", ["carried@champion-cpu", "models:/carried@candidate-cpu", "models:/carried/1"])
def test_an_imported_version_is_found_offline_by_every_name(
    exported: Path, cache: ProfileCache, pulled: Pulled, reference: str, registry: Registry
) -> None:
    told, _ = import_bundle(exported, cache)
    assert told.references == [f"models:/{NAME}@candidate-cpu", f"models:/{NAME}@champion-cpu", f"models:/{NAME}/1"]
    for asked in (None, registry):
        found = cache.pull(reference, asked, offline=True)
        assert found.profile == pulled.profile
        assert (found.folder / "deep" / "notes.txt").read_text() == "paired results"
        assert found.resolution.resolved == 1700000000
    import_bundle(exported, cache)  # once more, into what is there


def test_the_same_version_gives_the_same_bytes(exported: Path, pulled: Pulled, tmp_path: Path) -> None:
    export_bundle(pulled, ["candidate-cpu", "champion-cpu"], tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == exported.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.zip", "bundle.zip"]


def test_a_bundle_is_registered_elsewhere_as_a_new_version(
    exported: Path, cache: ProfileCache, pulled: Pulled, tmp_path: Path
) -> None:
    there = Registry(f"sqlite:///{tmp_path}/there/mlflow.db")
    version = register_bundle(*import_bundle(exported, cache), there)
    assert (version.uri, version.alias, version.certified) == (f"models:/{NAME}/1", "candidate-cpu", True)
    assert version.digest == pulled.resolution.digest
    assert there.profile(version) == pulled.profile


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def zipped(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def with_extra(info: zipfile.ZipInfo | str, content: bytes = b"{}") -> Callable[[dict[str, bytes]], bytes]:
    def make(contents: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO(zipped(contents))
        with zipfile.ZipFile(buffer, "a") as archive, warnings.catch_warnings(action="ignore"):
            archive.writestr(info, content)
        return buffer.getvalue()

    return make


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def header(**entries: Any) -> Callable[[dict[str, bytes]], bytes]:
    """With other entries in the header, sealed anew."""

    def make(contents: dict[str, bytes]) -> bytes:
        body = {**json.loads(contents["bundle.json"]), **entries}
        return zipped({**contents, "bundle.json": canonical_json(seal(body)).encode()})

    return make


def listing(name: str) -> Callable[[dict[str, bytes]], bytes]:
    """A hostile name that bundle and manifest agree on."""

    def make(contents: dict[str, bytes]) -> bytes:
        manifest = json.loads(contents["version/manifest.json"])
        manifest["files"][name] = {"sha256": "0" * 64, "bytes": 2}
        sealed = seal(manifest)
        contents = {**contents, "version/manifest.json": canonical_json(sealed).encode(), f"version/{name}": b"{}"}
        return header(manifest=sealed["sha256"])(contents)

    return make


def manifest_with(**files: Any) -> Callable[[dict[str, bytes]], bytes]:
    """Other entries in the manifest, on which the bundle agrees."""

    def make(contents: dict[str, bytes]) -> bytes:
        manifest = json.loads(contents["version/manifest.json"])
        sealed = seal({**manifest, "files": {**manifest["files"], **files}})
        return header(manifest=sealed["sha256"])({**contents, "version/manifest.json": canonical_json(sealed).encode()})

    return make


def said(old: bytes, new: bytes, member: str = "bundle.json") -> Callable[[dict[str, bytes]], bytes]:
    """What no JSON of our own would say, so that no digest fits it."""

    def make(contents: dict[str, bytes]) -> bytes:
        assert old in contents[member]
        return zipped({**contents, member: contents[member].replace(old, new)})

    return make


HOSTILE: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "traversal": with_extra("version/../../evil.json"),
    "traversal that is listed": listing("../../evil.json"),
    "absolute": with_extra("/evil.json"),
    "backslashes": with_extra("version\\..\\evil.json"),
    "link": with_extra(link("version/link.json"), b"/etc/passwd"),
    "folder": with_extra("version/more.json/"),
    "extra member": with_extra("version/more.json"),
    "extra member outside": with_extra("more.json"),
    "code": with_extra("version/setup.py"),
    "pickle that is listed": listing("model.pkl"),
    "twice": with_extra("version/profile.json"),
    "missing member": lambda c: zipped({k: v for k, v in c.items() if k != "version/deep/notes.txt"}),
    "no header": lambda c: zipped({k: v for k, v in c.items() if k != "bundle.json"}),
    "no manifest": lambda c: zipped({k: v for k, v in c.items() if k != "version/manifest.json"}),
    "wrong digest of a file": lambda c: zipped({**c, "version/deep/notes.txt": b"forged results"}),
    "wrong digest of the profile": lambda c: zipped({**c, "version/profile.json": c["version/profile.json"] + b" "}),
    "wrong digest of the header": lambda c: zipped(
        {**c, "bundle.json": c["bundle.json"].replace(b"carried", b"curried")}
    ),
    "another manifest": header(manifest="0" * 64),
    "another profile": header(profile="0" * 64),
    "digest that is a path": header(manifest="../../evil"),
    "name that is a path": header(name="../../evil"),
    "aliases that are none": header(aliases=7),
    "aliases that are versions": header(aliases=["v7"]),
    "aliases that are paths": header(aliases=["../../evil"]),
    "name that is none": header(name="x" * 251),
    "number that is none": said(b'"exported":1700000000.0', b'"exported":1e999'),
    "NaN": said(b'"exported":1700000000.0', b'"exported":NaN'),
    "NaN in the manifest": said(b'"bytes":14', b'"bytes":NaN', "version/manifest.json"),
    "manifest that tells no digest": manifest_with(**{"profile.json": 1}),
    "manifest with a digest that is none": manifest_with(**{"profile.json": {"sha256": None, "bytes": 1}}),
    "manifest without sizes": manifest_with(**{"profile.json": {"sha256": "0" * 64}}),
    "newer schema": header(schema_version=99),
    "deep JSON": lambda c: zipped({**c, "bundle.json": b"[" * 100_000}),
    "bomb": lambda c: zipped({**c, "version/zeros.txt": bytes(10**7)}, zipfile.ZIP_DEFLATED),
    "cut": lambda c: zipped(c)[:-40],
    "no archive": lambda c: b"PK but no archive",
    "empty": lambda c: b"",
}


PLAIN, EXACT = "must hold plain files, stored, of at most", "must hold what its manifest names and nothing else"
REASONS = {
    **dict.fromkeys(("traversal", "traversal that is listed", "absolute", "backslashes", "link", "folder"), PLAIN),
    **dict.fromkeys(("extra member outside", "code", "pickle that is listed", "bomb"), PLAIN),
    **dict.fromkeys(("extra member", "missing member"), EXACT),
    "twice": "files of different names",
    "wrong digest of a file": r"notes\.txt must have SHA-256",
    "wrong digest of the header": "the content's SHA-256 must be",
    "name that is a path": "a reference reads",
    **dict.fromkeys(
        ("aliases that are versions", "aliases that are paths", "name that is none"), "must have a name of"
    ),
    **dict.fromkeys(("number that is none", "NaN", "NaN in the manifest"), "must hold finite numbers"),
    **dict.fromkeys(("manifest that tells no digest", "manifest without sizes"), "tell sha256 and bytes of every file"),
    "manifest with a digest that is none": "tell sha256 and bytes of every file",
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_is_refused_and_nothing_is_written(
    exported: Path, cache: ProfileCache, tmp_path: Path, attack: str
) -> None:
    hostile = tmp_path / "inbox" / "hostile.zip"
    hostile.parent.mkdir()
    hostile.write_bytes(HOSTILE[attack](members(exported)))
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(RegistryError, match=REASONS.get(attack, "hostile.zip")):
        import_bundle(hostile, cache)
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not Path("/evil.json").exists()


def test_what_the_attacks_start_from_is_a_bundle(exported: Path, cache: ProfileCache, tmp_path: Path) -> None:
    (tmp_path / "plain.zip").write_bytes(zipped(members(exported)))
    import_bundle(tmp_path / "plain.zip", cache)


def test_a_clock_that_is_ahead_does_not_outrank_the_registry(
    pulled: Pulled, cache: ProfileCache, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(EPOCH, "9999999999")
    export_bundle(pulled, ["candidate-cpu"], tmp_path / "ahead.zip")
    import_bundle(tmp_path / "ahead.zip", cache)
    before = cache.pull(f"{NAME}@candidate-cpu", None, offline=True).resolution
    assert before.resolved <= time.time()
    newer = register(registry, NAME, save_profile(tmp_path / "newer.json", 2, certificate=CERTIFIED))
    try:
        cache.pull(f"{NAME}@candidate-cpu", registry)
        assert cache.pull(f"{NAME}@candidate-cpu", registry, offline=True).resolution.version == newer.version
    finally:
        MlflowClient(registry.tracking_uri).delete_model_version(NAME, str(newer.version))


def test_a_bundle_never_replaces_a_version_that_a_registry_or_another_bundle_told(
    exported: Path, cache: ProfileCache, registry: Registry, pulled: Pulled, tmp_path: Path
) -> None:
    cache.pull(f"{NAME}/1", registry)
    elsewhere = Registry(f"sqlite:///{tmp_path}/elsewhere.db")
    register(elsewhere, NAME, save_profile(tmp_path / "other.json", 3, certificate=CERTIFIED))
    other = ProfileCache(tmp_path / "other").pull(f"{NAME}/1", elsewhere)
    export_bundle(other, [], tmp_path / "other.zip")
    import_bundle(tmp_path / "other.zip", cache)
    for asked in (registry, None):
        assert cache.pull(f"{NAME}/1", asked, offline=True).profile == pulled.profile
    with pytest.raises(RegistryError, match=rf"must not be another models:/{NAME}/1 than .* before"):
        import_bundle(exported, cache)
    cache.pull(f"{NAME}/1", elsewhere)
    assert cache.pull(f"{NAME}/1", elsewhere, offline=True).profile == other.profile
    with pytest.raises(RegistryError, match="must be one version, but registries differ about it"):
        cache.pull(f"{NAME}/1", None, offline=True)


def test_sizes_are_capped(exported: Path, cache: ProfileCache, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capped:
        capped.setattr(bundle, "MAX_FILE_BYTES", 100)
        with pytest.raises(RegistryError, match="at most 100 bytes"):
            import_bundle(exported, cache)
    for limit in ("MAX_BYTES", "MAX_FILES"):
        with monkeypatch.context() as capped:
            capped.setattr(bundle, limit, 2)
            with pytest.raises(RegistryError, match="must hold at most"):
                import_bundle(exported, cache)
    import_bundle(exported, cache)


def test_what_is_not_there_is_said_to_be_no_bundle(cache: ProfileCache, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"none\.zip must be a bundle"):
        import_bundle(tmp_path / "none.zip", cache)
