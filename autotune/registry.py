"""Profiles, versioned in MLflow: what a study proved is registered once and pulled by name and alias.

One study is one MLflow run with a folder `profile/` (the profile alone, what a version points to) and a folder
`evidence/`. A version carries the profile's SHA-256 as a tag, so whoever pulls can tell that the bytes are the ones
that were registered. Everything is plain JSON, images and tables: nothing is pickled, nothing in a pull is executed.

This is the only file that imports MLflow, and it does so when a registry is first used: the import takes seconds.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from autotune.config import AutotuneError
from btp.errors import ProfileError
from btp.profile import Profile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

__all__ = ["Registry", "RegistryError", "Version"]

PROFILE = "profile/profile.json"
SHA256 = "sha256"
SQLITE = "sqlite:///"

# Read by MLflow when it is imported, which happens below and later. A value the user has set stays.
MLFLOW_SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # the default waits for minutes on a server that is not there
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # refuse a long parameter instead of cutting it in silence
}
for _key, _value in MLFLOW_SETTINGS.items():
    os.environ.setdefault(_key, _value)


class RegistryError(AutotuneError):
    """The registry could not do what was asked; nothing half-written was left behind."""


@dataclass(frozen=True)
class Version:
    """One registered profile. `uri` names it for ever; an alias is free to move on to a later version."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    sha256: str
    uri: str

    @property
    def alias(self) -> str | None:
        """The first alias that points here, if any."""
        return self.aliases[0] if self.aliases else None


class Registry:
    """Profiles in one MLflow registry, on a local SQLite file or behind an MLflow server.

    Opening one is free: the database or the server is touched by the first call, which on a new SQLite file also
    creates the tables and takes a few seconds.
    """

    def __init__(self, tracking_uri: str, artifact_root: Path | None = None) -> None:
        """Use `sqlite:///FILE` with artifacts under `artifact_root` (default: `artifacts` beside the file), or the
        `http(s)://` address of a server, which keeps artifacts itself."""
        local = tracking_uri.startswith(SQLITE) and tracking_uri != SQLITE
        if not local and not tracking_uri.startswith(("http://", "https://")):
            raise RegistryError(
                f"a registry is sqlite:///FILE or the http(s):// address of an MLflow server, got {tracking_uri!r}; "
                "for a local one use sqlite:///mlflow.db"
            )
        if artifact_root is not None and not local:
            raise RegistryError(
                f"a server keeps the artifacts itself, got an artifact root {artifact_root} for {tracking_uri}; "
                "leave it out"
            )
        self.tracking_uri = tracking_uri
        self._database = Path(tracking_uri.removeprefix(SQLITE)) if local else None
        self._artifact_root = artifact_root or (self._database.parent / "artifacts" if self._database else None)

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
        alias: str,
    ) -> Version:
        """Store a profile with its evidence as a new version of `name` and, last of all, point `alias` at it.

        `evidence` maps a name inside the run's `evidence/` folder to a file or folder here. The profile is checked
        before anything is written (`ProfileError`). If any later step fails, the run and the version are deleted
        again and the alias still points where it did; the files of a deleted run stay on disk until `mlflow gc`.
        """
        from mlflow.entities import Metric, Param

        with tempfile.TemporaryDirectory() as staging, ExitStack() as undo, self._reported(f"register {name!r}"):
            folder = Path(staging)
            sha256 = _stage(folder, profile_path, evidence)
            run_id = self._client.create_run(self._experiment_id(experiment), tags=dict(tags)).info.run_id
            undo.callback(self._client.delete_run, run_id)
            now_ms = int(time.time() * 1000)
            self._client.log_batch(
                run_id,
                metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()],
                params=[Param(key, value) for key, value in params.items()],
            )
            self._client.log_artifacts(run_id, str(folder))
            self._client.set_terminated(run_id)
            self._create_model(name)
            source = f"runs:/{run_id}/{PurePosixPath(PROFILE).parent}"
            created = self._client.create_model_version(name, source, run_id, tags={**tags, SHA256: sha256})
            undo.callback(self._client.delete_model_version, name, str(created.version))
            self._client.set_registered_model_alias(name, alias, str(created.version))
            undo.pop_all()
        return _version(created, (alias,))

    def point(self, name: str, alias: str, version: Version) -> None:
        """Move `alias` to a version that is registered already."""
        with self._reported(f"point {name}@{alias} to version {version.version}"):
            self._client.set_registered_model_alias(name, alias, str(version.version))

    def pull(self, name: str, alias: str, destination: Path) -> Path:
        """Write the profile that `alias` points to into the file `destination` (into a folder: as `profile.json`).

        The bytes are checked against the profile's own digest and against the digest the version was registered
        with; only a profile that passes both is put in place, in one step.
        """
        if self._database is not None and not self._database.exists():
            raise RegistryError(f"a registry must exist before one can pull from it, got {self.tracking_uri}")
        with tempfile.TemporaryDirectory() as staging, self._reported(f"pull {name}@{alias}"):
            aliases = self._model(name).aliases
            if alias not in aliases:
                known = ", ".join(sorted(aliases)) or "none"
                raise RegistryError(f"{name!r} has no alias {alias!r}; it has: {known}")
            version = _version(self._client.get_model_version(name, str(aliases[alias])), (alias,))
            downloaded = Path(self._client.download_artifacts(version.run_id, PROFILE, staging))
            _check(downloaded, version)
            target = destination / "profile.json" if destination.is_dir() else destination
            _put(downloaded, target)
        return target

    def versions(self, name: str) -> list[Version]:
        """Every version of `name`, newest first, each with the aliases that point to it now."""
        with self._reported(f"list the versions of {name!r}"):
            aliases: dict[int, list[str]] = {}
            for alias, number in sorted(self._model(name).aliases.items()):
                aliases.setdefault(int(number), []).append(alias)
            page = self._client.search_model_versions(f"name='{name}'")
            found = list(page)
            while page.token:
                page = self._client.search_model_versions(f"name='{name}'", page_token=page.token)
                found += page
        listed = [_version(item, tuple(aliases.get(int(item.version), ()))) for item in found]
        return sorted(listed, key=lambda version: version.version, reverse=True)

    @functools.cached_property
    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)

    def _experiment_id(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            root = self._artifact_root
            return self._client.create_experiment(name, artifact_location=root.resolve().as_uri() if root else None)
        if found.lifecycle_stage != "active":
            raise RegistryError(f"the experiment {name!r} was deleted in MLflow; restore it there or use another name")
        return str(found.experiment_id)

    def _model(self, name: str) -> RegisteredModel:
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            known = ", ".join(sorted(model.name for model in self._client.search_registered_models())) or "none"
            raise RegistryError(
                f"no profile is registered as {name!r} in {self.tracking_uri}; known: {known}"
            ) from error

    def _create_model(self, name: str) -> None:
        """Make sure the name exists. Never undone: another process may have put a version under it by then."""
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @contextmanager
    def _reported(self, attempt: str) -> Iterator[None]:
        """Turn what MLflow raises into `RegistryError`."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            refused = error.error_code == "INVALID_PARAMETER_VALUE"
            way_out = "change that" if refused else "check that the registry runs and can be reached"
            reason = str(error).splitlines()[0].rstrip(".")
            raise RegistryError(f"could not {attempt} in {self.tracking_uri}: {reason}; {way_out}") from error


def _stage(folder: Path, profile_path: Path, evidence: Mapping[str, Path]) -> str:
    """Lay the run's artifacts out in `folder`, and return the digest of the profile among them.

    What is checked here is the copy that is uploaded: a file that changes in between cannot slip through.
    """
    Profile.load(profile_path)  # so that an error names the caller's file
    profile = folder / PROFILE
    profile.parent.mkdir()
    shutil.copyfile(profile_path, profile)
    sha256 = Profile.load(profile).digest
    for name, source in evidence.items():
        target = folder / "evidence" / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RegistryError(f"evidence is named inside its folder, got {name!r}; drop the leading / or the ..")
        if not source.exists():
            raise RegistryError(f"evidence must exist before it is registered, got {source} for {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    return sha256


def _check(profile: Path, version: Version) -> None:
    try:
        sha256 = Profile.load(profile).digest
    except ProfileError as error:
        raise RegistryError(f"{version.uri} is damaged, {error}; register it again") from error
    if sha256 != version.sha256:
        raise RegistryError(
            f"{version.uri} must have SHA-256 {version.sha256 or '(none is recorded)'}, got {sha256}; "
            "it was changed after it was registered, so register it again"
        )


def _put(source: Path, target: Path) -> None:
    """Move a file into place in one step, also from another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    beside.replace(target)


def _version(item: ModelVersion, aliases: tuple[str, ...]) -> Version:
    return Version(
        name=item.name,
        version=int(item.version),
        aliases=aliases,
        run_id=item.run_id or "",
        sha256=item.tags.get(SHA256, ""),
        uri=f"models:/{item.name}/{item.version}",
    )
