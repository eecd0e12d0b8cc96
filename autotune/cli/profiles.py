"""Registered profiles from the command line: what there is, what is in one, and how two differ."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from autotune.cli.console import errors, plain, print_tables
from autotune.cli.options import DebugOption, JsonOption
from autotune.config import STORAGE, AutotuneError

if TYPE_CHECKING:
    from autotune.profile_cache import Pulled
    from autotune.registered import Version
    from autotune.registry import Registry

__all__ = ["OfflineOption", "ReferenceArgument", "RegistryAddress", "app", "pulled", "registry_at", "say"]

app = typer.Typer()

DEMO = "sqlite:///runs/demo/mlflow.db"
WIDTH = 100
RegistryAddress = Annotated[
    str, typer.Option("--registry", envvar="MLFLOW_TRACKING_URI", help="MLflow address: sqlite:///FILE or a server's.")
]
ReferenceArgument = Annotated[
    str, typer.Argument(metavar="REF", help="NAME@ALIAS or NAME/VERSION, with models:/ before it or not.")
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Connect to nothing: take what the cache has.")]
HERE = Annotated[str, typer.Option("--device", help="Part of a device's name, such as h200.")]
HEADINGS = ("version", "aliases", "device", "certified", "limit", "retention", "worst task", "ratio", "ms", "created")


@app.command("list")
def list_versions(
    name: Annotated[str | None, typer.Argument(help="Of this name only.")] = None,
    device: HERE = "",
    registry: RegistryAddress = DEMO,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """List registered versions, newest first: device, certificate, limit, accuracy kept, latency."""
    with errors(debug):
        versions = settled(registry, name).versions(name)
        found = [v for v in versions if device.lower() in f"{v.device} {v.device_name}".lower()]
        if as_json:
            print(json.dumps([asdict(version) for version in found]))
        elif found:
            print_tables([plain("")], HEADINGS, [[_cells(version) for version in found]], [], WIDTH)
        else:
            where = f" for a device named {device!r}" if device else ""
            say(f"no version is registered in {registry_at(registry).address}{where}; --registry names another one")


@app.command()
def best(
    max_latency_ms: Annotated[float, typer.Option(min=0.0, help="What its upper bound must keep to.")],
    device: HERE = "",
    name: Annotated[str | None, typer.Option(help="Of this name only.")] = None,
    metric: Annotated[Literal["prefill", "ttft"], typer.Option(help="Which latency.")] = "prefill",
    quantile: Annotated[Literal["p50", "p95"], typer.Option(help="Of that latency.")] = "p50",
    registry: RegistryAddress = DEMO,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Answer which certified version to use: the one that keeps most accuracy within a latency."""
    with errors(debug):
        from autotune.portfolio import best_of

        there = settled(registry, name)
        versions = there.versions(name)
        asked = {"device": device, "metric": metric, "quantile": quantile}
        found = best_of(versions, there.profile, max_latency_ms=max_latency_ms, **asked)
        if as_json:
            print(json.dumps(asdict(found)))
            return
        others = [v for v in versions if v.certified and v.latency_high_ms is not None and v.uri != found.uri]
        print_tables([plain("")], HEADINGS, [[_cells(found)]], [], WIDTH)
        say(f"use {found.uri}" + (f"; other certified ones: {', '.join(v.uri for v in others)}" if others else ""))


@app.command()
def show(
    reference: ReferenceArgument,
    registry: RegistryAddress = DEMO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show one version: plan, model, workload, device, certificate and evidence."""
    with errors(debug):
        from autotune.profile_diff import described

        found = pulled(reference, registry, offline)
        if as_json:
            print(json.dumps({**asdict(found.resolution), "profile": found.profile.to_dict()}))
            return
        say(f"{found.resolution.uri}, SHA-256 {found.resolution.sha256}, {found.resolution.age}")
        for heading, told in described(found.profile):
            say(f"{heading:<12} {told}")
        say(f"{'files':<12} {', '.join(sorted(path.name for path in found.folder.iterdir()))}")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="NAME@ALIAS or NAME/VERSION.")],
    second: Annotated[str, typer.Argument(metavar="B", help="NAME@ALIAS or NAME/VERSION.")],
    registry: RegistryAddress = DEMO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Hold two versions against each other: plans stage by stage, then whatever else differs."""
    with errors(debug):
        from autotune.profile_diff import difference

        found = [pulled(reference, registry, offline) for reference in (first, second)]
        here, there = (each.profile for each in found)
        told = difference(here, there)
        if as_json:
            plans = [profile.plan.to_dict() for profile in (here, there)]
            uris = [each.resolution.uri for each in found]
            print(json.dumps({"uris": uris, "plans": plans, "differs": told.others}))
            return
        headings = ("stage", *(each.resolution.uri for each in found))
        if told.stages:
            rows = [(str(number), *sides) for number, sides in enumerate(told.stages)]
            print_tables([plain("")], headings, [rows], [], WIDTH)
        if told.others:
            others = [(key, *sides) for key, sides in told.others.items()]
            print_tables([plain("")], ("differs", *headings[1:]), [others], [], WIDTH)
        elif told.is_same_plan:
            say("nothing differs")


def registry_at(address: str) -> Registry:
    from autotune.registry import Registry

    return Registry(address)


def settled(address: str, name: str | None) -> Registry:
    """The registry, its aliases where the log says, if the log's database is at hand: by its variable, or beside it.

    A host that only pulls has none, and one that cannot reach it is told so and goes on.
    """
    registry = registry_at(address)
    storage = os.environ.get(STORAGE) or None
    if storage is None and (registry.file is None or not registry.file.with_name("study.db").exists()):
        return registry
    try:
        from autotune.profiles import Profiles, promotion_database
    except ModuleNotFoundError:
        return registry
    try:
        Profiles(registry, promotion_database(registry, storage)).settle(name)
    except AutotuneError as error:
        typer.echo(f"aliases are as the registry has them; the log of promotions could not be asked: {error}", err=True)
    return registry


def pulled(reference: str, registry: str, offline: bool) -> Pulled:
    """A version in the cache; whoever goes offline is told how old the alias's resolution is."""
    from autotune.profile_cache import ProfileCache
    from autotune.registered import Reference

    there = registry_at(registry) if offline else settled(registry, Reference.parse(reference).name)
    found = ProfileCache().pull(reference, there, offline=offline)
    if offline:
        typer.echo(f"offline: {reference} is {found.resolution.uri}, {found.resolution.age}", err=True)
    return found


def say(line: str) -> None:
    print_tables([], (), [], [line], WIDTH)


def _cells(version: Version) -> tuple[str, ...]:
    return (
        version.uri.removeprefix("models:/"),
        ", ".join(version.aliases) or "-",
        version.device or "-",
        "yes" if version.certified else "no",
        version.limit or "-",
        _share(version.retention),
        _share(version.worst_task_retention),
        _bounded(version.ratio, version.ratio_high, 3),
        _bounded(version.latency_ms, version.latency_high_ms, 1),
        datetime.fromtimestamp(version.created, UTC).strftime("%Y-%m-%d %H:%M"),
    )


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _bounded(value: float | None, high: float | None, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + ("" if high is None else f" (≤ {high:.{digits}f})")
