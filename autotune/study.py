"""The study: what was asked, what was told, and what to ask next; kept in an Optuna storage, and resumed from it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.trial import FrozenTrial, TrialState

from autotune.config import check_sqlite
from autotune.objective import Told, steering
from autotune.ranges import Choice, Draw, Float, Int, Range, random_draw
from autotune.samplers import CONSTRAINT, Observed, distributions, suggest
from btp.plan import Plan

__all__ = ["Study", "next_draw"]

MAX_REPEATS = 16  # mutations of a draw that came to nothing new, before one of them is tried after all
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def next_draw(
    sampler: str,
    ranges: Mapping[str, Range],
    told: Sequence[Told],
    seed: int,
    same: Callable[[Draw], Told | None],
    *,
    whole_front: bool = False,
) -> Draw:
    """What a sampler draws after the finished trials, oldest first, steered by what they say of the proxy.

    same: the finished trial that a draw would only repeat, None for a new one. Many draws are one plan, as where
    settings of stages are drawn that it does not have, so a sampler may come back to it for ever: a repeat is mutated,
    each of its settings drawn anew with a probability that rises to one over `MAX_REPEATS` attempts. Else as `suggest`.
    """
    loss = steering(told).loss
    observed = [Observed(t.draw, loss(t), t.ratio, t.over) for t in told if t.draw is not None]
    draw = drawn = suggest(sampler, ranges, observed, seed, whole_front=whole_front)
    rng = random.Random(f"{seed} {len(observed)}")
    for attempt in range(1, MAX_REPEATS + 1):
        if same(draw) is None:
            break
        anew = random_draw(ranges, rng)
        draw = {name: anew[name] if rng.random() < attempt / MAX_REPEATS else drawn[name] for name in ranges}
    return draw


class Study:
    """One resumable study in one storage. Ask, evaluate, tell; a killed trial is found and asked again.

    A trial that racing stopped is kept as PRUNED, with its constraint and all it was told with: `ask` learns from it as
    from any other, but Optuna's own `best_trials` holds no score of fewer samples.
    """

    def __init__(self, storage: Path, name: str, seed: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        check_sqlite(storage)
        storage.parent.mkdir(parents=True, exist_ok=True)
        self._seed = seed
        self._study = optuna.create_study(
            storage=f"sqlite:///{storage}",
            study_name=name,
            directions=["maximize", "minimize"],
            load_if_exists=True,
            sampler=RandomSampler(),  # draws nothing: every ask brings its own
        )
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):  # it keeps its number, and its turn
            self._study._storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)

    @property
    def name(self) -> str:
        return self._study.study_name

    @property
    def notes(self) -> dict[str, Any]:
        return self._study.user_attrs

    def note(self, key: str, value: Any) -> None:
        self._study.set_user_attr(key, value)

    def enqueue(self, name: str, plan: Plan) -> None:
        """Make a fixed plan a trial, once however often the study is resumed."""
        if all(trial.user_attrs.get("fixed_name") != name for trial in self._study.trials):
            self._study.enqueue_trial({}, user_attrs={"fixed_name": name, "fixed_plan": plan.to_json()})

    @property
    def has_fixed_plans(self) -> bool:
        """Whether fixed plans wait to be tried."""
        waiting = self._study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return any("fixed_plan" in trial.user_attrs for trial in waiting)

    @property
    def num_done(self) -> int:
        """Finished trials, stopped ones included."""
        return len(self._finished())

    def ask(
        self, ranges: Mapping[str, Range], sampler: str, same: Callable[[Draw], Told | None] = lambda _: None
    ) -> tuple[int, str, Plan | Draw]:
        """Trial number, name, and what to try: a fixed plan, or a draw from the ranges, recorded as its parameters.

        Fixed plans, and what a killed process left, come first. Then `sampler` draws, steered by `steering`; its draw
        depends on the seed and on the told trials that have one and on nothing else, so a resumed study asks what an
        unbroken one would have. same: as of `next_draw`.
        """
        propose = partial(next_draw, sampler, ranges, self.told(), self._seed, same)
        self._study.sampler = _HandsOut(distributions(ranges), propose)
        trial = self._study.ask()
        if "fixed_plan" in trial.user_attrs:
            plan = Plan.from_dict(json.loads(trial.user_attrs["fixed_plan"]))
            return trial.number, trial.user_attrs["fixed_name"], plan
        draw = {name: _recorded(trial, name, setting) for name, setting in ranges.items()}
        return trial.number, f"trial {trial.number}", draw

    def tell(self, told: Told, key: str = "") -> None:
        """Finish the trial. key: equal for plans that realise the same, for `same_as`."""
        trial = self._trial(told.number)
        draw = dict(told.draw) if told.draw is not None else None
        record = {**asdict(told), "plan": told.plan.to_dict(), "by_task": dict(told.by_task), "draw": draw}
        trial.set_user_attr("told", record)  # at once: each attribute is a transaction of its own
        trial.set_user_attr("key", key)
        trial.set_constraint(CONSTRAINT, told.over)
        if told.complete:
            self._study.tell(told.number, [told.merit, told.ratio])
        else:
            self._study.tell(told.number, state=TrialState.PRUNED)

    def _trial(self, number: int) -> optuna.Trial:
        identity = self._study.get_trials(deepcopy=False)[number]._trial_id
        return optuna.Trial(self._study, identity)

    def told(self) -> list[Told]:
        """Every finished trial, stopped ones included, oldest first."""
        return [_told(trial) for trial in self._finished()]

    def same_as(self, key: str) -> Told | None:
        """The first finished trial that was told with this key, one scored on all samples before one that was not."""
        same = [_told(trial) for trial in self._finished() if key and trial.user_attrs["key"] == key]
        return min(same, key=lambda told: not told.complete, default=None)

    def _finished(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=FINISHED)

    @staticmethod
    def forget(storage: Path, name: str) -> None:
        """Delete one study, if it is there; others in the same storage stay."""
        if storage.exists():
            url = f"sqlite:///{storage}"
            if name in optuna.get_all_study_names(url):
                optuna.delete_study(study_name=name, storage=url)


class _HandsOut(BaseSampler):
    """Gives a trial the draw that is made elsewhere, and only makes it for a trial that has none yet."""

    def __init__(self, settings: dict[str, BaseDistribution], draw: Callable[[], Draw]) -> None:
        self._settings, self._draw = settings, draw

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        drawn = "fixed_plan" in trial.user_attrs or len(trial.params) == len(self._settings)
        return {} if drawn else self._settings

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return dict(self._draw())

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise KeyError(f"every setting must be drawn at once, got {param_name!r} by itself; ask with the same ranges")


def _recorded(trial: optuna.Trial, name: str, setting: Range) -> int | float | str | bool:
    match setting:
        case Int(low, high):
            return trial.suggest_int(name, low, high)
        case Float(low, high):
            return trial.suggest_float(name, low, high)
        case Choice(options):
            chosen: str | bool = trial.suggest_categorical(name, options)  # type: ignore[assignment]
            return chosen


def _told(trial: FrozenTrial) -> Told:
    record = trial.user_attrs["told"]
    looks = tuple((num_samples, score, proxy) for num_samples, score, proxy in record["looks"])
    return Told(**{**record, "plan": Plan.from_dict(record["plan"]), "looks": looks})
