"""What a plan does to prompts of one length: what tells two plans apart, and what does not."""

from __future__ import annotations

import math
from dataclasses import fields

from btp.cost import tokens_per_layer
from btp.plan import Plan, Stage
from btp.sealed import canonical_json
from btp.selection import READS

__all__ = ["realised_key", "realises_like", "settings_read", "without_idle_stages"]

SETTINGS = frozenset(field.name for field in fields(Stage)) - {"layer", "keep", "selector", "attention_below"}


def settings_read(selector: str) -> frozenset[str]:
    """The settings of a stage that the selector's choice depends on: all of them where nothing is declared of it."""
    return READS.get(selector, SETTINGS)


def without_idle_stages(plan: Plan, num_layers: int, num_image_tokens: int) -> tuple[tuple[Stage, int], ...]:
    """The stages that remove tokens from prompts of `num_image_tokens`, each with how many it leaves.

    A stage after a conditional one stays where it would remove some if that one was skipped. Raises PlanError for a
    stage beyond the last layer.
    """
    tokens_per_layer(plan, num_layers, num_image_tokens)  # refuses plans of another depth
    working, most = [], num_image_tokens
    for stage, kept in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
        if kept < most:
            working.append((stage, kept))
            most = kept if stage.attention_below is None else most
    return tuple(working)


def realised_key(plan: Plan, num_layers: int, num_image_tokens: int) -> str:
    """Canonical JSON of what the plan does to prompts of `num_image_tokens`: equal keys keep the same tokens for sure.

    Counts are rounded, stages that remove nothing are left out, and so are settings that nothing reads. Plans of
    different keys may still happen to keep the same tokens. Raises PlanError for a stage beyond the last layer.
    """
    stages = [
        [stage.layer, kept, stage.attention_below, *(_choice(stage) if kept else ())]
        for stage, kept in without_idle_stages(plan, num_layers, num_image_tokens)
    ]
    return canonical_json({"stages": stages, "positions": plan.positions if stages else "keep"})


def realises_like(plan: Plan, other: Plan, num_layers: int, num_image_tokens: int, tolerance: int) -> bool:
    """Whether two plans do the same, but for `tolerance` tokens a stage and rounding errors in settings."""
    ours, theirs = (without_idle_stages(p, num_layers, num_image_tokens) for p in (plan, other))
    if len(ours) != len(theirs) or (ours and plan.positions != other.positions):
        return False
    return all(_alike(*one, *another, tolerance) for one, another in zip(ours, theirs, strict=True))


def _alike(stage: Stage, kept: int, other: Stage, other_kept: int, tolerance: int) -> bool:
    if (stage.layer, stage.attention_below) != (other.layer, other.attention_below) or (kept == 0) != (other_kept == 0):
        return False
    if kept and stage.selector != other.selector:
        return False
    read = settings_read(stage.selector) if kept else ()
    same = all(_equal(getattr(stage, name), getattr(other, name)) for name in read)
    return same and abs(kept - other_kept) <= tolerance


def _equal(one: object, other: object) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=1e-6)
    return one == other


def _choice(stage: Stage) -> list[object]:
    read = settings_read(stage.selector)
    return [stage.selector, {name: getattr(stage, name) for name in SETTINGS if name in read}]
