"""The same system at another budget. Plain Python."""

from collections.abc import Callable
from dataclasses import replace

from btp.cost import image_token_flops, tokens_per_layer
from btp.errors import PlanError
from btp.plan import Plan, round_half_up

__all__ = ["fit_flops"]


def fit_flops(
    plan: Plan, target: float, *, num_layers: int, num_image_tokens: int, hidden_size: int, intermediate_size: int
) -> Plan:
    """The same system at another budget: the dearest plan of one family whose image tokens cost at most `target`.

    The cost is `image_token_flops` of `tokens_per_layer`, with conditional stages counted as skipped. The family has
    one parameter. Over most of its range that is a factor on every keep fraction, capped at 1. Where even keeping
    nothing is too dear, the stage layers are first moved up by the largest common factor at which it is not; where a
    plan ends in keep=0 and the cap leaves budget over, as with VTW, they are moved down. Layers are rounded half up
    and stay distinct. Everything else a stage says stays as it is, and so do conditional stages, layer included.

    The keep fractions of the result are whole tokens of `num_image_tokens`, each within one token of the exact
    budget's. Stages that remove nothing any more are left out: at a target of dense or more, all of them.

    Raises PlanError when the target is not positive, when a stage lies beyond the last layer, when no stage is always
    carried out, and when a conditional stage keeps any.
    """
    tokens_per_layer(plan, num_layers, num_image_tokens)
    _check_fittable(plan, target)

    def fitted(keep_factor: float, layer_factor: float) -> Plan:
        return _scaled(plan, keep_factor, layer_factor, num_layers, num_image_tokens)

    def affordable(keep_factor: float, layer_factor: float) -> bool:
        scaled = fitted(keep_factor, layer_factor)
        counts = tokens_per_layer(scaled, num_layers, num_image_tokens, conditional=False)
        return image_token_flops(counts, hidden_size, intermediate_size) <= target

    layer_factor, keep_most = 1.0, 1.0 / min((stage.keep for stage in plan.stages if stage.keep), default=1.0)
    if not affordable(0.0, 1.0):
        layer_factor = _largest(lambda factor: affordable(0.0, factor), 1.0)
    elif affordable(keep_most, 1.0):
        layer_factor = _largest(lambda factor: affordable(keep_most, factor), float(num_layers))
    return fitted(_largest(lambda factor: affordable(factor, layer_factor), keep_most), layer_factor)


def _check_fittable(plan: Plan, target: float) -> None:
    if not target > 0:
        raise PlanError(f"target must be a positive number of FLOPs, got {target}; any plan that keeps some costs some")
    if all(stage.attention_below is not None for stage in plan.stages):
        raise PlanError(f"a plan must have a stage without a condition to be fitted, got {plan.stages}; add one")
    if any(stage.attention_below is not None and stage.keep for stage in plan.stages):
        raise PlanError(f"a conditional stage must have keep=0 to be fitted, got {plan.stages}; set its keep to 0")


def _scaled(plan: Plan, keep_factor: float, layer_factor: float, num_layers: int, num_image_tokens: int) -> Plan:
    """The plan with its keep fractions and layers times a factor, less the stages that then remove nothing."""
    stages, layer, alive = [], -1, num_image_tokens
    for stage in plan.stages:
        if stage.attention_below is None:
            layer = max(layer + 1, round_half_up(stage.layer * layer_factor))
        else:
            layer = stage.layer
        count = round_half_up(min(1.0, stage.keep * keep_factor) * num_image_tokens)
        if layer < num_layers and count < alive:
            stages.append(replace(stage, layer=layer, keep=count / num_image_tokens))
            alive = count
    return replace(plan, stages=tuple(stages))


def _largest(holds: Callable[[float], bool], highest: float) -> float:
    """The largest float in [0, highest] that `holds`, by bisection; it holds at 0 and, once it fails, from there on."""
    if holds(highest):
        return highest
    low, high = 0.0, highest
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
