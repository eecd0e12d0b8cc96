"""Which of the registered profiles to use under a limit: found by their tags, believed as their profiles have it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace

from autotune.registered import NUMBERS, NotRegisteredError, RegistryError, Version
from autotune.version_tags import profile_tags
from btp.profile import Profile

__all__ = ["METRIC", "QUANTILE", "best_of"]

METRIC = "prefill"
QUANTILE = "p50"
DECISIVE = ("certified", "reasons", "device", "device_name", "dtype", "metric", "quantile", *NUMBERS)

logger = logging.getLogger(__name__)


def best_of(
    versions: Iterable[Version],
    profile: Callable[[Version], Profile],
    *,
    max_latency_ms: float,
    device: str = "",
    metric: str = METRIC,
    quantile: str = QUANTILE,
) -> Version:
    """Of the certified versions whose latency keeps to the limit by its upper bound, the one that keeps most accuracy.

    profile: reads a version's profile, checked. A tag can be changed by anyone, so the winner is told as its profile
    has it, and has to win so too; one that cannot be read is left out, with a warning. device: a part of the device's
    name. Only latencies of one metric and quantile are held against each other; a version that does not say which is
    taken as `METRIC` at `QUANTILE`. Raises NotRegisteredError, with what else there is, where there is none.
    """
    left = list(versions)
    read: set[str] = set()
    while True:
        here = [each for each in left if _is_asked_for(each, device.lower(), metric, quantile)]
        proven = [each for each in here if each.certified and each.latency_high_ms is not None]
        able = [each for each in proven if _high(each) <= max_latency_ms]
        if not able:
            raise _none(here, proven, max_latency_ms, f"{metric} {quantile}", device)
        found = max(able, key=lambda each: (each.retention or 0.0, -_high(each), each.created))
        if found.uri in read:
            return found
        left.remove(found)
        try:
            left.append(_as_stored(found, profile(found)))
        except RegistryError as error:
            logger.warning("left out: %s", error)
        read.add(found.uri)


def _is_asked_for(version: Version, device: str, metric: str, quantile: str) -> bool:
    measured = version.metric or METRIC, version.quantile or QUANTILE
    is_here = device in version.device.lower() or device in version.device_name.lower()
    return is_here and measured == (metric, quantile)


def _as_stored(version: Version, profile: Profile) -> Version:
    """The version with all that decides as its profile tells it."""
    known = {"name": version.name, "version": version.version, "uri": version.uri, "run_id": version.run_id}
    told = Version.of_tags(profile_tags(profile), aliases=version.aliases, **known)
    return replace(version, **{name: getattr(told, name) for name in DECISIVE})


def _none(
    here: list[Version], proven: list[Version], max_latency_ms: float, measured: str, device: str
) -> NotRegisteredError:
    where = f" on a device named {device!r}" if device else ""
    if proven:
        fastest = min(proven, key=_high)
        return NotRegisteredError(
            f"no certified version stays within {max_latency_ms:g} ms {measured}{where}; the fastest is {fastest.uri} "
            f"with at most {_high(fastest):.1f} ms on {fastest.device_name}; raise the limit, or tune for a lower one"
        )
    return NotRegisteredError(
        f"no certified version with a latency in milliseconds, {measured}, is there{where}, got {len(here)} others; "
        "autotune profiles list shows them"
    )


def _high(version: Version) -> float:
    return float("inf") if version.latency_high_ms is None else version.latency_high_ms
