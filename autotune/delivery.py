"""What a job hands out: profile and evidence written, registered, pulled back by alias, and checked once more."""

from __future__ import annotations

import getpass
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune.bench import Bench
from autotune.certificate import Certificate
from autotune.certify import Interval
from autotune.config import AutotuneError, JobConfig, check_folder, check_sqlite
from autotune.measured import measure_fresh
from autotune.papers import PAPERS, Proof, Row, write_papers
from autotune.profiles import GateError, Profiles, RegistryError, promotion_database
from autotune.registry import Registry, Version
from autotune.search import summary
from autotune.study import Study
from autotune.version_folder import put
from btp.profile import Profile

__all__ = ["HEADINGS", "Outcome", "check_out", "deliver", "promoted", "registry_of"]

HEADINGS = ("plan", "image GFLOPs", "latency ratio", "macro accuracy", "worst task")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished job found, where it wrote it, and whether the pulled profile did what the study said.

    held_back: why what is certified is no champion; empty where it is, or is not certified.
    """

    study: str
    limit: str
    num_trials: int
    champion: str
    rows: tuple[Row, ...]
    tuned_minus: Mapping[str, Interval]
    version: str
    alias: str
    fresh_ratio: Interval
    met: bool
    reproduced: bool
    certified: bool
    held_back: str
    reasons: tuple[str, ...]
    search: Mapping[str, Any]
    failures: Mapping[str, str]
    paths: Mapping[str, str]
    seconds: float

    @property
    def title(self) -> str:
        return f"{self.study}: {self.limit}, {self.num_trials} trials, on `certify`"

    def lines(self) -> list[str]:
        """What is to be said below the table."""
        lines = [
            "{num_stopped} of {num_tried} plans stopped early, which saved {saved:.0%} of the answers".format(
                **self.search
            ),
            *(f"{name} FAILED: {reason}" for name, reason in self.failures.items()),
            self.search["steering"],
            "latency model, error on plans it was not fitted to: median {median:.1%}, worst {worst:.1%}\n".format(
                **self.search["latency_model_error"]
            ),
        ]
        for name, interval in self.tuned_minus.items():
            sure = "excludes" if interval.excludes_zero else "includes"
            lines.append(f"tuned - {name}: {interval:+.3f}, {sure} zero")
        word = "meets" if self.met else "MISSES"
        return [
            *lines,
            f"\n{self.version} registered, alias {self.alias}",
            "certified" if self.certified else f"NOT certified: {'; '.join(self.reasons)}",
            *([f"not promoted: {self.held_back}"] if self.held_back else []),
            f"in a fresh process: {self.fresh_ratio:.3f} of dense, {word} {self.limit}",
            f"score reproduced by the pulled profile: {'yes' if self.reproduced else 'NO'}",
            *(f"  {path}" for path in self.paths.values()),
            f"{self.seconds:.0f} s",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


def check_out(config: JobConfig) -> None:
    """Refuse, before anything is computed, a place or a name that the results could not be written to."""
    check_folder(config.out)
    if not config.name or set(config.name) & set("/:@"):
        raise AutotuneError(f"--name must be a text without / : @, got {config.name!r}; it names the registered model")
    if config.tracking_uri is None:
        check_sqlite(config.out / "mlflow.db")
    registry_of(config)


def registry_of(config: JobConfig) -> Registry:
    """The registry that a job writes to."""
    return Registry(config.tracking_uri or f"sqlite:///{config.out / 'mlflow.db'}")


def deliver(
    config: JobConfig, bench: Bench, study: Study, proof: Proof, say: Callable[[str], None], began: float
) -> Outcome:
    """Register the champion with its papers, pull it by alias, apply it, and measure it in a fresh process.

    It is a candidate until it has done there what the study said; only then, and only where it is certified, does the
    device's champion alias move to it.
    """
    say("registering")
    write_papers(config, bench, study, proof)
    registry = registry_of(config)
    version = _register(config, bench, study, registry, proof)
    pulled = _pulled(config, registry, version)
    say("applying the pulled profile")
    profile = Profile.load(pulled)
    profile.check_fits(bench.anatomy.identity)
    again = bench.scores_anew(profile.plan, "select")
    say("measuring in a fresh process")
    fresh = measure_fresh(config, pulled)
    reproduced = again.scores == bench.scores(proof.champion.plan, "select").scores
    held_back = ""
    if fresh.met and reproduced and profile.certified:
        version, held_back = promoted(config, registry, version, f"certified by {study.name}")
    local = ("mlflow.db", "artifacts") if config.tracking_uri is None else ()
    names = ("profile.json", "pulled.json", *PAPERS, *(("study.db",) if config.storage is None else ()), *local)
    return Outcome(
        study=study.name,
        limit=str(config.limit),
        num_trials=study.num_done,
        champion=proof.champion.name,
        rows=proof.rows,
        tuned_minus=proof.minus,
        version=version.uri,
        alias=f"models:/{config.name}@{version.alias}" if version.alias else version.uri,
        fresh_ratio=fresh.ratio,
        met=fresh.met,
        reproduced=reproduced,
        certified=profile.certified,
        held_back=held_back,
        search=summary(study),
        failures=study.failures,
        reasons=profile.uncertified_because,
        paths={name: str(config.out / name) for name in names},
        seconds=time.monotonic() - began,
    )


def _pulled(config: JobConfig, registry: Registry, version: Version) -> Path:
    """The registered profile, fetched by its number: another job may have the alias by now."""
    target = config.out / "pulled.json"
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        registry.download(version, Path(folder))
        put(Path(folder) / "profile.json", target)
    return target


def promoted(config: JobConfig, registry: Registry, version: Version, why: str) -> tuple[Version, str]:
    """The version as its device's champion; or as it is, and the reason for that."""
    if not config.promote:
        return version, "--no-promote was given"
    who = config.who or f"{getpass.getuser()}@{socket.gethostname()}"
    try:
        profiles = Profiles(registry, promotion_database(registry, config.storage))
    except RegistryError as error:
        return version, str(error)
    try:
        was = next((row for row in profiles.log(version.name) if row.after == version.version), None)
        if was is not None and was.alias not in version.aliases:
            return version, f"it was {was.alias} before; autotune profiles promote makes it that again"
        done = profiles.promote(version, who=who, why=why)
    except GateError as error:
        return version, str(error)
    return replace(version, aliases=(done.alias,)), ""


def _register(config: JobConfig, bench: Bench, study: Study, registry: Registry, proof: Proof) -> Version:
    """The version of what was proven: one, however often the job is run."""
    profile = Profile.load(config.out / "profile.json")
    if (known := registry.take_up(config.name, profile.digest)) is not None:
        return known
    dense, tuned = proof.rows[0], proof.rows[-1]
    metrics = {
        "macro": tuned.macro.value,
        "retention": tuned.macro.value / max(dense.macro.value, 1e-9),
        "worst_task_retention": tuned.worst.value / max(dense.by_task[tuned.worst_task], 1e-9),
        "ratio": proof.measured.ratio.value,
        "latency_ms": proof.measured.ms.value,
    }
    return registry.register(
        name=config.name,
        profile_path=config.out / "profile.json",
        evidence={name: config.out / name for name in PAPERS},
        tags={},
        metrics=metrics,
        params={"limit": str(config.limit), "seed": str(config.seed), "model": config.model},
        experiment=config.name,
        finalists={name: _finalist(certificate) for name, certificate in proof.certificates.items()},
        description=_described(profile, proof, config),
    )


def _described(profile: Profile, proof: Proof, config: JobConfig) -> str:
    """What whoever opens the version in MLflow reads first, as Markdown."""
    verdict = "**Certified**" if profile.certified else f"**Not certified**: {'; '.join(profile.uncertified_because)}"
    measured, minus = proof.measured, proof.certificate.minus_dense
    figures = (
        f"{config.limit}: {measured.ratio:.3f} of dense, {measured.ms:.1f} ms; macro accuracy {minus:+.3f} to dense"
    )
    return f"{verdict}\n\n{figures} on held-out pictures.\n\nThe whole of it: `profile/CARD.md` of the source run."


def _finalist(certificate: Certificate) -> dict[str, float | str]:
    """What a finalist's own run says of it."""
    return {
        "macro": certificate.macro.value,
        "macro_minus_dense": certificate.minus_dense.value,
        "adjusted_p": certificate.adjusted_p,
        "worst_task_retention": certificate.retention.value,
        **({} if certificate.latency is None else {"ratio": certificate.latency.value}),
        "certified": str(certificate.certified).lower(),
        "reasons": "; ".join(certificate.reasons),
    }
