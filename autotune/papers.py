"""The papers that come with a profile: what was measured, answered and tried, and a card that people read."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from autotune import data
from autotune.bench import Bench
from autotune.certificate import Certificate
from autotune.certify import Interval
from autotune.config import JobConfig
from autotune.measured import Measured
from autotune.objective import Told, front
from autotune.registered import ANSWERS
from autotune.report import write_front
from autotune.study import Study
from btp.plan import WEIGHTED, Plan
from btp.profile import DeviceKey, Profile, Workload

__all__ = ["PAPERS", "Proof", "Row", "code_version", "trial_columns", "write_papers"]

PAPERS = (ANSWERS, "CARD.md", "evidence.parquet", "front.html", "front.png", "latency.json", "study.parquet")
ROOT = Path(__file__).parents[1]


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
        """Under `delivery.HEADINGS`."""
        return (
            self.name,
            f"{self.image_gflops:.3f}",
            f"{self.latency:.3f}",
            f"{self.macro:.3f}",
            f"{self.worst_task} {self.worst:.3f}",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the per-sample scores: those are in `evidence.parquet`."""
        kept = {name: value for name, value in asdict(self).items() if name != "scores"}
        return {**kept, "plan": self.plan.to_dict()}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Of what `to_dict` gave, and its scores."""
        intervals = {name: Interval(**record[name]) for name in ("latency", "macro", "worst")}
        scores = tuple(record["scores"])
        return cls(**{**record, **intervals, "plan": Plan.from_dict(record["plan"]), "scores": scores})


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """What held-out pictures and a fresh process said.

    certificates: of every finalist, by name. measured: the champion in a process of its own. rows: what is compared,
    dense first and the champion, "tuned", last. minus: the champion's macro accuracy minus each of the others'.
    code_version: what proved it.
    """

    champion: Told
    code_version: str
    certificates: Mapping[str, Certificate]
    measured: Measured
    rows: tuple[Row, ...]
    minus: Mapping[str, Interval]

    @property
    def certificate(self) -> Certificate:
        """The champion's."""
        return self.certificates[self.champion.name]

    def to_dict(self) -> dict[str, Any]:
        return {
            "champion": self.champion.to_dict(),
            "code_version": self.code_version,
            "certificates": {name: each.to_dict() for name, each in self.certificates.items()},
            "measured": self.measured.to_dict(),
            "rows": [{**row.to_dict(), "scores": list(row.scores)} for row in self.rows],
            "minus": {name: asdict(interval) for name, interval in self.minus.items()},
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        return cls(
            champion=Told.from_dict(record["champion"]),
            code_version=record["code_version"],
            certificates={name: Certificate.from_dict(each) for name, each in record["certificates"].items()},
            measured=Measured.from_dict(record["measured"]),
            rows=tuple(Row.from_dict(row) for row in record["rows"]),
            minus={name: Interval(**interval) for name, interval in record["minus"].items()},
        )


def write_papers(config: JobConfig, bench: Bench, study: Study, proof: Proof) -> Profile:
    """Write `profile.json` and `PAPERS` into `config.out`, and return the profile."""
    answers = json.dumps(bench.answers(proof.champion.plan)).encode()
    (config.out / ANSWERS).write_bytes(answers)
    profile = _profile(config, bench, study, proof, hashlib.sha256(answers).hexdigest())
    profile.save(config.out / "profile.json")
    measured = {"plan": proof.champion.plan.digest, **proof.measured.to_dict()}
    (config.out / "latency.json").write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    examples = bench.splits["certify"]
    columns = {name: [getattr(e, name) for e in examples] for name in ("image_id", "task", "question", "answer")}
    data.write_parquet(config.out / "evidence.parquet", {**columns, **{row.name: row.scores for row in proof.rows}})
    told = study.told()
    data.write_parquet(config.out / "study.parquet", trial_columns(study))
    write_front(told, proof.champion.plan, config.limit, config.out)
    (config.out / "CARD.md").write_text(_card(config, profile, proof, told), encoding="utf-8")
    return profile


def _profile(config: JobConfig, bench: Bench, study: Study, proof: Proof, answers: str) -> Profile:
    tuned = proof.rows[-1]
    evidence = {
        "study": study.name,
        "limit": str(config.limit),
        "code_version": proof.code_version,
        "data": bench.data_digests,
        "model_digest": bench.model_digest,
        "answers": answers,
        "accuracy": {
            "select": {"macro": proof.champion.score, "by_task": dict(proof.champion.by_task)},
            "certify": {"macro": asdict(tuned.macro), "by_task": dict(tuned.by_task)},
        },
        "latency": proof.measured.summary(),
        "certificate": proof.certificate.to_dict(),
        "rows": [row.to_dict() for row in proof.rows],
        "tuned_minus": {name: asdict(interval) for name, interval in proof.minus.items()},
    }
    return Profile(
        plan=proof.champion.plan,
        model=bench.anatomy.identity,
        workload=bench.workload,
        device=bench.key,
        evidence=evidence,
    )


def code_version() -> str:
    """Of this package; in a checkout with the commit, and "-dirty" where files differ from it."""
    found = version("btp-autotune")
    if not (ROOT / ".git").exists():
        return found
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # there is no git
        return found
    return f"{found}+{done.stdout.strip()}" if done.returncode == 0 else found


def trial_columns(study: Study) -> dict[str, list[Any]]:
    """Every trial, those that failed last: a column a field, as JSON where it is no number or text."""
    rows: list[dict[str, Any]] = [
        {
            **t.to_dict(),
            "feasible": t.feasible,
            "state": "complete" if t.complete else "stopped",
        }
        for t in study.told()
    ]
    for each in study.leases.all():
        if each.state == "failed":
            work = {"draw" if each.name is None else "plan": each.work}
            failed = {"number": each.number, "name": each.title, "state": "failed", "reason": each.reason}
            rows.append({**failed, **work})
    names = dict.fromkeys(["reason", *(name for row in rows for name in row)])
    return {name: [_plain(row.get(name)) for row in rows] for name in names}


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, (dict, list, tuple)) else value


def _card(config: JobConfig, profile: Profile, proof: Proof, told: Sequence[Told]) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined)
    environment.filters |= {
        "ms": "{:.1f} ms".format,
        "percent": lambda interval: f"{_hundredfold(interval):.1f} %",
        "points": lambda interval: f"{_hundredfold(interval):+.1f}",
        "ratio": "{:.3f}".format,
    }
    evidence = profile.evidence
    papers = {
        "model": f"{profile.model.architecture}, {profile.model.num_layers} layers of {profile.model.hidden_size}",
        "model digest": evidence["model_digest"],
        **{f"data digest, {split}": digest for split, digest in evidence["data"].items()},
        "workload": _listed(profile.workload),
        "device": _listed(profile.device),
        "study": evidence["study"],
        "seed": config.seed,
        "code version": evidence["code_version"],
    }
    return environment.get_template("card.md.jinja").render(
        name=config.name,
        alias=f"{'champion' if profile.certified else 'candidate'}-{profile.device.slug}",
        profile=profile,
        proof=proof,
        certificate=proof.certificate,
        measured=proof.measured,
        dense=proof.rows[0],
        limit=config.limit,
        told=told,
        front=front(told),
        papers=papers,
        weighted=WEIGHTED,
    )


def _listed(record: Workload | DeviceKey) -> str:
    return ", ".join(f"{key} {value}" for key, value in asdict(record).items() if value != "")


def _hundredfold(interval: Interval) -> Interval:
    return Interval(100 * interval.value, 100 * interval.low, 100 * interval.high)
