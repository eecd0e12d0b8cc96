"""The study: what was asked, what was told, and which plan is best. The only file that knows Optuna."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from autotune.objective import Told
from autotune.space import Draw, SearchSpace
from btp.plan import Plan

__all__ = ["Study"]

CONSTRAINT = "latency_over_limit"  # the one constraint, set on every COMPLETE trial: feasible is <= 0
NUM_RANDOM = 12  # draws before TPE begins to learn


class Study:
    """One resumable study in one storage. Ask, evaluate, tell; a killed trial is found and asked again."""

    def __init__(self, storage: Path, name: str, seed: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        storage.parent.mkdir(parents=True, exist_ok=True)
        self._seed = seed
        self._url = f"sqlite:///{storage}"
        self._study = optuna.create_study(
            storage=self._url, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={**trial.user_attrs, "retry_of": trial.number})

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
        if all(trial.user_attrs.get("name") != name for trial in self._study.trials):
            self._study.enqueue_trial({}, user_attrs={"name": name, "plan": plan.to_json()})

    @property
    def num_done(self) -> int:
        return len(self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))

    def ask(self, space: SearchSpace) -> tuple[int, str, Plan | Draw]:
        """Trial number, name, and what to try: a fixed plan, or a draw of the space.

        The sampler is seeded anew by (seed, finished trials), so a resumed study asks what an unbroken one would have.
        """
        with warnings.catch_warnings():
            # Fixed plans are trials without parameters; only grouping keeps the joint space of the others whole.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(
                seed=self._seed * 100_003 + self.num_done, n_startup_trials=NUM_RANDOM, multivariate=True, group=True
            )
        trial = self._study.ask()
        if "plan" in trial.user_attrs:
            return trial.number, trial.user_attrs["name"], Plan.from_dict(json.loads(trial.user_attrs["plan"]))
        return trial.number, f"trial {trial.number}", space.suggest(trial)

    def tell(self, told: Told) -> None:
        trial = self._trial(told.number)
        for key, value in {**asdict(told), "plan": told.plan.to_json(), "by_task": dict(told.by_task)}.items():
            trial.set_user_attr(key, value)
        trial.set_constraint(CONSTRAINT, told.ratio_high - told.limit)
        self._study.tell(told.number, [told.score, told.ratio])

    def abandon(self, number: int) -> None:
        """A trial that will not finish: failed, and asked again on resuming."""
        self._study.tell(number, state=TrialState.FAIL)

    def _trial(self, number: int) -> optuna.Trial:
        identity = self._study.get_trials(deepcopy=False)[number]._trial_id
        return optuna.Trial(self._study, identity)

    def told(self) -> list[Told]:
        """Every finished trial, oldest first."""
        names = [field.name for field in fields(Told) if field.name != "plan"]
        return [
            Told(plan=Plan.from_dict(json.loads(t.user_attrs["plan"])), **{name: t.user_attrs[name] for name in names})
            for t in self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]
