"""A typed client of the HTTP service: hands jobs in, follows them, fetches profiles, promotes.

Needs httpx2 and tenacity beside what `btp` needs. What may be asked twice without harm is asked again where the server
is away, busy, or says when to come back; what may not is asked again only where it was certainly not done.
"""

from __future__ import annotations

import functools
import json
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx2
import tenacity

from autotune.config import AutotuneError
from btp.errors import ProfileError
from btp.profile import Profile

__all__ = ["Client", "Event", "Job", "Promotion", "ServiceError", "Study", "Trial", "Version"]

ATTEMPTS = 8
LONGEST_WAIT_S = 60.0
AWAY = (429, 502, 503, 504)
REFUSED = (429,)  # certainly not done
FINAL = ("succeeded", "failed", "cancelled")
LONGEST_PAUSE_S = 10.0  # where the service does not say when to come back
POLL_S = 1.0


class ServiceError(AutotuneError):
    """The service did not do what was asked. status: 0 where it could not be reached. problem: what it said of it."""

    def __init__(self, status: int, detail: str, problem: Mapping[str, Any] | None = None) -> None:
        super().__init__(detail)
        self.status, self.problem = status, dict(problem or {})


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A job; times in seconds since 1970. state: queued, running, succeeded, failed or cancelled."""

    id: str
    by: str
    settings: Mapping[str, Any]
    state: str
    cancel_requested: bool
    attempt: int
    study: str | None
    outcome: Mapping[str, Any] | None
    reason: str | None
    created: float
    started: float | None
    finished: float | None

    @property
    def is_over(self) -> bool:
        return self.state in FINAL


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """What happened to a job. kind: "state" or "progress"."""

    id: int
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Study:
    """A study. num_told: trials that have finished, of `target`."""

    name: str
    limit: str | None
    sampler: str | None
    seed: int | None
    guard: float | None
    device: str | None
    num_told: int
    target: int
    is_open: bool
    created: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A trial on a front. Ratios are latency to dense's."""

    number: int
    name: str
    plan: Mapping[str, Any]
    score: float | None
    proxy: float | None
    worst_task: float | None
    by_task: Mapping[str, float | None]
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Version:
    """A registered profile, by what is told of it. sha256: of the profile."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    sha256: str
    uri: str
    certified: bool
    reasons: str
    device: str
    device_name: str
    dtype: str
    limit: str
    retention: float | None
    worst_task_retention: float | None
    ratio: float | None
    ratio_high: float | None
    latency_ms: float | None
    latency_high_ms: float | None
    created: float
    study: str
    data_digest: str
    code_version: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Promotion:
    """A row of the promotion log. before, after: versions."""

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


class Client:
    """The service at an address, opened with a key. timeout_s: for one answer.

    All methods raise ServiceError for what the service refuses, and where it stays away.
    """

    def __init__(self, url: str, key: str, timeout_s: float = 30.0) -> None:
        headers = {"Authorization": f"Bearer {key}"}
        self._http = httpx2.Client(base_url=url.rstrip("/"), headers=headers, timeout=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def submit(self, *, idempotency_key: str | None = None, **settings: Any) -> Job:
        """Hand a job in. settings: as of `autotune.submitted.JobSettings`, such as limit="prefill_p50<=0.7x".

        idempotency_key: sent again with the same settings, it is the same job; default: a new one.
        """
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return _made(Job, self._ask("POST", "/v1/jobs", json=settings, headers=headers))

    def job(self, id: str) -> Job:
        return _made(Job, self._ask("GET", f"/v1/jobs/{_word(id)}"))

    def jobs(self) -> Iterator[Job]:
        """Newest first."""
        return self._pages(Job, "/v1/jobs", "jobs")

    def cancel(self, id: str) -> Job:
        """Have a job end, if it has not: at once where it waits, soon where it runs."""
        return _made(Job, self._ask("POST", f"/v1/jobs/{_word(id)}/cancel"))

    def follow(self, id: str, after: int = 0) -> Iterator[Event]:
        """What happens to a job until it has ended, from its beginning on, each event once, whatever breaks off.

        after: only what came after the event of this number.
        """
        while True:
            is_over = self.job(id).is_over
            try:
                for event in self._stream(id, after):
                    yield event
                    after = event.id
                    if event.kind == "state" and event.data.get("state") in FINAL:
                        return
            except httpx2.TransportError:  # broken off; the server may have ended
                continue
            if is_over:
                return

    def wait(self, id: str, timeout_s: float = float("inf")) -> Job:
        """The job once it has ended. Raises TimeoutError."""
        until = time.monotonic() + timeout_s
        while not (job := self.job(id)).is_over:
            if time.monotonic() >= until:
                raise TimeoutError(f"job {id} was to end within {timeout_s:g} s, but is {job.state}; wait longer")
            time.sleep(POLL_S)
        return job

    def studies(self) -> Iterator[Study]:
        """By name."""
        return self._pages(Study, "/v1/studies", "studies")

    def study(self, name: str) -> Study:
        return _made(Study, self._ask("GET", f"/v1/studies/{_word(name)}"))

    def front(self, study: str) -> list[Trial]:
        """The best trials of a study, fastest first."""
        return [_made(Trial, row) for row in self._ask("GET", f"/v1/studies/{_word(study)}/front")["front"]]

    def profiles(self, name: str | None = None) -> list[Version]:
        """Newest first."""
        params = {} if name is None else {"name": name}
        return [_made(Version, row) for row in self._ask("GET", "/v1/profiles", params=params)["versions"]]

    def best(self, max_latency_ms: float, *, device: str = "", name: str | None = None) -> Version:
        """The certified profile that keeps most accuracy within a latency."""
        params = {"max_latency_ms": max_latency_ms, "device": device, **({} if name is None else {"name": name})}
        return _made(Version, self._ask("GET", "/v1/profiles/best", params=params))

    def profile(self, name: str, alias: str) -> Profile:
        """The profile that an alias names now, checked by its digest. Raises ProfileError."""
        said = self._ask("GET", f"/v1/profiles/{_word(name)}/aliases/{_word(alias)}")
        return _profile(said["profile"], str(said["sha256"]))

    def promotions(self, name: str) -> list[Promotion]:
        """The log, newest first."""
        return [_made(Promotion, row) for row in self._ask("GET", _of(name, "promotions"))["promotions"]]

    def promote(self, name: str, version: int, *, why: str, alias: str | None = None) -> Promotion:
        """Have an alias name a version; default: the champion's of its device. Refused by a gate, it is a 409."""
        asked = {"version": version, "why": why, **({} if alias is None else {"alias": alias})}
        return _made(Promotion, self._ask("POST", _of(name, "promotions"), json=asked, once=True))

    def rollback(self, name: str, alias: str, *, why: str) -> Promotion:
        """Have an alias name the version that it named before."""
        asked = {"alias": alias, "why": why}
        return _made(Promotion, self._ask("POST", _of(name, "rollbacks"), json=asked, once=True))

    def _ask(self, method: str, path: str, *, once: bool = False, **sent: Any) -> Any:
        """What is answered. once: not to be done twice."""
        ask = functools.partial(self._http.request, method, path, **sent)
        return _checked(_patiently(ask, once)).json()

    def _pages(self, kind: type[_Row], path: str, rows: str) -> Iterator[_Row]:
        after: dict[str, str] = {}
        while True:
            page = self._ask("GET", path, params=after)
            yield from (_made(kind, row) for row in page[rows])
            if page["next"] is None:
                return
            after = {"after": page["next"]}

    def _stream(self, id: str, after: int) -> Iterator[Event]:
        headers = {"Last-Event-ID": str(after), "Accept": "text/event-stream"}
        request = self._http.build_request("GET", f"/v1/jobs/{_word(id)}/events", headers=headers)
        response = _patiently(functools.partial(self._opened, request), once=False)
        with closing(response):
            for event in httpx2.EventSource(_checked(response)):
                data = event.json()
                assert isinstance(data, dict)
                yield Event(id=int(event.id), kind=event.event, data=data)

    def _opened(self, request: httpx2.Request) -> httpx2.Response:
        """An answer that is read as it comes; one that is an error, whole."""
        response = self._http.send(request, stream=True)
        if response.is_error:
            response.read()
        return response


_Row = TypeVar("_Row", Job, Study, Trial, Version, Promotion)


def _made(kind: type[_Row], row: Mapping[str, Any]) -> _Row:
    """What a newer service says beyond what is known here is left out."""
    known: dict[str, Any] = {field.name: row[field.name] for field in fields(kind)}
    if "aliases" in known:
        known["aliases"] = tuple(known["aliases"])
    return kind(**known)


def _profile(data: Any, sha256: str) -> Profile:
    with tempfile.TemporaryDirectory(prefix="btp-profile-") as folder:
        path = Path(folder) / "profile.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        profile = Profile.load(path)
    if profile.digest != sha256:
        raise ProfileError(f"the profile must have the digest that is registered, {sha256}, got {profile.digest}")
    return profile


def _patiently(ask: Callable[[], httpx2.Response], once: bool) -> httpx2.Response:
    """The answer, asked for again where that may help; the last one where it does not. Raises ServiceError."""
    errors = (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) if once else httpx2.TransportError
    statuses = REFUSED if once else AWAY
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(errors)
        | tenacity.retry_if_result(lambda response: response.status_code in statuses),
        wait=_wait_s,
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        retry_error_callback=_last,
    )
    try:
        return retrying(ask)
    except httpx2.TransportError as error:
        raise ServiceError(0, f"the service must be within reach, but: {error}; is its address right?") from error


def _wait_s(state: tenacity.RetryCallState) -> float:
    """As long as the service says, or else longer from time to time."""
    said = ""
    if state.outcome is not None and not state.outcome.failed:
        response: httpx2.Response = state.outcome.result()
        said = response.headers.get("retry-after", "")
    if said.isdigit():
        return min(float(said), LONGEST_WAIT_S)
    return float(tenacity.wait_random_exponential(multiplier=0.5, max=LONGEST_PAUSE_S)(state))


def _last(state: tenacity.RetryCallState) -> Any:
    """The last answer, or the error that there was instead."""
    assert state.outcome is not None
    return state.outcome.result()


def _checked(response: httpx2.Response) -> httpx2.Response:
    if response.is_success:
        return response
    try:
        said = response.json()
    except ValueError:
        said = None
    problem = said if isinstance(said, dict) else {}
    detail = str(problem.get("detail", "the answer is none of this service; is the address right?"))
    raise ServiceError(response.status_code, f"{response.status_code}: {detail}", problem)


def _word(text: str) -> str:
    return quote(text, safe="")


def _of(name: str, what: str) -> str:
    return f"/v1/profiles/{_word(name)}/{what}"
