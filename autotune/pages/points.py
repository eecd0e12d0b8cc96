"""Every point of a comparison, for its script and for a spreadsheet."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from autotune.objective import Told
from autotune.pages.compare import Comparison
from autotune.pages.figures import Range
from autotune.pages.fronts import STATUSES, StudySeries, places
from autotune.pages.view import X_DIGITS, X_NAMES, Y_NAMES
from autotune.report import COLORS, describe
from btp.plan import WEIGHTED, Stage

__all__ = ["csv_of", "data_of"]

DIGITS = 7  # of a number in a page; a front is worked out from the same numbers here and there
KEPT = 64  # studies whose points stay written out


def data_of(comparison: Comparison) -> Markup:
    """JSON for the page's script: every point of every study, whatever is hidden."""
    studies = Markup(",").join(_study(comparison, number) for number in range(len(comparison.studies)))
    known: dict[str, Any] = {
        "xNames": X_NAMES,
        "yNames": Y_NAMES,
        "xDigits": X_DIGITS,
        "weighted": WEIGHTED,
        "colors": COLORS,
    }
    known["styles"] = [asdict(each) for each in comparison.styles]
    return Markup('{{"studies":[{}],"links":{},"known":{}}}').format(studies, _json(comparison.links), _json(known))


def _study(comparison: Comparison, number: int) -> Markup:
    return Markup('{{"points":{},"versions":{},"told":{}}}').format(
        _points(comparison.studies[number]),
        _json(_versions(comparison, number)),
        _json(_told(comparison.studies[number])),
    )


def _told(study: StudySeries) -> dict[str, Any]:
    dense = study.dense
    return {
        **{name: getattr(study, name) for name in ("name", "model", "device", "limit", "question", "target", "tasks")},
        "limitRatio": study.limit_ratio,
        "dense": {"byTask": dict(dense.by_task), "ms": dense.ms, "gflops": dense.gflops, "cache": dense.cache_mib},
    }


def _versions(comparison: Comparison, number: int) -> dict[int, list[dict[str, Any]]]:
    """By place of the point."""
    if comparison.studies[number].name not in {version.study for version in comparison.versions}:
        return {}
    found = {}
    for place, point in enumerate(comparison.studies[number].points):
        if versions := comparison.marks(number, point.told.plan):
            found[place] = [{"name": v.name, "version": v.version, "aliases": v.aliases} for v in versions]
    return found


@functools.lru_cache(maxsize=KEPT)
def _points(study: StudySeries) -> Markup:
    """A list for each thing: half as long as an object for each point."""
    told = [point.told for point in study.points]
    return _json(
        {
            "number": [t.number for t in told],
            "name": [None if t.name == f"trial {t.number}" else t.name for t in told],
            "status": [STATUSES.index(point.status) for point in study.points],
            "published": [int(point.is_published) for point in study.points],
            "samples": [t.num_samples for t in told],
            **{
                name: [_short(getattr(t, name)) for t in told]
                for name in ("ratio", "ratio_low", "ratio_high", "score", "score_low", "score_high")
            },
            "minus": [_minus(t) for t in told],
            "worst": [_short(t.worst_task) for t in told],
            "byTask": [[_short(t.by_task.get(task)) for task in study.tasks] for t in told],
            "gflops": [_short(t.image_gflops) for t in told],
            "cache": [_short(t.cache_mib) for t in told],
            "plan": [[_stage(stage) for stage in t.plan.stages] for t in told],
        }
    )


def _minus(told: Told) -> list[float | None] | None:
    minus = told.minus_dense.get("macro") if told.complete else None
    return None if minus is None else [_short(part) for part in minus]


def _stage(stage: Stage) -> list[Any]:
    return [stage.layer, _short(stage.keep), stage.selector, _short(stage.attention_weight)]


def _short(value: float | None) -> float | None:
    return None if value is None or value != value else float(f"{value:.{DIGITS}g}")


def _json(value: Any) -> Markup:
    return htmlsafe_json_dumps(value, allow_nan=False, separators=(",", ":"))


def csv_of(comparison: Comparison) -> str:
    """Every point of the shown studies that has a place, a line each."""
    lines = list(_lines(comparison))
    text = io.StringIO()
    writer = csv.DictWriter(text, lines[0] if lines else ["study"])
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _lines(comparison: Comparison) -> Iterator[dict[str, Any]]:
    view = comparison.view
    for number, study in comparison.shown.items():
        on_front = {place.point.told.number for place in comparison.fronts[number]}
        for place in places(study, view.axes):
            told = place.point.told
            yield {
                **{"study": study.name, "model": study.model, "device": study.device, "limit": study.limit},
                **{"trial": told.number, "name": told.name, "status": place.point.status},
                **{"on_front": told.number in on_front, "published": place.point.is_published},
                "versions": " ".join(version.uri for version in comparison.marks(number, told.plan)),
                **_three("x", place.x),
                **_three("y", place.y),
                **{"num_samples": told.num_samples, "score": told.score, "worst_task": told.worst_task},
                **{"ratio": told.ratio, "image_gflops": told.image_gflops, "cache_mib": told.cache_mib},
                **{f"task {task}": told.by_task.get(task) for task in comparison.tasks},
                "plan": describe(told.plan).replace("<br>", "; "),
            }


def _three(name: str, value: Range) -> Mapping[str, float | None]:
    return {name: value.value, f"{name}_low": value.low, f"{name}_high": value.high}
