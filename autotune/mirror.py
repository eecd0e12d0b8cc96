"""Optuna's tables, kept saying what ours say, for everybody's tools; nobody waits for them where it can be helped.

The lease is the truth, and is written first. Whoever asks next writes here what a worker that was killed could not.
"""

from __future__ import annotations

import functools
import logging
import os
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from types import MappingProxyType
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autotune.config import OPTUNA_PROXY, AutotuneError
from autotune.objective import Told
from autotune.ranges import Range
from autotune.samplers import CONSTRAINT, distributions
from autotune.store import Database, Lease, Leases, begin_immediately

__all__ = ["TOKEN", "Mirror"]

MAX_BEHIND = 4  # calls that a worker may be ahead
PROXY_PATIENCE_S = 10.0
SETTLE_S = 10.0  # between two looks for what others have left
TOKEN = "token"  # of the lease, on the Optuna trial: its worker may die before it can note the trial


class Mirror:
    """A study as Optuna has it, one trial an attempt. leases: the study's.

    A trial that racing stopped is PRUNED, with its constraint: Optuna's own `best_trials` holds no score of fewer
    samples. `begin` and `tell` are carried out by a thread of its own, one after the other; what goes wrong there is
    raised by the next `begin`, or by `flush`.
    """

    def __init__(self, database: Database, name: str, leases: Leases) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self._database, self._name, self._leases = database, name, leases
        self._distributions: Mapping[str, BaseDistribution] = {}
        self._behind: deque[tuple[int, Future[None]]] = deque()  # with their leases, oldest first
        self._noted: dict[int, int] = {}  # trials by lease; the thread's
        self._next_settling = 0.0

    @functools.cached_property
    def storage(self) -> BaseStorage:
        proxy = os.environ.get(OPTUNA_PROXY)
        return self._own_storage() if proxy is None else _proxied(proxy)

    def _own_storage(self) -> RDBStorage:
        with self._database.setting_up():
            settings = {**self._database.waits, "pool_size": 1}
            storage = self._database.redo(lambda: RDBStorage(self._database.url, engine_kwargs=settings))
        if self._database.file is not None:
            begin_immediately(storage.engine)
            storage.engine.dispose()  # of the connections that began otherwise
        weakref.finalize(self, storage.engine.dispose)
        return storage

    @functools.cached_property
    def _study_id(self) -> int:
        directions = [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]

        def find() -> int:
            with suppress(DuplicatedStudyError):
                return int(self.storage.create_new_study(directions, self._name))
            return int(self.storage.get_study_id_from_name(self._name))

        return self._database.redo(find)

    @property
    def notes(self) -> dict[str, Any]:
        """What the study rests on, as plain data."""
        return self._database.redo(lambda: self.storage.get_study_user_attrs(self._study_id))

    def note(self, key: str, value: Any) -> None:
        self._database.redo(lambda: self.storage.set_study_user_attr(self._study_id, key, value))

    def forget(self) -> None:
        """Delete the study here."""
        self.flush()
        self._database.redo(lambda: self.storage.delete_study(self._study_id))

    def begin(self, held: Lease, work: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
        """Have a running trial made for the attempt."""
        self._distributions = distributions(ranges)
        while self._behind and (self._behind[0][1].done() or len(self._behind) >= MAX_BEHIND):
            self._behind.popleft()[1].result()

        def act() -> None:
            trial_id = self._made(held, work)
            if self._note(held, trial_id):
                self._noted[held.token] = trial_id

        self._later(held.token, act)

    def tell(self, ended: Lease, told: Told) -> None:
        """Have the attempt's trial end with what the lease was told with."""

        def act() -> None:
            trial_id = self._noted.pop(ended.token, None)
            if trial_id is not None:
                self._finish(trial_id, told)
                self._leases.settled(ended)

        self._later(ended.token, act)

    def settle(self, token: int | None = None) -> None:
        """Bring the trials of ended leases, or of one of them, to the same end, whoever should have done it."""
        self.flush()
        self._settle(self._leases.unsettled(token))

    def settle_abandoned(self, worker: str) -> None:
        """As `settle`, for those that no other living worker is about to settle; from time to time."""
        if time.monotonic() < self._next_settling:
            return
        self._next_settling = time.monotonic() + SETTLE_S
        behind = {token for token, _ in self._behind}
        self._settle([each for each in self._leases.abandoned(worker) if each.token not in behind])

    def sweep(self) -> None:
        """End trials that still run though no lease is on them: a worker died, or lost an answer, in `ask`."""
        self.settle()
        running = self._running()  # first: who begins now is not among them, and who ended since has settled
        leases = {each.token: each for each in self._leases.all()}
        for trial_id, token in running.items():
            lease = leases.get(token)
            if lease is None or lease.settled:
                reason = (lease and lease.reason) or "the attempt has another trial"
                self._close(trial_id, TrialState.FAIL, attrs={"reason": reason})

    def flush(self) -> None:
        """Wait until all that was told is written here, too."""
        while self._behind:
            self._behind.popleft()[1].result()

    def _later(self, token: int, act: Callable[[], None]) -> None:
        assert self._study_id is not None  # made by one thread: two would make it twice
        self._behind.append((token, self._thread.submit(act)))

    @functools.cached_property
    def _thread(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max_workers=1, thread_name_prefix="optuna")

    def _settle(self, leases: Collection[Lease]) -> None:
        for ended in leases:
            noted = [ended.trial_id] if ended.trial_id is not None else []
            found = noted or [it for it, token in self._running().items() if token == ended.token]
            if not found and ended.state == "told":  # its worker died before it had made one
                found = [self._made(ended, ended.work or {})]
            for trial_id in found:
                if self._note(ended, trial_id):
                    self._end(trial_id, ended)
            self._leases.settled(ended)
            self._noted.pop(ended.token, None)

    def _made(self, attempt: Lease, work: Mapping[str, Any]) -> int:
        """A running trial for an attempt; its parameters are what is drawn from the ranges."""
        drawn = {} if attempt.name is not None else {key: work[key] for key in self._known_distributions if key in work}
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params=drawn,
            distributions={key: self._known_distributions[key] for key in drawn},
            user_attrs={
                "name": attempt.title,
                "number": attempt.number,
                "retry_of": attempt.retry_of,
                TOKEN: attempt.token,
            },
        )
        return self._database.redo(lambda: int(self.storage.create_new_trial(self._study_id, template)))

    @property
    def _known_distributions(self) -> Mapping[str, BaseDistribution]:
        """Of this process's draws, or else of those of another."""
        if not self._distributions:
            trials = self._database.redo(lambda: self.storage.get_all_trials(self._study_id, deepcopy=False))
            self._distributions = next((trial.distributions for trial in trials if trial.distributions), {})
        return self._distributions

    def _note(self, attempt: Lease, trial_id: int) -> bool:
        """Whether this is the attempt's trial; where it has another one already, this one is ended."""
        if self._leases.mirrored(attempt.token, trial_id):
            return True
        self._close(trial_id, TrialState.FAIL, attrs={"reason": "the attempt has another trial"})
        return False

    def _running(self) -> dict[int, int]:
        """Running trials, and their leases."""
        running = self._database.redo(
            lambda: self.storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        )
        return {trial._trial_id: trial.user_attrs[TOKEN] for trial in running}

    def _end(self, trial_id: int, ended: Lease) -> None:
        found = self._leases.record(ended.token) if ended.state == "told" else None
        if found is None:
            self._close(trial_id, TrialState.FAIL, attrs={"reason": ended.reason or ""})
        else:
            self._finish(trial_id, Told.from_dict(found.record))

    def _finish(self, trial_id: int, told: Told) -> None:
        constraint = optuna.create_trial(values=[0.0, 0.0], constraints={CONSTRAINT: told.over}).system_attrs
        state, values = (TrialState.COMPLETE, [told.merit, told.ratio]) if told.complete else (TrialState.PRUNED, None)
        self._close(trial_id, state, values, constraint=constraint)

    def _close(
        self,
        trial_id: int,
        state: TrialState,
        values: Sequence[float] | None = None,
        *,
        attrs: Mapping[str, Any] = MappingProxyType({}),
        constraint: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        def act() -> None:
            with suppress(UpdateFinishedTrialError):  # another has closed it
                for key, value in attrs.items():
                    self.storage.set_trial_user_attr(trial_id, key, value)
                for key, value in constraint.items():
                    self.storage.set_trial_system_attr(trial_id, key, value)
                self.storage.set_trial_state_values(trial_id, state, values)

        self._database.redo(act)


def _proxied(address: str) -> GrpcStorageProxy:
    """Optuna's tables through its proxy, which needs their database and no worker does."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise AutotuneError(f"{OPTUNA_PROXY} must be HOST:PORT, got {address!r}; unset it to do without a proxy")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = GrpcStorageProxy(host=host, port=int(port))
    try:
        storage.wait_server_ready(PROXY_PATIENCE_S)
    except ConnectionError as error:
        raise AutotuneError(
            f"{OPTUNA_PROXY} must be a proxy that runs, got {address!r}; start it, or unset it"
        ) from error
    weakref.finalize(storage, storage._channel.close)
    return storage
