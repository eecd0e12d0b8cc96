"""What a plan comes to: look by look on `select`, raced against the front, and measured on the device.

At every look a trial stops where racing says that it will not enter the front at its latency. That is the modelled
latency at the first look, less what the model may err; whoever is left is measured then, and stops there if it is
surely over the limit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from autotune.bench import Bench
from autotune.certify import Interval
from autotune.evaluation import Scores
from autotune.latency_model import LatencyModel
from autotune.objective import Told, rivals
from autotune.racing import ERROR_RATE, Race
from autotune.study import Study
from btp.plan import Plan

__all__ = ["DENSE", "Scoring", "dense_of"]

DENSE = Plan(stages=())


def dense_of(bench: Bench) -> dict[str, Any]:
    """What dense comes to on `select`: its score with an interval, by task, image GFLOPs and MiB of cache."""
    dense, table = bench.scores(DENSE, "select"), bench.table("select")
    macro = table.macro(dense.scores)
    gflops, cache_mib = bench.cost_of(dense.commonest)
    bounds = {"score": macro.value, "score_low": macro.low, "score_high": macro.high}
    return {**bounds, "by_task": table.by_task(dense.scores), "gflops": gflops, "cache_mib": cache_mib}


@dataclass(frozen=True)
class Scoring:
    """Of one study. limit: latency ratio to dense. guard: the least retention of the worst task; None for any."""

    _bench: Bench
    _study: Study
    _latency: LatencyModel
    _limit: float
    _guard: float | None

    @cached_property
    def _race(self) -> Race:
        # Half the error before a trial is measured and half after it, for its rivals are others then.
        return Race([e.task for e in self._bench.splits["select"]], ERROR_RATE / 2)

    def __call__(self, number: int, name: str, plan: Plan) -> Told:
        """Score the plan look by look, and measure it if the first look does not end it."""
        modelled = self._latency.ratio(plan)
        ratio, measured = Interval(modelled, modelled, modelled), False
        fastest = modelled * (1 - self._latency.error.worst)
        looks: list[tuple[int, float, float]] = []
        for scores in self._bench.running_scores(plan, "select"):
            told = self._told(number, name, plan, scores)
            looks.append((told.num_samples, told.score, told.proxy))
            surely_beaten = self._is_dominated(scores, fastest)
            if not measured and (told.complete or not surely_beaten):
                ratio, measured = self._bench.ratio(plan)[0], True
                fastest = ratio.value
            told = replace(
                told,
                looks=tuple(looks),
                measured=measured,
                ratio=ratio.value,
                ratio_low=ratio.low,
                ratio_high=ratio.high,
            )
            if surely_beaten or ratio.low > self._limit:
                break
        return self._with_papers(told, scores)

    def _with_papers(self, told: Told, scores: Scores) -> Told:
        """With what the search does not ask for and its readers do: intervals, and what the plan leaves to compute."""
        tokens = scores.commonest
        gflops, cache_mib = self._bench.cost_of(tokens)
        told = replace(told, tokens=tokens, image_gflops=gflops, cache_mib=cache_mib)
        if not told.complete:
            return told
        table, dense = self._bench.table("select"), self._bench.scores(DENSE, "select").scores
        macro, minus = table.macro(scores.scores), table.differences(scores.scores, dense)
        bounds = {name: (each.value, each.low, each.high) for name, each in minus.items()}
        return replace(told, score_low=macro.low, score_high=macro.high, minus_dense=bounds)

    def _is_dominated(self, scores: Scores, ratio: float) -> bool:
        members = [self._bench.scores(t.plan, "select").scores for t in rivals(self._study.told(), ratio)]
        return self._race.is_dominated(scores.scores, members)

    def _told(self, number: int, name: str, plan: Plan, scores: Scores) -> Told:
        """What the samples so far say; nothing of latency yet."""
        num_samples = len(scores.scores)
        by_task = self._by_task(scores.scores)
        dense = self._by_task(self._bench.scores(DENSE, "select").scores[:num_samples])
        kept = [by_task[task] / dense[task] for task in by_task if dense[task] > 0]
        return Told(
            number=number,
            name=name,
            plan=plan,
            num_samples=num_samples,
            score=sum(by_task.values()) / len(by_task),
            proxy=float(np.mean(scores.kl)),
            nll=float(np.mean(scores.nll)),
            by_task=by_task,
            worst_task=min(kept, default=1.0),
            ratio=math.nan,
            ratio_low=math.nan,
            ratio_high=math.nan,
            measured=False,
            limit=self._limit,
            guard=self._guard,
            complete=num_samples == self._bench.looks[-1],
        )

    def _by_task(self, scores: Sequence[float]) -> dict[str, float]:
        """Means of the tasks over the first samples."""
        found: dict[str, list[float]] = {}
        for example, score in zip(self._bench.splits["select"], scores, strict=False):
            found.setdefault(example.task, []).append(score)
        return {task: float(np.mean(values)) for task, values in sorted(found.items())}
