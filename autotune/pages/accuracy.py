"""What plans score on each task beside dense: numbers, and dots with whiskers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotune.pages.figures import Axis, Range, axis

if TYPE_CHECKING:
    from autotune.objective import Told

__all__ = ["Accuracy", "Mark", "TaskLine", "accuracy_of"]

MACRO = "macro"
WIDTH, LEFT, RIGHT, TOP, ROW, SIDE, BOTTOM = 460, 104, 14, 10, 18, 14, 38


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A plan on a task. minus_dense: paired, None where dense's is not known. y: of its dot, whose x is the scale's."""

    score: float
    minus_dense: Range | None
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskLine:
    """A task, or the mean over all. marks: a plan each; None where it has no score of it. y: of the name."""

    task: str
    dense: float | None
    marks: tuple[Mark | None, ...]
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """scale: of differences to dense, None where none is known and nothing can be drawn."""

    lines: tuple[TaskLine, ...]
    scale: Axis | None
    height: int
    width: int = WIDTH
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


def accuracy_of(told: Sequence[Told], dense: Mapping[str, float]) -> Accuracy:
    """Of the plans beside dense's accuracies, by task and under "macro"."""
    scored = [{**trial.by_task, **({MACRO: trial.score} if trial.by_task else {})} for trial in told]
    tasks = [*sorted({task for each in scored for task in each} - {MACRO}), *([MACRO] if any(scored) else [])]
    lines, y = [], float(TOP)
    for task in tasks:
        room = ROW + SIDE * len(told)
        marks = [
            _mark(trial, task, scores.get(task), dense.get(task), y + ROW / 2 + SIDE * (place + 0.5))
            for place, (trial, scores) in enumerate(zip(told, scored, strict=True))
        ]
        lines.append(TaskLine(task=task, dense=dense.get(task), marks=tuple(marks), y=y + room / 2 + 4))
        y += room
    differences = [mark.minus_dense for line in lines for mark in line.marks if mark and mark.minus_dense]
    ends = [end for each in differences for end in (*each.ends, each.value)]
    scale = axis([0.0, *ends], LEFT, WIDTH - RIGHT) if differences else None
    return Accuracy(lines=tuple(lines), scale=scale, height=round(y) + BOTTOM)


def _mark(trial: Told, task: str, score: float | None, dense: float | None, y: float) -> Mark | None:
    """A trial that was stopped has answered other samples than dense has, so it is held against nothing."""
    if score is None:
        return None
    if task in trial.minus_dense:
        return Mark(score=score, minus_dense=Range(*trial.minus_dense[task]), y=y)
    known = dense is not None and trial.complete
    return Mark(score=score, minus_dense=Range(score - dense) if known and dense is not None else None, y=y)
