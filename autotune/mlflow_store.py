"""What is asked of MLflow, and of it alone: one server, or one SQLite file with a folder beside it.

This is the only file that imports MLflow, and it does so when a store is first used: the import takes seconds.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from autotune.redaction import without_passwords
from autotune.registered import NotRegisteredError, RegistryError, Version

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

__all__ = ["MlflowStore", "version_of"]

SQLITE = "sqlite:///"
MISSING = "RESOURCE_DOES_NOT_EXIST"
MAX_VERSION = 2**31 - 1  # MLflow's databases count no further

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
os.environ["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] = "false"  # whatever the user has set: a profile is plain data


class MlflowStore:
    """Runs, registered models and their versions. What MLflow raises inside `reported` becomes `RegistryError`."""

    def __init__(self, tracking_uri: str, artifact_root: Path | None) -> None:
        local = tracking_uri.startswith(SQLITE) and tracking_uri != SQLITE
        if not local and not tracking_uri.startswith(("http://", "https://")):
            raise RegistryError(
                f"a registry is sqlite:///FILE or the http(s):// address of an MLflow server, got "
                f"{without_passwords(tracking_uri)!r}; "
                "for a local one use sqlite:///mlflow.db"
            )
        if artifact_root is not None and not local:
            raise RegistryError(
                f"a server keeps the artifacts itself, got an artifact root {artifact_root} for "
                f"{without_passwords(tracking_uri)}; leave it out"
            )
        self._uri = tracking_uri
        self.file = Path(tracking_uri.removeprefix(SQLITE)) if local else None
        self._artifact_root = artifact_root or (self.file.parent / "artifacts" if self.file else None)

    @property
    def address(self) -> str:
        """One text for one registry, wherever it is asked from; without a password."""
        if self.file is not None:
            return f"{SQLITE}{self.file.absolute()}"
        parts = urlsplit(self._uri)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl().rstrip("/")

    @property
    def exists(self) -> bool:
        """Whether there is something to read yet; a server always is."""
        return self.file is None or self.file.exists()

    @functools.cached_property
    def client(self) -> MlflowClient:
        try:
            from mlflow import MlflowClient

            if self.file is not None:
                import_module("alembic")  # the small MLflow, which reads servers alone, comes without it
                self.file.parent.mkdir(parents=True, exist_ok=True)
            return MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        except ImportError as error:
            extra = "registry" if self.file is None else "tune"
            raise RegistryError(
                f"{self.address} takes MLflow to read, but: {error}; pip install 'btp-autotune[{extra}]'"
            ) from error

    def run(
        self,
        experiment: str,
        undo: ExitStack,
        *,
        name: str | None,
        tags: Mapping[str, str],
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        files: Path | None = None,
    ) -> str:
        """The id of a finished run, which `undo` deletes; files: a folder with what to upload."""
        from mlflow.entities import Metric, Param

        found = self.client.create_run(self.experiment_id(experiment), tags=dict(tags), run_name=name)
        run_id = str(found.info.run_id)
        undo.callback(self.client.delete_run, run_id)
        now_ms = int(time.time() * 1000)
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, value, now_ms, 0) for key, value in metrics.items()],
            params=[Param(key, value) for key, value in params.items()],
        )
        if files is not None:
            self.client.log_artifacts(run_id, str(files))
        self.client.set_terminated(run_id)
        return run_id

    def drop_runs(self, experiment: str, tag: str, value: str, kept: Collection[str]) -> None:
        """Delete the runs with a tag, and their children, but for the `kept` ids."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None or found.lifecycle_stage != "active":
            return

        def runs(condition: str) -> list[str]:
            listed = _all(lambda token: self.client.search_runs([found.experiment_id], condition, page_token=token))
            return [str(run.info.run_id) for run in listed]

        for run_id in runs(f"tags.{tag} = '{value}'"):
            if run_id not in kept:
                for each in (*runs(f"tags.mlflow.parentRunId = '{run_id}'"), run_id):
                    self.client.delete_run(each)

    def model(self, name: str) -> RegisteredModel:
        """Raises NotRegisteredError."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
            raise NotRegisteredError(
                f"no profile is registered as {name!r}; autotune profiles list shows which there are"
            ) from error

    def make_model(self, name: str, tags: Mapping[str, str]) -> None:
        """Make sure the name exists. Never undone: another process may have put a version under it by then."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name, tags=dict(tags))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def tag_model(self, name: str, tags: Mapping[str, str]) -> None:
        """Give a name the tags that it does not have yet. Never undone either."""
        for key in tags.keys() - self.model(name).tags.keys():
            self.client.set_registered_model_tag(name, key, tags[key])

    def version(self, name: str, number: int) -> ModelVersion:
        """Raises NotRegisteredError, also for one that was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            if number <= MAX_VERSION:
                return self.client.get_model_version(name, str(number))
        except MlflowException as error:
            if error.error_code != MISSING:
                raise
        there = ", ".join(sorted((str(item.version) for item in self.versions(name)), key=int))
        raise NotRegisteredError(f"{name!r} has no version {number}; it has: {there or 'none'}")

    def models(self) -> list[RegisteredModel]:
        return _all(lambda token: self.client.search_registered_models(page_token=token))

    def versions(self, name: str) -> list[ModelVersion]:
        quote = '"' if "'" in name else "'"
        return self.search(f"name={quote}{name}{quote}")

    def search(self, condition: str = "") -> list[ModelVersion]:
        return _all(lambda token: self.client.search_model_versions(condition, page_token=token))

    def experiment_id(self, name: str) -> str:
        """Of an experiment, which is made where there is none. Raises RegistryError for one that was deleted."""
        found = self.client.get_experiment_by_name(name)
        if found is None:
            root = self._artifact_root
            return self.client.create_experiment(name, artifact_location=root.resolve().as_uri() if root else None)
        if found.lifecycle_stage != "active":
            raise RegistryError(f"the experiment {name!r} was deleted in MLflow; restore it there or use another name")
        return str(found.experiment_id)

    @contextmanager
    def reported(self, attempt: str) -> Iterator[None]:
        """Turn what MLflow raises into `RegistryError`."""
        try:
            from mlflow.exceptions import MlflowException
        except ImportError:
            _ = self.client  # which says what to install
            raise
        try:
            yield
        except MlflowException as error:
            refused = error.error_code == "INVALID_PARAMETER_VALUE"
            way_out = "change that" if refused else "check that the registry runs and can be reached"
            reason = without_passwords(str(error)).splitlines()[0].rstrip(".")
            raise RegistryError(f"could not {attempt} in {self.address}: {reason}; {way_out}") from error


def _all(page: Callable[[str | None], Any]) -> list[Any]:
    found = page(None)
    items = list(found)
    while found.token:
        found = page(found.token)
        items += found
    return items


def version_of(item: ModelVersion, aliases: tuple[str, ...]) -> Version:
    return Version.of_tags(
        item.tags,
        name=item.name,
        version=int(item.version),
        aliases=aliases,
        run_id=item.run_id or "",
        uri=f"models:/{item.name}/{item.version}",
        created=item.creation_timestamp / 1000,
    )
