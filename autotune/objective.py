"""What a trial is judged by: a score to maximise, a latency ratio to minimise, and one constraint to meet."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal, Self

from scipy import stats

from autotune.config import AutotuneError
from autotune.ranges import Draw
from btp.plan import Plan

__all__ = ["MIN_CORRELATION", "MIN_TRIALS_TO_TRUST", "Guard", "Steering", "Told", "front", "rivals", "steering"]

MIN_CORRELATION = 0.8
"""Least rank correlation at which the proxy steers.

At a Spearman correlation of 0.8 two quantities order about four pairs of plans in five alike (1/2 + asin(r) / pi with
r = 2 sin(0.8 pi / 6) = 0.81, for jointly normal ones). Accuracy on 64 samples is no better a guide: its paired standard
error is about 3 points, as much as plans worth comparing differ by. Of 8 unrelated trials, one set in a hundred has it.
"""
MIN_TRIALS_TO_TRUST = 8
LEAST_KL = 1e-6  # nats; below it, plans are told apart by rounding errors


@dataclass(frozen=True, slots=True)
class Guard:
    """How much of its dense accuracy the worst task must keep: `worst_task>=0.95`."""

    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise AutotuneError(
                f"a guard must be a share of dense accuracy in (0, 1], got {self.share:g}; 0.95 allows a loss of 5 %"
            )

    @classmethod
    def parse(cls, text: str) -> Guard:
        found = re.fullmatch(r"worst_task>=(\d+(?:\.\d+)?|\.\d+)", text.replace(" ", ""))
        if found is None:
            raise AutotuneError(
                f'a guard reads worst_task>=(share of dense accuracy), got {text!r}; try --guard "worst_task>=0.95"'
            )
        return cls(float(found[1]))


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A finished trial.

    draw: what the search space calls the plan, None where it has no name for it. num_samples: how many it was scored
    on; all of them where `complete`, fewer where racing stopped it. score: macro accuracy over the tasks, 0 where
    samples have no labels. proxy, nll: mean KL divergence to dense and negative log-likelihood, nats a token of dense's
    answer. by_task: accuracies, empty without labels. worst_task: the smallest share of its dense accuracy that a task
    keeps. Ratios are latency to dense, `ratio_high` the upper confidence bound; modelled unless `measured`. guard: the
    least worst_task that is allowed, None for any. looks: number of samples, score and proxy after each look.

    Of complete trials with labels, 95 % over pictures: score_low and score_high around the score; minus_dense, the
    paired difference to dense, its value and bounds, by task and under "macro". tokens: image tokens by layer, as most
    prompts had them; image_gflops and cache_mib are theirs. Trials from before these were kept have none.
    """

    number: int
    name: str
    plan: Plan
    draw: Draw | None = None
    num_samples: int
    score: float
    proxy: float
    nll: float
    by_task: Mapping[str, float]
    worst_task: float
    ratio: float
    ratio_low: float
    ratio_high: float
    measured: bool
    limit: float
    guard: float | None = None
    complete: bool = True
    looks: tuple[tuple[int, float, float], ...] = ()
    score_low: float | None = None
    score_high: float | None = None
    minus_dense: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    tokens: tuple[int, ...] = ()
    image_gflops: float | None = None
    cache_mib: float | None = None

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Of what a study keeps."""
        looks = tuple((num_samples, score, proxy) for num_samples, score, proxy in record["looks"])
        minus_dense = {name: (value, low, high) for name, (value, low, high) in record.get("minus_dense", {}).items()}
        told = {"looks": looks, "minus_dense": minus_dense, "tokens": tuple(record.get("tokens", ()))}
        return cls(**{**record, **told, "plan": Plan.from_dict(record["plan"])})

    def to_dict(self) -> dict[str, Any]:
        """What a study keeps of it, as plain data."""
        return {**asdict(self), "plan": self.plan.to_dict()}

    @property
    def over(self) -> float:
        """The one constraint, feasible at 0 and below: by what share the limit, or else the guard, is missed.

        The guard is for complete trials: the worst task of a few samples is mostly chance.
        """
        late = (self.ratio_high - self.limit) / self.limit
        if self.guard is None or not self.complete:
            return late
        return max(late, (self.guard - self.worst_task) / self.guard)

    @property
    def feasible(self) -> bool:
        return self.over <= 0

    @property
    def merit(self) -> float:
        """What is better when higher: the score, or without labels the nearness to dense."""
        return self.score if self.by_task else -self.proxy


def front(told: Iterable[Told]) -> list[Told]:
    """Trials that no other beats in both merit and latency, fastest first.

    Only trials that are feasible, measured, and scored on all samples are on it, or keep another off.
    """
    best: list[Told] = []
    finished = (t for t in told if t.feasible and t.complete and t.measured)
    for trial in sorted(finished, key=lambda t: (t.ratio, -t.merit)):
        if not best or trial.merit > best[-1].merit:
            best.append(trial)
    return best


def rivals(told: Iterable[Told], ratio: float) -> list[Told]:
    """The front members that a trial of this latency ratio has to beat: those that are no slower."""
    return [member for member in front(told) if member.ratio <= ratio]


Objective = Literal["proxy", "score"]


@dataclass(frozen=True, slots=True)
class Steering:
    """Which objective the search minimises, and why. correlation: None where it could not be found.

    shifts: by number of samples, what the complete trials' losses came to in the end, less what they were there. The
    first samples may be easier than all of them; without it, a trial that was stopped there would look better than it
    is.
    """

    by: Objective
    correlation: float | None
    reason: str
    shifts: Mapping[int, float] = field(default_factory=dict)

    def loss(self, told: Told) -> float:
        """What the sampler minimises: log KL, which spreads good plans as wide as bad ones, or one minus the score."""
        shift = 0.0 if told.complete else self.shifts.get(told.num_samples, 0.0)
        return _loss(self.by, told.score, told.proxy) + shift


def _loss(by: Objective, score: float, proxy: float) -> float:
    return math.log(max(proxy, LEAST_KL)) if by == "proxy" else 1 - score


def _shifts(by: Objective, told: Iterable[Told]) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for t in told:
        for num_samples, score, proxy in t.looks if t.complete else ():
            shift = _loss(by, t.score, t.proxy) - _loss(by, score, proxy)
            found.setdefault(num_samples, []).append(shift)
    return {num_samples: median(shifts) for num_samples, shifts in found.items()}


def steering(told: Sequence[Told], threshold: float = MIN_CORRELATION) -> Steering:
    """The proxy, as long as the task score does not contradict it.

    The proxy varies less from sample to sample and needs no labels, so it steers from the start; once enough trials
    have both on all samples, it must rank them as the score does (Spearman), or else the score takes over. Worked out
    anew from all trials, so that a resumed study steers as an unbroken one.
    """
    by, correlation, reason = _chosen(told, threshold)
    return Steering(by, correlation, reason, _shifts(by, told))


def _chosen(told: Sequence[Told], threshold: float) -> tuple[Objective, float | None, str]:
    labelled = [t for t in told if t.complete and t.by_task]
    if not labelled and any(t.complete for t in told):
        return ("proxy", None, "the samples have no labels, so the KL divergence to dense steers")
    if len(labelled) < MIN_TRIALS_TO_TRUST:
        reason = f"{len(labelled)} complete trials are too few to doubt the KL divergence to dense, so it steers"
        return ("proxy", None, f"{reason}; from {MIN_TRIALS_TO_TRUST} on its ranks are held against the score's")
    if len({t.score for t in labelled}) == 1:
        return ("proxy", None, f"all {len(labelled)} complete trials score alike, so the KL divergence steers")
    if len({t.proxy for t in labelled}) == 1:
        return ("score", None, f"all {len(labelled)} complete trials are as near to dense, so the score steers")
    found = float(stats.spearmanr([-t.proxy for t in labelled], [t.score for t in labelled]).statistic)
    figures = f"over {len(labelled)} complete trials nearness to dense and score correlate at {found:.2f} by rank"
    if found >= threshold:
        return ("proxy", found, f"{figures}, at least {threshold:g}, so the KL divergence to dense steers")
    return ("score", found, f"{figures}, below {threshold:g}, so the task score steers")
