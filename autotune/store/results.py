"""What was computed once, for every worker of a study: answers sample by sample, latency pair by pair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, insert, select
from sqlalchemy.exc import IntegrityError

from autotune.scores import Scores
from autotune.store.database import Database
from autotune.store.tables import Now, device, kept, latency_block, sample_result

__all__ = ["Block", "Results"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One measurement: pairs of runs in milliseconds, in the order they were made. measured: seconds since 1970."""

    device: Mapping[str, Any]
    limit: str
    dense_ms: tuple[float, ...]
    pruned_ms: tuple[float, ...]
    measured: float


class Results:
    """What is known of one model on its data and device. scope: a digest of the three.

    Two workers may compute the same at once; what was kept first counts, for both of them.
    """

    def __init__(self, database: Database, scope: str) -> None:
        self._database, self._scope = database, scope

    def once(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` found, as JSON: computed once, also over several runs and workers."""
        found = self._find(name)
        if found is None:
            value = json.loads(json.dumps(compute()))
            found = self._insert(name, value, ())
        return dict(found[0])

    def answers(self, name: str, compute: Callable[[], Scores]) -> Scores:
        """As `once`, for the answers to some samples."""
        found = self._find(name)
        if found is None:
            scores = compute()
            texts = [answer.replace("\0", "") for answer in scores.answers]  # PostgreSQL has no such letter
            columns = zip(texts, scores.scores, scores.kl, scores.nll, strict=True)
            rows = [
                {"sample": sample, "answer": answer, "score": score, "kl": kl, "nll": nll}
                for sample, (answer, score, kl, nll) in enumerate(columns)
            ]
            found = self._insert(name, {"realised": scores.realised}, rows)
        return _scores(*found)

    def found(self, name: str) -> dict[str, Any] | None:
        """What `once` kept under a name; None where it has not been computed."""
        found = self._find(name)
        return None if found is None else dict(found[0])

    def forget(self) -> None:
        """Delete all that was kept; measured pairs stay."""

        def act(connection: Connection) -> None:
            mine = select(kept.c.id).where(kept.c.scope == self._scope)
            connection.execute(sample_result.delete().where(sample_result.c.kept.in_(mine)))
            connection.execute(kept.delete().where(kept.c.scope == self._scope))

        self._database.run(act)

    def measured(
        self, key: Mapping[str, Any], plan: str, limit: str, dense_ms: Sequence[float], pruned_ms: Sequence[float]
    ) -> None:
        """Note the raw pairs of a measurement. key: of the device; plan: its digest."""
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        find = select(device.c.id).where(device.c.digest == digest)

        def act(connection: Connection) -> None:
            number = connection.execute(find).scalar()
            if number is None:
                made = insert(device).values(digest=digest, key=dict(key)).returning(device.c.id)
                number = connection.execute(made).scalar_one()
            pairs = {"dense_ms": list(dense_ms), "pruned_ms": list(pruned_ms)}
            values = {"device": number, "scope": self._scope, "plan": plan, "limit": limit, "measured": Now(), **pairs}
            connection.execute(insert(latency_block).values(values))

        try:
            self._database.run(act)
        except IntegrityError:  # another noted the same device at the same moment
            self._database.run(act)

    def blocks(self, plan: str) -> list[Block]:
        """Every measurement of a plan, by its digest, oldest first."""
        columns = (latency_block.c.limit, latency_block.c.dense_ms, latency_block.c.pruned_ms, latency_block.c.measured)
        query = select(device.c.key, *columns).join(device, device.c.id == latency_block.c.device)
        query = query.where(latency_block.c.scope == self._scope, latency_block.c.plan == plan)
        query = query.order_by(latency_block.c.id)
        return [
            Block(device=key, limit=limit, dense_ms=tuple(dense), pruned_ms=tuple(pruned), measured=measured)
            for key, limit, dense, pruned, measured in self._database.run(lambda c: c.execute(query).all())
        ]

    def _find(self, name: str) -> _Found | None:
        query = select(kept.c.id, kept.c.value).where(kept.c.scope == self._scope, kept.c.name == name)
        columns = (sample_result.c.answer, sample_result.c.score, sample_result.c.kl, sample_result.c.nll)

        def act(connection: Connection) -> _Found | None:
            row = connection.execute(query).first()
            if row is None:
                return None
            samples = select(*columns).where(sample_result.c.kept == row[0]).order_by(sample_result.c.sample)
            return row[1], connection.execute(samples).all()

        return self._database.run(act)

    def _insert(self, name: str, value: Any, samples: Sequence[Mapping[str, Any]]) -> _Found:
        """What is kept under the name from now on. Raises IntegrityError for what the tables do not take."""

        def act(connection: Connection) -> None:
            made = insert(kept).values(scope=self._scope, name=name, value=value).returning(kept.c.id)
            number = connection.execute(made).scalar_one()
            if samples:
                connection.execute(insert(sample_result), [{"kept": number, **sample} for sample in samples])

        try:
            self._database.run(act)
        except IntegrityError:  # kept already, by another or by an attempt whose answer was lost
            if self._find(name) is None:
                raise
        found = self._find(name)
        assert found is not None
        return found


_Found = tuple[Any, Sequence[Any]]


def _scores(value: Any, rows: Sequence[Any]) -> Scores:
    answers, scores, kl, nll = zip(*rows, strict=True) if rows else ((), (), (), ())
    realised = tuple((tuple(counts), num) for counts, num in value["realised"])
    return Scores(answers=answers, scores=scores, realised=realised, kl=kl, nll=nll)
