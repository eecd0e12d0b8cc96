"""Registered profiles as files: pulled, checked to the last byte, and carried to where no registry is."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autotune.cli.console import errors
from autotune.cli.options import CORES, AnswerersOption, DebugOption, DeviceOption, JsonOption
from autotune.cli.profiles import DEMO, OfflineOption, ReferenceArgument, RegistryAddress, pulled, registry_at, say

if TYPE_CHECKING:
    from autotune.profile_cache import Pulled

__all__ = ["app"]

app = typer.Typer()

BUNDLE = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A file that autotune profiles export wrote.")]
SAME = 1e-9  # scores are shares of a few thousand answers; a sum may differ in its last bit


@app.command()
def pull(
    reference: ReferenceArgument,
    to: Annotated[Path, typer.Option(help="File or folder to write the profile to.")] = Path("profile.json"),
    evidence: Annotated[Path | None, typer.Option(help="Folder to write everything else to.")] = None,
    registry: RegistryAddress = DEMO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fetch a registered profile, every digest of its version checked; a second time it comes from the cache."""
    with errors(debug):
        from autotune.version_folder import PROFILE, put

        found = pulled(reference, registry, offline)
        target = to / PROFILE if to.is_dir() else to
        put(found.folder / PROFILE, target)
        if evidence is not None:
            shutil.copytree(found.folder, evidence, dirs_exist_ok=True, ignore=shutil.ignore_patterns(PROFILE))
        if as_json:
            print(json.dumps({**asdict(found.resolution), "path": str(target), "downloaded": found.downloaded}))
        else:
            print(target)


@app.command()
def export(
    reference: ReferenceArgument,
    to: Annotated[Path, typer.Option(help="File to write.")],
    registry: RegistryAddress = DEMO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a version with all its files, and what it is called, into one file for hosts without a registry."""
    with errors(debug):
        from autotune.bundle import export_bundle

        found = pulled(reference, registry, offline)
        given = found.resolution.alias
        known = () if offline else registry_at(registry).find(found.resolution.uri).aliases
        bundle = export_bundle(found, (*known, *((given,) if given else ())), to)
        if as_json:
            print(json.dumps({**asdict(bundle), "path": str(to)}))
        else:
            say(f"{to}: {', '.join(bundle.references)}")


@app.command("import")
def import_file(
    bundle: BUNDLE,
    registry: Annotated[str | None, typer.Option(help="Register it there too, as a new version.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take a bundle in: --offline, and AUTOTUNE_OFFLINE=1, find it in the cache by the names it has."""
    with errors(debug):
        from autotune.bundle import import_bundle, register_bundle
        from autotune.profile_cache import ProfileCache

        found, kept = import_bundle(bundle, ProfileCache())
        version = register_bundle(found, kept, registry_at(registry)) if registry else None
        if as_json:
            print(json.dumps({**asdict(found), "registered": version and version.uri}))
            return
        say(f"in the cache: {', '.join(found.references)}")
        if version is not None:
            say(f"registered as {version.uri}, alias {version.alias}")


@app.command()
def verify(
    reference: ReferenceArgument,
    score: Annotated[bool, typer.Option("--score", help="Answer the held-out questions too, as --model does.")] = False,
    model: Annotated[str, typer.Option(help="Local folder or hub id of the model; default: the reference VLM.")] = "",
    data: Annotated[Path | None, typer.Option(help="The questions it was tuned on; default: the reference's.")] = None,
    workers: AnswerersOption = 0,
    device: DeviceOption = "cpu",
    registry: RegistryAddress = DEMO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check every digest of every file, tell what the certificate claims, and with --score whether it comes out."""
    with errors(debug):
        from autotune.version_folder import file_digest

        found = pulled(reference, registry, offline)
        files = {
            str(p.relative_to(found.folder)): file_digest(p) for p in sorted(found.folder.rglob("*")) if p.is_file()
        }
        claimed, reached = _claimed(found), None
        if score or model or data is not None:
            from autotune.plan_file import score_file

            answerers = workers or (CORES if device == "cpu" else 1)
            reached = score_file(found.profile, model, data, device, answerers)
        same = reached is None or (claimed is not None and abs(reached - claimed) < SAME)
        if as_json:
            told = {"files": files, "certified": found.profile.certified, "claimed": claimed, "reached": reached}
            print(json.dumps({**asdict(found.resolution), **told, "reproduced": None if reached is None else same}))
        else:
            for line in _verdict(found, files, claimed, reached, same):
                say(line)
    if not same:
        raise typer.Exit(1)


def _claimed(found: Pulled) -> float | None:
    """Macro accuracy on held-out pictures, as the certificate has it."""
    from autotune.version_tags import part_of

    macro = part_of(part_of(found.profile.evidence, "certificate"), "macro").get("value")
    return float(macro) if isinstance(macro, int | float) else None


def _verdict(
    found: Pulled, files: dict[str, str], claimed: float | None, reached: float | None, same: bool
) -> list[str]:
    from autotune.version_tags import part_of

    profile = found.profile
    lines = [f"{digest}  {name}" for name, digest in files.items()]
    lines.append(f"{found.resolution.uri}: {len(files)} files, every one as it was registered")
    lines.append("certified" if profile.certified else f"NOT certified: {'; '.join(profile.uncertified_because)}")
    certificate = part_of(profile.evidence, "certificate")
    if claimed is not None:
        lines.append(
            f"it claims {claimed:.3f} macro accuracy on {certificate.get('num_pictures', '?')} held-out pictures"
        )
    high, limit = part_of(certificate, "latency").get("high"), certificate.get("limit")
    if isinstance(high, int | float):
        lines.append(
            f"and at most {high:.3f} of dense's latency on {profile.device.name}"
            + (f", limit {limit:.3f}" if isinstance(limit, int | float) else "")
        )
    if reached is not None:
        told = "nothing" if claimed is None else f"{claimed:.3f}"
        lines.append(
            f"reproduces {reached:.3f} = {told}" if same else f"does NOT reproduce: {reached!r} is not {claimed!r}"
        )
    return lines
