"""Pulled profiles on this host: kept by digest, found by reference, checked whenever they are read.

`profiles/<digest>/` is a version's folder as it was registered. `refs/<registry>/` says which digest a reference stood
for when a registry was last asked, and `refs/bundles/` what came in a bundle, so that both serve a host without a
registry. Every file is put in place in one step: several processes may share a cache, and any of them may be killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import quote

from autotune.config import AutotuneError
from autotune.registered import NotRegisteredError, Reference, RegistryError, Version
from autotune.registry import Registry
from autotune.version_folder import check_folder
from btp.profile import Profile

__all__ = ["BUNDLES", "CACHE", "ProfileCache", "Pulled", "Resolution"]

CACHE = "AUTOTUNE_CACHE"
"""The variable with the folder of the cache."""
BUNDLES = "bundles"


@dataclass(frozen=True, kw_only=True, slots=True)
class Resolution:
    """What a reference stood for. resolved: when a registry said so, in seconds since 1970."""

    name: str
    alias: str | None
    version: int
    sha256: str
    manifest: str
    resolved: float

    @property
    def digest(self) -> str:
        return self.manifest or self.sha256

    @property
    def uri(self) -> str:
        """The version, which an alias may have left by now."""
        return f"models:/{self.name}/{self.version}"

    @property
    def age(self) -> str:
        """How long ago it was resolved, in words."""
        seconds = max(0.0, time.time() - self.resolved)
        for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
            if seconds >= size:
                return f"resolved {seconds / size:.0f} {unit} ago"
        return f"resolved {seconds:.0f} s ago"

    @classmethod
    def of(cls, version: Version, alias: str | None, resolved: float) -> Resolution:
        told = {"version": version.version, "sha256": version.sha256, "manifest": version.manifest}
        return cls(name=version.name, alias=alias, resolved=resolved, **told)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pulled:
    """A version in the cache. folder: its files, which must not be changed. downloaded: just now."""

    resolution: Resolution
    profile: Profile
    folder: Path
    downloaded: bool


class ProfileCache:
    """The cache of one user: a folder, by default `$AUTOTUNE_CACHE` or the one that the system has for such things."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or _default_folder()

    def pull(self, reference: str | Reference, registry: Registry | None, *, offline: bool = False) -> Pulled:
        """The version a reference names, downloaded where it is not here yet; an alias, where the registry has it now.

        offline: connects to nothing, and goes by what the reference stood for when it was last resolved, or what a
        bundle said. Raises NotRegisteredError for a reference that is not known, RegistryError for a damaged version.
        """
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        if offline:
            resolution = self._resolved_before(wanted, registry)
            folder = self._place(resolution.digest)
            try:
                profile = check_folder(folder, resolution.sha256, resolution.manifest, resolution.uri)
            except RegistryError as error:
                raise RegistryError(
                    f"{wanted} must be whole in the cache {self.folder} to be used offline, but: {error}, or pull it "
                    "once while its registry can be reached"
                ) from error
            return Pulled(resolution=resolution, profile=profile, folder=folder, downloaded=False)
        if registry is None:
            raise AutotuneError("a registry must be named to pull from it, got none; name one, or go offline")
        version = registry.find(wanted)
        resolution = Resolution.of(version, wanted.alias, time.time())
        profile, downloaded = self._fetched(version, registry)
        self.note(resolution, _registry_digest(registry))
        folder = self._place(version.digest)
        return Pulled(resolution=resolution, profile=profile, folder=folder, downloaded=downloaded)

    def keep(self, staged: Path, sha256: str, manifest: str, whose: str) -> Profile:
        """Put a version's folder, which is checked first, where its digest belongs. Raises RegistryError."""
        profile = check_folder(staged, sha256, manifest, whose)
        target = self._place(manifest or sha256)
        if target.exists() and not _sound(target, sha256, manifest):
            shutil.rmtree(target, ignore_errors=True)
        try:
            staged.rename(target)
        except OSError:  # another has put it there in the meantime
            check_folder(target, sha256, manifest, whose)
        return profile

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder beside the kept ones, gone afterwards."""
        (self.folder / "profiles").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder / "profiles", prefix=".", ignore_cleanup_errors=True) as made:
            yield Path(made)

    def note(self, resolution: Resolution, origin: str) -> None:
        """Remember what a reference stood for. origin: who said so."""
        target = self.folder / "refs" / origin / _file_name(resolution.name, resolution.alias, resolution.version)
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(f".{os.getpid()}-{time.monotonic_ns()}")
        beside.write_text(json.dumps(asdict(resolution)), encoding="utf-8")
        beside.replace(target)

    def known(self, origin: str = "*") -> list[Resolution]:
        """Every reference that is remembered, newest first."""
        found = [_read(path) for path in self.folder.glob(f"refs/{origin}/[!.]*.json")]
        return sorted((each for each in found if each is not None), key=lambda each: each.resolved, reverse=True)

    def _registries(self) -> list[str]:
        return sorted({path.parent.name for path in self.folder.glob("refs/*/[!.]*.json")} - {BUNDLES})

    def _place(self, digest: str) -> Path:
        """Of a version's folder. A tag can be changed by anyone, so it is no path before it is seen to be a digest."""
        if not re.fullmatch("[0-9a-f]{64}", digest):
            raise RegistryError(f"a version is kept by its SHA-256, got {digest!r}; register it again")
        return self.folder / "profiles" / digest

    def _fetched(self, version: Version, registry: Registry) -> tuple[Profile, bool]:
        target = self._place(version.digest)
        if target.is_dir():
            try:
                return check_folder(target, version.sha256, version.manifest, version.uri), False
            except RegistryError:
                pass  # what is damaged here is fetched anew
        with self.staging() as staging:
            staged = staging / "version"
            staged.mkdir()
            registry.download(version, staged)
            return self.keep(staged, version.sha256, version.manifest, version.uri), True

    def _resolved_before(self, wanted: Reference, registry: Registry | None) -> Resolution:
        """What is known of a reference: by the registry, or any if none is named, and by bundles.

        Of an alias, the latest word counts. A version never changes, so there a bundle is asked only about what no
        registry has told.
        """
        registries = self._registries() if registry is None else [_registry_digest(registry)]
        told = [each for origin in registries for each in self.known(origin) if _is(each, wanted)]
        carried = [each for each in self.known(BUNDLES) if _is(each, wanted)]
        found = [*told, *carried] if wanted.alias is not None else told or carried
        if not found:
            there = ", ".join(sorted({_text(each) for each in self.known()})) or "nothing"
            raise NotRegisteredError(f"{wanted} is not in the cache {self.folder}; it has: {there}")
        if wanted.alias is None and len({each.digest for each in found}) > 1:
            raise RegistryError(f"{wanted} must be one version, but registries differ about it; name the one meant")
        return max(found, key=lambda each: each.resolved)


def _is(resolution: Resolution, wanted: Reference) -> bool:
    if resolution.name != wanted.name:
        return False
    return resolution.version == wanted.version if wanted.alias is None else resolution.alias == wanted.alias


def _default_folder() -> Path:
    if given := os.environ.get(CACHE):
        return Path(given)
    import platformdirs

    return platformdirs.user_cache_path("btp-autotune")


def _sound(folder: Path, sha256: str, manifest: str) -> bool:
    try:
        check_folder(folder, sha256, manifest, "")
    except RegistryError:
        return False
    return True


def _registry_digest(registry: Registry) -> str:
    return hashlib.sha256(registry.address.encode()).hexdigest()[:16]


def _file_name(name: str, alias: str | None, version: int) -> str:
    """No alias reads v3: MLflow keeps those for versions."""
    return f"{quote(name, safe='')}@{quote(alias or f'v{version}', safe='')}.json"


def _text(resolution: Resolution) -> str:
    return str(Reference(resolution.name, resolution.alias, None if resolution.alias else resolution.version))


def _read(path: Path) -> Resolution | None:
    try:
        return Resolution(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # gone in the meantime, or no such file
        return None
