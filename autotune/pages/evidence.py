"""What a profile's evidence says: its certificate claim by claim, and what it was held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.pages.figures import MINUS, NOT_KNOWN, Range, percent, range_of
from autotune.version_tags import part_of
from btp.profile import Profile

__all__ = ["Claim", "Row", "claims_of", "rows_of", "verdict_of"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A line of a certificate. holds: None for what is only told."""

    what: str
    found: str
    needed: str = ""
    holds: bool | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A plan of the final table, scored on held-out pictures; latency is the ratio to dense.

    minus: by how many points of macro accuracy the registered plan is better.
    """

    name: str
    macro: str
    minus: str
    worst: str
    latency: str
    image_gflops: str


def verdict_of(profile: Profile) -> str:
    certificate = part_of(profile.evidence, "certificate")
    if not profile.certified:
        return f"Not certified: {'; '.join(profile.uncertified_because)}."
    pictures, margin = certificate.get("num_pictures"), certificate.get("margin")
    where = f" on {pictures} held-out pictures" if pictures else " on held-out pictures"
    within = f", within a margin of {100 * margin:g} points" if isinstance(margin, int | float) else ""
    return f"Certified: as accurate as dense{where}{within}, and within its latency limit in a process of its own."


def claims_of(profile: Profile) -> tuple[Claim, ...]:
    certificate = part_of(profile.evidence, "certificate")
    macro, minus, kept, latency = (
        range_of(certificate.get(key)) for key in ("macro", "minus_dense", "retention", "latency")
    )
    number = {key: told for key, told in certificate.items() if isinstance(told, int | float)}
    margin, limit, guard = number.get("margin"), number.get("limit"), number.get("guard")
    claims = []
    if macro:
        claims.append(Claim(what="Macro accuracy", found=macro.text()))
    if minus:
        p, alpha = number.get("adjusted_p"), number.get("alpha")
        sure = p is not None and alpha is not None
        needed = "" if margin is None else f"surely above {MINUS}{100 * margin:g}"
        needed += f": p = {p:.2g} must be at most {alpha:g}" if sure else ""
        holds = p <= alpha if p is not None and alpha is not None else None
        claims.append(Claim(what="Difference to dense, points", found=_points(minus), needed=needed, holds=holds))
    if kept:
        needed, holds = ("", None) if guard is None else (f"at least {percent(guard)}", kept.value >= guard)
        what = f"Worst task, {certificate.get('worst_task', '')}, keeps"
        claims.append(Claim(what=what, found=f"{kept.times(100).text('.1f')} %", needed=needed, holds=holds))
    if latency:
        high = latency.ends[1]
        needed, holds = ("", None) if limit is None else (f"upper bound at most {limit:.3f}", high <= limit)
        claims.append(Claim(what="Latency, of dense", found=latency.text(), needed=needed, holds=holds))
        claims.append(Claim(what="Faster than dense", found=f"{high:.3f} at most", needed="below 1", holds=high < 1))
    for key, what in (("num_pictures", "Held-out pictures"), ("num_finalists", "Finalists that were held against it")):
        if key in number:
            claims.append(Claim(what=what, found=f"{number[key]:g}"))
    return tuple(claims)


def rows_of(profile: Profile) -> tuple[Row, ...]:
    minus = part_of(profile.evidence, "tuned_minus")
    return tuple(_row(row, minus) for row in profile.evidence.get("rows", ()) if isinstance(row, Mapping))


def _row(row: Mapping[str, Any], minus: Mapping[str, Any]) -> Row:
    name = str(row.get("name", ""))
    better = range_of(minus.get(name))
    macro, worst, latency = (range_of(row.get(key)) for key in ("macro", "worst", "latency"))
    gflops = row.get("image_gflops")
    return Row(
        name=name,
        macro=_text(macro),
        minus=NOT_KNOWN if better is None else _points(better),
        worst=f"{row.get('worst_task', '')} {_text(worst)}".strip(),
        latency=_text(latency),
        image_gflops=f"{gflops:.3f}" if isinstance(gflops, int | float) else NOT_KNOWN,
    )


def _text(found: Range | None) -> str:
    return NOT_KNOWN if found is None else found.text()


def _points(found: Range) -> str:
    return found.times(100).text("+.1f")
