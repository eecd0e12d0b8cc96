"""The study: what was asked, what was told, and which plan is best. The only file that knows Optuna."""

from __future__ import annotations

import json
import logging
import warnings
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import TrialState

from autotune.config import check_sqlite
from autotune.objective import Told
from autotune.space import Draw, SearchSpace
from btp.plan import Plan

__all__ = ["Study"]

CONSTRAINT = "latency_over_limit"  # the one constraint, set on every COMPLETE trial: feasible is <= 0
NUM_RANDOM = 12  # draws before TPE begins to learn, the fixed plans not counted
FIXED_KEYS = ("fixed_name", "fixed_plan")


class Study:
    """One resumable study in one storage. Ask, evaluate, tell; a killed trial is found and asked again."""

    def __init__(self, storage: Path, name: str, seed: int) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        check_sqlite(storage)
        storage.parent.mkdir(parents=True, exist_ok=True)
        self._seed = seed
        self._url = f"sqlite:///{storage}"
        self._study = optuna.create_study(
            storage=self._url, study_name=name, directions=["maximize", "minimize"], load_if_exists=True
        )
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            kept = {key: trial.user_attrs[key] for key in FIXED_KEYS if key in trial.user_attrs}
            self._study.enqueue_trial(trial.params, user_attrs={**kept, "retry_of": trial.number})

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
    def _num_fixed(self) -> int:
        return len({t.user_attrs["fixed_name"] for t in self._study.trials if "fixed_name" in t.user_attrs})

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
                seed=int(np.random.SeedSequence((self._seed, self.num_done)).generate_state(1)[0]),
                n_startup_trials=NUM_RANDOM + self._num_fixed,
                multivariate=True,
                group=True,
            )
        trial = self._study.ask()
        if "fixed_plan" in trial.user_attrs:
            plan = Plan.from_dict(json.loads(trial.user_attrs["fixed_plan"]))
            return trial.number, trial.user_attrs["fixed_name"], plan
        return trial.number, f"trial {trial.number}", space.suggest(trial)

    def tell(self, told: Told) -> None:
        trial = self._trial(told.number)
        for key, value in {**asdict(told), "plan": told.plan.to_json(), "by_task": dict(told.by_task)}.items():
            trial.set_user_attr(key, value)
        trial.set_constraint(CONSTRAINT, told.ratio_high - told.limit)
        self._study.tell(told.number, [told.score, told.ratio])

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

    @staticmethod
    def forget(storage: Path, name: str) -> None:
        """Delete one study, if it is there; others in the same storage stay."""
        if storage.exists():
            url = f"sqlite:///{storage}"
            if name in optuna.get_all_study_names(url):
                optuna.delete_study(study_name=name, storage=url)
