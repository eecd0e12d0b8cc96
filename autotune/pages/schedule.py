"""How many image tokens are alive in each decoder layer under a plan, as a drawing and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from autotune.pages.figures import percent
from btp.cost import tokens_per_layer
from btp.plan import WEIGHTED, Plan, Stage

__all__ = ["Schedule", "StageLine", "schedule_of"]

WIDTH, HEIGHT = 460, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 14, 44
LABEL_GAP, LABEL_ABOVE, LETTER = 17.0, 5.0, 6.3  # between baselines, above the step, a letter's width
MAX_TICKS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class StageLine:
    """One stage. tokens: alive from its layer on, None where nobody has counted. attention_weight: lambda, None for
    a selector that has none. others: whatever else is set otherwise than by default, in words. x, y: of its label's
    baseline, whose anchor is "start" or "end"."""

    layer: int
    keep: float
    tokens: int | None
    selector: str
    attention_weight: float | None
    others: str
    x: float
    y: float
    anchor: str

    @property
    def label(self) -> str:
        weight = "" if self.attention_weight is None else f" · λ {self.attention_weight:.2f}"
        return f"layer {self.layer} · {percent(self.keep, '.3g')} · {self.selector}{weight}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule:
    """A plan over the layers. line, area: SVG paths. counts: tokens alive by layer, empty where not known.

    layer_ticks, share_ticks: a text with its x or y. step: width of one layer, from `left` on. depth_known: whether the
    model's number of layers is told; else the drawing ends behind the last stage.
    """

    num_layers: int
    depth_known: bool
    num_image_tokens: int | None
    counts: tuple[int, ...]
    stages: tuple[StageLine, ...]
    positions: str
    line: str
    area: str
    layer_ticks: tuple[tuple[str, float], ...]
    share_ticks: tuple[tuple[str, float], ...]
    left: float
    step: float
    width: int = WIDTH
    height: int = HEIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM
    right: float = WIDTH - RIGHT

    @property
    def words(self) -> str:
        """What the drawing shows."""
        whole = "all image tokens" if self.num_image_tokens is None else f"{self.num_image_tokens} image tokens"
        if not self.stages:
            return f"Dense: {whole} in every layer."
        steps = [
            f"from layer {stage.layer} on {percent(stage.keep, '.3g')}"
            + ("" if stage.tokens is None else f" ({stage.tokens} tokens)")
            + f", chosen by {stage.selector}"
            for stage in self.stages
        ]
        return f"Of {whole}: {'; '.join(steps)}."

    @property
    def mean_share(self) -> float | None:
        """Of the image tokens, over the layers; None where the counts are not known."""
        if not self.counts or not self.num_image_tokens:
            return None
        return sum(self.counts) / (len(self.counts) * self.num_image_tokens)


def schedule_of(
    plan: Plan, counts: Sequence[int] = (), num_image_tokens: int | None = None, num_layers: int | None = None
) -> Schedule:
    """Draw a plan. counts: tokens alive by layer as a run had them; else they follow from the two numbers, if told."""
    depth = len(counts) or num_layers
    last = plan.stages[-1].layer if plan.stages else 0
    if not counts and depth and num_image_tokens and last < depth:
        counts = tokens_per_layer(plan, depth, num_image_tokens)
    if counts and not num_image_tokens:
        num_image_tokens = _all_tokens(plan, counts)
    layers = max(depth or 0, last + 1 if depth else last + 2)
    step = (WIDTH - LEFT - RIGHT) / layers
    line = _line(plan, step)
    base = HEIGHT - BOTTOM
    return Schedule(
        num_layers=layers,
        depth_known=bool(depth),
        num_image_tokens=num_image_tokens,
        counts=tuple(counts),
        stages=_lines(plan, counts, num_image_tokens, step),
        positions=plan.positions,
        line=line,
        area=f"{line}V{base}H{LEFT}Z",
        layer_ticks=_layer_ticks(layers, step),
        share_ticks=tuple((f"{share} %", _y(share / 100)) for share in (0, 25, 50, 75, 100)),
        left=LEFT,
        step=round(step, 3),
    )


def _all_tokens(plan: Plan, counts: Sequence[int]) -> int:
    """Of the prompt, as far as the first layer tells it, in which some may be gone already."""
    first = plan.stages[0] if plan.stages else None
    if first is None or first.layer > 0 or not first.keep:
        return counts[0]
    return round(counts[0] / first.keep)


def _y(share: float) -> float:
    return round(TOP + (1 - share) * (HEIGHT - BOTTOM - TOP), 1)


def _x(layer: int, step: float) -> float:
    return round(LEFT + layer * step, 1)


def _line(plan: Plan, step: float) -> str:
    parts = [f"M{LEFT},{_y(1.0)}"]
    parts += [f"H{_x(stage.layer, step)}V{_y(stage.keep)}" for stage in plan.stages]
    return "".join((*parts, f"H{WIDTH - RIGHT}"))


def _layer_ticks(layers: int, step: float) -> tuple[tuple[str, float], ...]:
    every = next(each for each in (1, 2, 4, 5, 8, 10, 16, 20, 25, 50, 100) if layers / each <= MAX_TICKS)
    return tuple((str(layer), _x(layer, step)) for layer in range(0, layers, every))


def _lines(plan: Plan, counts: Sequence[int], num_image_tokens: int | None, step: float) -> tuple[StageLine, ...]:
    """Stages with their labels above the steps, where the line below has left room, no two on one another."""
    kept = plan.num_kept(num_image_tokens) if num_image_tokens else ()
    found: list[StageLine] = []
    lowest = HEIGHT - BOTTOM - LABEL_ABOVE
    for index, stage in reversed(list(enumerate(plan.stages))):
        tokens = counts[stage.layer] if stage.layer < len(counts) else kept[index] if kept else None
        y = min(_y(stage.keep) - LABEL_ABOVE, lowest)
        line = _stage_line(stage, tokens, _x(stage.layer, step) + LABEL_ABOVE, y)
        lowest = y - LABEL_GAP
        found.append(line)
    return tuple(found[::-1])


def _stage_line(stage: Stage, tokens: int | None, x: float, y: float) -> StageLine:
    weight = stage.attention_weight if stage.selector in WEIGHTED else None
    line = StageLine(
        layer=stage.layer,
        keep=stage.keep,
        tokens=tokens,
        selector=stage.selector,
        attention_weight=weight,
        others=_others(stage),
        x=x,
        y=round(y, 1),
        anchor="start",
    )
    fits = x + LETTER * len(line.label) <= WIDTH - RIGHT
    return line if fits else replace(line, x=WIDTH - RIGHT, anchor="end")


def _others(stage: Stage) -> str:
    told = []
    if stage.oversample != 1:
        told.append(f"{stage.oversample:.2g} candidates a slot")
    if stage.attention != "softmax":
        told.append(f"attention by {stage.attention}")
    if stage.seeds:
        told.append(f"{percent(stage.seeds, '.3g')} seeds")
    if stage.attention_below is not None:
        told.append(f"only where attention is below {stage.attention_below:g}")
    return ", ".join(told)
