"""The published schedules and what they cost, against figures worked out from the BTP paper's formula."""

import pytest

from btp import Plan, PlanError, Stage, presets
from btp.cost import image_token_flops, mean_tokens, tokens_per_layer

LLAVA_7B = {"hidden_size": 4096, "intermediate_size": 11008}
LLAVA_13B = {"hidden_size": 5120, "intermediate_size": 13824}


def tera(counts, sizes):
    return image_token_flops(counts, **sizes) / 1e12


@pytest.mark.parametrize(
    ("counts", "sizes", "mean", "tflops"),
    [
        ([576] * 32, LLAVA_7B, 576, 3.817),
        ([576] * 40, LLAVA_13B, 576, 7.444),
        (tokens_per_layer(presets.btp(32, drop_last=True), 32, 576), LLAVA_7B, 129.0, 0.847),
        ([576] * 3 + [288] * 3 + [144] * 8 + [72] * 8 + [0] * 10, LLAVA_7B, 135.0, 0.886),
        ([128] * 32, LLAVA_7B, 128, 0.833),
        ([64] * 32, LLAVA_7B, 64, 0.416),
        (tokens_per_layer(presets.fastv(32, keep=98 / 576), 32, 576), LLAVA_7B, 127.875, 0.836),
        (tokens_per_layer(presets.pyramiddrop(32), 32, 576), LLAVA_7B, 270, 1.78),
    ],
)
def test_golden_flops(counts, sizes, mean, tflops):
    assert mean_tokens(counts) == pytest.approx(mean)
    assert tera(counts, sizes) == pytest.approx(tflops, abs=0.006 if tflops == 1.78 else 0.0006)


def test_tokens_per_layer_refuses_a_plan_for_a_deeper_model():
    with pytest.raises(PlanError, match="below the model's 2 layers, got 3"):
        tokens_per_layer(Plan(stages=(Stage(layer=3, keep=0.5),)), 2, 10)


def test_btp_is_the_released_schedule():
    stages = presets.btp(32).stages
    assert [stage.layer for stage in stages] == [3, 6, 14]
    assert presets.btp(32).num_kept(576) == (288, 144, 48)
    assert [stage.attention_weight for stage in stages] == [0.3, 0.9, 1.0]
    assert [stage.oversample for stage in stages] == [3.7, 1.5, 1.2]
    assert {stage.selector for stage in stages} == {"balanced"}
    assert [stage.layer for stage in presets.btp(32, drop_last=True).stages] == [3, 6, 14, 22]
    assert [stage.layer for stage in presets.btp(32, layers=(10, 14, 18)).stages] == [10, 14, 18]


@pytest.mark.parametrize("num_layers", [*range(4, 50), 80])
def test_schedules_scale_to_any_depth(num_layers):
    plans = [presets.btp(num_layers), presets.btp(num_layers, drop_last=True), presets.fastv(num_layers)]
    plans += [presets.vtw(num_layers), presets.pyramiddrop(num_layers)]
    for plan in plans:
        assert all(stage.layer < num_layers for stage in plan.stages)


def test_scaling_keeps_relative_depth():
    assert presets.scale_layers((3, 6, 14), 40) == (4, 8, 18)
    assert presets.scale_layers((3, 6, 14), 28) == (3, 5, 12)
    assert presets.scale_layers((3, 6, 14, 22), 4) == (0, 1, 2, 3)
    with pytest.raises(PlanError, match="3 stages need as many decoder layers, got 2"):
        presets.btp(2)


def test_the_other_methods():
    assert presets.fastv(32).stages == (Stage(layer=2, keep=0.5, selector="attention"),)
    assert presets.vtw(32).num_kept(576) == (0,)
    assert presets.vtw(32).stages[0].layer == 15
    assert presets.pyramiddrop(32).positions == "reset"
    assert presets.divprune().num_kept(576) == (56,)


def test_controls_change_the_selector_and_nothing_else():
    plan = presets.btp(32)
    for control, name in ((presets.random_control(plan), "random"), (presets.uniform_control(plan), "uniform")):
        assert {stage.selector for stage in control.stages} == {name}
        assert control.num_kept(576) == plan.num_kept(576)
        assert [stage.layer for stage in control.stages] == [3, 6, 14]


def test_btp_refuses_uneven_settings():
    with pytest.raises(PlanError, match="of one length"):
        presets.btp(32, keep=(0.5, 0.2))
    with pytest.raises(PlanError, match="pass layers as well"):
        presets.btp(32, keep=(0.5,), attention_weights=(0.5,), oversample=(1.0,))
