"""The published methods as plans, scaled to a model's depth. Standard library only.

Layers are 0-based and given for a 32-layer decoder, as in the papers' LLaVA-1.5-7B runs. The scaling rule: a reference
layer r of 32 becomes round_half_up(r * num_layers / 32); where two stages would meet, the later one moves down by one
layer, and where they would run past the end they move up, so that layers always rise and lie inside the model.
"""

from collections.abc import Sequence
from dataclasses import replace

from btp.errors import PlanError
from btp.plan import Plan, Stage, round_half_up

__all__ = ["btp", "divprune", "fastv", "pyramiddrop", "random_control", "scale_layers", "uniform_control", "vtw"]

_REFERENCE_DEPTH = 32


def scale_layers(layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Reference layers of a 32-layer decoder, for one of `num_layers` (rule at the top of the file)."""
    if num_layers < len(layers):
        raise PlanError(f"{len(layers)} stages need as many decoder layers, got {num_layers}; use fewer stages")
    scaled: list[int] = []
    for layer in layers:
        at_least = scaled[-1] + 1 if scaled else 0
        scaled.append(max(at_least, round_half_up(layer * num_layers / _REFERENCE_DEPTH)))
    return tuple(min(layer, num_layers - len(scaled) + index) for index, layer in enumerate(scaled))


def btp(
    num_layers: int,
    *,
    layers: Sequence[int] | None = None,
    keep: Sequence[float] = (1 / 2, 1 / 4, 1 / 12),
    attention_weights: Sequence[float] = (0.3, 0.9, 1.0),
    oversample: Sequence[float] = (3.7, 1.5, 1.2),
    drop_last: bool = False,
) -> Plan:
    """Balanced Token Pruning with the hand-set LLaVA values of its released code (arXiv 2505.22038).

    layers: the stage layers, such as `btp.calibration.stage_layers` found them; default 3, 6, 14 of 32, scaled.
    drop_last: drop every image token before layer 22 of 32, as the released code does. Off by default: it is cheap on
    yes/no questions and ruins reading.
    """
    if not len(keep) == len(attention_weights) == len(oversample) == len(layers or keep):
        raise PlanError("layers, keep, attention_weights and oversample must be of one length, one value a stage")
    reference = (3, 6, 14, 22) if drop_last else (3, 6, 14)
    if layers is None and len(keep) != 3:
        raise PlanError(f"the reference schedule has 3 stages, got {len(keep)} keep values; pass layers as well")
    scaled = scale_layers(reference, num_layers)
    stages = [
        Stage(layer=layer, keep=share, attention_weight=weight, oversample=factor)
        for layer, share, weight, factor in zip(
            scaled[:3] if layers is None else layers, keep, attention_weights, oversample, strict=True
        )
    ]
    if drop_last:
        stages.append(Stage(layer=max(scaled[-1], stages[-1].layer + 1), keep=0.0))
    return Plan(stages=tuple(stages))


def fastv(num_layers: int, *, layer: int | None = None, keep: float = 0.5) -> Plan:
    """FastV (ECCV 2024, arXiv 2403.06764): one cut by last-token attention, before layer 2 of 32."""
    layer = scale_layers((2,), num_layers)[0] if layer is None else layer
    return Plan(stages=(Stage(layer=layer, keep=keep, selector="attention"),))


def vtw(num_layers: int, *, layer: int | None = None) -> Plan:
    """Visual Tokens Withdrawal (AAAI 2025, arXiv 2405.05803): drop every image token before layer 15 of 32."""
    layer = scale_layers((15,), num_layers)[0] if layer is None else layer
    return Plan(stages=(Stage(layer=layer, keep=0.0),))


def pyramiddrop(num_layers: int) -> Plan:
    """PyramidDrop (CVPR 2025, arXiv 2410.17247): halve by attention before 8, 16, 24 of 32, positions renumbered."""
    layers = scale_layers((8, 16, 24), num_layers)
    stages = (
        Stage(layer=layer, keep=keep, selector="attention")
        for layer, keep in zip(layers, (0.5, 0.25, 0.125), strict=True)
    )
    return Plan(stages=tuple(stages), positions="reset")


def divprune(*, keep: float = 0.098) -> Plan:
    """DivPrune (CVPR 2025, arXiv 2503.02175): before the first layer, greedy max-min on 1 - cosine."""
    return Plan(stages=(Stage(layer=0, keep=keep, selector="diversity"),))


def random_control(plan: Plan) -> Plan:
    """The same schedule with tokens drawn by a fixed seed: what a selector must beat."""
    return _with_selector(plan, "random")


def uniform_control(plan: Plan) -> Plan:
    """The same schedule with tokens spread evenly over the grid: what a content-aware selector must beat."""
    return _with_selector(plan, "uniform")


def _with_selector(plan: Plan, selector: str) -> Plan:
    return replace(plan, stages=tuple(replace(stage, selector=selector) for stage in plan.stages))
