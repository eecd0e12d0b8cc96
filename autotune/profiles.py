"""Registered profiles and who may be champion: promotions with gates, one at a time, written to a log.

MLflow's aliases have no compare-and-swap, so a lock of the database stands in for it. Under the lock the log is written
first and the alias follows. A lock can be lost without a word, so whoever has moved an alias reads the log again, until
the last row is the one that the alias was moved to. After a crash in between, the alias follows as soon as anyone comes
through here, who knows the log: promotions, the service, and the commands beside the log's database. A host that asks
MLflow alone sees the alias where it was until then.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict

from autotune.config import STORAGE, AutotuneError
from autotune.portfolio import METRIC, QUANTILE, best_of
from autotune.registered import GateError, NotRegisteredError, Reference, RegistryError, Version, is_alias
from autotune.registry import Registry
from autotune.store import Database
from autotune.store.database import BusyError
from autotune.store.promotions import Promotion, Promotions, unsettled_names
from autotune.version_tags import part_of
from btp.profile import Profile
from btp.sealed import sha256_of

__all__ = [
    "GateError",
    "NotRegisteredError",
    "Profiles",
    "Promotion",
    "RegistryError",
    "Version",
    "promotion_database",
    "stack_of",
]

CHAMPION = "champion-"
"""An alias that begins so names a device: only what was measured there may have it."""
CANDIDATE = "candidate-"
"""And one that begins so is at what was registered last, whatever the log says."""
WAIT_S = 30.0  # for another's promotion
_Log = list[Promotion]
_Choice = Callable[[int | None, Sequence[Promotion]], int]
"""Picks the version to promote: told the current one and the log, oldest row first."""


def promotion_database(registry: Registry, storage: str | None) -> Database:
    """Where the log of a registry's promotions lies: at the address given, or in study.db beside a local registry.

    Raises RegistryError for a server's registry without an address: whoever promotes there must name the same one.
    """
    if storage is not None:
        return Database(storage)
    if registry.file is None:
        raise RegistryError(
            f"the log of promotions needs a database beside a server, got none for {registry.address}; name the "
            f"studies' one with --storage or {STORAGE}"
        )
    return Database(f"sqlite:///{registry.file.with_name('study.db')}")


class Profiles:
    """The profiles in a registry, and the log of their promotions in a database, which may be the studies'."""

    def __init__(self, registry: Registry, database: Database) -> None:
        self.registry, self._database = registry, database

    def settle(self, name: str | None = None) -> None:
        """Have every alias of `name`, or of all names in the registry, follow its log.

        One that another process is at is left to it: nobody who only reads waits for a promotion.
        """
        stale = unsettled_names(self._database)
        if stale:
            stale &= {name} if name else {version.name for version in self.registry.versions()}
        for each in sorted(stale):
            self._settle_all(each)

    def list(self, name: str | None = None) -> list[Version]:
        """Every version of `name`, or of all names, newest first. Raises NotRegisteredError for an unknown name."""
        self.settle(name)
        return self.registry.versions(name)

    def find(self, reference: str) -> Version:
        """The version that models:/NAME@ALIAS or models:/NAME/VERSION names. Raises NotRegisteredError."""
        wanted = Reference.parse(reference)
        self.settle(wanted.name)
        return self.registry.find(wanted)

    def profile(self, version: Version) -> Profile:
        """The version's profile, downloaded and checked. Raises RegistryError."""
        return self.registry.profile(version)

    def best(
        self,
        *,
        max_latency_ms: float,
        device: str = "",
        name: str | None = None,
        metric: str = METRIC,
        quantile: str = QUANTILE,
    ) -> Version:
        """The certified version that keeps most accuracy within the limit. Raises NotRegisteredError if there is none.

        The limit holds for the upper bound of the latency. device: a part of the device's name. What is answered is as
        the version's profile has it, not as its tags do.
        """
        asked = {"device": device, "metric": metric, "quantile": quantile}
        return best_of(self.list(name), self.profile, max_latency_ms=max_latency_ms, **asked)

    def promote(self, version: Version, *, who: str, why: str, alias: str | None = None) -> Promotion:
        """Have an alias point to a version, by default the champion's of its device, and log it.

        What counts is the profile that is stored, not a tag, which anyone can change, and every file beside it is
        checked. One that the alias and its log name already is left alone. Raises GateError with every gate that
        failed, RegistryError where the version is gone or was changed, StoreError where another promotion takes longer
        than `WAIT_S`; the alias stays where it is then. Where the registry fails in the middle, the log stands, and the
        alias follows later, as `settle` has it.
        """
        alias = alias or CHAMPION + self.profile(version).device.slug
        return self._move(version.name, alias, "promote", lambda now, log: version.version, who, why)

    def rollback(self, name: str, alias: str, *, who: str, why: str) -> Promotion:
        """Promote the version that the alias was on before, through the same gates; again, the one before that.

        Raises GateError where there is none.
        """

        def before(now: int | None, log: Sequence[Promotion]) -> int:
            if now is None and not log:
                raise NotRegisteredError(f"{name} has no alias {alias!r}; autotune profiles list shows which there are")
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
        self.settle(name)
        return self._promotions(name).rows(alias)

    def _promotions(self, name: str) -> Promotions:
        made = self.registry.made(name)
        home = f"made {round(1000 * made)}"
        return Promotions(self._database, home, name, address=self.registry.tracking_uri, made=made)

    def _move(self, name: str, alias: str, kind: str, choose: _Choice, who: str, why: str) -> Promotion:
        _check_words(alias, who, why)
        log = self._promotions(name)
        with log.locked(alias, WAIT_S):
            self._settle(log, name, alias)
            rows = log.rows(alias)
            now = self.registry.pointed(name, alias)
            after = choose(now, rows[::-1])
            version = self.registry.find(Reference(name, version=after))
            if rows and rows[0].after == now == after:
                return rows[0]
            if failed := failed_gates(self.registry.checked(version), alias, version.manifest):
                raise GateError(f"{version.uri} must not be {alias}: {'; '.join(failed)}; promote another version")
            row = log.write(alias=alias, kind=kind, before=now, after=after, who=who, why=why)
            self._settle(log, name, alias)
            found = next((each for each in log.rows(alias) if each.id == row.id), None)
        if found is None:
            raise NotRegisteredError(f"{version.uri} was deleted in the middle; {name}@{alias} is where it was")
        return found

    def _settle_all(self, name: str) -> None:
        try:
            log = self._promotions(name)
        except NotRegisteredError:
            return
        for alias in log.unsettled():
            with suppress(BusyError), log.locked(alias, 0.0):
                self._settle(log, name, alias)

    def _settle(self, log: Promotions, name: str, alias: str) -> None:
        """Have the alias follow the last row, where it is not known to; only under the lock, which may be lost.

        A row that another process has written and followed in the meantime is followed once more: its alias may have
        been moved back by this one. A row whose version was deleted before the alias could follow is taken back.
        """
        pointed: int | None = None
        while rows := log.rows(alias):
            last = rows[0]
            if last.id == pointed or (pointed is None and all(row.applied for row in rows)):
                return
            try:
                self.registry.point(name, alias, last.after)
            except NotRegisteredError:
                if not last.applied:
                    log.withdraw(last.id)
                    continue
            log.applied(alias, last.id)
            pointed = last.id


def _check_words(alias: str, who: str, why: str) -> None:
    """Raise AutotuneError for what the registry or the log could not take: a row whose alias cannot follow is stuck."""
    if not is_alias(alias) or alias.casefold().startswith(CANDIDATE):
        raise AutotuneError(
            "an alias is made of letters, digits, _ and -, at most 250, begins with one of the former two but not with "
            f"candidate-, and is neither latest nor v1 and the like, got {alias!r}; choose another"
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


def failed_gates(profile: Profile, alias: str, manifest: str) -> list[str]:
    """Why a profile must not have an alias, in plain words; nothing where it may. manifest: its folder's digest.

    Profiles from before it was kept do not tell on which device key their latency was measured, and are not asked.
    """
    own = CHAMPION + profile.device.slug
    certificate = part_of(profile.evidence, "certificate")
    high, limit = part_of(certificate, "latency").get("high"), certificate.get("limit")
    highs = [high, part_of(part_of(profile.evidence, "latency"), "ratio").get("high")]
    measured = [each for each in highs if isinstance(each, int | float)]
    key = part_of(profile.evidence, "latency").get("device_key")
    failed = []
    if key is not None and key != sha256_of(asdict(profile.device)):
        failed.append("its latency was measured on another device key than its own")
    if not profile.certified:
        failed.append(f"it is not certified: {'; '.join(profile.uncertified_because)}")
    if not manifest:
        failed.append("it has no manifest that its evidence could be checked by")
    if alias.casefold().startswith(CHAMPION) and alias != own:
        failed.append(f"its latency was measured on {profile.device.name}, whose champion is {own}")
    if not (isinstance(high, int | float) and isinstance(limit, int | float)):
        failed.append("its certificate has no latency that was held against a limit")
    elif not high <= limit:
        failed.append(f"its latency may be as high as {high:.3f} of dense, and its limit is {limit:.3f}")
    if measured and not max(measured) < 1:
        failed.append(f"it may be no faster than dense: its latency may be as high as {max(measured):.3f} of dense")
    return failed
