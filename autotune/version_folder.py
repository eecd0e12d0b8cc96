"""The one folder of a version: the profile, its evidence beside it, and a manifest with the SHA-256 of every file.

Plain data only: nothing in it is pickled, and nothing in it is executed by whoever pulls it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from autotune.registered import RegistryError
from btp.errors import ProfileError
from btp.profile import Profile
from btp.sealed import SCHEMA_VERSION, canonical_json, read_object, seal, verify

__all__ = [
    "MANIFEST_FILE",
    "PROFILE",
    "SUFFIXES",
    "check_file",
    "check_folder",
    "file_digest",
    "manifest_of",
    "put",
    "stage",
]

PROFILE = "profile.json"
MANIFEST_FILE = "manifest.json"
SUFFIXES = (".csv", ".html", ".json", ".md", ".parquet", ".png", ".svg", ".txt")


def stage(folder: Path, profile_path: Path, evidence: Mapping[str, Path]) -> tuple[Profile, str]:
    """Lay a version's files out in `folder`: the profile among them, and the digest of the manifest.

    What is checked here is the copy that is uploaded: a file that changes in between cannot slip through. Raises
    ProfileError for the profile, RegistryError for evidence that is not there, or is no plain data.
    """
    Profile.load(profile_path)  # so that an error names the caller's file
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(profile_path, folder / PROFILE)
    profile = Profile.load(folder / PROFILE)
    for name, source in evidence.items():
        parts = PurePosixPath(name).parts
        if PurePosixPath(name).is_absolute() or ".." in parts or name in (PROFILE, MANIFEST_FILE) or not parts:
            raise RegistryError(
                f"evidence is named inside its folder, beside {PROFILE} and {MANIFEST_FILE}, got {name!r}; "
                "give it another name, without a leading / and without .."
            )
        if not source.exists():
            raise RegistryError(f"evidence must exist before it is registered, got {source} for {name!r}")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    names = _names(folder)
    if odd := [name for name in names if PurePosixPath(name).suffix not in SUFFIXES]:
        raise RegistryError(
            f"a version holds plain data only, files that end in {' '.join(SUFFIXES)}, got {', '.join(odd)}; "
            "write them as one of these, or leave them out"
        )
    files = {name: {"sha256": file_digest(folder / name), "bytes": (folder / name).stat().st_size} for name in names}
    manifest = seal({"schema_version": SCHEMA_VERSION, "files": files})
    (folder / MANIFEST_FILE).write_text(canonical_json(manifest), encoding="utf-8")
    return profile, str(manifest["sha256"])


def manifest_of(folder: Path, digest: str) -> dict[str, dict[str, Any]]:
    """What the manifest says of every file, by name. Raises ProfileError unless it is the one of this digest."""
    stored = read_object(folder / MANIFEST_FILE)
    files = verify(stored, folder / MANIFEST_FILE).get("files")
    if stored["sha256"] != digest:
        raise ProfileError(f"the manifest must have SHA-256 {digest}, got {stored['sha256']}")
    if not isinstance(files, dict) or not all(_is_told(each) for each in files.values()):
        raise ProfileError("the manifest must tell sha256 and bytes of every file, but does not")
    return files


def _is_told(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("sha256"), str) and type(entry.get("bytes")) is int


def check_folder(folder: Path, sha256: str, manifest: str, whose: str) -> Profile:
    """The profile in a folder that must hold what a version was registered with, every file of it and no other.

    sha256, manifest: the version's digests; one without a manifest is its profile alone. whose: the version, for the
    error. Raises RegistryError.
    """
    if manifest:
        try:
            files = manifest_of(folder, manifest)
        except ProfileError as error:
            raise _damaged(whose, error) from error
        if differing := sorted({*files, MANIFEST_FILE} ^ {*_names(folder), MANIFEST_FILE}):
            raise _damaged(whose, f"{', '.join(differing)} must be there if, and only if, the manifest names it")
        for name, told in files.items():
            try:
                actual = file_digest(folder / name)
            except OSError as error:
                raise _damaged(whose, f"{name} cannot be read ({error.strerror})") from error
            if actual != told["sha256"]:
                raise _damaged(whose, f"{name} must have SHA-256 {told['sha256']}")
    return check_file(folder / PROFILE, sha256, whose)


def check_file(path: Path, sha256: str, whose: str) -> Profile:
    """The profile in a file that must be the one a version was registered with. Raises RegistryError."""
    try:
        profile = Profile.load(path)
    except ProfileError as error:
        raise _damaged(whose, error) from error
    if profile.digest != sha256:
        raise RegistryError(
            f"{whose} must have SHA-256 {sha256 or '(none is recorded)'}, got {profile.digest}; "
            "it was changed after it was registered, so register it again"
        )
    return profile


def _damaged(whose: str, why: object) -> RegistryError:
    return RegistryError(f"{whose} is damaged, {why}; register it again")


def _names(folder: Path) -> list[str]:
    """Every file below the folder but the manifest, as it names them."""
    found = (path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())
    return sorted({path.relative_to(folder).as_posix() for path in found} - {MANIFEST_FILE})


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def put(source: Path, target: Path) -> None:
    """Copy a file into place in one step, also from another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    beside.replace(target)
