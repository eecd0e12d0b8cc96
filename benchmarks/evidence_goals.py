"""The goals of the evidence, held against its raw numbers: met or missed, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.evidence_plans import HAND_SET

__all__ = ["TUNER", "Goal", "goals", "percent", "tried_line"]

POINTS = 0.03  # of macro accuracy, above the hand-set plan at the tightest limit
HALF = 0.5  # of the hand-set plan's worst-task loss
TUNER = "gp, published first"  # what a job does by default
OTHERS = ("gp", "gp, whole front")
MAX_TRIALS = 40  # in which the tuner shall have random search's hypervolume of 400 trials
RIVALS = ("published", "control")

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """met: None where nothing was measured that it could be held against. told: one line a limit."""

    text: str
    met: bool | None
    told: tuple[str, ...]


def percent(interval: Mapping[str, float], sign: str = "") -> str:
    """An interval of shares, in percent."""
    value, low, high = (100 * interval[part] for part in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def goals(found: Found, searches: Sequence[Found]) -> list[Goal]:
    """The goals, in order. searches: contents of search-*.json."""
    return [_above_all(found), _above_hand_set(found), _worst_task(found), _hypervolume(searches)]


def _rows(at: Found, *kinds: str) -> list[Any]:
    return [row for row in at["rows"] if row["kind"] in kinds]


def _row(at: Found, name: str) -> Any:
    return next(row for row in at["rows"] if row["name"] == name)


def _above_all(found: Found) -> Goal:
    told, met = [], True
    for at in found["limits"]:
        minus = {row["title"]: at["minus"]["tuned"][row["name"]] for row in _rows(at, *RIVALS)}
        nearest = min(minus, key=lambda title: minus[title]["value"])
        surely = sum(diff["low"] > 0 for diff in minus.values())
        above = minus[nearest]["value"] >= 0
        met &= above
        seeds = [row["name"] for row in _rows(at, "tuned")]
        each = sum(min(at["minus"][seed][r["name"]]["value"] for r in _rows(at, *RIVALS)) >= 0 for seed in seeds)
        verb = "is nearest, at" if above else "is above it: tuned minus it is"
        told.append(
            f"at {at['limit']:g}x: of {len(minus)} presets {nearest} {verb} {percent(minus[nearest], '+')} points; the "
            f"interval lies above zero against {surely} of {len(minus)}; at or above all with {each} of {len(seeds)} "
            "seeds taken by themselves"
        )
    return Goal("The tuned plan is at or above every preset on macro accuracy at every limit.", met, tuple(told))


def _above_hand_set(found: Found) -> Goal:
    at = min(found["limits"], key=lambda at: at["limit"])
    minus = at["minus"]["tuned"][HAND_SET]
    text = "It is at least 3 points above the hand-set BTP plan at the tightest limit, the interval excluding zero."
    short = max(0.0, POINTS - minus["value"])
    missing = f"; {100 * short:.1f} points short" if short else "; the interval holds zero" if minus["low"] <= 0 else ""
    told = f"at {at['limit']:g}x: tuned minus {_row(at, HAND_SET)['title']} is {percent(minus, '+')} points{missing}"
    return Goal(text, not short and minus["low"] > 0, (told,))


def _worst_task(found: Found) -> Goal:
    told, met = [], True
    for at in found["limits"]:
        theirs, ours = _row(at, HAND_SET), at["tuned"]
        loss, their_loss = (max(0.0, 1 - one["retention"]["value"]) for one in (ours, theirs))
        held = loss < HALF * their_loss or loss == 0
        met &= held
        told.append(
            f"at {at['limit']:g}x: {ours['worst_task']} loses {100 * loss:.1f} % of its dense accuracy (it keeps "
            f"{percent(ours['retention'])} %), hand-set BTP's {theirs['worst_task']} {100 * their_loss:.1f} % (it "
            f"keeps {percent(theirs['retention'])} %)"
            + ("" if held else f"; {100 * (loss - HALF * their_loss):.1f} too much")
        )
    return Goal("Its worst task loses less than half of what hand-set BTP's worst task loses.", met, tuple(told))


def _hypervolume(searches: Sequence[Found]) -> Goal:
    text = f"The tuner reaches random search's hypervolume of 400 trials within {MAX_TRIALS}."
    told, met = [], True
    for search in searches:
        met &= any(TUNER in result["searchers"] for result in search["spaces"].values())
        for space, result in search["spaces"].items():
            for name in (name for name in (TUNER, *OTHERS) if name in result["searchers"]):
                reached = result["searchers"][name]["raced"]["trials_to_target"]
                middle = sorted(math.inf if number is None else number for number in reached)[len(reached) // 2]
                met &= middle <= MAX_TRIALS or name != TUNER
                within = sum(number is not None and number <= MAX_TRIALS for number in reached)
                number = "not at all" if middle == math.inf else f"in {middle:g} trials"
                told.append(
                    f"{name}, space {space!r}, replayed on {search['device']}: median seed {number}, {within} of "
                    f"{len(reached)} seeds within {MAX_TRIALS}"
                )
    if not told:
        return Goal(text, None, ("no search-*.json lies beside the raw numbers; run python -m benchmarks.search",))
    return Goal(text, met, tuple(told))


def tried_line(found: Found) -> str:
    """What the verdicts rest on: how much was tried."""
    trials = [trial for at in found["limits"] for study in at["studies"] for trial in study["trials"]]
    num_plans = len({json.dumps(trial["plan"], sort_keys=True) for trial in trials})
    num_studies = sum(len(at["studies"]) for at in found["limits"])
    whole, able = (sum(trial[key] for trial in trials) for key in ("complete", "feasible"))
    rounds = [len(row["rounds"]) for at in found["limits"] for row in _rows(at, *RIVALS)]
    return (
        f"Tried: {num_studies} searches of {found['trials']} trials, {num_plans} different plans, {whole} of "
        f"{len(trials)} trials scored on all of `select` and {able} within the limit; {len(found['limits'])} learned "
        f"plans of {found['learning_steps']} steps; {len(rounds)} times a published system or control was brought to a "
        f"limit, measured {sum(rounds)} times on the way."
    )
