"""API keys: shown once, kept as a hash, found by a prefix that is no secret; and sessions, opened with one."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from autotune.config import AutotuneError
from autotune.store.database import Database
from autotune.store.tables import Now, api_key, session

__all__ = ["SCOPES", "Key", "Keys"]

SCOPES = ("read", "submit", "promote")
PREFIX_BYTES = 6
SECRET_BYTES = 32
_FORM = re.compile(r"btp_([0-9a-f]{12})_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[\w.@+-][\w.@+ -]{0,99}")
_NOBODY = hashlib.sha256(secrets.token_bytes(SECRET_BYTES)).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """What is known of a key; times in seconds since 1970. name: who it speaks for, such as in the promotion log."""

    id: int
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created: float
    expires: float | None
    revoked: float | None


class Keys:
    """The keys of one service."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, scopes: Collection[str], expires_s: float | None = None) -> str:
        """A new key, which nobody can show again. Raises AutotuneError for a name that is taken, also by a revoked one.

        expires_s: from now on; None for never.
        """
        _check(name, scopes, expires_s)
        prefix = secrets.token_hex(PREFIX_BYTES)
        text = f"btp_{prefix}_{secrets.token_urlsafe(SECRET_BYTES)}"
        values = {
            "name": name,
            "prefix": prefix,
            "hash": _hash(text),
            "scopes": [scope for scope in SCOPES if scope in scopes],
            "created": Now(),
            "expires": None if expires_s is None else Now() + expires_s,
        }

        def work(connection: Connection) -> None:
            known = connection.execute(select(api_key.c.prefix).where(api_key.c.name == name)).scalar()
            if known is None:
                connection.execute(insert(api_key).values(values))
            elif known != prefix:
                raise AutotuneError(
                    f"a key's name must be new, for it stands in the promotion log, got {name!r}; choose another"
                )

        try:
            self._database.run(work)
        except IntegrityError:  # another took the name at the same moment
            self._database.run(work)
        return text

    def find(self, text: str) -> Key | None:
        """Whose key this is; None for one that is unknown, revoked or past its time.

        Takes as long for a prefix that nobody has as for a wrong secret; what has not the form of a key is not looked
        for.
        """
        form = _FORM.fullmatch(text)
        if form is None:
            return None
        valid = select(api_key).where(api_key.c.prefix == form[1], *_good())
        row = self._database.run(lambda connection: connection.execute(valid).mappings().first())
        same = hmac.compare_digest(_hash(text), _NOBODY if row is None else row["hash"])
        return _key(row) if row is not None and same else None

    def revoke(self, name: str) -> None:
        """Have a key open nothing any more. Raises AutotuneError where there is none of this name."""
        mine = api_key.c.name == name
        once = update(api_key).where(mine, api_key.c.revoked.is_(None)).values(revoked=Now())

        def work(connection: Connection) -> None:
            if (
                connection.execute(once).rowcount == 0
                and connection.execute(select(api_key).where(mine)).first() is None
            ):
                raise AutotuneError(f"a key must be there to be revoked, got {name!r}; see autotune keys list")

        self._database.run(work)

    def open_session(self, key: Key, seconds: float) -> str:
        """A token that stands for a key for so long, unless the key ends before; sessions that are over are deleted."""
        token = secrets.token_urlsafe(SECRET_BYTES)
        values = {"hash": _hash(token), "key": key.id, "created": Now(), "expires": Now() + seconds}

        def work(connection: Connection) -> None:
            connection.execute(delete(session).where(session.c.expires <= Now()))
            if connection.execute(select(session.c.key).where(session.c.hash == values["hash"])).first() is None:
                connection.execute(insert(session).values(values))

        self._database.run(work)
        return token

    def session(self, token: str) -> Key | None:
        """Whose session this is; None for one that is unknown, closed or over, or whose key opens nothing any more."""
        if not token:
            return None
        mine = session.c.hash == _hash(token), session.c.expires > Now()
        valid = select(api_key).join(session, session.c.key == api_key.c.id).where(*mine, *_good())
        row = self._database.run(lambda connection: connection.execute(valid).mappings().first())
        return None if row is None else _key(row)

    def close_session(self, token: str) -> None:
        """Have a token stand for nothing any more; it may do so already."""
        mine = delete(session).where(session.c.hash == _hash(token))
        self._database.run(lambda connection: connection.execute(mine))

    def all(self) -> list[Key]:
        """Every key that ever was, oldest first."""
        rows = self._database.run(lambda c: c.execute(select(api_key).order_by(api_key.c.id)).mappings().all())
        return [_key(row) for row in rows]


def _check(name: str, scopes: Collection[str], expires_s: float | None) -> None:
    if not _NAME.fullmatch(name):
        raise AutotuneError(
            f"a key's name must be up to 100 letters, digits, spaces and . @ + - _, got {name!r}; name who uses it"
        )
    if not scopes or not set(scopes) <= set(SCOPES):
        raise AutotuneError(f"--scopes must be some of {','.join(SCOPES)}, got {','.join(sorted(scopes))!r}")
    if expires_s is not None and not expires_s > 0:
        raise AutotuneError(f"a key must last for some time, got {expires_s:g} s; leave it out for one without an end")


def _good() -> tuple[ColumnElement[bool], ...]:
    """What is so of every key that opens something."""
    return or_(api_key.c.expires.is_(None), api_key.c.expires > Now()), api_key.c.revoked.is_(None)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _key(row: RowMapping) -> Key:
    return Key(**{**{name: row[name] for name in Key.__dataclass_fields__}, "scopes": tuple(row["scopes"])})
