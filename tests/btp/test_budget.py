"""A system fitted to a budget: the dearest plan of its family that fits, found again by trying every neighbour."""

from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise
from math import floor

import pytest

from btp import Plan, PlanError, Stage
from btp.budget import fit_flops
from btp.cost import image_token_flops, tokens_per_layer
from tests.btp.test_cost import (
    BTP_KEPT,
    BTP_RELEASED,
    DENSE,
    DIVPRUNE,
    FASTV,
    LLAVA_7B,
    PYRAMIDDROP,
    TODRE,
    VTW,
    plan_of,
)


def flops_of(plan):
    return image_token_flops(tokens_per_layer(plan, 32, 576, conditional=False), **LLAVA_7B)


def fit(plan, target):
    return fit_flops(plan, target, num_layers=32, num_image_tokens=576, **LLAVA_7B)


DENSE_FLOPS = flops_of(DENSE)
LAYER_FLOPS = DENSE_FLOPS // 32
SHARES = (1e-6, 0.004, 0.02, 1 / 32, 0.05, 0.11, 0.2183, 0.25, 0.5, 0.77, 0.99, 0.999999)


def counts_at(plan, factor):
    """Kept tokens of each unconditional stage with its keep fraction times an exact factor."""
    shares = [min(Fraction(1), factor * share) for share in exact_shares(plan)]
    return [floor(share * 576 + Fraction(1, 2)) for share in shares]


def exact_shares(plan):
    """The keep fractions of the unconditional stages, 1/12 really being 1/12."""
    return [Fraction(stage.keep).limit_denominator(576) for stage in plan.stages if stage.attention_below is None]


def alive_at(plan, layers, factor):
    alive = [576] * 32
    for layer, count in zip(layers, counts_at(plan, factor), strict=True):
        alive[layer:] = [count] * (32 - layer)
    return alive


def neighbours(plan, layers, target):
    """Image tokens a layer at the dearest keep factor within the target, and at the next factor that changes any.

    Every factor at which a count changes is known exactly, so nothing is approximated here.
    """
    halves = [Fraction(2 * count - 1, 2 * 576) for count in range(1, 577)]
    factors = sorted({half / share for share in exact_shares(plan) if share for half in halves})
    steps = [alive_at(plan, layers, factor) for factor in (Fraction(0), *factors)]
    first_too_dear = bisect_right(steps, target, key=lambda alive: image_token_flops(alive, **LLAVA_7B))
    return steps[first_too_dear - 1], steps[first_too_dear]


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "plan",
    [BTP_KEPT, DIVPRUNE, FASTV, PYRAMIDDROP, TODRE],
    ids=["btp_kept", "divprune", "fastv", "pyramiddrop", "todre"],
)
def test_fitted_keep_is_the_dearest_that_fits(plan, share):
    target = share * DENSE_FLOPS
    fitted = fit(plan, target)
    layers = [stage.layer for stage in plan.stages if stage.attention_below is None]
    if layers[0] * LAYER_FLOPS > target:
        layers = layers_moved_up(layers, int(target // LAYER_FLOPS))
    assert_dearest(fitted, target, *neighbours(plan, layers, target))
    assert fitted.positions == plan.positions


def assert_dearest(fitted, target, dearest, too_dear):
    """Between the two, for where two counts change at the same factor, rounding may let one of them go first."""
    alive = tokens_per_layer(fitted, 32, 576, conditional=False)
    assert all(low <= count <= high for low, count, high in zip(dearest, alive, too_dear, strict=True))
    assert flops_of(fitted) <= target < image_token_flops(too_dear, **LLAVA_7B)


def layers_moved_up(layers, first):
    """The layers times the largest factor that brings the first of them to `first`, written out for one half below."""
    factor = Fraction(2 * first + 1, 2 * layers[0]) - Fraction(1, 10**12)
    moved = []
    for layer in layers:
        moved.append(max([floor(layer * factor + Fraction(1, 2)), *(above + 1 for above in moved[-1:])]))
    return moved


@pytest.mark.parametrize("share", SHARES)
def test_fitted_single_cut_has_no_room_for_one_more_token(share):
    target = share * DENSE_FLOPS
    for plan in (DIVPRUNE, FASTV):
        (stage,) = fit(plan, target).stages
        kept = round(stage.keep * 576)
        assert stage.keep == kept / 576
        assert flops_of(plan_of((stage.layer, (kept + 1) / 576))) > target


@pytest.mark.parametrize("share", SHARES)
def test_fitted_withdrawal_moves_its_layer(share):
    target = share * DENSE_FLOPS
    (stage,) = fit(VTW, target).stages
    assert stage.keep == 0
    assert stage.layer * LAYER_FLOPS <= target < (stage.layer + 1) * LAYER_FLOPS


@pytest.mark.parametrize("share", [0.7, 0.8, 0.95])
def test_a_plan_that_ends_in_nothing_is_moved_down_once_its_other_stages_are_spent(share):
    fitted = fit(BTP_RELEASED, share * DENSE_FLOPS)
    assert fitted == plan_of((int(share * 32), 0))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_plan_that_ends_in_nothing_still_ends_there(share):
    target = share * DENSE_FLOPS
    fitted = fit(BTP_RELEASED, target)
    assert fitted.stages[-1] == BTP_RELEASED.stages[-1]
    assert_dearest(fitted, target, *neighbours(BTP_RELEASED, [3, 6, 14, 22], target))


def test_stages_move_up_and_keep_what_the_moved_layers_leave_room_for():
    fitted = fit(BTP_KEPT, 1.5 * LAYER_FLOPS)
    assert [stage.layer for stage in fitted.stages] == [1, 3, 7]  # 3, 6, 14 times just under 1/2
    assert all(above.keep > below.keep > 0 for above, below in pairwise(fitted.stages))
    assert 1.49 * LAYER_FLOPS < flops_of(fitted) <= 1.5 * LAYER_FLOPS


def test_layers_moved_to_the_top_stay_distinct():
    plan = plan_of((4, 0.5), (5, 0.3), (6, 0.1))
    assert [stage.layer for stage in fit(plan, 0.3 * LAYER_FLOPS).stages] == [0, 1, 2]


@pytest.mark.parametrize(
    "plan",
    [BTP_KEPT, BTP_RELEASED, DIVPRUNE, FASTV, PYRAMIDDROP],
    ids=["btp_kept", "btp_released", "divprune", "fastv", "pyramiddrop"],
)
def test_fitting_to_its_own_cost_changes_nothing(plan):
    assert fit(plan, flops_of(plan)) == plan


@pytest.mark.parametrize(
    "plan",
    [BTP_KEPT, BTP_RELEASED, DIVPRUNE, FASTV, PYRAMIDDROP, VTW],
    ids=["btp_kept", "btp_released", "divprune", "fastv", "pyramiddrop", "vtw"],
)
@pytest.mark.parametrize("share", [1.0, 3.0, float("inf")])
def test_a_target_of_dense_or_more_gives_the_dense_plan(plan, share):
    assert fit(plan, share * DENSE_FLOPS) == Plan(stages=(), positions=plan.positions)


def test_stages_that_remove_nothing_are_left_out():
    fitted = fit(PYRAMIDDROP, 0.9 * DENSE_FLOPS)
    assert [stage.layer for stage in fitted.stages] == [24]
    fitted = fit(BTP_KEPT, 3.0005 * LAYER_FLOPS)
    assert fitted.stages[0].layer == 3
    assert len(fitted.stages) < 3


@pytest.mark.parametrize("share", [0.05, 0.4, 0.9])
def test_a_conditional_stage_stays_as_it_is_and_counts_as_skipped(share):
    target = share * DENSE_FLOPS
    fitted = fit(TODRE, target)
    assert fitted.stages[-1] == TODRE.stages[-1]
    assert fitted.stages[0].layer == 0
    assert fit(plan_of((0, 0.25), selector=TODRE.stages[0].selector), target).stages == fitted.stages[:-1]


def test_a_conditional_stage_goes_once_nothing_is_left_for_it():
    assert fit(TODRE, 1e-9) == Plan(stages=(Stage(layer=0, keep=0.0),))


def test_fitting_leaves_every_other_setting():
    stage = Stage(layer=2, keep=0.5, selector="attention", attention_weight=0.3, oversample=1.5, attention="logits")
    (fitted,) = fit(Plan(stages=(stage,)), 0.3 * DENSE_FLOPS).stages
    same = ("layer", "selector", "attention_weight", "oversample", "attention", "seeds", "attention_below")
    assert [getattr(fitted, name) for name in same] == [getattr(stage, name) for name in same]


@pytest.mark.parametrize("target", [0, -1.0, float("nan")])
def test_a_target_must_be_positive(target):
    with pytest.raises(PlanError, match="target must be a positive number of FLOPs"):
        fit(FASTV, target)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(PlanError, match="a stage without a condition"):
        fit(DENSE, 1e12)
    with pytest.raises(PlanError, match="a stage without a condition"):
        fit(Plan(stages=TODRE.stages[1:]), 1e12)
    with pytest.raises(PlanError, match="a conditional stage must have keep=0"):
        fit(Plan(stages=(TODRE.stages[0], Stage(layer=9, keep=0.1, attention_below=0.1))), 1e12)
    with pytest.raises(PlanError, match="below the model's 32 layers, got 32"):
        fit(plan_of((32, 0.5)), 1e12)
