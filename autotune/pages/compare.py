"""What the page that compares studies shows before any script has run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from autotune.pages.attainment import Attained, attained
from autotune.pages.figures import Range
from autotune.pages.fronts import Place, Point, StudySeries, front, hypervolume, places
from autotune.pages.styles import Style, style
from autotune.pages.view import X_DIGITS, View
from autotune.registered import Version
from autotune.store import StudyRow
from btp.plan import Plan

__all__ = ["Comparison", "asked_alike"]


def asked_alike(rows: Iterable[StudyRow]) -> dict[tuple[str, str, str], list[StudySeries]]:
    """Studies to choose from, without their points: by model, device and limit."""
    found: dict[tuple[str, str, str], list[StudySeries]] = {}
    for study in sorted((StudySeries.of(row, ()) for row in rows), key=lambda study: (*study.kind, study.name)):
        found.setdefault(study.kind, []).append(study)
    return found


@dataclass(frozen=True, slots=True)
class Worth:
    """A line of the table: a study, or those that differ in seed alone. number: the study's place, None for several.

    hypervolume: None where dense's x is not known; of several, the median and the extremes.
    """

    number: int | None
    name: str
    num_trials: str
    num_front: str
    hypervolume: Range | None
    best: Range | None


@dataclass(frozen=True, slots=True)
class Band:
    """What studies that differ in seed alone attain."""

    name: str
    numbers: tuple[int, ...]
    steps: tuple[Attained, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Studies side by side. versions: certified ones of the registry. links: whether there are pages to lead to."""

    view: View
    studies: tuple[StudySeries, ...]
    versions: tuple[Version, ...] = ()
    links: bool = True

    @cached_property
    def shown(self) -> dict[int, StudySeries]:
        """By place: those of the chosen devices and limits."""
        view = self.view
        return {
            number: study
            for number, study in enumerate(self.studies)
            if (not view.device or study.device in view.device) and (not view.limit or study.limit in view.limit)
        }

    @property
    def styles(self) -> list[Style]:
        return [style(number) for number in range(len(self.studies))]

    @cached_property
    def tasks(self) -> list[str]:
        return sorted({task for study in self.studies for task in study.tasks})

    @cached_property
    def devices(self) -> list[str]:
        return sorted({study.device for study in self.studies})

    @cached_property
    def limits(self) -> list[str]:
        return sorted({study.limit for study in self.studies})

    @cached_property
    def fronts(self) -> dict[int, list[Place]]:
        return {number: front(places(study, self.view.axes)) for number, study in self.shown.items()}

    @property
    def listed(self) -> dict[int, list[Place]]:
        """What the table tells, by x: the fronts, and certified versions wherever they lie."""
        found = {}
        for number, members in self.fronts.items():
            all_places = places(self.studies[number], self.view.axes)
            certified = [place for place in all_places if self.marks(number, place.point.told.plan)]
            others = [place for place in certified if place not in members]
            found[number] = sorted([*members, *others], key=lambda place: place.x.value)
        return found

    @property
    def without(self) -> list[str]:
        """Shown studies that do not tell what is to be drawn."""
        axes = self.view.axes
        return [s.name for s in self.shown.values() if s.points and not any(axes.place(s, p) for p in s.points)]

    @cached_property
    def questions(self) -> dict[str, list[int]]:
        """Shown studies that differ in seed alone, several each."""
        found: dict[str, list[int]] = {}
        for number, study in self.shown.items():
            if study.question:
                found.setdefault(study.question, []).append(number)
        return {question: numbers for question, numbers in found.items() if len(numbers) > 1}

    @property
    def table(self) -> list[Worth]:
        """Every study and every question, the best first."""
        lines = [self._worth(number) for number in self.shown]
        lines += [self._worth_of_all(numbers) for numbers in self.questions.values()]
        return sorted(
            lines, key=lambda line: -1.0 if line.hypervolume is None else line.hypervolume.value, reverse=True
        )

    @property
    def bands(self) -> list[Band]:
        return [
            Band(self._name(numbers), tuple(numbers), tuple(attained([self.fronts[number] for number in numbers])))
            for numbers in self.questions.values()
        ]

    @property
    def x_digits(self) -> int:
        return X_DIGITS[self.view.x]

    def x_text(self, value: Range) -> str:
        return value.text(f".{self.x_digits}f")

    def marked(self, number: int, point: Point) -> str:
        """What a point of a study is beside a trial."""
        marks = self.marks(number, point.told.plan)
        versions = [", ".join([f"certified as {v.name} {v.version}", *v.aliases]) for v in marks]
        is_off = bool(versions) and all(place.point is not point for place in self.fronts[number])
        return "; ".join(["published"] * point.is_published + versions + ["off the front"] * is_off)

    def marks(self, number: int, plan: Plan) -> list[Version]:
        """The certified versions of a study's plan."""
        return self._versions.get((self.studies[number].name, plan.digest), [])

    @property
    def certified(self) -> list[Version]:
        """The certified versions of plans that the studies have tried."""
        tried = (
            {(s.name, point.told.plan.digest) for s in self.studies for point in s.points} if self._versions else set()
        )
        return [version for key, versions in self._versions.items() if key in tried for version in versions]

    @cached_property
    def _versions(self) -> dict[tuple[str, str], list[Version]]:
        found: dict[tuple[str, str], list[Version]] = {}
        for version in self.versions:
            if version.certified and version.study and version.plan:
                found.setdefault((version.study, version.plan), []).append(version)
        return found

    def _name(self, numbers: Sequence[int]) -> str:
        study = self.studies[numbers[0]]
        return f"{len(numbers)} seeds of {study.model}, {study.limit}, {study.device}"

    def _area(self, number: int) -> float | None:
        unit = self.view.axes.unit(self.studies[number].dense)
        return None if unit is None else hypervolume(self.fronts[number], unit)

    def _worth(self, number: int) -> Worth:
        study, members, area = self.studies[number], self.fronts[number], self._area(number)
        best = members[-1].y if members else None
        trials = f"{len(study.points)} of {study.target}"
        return Worth(number, study.name, trials, str(len(members)), None if area is None else Range(area), best)

    def _worth_of_all(self, numbers: Sequence[int]) -> Worth:
        areas = [area for number in numbers if (area := self._area(number)) is not None]
        tops = [self.fronts[number][-1].y.value for number in numbers if self.fronts[number]]
        members = fmean(len(self.fronts[number]) for number in numbers)
        trials = str(sum(len(self.studies[number].points) for number in numbers))
        return Worth(None, self._name(numbers), trials, f"{members:.1f} each", _spread(areas), _spread(tops))


def _spread(values: Sequence[float]) -> Range | None:
    return Range(median(values), min(values), max(values)) if values else None
