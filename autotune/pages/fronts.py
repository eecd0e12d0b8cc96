"""Studies as a comparison draws them: points on two axes, fronts, and what a front is worth.

`static/fronts.js` does the same in the browser, for what changes there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any, Literal, get_args

import moocore
import numpy as np
from numpy.typing import NDArray

from autotune.objective import Told
from autotune.pages.figures import Range
from autotune.pages.standing import TrialStanding, standing_of
from autotune.report import FIXED
from autotune.store import StudyRow
from btp.presets import SYSTEMS

__all__ = [
    "PUBLISHED",
    "STATUSES",
    "Axes",
    "Dense",
    "Place",
    "Point",
    "Status",
    "StudySeries",
    "X",
    "Y",
    "coordinates",
    "front",
    "hypervolume",
    "places",
]

X = Literal["latency", "ms", "gflops", "cache"]
Y = Literal["accuracy", "retention", "worst"]
Status = Literal["within", "uncertain", "infeasible", "stopped"]
STATUSES: tuple[Status, ...] = get_args(Status)
DRAWN_AS: dict[TrialStanding, Status] = {
    "stopped": "stopped",
    "over": "infeasible",
    "below": "infeasible",
    "uncertain": "uncertain",
    "within": "within",
}
PUBLISHED = {*FIXED, *(f"{system.name} at limit" for system in SYSTEMS.values())}
"""Names of trials that nobody drew: the hand-set plans, the controls, and what was published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """The model without pruning, as far as a study tells. ms: its latency, at the study's metric and quantile."""

    by_task: Mapping[str, float] = field(default_factory=dict)
    ms: float | None = None
    gflops: float | None = None
    cache_mib: float | None = None


@dataclass(frozen=True, slots=True)
class Point:
    """A finished trial, and how much of it is to be believed.

    status: as of `standing_of`, with what is over the limit or below the guard as one.
    """

    told: Told
    status: Status

    @classmethod
    def of(cls, told: Told) -> Point:
        return cls(told, DRAWN_AS[standing_of(told)])

    @property
    def is_published(self) -> bool:
        return self.told.name in PUBLISHED


@dataclass(frozen=True, kw_only=True, eq=False)
class StudySeries:
    """A study. limit: as it was asked for; limit_ratio: to dense, None before there are trials.

    question: equal for studies that differ in seed alone, empty where a study does not tell enough. target: how many
    trials it is to have.
    """

    name: str
    model: str
    device: str
    limit: str
    limit_ratio: float | None
    seed: int | None
    question: str
    target: int
    dense: Dense
    points: tuple[Point, ...]

    @classmethod
    def of(cls, row: StudyRow, told: Iterable[Told]) -> StudySeries:
        points = tuple(Point.of(each) for each in told)
        fits = row.context.get("fits", {})
        model = str(row.settings.get("model", ""))
        return cls(
            name=row.name,
            model=str(row.settings.get("name") or model.rstrip("/").rpartition("/")[2]),
            device=str(fits.get("name") or row.settings.get("device") or ""),
            limit=str(row.settings.get("limit", "")),
            limit_ratio=points[0].told.limit if points else None,
            seed=row.settings.get("seed"),
            question=_question(row),
            target=row.target,
            dense=_dense(row.context.get("dense", {}), points),
            points=points,
        )

    @property
    def kind(self) -> tuple[str, str, str]:
        """Model, device and limit."""
        return self.model, self.device, self.limit

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(sorted({task for point in self.points for task in point.told.by_task}))


def _question(row: StudyRow) -> str:
    fits, settings = row.context.get("fits"), {name: value for name, value in row.settings.items() if name != "seed"}
    return json.dumps([settings, fits], sort_keys=True) if settings and fits else ""


def _dense(told: Mapping[str, Any], points: Sequence[Point]) -> Dense:
    by_task = dict(told.get("by_task", {}))
    paired = next((p.told for p in points if p.told.complete and p.told.minus_dense), None)
    if not by_task and paired is not None:
        by_task = {task: score - paired.minus_dense[task][0] for task, score in paired.by_task.items()}
    return Dense(by_task=by_task, **{name: told.get(name) for name in ("ms", "gflops", "cache_mib")})


@dataclass(frozen=True, slots=True)
class Place:
    """Where a point lies on two axes."""

    point: Point
    x: Range
    y: Range


@dataclass(frozen=True, slots=True)
class Axes:
    """What is drawn over what.

    x: latency as a ratio to dense or in ms, GFLOPs or cache of the image tokens. y: macro accuracy, what of dense's is
    retained, or by the worst task. tasks: that y is of; all where it is empty.
    """

    x: X = "latency"
    y: Y = "accuracy"
    tasks: frozenset[str] = frozenset()

    def place(self, study: StudySeries, point: Point) -> Place | None:
        """None where the study does not tell what is to be drawn."""
        x, y = self._x(study.dense, point.told), self._y(study, point.told)
        return None if x is None or y is None else Place(point, x, y)

    def dense(self, study: StudySeries) -> tuple[float, float] | None:
        """Where dense lies."""
        x, chosen = self.unit(study.dense), self._of(study, dict.fromkeys(study.tasks, 1.0))
        if x is None or not chosen:
            return None
        if self.y != "accuracy":
            return x, 1.0
        scores = self._of(study, study.dense.by_task)
        return (x, fmean(scores.values())) if scores.keys() == chosen.keys() else None

    def unit(self, dense: Dense) -> float | None:
        """Dense's x."""
        return {"latency": 1.0, "ms": dense.ms, "gflops": dense.gflops, "cache": dense.cache_mib}[self.x]

    def _x(self, dense: Dense, told: Told) -> Range | None:
        if self.x in ("gflops", "cache"):
            value = told.image_gflops if self.x == "gflops" else told.cache_mib
            return None if value is None else Range(value)
        unit = self.unit(dense)
        if unit is None or not math.isfinite(told.ratio):
            return None
        return Range(told.ratio, told.ratio_low, told.ratio_high).times(unit)

    def _y(self, study: StudySeries, told: Told) -> Range | None:
        scores, dense = self._of(study, told.by_task), self._of(study, study.dense.by_task)
        is_whole = set(scores) == set(study.tasks)
        if not scores:
            return None
        if self.y == "accuracy":
            whole = Range(told.score, told.score_low, told.score_high)
            return whole if is_whole else Range(fmean(scores.values()))
        if self.y == "worst" and is_whole:
            return Range(told.worst_task)
        if not set(scores) <= set(dense):
            return None
        if self.y == "worst":
            return Range(min((scores[task] / dense[task] for task in scores if dense[task] > 0), default=1.0))
        return _retention(told, scores, fmean(dense[task] for task in scores), is_whole)

    def _of(self, study: StudySeries, by_task: Mapping[str, float]) -> dict[str, float]:
        """Of the chosen tasks, those that the study has."""
        chosen = self.tasks & set(study.tasks) if self.tasks else set(study.tasks)
        return {task: by_task[task] for task in sorted(chosen) if task in by_task}


def _retention(told: Told, scores: Mapping[str, float], dense: float, is_whole: bool) -> Range | None:
    if dense <= 0:
        return None
    if is_whole and told.complete and (minus := told.minus_dense.get("macro")) is not None:
        value, low, high = (1 + part / dense for part in minus)
        return Range(value, low, high)
    return Range(fmean(scores.values()) / dense)


def places(study: StudySeries, axes: Axes) -> list[Place]:
    """Of every point that has one."""
    return [place for point in study.points if (place := axes.place(study, point)) is not None]


def front(found: Iterable[Place]) -> list[Place]:
    """Those within the limit that no other one beats in both x and y, by x; of equals the first."""
    able = [place for place in found if place.point.status == "within"]
    if not able:
        return []
    best = moocore.is_nondominated(coordinates(able), maximise=[False, True], keep_weakly=False)
    return sorted((place for place, is_best in zip(able, best, strict=True) if is_best), key=lambda p: p.x.value)


def hypervolume(members: Sequence[Place], unit: float) -> float:
    """The area between a front and the reference point x = 1, y = 0, with x as a share of dense's, which is `unit`."""
    if not members:
        return 0.0
    shares = coordinates(members) / (unit, 1.0)
    return float(moocore.hypervolume(shares, ref=[1.0, 0.0], maximise=[False, True]))


def coordinates(found: Sequence[Place]) -> NDArray[np.float64]:
    """x and y, a row a place."""
    return np.array([(place.x.value, place.y.value) for place in found], dtype=np.float64)
