"""What a certificate says: how one finalist did on held-out pictures and in a fresh process, and what it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from btp.intervals import Interval

__all__ = ["Certificate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificate:
    """What held-out pictures and a fresh process say of one finalist, and why it is not certified, where it is not.

    macro, minus_dense: of macro accuracy, 95 % each. p: one-sided, of being worse than dense by the margin or more;
    adjusted_p: by Holm over num_finalists, held against alpha. num_pictures: as `ScoreTable` counts them. retention:
    the share of its dense accuracy that the worst task keeps; guard: the least that it must be. latency: ratio to
    dense in a process of its own, None where it was not measured; limit: what its upper bound must keep to.
    """

    name: str
    macro: Interval
    minus_dense: Interval
    p: float
    adjusted_p: float
    alpha: float
    margin: float
    num_finalists: int
    num_pictures: int
    worst_task: str
    retention: Interval
    guard: float | None
    latency: Interval | None
    limit: float

    @property
    def certified(self) -> bool:
        return not self.reasons

    @property
    def as_good(self) -> bool:
        """Whether the difference to dense is within the margin, the other finalists allowed for."""
        return self.adjusted_p <= self.alpha

    @property
    def reasons(self) -> tuple[str, ...]:
        """What fails, in plain words; nothing where the plan is certified."""
        return (*self._accuracy_reasons(), *self._latency_reasons())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, as it stands in a profile's evidence under "certificate"."""
        return {**asdict(self), "certified": self.certified, "reasons": list(self.reasons)}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Of what `to_dict` gave."""
        told = {each.name: record[each.name] for each in fields(cls)}
        intervals = {name: Interval(**told[name]) for name in ("macro", "minus_dense", "retention")}
        latency = told["latency"] and Interval(**told["latency"])
        return cls(**{**told, **intervals, "latency": latency})

    def _accuracy_reasons(self) -> list[str]:
        found = []
        if not self.as_good:
            found.append(
                f"the difference to dense may be as low as {self.minus_dense.low:+.3f}, and the margin is "
                f"{self.margin:g} (p = {self.adjusted_p:.2g} where the number of finalists is {self.num_finalists}, "
                f"and {self.alpha:g} or less is needed)"
            )
        needed = math.ceil(math.log(self.alpha / self.num_finalists) / math.log1p(-self.margin))
        if not self.as_good and self.num_pictures < needed:
            found.append(
                f"{self.num_pictures} held-out pictures are too few: to show that a difference is within "
                f"{self.margin:g} takes at least {needed}, the number of finalists being {self.num_finalists}"
            )
        if self.guard is not None and self.retention.value < self.guard:
            found.append(
                f"the guard is broken: {self.worst_task} keeps {self.retention.value:.3f} of its dense accuracy, and "
                f"{self.guard:g} is the least it must keep"
            )
        return found

    def _latency_reasons(self) -> list[str]:
        if self.latency is None:
            return ["its latency was not measured in a fresh process"]
        high = self.latency.high
        found = []
        if not high <= self.limit:
            found.append(f"its latency may be as high as {high:.3f} of dense, and the limit is {self.limit:.3f}")
        if not high < 1:
            found.append(f"it may be no faster than dense: its latency may be as high as {high:.3f} of dense")
        return found
