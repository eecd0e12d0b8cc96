"""A system fitted to a budget: it never costs more, spends what whole tokens and layers allow, and keeps its shape."""

from itertools import pairwise

import pytest

from btp import Plan, PlanError, Stage, presets
from btp.budget import fit_flops
from btp.cost import image_token_flops, token_counts, tokens_per_layer
from tests.btp.test_cost import BTP_KEPT, BTP_RELEASED, DENSE, DIVPRUNE, FASTV, PYRAMIDDROP, TODRE, VTW, plan_of

LLAVA_7B = {"num_layers": 32, "num_image_tokens": 576, "hidden_size": 4096, "intermediate_size": 11008}
SHAPES = (
    LLAVA_7B,
    {"num_layers": 28, "num_image_tokens": 256, "hidden_size": 3584, "intermediate_size": 18944},
    {"num_layers": 40, "num_image_tokens": 2880, "hidden_size": 5120, "intermediate_size": 13824},
    {"num_layers": 8, "num_image_tokens": 256, "hidden_size": 192, "intermediate_size": 512},
)
SHARES = (0.05, 0.11, 0.21, 0.22, 0.25, 0.33, 0.5, 0.66, 0.8, 0.95)
SYSTEMS = [name for name in presets.SYSTEMS if name != "dense"]


def cost(plan, shape, extra=0):
    """FLOPs of the plan with `extra` more tokens at every stage."""
    num_layers, num_tokens = shape["num_layers"], shape["num_image_tokens"]
    counts = tokens_per_layer(plan, num_layers, num_tokens, conditional=False)
    more = [min(num_tokens, count + extra * (count < num_tokens)) for count in counts]
    return image_token_flops(more, shape["hidden_size"], shape["intermediate_size"])


def target_of(share, shape=LLAVA_7B):
    return cost(DENSE, shape) * share


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape['num_layers']} layers")
@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_spends_the_budget_and_no_more(name, shape, share):
    target = target_of(share, shape)
    fitted = fit_flops(presets.SYSTEMS[name].plan(shape["num_layers"]), target, **shape)
    assert cost(fitted, shape) <= target
    if name != "vtw":  # which has whole layers to give and nothing finer
        assert cost(fitted, shape, extra=1) > target


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_larger_budget_never_costs_less_nor_turns_a_system_into_another(name):
    for shape in SHAPES:
        start = presets.SYSTEMS[name].plan(shape["num_layers"])
        plans = [fit_flops(start, target_of(share, shape), **shape) for share in (*SHARES, 0.999)]
        costs = [cost(plan, shape) for plan in plans]
        assert costs == sorted(costs)
        kept = {stage.selector for stage in start.stages if stage.keep}
        for plan in plans:
            certain = [stage for stage in plan.stages if stage.attention_below is None]
            assert {stage.selector for stage in certain if stage.keep} <= kept
            if kept:
                assert all(stage.keep for stage in certain)


@pytest.mark.parametrize("share", SHARES)
def test_stages_keep_their_proportions(share):
    """Halving stays halving to a token, and layers keep their distances to a layer."""
    fitted = fit_flops(PYRAMIDDROP, target_of(share), **LLAVA_7B)
    counts = fitted.num_kept(576)
    whole = [count for count in counts if count < 575]
    for above, below in pairwise(whole):
        assert abs(above - 2 * below) <= 2
    if len(fitted.stages) == 3:
        first, second, third = (stage.layer for stage in fitted.stages)
        assert abs(second - 2 * first) <= 2
        assert abs(third - 3 * first) <= 3


@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.47, 0.6, 0.9])
def test_withdrawal_takes_the_deepest_layer_it_can_pay_for(share):
    fitted = fit_flops(VTW, target_of(share), **LLAVA_7B)
    assert [(stage.layer, stage.keep) for stage in fitted.stages] == [(int(share * 32), 0.0)]


@pytest.mark.parametrize("plan", [BTP_KEPT, BTP_RELEASED, DIVPRUNE, FASTV, VTW, PYRAMIDDROP, TODRE])
def test_fitting_to_its_own_cost_changes_nothing(plan):
    assert fit_flops(plan, cost(plan, LLAVA_7B), **LLAVA_7B) == plan


@pytest.mark.parametrize("plan", [BTP_KEPT, BTP_RELEASED, DIVPRUNE, FASTV, VTW, PYRAMIDDROP])
@pytest.mark.parametrize("share", [1.0, 3.0, float("inf")])
def test_a_target_of_dense_or_more_gives_the_dense_plan(plan, share):
    assert fit_flops(plan, target_of(share), **LLAVA_7B) == Plan(stages=(), positions=plan.positions)


def test_stages_inside_the_decoder_stay_inside_until_its_first_layer_is_too_dear():
    assert [stage.layer for stage in fit_flops(FASTV, target_of(0.04), **LLAVA_7B).stages] == [1]
    assert [stage.layer for stage in fit_flops(FASTV, target_of(0.02), **LLAVA_7B).stages] == [0]
    assert [stage.layer for stage in fit_flops(DIVPRUNE, target_of(0.9), **LLAVA_7B).stages] == [0]


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_a_conditional_stage_stays_as_it_is_and_counts_as_skipped(share):
    num_tokens = round(share * 576)
    fitted = fit_flops(TODRE, image_token_flops((num_tokens,) * 32, 4096, 11008), **LLAVA_7B)
    assert fitted.stages[-1] == TODRE.stages[-1]
    assert fitted.num_kept(576)[0] == token_counts(fitted, 32, 576).literal == num_tokens


def test_fitting_leaves_every_other_setting():
    stages = (
        Stage(layer=4, keep=0.5, selector="joint", attention_weight=0.3, oversample=1.2, seeds=0.5),
        Stage(layer=9, keep=0.2, selector="joint", attention_weight=0.9, attention="logits"),
    )
    fitted = fit_flops(Plan(stages=stages, positions="reset"), target_of(0.2), **LLAVA_7B)
    assert fitted.positions == "reset"
    settings = ("selector", "attention_weight", "oversample", "attention", "seeds", "attention_below")
    for before, after in zip(stages, fitted.stages, strict=True):
        assert [getattr(before, name) for name in settings] == [getattr(after, name) for name in settings]


@pytest.mark.parametrize("target", [0, -1.0, float("nan")])
def test_a_target_must_be_positive(target):
    with pytest.raises(PlanError, match="positive number of FLOPs"):
        fit_flops(FASTV, target, **LLAVA_7B)


def test_a_target_must_pay_for_a_token():
    with pytest.raises(PlanError, match="one token of each stage"):
        fit_flops(FASTV, 1.0, **LLAVA_7B)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(PlanError, match="below the model's 8 layers"):
        fit_flops(PYRAMIDDROP, 1e9, **{**LLAVA_7B, "num_layers": 8})
    with pytest.raises(PlanError, match="a stage without a condition"):
        fit_flops(plan_of(), 1e12, **LLAVA_7B)
    with pytest.raises(PlanError, match="must have keep=0 to be fitted"):
        fit_flops(
            Plan(stages=(Stage(layer=1, keep=0.5), Stage(layer=3, keep=0.2, attention_below=0.1))), 1e12, **LLAVA_7B
        )
