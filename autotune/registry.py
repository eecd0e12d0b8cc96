"""Profiles, versioned in MLflow: what a study proved is registered once and pulled by name and alias.

One study is one MLflow run with a folder `profile/` (the profile alone, what a version points to) and a folder
`evidence/`. A version carries the profile's SHA-256 as a tag, so whoever pulls can tell that the bytes are the ones
that were registered. Everything is plain JSON, images and tables: nothing is pickled, nothing in a pull is executed.

Every device has two aliases: `candidate-<device>` is the version registered last, `champion-<device>` the one promoted
last, and only a profile whose certificate says that it is certified can be promoted.

This is the only file that imports MLflow, and it does so when a registry is first used: the import takes seconds.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from autotune.registered import (
    ANSWERS,
    CERTIFIED,
    PROFILE,
    REASONS,
    Known,
    RegistryError,
    Version,
    certificate_tags,
    check,
    identity_of,
    put,
    stage,
)
from btp.profile import ModelIdentity, Profile

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

__all__ = ["Known", "Registry", "RegistryError", "Version"]

IDENTITY = "model_identity"
SHA256 = "sha256"
SQLITE = "sqlite:///"

logger = logging.getLogger(__name__)

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
    ) -> Version:
        """Store a profile with its evidence as a new version of `name` and make it its device's candidate, last of all.

        What the profile's certificate says becomes tags beside `tags`, the profile's model and SHA-256 with it.
        `evidence` maps a name inside the run's `evidence/` folder to a file or folder here. The profile is checked
        before anything is written (`ProfileError`). If any later step fails, the run and the version are deleted
        again and the alias still points where it did; the files of a deleted run stay on disk until `mlflow gc`.
        """
        from mlflow.entities import Metric, Param

        with tempfile.TemporaryDirectory() as staging, ExitStack() as undo, self._reported(f"register {name!r}"):
            folder = Path(staging)
            profile = stage(folder, profile_path, evidence)
            tags = {**tags, **certificate_tags(profile)}
            run_id = self._client.create_run(self._experiment_id(experiment), tags=tags).info.run_id
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
            tags = {**tags, SHA256: profile.digest, IDENTITY: identity_of(profile.model)}
            created = self._client.create_model_version(name, source, run_id, tags=tags)
            undo.callback(self._client.delete_model_version, name, str(created.version))
            alias = f"candidate-{profile.device.slug}"
            self._client.set_registered_model_alias(name, alias, str(created.version))
            undo.pop_all()
        return _version(created, (alias,))

    def promote(self, version: Version) -> Version:
        """Make a registered version its device's champion, and return it with that alias.

        What counts is the certificate in the profile that is stored, not a tag, which anyone can change. Raises
        RegistryError, and leaves the alias where it is, for a profile that is not certified or was changed.
        """
        with self._reported(f"promote {version.uri}"):
            profile = self._profile(version)
            if not profile.certified:
                raise RegistryError(
                    f"only a certified plan can be champion, but {version.uri} is not: "
                    f"{'; '.join(profile.uncertified_because)}; mend that and register it again"
                )
            alias = f"champion-{profile.device.slug}"
            self._client.set_registered_model_alias(version.name, alias, str(version.version))
        return replace(version, aliases=(alias,))

    def nearest(self, identity: ModelIdentity, num: int = 8) -> list[Known]:
        """The newest `num` profiles of models of this identity, of any device and name, newest first, without aliases.

        Whether their answers hold is for the caller to ask of `Known.answered`. A registry that
        is not there yet knows none. One that cannot be read, or was changed since, is left out with a warning: nobody
        should be kept from tuning by it.
        """
        if self._database is not None and not self._database.exists():
            return []
        with self._reported("look for profiles of the same model"):
            found = self._search(f"tags.{IDENTITY} = '{identity_of(identity)}'")
            newest = sorted(found, key=lambda item: (item.creation_timestamp, int(item.version)), reverse=True)
        known: list[Known] = []
        for item in newest:
            version = _version(item, ())
            try:
                with self._reported(f"read {version.uri}"):
                    known.append(Known(version, self._profile(version)))
            except (OSError, RegistryError) as error:
                logger.warning("left out: %s", error)
            if len(known) == num:
                break
        return known

    def answers(self, known: Known) -> Any:
        """What the profile's plan answered to `select`, as it was registered; None, with a warning, where it is gone.

        The bytes are checked against the digest in the profile, whose own the version was registered with.
        """
        try:
            with tempfile.TemporaryDirectory() as staging, self._reported(f"read the answers of {known.version.uri}"):
                stored = f"evidence/{ANSWERS}"
                text = Path(self._client.download_artifacts(known.version.run_id, stored, staging)).read_bytes()
        except (OSError, RegistryError) as error:
            logger.warning("left out: %s", error)
            return None
        if hashlib.sha256(text).hexdigest() != known.answers_digest:
            logger.warning("left out: the answers of %s were changed after it was registered", known.version.uri)
            return None
        return json.loads(text)

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
            check(downloaded, version)
            target = destination / "profile.json" if destination.is_dir() else destination
            put(downloaded, target)
        return target

    def versions(self, name: str) -> list[Version]:
        """Every version of `name`, newest first, each with the aliases that point to it now."""
        with self._reported(f"list the versions of {name!r}"):
            aliases: dict[int, list[str]] = {}
            for alias, number in sorted(self._model(name).aliases.items()):
                aliases.setdefault(int(number), []).append(alias)
            found = self._search(f"name='{name}'")
        listed = [_version(item, tuple(aliases.get(int(item.version), ()))) for item in found]
        return sorted(listed, key=lambda version: version.version, reverse=True)

    def _search(self, condition: str) -> list[ModelVersion]:
        page = self._client.search_model_versions(condition)
        found = list(page)
        while page.token:
            page = self._client.search_model_versions(condition, page_token=page.token)
            found += page
        return found

    def _profile(self, version: Version) -> Profile:
        """The profile of a version as it is stored now, checked."""
        with tempfile.TemporaryDirectory() as staging:
            return check(Path(self._client.download_artifacts(version.run_id, PROFILE, staging)), version)

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


def _version(item: ModelVersion, aliases: tuple[str, ...]) -> Version:
    return Version(
        name=item.name,
        version=int(item.version),
        aliases=aliases,
        run_id=item.run_id or "",
        sha256=item.tags.get(SHA256, ""),
        uri=f"models:/{item.name}/{item.version}",
        certified=item.tags.get(CERTIFIED) == "true",
        reasons=item.tags.get(REASONS, ""),
    )
