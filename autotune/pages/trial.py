"""A trial's page: its plan over the layers, scores, latency, and what it looks at; alone or beside another's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from autotune.config import Limit
from autotune.pages.accuracy import MACRO, Accuracy, accuracy_of
from autotune.pages.figures import NOT_KNOWN, Range, percent
from autotune.pages.latency import Measurement, measurements_of
from autotune.pages.schedule import Schedule, schedule_of
from autotune.pages.sights import Sight, sights_of
from autotune.pages.standing import standing_of

if TYPE_CHECKING:
    from autotune.objective import Told
    from autotune.registered import Version
    from autotune.store import Block, StudyRow

__all__ = ["Choice", "Fact", "Group", "Look", "Side", "Subject", "TrialPage", "choices_of", "trial_page"]

DRAWN = "trial "  # how the names of what the sampler drew begin; the others' are of fixed plans
METRICS = {"prefill": "Prefill", "ttft": "Time to first token"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A trial and what the database has of it. told_in_study: all finished trials of its study.

    sight: what was kept of what it looks at, None where nothing was. versions: registered ones with its plan.
    """

    study: StudyRow
    told: Told
    told_in_study: Sequence[Told]
    blocks: Sequence[Block]
    sight: Mapping[str, Any] | None = None
    versions: Sequence[Version] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """Where racing looked: after so many samples, at this score and divergence from dense."""

    num_samples: int
    score: str
    proxy: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """One trial. verdict: what became of it, in words. plan: as JSON to copy; versions: registered ones with it."""

    study: str
    number: int
    name: str
    verdict: str
    is_on_front: bool
    schedule: Schedule
    looks: tuple[Look, ...]
    num_asked: int
    num_samples: int
    measurements: tuple[Measurement, ...]
    ratio: Range
    is_measured: bool
    limit: float
    plan: str
    versions: tuple[Version, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """A line of the table, with a text for each side."""

    label: str
    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A trial that this one can be held against. value: STUDY/NUMBER."""

    value: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Choices of one kind."""

    label: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialPage:
    """sides: this trial, and the other where there is one. last_layer: up to which the pictures can be looked at;
    layer: where they are to begin."""

    sides: tuple[Side, ...]
    facts: tuple[Fact, ...]
    accuracy: Accuracy
    sights: tuple[Sight, ...]
    layer: int
    last_layer: int


def trial_page(subjects: Sequence[Subject], samples: Mapping[str, Any] | None) -> TrialPage:
    """Of one trial or two. samples: what was kept of the pictures that are to be looked at."""
    sides = tuple(_side(subject) for subject in subjects)
    scope = subjects[0].study.context.get("scope")  # what was kept of other pictures is not beside these
    sights = sights_of(samples, *(s.sight if s.study.context.get("scope") == scope else None for s in subjects))
    dense: Mapping[str, Any] = subjects[0].study.context.get("dense", {})
    by_task = {**dense.get("by_task", {}), **({MACRO: dense["score"]} if "score" in dense else {})}
    return TrialPage(
        sides=sides,
        facts=_facts(subjects, sides),
        accuracy=accuracy_of([subject.told for subject in subjects], by_task),
        sights=sights,
        layer=_layer(sights),
        last_layer=max(side.schedule.num_layers for side in sides) - 1,
    )


def choices_of(study: str, told: Sequence[Told], chosen: int) -> list[Group]:
    """What to hold the trial of the number against, of its study: the front first, then what has been published."""
    from autotune.objective import front

    best = front(told)
    others = [trial for trial in told if trial not in best]
    kinds = {
        "On the front": best,
        "Fixed plans": [trial for trial in others if not trial.name.startswith(DRAWN)],
        "Other trials": [trial for trial in others if trial.name.startswith(DRAWN)],
    }
    groups = []
    for label, members in kinds.items():
        choices = [
            Choice(value=f"{study}/{each.number}", label=f"{each.name}: {each.score:.3f} at {each.ratio:.3f}")
            for each in members
            if each.number != chosen
        ]
        if choices:
            groups.append(Group(label=label, choices=tuple(choices)))
    return groups


def _side(subject: Subject) -> Side:
    from autotune.objective import front

    told, context = subject.told, subject.study.context
    fits = context.get("fits", {})
    limit = str(subject.study.settings.get("limit", ""))
    ratio = Range(told.ratio, told.ratio_low, told.ratio_high)
    is_on_front = told.number in {each.number for each in front(subject.told_in_study)}
    return Side(
        study=subject.study.name,
        number=told.number,
        name=told.name,
        verdict=_verdict(told, is_on_front),
        is_on_front=is_on_front,
        schedule=schedule_of(told.plan, told.tokens, fits.get("image_tokens"), _num_layers(subject.told_in_study)),
        looks=tuple(Look(num_samples=n, score=f"{s:.3f}", proxy=f"{p:.4f}") for n, s, p in told.looks),
        num_asked=told.num_samples,
        num_samples=max(each.num_samples for each in subject.told_in_study),
        measurements=measurements_of(subject.blocks, fits, limit, ratio if told.measured else None, told.limit),
        ratio=ratio,
        is_measured=told.measured,
        limit=told.limit,
        plan=json.dumps(told.plan.to_dict(), indent=2),
        versions=tuple(subject.versions),
    )


def _num_layers(told: Iterable[Told]) -> int | None:
    return max((len(each.tokens) for each in told), default=0) or None


def _verdict(told: Told, is_on_front: bool) -> str:
    if is_on_front:
        return "On the front: no other trial beats it in both accuracy and latency."
    limit = f"and the limit is {told.limit:.3f}"
    match standing_of(told):
        case "stopped":
            late = f" Its latency may be as high as {told.ratio_high:.3f} of dense, {limit}."
            early = f"Stopped early: after {told.num_samples} samples it surely could not enter the front."
            return early + (late if told.ratio_high > told.limit else "")
        case "over":
            return f"Over the limit: its latency is at least {told.ratio_low:.3f} of dense, {limit}."
        case "below":
            kept, needed = percent(told.worst_task), percent(told.guard)
            return f"Below the guard: the worst task keeps {kept} of dense, and {needed} is needed."
        case "uncertain" if not told.feasible:
            return f"Perhaps over the limit: its latency may be as high as {told.ratio_high:.3f} of dense, {limit}."
        case "uncertain":
            return "Within the limit by the latency model; it was not measured."
        case "within":
            return "Within the limit, but another trial is as good and no slower."


def _facts(subjects: Sequence[Subject], sides: Sequence[Side]) -> tuple[Fact, ...]:
    columns = [_figures(subject, side) for subject, side in zip(subjects, sides, strict=True)]
    labels = dict.fromkeys(label for column in columns for label in column)
    facts = [Fact(label=label, texts=tuple(column.get(label, NOT_KNOWN) for column in columns)) for label in labels]
    return tuple(fact for fact in facts if any(text != NOT_KNOWN for text in fact.texts))


def _metric(study: StudyRow) -> str:
    """Of its limit, as of `autotune.config.Limit`; "Latency" before the study was opened."""
    limit = study.settings.get("limit")
    return METRICS[Limit.parse(limit).metric] if limit else "Latency"


def _figures(subject: Subject, side: Side) -> dict[str, str]:
    told, dense = subject.told, subject.study.context.get("dense", {})
    labelled = bool(told.by_task)
    kept = told.score / dense["score"] if labelled and told.complete and dense.get("score") else None
    shared = side.schedule.mean_share
    return {
        "Macro accuracy": Range(told.score, told.score_low, told.score_high).text() if labelled else NOT_KNOWN,
        "Of dense's accuracy": percent(kept),
        "Worst task keeps": percent(told.worst_task if labelled else None),
        "Latency, of dense": f"{side.ratio.text()} {'measured' if told.measured else 'modelled'}",
        f"{_metric(subject.study)}, ms": _number(told.ratio * dense["ms"] if dense.get("ms") else None, ".1f"),
        "Image GFLOPs": _beside(told.image_gflops, dense.get("gflops")),
        "Cache, MiB": _beside(told.cache_mib, dense.get("cache_mib")),
        "Image tokens, mean over layers": percent(shared),
        "KL divergence to dense, nats a token": f"{told.proxy:.4f}",
        "Answers asked": f"{told.num_samples} of {side.num_samples}",
    }


def _number(value: float | None, spec: str) -> str:
    return NOT_KNOWN if value is None else f"{value:{spec}}"


def _beside(value: float | None, dense: float | None) -> str:
    return _number(value, ".3f") + ("" if value is None or dense is None else f" (dense {dense:.3f})")


def _layer(sights: Sequence[Sight]) -> int:
    """The last layer that drops tokens and leaves some: where most can be seen."""
    views = [view for sight in sights for view in sight.views if view is not None]
    return max((drop.layer for view in views for drop in view.drops if drop.alive), default=0)
