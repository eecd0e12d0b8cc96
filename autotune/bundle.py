"""A version in one file, for hosts that no registry reaches: its folder and what it is called, in a plain ZIP.

A bundle says that it is whole, not who made it: take it from whom you trust. Its members are stored as they are, so
that the same version gives the same bytes, and what is read is no larger than the file.
"""

from __future__ import annotations

import os
import stat
import time
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from autotune.profile_cache import BUNDLES, ProfileCache, Pulled, Resolution
from autotune.registered import Reference, RegistryError, Version, is_alias
from autotune.registry import Registry
from autotune.version_folder import MANIFEST_FILE, PROFILE, SUFFIXES, manifest_of
from btp.errors import ProfileError
from btp.sealed import SCHEMA_VERSION, canonical_json, parse_object, seal, verify

__all__ = ["Bundle", "export_bundle", "import_bundle", "register_bundle"]

HEADER = "bundle.json"
FOLDER = "version/"
MAX_NAME = 250
MAX_FILES = 256
MAX_FILE_BYTES = 64 * 2**20
MAX_BYTES = 256 * 2**20
EPOCH = "SOURCE_DATE_EPOCH"
"""The variable with the time that a bundle is to name, in seconds since 1970, where its bytes must come out equal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """What a bundle says of itself. exported: in seconds since 1970."""

    name: str
    version: int
    aliases: tuple[str, ...]
    sha256: str
    manifest: str
    exported: float

    @property
    def references(self) -> list[str]:
        """All that it is known by on a host that has imported it."""
        aliases = [Reference(self.name, alias=alias) for alias in self.aliases]
        return [str(each) for each in (*aliases, Reference(self.name, version=self.version))]


def export_bundle(pulled: Pulled, aliases: Iterable[str], path: Path) -> Bundle:
    """Write a pulled version, and the aliases it is to be known by, into one file, in one step."""
    found = pulled.resolution
    if not found.manifest:
        raise RegistryError(
            f"a version must have a manifest to be exported, but {found.uri} has none; register it again"
        )
    when = float(os.environ.get(EPOCH) or time.time())
    names = tuple(sorted(set(aliases)))
    known: dict[str, Any] = {"name": found.name, "version": found.version, "manifest": found.manifest}
    bundle = Bundle(**known, aliases=names, sha256=found.sha256, exported=when)
    header = {"schema_version": SCHEMA_VERSION, **known, "aliases": list(names), "profile": found.sha256}
    files = sorted([*manifest_of(pulled.folder, found.manifest), MANIFEST_FILE])
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(beside, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_member(HEADER), canonical_json(seal({**header, "exported": when})))
            for name in files:
                archive.writestr(_member(FOLDER + name), (pulled.folder / name).read_bytes())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    return bundle


def import_bundle(path: Path, cache: ProfileCache) -> tuple[Bundle, Pulled]:
    """Put a bundle's version into the cache, under the names it has. Raises RegistryError, and writes nothing then."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = _members(archive, path)
            bundle = _header(archive, members, path)
            _check_number(bundle, cache, path)
            with cache.staging() as staging:
                staged = staging / "version"
                _extract(archive, members, bundle, staged)
                profile = cache.keep(staged, bundle.sha256, bundle.manifest, str(path))
    except (OSError, zipfile.BadZipFile, ProfileError) as error:
        raise RegistryError(f"{path} must be a bundle of autotune profiles export, but: {error}") from error
    known: dict[str, Any] = {"name": bundle.name, "version": bundle.version, "manifest": bundle.manifest}
    for alias in (*bundle.aliases, None):
        resolved = min(bundle.exported, time.time())  # the exporter's clock may be ahead of all others
        resolution = Resolution(**known, alias=alias, sha256=bundle.sha256, resolved=resolved)
        cache.note(resolution, BUNDLES)
    folder = cache.folder / "profiles" / bundle.manifest
    return bundle, Pulled(resolution=resolution, profile=profile, folder=folder, downloaded=True)


def register_bundle(bundle: Bundle, pulled: Pulled, registry: Registry) -> Version:
    """Make an imported version a new one of its name in a registry. Raises RegistryError."""
    evidence = {name: pulled.folder / name for name in manifest_of(pulled.folder, bundle.manifest) if name != PROFILE}
    return registry.register(
        name=bundle.name,
        profile_path=pulled.folder / PROFILE,
        evidence=evidence,
        tags={"imported": f"models:/{bundle.name}/{bundle.version}"},
        metrics={},
        params={},
        experiment=bundle.name,
    )


def _member(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    info.create_system, info.external_attr = 3, (stat.S_IFREG | 0o644) << 16
    return info


def _members(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """By name, each of them a plain file that is stored as it is, and all of them together not too large."""
    infos = archive.infolist()
    members = {info.filename: info for info in infos}
    total = sum(info.file_size for info in infos)
    if len(members) != len(infos) or len(infos) > MAX_FILES or total > MAX_BYTES:
        raise RegistryError(
            f"{path} must hold at most {MAX_FILES} files of different names and {MAX_BYTES} bytes, got {len(infos)} of "
            f"{len(members)} names and {total} bytes; export it again"
        )
    for name, info in members.items():
        mode = info.external_attr >> 16
        parts = PurePosixPath(name).parts
        plain = not info.is_dir() and not info.flag_bits & 1 and stat.S_IFMT(mode) in (0, stat.S_IFREG)
        stored = info.compress_type == zipfile.ZIP_STORED and info.file_size == info.compress_size <= MAX_FILE_BYTES
        inside = name == HEADER or (name.startswith(FOLDER) and name.endswith(SUFFIXES))
        if not (plain and stored and inside) or "\\" in name or ".." in parts or str(PurePosixPath(name)) != name:
            raise RegistryError(
                f"{path} must hold plain files, stored, of at most {MAX_FILE_BYTES} bytes in {FOLDER}, got {name!r}; "
                "take a bundle from whom you trust"
            )
    return members


def _header(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> Bundle:
    if HEADER not in members:
        raise RegistryError(f"{path} must hold a {HEADER}, got none; is it a bundle?")
    body = verify(parse_object(archive.read(HEADER), f"{path}, {HEADER}"), f"{path}, {HEADER}")
    try:
        found = Bundle(
            name=str(body["name"]),
            version=int(body["version"]),
            aliases=tuple(map(str, body["aliases"])),
            sha256=str(body["profile"]),
            manifest=str(body["manifest"]),
            exported=float(body["exported"]),
        )
        for reference in found.references:
            Reference.parse(reference)
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise RegistryError(f"{path} must say name, version, aliases and digests, but: {error!r}") from error
    odd = [alias for alias in found.aliases if not is_alias(alias)]
    if odd or len(found.name) > MAX_NAME:
        raise RegistryError(
            f"{path} must have a name of at most {MAX_NAME} characters, and aliases that a registry takes, got "
            f"{(odd or [found.name])[0][:80]!r}; export it again under others"
        )
    return found


def _check_number(bundle: Bundle, cache: ProfileCache, path: Path) -> None:
    """Raise RegistryError where another bundle has told of another version by the same number."""
    for known in cache.known(BUNDLES):
        same = (known.name, known.version) == (bundle.name, bundle.version)
        if same and known.digest != bundle.manifest:
            raise RegistryError(
                f"{path} must not be another {known.uri} than the one that was imported before, whose manifest is "
                f"{known.digest}; import it where AUTOTUNE_CACHE names another folder"
            )


def _extract(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], bundle: Bundle, folder: Path) -> None:
    """What the manifest names, once it is seen that there is nothing else; the digests are checked by the cache."""
    folder.mkdir()
    if FOLDER + MANIFEST_FILE in members:
        (folder / MANIFEST_FILE).write_bytes(archive.read(FOLDER + MANIFEST_FILE))
    files = manifest_of(folder, bundle.manifest)
    wanted = {HEADER, FOLDER + MANIFEST_FILE, *(FOLDER + name for name in files)}
    if differing := sorted(wanted ^ members.keys()):
        raise RegistryError(f"a bundle must hold what its manifest names and nothing else, but: {', '.join(differing)}")
    for name in files:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(archive.read(FOLDER + name))
