"""What there is to say of a profile, line by line, and in which of the lines two of them differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from autotune.version_tags import part_of
from btp.plan import WEIGHTED
from btp.profile import Profile

__all__ = ["Difference", "described", "difference", "stages"]

NOTHING = "-"
PARTS = ("macro", "minus_dense", "worst_task", "retention", "latency", "limit", "margin")


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Two profiles beside each other. stages: of both plans, one pair a line; others: what else differs, by heading."""

    is_same_plan: bool
    stages: tuple[tuple[str, str], ...]
    others: dict[str, tuple[str, str]]


def difference(first: Profile, second: Profile) -> Difference:
    told = dict(described(first)), dict(described(second))
    pairs = {key: (told[0].get(key, NOTHING), told[1].get(key, NOTHING)) for key in {**told[0], **told[1]}}
    return Difference(
        is_same_plan=first.plan == second.plan,
        stages=tuple(zip_longest(stages(first), stages(second), fillvalue=NOTHING)),
        others={key: pair for key, pair in pairs.items() if key != "plan" and pair[0] != pair[1]},
    )


def described(profile: Profile) -> Iterator[tuple[str, str]]:
    """What there is to say of a profile, a heading with each."""
    yield "plan", "; ".join(stages(profile)) or "dense"
    yield "positions", profile.plan.positions
    for part in ("model", "workload", "device"):
        yield part, _said(asdict(getattr(profile, part)))
    yield "certified", "yes" if profile.certified else f"no: {'; '.join(profile.uncertified_because)}"
    certificate = part_of(profile.evidence, "certificate")
    for key in PARTS:
        if certificate.get(key) is not None:
            yield key, _said(certificate[key])
    for key in ("study", "limit", "latency", "model_digest", "code_version"):
        if profile.evidence.get(key):
            yield f"its {key}", _said(profile.evidence[key])


def stages(profile: Profile) -> list[str]:
    """A line a stage."""
    return [
        f"before {stage.layer}: keep {stage.keep:.3f} by {stage.selector}"
        + (f", lambda {stage.attention_weight:.2f}" if stage.selector in WEIGHTED else "")
        for stage in profile.plan.stages
    ]


def _said(value: Any) -> str:
    if isinstance(value, dict):
        if {"value", "low", "high"} <= value.keys():
            return f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        return ", ".join(f"{key.replace('_', ' ')} {_said(each)}" for key, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
