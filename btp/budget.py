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
    """The same system, whose image tokens cost at most `target` by `image_token_flops`, and as nearly that as it can.

    First keep fractions and stage layers are multiplied by one common factor, the largest that is affordable: a dearer
    plan of the same shape keeps more for longer. Then, because layers are whole, the keep fractions alone are
    multiplied by the largest factor that is still affordable there. A stage that keeps any keeps at least one token,
    and one that drops all (VTW) only moves; such a plan comes as near to the target as whole layers allow. A stage
    inside the decoder stays inside it, behind layer 0, unless that layer alone costs more than the target.

    Layers are rounded half up and stay distinct; keep fractions come out as whole tokens of `num_image_tokens`. Stages
    that remove nothing any more are left out: at a target of dense or more, all of them. Conditional stages stay as
    they are, layer included, and count as skipped.

    Raises PlanError when the target is not positive or out of reach, when a stage lies beyond the last layer, when no
    stage is always carried out, and when a conditional stage keeps any.
    """
    tokens_per_layer(plan, num_layers, num_image_tokens)
    _check_fittable(plan, target)

    def fitted(keep_factor: float, layer_factor: float) -> Plan:
        return _scaled(plan, keep_factor, layer_factor, first_inside, num_layers, num_image_tokens)

    def affordable(scaled: Plan) -> bool:
        counts = tokens_per_layer(scaled, num_layers, num_image_tokens, conditional=False)
        return image_token_flops(counts, hidden_size, intermediate_size) <= target

    first_inside = 1  # the first layer a stage inside the decoder may move to
    if not affordable(fitted(0.0, 0.0)):
        first_inside = 0
    if not affordable(fitted(0.0, 0.0)):
        raise PlanError(
            f"target must pay for one token of each stage that keeps any, got {target:g} FLOPs for {plan.stages}; "
            "ask for more"
        )
    highest = float(num_layers * num_image_tokens)  # past it every stage either keeps all or lies beyond the end
    factor = _largest(lambda factor: affordable(fitted(factor, factor)), highest)
    return fitted(_largest(lambda keep_factor: affordable(fitted(keep_factor, factor)), highest), factor)


def _check_fittable(plan: Plan, target: float) -> None:
    if not target > 0:
        raise PlanError(f"target must be a positive number of FLOPs, got {target}; any plan that keeps some costs some")
    if all(stage.attention_below is not None for stage in plan.stages):
        raise PlanError(f"a plan must have a stage without a condition to be fitted, got {plan.stages}; add one")
    if any(stage.attention_below is not None and stage.keep for stage in plan.stages):
        raise PlanError(f"a conditional stage must have keep=0 to be fitted, got {plan.stages}; set its keep to 0")


def _scaled(
    plan: Plan, keep_factor: float, layer_factor: float, first_inside: int, num_layers: int, num_image_tokens: int
) -> Plan:
    """The plan with its keep fractions and layers times a factor, less the stages that then remove nothing."""
    stages, layer, alive = [], -1, num_image_tokens
    for stage in plan.stages:
        if stage.attention_below is None:
            layer = max(layer + 1, min(stage.layer, first_inside), round_half_up(stage.layer * layer_factor))
        else:
            layer = stage.layer
        count = round_half_up(min(1.0, stage.keep * keep_factor) * num_image_tokens)
        count = max(count, 1) if stage.keep else 0
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
