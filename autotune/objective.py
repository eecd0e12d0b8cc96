"""What a trial is judged by: a score to maximise, a measured latency ratio to minimise, one limit to meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from btp.plan import Plan

__all__ = ["Told", "front"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A finished trial. Ratios are latency to dense, paired; `ratio_high` is the measured upper confidence bound."""

    number: int
    name: str
    plan: Plan
    score: float
    by_task: Mapping[str, float]
    ratio: float
    ratio_low: float
    ratio_high: float
    limit: float

    @property
    def feasible(self) -> bool:
        return self.ratio_high <= self.limit


def front(told: Iterable[Told]) -> list[Told]:
    """Feasible trials that no other feasible trial beats in both score and latency, fastest first."""
    best: list[Told] = []
    for trial in sorted((t for t in told if t.feasible), key=lambda t: (t.ratio, -t.score)):
        if not best or trial.score > best[-1].score:
            best.append(trial)
    return best
