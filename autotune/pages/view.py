"""What of which studies a comparison shows, as its page's address says it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, get_args
from urllib.parse import quote, urlencode

from autotune.config import AutotuneError
from autotune.pages.fronts import Axes, X, Y
from autotune.pages.styles import MOST

__all__ = ["HIDEABLE", "X_DIGITS", "X_NAMES", "Y_NAMES", "View"]

X_NAMES: dict[X, str] = {
    "latency": "latency, ratio to dense",
    "ms": "latency, ms",
    "gflops": "GFLOPs of image tokens",
    "cache": "cache of image tokens, MiB",
}
Y_NAMES: dict[Y, str] = {
    "accuracy": "macro accuracy",
    "retention": "accuracy retained of dense",
    "worst": "retained by the worst task",
}
HIDEABLE = {
    "stopped": "stopped by racing",
    "infeasible": "over the limit or below the guard",
    "uncertain": "uncertain",
    "beaten": "beaten by the front",
    "published": "published plans and controls",
    "certified": "certified versions",
    "dense": "dense",
    "bars": "confidence bars",
    "bands": "bands over seeds",
}
"""What can be hidden, by its name in the address."""
X_DIGITS: dict[X, int] = {"latency": 3, "ms": 2, "gflops": 2, "cache": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """What of which studies is shown; the page's address says the same.

    study: None where the address does not say. device, limit, task: only these, where there are any. hide: of
    `HIDEABLE`. point: the chosen one, STUDY/NUMBER.
    """

    study: tuple[str, ...] | None = None
    device: tuple[str, ...] = ()
    limit: tuple[str, ...] = ()
    task: tuple[str, ...] = ()
    x: X = "latency"
    y: Y = "accuracy"
    hide: frozenset[str] = frozenset()
    point: str = ""

    @classmethod
    def of(cls, query: Iterable[tuple[str, str]]) -> View:
        """What an address asks for. Raises AutotuneError for what no page shows."""
        told: dict[str, list[str]] = {}
        for name, value in query:
            told.setdefault(name, []).append(value)
        for name, known in (("x", get_args(X)), ("y", get_args(Y)), ("hide", tuple(HIDEABLE))):
            for value in told.get(name, ()):
                if value not in known:
                    raise AutotuneError(f"{name} must be one of {', '.join(known)}, got {value!r}; choose one")
        studies = _each(told["study"]) if "study" in told else None
        if studies is not None and len(studies) > MOST:
            raise AutotuneError(f"at most {MOST} studies can be told apart, got {len(studies)}; choose fewer")
        last: dict[str, Any] = {name: told[name][-1] for name in ("x", "y", "point") if name in told}
        only: dict[str, Any] = {name: _each(told.get(name, ())) for name in ("device", "limit", "task")}
        return cls(study=studies, hide=frozenset(told.get("hide", ())), **only, **last)

    @property
    def query(self) -> str:
        """As `of` reads it."""
        told: list[tuple[str, str]] = []
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, str):
                told += [(each.name, value)] if value and value != each.default else []
            else:
                told += [(each.name, one) for one in (sorted(value) if each.name == "hide" else value or ())]
        return urlencode(told, quote_via=quote)

    @property
    def axes(self) -> Axes:
        return Axes(self.x, self.y, frozenset(self.task))


def _each(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(filter(None, values)))
