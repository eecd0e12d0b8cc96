"""The latency of a plan as it was measured, block by block: numbers, and a strip of pairs for each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from autotune.config import Limit
from autotune.pages.figures import Axis, Range, axis, moment

if TYPE_CHECKING:
    from autotune.store import Block

__all__ = ["BlockLine", "Measurement", "measurements_of"]

WIDTH, LEFT, RIGHT, TOP, ROW, BOTTOM = 460, 48, 14, 26, 26, 38
MOST_BLOCKS = 12  # of one device are shown, the newest


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockLine:
    """One block: so many pairs, what dense and the plan took, at the limit's quantile. dots: SVG, a pair each."""

    number: int
    num_pairs: int
    dense_ms: float
    pruned_ms: float
    ratio: float
    when: str
    dots: str
    x: float
    y: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """All blocks of a plan on one device at one metric. is_own: whether it is what the trial was judged by.

    pooled: of all blocks' pairs together. software: what else the device's key says. num_older: blocks left out.
    limit_x: where the limit lies, None where that is far off.
    """

    device: str
    software: str
    metric: str
    is_own: bool
    blocks: tuple[BlockLine, ...]
    num_older: int
    pooled: float
    scale: Axis
    limit_x: float | None
    height: int
    width: int = WIDTH
    left: float = LEFT
    top: float = TOP
    bottom_room: float = BOTTOM

    @property
    def bottom(self) -> float:
        return self.height - BOTTOM


def measurements_of(
    blocks: Sequence[Block], fits: Mapping[str, Any], limit: str, told: Range | None, bound: float
) -> tuple[Measurement, ...]:
    """By device and limit, the trial's own first. fits: what the study's workers have to be, the device's key with it.

    told: the ratio that the trial was told with, None where that is a model's; bound: its limit, as a ratio.
    """
    groups: dict[tuple[str, str], list[Block]] = {}
    for block in blocks:
        groups.setdefault((json.dumps(dict(block.device), sort_keys=True), block.limit), []).append(block)
    found = []
    for members in groups.values():
        first = members[0]
        is_own = first.limit == limit and all(fits.get(name) == value for name, value in first.device.items())
        shown, limits = (told.ends if told and is_own else ()), ([bound] if is_own else [])
        found.append(_measurement(members, is_own, shown, limits))
    return tuple(sorted(found, key=lambda each: not each.is_own))


def _measurement(blocks: Sequence[Block], is_own: bool, shown: Sequence[float], limits: Sequence[float]) -> Measurement:
    """shown: what the scale must reach to; limits: and what it reaches to where that does not squeeze the pairs."""
    limit, device = Limit.parse(blocks[0].limit), dict(blocks[0].device)
    newest = blocks[-MOST_BLOCKS:]
    pairs = [np.array(block.pruned_ms) / np.array(block.dense_ms) for block in newest]
    ratios = [*np.concatenate(pairs).tolist(), *shown]
    low, high = min(ratios), max(ratios)
    near = [bound for bound in limits if 2 * low - high <= bound <= 2 * high - low]
    scale = axis([*ratios, *near], LEFT, WIDTH - RIGHT)
    first = len(blocks) - len(newest) + 1
    name = str(device.pop("name", "a device without a name"))
    return Measurement(
        device=name,
        software=", ".join(f"{key.replace('_', ' ')} {value}" for key, value in device.items()),
        metric=f"{limit.metric} {limit.quantile}",
        is_own=is_own,
        blocks=tuple(
            _line(block, first + row, row, own.tolist(), scale, limit.share)
            for row, (block, own) in enumerate(zip(newest, pairs, strict=True))
        ),
        num_older=len(blocks) - len(newest),
        pooled=_ratio(blocks, limit.share),
        scale=scale,
        limit_x=scale.at(near[0]) if near else None,
        height=TOP + ROW * len(newest) + BOTTOM,
    )


def _line(block: Block, number: int, row: int, ratios: Sequence[float], scale: Axis, share: float) -> BlockLine:
    ratio, y = _ratio([block], share), TOP + ROW * row + ROW / 2
    return BlockLine(
        number=number,
        num_pairs=len(ratios),
        dense_ms=float(np.quantile(block.dense_ms, share)),
        pruned_ms=float(np.quantile(block.pruned_ms, share)),
        ratio=ratio,
        when=moment(block.measured),
        dots="".join(f"M{scale.at(value):g},{y:g}h0" for value in ratios),
        x=scale.at(ratio),
        y=y,
    )


def _ratio(blocks: Sequence[Block], share: float) -> float:
    """Of the quantiles, as `btp.intervals` has it."""
    dense, pruned = ([ms for block in blocks for ms in getattr(block, name)] for name in ("dense_ms", "pruned_ms"))
    return float(np.quantile(pruned, share) / np.quantile(dense, share))
