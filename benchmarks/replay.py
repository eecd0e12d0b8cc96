"""A study's loop on the recorded table: suggest, look the plan up, race it, learn from it. No model, no database."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from autotune.objective import Told, front, rivals
from autotune.racing import Race
from autotune.ranges import Draw
from autotune.study import next_draw
from benchmarks.grid import Grid
from benchmarks.tabular import Table

__all__ = ["Errors", "Searcher", "errors_of_racing", "replay", "saved"]


@dataclass(frozen=True, slots=True)
class Searcher:
    """A sampler, whether it minimises the ratio beside the loss, and whether the published systems are tried first."""

    sampler: str
    whole_front: bool = False
    published_first: bool = False

    def __str__(self) -> str:
        front, first = ", whole front" * self.whole_front, ", published first" * self.published_first
        return f"{self.sampler}{front}{first}"


def replay(table: Table, grid: Grid, searcher: Searcher, seed: int, num_trials: int, *, racing: bool) -> list[Told]:
    """The trials of one study, oldest first.

    Those that are tried first are not draws: no sampler learns from them. A sampler that learns is asked anew for what
    was tried, as a study asks; what it insists on is told again, and costs nothing. Random search is plain: on so few
    plans it would be an exhaustive one without its repeats.
    """
    told: list[Told] = []
    first: dict[int, Told] = {}

    def tried(draw: Draw) -> Told | None:
        return None if searcher.sampler == "random" else first.get(table.number(grid.cell(draw)))

    fixed = table.first if searcher.published_first else ()
    for number in range(num_trials):
        draw = None
        if number >= len(fixed):
            draw = next_draw(searcher.sampler, grid.ranges, told, seed, tried, whole_front=searcher.whole_front)
        plan = fixed[number] if draw is None else table.number(grid.cell(draw))
        if plan not in first:
            first[plan] = _raced(table, plan, told) if racing else table.told(plan)
        told.append(replace(first[plan], number=number, draw=draw))
    return told


@dataclass(frozen=True, slots=True)
class Errors:
    """What racing does to plans that were all run to the end, in the order in which they were first tried.

    full, raced: their trials without racing, and with it. wrong: those stopped that would have beaten the front of
    their time.
    """

    full: tuple[Told, ...]
    raced: tuple[Told, ...]
    wrong: int

    @property
    def stopped(self) -> int:
        return sum(not t.complete for t in self.raced)

    @property
    def same_front(self) -> bool:
        return [t.plan for t in front(self.raced)] == [t.plan for t in front(self.full)]


def errors_of_racing(table: Table, complete: Iterable[Told]) -> Errors:
    """Race the plans of finished trials over again, and hold the outcome against their full scores."""
    raced: list[Told] = []
    wrong = 0
    full = tuple({t.plan: t for t in complete}.values())
    for trial in full:
        found = _raced(table, table.places[trial.plan], raced)
        best = max((t.score for t in rivals(raced, trial.ratio)), default=-1.0)
        wrong += not found.complete and trial.score > best
        raced.append(found)
    return Errors(full, tuple(raced), wrong)


def saved(told: Sequence[Told], num_samples: int) -> float:
    """Share of the sample evaluations that racing left out, each plan counted once."""
    spent = list({t.plan: t.num_samples for t in told}.values())
    return 1 - sum(spent) / (num_samples * len(spent))


def _raced(table: Table, number: int, told: Sequence[Told]) -> Told:
    """The trial as far as it gets: to the first look at which it is surely dominated, or to the end."""
    race = Race(table.tasks)
    members = [table.scores[table.places[t.plan]].tolist() for t in rivals(told, float(table.ratios[number]))]
    for num_samples in table.looks[:-1]:
        if race.is_dominated(table.scores[number, :num_samples].tolist(), members):
            return table.told(number, num_samples)
    return table.told(number)
