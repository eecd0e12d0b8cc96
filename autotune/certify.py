"""Paired bootstrap over pictures: how sure a difference between two plans is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from btp.intervals import Interval

__all__ = ["Interval", "ScoreTable"]


class ScoreTable:
    """Which picture and task each sample has; turns per-sample scores in [0, 1] into accuracies with intervals.

    Pictures are resampled whole: questions about one picture are not independent. Macro is the mean over the tasks.
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

    def _sums(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
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

    def worst_task(self, scores: Sequence[float], dense: Sequence[float]) -> tuple[str, Interval]:
        """The task that keeps least of its dense accuracy, of equals the least accurate; its accuracy with an interval.

        Tasks that dense gets all wrong have nothing to keep, and are passed over unless there are no others.
        """
        ours, theirs = self.by_task(scores), self.by_task(dense)
        able = [task for task in self.tasks if theirs[task] > 0] or list(self.tasks)
        worst = min(able, key=lambda task: (ours[task] / max(theirs[task], 1e-9), ours[task]))
        return worst, self._interval(self._sums(np.asarray(scores, float)), [self.tasks.index(worst)])

    def _interval(self, sums: NDArray[np.float64], tasks: slice | list[int]) -> Interval:
        asked = self._counts[:, tasks].sum(1) > 0  # pictures that say nothing of these tasks are not resampled
        sums, counts = sums[asked][:, tasks], self._counts[asked][:, tasks]

        def macro(rows: NDArray[np.int64], axis: int = -1) -> NDArray[np.float64]:
            top, bottom = sums[rows].sum(-2), counts[rows].sum(-2)
            # A resample that misses a rare task says nothing about it: its mean is over the tasks it has.
            return np.asarray((top / np.maximum(bottom, 1)).sum(-1) / (bottom > 0).sum(-1))

        rows = np.arange(len(sums))
        found = stats.bootstrap(
            (rows,), macro, n_resamples=self._num_resamples, method="percentile", rng=self._seed, batch=100
        )
        interval = found.confidence_interval
        return Interval(float(macro(rows)), float(interval.low), float(interval.high))
