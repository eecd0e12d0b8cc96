"""A comparison as one file that asks for nothing: for an e-mail, or beside a paper."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from autotune.pages import STATIC, environment
from autotune.pages.compare import Comparison
from autotune.pages.figures import moment
from autotune.pages.points import csv_of, data_of
from autotune.pages.profile import Chosen
from autotune.pages.study import settings
from autotune.pages.view import HIDEABLE, X_NAMES, Y_NAMES
from autotune.redaction import redacted
from autotune.store import StudyRow

__all__ = ["Sheet", "rendered", "sheet_of"]

STYLES = ("pico.classless.min.css", "site.css", "compare.css")
NOT_TOLD = "–"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """What is known of several studies beside their trials. lines: a name, and a cell for each study."""

    studies: tuple[str, ...]
    lines: tuple[tuple[str, tuple[str, ...]], ...]


def sheet_of(rows: Sequence[StudyRow]) -> Sheet:
    """Settings, what they were measured with, and dense's figures; what no study tells is left out."""
    columns = [_told(row) for row in rows]
    names = dict.fromkeys(name for column in columns for name in column)
    lines = tuple((name, tuple(column.get(name, NOT_TOLD) for column in columns)) for name in names)
    return Sheet(studies=tuple(row.name for row in rows), lines=lines)


def _told(row: StudyRow) -> dict[str, str]:
    told = dict(settings(row.settings, row.context.get("fits", {})))
    told |= {"begun": moment(row.created), "trials told": f"{row.num_told} of {row.target}"}
    return {name: redacted(text) for name, text in told.items()} | _dense(row.context)


def _dense(context: Mapping[str, Any]) -> dict[str, str]:
    dense = context.get("dense", {})
    by_task = dense.get("by_task", {})
    told = {"dense, macro accuracy": f"{fmean(by_task.values()):.3f}"} if by_task else {}
    told |= {f"dense, {task}": f"{score:.3f}" for task, score in by_task.items()}
    forms = {
        "ms": ("latency", "{:.2f} ms"),
        "gflops": ("image tokens", "{:.2f} GFLOPs"),
        "cache_mib": ("cache", "{:.2f} MiB"),
    }
    return told | {
        f"dense, {what}": form.format(dense[name]) for name, (what, form) in forms.items() if dense.get(name)
    }


def rendered(
    comparison: Comparison, sheet: Sheet, certificates: Sequence[Chosen], notes: Sequence[str], at: float, version: str
) -> str:
    """The file's text. at: when, in seconds since 1970. version: of the code that wrote it."""
    return (
        environment()
        .get_template("report.html.jinja")
        .render(
            comparison=comparison,
            sheet=sheet,
            certificates=certificates,
            notes=notes,
            at=moment(at),
            version=version,
            data=data_of(comparison),
            csv=_data_url("text/csv", csv_of(comparison)),
            x_names=X_NAMES,
            y_names=Y_NAMES,
            hideable=HIDEABLE,
            styles=[_static(file) for file in STYLES],
            plotly=_static("plotly-basic.min.js"),
            script=Markup(_bundled("compare.js")),
        )
    )


def _static(file: str) -> Markup:
    return Markup((STATIC / file).read_text(encoding="utf-8"))


def _bundled(module: str) -> str:
    """A module with those that it imports in it, as data."""
    text = (STATIC / module).read_text(encoding="utf-8")
    return re.sub(
        r'from "\./([\w.]+)"', lambda found: f'from "{_data_url("text/javascript", _bundled(found[1]))}"', text
    )


def _data_url(media_type: str, text: str) -> str:
    return f"data:{media_type};charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"
