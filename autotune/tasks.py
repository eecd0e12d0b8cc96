"""Scores of an answer against the reference, by task, in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable
from difflib import SequenceMatcher

__all__ = ["SCORERS"]


def exact(answer: str, reference: str) -> float:
    """1 where the answer is the reference, letter case and outer or repeated spaces aside."""
    return float(_normalise(answer) == _normalise(reference))


def ordered_f1(answer: str, reference: str) -> float:
    """F1 of the comma-separated items that stand in the same order in both (longest matching blocks)."""
    said, true = (_items(text) for text in (answer, reference))
    if not said or not true:
        return float(said == true)
    matched = sum(block.size for block in SequenceMatcher(None, said, true, autojunk=False).get_matching_blocks())
    return 2 * matched / (len(said) + len(true))


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _items(text: str) -> list[str]:
    return [item for item in (_normalise(part) for part in text.split(",")) if item]


SCORERS: dict[str, Callable[[str, str], float]] = {
    "existence": exact,
    "attribute": exact,
    "counting": exact,
    "spatial": exact,
    "reading": exact,
    "caption": ordered_f1,
    "exact": exact,
}
"""Scorer of each known task; `exact` is for questions of any other kind."""
