"""Spans of time as pages say them."""

from __future__ import annotations

__all__ = ["ago", "duration"]

MINUTE, HOUR, DAY = 60, 3600, 86400


def duration(seconds: float) -> str:
    """In at most two units."""
    whole = max(0, round(seconds))
    if whole < 2 * MINUTE:
        return f"{whole} s"
    if whole < 2 * HOUR:
        return f"{whole // MINUTE} min"
    if whole < 2 * DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    return f"{whole // DAY} d {whole % DAY // HOUR} h"


def ago(at: float, now: float) -> str:
    return f"{duration(now - at)} ago"
