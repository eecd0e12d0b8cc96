"""One study, as its page shows it: how far it is, who works on it, what went wrong, what it cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

from autotune.pages.figures import percent
from autotune.pages.studies import model_of
from autotune.pages.study_trials import BEST, Trial, trial_row

if TYPE_CHECKING:
    from autotune.objective import Told
    from autotune.store.progress import Attempt, Standing

__all__ = ["Cost", "Failure", "Holder", "Live", "cost", "dense_facts", "live", "settings"]

WORDS = {
    "expired": "gave no sign of life; tried again",
    "released": "handed back; tried again",
    "failed": "failed for good",
}
SETTINGS = {
    "name": "registered as",
    "model": "model",
    "limit": "limit",
    "guard": "guard",
    "sampler": "sampler",
    "seed": "seed",
    "num_trials": "trials",
    "margin": "margin",
    "num_finalists": "finalists",
    "repeats": "pairs of a measurement",
    "device": "torch device",
    "threads": "threads",
    "learn": "learns a plan",
}
"""Those that mean something elsewhere than on the host that the study was started on."""
FITS = {
    "name": "device",
    "dtype": "dtype",
    "attention": "attention kernel",
    "batch_size": "batch",
    "prompt_tokens": "prompt tokens",
    "image_tokens": "image tokens",
    "torch": "torch",
    "transformers": "transformers",
    "driver": "driver",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """A worker. title, number: of the trial that it holds now. Times in seconds. left: until its lease runs out.

    since: since it told its trial before, which is about when it began this one.
    """

    name: str
    num_told: int
    number: int | None = None
    title: str = ""
    since: float | None = None
    silent: float | None = None
    left: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An attempt that came to nothing."""

    number: int
    title: str
    attempt: int
    what: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the search took. saved: share of the answers that racing did not ask for, plans tried twice counted once.

    wall_s: from the first told trial to the last; per_trial_s: the median gap between two, so that a pause does not
    count; left_s: what the rest takes at that rate.
    """

    num_answers: int
    saved: float
    num_stopped: int
    num_tried: int
    wall_s: float
    per_trial_s: float | None
    left_s: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """What changes while one looks."""

    standing: Standing
    best: Trial | None
    holders: tuple[Holder, ...]
    failures: tuple[Failure, ...]
    cost: Cost
    front: tuple[int, ...]

    @property
    def num_done(self) -> int:
        return self.standing.num_told + self.standing.num_failed


def live(standing: Standing, told: Sequence[Told], front: Sequence[Told], attempts: Sequence[Attempt]) -> Live:
    best = max((t for t in told if t.complete and t.feasible), key=lambda t: t.merit, default=None)
    return Live(
        standing=standing,
        best=None if best is None else trial_row(best, BEST),
        holders=tuple(_holders(attempts, standing.now)),
        failures=tuple(_failures(attempts)),
        cost=cost(standing, told, attempts),
        front=tuple(t.number for t in front),
    )


def cost(standing: Standing, told: Sequence[Told], attempts: Sequence[Attempt]) -> Cost:
    tried = {t.plan: t for t in told}.values()
    full = max((t.num_samples for t in tried), default=0) * len(tried)
    times = sorted(each.told for each in attempts if each.told is not None)
    wall_s = times[-1] - times[0] if times else 0.0
    per_trial_s = median(after - before for before, after in pairwise(times)) if len(times) > 1 else None
    rest = max(0, standing.target - standing.num_told - standing.num_failed)
    going = standing.state == "running" and per_trial_s is not None
    return Cost(
        num_answers=sum(t.num_samples for t in tried),
        saved=1 - sum(t.num_samples for t in tried) / full if full else 0.0,
        num_stopped=sum(not t.complete for t in tried),
        num_tried=len(tried),
        wall_s=wall_s,
        per_trial_s=per_trial_s,
        left_s=rest * per_trial_s if going and per_trial_s is not None else None,
    )


def settings(kept: Mapping[str, Any], fits: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the study was asked with, and what it is about, in words."""
    asked = {**kept, "model": model_of(kept)}
    found = [(words, asked.get(name)) for name, words in SETTINGS.items()]
    found += [(words, fits.get(name)) for name, words in FITS.items()]
    return [(words, _said(value)) for words, value in found if value not in (None, "")]


def _said(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _holders(attempts: Sequence[Attempt], now: float) -> list[Holder]:
    """Who holds a trial first, then by how many they told."""
    told = [(each.worker, each.told) for each in attempts if each.worker and each.told is not None]
    num_told, last = Counter(worker for worker, _ in told), dict(told)
    held = [(each.worker, each) for each in attempts if each.worker and each.state == "held"]
    busy = [
        Holder(
            name=_short(worker),
            num_told=num_told[worker],
            number=each.number,
            title=each.title,
            since=now - last[worker] if worker in last else None,
            silent=each.silent,
            left=each.left,
        )
        for worker, each in held
    ]
    others = [(worker, num) for worker, num in num_told.most_common() if worker not in dict(held)]
    return busy + [Holder(name=_short(worker), num_told=num) for worker, num in others]


def _short(worker: str) -> str:
    """Host and process of `store.this_worker`."""
    parts = worker.split("/")
    return f"{parts[0]}, process {parts[-2]}" if len(parts) > 2 else worker


def _failures(attempts: Sequence[Attempt]) -> list[Failure]:
    """Newest first."""
    return [
        Failure(
            number=each.number,
            title=each.title,
            attempt=each.attempt + 1,
            what=WORDS[each.state],
            reason=each.reason or "",
        )
        for each in reversed(attempts)
        if each.state in WORDS
    ]


def dense_facts(dense: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What dense comes to, as far as it is known."""
    found = [("dense accuracy", percent(dense["score"]))] if "score" in dense else []
    units = {"ms": ("dense latency", "ms"), "gflops": ("image tokens", "GFLOPs"), "cache_mib": ("cache", "MiB")}
    return found + [(what, f"{dense[name]:.4g} {unit}") for name, (what, unit) in units.items() if name in dense]
