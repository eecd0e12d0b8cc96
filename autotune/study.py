"""The study: what was asked, what was told, and what to ask next; for any number of workers, and resumed by any."""

from __future__ import annotations

import random
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from autotune.config import DrivenError
from autotune.mirror import Mirror
from autotune.objective import Told, steering
from autotune.ranges import Draw, Range, random_draw
from autotune.samplers import Observed, suggest
from autotune.store import Database, Lease, LeaseLostError, Leases, this_worker
from btp.plan import Plan

__all__ = ["Asked", "Study", "next_draw"]

LEARN_NOTHING = ("qmc", "random")  # samplers that draw alike whatever was told
MAX_REPEATS = 16  # mutations of a draw that came to nothing new, before one of them is tried after all


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
        return self.lease.title


class Study:
    """One study in one database: ask, evaluate, tell, by any number of workers at once.

    Our own tables say who tries what and what it came to; Optuna's say the same for everybody's tools (`Mirror`).
    worker: the name that leases are held under.
    """

    def __init__(self, database: Database, name: str, seed: int, *, worker: str = "", **terms: Any) -> None:
        self.name, self._database, self._seed = name, database, seed
        self._worker = worker or this_worker()
        self.leases = Leases(database, name, **terms)
        self.leases.create()
        self.mirror = Mirror(database, name, self.leases)
        self._told: list[Told] = []
        self._by_key: dict[str, Told] = {}
        self._last_place = 0

    @property
    def storage(self) -> str:
        """Address of the database, with its password where it has one."""
        return self._database.url

    @contextmanager
    def driven(self) -> Iterator[Callable[[], None]]:
        """Be the one process that begins this study and ends it; yields what shows that it still is.

        Raises DrivenError where another one lives.
        """

        def show() -> None:
            other = self.leases.drive(self._worker)
            if other is not None:
                raise DrivenError(self.name, other)

        show()
        try:
            yield show
        finally:
            self.leases.leave(self._worker)

    @property
    def notes(self) -> dict[str, Any]:
        return self.mirror.notes

    def note(self, key: str, value: Any) -> None:
        self.mirror.note(key, value)

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
        return {each.title: each.reason or "" for each in self.leases.all() if each.state == "failed"}

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
        self.mirror.settle_abandoned(self._worker)
        told = self.told()
        held = self.leases.claim(self._worker, target, sum(t.draw is not None for t in told))
        if held is None:
            return None
        try:
            work = held.work or self._drawn(held, ranges, sampler, told, same)
        except BaseException:
            self.leases.release(held, "its worker was stopped before it began")
            raise
        try:
            self.leases.started(held, work)
        except LeaseLostError:
            return None
        self.mirror.begin(held, work, ranges)
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

    def beat(self, asked: Asked) -> None:
        """A sign of life. Raises LeaseLostError."""
        self.leases.beat(asked.lease)

    def tell(self, asked: Asked, told: Told, key: str = "") -> None:
        """Finish the trial. key: equal for plans that realise the same, for `same_as`. Raises LeaseLostError."""
        self.leases.tell(asked.lease, told.to_dict(), key)
        self.mirror.tell(asked.lease, told)

    def fail(self, asked: Asked, reason: str) -> None:
        """Finish a trial that cannot be scored."""
        self.leases.fail(asked.lease, reason)
        self.mirror.settle(asked.lease.token)

    def release(self, asked: Asked, reason: str) -> None:
        """Hand the trial back, for another worker to try anew."""
        self.leases.release(asked.lease, reason)
        self.mirror.settle(asked.lease.token)

    def give_up(self, asked: Asked, reason: str) -> None:
        """Hand the trial back as one that its worker could not go on with."""
        self.leases.give_up(asked.lease, reason)
        self.mirror.settle(asked.lease.token)

    def told(self) -> list[Told]:
        """Every trial that was told, stopped ones included, by number."""
        for each in self.leases.told_after(self._last_place):
            told = Told.from_dict(each.record)
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
            study.mirror.forget()
            study.leases.forget()
