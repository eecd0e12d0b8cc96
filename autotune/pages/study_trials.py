"""The trials of one study, as its page lists them, and what the proxy and the score say of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autotune.pages.figures import Axis, Range, axis
from autotune.pages.standing import TrialStanding, standing_of

if TYPE_CHECKING:
    from autotune.objective import Told

__all__ = ["BEST", "Picture", "Trial", "picture", "trial_row", "trials"]

BEST = "on the front"
WORDS: dict[TrialStanding, str] = {
    "stopped": "stopped early",
    "over": "over the limit",
    "below": "below the guard",
    "uncertain": "perhaps over the limit",
    "within": "feasible",
}
WIDTH, HEIGHT, LEFT, BELOW = 360.0, 220.0, 44.0, 26.0  # of the picture, and of the room for its ticks


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A row. standing: what it is to the study, in a word or two. score, worst_task: None without labels."""

    number: int
    name: str
    score: Range | None
    worst_task: float | None
    ratio: Range
    proxy: float
    num_samples: int
    standing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """Nearness to dense against score: a path of dots between two axes. num: of trials."""

    dots: str
    x: Axis
    y: Axis
    num: int


def trials(told: Sequence[Told], front: Sequence[Told]) -> list[Trial]:
    best = {t.number for t in front}
    return [trial_row(t, BEST if t.number in best else _standing(t)) for t in told]


def trial_row(told: Told, standing: str) -> Trial:
    has_labels = bool(told.by_task)
    return Trial(
        number=told.number,
        name=told.name,
        score=Range(told.score, told.score_low, told.score_high) if has_labels else None,
        worst_task=told.worst_task if has_labels and told.complete else None,
        ratio=Range(told.ratio, told.ratio_low, told.ratio_high),
        proxy=told.proxy,
        num_samples=told.num_samples,
        standing=standing,
    )


def picture(told: Sequence[Told]) -> Picture | None:
    """Of the complete trials with labels; None where they are too few to see anything in."""
    points = [(-t.proxy, 100 * t.score) for t in told if t.complete and t.by_task]
    if len({x for x, _ in points}) < 2 or len({y for _, y in points}) < 2:
        return None
    x = axis((each for each, _ in points), LEFT, WIDTH - 4)
    y = axis((each for _, each in points), HEIGHT - BELOW, 6)
    return Picture(dots="".join(f"M{x.at(a)} {y.at(b)}h0" for a, b in points), x=x, y=y, num=len(points))


def _standing(told: Told) -> str:
    """What keeps a trial off the front, if it is not that others are better."""
    found = standing_of(told)
    return "not measured" if found == "uncertain" and told.feasible else WORDS[found]
