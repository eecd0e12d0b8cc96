"""The evidence as a page: tables, goals, findings and pictures, written from the raw numbers of every model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.config import AutotuneError
from benchmarks.evidence_findings import depth_lines, lambda_lines, variance_lines
from benchmarks.evidence_goals import Goal, goals, percent, tried_line
from benchmarks.evidence_pictures import rows_of, write_front, write_lambda
from benchmarks.evidence_plans import HAND_SET
from benchmarks.table import markdown
from btp.plan import Plan
from btp.selection import READS

__all__ = ["JUDGEMENT", "page", "write_report"]

JUDGEMENT = re.compile(r"<!-- judgement -->\n.*?<!-- /judgement -->", re.DOTALL)
NO_JUDGEMENT = "<!-- judgement -->\n<!-- /judgement -->"
FRONT, LAMBDA = "evidence-front.png", "evidence-lambda.png"
VERDICTS = {True: "met", False: "MISSED", None: "not measured"}

Found = Mapping[str, Any]


def write_report(results: Path, docs: Path) -> list[Path]:
    """evidence.md and its pictures in `docs`, from evidence-*.json and search-*.json in `results`.

    What is written by hand between the page's `judgement` marks stays. Raises AutotuneError without raw numbers.
    """
    founds = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("evidence-*.json"))]
    searches = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("search-*.json"))]
    if not founds:
        raise AutotuneError(
            f"a report needs an evidence-*.json with raw numbers, got none in {results}; leave out --report-only"
        )
    docs.mkdir(parents=True, exist_ok=True)
    written = docs / "evidence.md"
    before = written.read_text(encoding="utf-8") if written.exists() else ""
    kept = JUDGEMENT.search(before)
    written.write_text(page(founds, searches, kept[0] if kept else NO_JUDGEMENT), encoding="utf-8")
    write_front(founds, docs / FRONT)
    write_lambda(founds, docs / LAMBDA)
    return [written, docs / FRONT, docs / LAMBDA]


def page(founds: Sequence[Found], searches: Sequence[Found], judgement: str) -> str:
    """The report as Markdown."""
    parts = ["# Evidence", "Written by `python -m benchmarks.evidence`, but for what stands under Judgement."]
    for found in founds:
        parts += _section(found, goals(found, searches))
    parts += ["## Judgement", judgement, f"![Accuracy against measured latency]({FRONT})"]
    return "\n\n".join([*parts, f"![Lambda over depth]({LAMBDA})"]) + "\n"


def _section(found: Found, verdicts: Sequence[Goal]) -> Iterator[str]:
    yield f"## {found['model']} on {found['device']}"
    seeds = ", ".join(map(str, found["seeds"]))
    yield (
        f"`{found['command']}`, {found['seconds'] / 60:.0f} min in the run that finished it, commit {found['commit']}, "
        f"{found['date']}. {found['num_questions']} questions about {found['num_pictures']} pictures of `certify`; "
        "accuracies in percent, with 95 % intervals bootstrapped over pictures."
    )
    yield (
        f"Searched with seeds {seeds}, {found['trials']} trials each; champions are chosen on `select`, within the "
        "limit by the upper bound of their measured ratio. Published systems have their keep fractions and layers "
        f"scaled by one factor until their measured ratio is within {found['tolerance']:.0%} under the limit (where "
        "whole layers are too coarse for that, the keep fractions alone). The "
        "learned plan is learned by gradient on `calibrate`, at the FLOPs that a plan of as many stages has at the "
        "limit; its keep fractions are then scaled likewise."
    )
    yield "### Goals"
    yield "\n".join("\n  - ".join((f"- **{VERDICTS[goal.met]}**: {goal.text}", *goal.told)) for goal in verdicts)
    yield tried_line(found)
    for at in found["limits"]:
        yield f"### prefill_p50<={at['limit']:g}x"
        yield _table(at)
        yield _folded("By task", _by_task(at))
        yield _folded("Plans", _plans(at, found["key"]["image_tokens"]))
        yield from _notes(at)
    yield "### Findings"
    yield "Lambda over depth:"
    yield _bullets(lambda_lines(found))
    yield "Which tasks need image tokens how deep (on `select`, every image token dropped at once before a layer):"
    yield _bullets(depth_lines(found))
    yield "Selector or schedule (on `select`; schedules crossed with selectors, the token counts the same):"
    yield _bullets(variance_lines(found))


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(at: Found) -> str:
    columns = [
        "plan",
        "measured latency",
        "macro",
        "minus dense",
        "minus hand-set BTP",
        "worst task",
        "it keeps",
        "tuned minus it",
    ]
    minus = at["minus"]["tuned"]
    lines = []
    for row in rows_of(at):
        latency = "{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["latency"])
        lines.append(
            [
                row["title"],
                latency if row["reached"] else f"{latency} \\*",
                percent(row["macro"]),
                "" if row["name"] == "dense" else percent(row["minus_dense"], "+"),
                "" if row["name"] == HAND_SET else percent(row["minus_hand_set"], "+"),
                f"{row['worst_task']} {percent(row['worst'])}",
                percent(row["retention"]),
                percent(minus[row["name"]], "+") if row["name"] in minus else "",
            ]
        )
    return markdown(columns, lines)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n</details>"


def _by_task(at: Found) -> str:
    tasks = list(at["tuned"]["by_task"])
    lines = [[row["title"], *(f"{100 * row['by_task'][task]:.1f}" for task in tasks)] for row in rows_of(at)]
    return markdown(["plan", *tasks], lines)


def _plans(at: Found, num_image_tokens: int) -> str:
    """Each stage's layer, the image tokens it keeps, by what, and lambda where that has one."""
    lines = []
    for row in at["rows"]:
        plan = Plan.from_dict(row["plan"])
        stages = []
        for stage, kept in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
            weighted = kept and "attention_weight" in READS.get(stage.selector, ())
            weight = f" (λ {stage.attention_weight:.2f})" if weighted else ""
            stages.append(f"{kept} before {stage.layer}" + (f" by {stage.selector}{weight}" if kept else ""))
        lines.append([row["title"], ", ".join(stages), plan.positions])
    return markdown(["plan", "image tokens kept", "positions"], lines)


def _notes(at: Found) -> Iterator[str]:
    missed = [row for row in at["rows"] if not row["reached"]]
    if missed:
        told = []
        for row in missed:
            value, limit = row["latency"]["value"], at["limit"]
            side = "over" if value > limit else "under"
            told.append(f"{row['title']} at {value:.3f} ({abs(value / limit - 1):.1%} {side})")
        yield (
            "\\* not within the tolerance, as systems may move by whole layers, take too long to select, or measure "
            f"otherwise than in the search; the nearest measured point is shown: {'; '.join(told)}."
        )
    champions = ", ".join(f"seed {study['seed']}: {study['champion']}" for study in at["studies"])
    error, learned = at["latency_error"], at["learned"]
    yield (
        f"Champions: {champions}. The latency model errs by {error['median']:.1%} in the median, "
        f"{error['worst']:.1%} at worst. Learning took {learned['seconds']:.0f} s."
    )
