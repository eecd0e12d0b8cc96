"""What a job hands out: profile and evidence written, registered, pulled back by alias, and checked once more."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from autotune import data
from autotune.bench import Bench
from autotune.certify import Certificate, Interval
from autotune.config import AutotuneError, JobConfig, check_folder, check_sqlite
from autotune.objective import Told
from autotune.registered import ANSWERS
from autotune.registry import Registry, Version
from autotune.report import write_front
from autotune.search import summary
from autotune.store import note_promotion, this_worker
from autotune.study import Study
from btp.plan import Plan
from btp.profile import Profile, Workload

__all__ = ["HEADINGS", "Outcome", "Row", "check_out", "deliver", "fresh_ratio", "registry_of"]

HEADINGS = ("plan", "image GFLOPs", "latency ratio", "macro accuracy", "worst task")
EVIDENCE = (ANSWERS, "evidence.parquet", "trials.json", "front.png", "front.html")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the final table. FLOPs count the image tokens alone, in billions; latency is the ratio to dense."""

    name: str
    plan: Plan
    image_gflops: float
    latency: Interval
    macro: Interval
    worst_task: str
    worst: Interval
    by_task: Mapping[str, float]
    scores: tuple[float, ...]

    def cells(self) -> tuple[str, ...]:
        """Under `HEADINGS`."""
        return (
            self.name,
            f"{self.image_gflops:.3f}",
            _interval(self.latency),
            _interval(self.macro),
            f"{self.worst_task} {_interval(self.worst)}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the per-sample scores: those are in `evidence.parquet`."""
        kept = {name: value for name, value in asdict(self).items() if name != "scores"}
        return {**kept, "plan": self.plan.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished job found, where it wrote it, and whether the pulled profile did what the study said."""

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
            lines.append(f"tuned - {name}: {_interval(interval, sign='+')}, {sure} zero")
        word = "meets" if self.met else "MISSES"
        return [
            *lines,
            f"\n{self.version} registered, alias {self.alias}",
            "certified" if self.certified else f"NOT certified: {'; '.join(self.reasons)}",
            f"in a fresh process: {_interval(self.fresh_ratio)} of dense, {word} {self.limit}",
            f"score reproduced by the pulled profile: {'yes' if self.reproduced else 'NO'}",
            *(f"  {path}" for path in self.paths.values()),
            f"{self.seconds:.0f} s",
        ]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


def _interval(interval: Interval, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


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
    config: JobConfig,
    bench: Bench,
    study: Study,
    champion: Told,
    rows: Sequence[Row],
    minus: Mapping[str, Interval],
    say: Callable[[str], None],
    began: float,
    certificate: Certificate | None = None,
) -> Outcome:
    """Register the champion with its evidence, pull it by alias, apply it, and measure it in a fresh process.

    It is a candidate until it has done there what the study said; only then, and only where it is certified, does the
    device's champion alias move to it. Without a certificate it stays a candidate.
    """
    say("registering")
    _write(config, bench, study, champion, rows, minus, certificate)
    registry = registry_of(config)
    version = _register(config, bench, study, registry, {row.name: row for row in rows})
    pulled = registry.pull(config.name, version.aliases[0], config.out / "pulled.json")
    say("applying the pulled profile")
    profile = Profile.load(pulled)
    profile.check_fits(bench.anatomy.identity)
    again = bench.scores_anew(profile.plan, "select")
    say("measuring in a fresh process")
    fresh, met, _ = fresh_ratio(config, pulled)
    reproduced = again.scores == bench.scores(champion.plan, "select").scores
    if met and reproduced and profile.certified:
        version = _promoted(registry, version, bench, study)
    local = ("mlflow.db", "artifacts") if config.tracking_uri is None else ()
    names = ("profile.json", "pulled.json", *EVIDENCE, *(("study.db",) if config.storage is None else ()), *local)
    return Outcome(
        study=study.name,
        limit=str(config.limit),
        num_trials=study.num_done,
        champion=champion.name,
        rows=tuple(rows),
        tuned_minus=minus,
        version=version.uri,
        alias=f"models:/{config.name}@{version.aliases[0]}",
        fresh_ratio=fresh,
        met=met,
        reproduced=reproduced,
        certified=profile.certified,
        search=summary(study),
        failures=study.failures,
        reasons=profile.uncertified_because,
        paths={name: str(config.out / name) for name in names},
        seconds=time.monotonic() - began,
    )


def _promoted(registry: Registry, version: Version, bench: Bench, study: Study) -> Version:
    """The version as its device's champion, and who was it before in the log."""
    alias = f"champion-{bench.key.slug}"
    before = next((v.version for v in registry.versions(version.name) if alias in v.aliases), None)
    promoted = registry.promote(version)
    note_promotion(
        bench.database,
        registry=registry.tracking_uri,
        name=version.name,
        alias=alias,
        before=before,
        after=version.version,
        who=this_worker(),
        why=f"certified by {study.name}",
    )
    return promoted


def _write(
    config: JobConfig,
    bench: Bench,
    study: Study,
    champion: Told,
    rows: Sequence[Row],
    minus: Mapping[str, Interval],
    certificate: Certificate | None,
) -> None:
    key = asdict(bench.key)
    answers = json.dumps(bench.answers(champion.plan)).encode()
    (config.out / ANSWERS).write_bytes(answers)
    tuned = next(row for row in rows if row.name == "tuned")
    evidence = {
        "study": study.name,
        "limit": str(config.limit),
        "data": bench.data_digests,
        "model_digest": bench.model_digest,
        "answers": hashlib.sha256(answers).hexdigest(),
        "accuracy": {
            "select": {"macro": champion.score, "by_task": dict(champion.by_task)},
            "certify": {"macro": asdict(tuned.macro), "by_task": dict(tuned.by_task)},
        },
        "certificate": certificate.to_dict() if certificate else None,
        "rows": [row.to_dict() for row in rows],
        "tuned_minus": {name: asdict(interval) for name, interval in minus.items()},
    }
    profile = Profile(
        plan=champion.plan,
        model=bench.anatomy.identity,
        workload=Workload(**{field.name: key[field.name] for field in fields(Workload)}),
        device=bench.key,
        evidence=evidence,
    )
    profile.save(config.out / "profile.json")
    examples = bench.splits["certify"]
    columns = {name: [getattr(e, name) for e in examples] for name in ("image_id", "task", "question", "answer")}
    data.write_parquet(config.out / "evidence.parquet", {**columns, **{row.name: row.scores for row in rows}})
    told = study.told()
    trials = [{**asdict(t), "plan": t.plan.to_dict()} for t in told]
    (config.out / "trials.json").write_text(json.dumps(trials, indent=1), encoding="utf-8")
    write_front(told, champion.plan, config.limit, config.out)


def _register(config: JobConfig, bench: Bench, study: Study, registry: Registry, rows: Mapping[str, Row]) -> Version:
    tuned, dense = rows["tuned"], rows["dense"]
    metrics = {
        "latency_ratio": tuned.latency.value,
        "macro": tuned.macro.value,
        "macro_retention": tuned.macro.value / max(dense.macro.value, 1e-9),
        "worst_task_retention": tuned.worst.value / max(dense.by_task[tuned.worst_task], 1e-9),
    }
    tags = {"study": study.name, "device": bench.key.name, "limit": str(config.limit)}
    return registry.register(
        name=config.name,
        profile_path=config.out / "profile.json",
        evidence={name: config.out / name for name in EVIDENCE},
        tags={**tags, **{name: f"{value:.4f}" for name, value in metrics.items()}},
        metrics=metrics,
        params={"limit": str(config.limit), "seed": str(config.seed), "model": config.model},
        experiment=config.name,
    )


def fresh_ratio(config: JobConfig, profile: Path) -> tuple[Interval, bool, float]:
    """The ratio of a profile or plan in a process of its own, by the command a user would type, and its verdict.

    Third, the limit as a ratio to how fast dense was there.
    """
    command = [sys.executable, "-m", "autotune.cli", "measure", str(profile), "--model", config.model, "--json"]
    command += ["--limit", str(config.limit), "--repeats", str(3 * config.repeats)]
    command += ["--threads", str(config.threads), "--device", config.device]
    if config.data is not None:
        command += ["--data", str(config.data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise AutotuneError(f"measuring {profile} in a fresh process must succeed, got: {done.stderr.strip()}")
    found = json.loads(done.stdout)
    return Interval(**found["ratio"]), bool(found["met"]), config.limit.ratio(found["dense_ms"])
