"""Profiles, versioned in MLflow: what a study proved is registered once and pulled by name and alias.

One registered model is one base model and one workload. One study is one MLflow run with a folder `profile/`, which is
what a version points to: the profile, its evidence beside it, and a manifest with the SHA-256 of every file. The
profile's and the manifest's own digests are tags of the version, so whoever pulls can tell that the bytes are the ones
that were registered. Certified finalists are child runs; a trial is none.

Every device has two aliases: `candidate-<device>` is the version registered last, `champion-<device>` the one promoted
last, which is for `autotune.profiles` to do.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from autotune.mlflow_store import MlflowStore, version_of
from autotune.redaction import without_passwords
from autotune.registered import (
    ANSWERS,
    IDENTITY,
    MANIFEST,
    SHA256,
    TEXT,
    WORKLOAD,
    Known,
    NotRegisteredError,
    Reference,
    RegistryError,
    Version,
)
from autotune.version_folder import MANIFEST_FILE, PROFILE, check_file, check_folder, put, stage
from autotune.version_tags import home_tags, identity_of, profile_tags
from btp.profile import ModelIdentity, Profile, Workload

__all__ = ["Known", "Registry", "RegistryError", "Version"]

FOLDER = "profile"  # in a run's artifacts
EVIDENCE = "evidence"  # where the papers of a version without a manifest lie

logger = logging.getLogger(__name__)


class Registry:
    """Profiles in one MLflow registry, on a local SQLite file or behind an MLflow server.

    Opening one is free: the database or the server is touched by the first call, which on a new SQLite file also
    creates the tables and takes a few seconds.
    """

    def __init__(self, tracking_uri: str, artifact_root: Path | None = None) -> None:
        """Use `sqlite:///FILE` with artifacts under `artifact_root` (default: `artifacts` beside the file), or the
        `http(s)://` address of a server, which keeps artifacts itself."""
        self.tracking_uri = tracking_uri
        self._store = MlflowStore(tracking_uri, artifact_root)

    @property
    def address(self) -> str:
        """One text for one registry, wherever it is asked from; without a password."""
        return self._store.address

    @property
    def file(self) -> Path | None:
        """Where a local registry lies."""
        return self._store.file

    def register(
        self,
        *,
        name: str,
        profile_path: Path,
        evidence: Mapping[str, Path],
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        experiment: str,
        finalists: Mapping[str, Mapping[str, float | str]] = MappingProxyType({}),
        description: str = "",
    ) -> Version:
        """Store a profile with its evidence as a new version of `name` and make it its device's candidate, last of all.

        What the profile says becomes tags beside `tags`, the digests with it. `evidence` maps a name inside the
        version's folder to a file or folder here, `finalists` a name to what its child run shows: numbers as metrics,
        texts as tags. description: of the version, Markdown. The profile is checked before anything is written
        (`ProfileError`), and so is that the name is for its model and workload. If any later step fails, the runs and
        the version are deleted again and the alias still points where it did; runs that a killed process left of the
        same profile are deleted first. The files of a deleted run stay on disk until `mlflow gc`.
        """
        with tempfile.TemporaryDirectory() as staging, ExitStack() as undo:
            profile, manifest = stage(Path(staging) / FOLDER, profile_path, evidence)
            self.check_home(name, profile.model, profile.workload)
            with self._store.reported(f"register {name!r}"):
                told = {**tags, **profile_tags(profile), SHA256: profile.digest}
                self._store.drop_runs(experiment, SHA256, profile.digest, self._runs(name))
                study = told.get("study")
                told["experiment_id"] = self._store.experiment_id(experiment)
                run_id = self._store.run(
                    experiment, undo, name=study, tags=told, metrics=metrics, params=params, files=Path(staging)
                )
                self._add_finalists(experiment, undo, run_id, finalists)
                home = home_tags(profile.model, profile.workload)
                self._store.make_model(name, home)
                self._store.tag_model(name, home)
                self.check_home(name, profile.model, profile.workload)  # another may have made it in between
                told |= {MANIFEST: manifest, IDENTITY: identity_of(profile.model)}
                client, source = self._store.client, f"runs:/{run_id}/{FOLDER}"
                created = client.create_model_version(name, source, run_id, tags=told, description=description)
                undo.callback(client.delete_model_version, name, str(created.version))
                alias = f"candidate-{profile.device.slug}"
                client.set_registered_model_alias(name, alias, str(created.version))
                undo.pop_all()
        return version_of(created, (alias,))

    def _runs(self, name: str) -> set[str]:
        """That versions of `name` point to."""
        return {str(item.run_id) for item in self._store.versions(name)}

    def check_home(self, name: str, model: ModelIdentity, workload: Workload) -> None:
        """Raise RegistryError where `name` is registered for another model or workload; a new name is free.

        One from before names were bound is for what its newest version was made with.
        """
        if not self._store.exists:
            return
        with self._store.reported(f"look up {name!r}"):
            try:
                tags = self._store.model(name).tags
            except NotRegisteredError:
                return
            if not {IDENTITY, WORKLOAD} <= tags.keys():
                tags = {**self._home_before(name), **tags}
            wanted = home_tags(model, workload)
            differing = [part for part in (IDENTITY, WORKLOAD) if tags.get(part, wanted[part]) != wanted[part]]
            if not differing:
                return
        told = "; ".join(line for part in differing for line in _differences(part, tags, wanted))
        raise RegistryError(f"{name!r} holds profiles of one model and workload, but {told}; use another --name")

    def _home_before(self, name: str) -> Mapping[str, str]:
        versions = self.versions(name)
        if not versions:
            return {}
        newest = self.profile(versions[0])
        return home_tags(newest.model, newest.workload)

    def find(self, reference: str | Reference) -> Version:
        """The version that models:/NAME@ALIAS or models:/NAME/VERSION names. Raises NotRegisteredError."""
        wanted = Reference.parse(reference) if isinstance(reference, str) else reference
        if not self._store.exists:
            raise NotRegisteredError("a registry must exist before one can pull from it, got none; check its address")
        with self._store.reported(f"look up {wanted}"):
            aliases = self._store.model(wanted.name).aliases
            number = wanted.version
            if wanted.alias is not None:
                if wanted.alias not in aliases:
                    known = ", ".join(sorted(aliases)) or "none"
                    raise NotRegisteredError(f"{wanted.name!r} has no alias {wanted.alias!r}; it has: {known}")
                number = int(aliases[wanted.alias])
            assert number is not None
            return version_of(self._store.version(wanted.name, number), _pointing(aliases, number))

    def versions(self, name: str | None = None) -> list[Version]:
        """Every version of `name`, or of every name, newest first, each with the aliases that point to it now."""
        if name is None and not self._store.exists:
            return []
        with self._store.reported(f"list the versions of {name!r}" if name else "list the versions"):
            models = self._store.models() if name is None else [self._store.model(name)]
            aliases = {model.name: model.aliases for model in models}
            found = self._store.search() if name is None else self._store.versions(name)
        listed = [version_of(item, _pointing(aliases.get(item.name, {}), int(item.version))) for item in found]
        if name is not None:
            return sorted(listed, key=lambda version: version.version, reverse=True)
        return sorted(listed, key=lambda version: (version.created, version.name, version.version), reverse=True)

    def take_up(self, name: str, sha256: str) -> Version | None:
        """The version of `name` whose profile has this digest, the oldest of several; None where there is none.

        Where its registration was killed before its last step, that is made up for: it becomes its device's candidate,
        unless there is a newer one.
        """
        if not self._store.exists:
            return None
        try:
            versions = self.versions(name)
        except NotRegisteredError:
            return None
        found = next((version for version in reversed(versions) if version.sha256 == sha256), None)
        if found is None:
            return None
        newest = next(version for version in versions if version.device == found.device)
        alias = f"candidate-{found.device}"
        if newest.version == found.version and alias not in found.aliases:
            self.point(name, alias, found.version)
            return replace(found, aliases=(alias, *found.aliases))
        return found

    def profile(self, version: Version) -> Profile:
        """The profile of a version as it is stored now, checked. Raises RegistryError."""
        with tempfile.TemporaryDirectory() as staging, self._store.reported(f"read {version.uri}"):
            stored = self._download(version, f"{FOLDER}/{PROFILE}", staging)
            return check_file(stored, version.sha256, version.uri)

    def checked(self, version: Version) -> Profile:
        """As `profile`, every file beside it checked too."""
        with tempfile.TemporaryDirectory() as folder:
            return self.download(version, Path(folder))

    def download(self, version: Version, folder: Path) -> Profile:
        """The version's whole folder into one that is there already; checked, every file. Raises RegistryError."""
        with tempfile.TemporaryDirectory(dir=folder) as staging, self._store.reported(f"download {version.uri}"):
            if not version.manifest:
                self._check_manifest_tag(version)
                stored = self._download(version, f"{FOLDER}/{PROFILE}", staging)
                profile = check_file(stored, version.sha256, version.uri)
                stored.rename(folder / PROFILE)
                return profile
            whole = self._download(version, FOLDER, staging)
            profile = check_folder(whole, version.sha256, version.manifest, version.uri)
            for path in whole.iterdir():
                path.rename(folder / path.name)
        return profile

    def pull(self, name: str, alias: str, destination: Path) -> Path:
        """Write the profile that `alias` points to into the file `destination` (into a folder: as `profile.json`).

        Every file of the version is checked; only a profile that passes is put in place, in one step.
        """
        version = self.find(Reference(name, alias=alias))
        with tempfile.TemporaryDirectory() as staging:
            self.download(version, Path(staging))
            target = destination / PROFILE if destination.is_dir() else destination
            put(Path(staging) / PROFILE, target)
        return target

    def made(self, name: str) -> float:
        """When the registered model was made, in seconds since 1970: another may have had, or will have, its name."""
        with self._store.reported(f"look up {name!r}"):
            return float(self._store.model(name).creation_timestamp) / 1000

    def point(self, name: str, alias: str, number: int) -> None:
        """Have an alias point to a version, whatever its profile says. Raises NotRegisteredError."""
        with self._store.reported(f"have {name}@{alias} point to version {number}"):
            self._store.version(name, number)
            self._store.client.set_registered_model_alias(name, alias, str(number))

    def pointed(self, name: str, alias: str) -> int | None:
        """The version that an alias points to now."""
        with self._store.reported(f"look up {name}@{alias}"):
            number = self._store.model(name).aliases.get(alias)
        return None if number is None else int(number)

    def nearest(self, identity: ModelIdentity, num: int = 8) -> list[Known]:
        """The newest `num` profiles of models of this identity, of any device and name, newest first, without aliases.

        Whether their answers hold is for the caller to ask of `Known.answered`. A registry that
        is not there yet knows none. One that cannot be read, or was changed since, is left out with a warning: nobody
        should be kept from tuning by it.
        """
        if not self._store.exists:
            return []
        with self._store.reported("look for profiles of the same model"):
            found = self._store.search(f"tags.{IDENTITY} = '{identity_of(identity)}'")
            newest = sorted(found, key=lambda item: (item.creation_timestamp, int(item.version)), reverse=True)
        known: list[Known] = []
        for item in newest:
            version = version_of(item, ())
            try:
                known.append(Known(version, self.profile(version)))
            except (OSError, RegistryError) as error:
                logger.warning("left out: %s", error)
            if len(known) == num:
                break
        return known

    def answers(self, known: Known) -> Any:
        """What the profile's plan answered to `select`, as it was registered; None, with a warning, where it is gone.

        The bytes are checked against the digest in the profile, whose own the version was registered with.
        """
        attempt = f"read the answers of {known.version.uri}"
        try:
            with tempfile.TemporaryDirectory() as staging, self._store.reported(attempt):
                folder = FOLDER if known.version.manifest else EVIDENCE
                text = self._download(known.version, f"{folder}/{ANSWERS}", staging).read_bytes()
        except (OSError, RegistryError) as error:
            logger.warning("left out: %s", error)
            return None
        if hashlib.sha256(text).hexdigest() != known.answers_digest:
            logger.warning("left out: the answers of %s were changed after it was registered", known.version.uri)
            return None
        try:
            return json.loads(text)
        except ValueError as error:
            logger.warning("left out: the answers of %s are no JSON: %s", known.version.uri, error)
            return None

    def _check_manifest_tag(self, version: Version) -> None:
        """Raise RegistryError where a version said to have no manifest has one: its files would go unchecked."""
        stored = self._store.client.list_artifacts(version.run_id, FOLDER)
        if any(file.path == f"{FOLDER}/{MANIFEST_FILE}" for file in stored):
            raise RegistryError(
                f"{version.uri} must have its manifest's SHA-256 as a tag, got none; "
                "it was changed after it was registered, so register it again"
            )

    def _download(self, version: Version, stored: str, folder: str) -> Path:
        try:
            return Path(self._store.client.download_artifacts(version.run_id, stored, folder))
        except OSError as error:  # of a file that is gone, or of a server's answer
            raise RegistryError(
                f"{version.uri} must have {stored} in the registry, but: {without_passwords(str(error))}; register it "
                "again, or check that the registry can be reached"
            ) from error

    def _add_finalists(
        self, experiment: str, undo: ExitStack, parent: str, finalists: Mapping[str, Mapping[str, float | str]]
    ) -> None:
        for name, shown in finalists.items():
            texts = {key: value for key, value in shown.items() if isinstance(value, str)}
            numbers = {key: float(value) for key, value in shown.items() if not isinstance(value, str)}
            tags = {**texts, "mlflow.parentRunId": parent}
            self._store.run(experiment, undo, name=name, tags=tags, metrics=numbers, params={})


def _pointing(aliases: Mapping[str, Any], number: int) -> tuple[str, ...]:
    return tuple(sorted(alias for alias, target in aliases.items() if int(target) == number))


def _differences(part: str, tags: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    there, here = (json.loads(told.get(f"{part}{TEXT}", "{}")) for told in (tags, wanted))
    return [f"{key} is {there.get(key)!r} there, {here[key]!r} here" for key in here if there.get(key) != here[key]]
