"""The study: what was asked, what was told, and what to ask next; for any number of workers, and resumed by any."""

from __future__ import annotations

import functools
import logging
import os
import random
import warnings
import weakref
from bisect import insort
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import BaseStorage, GrpcStorageProxy, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState

from autotune.config import OPTUNA_PROXY, AutotuneError
from autotune.objective import Told, steering
from autotune.ranges import Draw, Range, random_draw
from autotune.samplers import CONSTRAINT, Observed, distributions, suggest
from autotune.store import Database, Lease, LeaseLostError, Leases, begin_immediately, this_worker
from btp.plan import Plan

__all__ = ["Asked", "Study", "next_draw"]

LEARN_NOTHING = ("qmc", "random")  # samplers that draw alike whatever was told
MAX_REPEATS = 16  # mutations of a draw that came to nothing new, before one of them is tried after all
PROXY_PATIENCE_S = 10.0
TOKEN = "token"  # of the lease, on the Optuna trial: its worker may die before it can note the trial


def next_draw(
    sampler: str,
    ranges: Mapping[str, Range],
    told: Sequence[Told],
    seed: int,
    same: Callable[[Draw], Told | None],
    *,
    whole_front: bool = False,
    index: int | None = None,
    pending: Sequence[Draw] = (),
) -> Draw:
    """What a sampler draws after the finished trials, oldest first, steered by what they say of the proxy.

    same: the finished trial that a draw would only repeat, None for a new one. Many draws are one plan, as where
    settings of stages are drawn that it does not have, so a sampler may come back to it for ever: a repeat is mutated,
    each of its settings drawn anew with a probability that rises to one over `MAX_REPEATS` attempts. Else as `suggest`.
    """
    index = sum(t.draw is not None for t in told) if index is None else index
    observed: list[Observed] = []
    if sampler in LEARN_NOTHING:
        pending = ()
    else:
        loss = steering(told).loss
        observed = [Observed(t.draw, loss(t), t.ratio, t.over) for t in told if t.draw is not None]
    draw = drawn = suggest(sampler, ranges, observed, seed, whole_front=whole_front, index=index, pending=pending)
    rng = random.Random(f"{seed} {index}")
    for attempt in range(1, MAX_REPEATS + 1):
        if same(draw) is None:
            break
        anew = random_draw(ranges, rng)
        draw = {name: anew[name] if rng.random() < attempt / MAX_REPEATS else drawn[name] for name in ranges}
    return draw


@dataclass(frozen=True, slots=True)
class Asked:
    """A trial to try now, and the lease that this worker has on it. work: a fixed plan, or a draw from the ranges."""

    lease: Lease
    work: Plan | Draw

    @property
    def number(self) -> int:
        return self.lease.number

    @property
    def name(self) -> str:
        return self.lease.name or f"trial {self.number}"


class Study:
    """One study in one database: ask, evaluate, tell, by any number of workers at once.

    Our own tables say who tries what and what it came to; Optuna's say the same for everybody's tools, one trial an
    attempt. Whoever asks next writes there what a worker that was killed could not (`settle`). A trial that racing
    stopped is kept as PRUNED, with its constraint: `ask` learns from it as from any other, but Optuna's own
    `best_trials` holds no score of fewer samples. worker: the name that leases are held under.
    """

    def __init__(self, database: Database, name: str, seed: int, *, worker: str = "", **terms: Any) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self.name, self._database, self._seed = name, database, seed
        self._worker = worker or this_worker()
        self.leases = Leases(database, name, **terms)
        self.leases.create()
        self._told: list[Told] = []
        self._by_key: dict[str, Told] = {}
        self._last_place = 0

    @functools.cached_property
    def _storage(self) -> BaseStorage:
        proxy = os.environ.get(OPTUNA_PROXY)
        return self._own_storage() if proxy is None else _proxied(proxy)

    def _own_storage(self) -> RDBStorage:
        with self._database.setting_up():
            storage = self._database.redo(lambda: RDBStorage(self._database.url, engine_kwargs={"pool_size": 2}))
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
                return int(self._storage.create_new_study(directions, self.name))
            return int(self._storage.get_study_id_from_name(self.name))

        return self._database.redo(find)

    @property
    def storage(self) -> str:
        """Address of the database, with its password where it has one."""
        return self._database.url

    @contextmanager
    def driven(self) -> Iterator[Callable[[], None]]:
        """Be the one process that begins this study and ends it; yields what shows that it still is.

        Raises AutotuneError where another one lives.
        """

        def show() -> None:
            other = self.leases.drive(self._worker)
            if other is not None:
                raise AutotuneError(
                    f"one process at a time may drive a study, but {other} drives {self.name}; let it end, or join it "
                    f"with autotune worker --study {self.name}"
                )

        show()
        try:
            yield show
        finally:
            self.leases.leave(self._worker)

    @property
    def notes(self) -> dict[str, Any]:
        return self._database.redo(lambda: self._storage.get_study_user_attrs(self._study_id))

    def note(self, key: str, value: Any) -> None:
        self._database.redo(lambda: self._storage.set_study_user_attr(self._study_id, key, value))

    def enqueue(self, name: str, plan: Plan, within: int | None = None) -> None:
        """Make a fixed plan a trial, once however often the study is resumed. within: of how many trials."""
        self.leases.enqueue(name, plan.to_dict(), within)

    @property
    def has_waiting(self) -> bool:
        """Whether fixed plans, or trials that were given up, wait to be tried."""
        return self.leases.counts().get("waiting", 0) > 0

    @property
    def num_done(self) -> int:
        """Finished trials: those that racing stopped, and those that failed, included."""
        counts = self.leases.counts()
        return counts.get("told", 0) + counts.get("failed", 0)

    def is_done(self, target: int) -> bool:
        """Whether so many trials are finished, and nothing else waits or is being tried."""
        counts = self.leases.counts()
        done = counts.get("told", 0) + counts.get("failed", 0)
        return done >= target and not counts.get("waiting") and not counts.get("held")

    @property
    def names(self) -> set[str]:
        """Of the fixed plans, whatever has become of them."""
        return self.leases.names()

    @property
    def failures(self) -> dict[str, str]:
        """Why trials failed, by name."""
        return {Asked(each, {}).name: each.reason or "" for each in self.leases.all() if each.state == "failed"}

    def ask(
        self,
        ranges: Mapping[str, Range],
        sampler: str,
        target: int,
        same: Callable[[Draw], Told | None] = lambda _: None,
    ) -> Asked | None:
        """What to try now: a fixed plan, or a draw from the ranges; None while all that there is to try is being tried.

        Fixed plans, and what others gave up, come first. Then `sampler` draws while there are fewer than `target`
        trials, steered by `steering`. With one worker its draw depends on the seed and on the told trials that have one
        and on nothing else, so a resumed study asks what an unbroken one would have; with several it depends on their
        pace too, but for "qmc" and "random", whose draws are the same in another order. same: as of `next_draw`.
        """
        self._settle(self.leases.abandoned(self._worker))
        told = self.told()
        held = self.leases.claim(self._worker, target, sum(t.draw is not None for t in told))
        if held is None:
            return None
        try:
            work = held.work or self._drawn(held, ranges, sampler, told, same)
            trial_id = self._made(held, work, ranges)
        except BaseException:
            self.leases.release(held, "its worker was stopped before it began")
            raise
        try:
            self.leases.started(held, trial_id, work)
        except LeaseLostError:
            self._close(trial_id, TrialState.FAIL)
            return None
        held = replace(held, trial_id=trial_id)
        return Asked(held, Plan.from_dict(dict(work)) if held.name is not None else dict(work))

    def _drawn(
        self,
        held: Lease,
        ranges: Mapping[str, Range],
        sampler: str,
        told: Sequence[Told],
        same: Callable[[Draw], Told | None],
    ) -> Draw:
        others = self.leases.drawn("failed", "held")
        failed = [each.work for each in others if each.state == "failed"]
        pending = [dict(each.work or {}) for each in others if each.state == "held" and each.token != held.token]
        nothing = next(iter(told), None)

        def known(draw: Draw) -> Told | None:
            return nothing if draw in failed else same(draw)

        return next_draw(sampler, ranges, told, self._seed, known, index=held.draw_index, pending=pending)

    def _made(self, held: Lease, work: Mapping[str, Any], ranges: Mapping[str, Range]) -> int:
        """A running Optuna trial for the attempt."""
        fixed = held.name is not None
        template = optuna.create_trial(
            state=TrialState.RUNNING,
            params={} if fixed else dict(work),
            distributions={} if fixed else distributions(ranges),
            user_attrs={
                "name": Asked(held, {}).name,
                "number": held.number,
                "retry_of": held.retry_of,
                TOKEN: held.token,
            },
        )
        return self._database.redo(lambda: int(self._storage.create_new_trial(self._study_id, template)))

    def beat(self, asked: Asked) -> None:
        """A sign of life. Raises LeaseLostError."""
        self.leases.beat(asked.lease)

    def tell(self, asked: Asked, told: Told, key: str = "") -> None:
        """Finish the trial. key: equal for plans that realise the same, for `same_as`. Raises LeaseLostError."""
        draw = dict(told.draw) if told.draw is not None else None
        record = {**asdict(told), "plan": told.plan.to_dict(), "by_task": dict(told.by_task), "draw": draw}
        self.leases.tell(asked.lease, record, key)
        if asked.lease.trial_id is not None:
            self._finish(asked.lease.trial_id, told)
            self.leases.settled(asked.lease)

    def fail(self, asked: Asked, reason: str) -> None:
        """Finish a trial that cannot be scored."""
        self.leases.fail(asked.lease, reason)
        self._settle(self.leases.unsettled(asked.lease.token))

    def release(self, asked: Asked, reason: str) -> None:
        """Hand the trial back, for another worker to try anew."""
        self.leases.release(asked.lease, reason)
        self._settle(self.leases.unsettled(asked.lease.token))

    def give_up(self, asked: Asked, reason: str) -> None:
        """Hand the trial back as one that its worker could not go on with."""
        self.leases.give_up(asked.lease, reason)
        self._settle(self.leases.unsettled(asked.lease.token))

    def settle(self) -> None:
        """Bring the Optuna trials of ended leases to the same end, also of workers that were killed in between."""
        self._settle(self.leases.unsettled())

    def _settle(self, leases: Collection[Lease]) -> None:
        for ended in leases:
            noted = [ended.trial_id] if ended.trial_id is not None else []
            for trial_id in noted or [it for it, token in self._running().items() if token == ended.token]:
                self._end(trial_id, ended)
            self.leases.settled(ended)

    def sweep(self) -> None:
        """End Optuna trials that still run though no lease is on them: a worker died, or lost an answer, in `ask`."""
        self.settle()
        running = self._running()  # first: who begins now is not among them, and who ended since has settled
        busy = {each.token for each in self.leases.all() if not each.settled}
        for trial_id, token in running.items():
            if token not in busy:
                self._close(trial_id, TrialState.FAIL)

    def _running(self) -> dict[int, int]:
        """Running Optuna trials, and their leases."""
        running = self._database.redo(
            lambda: self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        )
        return {trial._trial_id: trial.user_attrs[TOKEN] for trial in running}

    def _end(self, trial_id: int, ended: Lease) -> None:
        found = self.leases.record(ended.token) if ended.state == "told" else None
        if found is None:
            self._close(trial_id, TrialState.FAIL, attrs={"reason": ended.reason or ""})
        else:
            self._finish(trial_id, _told(found.record))

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
                    self._storage.set_trial_user_attr(trial_id, key, value)
                for key, value in constraint.items():
                    self._storage.set_trial_system_attr(trial_id, key, value)
                self._storage.set_trial_state_values(trial_id, state, values)

        self._database.redo(act)

    def told(self) -> list[Told]:
        """Every trial that was told, stopped ones included, by number."""
        for each in self.leases.told_after(self._last_place):
            told = _told(each.record)
            insort(self._told, told, key=attrgetter("number"))
            best = self._by_key.get(each.key)
            if best is None or (told.complete, -told.number) > (best.complete, -best.number):
                self._by_key[each.key] = told
            self._last_place = each.place
        return list(self._told)

    def same_as(self, key: str) -> Told | None:
        """The first finished trial that was told with this key, one scored on all samples before one that was not."""
        self.told()
        return self._by_key.get(key) if key else None

    @classmethod
    def forget(cls, database: Database, name: str) -> None:
        """Delete one study, if it is there; others in the same database stay."""
        if database.exists:
            study = cls(database, name, 0)
            study._database.redo(lambda: study._storage.delete_study(study._study_id))
            study.leases.forget()


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


def _told(record: Mapping[str, Any]) -> Told:
    looks = tuple((num_samples, score, proxy) for num_samples, score, proxy in record["looks"])
    return Told(**{**record, "plan": Plan.from_dict(record["plan"]), "looks": looks})
