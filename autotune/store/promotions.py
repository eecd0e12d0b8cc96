"""The log of promotions, which is written ahead: a row says where an alias is to point, then the alias follows."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, insert, select, update

from autotune.store.database import Database
from autotune.store.tables import Now, promotion

__all__ = ["Promotion", "Promotions", "logged", "unsettled_names"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """An alias was moved from one version to another. at: in seconds since 1970, by the database's clock.

    kind: "promote" or "rollback". applied: whether the registry's alias was seen to follow.
    """

    id: int
    name: str
    alias: str
    kind: str
    before: int | None
    after: int
    who: str
    why: str
    at: float
    applied: bool


class Promotions:
    """What was promoted of one registered model. home: of the registry, so that a name may come again.

    address, made: the registry's, and when the model was made in it, in seconds since 1970: rows from before there were
    homes have the address.
    """

    def __init__(self, database: Database, home: str, name: str, *, address: str, made: float) -> None:
        self._database, self._home, self._name = database, home, name
        before = (promotion.c.registry == address) & (promotion.c.promoted >= made)
        self._mine = (promotion.c.name == name) & ((promotion.c.registry == home) | before)

    def rows(self, alias: str | None = None) -> list[Promotion]:
        """Newest first, of one alias or of all."""
        query = select(promotion).where(self._mine).order_by(promotion.c.id.desc())
        return self._read(query if alias is None else query.where(promotion.c.alias == alias))

    def unsettled(self) -> list[str]:
        """The aliases that are not known to have followed the log."""
        return sorted({row.alias for row in self.rows() if not row.applied})

    @contextmanager
    def locked(self, alias: str, wait_s: float) -> Iterator[None]:
        """Be the one who moves the alias, as far as a lock goes. Raises BusyError after `wait_s` with another at it."""
        with self._database.locked(f"promote {self._home} {self._name}@{alias}", wait_s):
            yield

    def write(self, *, alias: str, kind: str, before: int | None, after: int, who: str, why: str) -> Promotion:
        """Say where the alias is to point; it does not yet."""
        request = uuid.uuid4().hex
        find = select(promotion).where(promotion.c.request == request)
        values = {"kind": kind, "from_version": before, "to_version": after, "who": who, "why": why, "alias": alias}
        values |= {"request": request, "registry": self._home, "name": self._name, "applied": False}
        row = insert(promotion).values(**values, promoted=Now())

        def act(connection: Connection) -> Row[Any]:
            if connection.execute(find).first() is None:  # it may be there, where only the answer was lost
                connection.execute(row)
            return connection.execute(find).one()

        return _promotion(self._database.run(act))

    def applied(self, alias: str, id: int) -> None:
        """The alias was seen to point where this row says, so that no earlier one has to be followed any more."""
        mine = (
            update(promotion).where(self._mine, promotion.c.alias == alias, promotion.c.id <= id).values(applied=True)
        )
        self._database.run(lambda connection: connection.execute(mine))

    def withdraw(self, id: int) -> None:
        """Forget a row that never took hold."""
        mine = delete(promotion).where(self._mine, promotion.c.id == id, promotion.c.applied.is_(False))
        self._database.run(lambda connection: connection.execute(mine))

    def _read(self, query: Select[Any]) -> list[Promotion]:
        if not self._database.exists:
            return []
        rows: Sequence[Row[Any]] = self._database.run(lambda connection: connection.execute(query).all())
        return [_promotion(row) for row in rows]


def unsettled_names(database: Database) -> set[str]:
    """Of registered models, in whatever registry, with an alias that is not known to have followed the log."""
    if not database.exists:
        return set()
    query = select(promotion.c.name).where(promotion.c.applied.is_(False))
    return set(database.run(lambda connection: connection.execute(query).scalars().all()))


def logged(database: Database, name: str | None = None) -> list[Promotion]:
    """What was promoted of a name, or of all, in whatever registry, newest first: for when none can be asked."""
    if not database.exists:
        return []
    query = select(promotion).order_by(promotion.c.id.desc())
    query = query if name is None else query.where(promotion.c.name == name)
    return [_promotion(row) for row in database.run(lambda connection: connection.execute(query).all())]


def _promotion(row: Row[Any]) -> Promotion:
    return Promotion(
        id=row.id,
        name=row.name,
        alias=row.alias,
        kind=row.kind,
        before=row.from_version,
        after=row.to_version,
        who=row.who,
        why=row.why,
        at=row.promoted,
        applied=row.applied,
    )
