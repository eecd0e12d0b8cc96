"""What became of a trial, as every page has it: each page says it in words of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from autotune.objective import Told

__all__ = ["TrialStanding", "standing_of"]

TrialStanding = Literal["stopped", "over", "below", "uncertain", "within"]


def standing_of(told: Told) -> TrialStanding:
    """The first of these that holds.

    "stopped": by racing. "over" the limit, or "below" the guard: surely. "uncertain": its interval holds the limit, or
    its latency was modelled. "within": surely within both.
    """
    if not told.complete:
        return "stopped"
    if told.ratio_low > told.limit:
        return "over"
    if told.guard is not None and told.worst_task < told.guard:
        return "below"
    return "within" if told.feasible and told.measured else "uncertain"
