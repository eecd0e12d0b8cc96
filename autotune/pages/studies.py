"""The list of studies, as it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from autotune.pages import words

if TYPE_CHECKING:
    from autotune.store.progress import Standing

__all__ = ["Entry", "Listing", "entry", "model_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """A row. best: the highest score that is feasible. created: seconds since 1970, for sorting."""

    name: str
    model: str
    device: str
    limit: str
    num_told: int
    num_failed: int
    target: int
    best: float | None
    state: str
    age: str
    created: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Listing:
    """A page of them. text: what they were filtered by; number: of this page, from 1."""

    entries: tuple[Entry, ...]
    text: str
    number: int
    num_pages: int
    num_studies: int


def entry(standing: Standing, best: float | None) -> Entry:
    return Entry(
        name=standing.name,
        model=model_of(standing.settings),
        device=standing.device,
        limit=str(standing.settings.get("limit") or ""),
        num_told=standing.num_told,
        num_failed=standing.num_failed,
        target=standing.target,
        best=best,
        state=standing.state,
        age=words.ago(standing.created, standing.now),
        created=standing.created,
    )


def model_of(settings: Mapping[str, Any]) -> str:
    """A model's own name; of a folder what it is registered as, for where it lies is its host's affair."""
    text, name = (str(settings.get(key) or "") for key in ("model", "name"))
    path = PurePath(text)
    return name or path.name if path.is_absolute() else text
