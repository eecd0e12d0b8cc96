"""Registered profiles and who may be champion: promotions with gates, one at a time, written to a log.

MLflow's aliases have no compare-and-swap, so a lock of the database stands in for it. Under the lock the log is written
first and the alias follows; whoever comes next, after a crash in between, has the alias follow first. An alias is where
the last row of its log says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from autotune.config import AutotuneError
from autotune.registered import GateError, NotRegisteredError, Reference, RegistryError, Version, best_of
from autotune.registry import Registry
from autotune.store import Database
from autotune.store.promotions import Promotion, Promotions, unsettled_names
from autotune.version_tags import part_of
from btp.profile import Profile

__all__ = ["GateError", "NotRegisteredError", "Profiles", "Promotion", "RegistryError", "Version", "stack_of"]

CHAMPION = "champion-"
"""An alias that begins so names a device: only what was measured there may have it."""
ALIAS = re.compile(r"(?!(?:latest|v\d+)$)[a-z0-9_-]{1,255}", re.ASCII | re.IGNORECASE)
_Log = list[Promotion]
_Choice = Callable[[int | None, Sequence[Promotion]], int]
"""Picks the version to promote: told the current one and the log, oldest row first."""


class Profiles:
    """The profiles in a registry, and the log of their promotions in a database, which may be the studies'."""

    def __init__(self, registry: Registry, database: Database) -> None:
        self.registry, self._database = registry, database

    def list(self, name: str | None = None) -> list[Version]:
        """Every version of `name`, or of all names, newest first. Raises NotRegisteredError for an unknown name."""
        found = self.registry.versions(name)
        stale = {version.name for version in found} & unsettled_names(self._database)
        settled = [self._settled(each) for each in sorted(stale)]
        return self.registry.versions(name) if any(settled) else found

    def find(self, reference: str) -> Version:
        """The version that models:/NAME@ALIAS or models:/NAME/VERSION names. Raises NotRegisteredError."""
        wanted = Reference.parse(reference)
        self._settled(wanted.name)
        return self.registry.find(wanted)

    def profile(self, version: Version) -> Profile:
        """The version's profile, downloaded and checked. Raises RegistryError."""
        return self.registry.profile(version)

    def best(self, *, max_latency_ms: float, device: str = "", name: str | None = None) -> Version:
        """The certified version that keeps most accuracy within the limit. Raises RegistryError where there is none.

        The limit holds for the upper bound of the latency. device: a part of the device's name.
        """
        return best_of(self.list(name), max_latency_ms, device)

    def promote(self, version: Version, *, who: str, why: str, alias: str | None = None) -> Promotion:
        """Have an alias point to a version, by default the champion's of its device, and log it.

        What counts is the profile that is stored, not a tag, which anyone can change. One that the alias and its log
        name already is left alone. Raises GateError with every gate that failed, RegistryError where the version is
        gone or was changed; the alias stays where it is then. Where the registry fails in the middle, the log stands,
        and the alias follows as soon as anyone asks.
        """
        alias = alias or CHAMPION + self.profile(version).device.slug
        return self._move(version.name, alias, "promote", lambda now, log: version.version, who, why)

    def rollback(self, name: str, alias: str, *, who: str, why: str) -> Promotion:
        """Promote the version that the alias was on before, through the same gates; again, the one before that.

        Raises GateError where there is none.
        """

        def before(now: int | None, log: Sequence[Promotion]) -> int:
            stack = stack_of(log)
            if stack and stack[-1] == now:
                stack.pop()
            if not stack:
                raise GateError(
                    f"an alias rolls back to where it was before, but {name}@{alias} was on no other version; "
                    "promote the one you want"
                )
            return stack[-1]

        return self._move(name, alias, "rollback", before, who, why)

    def log(self, name: str, alias: str | None = None) -> _Log:
        """What was promoted, newest first. Raises NotRegisteredError for an unknown name."""
        self._settled(name)
        return self._promotions(name).rows(alias)

    def _promotions(self, name: str) -> Promotions:
        return Promotions(self._database, self.registry.home(name), name)

    def _move(self, name: str, alias: str, kind: str, choose: _Choice, who: str, why: str) -> Promotion:
        _check_words(alias, who, why)
        log = self._promotions(name)
        with log.locked(alias):
            self._settle(log, name, alias)
            rows = log.rows(alias)
            now = self.registry.pointed(name, alias)
            after = choose(now, rows[::-1])
            version = self.registry.find(Reference(name, version=after))
            if rows and rows[0].after == now == after:
                return rows[0]
            if failed := failed_gates(self.profile(version), alias):
                raise GateError(f"{version.uri} must not be {alias}: {'; '.join(failed)}; promote another version")
            row = log.write(alias=alias, kind=kind, before=now, after=after, who=who, why=why)
            self._settle(log, name, alias)
            found = next((each for each in log.rows(alias) if each.id == row.id), None)
        if found is None:
            raise NotRegisteredError(f"{version.uri} was deleted in the middle; {name}@{alias} is where it was")
        return found

    def _settled(self, name: str) -> bool:
        """Have every alias of the name follow its log; whether one had not."""
        if name not in unsettled_names(self._database):
            return False
        log = self._promotions(name)
        aliases = log.unsettled()
        for alias in aliases:
            with log.locked(alias):
                self._settle(log, name, alias)
        return bool(aliases)

    def _settle(self, log: Promotions, name: str, alias: str) -> None:
        """Have the alias follow the last row, where it is not known to; only under the lock.

        A row whose version was deleted before the alias could follow is taken back.
        """
        while (rows := log.rows(alias)) and not all(row.applied for row in rows):
            try:
                self.registry.point(name, alias, rows[0].after)
            except NotRegisteredError:
                if not rows[0].applied:
                    log.withdraw(rows[0].id)
                    continue
            log.applied(alias)


def _check_words(alias: str, who: str, why: str) -> None:
    """Raise AutotuneError for what the registry or the log could not take: a row whose alias cannot follow is stuck."""
    if not ALIAS.fullmatch(alias):
        raise AutotuneError(
            f"an alias is made of letters, digits, _ and -, and is neither latest nor v1 and the like, got {alias!r}"
        )
    for name, text, most in (("who", who, 255), ("why", why, 5000)):
        if not text.strip() or len(text) > most or "\0" in text:
            raise AutotuneError(
                f"{name} must be a text of at most {most} characters, got {text[:80]!r}; the log needs it"
            )


def stack_of(log: Sequence[Promotion]) -> list[int]:
    """The versions an alias was on, the current one last: promotions push, rollbacks pop. log: oldest row first."""
    stack: list[int] = []
    for row in log:
        if row.before is not None and (not stack or stack[-1] != row.before):
            stack.append(row.before)  # moved there past the log, or before there was one
        if row.kind == "rollback" and stack:
            stack.pop()
        if not stack or stack[-1] != row.after:
            stack.append(row.after)
    return stack


def failed_gates(profile: Profile, alias: str) -> list[str]:
    """Why a profile must not have an alias, in plain words; nothing where it may."""
    own = CHAMPION + profile.device.slug
    certificate = part_of(profile.evidence, "certificate")
    high, limit = part_of(certificate, "latency").get("high"), certificate.get("limit")
    highs = [high, part_of(part_of(profile.evidence, "latency"), "ratio").get("high")]
    measured = [each for each in highs if isinstance(each, int | float)]
    failed = []
    if not profile.certified:
        failed.append(f"it is not certified: {'; '.join(profile.uncertified_because)}")
    if alias.startswith(CHAMPION) and alias != own:
        failed.append(f"its latency was measured on {profile.device.name}, whose champion is {own}")
    if not (isinstance(high, int | float) and isinstance(limit, int | float)):
        failed.append("its certificate has no latency that was held against a limit")
    elif not high <= limit:
        failed.append(f"its latency may be as high as {high:.3f} of dense, and its limit is {limit:.3f}")
    if measured and not max(measured) < 1:
        failed.append(f"it may be no faster than dense: its latency may be as high as {max(measured):.3f} of dense")
    return failed
