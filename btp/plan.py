"""A plan is data: which decoder layers drop image tokens, how many stay, and who chooses them.

Every published method is such a plan (see `btp.presets`). Plans are frozen, compare by value, travel as plain JSON,
and this file needs the standard library only.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, Self

from btp.errors import PlanError
from btp.sealed import canonical_json, read_object, sha256_of, verify

__all__ = ["WEIGHTED", "Plan", "Stage", "round_half_up"]

WEIGHTED = ("joint", "balanced")
"""Selectors that `attention_weight` means something to."""


def round_half_up(count: float) -> int:
    """The one rule for turning a share of tokens into a number of tokens: floor(count + 0.5)."""
    return math.floor(count + 0.5)


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Right before decoder layer `layer` (0-based), leave `keep` of the prompt's original image tokens alive.

    keep: fraction in [0, 1] of the original count, not of the survivors; 0 drops them all.
    selector: a name in `btp.selection.SELECTORS`, checked when the plan is applied.
    attention_weight: the paper's lambda: 1 is all attention, 0 is all diversity. What lies between is the selector's:
    "joint" weighs the two terms of the paper's objective by it, "balanced" splits the count by it.
    oversample: attention candidates per slot before position re-balancing (the paper's k'/k), at least 1. A slot is
    one of the tokens chosen by attention: of all that are kept ("joint", "attention"), or of their share ("balanced").
    attention: which head mean ranks the tokens, that of the "softmax" weights or that of the raw "logits".
    seeds: share of the kept tokens that are put in first, spread over the grid ("joint": BTP's spatial initialisation).
    attention_below: carry the stage out only where the text's attention share on the image and the image's on the text
    are both under this (ToDRE); None carries it out always.
    """

    layer: int
    keep: float
    selector: str = "balanced"
    attention_weight: float = 0.5
    oversample: float = 1.0
    attention: Literal["softmax", "logits"] = "softmax"
    seeds: float = 0.0
    attention_below: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.selector, str) or not self.selector.isidentifier():
            raise PlanError(f"selector must be a name such as 'balanced', got {self.selector!r}")
        object.__setattr__(self, "layer", _layer(self.layer))
        object.__setattr__(self, "keep", _number("keep", self.keep, 0.0, 1.0))
        object.__setattr__(self, "attention_weight", _number("attention_weight", self.attention_weight, 0.0, 1.0))
        object.__setattr__(self, "oversample", _number("oversample", self.oversample, 1.0, math.inf))
        object.__setattr__(self, "seeds", _number("seeds", self.seeds, 0.0, 1.0))
        if self.attention not in ("softmax", "logits"):
            raise PlanError(f"attention must be 'softmax' or 'logits', got {self.attention!r}")
        if self.attention_below is not None:
            object.__setattr__(self, "attention_below", _number("attention_below", self.attention_below, 0.0, 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Stages in depth order; none at all is the dense model.

    positions: "keep" leaves every survivor its original position; "reset" renumbers the survivors without gaps.
    """

    stages: tuple[Stage, ...]
    positions: Literal["keep", "reset"] = "keep"

    def __post_init__(self) -> None:
        given: object = self.stages
        stages = tuple(given) if isinstance(given, Iterable) else ()
        if not isinstance(given, Iterable) or not all(isinstance(stage, Stage) for stage in stages):
            raise PlanError(f"stages must be a list of Stage objects, got {given!r}; Plan.from_dict reads plain data")
        if self.positions not in ("keep", "reset"):
            raise PlanError(f"positions must be 'keep' or 'reset', got {self.positions!r}")
        for above, below in pairwise(stages):
            if below.layer <= above.layer:
                raise PlanError(
                    f"layers must rise from stage to stage, got {below.layer} after {above.layer}; "
                    "sort the stages by layer and merge those of one layer"
                )
            if below.keep >= above.keep:
                raise PlanError(
                    f"keep must fall from stage to stage, got {below.keep} after {above.keep}; "
                    "keep counts the original tokens: sort the stages, or drop the one that removes nothing"
                )
        object.__setattr__(self, "stages", stages)

    def num_kept(self, num_image_tokens: int) -> tuple[int, ...]:
        """How many image tokens each stage leaves of `num_image_tokens`: floor(keep * N + 0.5)."""
        return tuple(round_half_up(stage.keep * num_image_tokens) for stage in self.stages)

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON: equal plans, and only they, have equal digests."""
        return sha256_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {"stages": [asdict(stage) for stage in self.stages], "positions": self.positions}

    def to_json(self) -> str:
        return canonical_json(self.to_dict())

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The plan in plain data. Raises PlanError for unknown or missing keys and illegal values."""
        _check_keys(cls, data, required={"stages"})
        if not isinstance(data["stages"], list | tuple):
            raise PlanError(f"stages must be a list, got {data['stages']!r}")
        for stage in data["stages"]:
            _check_keys(Stage, stage, required={"layer", "keep"})
        stages = tuple(Stage(**stage) for stage in data["stages"])
        return cls(**{**data, "stages": stages})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The plan in a plan file, or in a profile file once the profile's digest is verified.

        Raises ProfileError when the file is unreadable or altered, PlanError when what it holds is no legal plan.
        """
        data = read_object(path)
        if "schema_version" in data or "plan" in data:
            data = verify(data, path).get("plan", {})
        try:
            return cls.from_dict(data)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error


def _layer(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 0:
        raise PlanError(f"layer must be a whole number from 0, got {value!r}; the first decoder layer is 0")
    return int(value)


def _number(name: str, value: object, low: float, high: float) -> float:
    allowed = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f"finite and at least {low:g}"
    hint = "; fractions, not percent" if high == 1.0 else ""
    number = math.nan if isinstance(value, bool) or not isinstance(value, Real) else float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise PlanError(f"{name} must be a number {allowed}, got {value!r}{hint}")
    return number


def _check_keys(cls: type[Plan] | type[Stage], data: object, required: set[str]) -> None:
    known = [field.name for field in fields(cls)]
    if not isinstance(data, Mapping):
        raise PlanError(f"a {cls.__name__.lower()} must be an object with {', '.join(known)}, got {data!r}")
    if unknown := sorted(map(str, data.keys() - set(known))):
        raise PlanError(f"a {cls.__name__.lower()} has no {', '.join(unknown)}; known are {', '.join(known)}")
    if missing := sorted(required - data.keys()):
        raise PlanError(f"a {cls.__name__.lower()} needs {', '.join(missing)}; add it")
