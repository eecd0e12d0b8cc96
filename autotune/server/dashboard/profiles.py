"""The pages of registered profiles, and the two forms that move an alias."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Form, Query, Request, Response
from starlette.responses import RedirectResponse

from autotune.config import AutotuneError
from autotune.pages.profile import Chosen, Compared, chosen_of, compared, log_line, model_lines, version_line
from autotune.profiles import Promotion, stack_of
from autotune.redaction import redacted, without_passwords
from autotune.registered import GateError, NotRegisteredError, RegistryError, Version
from autotune.server.dashboard.asking import AwayError, see_through, within_patience
from autotune.server.dashboard.sessions import Promoter, Viewer, check_form, render
from autotune.server.schemas import LARGEST, ModelPath
from autotune.server.service import Service, ServiceParameter
from autotune.store.promotions import logged
from btp.profile import Profile

__all__ = ["router"]

logger = logging.getLogger(__name__)

router = APIRouter(include_in_schema=False)

Number = Annotated[int | None, Query(ge=1, le=LARGEST)]
Diff = Annotated[str, Query(pattern=r"^([1-9][0-9]{0,8}\.\.[1-9][0-9]{0,8})?$", max_length=30)]
Csrf = Annotated[str, Form(max_length=200)]
Why = Annotated[str, Form(max_length=2000)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a form had in it, for the page that says why it was refused."""

    alias: str = ""
    why: str = ""


@router.get("/profiles")
def profiles(
    request: Request,
    key: Viewer,
    service: ServiceParameter,
    q: Annotated[str, Query(max_length=250)] = "",
    certified: Annotated[bool, Query()] = False,
) -> Response:
    asked: dict[str, Any] = {"text": q, "certified": certified}
    try:
        versions = within_patience(service, service.profiles.list)
    except AwayError as error:
        told = [log_line(row) for row in logged(service.database)]
        last = {(row.name, row.alias): row for row in reversed(told)}
        rows = sorted(last.values(), key=lambda row: (row.name, row.alias))
        return render(request, "profiles.html.jinja", models=[], **asked, away=_sentence(error), logged=rows)
    models = model_lines(versions, _address(service), q, certified)
    return render(request, "profiles.html.jinja", models=models, **asked, away="", logged=[])


@router.get("/profiles/{name}")
def profile(
    name: ModelPath,
    request: Request,
    key: Viewer,
    service: ServiceParameter,
    version: Number = None,
    diff: Diff = "",
    done: Number = None,
) -> Response:
    return _page(request, service, name, version, diff, done=done)


@router.post("/profiles/{name}/promote")
def promote(
    name: ModelPath,
    request: Request,
    key: Promoter,
    service: ServiceParameter,
    version: Annotated[int, Form(ge=1, le=LARGEST)],
    alias: Annotated[str, Form(max_length=1000)] = "",
    why: Why = "",
    csrf: Csrf = "",
) -> Response:
    check_form(request, csrf)

    def move() -> Promotion:
        found = service.profiles.find(f"models:/{name}/{version}")
        return service.profiles.promote(found, who=key.name, why=why, alias=alias or None)

    return _moved(request, service, name, move, version, Asked(alias=alias, why=why))


@router.post("/profiles/{name}/rollback")
def roll_back(
    name: ModelPath,
    request: Request,
    key: Promoter,
    service: ServiceParameter,
    alias: Annotated[str, Form(max_length=1000)],
    why: Why = "",
    csrf: Csrf = "",
) -> Response:
    check_form(request, csrf)
    return _moved(
        request, service, name, lambda: service.profiles.rollback(name, alias, who=key.name, why=why), None, Asked()
    )


def _moved(
    request: Request, service: Service, name: str, move: Callable[[], Promotion], version: int | None, asked: Asked
) -> Response:
    """On to the page that says so; or the page again with what stood against it.

    Raises NotRegisteredError, StoreError.
    """
    try:
        row = see_through(service, move)
    except NotRegisteredError:
        raise
    except AwayError as error:
        return _page(request, service, name, version, "", status=503, refused=_sentence(error), asked=asked)
    except AutotuneError as error:
        if isinstance(error, RegistryError) and not isinstance(error, GateError):
            raise
        status = 409 if isinstance(error, GateError) else 422
        return _page(request, service, name, version, "", status=status, refused=redacted(str(error)), asked=asked)
    return RedirectResponse(f"/profiles/{quote(name, safe='')}?version={row.after}&done={row.id}", 303)


def _page(
    request: Request,
    service: Service,
    name: str,
    number: int | None,
    diff: str,
    *,
    status: int = 200,
    done: int | None = None,
    refused: str = "",
    asked: Asked | None = None,
) -> Response:
    away = ""
    try:
        versions, log = within_patience(service, lambda: (service.profiles.list(name), service.profiles.log(name)))
    except AwayError as error:
        versions, log, away = [], logged(service.database, name), f"{_sentence(error)} This is what the database knows."
    registry = _address(service)
    shown = _Shown(service, versions, registry)
    chosen = shown.chosen(name, number)
    told = [log_line(row) for row in log]
    return render(
        request,
        "profile.html.jinja",
        status=status,
        name=name,
        lines=[version_line(version, registry) for version in versions],
        chosen=chosen,
        trial=shown.trial(chosen),
        diff=shown.diff(name, diff),
        unread=" ".join(shown.unread),
        log=told,
        backs=_ways_back(log),
        done=next((line for line, row in zip(told, log, strict=True) if row.id == done), None),
        refused=refused,
        asked=asked or Asked(),
        away=away,
    )


class _Shown:
    """What a page shows of versions whose profiles have to be read. unread: which could not be, in words."""

    def __init__(self, service: Service, versions: Sequence[Version], registry: str) -> None:
        self._service, self._versions, self._registry = service, versions, registry
        self._read: dict[int, Profile | None] = {}
        self.unread: list[str] = []

    def chosen(self, name: str, number: int | None) -> Chosen | None:
        """The version of the number, the newest without one. Raises NotRegisteredError."""
        if not self._versions:
            return None
        version = self._versions[0] if number is None else self._version(name, number)
        found = self._profile(version)
        return None if found is None else chosen_of(version, found, self._registry)

    def diff(self, name: str, text: str) -> Compared | None:
        if not text or not self._versions:
            return None
        versions = [self._version(name, int(number)) for number in text.split("..")]
        found = [profile for profile in map(self._profile, versions) if profile is not None]
        return compared(versions, found, self._registry) if len(found) == 2 else None

    def trial(self, chosen: Chosen | None) -> int | None:
        """The number that the version's plan has in its study, where this database has the study."""
        if chosen is None or not chosen.line.study:
            return None
        found = self._read[chosen.line.number]
        row = self._service.studies.get(chosen.line.study)
        if found is None or row is None:
            return None
        told, _ = self._service.told.of(row.name, row.created)
        return next((each.number for each in told if each.plan == found.plan), None)

    def _version(self, name: str, number: int) -> Version:
        found = next((version for version in self._versions if version.version == number), None)
        if found is None:
            there = ", ".join(str(version.version) for version in self._versions)
            raise NotRegisteredError(f"{name!r} has no version {number}; it has: {there}")
        return found

    def _profile(self, version: Version) -> Profile | None:
        if version.version not in self._read:
            self._read[version.version] = self._asked(version)
        return self._read[version.version]

    def _asked(self, version: Version) -> Profile | None:
        try:
            return within_patience(self._service, lambda: self._service.profiles.profile(version))
        except RegistryError as error:
            logger.warning("%s could not be read: %s", version.uri, without_passwords(str(error)))
            self.unread.append(f"The profile of version {version.version} could not be read, or was changed since.")
            return None


def _ways_back(log: Sequence[Promotion]) -> list[tuple[str, int]]:
    """The aliases that were on another version before, each with the one it would go back to. log: newest first."""
    found = []
    for alias in sorted({row.alias for row in log}):
        stack = stack_of([row for row in reversed(log) if row.alias == alias])
        if len(stack) > 1:
            found.append((alias, stack[-2]))
    return found


def _address(service: Service) -> str:
    return service.profiles.registry.address if service.settings.place.registry else ""


def _sentence(error: AwayError) -> str:
    text = str(error)
    return f"{text[0].upper()}{text[1:]}."
