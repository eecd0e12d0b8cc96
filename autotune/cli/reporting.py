"""The comparison of studies as one file, from the command line."""

from __future__ import annotations

import importlib.metadata
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.cli.console import errors
from autotune.cli.dashboard import registry_beside, studies_at
from autotune.cli.options import DebugOption, RegistryOption, StorageOption
from autotune.config import AutotuneError

if TYPE_CHECKING:
    from autotune.pages.compare import Comparison
    from autotune.pages.profile import Chosen
    from autotune.profiles import Profiles
    from autotune.registered import Version
    from autotune.store import Database, StudyRow

__all__ = ["app"]

app = typer.Typer()


@app.command()
def report(
    studies: Annotated[list[str], typer.Argument(metavar="STUDY...", help="Names of the studies to compare.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("report.html"),
    storage: StorageOption = None,
    registry: RegistryOption = None,
    debug: DebugOption = False,
) -> None:
    """Write the fronts of studies side by side, as one page that needs no network."""
    with errors(debug):
        from autotune.store import Database

        address = studies_at(None, storage)
        database = Database(address)
        text = _report(database, studies, registry or registry_beside(None, address))
        try:
            out.write_text(text, encoding="utf-8")
        except OSError as error:
            raise AutotuneError(
                f"--out must be a file that can be written, got {out}: {error.strerror or error}; choose another"
            ) from error
        print(out)


def _report(database: Database, names: list[str], registry: str | None) -> str:
    from autotune.objective import Told
    from autotune.pages.compare import Comparison
    from autotune.pages.fronts import StudySeries
    from autotune.pages.report import rendered, sheet_of
    from autotune.pages.view import View
    from autotune.profiles import Profiles
    from autotune.registry import Registry
    from autotune.store import Studies

    rows = _rows(database, names)
    told = Studies(database)
    series = [StudySeries.of(row, [Told.from_dict(record) for record in told.records(row.name)]) for row in rows]
    view = View.of(("study", row.name) for row in rows)
    profiles = Profiles(Registry(registry), database) if registry else None
    versions, notes = _versions(profiles)
    comparison = Comparison(view=view, studies=tuple(series), versions=tuple(versions), links=False)
    certificates = _certificates(profiles, comparison, notes) if profiles else []
    code = importlib.metadata.version("btp-autotune")
    return rendered(comparison, sheet_of(rows), certificates, notes, at=time.time(), version=code)


def _rows(database: Database, names: list[str]) -> list[StudyRow]:
    """The named studies. Raises AutotuneError where one is not there."""
    from autotune.store import Studies

    found = {name: Studies(database).get(name) for name in names}
    missing = [name for name, row in found.items() if row is None]
    if missing:
        some = ", ".join(row.name for row in Studies(database).page(10)) or "none"
        raise AutotuneError(f"{database} must have the studies, but has no {', '.join(missing)}; it has {some}")
    return [row for row in found.values() if row is not None]


def _versions(profiles: Profiles | None) -> tuple[list[Version], list[str]]:
    """What is registered, and what is to be said where that cannot be asked."""
    from autotune.redaction import redacted
    from autotune.registered import RegistryError

    if profiles is None:
        return [], ["No registry was named, so certified versions are not shown; name it with --registry."]
    file = profiles.registry.file
    if file is not None and not file.exists():
        return [], ["There was no registry to ask for certified versions."]
    try:
        return profiles.list(), []
    except RegistryError as error:
        return [], [f"The registry could not be asked for certified versions: {redacted(str(error))}"]


def _certificates(profiles: Profiles, comparison: Comparison, notes: list[str]) -> list[Chosen]:
    """Of the versions whose plans the studies have tried; one that cannot be read is noted."""
    from autotune.pages.profile import chosen_of
    from autotune.redaction import redacted
    from autotune.registered import RegistryError

    found = []
    for version in comparison.certified:
        try:
            found.append(chosen_of(version, profiles.profile(version), profiles.registry.address))
        except RegistryError as error:
            notes.append(f"The certificate of {version.uri} could not be read: {redacted(str(error))}")
    return found
