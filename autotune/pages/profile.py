"""Registered profiles: all names at a glance, and the page of one, with its versions, certificate and promotions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import quote

from autotune.pages.evidence import Claim, Row, claims_of, rows_of, verdict_of
from autotune.pages.figures import NOT_KNOWN, moment, percent
from autotune.pages.schedule import Schedule, schedule_of
from autotune.profile_diff import Difference, difference
from autotune.registered import NUMBERS, Version
from btp.profile import Profile

if TYPE_CHECKING:
    from autotune.store import Promotion

__all__ = [
    "Chosen",
    "Compared",
    "LogLine",
    "ModelLine",
    "VersionLine",
    "chosen_of",
    "compared",
    "log_line",
    "model_lines",
    "version_line",
]

CHAMPION = "champion-"


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionLine:
    """A version, as a table tells it. mlflow: where MLflow shows it, or "". worth: what a table is sorted by."""

    name: str
    number: int
    aliases: tuple[str, ...]
    certified: bool
    reasons: tuple[str, ...]
    device: str
    device_name: str
    limit: str
    retention: str
    worst_task: str
    ratio: str
    latency_ms: str
    study: str
    created: str
    mlflow: str
    mlflow_run: str
    worth: Mapping[str, float | None]

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelLine:
    """A registered name. champions: by device, the versions that are champion there."""

    name: str
    newest: VersionLine
    num_versions: int
    num_certified: int
    champions: tuple[VersionLine, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class LogLine:
    """A promotion. kind: promote or rollback."""

    name: str
    alias: str
    kind: str
    before: int | None
    after: int
    who: str
    why: str
    when: str
    applied: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """One version in full. alias: that it has, or would have as champion. apply, pull: a line each."""

    line: VersionLine
    verdict: str
    claims: tuple[Claim, ...]
    rows: tuple[Row, ...]
    schedule: Schedule
    device: str
    champion: str
    apply: str
    pull: str
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """Two versions beside each other."""

    lines: tuple[VersionLine, VersionLine]
    schedules: tuple[Schedule, Schedule]
    told: Difference


def version_line(version: Version, registry: str) -> VersionLine:
    """registry: its address, without a password."""
    link = f"{registry}/#/models/{quote(version.name, safe='')}/versions/{version.version}"
    run = f"{registry}/#/experiments/{version.experiment_id}/runs/{version.run_id}" if version.experiment_id else ""
    is_server = registry.startswith(("http://", "https://"))
    return VersionLine(
        name=version.name,
        number=version.version,
        aliases=version.aliases,
        certified=version.certified,
        reasons=tuple(part for part in version.reasons.split("; ") if part),
        device=version.device or NOT_KNOWN,
        device_name=version.device_name or NOT_KNOWN,
        limit=version.limit or NOT_KNOWN,
        retention=percent(version.retention),
        worst_task=percent(version.worst_task_retention),
        ratio=_bounded(version.ratio, version.ratio_high, ".3f"),
        latency_ms=_bounded(version.latency_ms, version.latency_high_ms, ".1f"),
        study=version.study,
        created=moment(version.created),
        worth={name: getattr(version, name) for name in NUMBERS},
        mlflow=link if is_server else "",
        mlflow_run=run if is_server else "",
    )


def model_lines(versions: Sequence[Version], registry: str, text: str, certified: bool) -> list[ModelLine]:
    """By name. versions: newest first. text: in a name or a device; certified: those alone that have such a version."""
    by_name: dict[str, list[Version]] = {}
    for version in versions:
        by_name.setdefault(version.name, []).append(version)
    found = []
    for name, members in sorted(by_name.items()):
        words = " ".join((name, *(f"{each.device} {each.device_name}" for each in members))).lower()
        proven = sum(each.certified for each in members)
        if text.lower() not in words or (certified and not proven):
            continue
        champions = [each for each in members if any(alias.startswith(CHAMPION) for alias in each.aliases)]
        line = ModelLine(
            name=name,
            newest=version_line(members[0], registry),
            num_versions=len(members),
            num_certified=proven,
            champions=tuple(version_line(each, registry) for each in champions),
        )
        found.append(line)
    return found


def log_line(row: Promotion) -> LogLine:
    told = {name: getattr(row, name) for name in ("name", "alias", "kind", "before", "after", "who", "why", "applied")}
    return LogLine(**told, when=moment(row.at))


def chosen_of(version: Version, profile: Profile, registry: str) -> Chosen:
    line, champion = version_line(version, registry), CHAMPION + profile.device.slug
    reference = f"models:/{version.name}@{champion}" if champion in version.aliases else version.uri
    return Chosen(
        line=line,
        verdict=verdict_of(profile),
        claims=claims_of(profile),
        rows=rows_of(profile),
        schedule=_schedule(profile),
        device=profile.device.name,
        champion=champion,
        apply=f'with btp.prune(model, "{reference}"): model.generate(**inputs)',
        pull=f"autotune profiles pull {reference} --to profile.json",
        sha256=version.sha256,
    )


def compared(versions: Sequence[Version], profiles: Sequence[Profile], registry: str) -> Compared:
    """Two of them."""
    (first, second), (here, there) = versions, profiles
    return Compared(
        lines=(version_line(first, registry), version_line(second, registry)),
        schedules=(_schedule(here), _schedule(there)),
        told=difference(here, there),
    )


def _schedule(profile: Profile) -> Schedule:
    return schedule_of(profile.plan, (), profile.model.num_image_tokens, profile.model.num_layers)


def _bounded(value: float | None, high: float | None, spec: str) -> str:
    if value is None:
        return NOT_KNOWN
    return f"{value:{spec}}" + ("" if high is None else f" (≤ {high:{spec}})")
