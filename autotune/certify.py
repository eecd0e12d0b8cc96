"""Which of a few finalists may be called as good as dense, on held-out pictures, and how sure that is.

Shapes: P pictures, T tasks. A score is in [0, 1], one a sample; macro is the mean over the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from autotune.certificate import Certificate
from autotune.config import AutotuneError
from btp.intervals import Interval
from btp.plan import Plan

__all__ = [
    "DEFAULT_MARGIN",
    "MAX_FINALISTS",
    "Candidate",
    "Certificate",
    "Interval",
    "ScoreTable",
    "certify",
    "finalists",
    "holm",
]

MAX_FINALISTS = 8
"""Every finalist makes it harder for the others: the best of eight must be as sure as 1 in 160, not 1 in 20."""
DEFAULT_MARGIN = 0.02
"""Of macro accuracy: the least that about a thousand held-out questions can show, and less than the three points of GQA
that BTP's paper gives up at 128 tokens."""
LIKE = 0.01  # of the score: as good as the best, as far as a few hundred questions can tell
NEAR = 0.1  # of the score: three standard errors of a difference on a selection split of about a hundred questions


class ScoreTable:
    """Which picture and task each sample has; turns per-sample scores in [0, 1] into accuracies with intervals.

    Pictures are resampled whole: questions about one picture are not independent. Macro is the mean over the tasks.
    num_pictures: how many there are, or, where a task is asked of few, how many there would be were all tasks so rare
    and each had its own.
    """

    def __init__(
        self, image_ids: Sequence[str], tasks: Sequence[str], num_resamples: int = 1000, seed: int = 0
    ) -> None:
        self.tasks = tuple(dict.fromkeys(tasks))
        images = {image: row for row, image in enumerate(dict.fromkeys(image_ids))}
        self._image = np.array([images[image] for image in image_ids])
        self._task = np.array([self.tasks.index(task) for task in tasks])
        self._shape = (len(images), len(self.tasks))
        self._counts = self._sums(np.ones(len(image_ids)))
        self._num_resamples, self._seed = num_resamples, seed
        rarest = int((self._counts > 0).sum(0).min())
        self.num_pictures = min(len(images), rarest * len(self.tasks))

    def _sums(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        if scores.shape != self._image.shape:
            raise AutotuneError(
                f"every sample must have a score, got {scores.size} for {self._image.size}; score the whole split"
            )
        table = np.zeros(self._shape)
        np.add.at(table, (self._image, self._task), scores)
        return table

    def by_task(self, scores: Sequence[float]) -> dict[str, float]:
        means = self._sums(np.asarray(scores, float)).sum(0) / self._counts.sum(0)
        return dict(zip(self.tasks, means.tolist(), strict=True))

    def macro(self, scores: Sequence[float] | NDArray[np.float64]) -> Interval:
        return self._interval(self._sums(np.asarray(scores, float)), slice(None))

    def difference(self, scores: Sequence[float], reference: Sequence[float]) -> Interval:
        """Macro of `scores` minus macro of `reference`, paired by sample."""
        return self.macro(np.asarray(scores, float) - np.asarray(reference, float))

    def differences(self, scores: Sequence[float], reference: Sequence[float]) -> dict[str, Interval]:
        """As `difference`, under "macro", and of every task's mean under its name."""
        sums = self._sums(np.asarray(scores, float) - np.asarray(reference, float))
        by_task = {task: self._interval(sums, [index]) for index, task in enumerate(self.tasks)}
        return {"macro": self._interval(sums, slice(None)), **by_task}

    def worst_task(self, scores: Sequence[float], dense: Sequence[float]) -> tuple[str, Interval]:
        """The task that keeps least of its dense accuracy, of equals the least accurate; its accuracy with an interval.

        Tasks that dense gets all wrong have nothing to keep, and are passed over unless there are no others.
        """
        ours, theirs = self.by_task(scores), self.by_task(dense)
        able = [task for task in self.tasks if theirs[task] > 0] or list(self.tasks)
        worst = min(able, key=lambda task: (ours[task] / max(theirs[task], 1e-9), ours[task]))
        return worst, self._interval(self._sums(np.asarray(scores, float)), [self.tasks.index(worst)])

    def retention(self, task: str, scores: Sequence[float], dense: Sequence[float]) -> Interval:
        """The share of its dense accuracy that a task keeps, paired by picture; 1 where dense has nothing to keep."""
        column = self.tasks.index(task)
        asked = self._counts[:, column] > 0
        ours, theirs = (self._sums(np.asarray(one, float))[asked, column] for one in (scores, dense))

        def kept(rows: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
            top, bottom = ours[rows].sum(-1), theirs[rows].sum(-1)
            return np.where(bottom > 0, top / np.maximum(bottom, 1e-9), 1.0)

        return self._bootstrap(kept, int(asked.sum()))

    def non_inferiority(self, scores: Sequence[float], reference: Sequence[float], margin: float) -> float:
        """One-sided p of H0: macro of `scores` minus macro of `reference` is -margin or less; 1 where it is so here.

        Empirical likelihood (Owen, Empirical Likelihood, 2001, ch. 2) of the pictures' shares in the difference (Owen
        section 3.6 takes clusters so), its signed root held against Student's t: how far the pictures have to be
        reweighted until their mean is -margin. A t test or a shifted bootstrap takes its spread from the sample, and
        a sample with few losses has little: where losses are rare, that is where it matters, both err several times
        as often as they say. Where we differ: a loss as large as can be may have any weight without having been seen;
        half a picture more has the largest loss that was seen, as counts come in steps; and p is never less than the
        chance that a plan which loses `margin` by whole pictures loses none of `num_pictures`.
        """
        if not 0 < margin < 1:
            raise AutotuneError(f"margin must be in (0, 1), got {margin}; two points are 0.02")
        share_P = self._shares(np.asarray(scores, float) - np.asarray(reference, float))
        past_P = share_P + margin
        step = min(0.0, float(share_P.min())) + margin
        weight_P, past_P = np.append(np.ones(len(past_P)), 0.5 * (step < 0)), np.append(past_P, step)
        most = max(len(share_P) / self.num_pictures, -float(share_P.min())) - margin

        def slope(tilt: float) -> float:
            return float((weight_P * past_P / (1 + tilt * past_P)).sum())

        if slope(0.0) <= 0:
            return 1.0
        end = (1 - 1e-9) / most
        tilt = end if slope(end) >= 0 else optimize.brentq(slope, 0.0, end)
        root = math.sqrt(2 * float((weight_P * np.log1p(tilt * past_P)).sum()))
        return max(float(stats.t.sf(root, max(1, len(share_P) - 1))), (1 - margin) ** self.num_pictures)

    def _shares(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Each picture's share in the macro, of which the macro is the mean. (P)

        Macro is a mean of ratios; they are taken in their first order around what is found.
        """
        total, sums = self._counts.sum(0), self._sums(scores)
        means = sums.sum(0) / total
        share_PT = (sums - means * self._counts) * (len(sums) / (len(self.tasks) * total))
        return np.asarray(share_PT.sum(1) + means.mean())

    def _interval(self, sums: NDArray[np.float64], tasks: slice | list[int]) -> Interval:
        asked = self._counts[:, tasks].sum(1) > 0  # pictures that say nothing of these tasks are not resampled
        sums, counts = sums[asked][:, tasks], self._counts[asked][:, tasks]

        def macro(rows: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
            top, bottom = sums[rows].sum(-2), counts[rows].sum(-2)
            # A resample that misses a rare task says nothing about it: its mean is over the tasks it has.
            return np.asarray((top / np.maximum(bottom, 1)).sum(-1) / (bottom > 0).sum(-1))

        return self._bootstrap(macro, len(sums))

    def _bootstrap(self, statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]], num_rows: int) -> Interval:
        rows = np.arange(num_rows)
        found = stats.bootstrap(
            (rows,), statistic, n_resamples=self._num_resamples, method="percentile", rng=self._seed, batch=100
        ).confidence_interval
        return Interval(float(statistic(rows)), float(found.low), float(found.high))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values: calling those up to alpha errs at all, in any of them, with a chance of at most alpha.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, 1979; whatever the tests have to do with each other.
    """
    adjusted: dict[str, float] = {}
    reached = 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        reached = max(reached, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = reached
    return {name: adjusted[name] for name in p_values}


class Candidate(Protocol):
    """A trial: score and KL divergence to dense on the selection split, and its measured latency ratio to dense."""

    @property
    def name(self) -> str: ...
    @property
    def plan(self) -> Plan: ...
    @property
    def score(self) -> float: ...
    @property
    def proxy(self) -> float: ...
    @property
    def ratio(self) -> float: ...
    @property
    def feasible(self) -> bool: ...


_Candidate = TypeVar("_Candidate", bound=Candidate)


def finalists(told: Iterable[_Candidate], limit: float, num: int = MAX_FINALISTS) -> list[_Candidate]:
    """At most `num` trials with plans of their own, best first: the front's before any that is beaten.

    Best are those within `LIKE` of the best score, nearest to dense first; then by score. The KL divergence varies less
    from question to question. In 400 replays, each choosing among 24 good plans by 144 questions, that found plans 0.5
    points better on the other 144 than the best score did; with 10 finished studies, 0.1 better on fresh questions.

    told: leave out what must not win, such as controls. limit: ratio; feasible trials within it are looked at. Those
    more than `NEAR` below the best score are none: they will not be within a margin of dense, and cost the others.
    """
    able = [t for t in told if t.feasible and t.ratio <= limit]
    best = max((t.score for t in able), default=0.0)

    def place(trial: Candidate) -> tuple[bool, float, float, float]:
        other = trial.score < best - LIKE
        return other, 0.0 if other else trial.proxy, -trial.score, trial.ratio

    ranked = sorted(able, key=place)
    distinct: dict[Plan, _Candidate] = {}
    for trial in ranked:
        distinct.setdefault(trial.plan, trial)
    near = [t for t in distinct.values() if t.score >= best - NEAR]
    fastest_before = accumulate((t.ratio for t in near), min, initial=math.inf)
    beaten = [t.ratio >= fastest for t, fastest in zip(near, fastest_before, strict=False)]
    chosen = sorted(range(len(near)), key=lambda index: beaten[index])[:num]
    return [near[index] for index in sorted(chosen)]


def certify(
    finalists: Mapping[str, Sequence[float]],
    dense_scores: Sequence[float],
    table: ScoreTable,
    latency: Mapping[str, Interval],
    limit: float,
    margin: float = DEFAULT_MARGIN,
    alpha: float = 0.05,
    guard: float | None = None,
) -> dict[str, Certificate]:
    """A certificate for each of at most `MAX_FINALISTS` finalists, in their order.

    finalists: held-out scores, one a sample, as `dense_scores`. latency: ratio to dense in a fresh process; a finalist
    that is not there is not certified, so that only those that are `as_good` need be measured. limit: ratio, for the
    upper bound. guard: least retention of the worst task, held against what is measured, as in the search: the least
    of several retentions errs low by itself. Take the first that is certified in the order that the search gave them;
    to take the one that did best here would be to choose by the held-out pictures.
    Raises AutotuneError for too many finalists, scores that do not fit the table, or numbers out of range.
    """
    if len(finalists) > MAX_FINALISTS:
        raise AutotuneError(f"at most {MAX_FINALISTS} finalists can be certified, got {len(finalists)}; leave some out")
    if not 0 < alpha < 1:
        raise AutotuneError(f"alpha must be in (0, 1), got {alpha}; one error in twenty is 0.05")
    p_values = {name: table.non_inferiority(scores, dense_scores, margin) for name, scores in finalists.items()}
    adjusted = holm(p_values)
    found = {}
    for name, scores in finalists.items():
        worst_task, _ = table.worst_task(scores, dense_scores)
        found[name] = Certificate(
            name=name,
            macro=table.macro(scores),
            minus_dense=table.difference(scores, dense_scores),
            p=p_values[name],
            adjusted_p=adjusted[name],
            alpha=alpha,
            margin=margin,
            num_finalists=len(finalists),
            num_pictures=table.num_pictures,
            worst_task=worst_task,
            retention=table.retention(worst_task, scores, dense_scores),
            guard=guard,
            latency=latency.get(name),
            limit=limit,
        )
    return found
