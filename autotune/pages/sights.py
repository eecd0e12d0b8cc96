"""What a plan looks at: a picture, and over it the image tokens that are gone from each stage on."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autotune.pages.figures import percent

__all__ = ["Drop", "Sight", "View", "sights_of"]

SIZE = 1000  # of a picture's longer side, in the drawing's units
TOUCHING = 1e-4  # of a picture: boxes closer than this are one
PNG = b"\x89PNG\r\n\x1a\n"

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """The tokens that a stage drops. layer: from which on they are gone; alive: how many are left; path: SVG."""

    layer: int
    alive: int
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """One plan's look at a picture, and what it answered. score: in [0, 1]. num_tokens: of the picture, at first."""

    answer: str
    score: float | None
    num_tokens: int
    drops: tuple[Drop, ...]

    def alive(self, layer: int) -> int:
        """Image tokens in a layer."""
        return min((drop.alive for drop in self.drops if drop.layer <= layer), default=self.num_tokens)

    def words(self, layer: int) -> str:
        alive = self.alive(layer)
        share = alive / self.num_tokens if self.num_tokens else 0.0
        return f"{alive} of {self.num_tokens} image tokens ({percent(share, '.0f')})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """A picture with a question to it. source: a data URL. dense: what the whole model answered.

    width, height: of the drawing. views: this plan's, then the other's, where there are two; None where unknown.
    """

    source: str
    width: float
    height: float
    question: str
    answer: str
    task: str
    dense: str
    views: tuple[View | None, ...]


def sights_of(samples: Mapping[str, Any] | None, *plans: Mapping[str, Any] | None) -> tuple[Sight, ...]:
    """Of what was kept under "sights", and of each plan's own; nothing where no plan has any.

    A picture that is no PNG, or has no size, is left out.
    """
    told = [_samples(plan) for plan in plans]
    if not any(told):
        return ()
    found = []
    for index, sample in enumerate(_samples(samples)):
        views = [own[index] if index < len(own) else None for own in told]
        sight = _sight(sample, views)
        if sight is not None:
            found.append(sight)
    return tuple(found)


def _samples(kept: Mapping[str, Any] | None) -> Sequence[Mapping[str, Any]]:
    return [] if kept is None else kept.get("samples", [])


def _sight(sample: Mapping[str, Any], views: Sequence[Mapping[str, Any] | None]) -> Sight | None:
    width, height = float(sample["width"]), float(sample["height"])
    if not _is_png(sample["image"]) or min(width, height) <= 0:
        return None
    scale = SIZE / max(width, height)
    width, height = round(width * scale, 1), round(height * scale, 1)
    return Sight(
        source=f"data:image/png;base64,{sample['image']}",
        width=width,
        height=height,
        views=tuple(None if view is None else _view(view, width, height) for view in views),
        **{name: str(sample.get(name, "")) for name in ("question", "answer", "task", "dense")},
    )


def _is_png(text: str) -> bool:
    try:
        return base64.b64decode(text, validate=True).startswith(PNG)
    except binascii.Error:
        return False


def _view(view: Mapping[str, Any], width: float, height: float) -> View:
    boxes: list[Box] = [(x, y, w, h) for x, y, w, h in view["grid"]]
    alive = set(range(len(boxes)))
    drops = []
    for stage in sorted(view["stages"], key=lambda stage: int(stage["layer"])):
        left = alive & set(stage["tokens"])
        path = _path([boxes[index] for index in sorted(alive - left)], width, height)
        drops.append(Drop(layer=int(stage["layer"]), alive=len(left), path=path))
        alive = left
    return View(answer=str(view.get("answer", "")), score=view.get("score"), num_tokens=len(boxes), drops=tuple(drops))


def _path(boxes: Sequence[Box], width: float, height: float) -> str:
    """The boxes in the drawing's units, those that touch in a row as one: a page with thousands stays small."""
    parts = []
    for x, y, w, h in _rows(boxes):
        left, top = round(x * width, 1), round(y * height, 1)
        right, bottom = round((x + w) * width, 1), round((y + h) * height, 1)
        parts.append(f"M{left:g},{top:g}H{right:g}V{bottom:g}H{left:g}Z")
    return "".join(parts)


def _rows(boxes: Sequence[Box]) -> list[Box]:
    found: list[Box] = []
    for box in sorted(boxes, key=lambda each: (each[1], each[3], each[0])):
        if found and _touch(found[-1], box):
            x, y, w, h = found.pop()
            box = (x, y, max(w, box[0] + box[2] - x), h)
        found.append(box)
    return found


def _touch(left: Box, right: Box) -> bool:
    return left[1] == right[1] and left[3] == right[3] and abs(left[0] + left[2] - right[0]) < TOUCHING
