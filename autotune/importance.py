"""Optuna's own picture of a study, read and never written to: its tables, and which parameters matter by them."""

from __future__ import annotations

import sqlite3
import warnings
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.storages import RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from autotune.config import AutotuneError
from autotune.store import Database
from autotune.store.progress import has_optuna

__all__ = ["MIN_TRIALS", "Importance", "importance", "reading_storage"]

MIN_TRIALS = 20
"""Drawn and complete: the best tenth, which is held against all, is two trials then."""
WAIT_S = 60.0  # for another process's transaction on SQLite


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Shares that add up to 1, by parameter, largest first: for the merit to be high, and for the latency to be low."""

    num_trials: int
    merit: Mapping[str, float]
    latency: Mapping[str, float]


def reading_storage(database: Database) -> RDBStorage:
    """Optuna's tables, which must be there: every connection refuses to write, and makes or migrates nothing."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    settings = dict(database.waits)
    if database.file is not None:
        path = str(database.file)

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(path, timeout=WAIT_S, check_same_thread=False)
            connection.execute("PRAGMA query_only = ON")
            return connection

        settings["creator"] = connect
    else:
        given = settings["connect_args"]
        settings["connect_args"] = {**given, "options": f"{given['options']} -c default_transaction_read_only=on"}
    storage = database.redo(lambda: RDBStorage(database.url, engine_kwargs=settings, skip_table_creation=True))
    weakref.finalize(storage, storage.engine.dispose)
    return storage


def importance(database: Database, study: str) -> Importance:
    """By PED-ANOVA (Watanabe et al., IJCAI 2023), of the trials that were drawn and are complete.

    Raises AutotuneError where they are fewer than `MIN_TRIALS`, or Optuna knows nothing of the study.
    """
    drawn = [trial for trial in _complete(database, study) if trial.params]
    if len(drawn) < MIN_TRIALS:
        raise AutotuneError(
            f"importance takes {MIN_TRIALS} complete trials that were drawn, got {len(drawn)}; wait for more"
        )
    merit, latency = (_shares(drawn, index, way) for index, way in enumerate(("maximize", "minimize")))
    return Importance(num_trials=len(drawn), merit=merit, latency=latency)


def _complete(database: Database, study: str) -> list[FrozenTrial]:
    if not has_optuna(database):
        raise _unknown(study)
    storage = reading_storage(database)

    def find() -> list[FrozenTrial]:
        number = storage.get_study_id_from_name(study)
        return storage.get_all_trials(number, deepcopy=False, states=(TrialState.COMPLETE,))

    try:
        return database.redo(find)
    except KeyError:
        raise _unknown(study) from None
    finally:
        storage.engine.dispose()


def _unknown(study: str) -> AutotuneError:
    return AutotuneError(f"Optuna must know the study, but it has none named {study!r}; run a trial of it")


def _shares(trials: list[FrozenTrial], objective: int, direction: str) -> dict[str, float]:
    alone = optuna.create_study(direction=StudyDirection[direction.upper()])
    for trial in trials:
        terms: dict[str, Any] = {"params": trial.params, "distributions": trial.distributions}
        alone.add_trial(optuna.create_trial(value=trial.values[objective], **terms))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says that few trials tell little, which the page does too
        found = get_param_importances(alone, evaluator=PedAnovaImportanceEvaluator())
    return {name: float(share) for name, share in found.items()}
