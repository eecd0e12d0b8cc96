"""What replayed studies came to: hypervolume and best score against trials, and what racing did to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from autotune.objective import Told, front, steering
from benchmarks.replay import Errors, saved
from benchmarks.tabular import hypervolume

__all__ = ["WITHIN", "Scale", "Sizes", "best_scores", "of_errors", "of_runs", "trials_to"]

WITHIN = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """How much is replayed. long: trials of random search; trials: of everything else. checkpoints: reported after."""

    seeds: int
    trials: int
    long: int
    checkpoints: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scale:
    """The space's best front, and its worst score: what hypervolumes are shares of."""

    reference: tuple[float, float]
    best: float

    @classmethod
    def of(cls, told: Sequence[Told]) -> Scale:
        reference = (min(t.score for t in told), 1.0)
        return cls(reference, hypervolume(front(told), reference))

    def volume(self, told: Iterable[Told]) -> float:
        return hypervolume(front(told), self.reference)

    def curve(self, told: Sequence[Told]) -> list[float]:
        """Share of the best hypervolume after each trial."""
        return [self.volume(told[:num]) / self.best for num in range(1, len(told) + 1)]


def best_scores(told: Sequence[Told]) -> list[float]:
    """The best feasible, complete score after each trial; 0 before there is one."""
    found, best = [], 0.0
    for t in told:
        best = max(best, t.score) if t.feasible and t.complete else best
        found.append(best)
    return found


def trials_to(curve: Sequence[float], target: float) -> int | None:
    """Trials until a curve is at the target; None where it never is."""
    return next((number for number, share in enumerate(curve, start=1) if share >= target), None)


def of_runs(runs: Sequence[Sequence[Told]], scale: Scale, target: float, sizes: Sizes) -> dict[str, Any]:
    """What the seeds of one searcher came to. Curves are means over the seeds."""
    curves = [scale.curve(told) for told in runs]
    scores = [best_scores(told) for told in runs]
    reached = [trials_to(curve, target) for curve in curves]
    return {
        "hypervolume": [fmean(values) for values in zip(*curves, strict=True)],
        "best_score": [fmean(values) for values in zip(*scores, strict=True)],
        "hypervolume_by_seed": {num: [curve[num - 1] for curve in curves] for num in sizes.checkpoints},
        "best_score_by_seed": {num: [values[num - 1] for values in scores] for num in sizes.checkpoints},
        "trials_to_target": reached,
        "within": sum(number is not None and number <= WITHIN for number in reached),
        "distinct_plans": fmean(len({t.plan for t in told[: sizes.trials]}) / sizes.trials for told in runs),
        "correlation": {num: [steering(told[:num]).correlation for told in runs] for num in sizes.checkpoints},
        "steered_by_proxy": {
            num: fmean(steering(told[:num]).by == "proxy" for told in runs) for num in sizes.checkpoints
        },
    }


def of_errors(found: Sequence[Errors], scale: Scale) -> dict[str, Any]:
    """Racing over again what was run to the end."""
    return {
        "num_plans": sum(len(e.full) for e in found),
        "stopped": sum(e.stopped for e in found),
        "wrong": sum(e.wrong for e in found),
        "saved": fmean(saved(e.raced, e.full[0].num_samples) for e in found),
        "fronts": len(found),
        "fronts_changed": sum(not e.same_front for e in found),
        "hypervolume_lost": [(scale.volume(e.full) - scale.volume(e.raced)) / scale.best for e in found],
    }
