"""The published schedules, against the figures of their papers and code."""

import pytest

from btp import Plan, PlanError, Stage, presets
from btp.presets import SYSTEMS
from btp.selection import SELECTORS

ROWS = {
    "dense": "dense",
    "btp_paper": "BTP (paper)",
    "btp_released": "BTP (released)",
    "fastv": "FastV",
    "vtw": "VTW",
    "pyramiddrop": "PyramidDrop",
    "divprune": "DivPrune",
    "todre_k_center": "ToDRE (k-center)",
    "todre_max_sum": "ToDRE (max-sum)",
    "cdpruner": "CDPruner",
    "dart": "DART",
    "random": "random",
    "uniform": "uniform",
}

CANDIDATES = [1.11, 1.35, 1.2]  # 3.7 x 0.3, 1.5 x 0.9, 1.2 x 1.0 of what a stage keeps


def column(plan, name):
    return [getattr(stage, name) for stage in plan.stages]


def test_the_systems_are_in_the_order_and_by_the_names_of_the_tables():
    assert [(key, system.name) for key, system in SYSTEMS.items()] == list(ROWS.items())
    assert all("arXiv" in system.reference for key, system in SYSTEMS.items() if "BTP" in system.name or key == "dart")


@pytest.mark.parametrize("num_layers", range(4, 81))
def test_every_system_scales_to_any_depth(num_layers):
    for system in SYSTEMS.values():
        plan = system.plan(num_layers)
        assert all(stage.layer < num_layers and stage.selector in SELECTORS for stage in plan.stages)
        assert Plan.from_dict(plan.to_dict()) == plan
    for plan in (
        presets.btp_paper(num_layers, family="llava-1.6"),
        presets.btp_paper(num_layers, family="qwen2.5-vl"),
        presets.btp_released(num_layers, drop_last=True),
        presets.btp_released(num_layers, drop_last=True, family="qwen2.5-vl"),
    ):
        assert all(stage.layer < num_layers for stage in plan.stages)


# Layers and image tokens kept of 576, at the depth of the source's own model.
GOLDEN = {
    "dense": (32, [], ()),
    "btp_paper": (32, [3, 6, 14], (288, 144, 72)),
    "btp_released": (32, [3, 6, 14], (288, 144, 48)),
    "fastv": (32, [2], (288,)),
    "vtw": (32, [15], (0,)),
    "pyramiddrop": (32, [8, 16, 24], (288, 144, 72)),
    "divprune": (32, [0], (56,)),
    "todre_k_center": (32, [0, 28], (144, 0)),
    "todre_max_sum": (32, [0, 28], (144, 0)),
    "cdpruner": (32, [0], (64,)),
    "dart": (32, [2], (432,)),
    "random": (32, [3, 6, 14], (288, 144, 72)),
    "uniform": (32, [3, 6, 14], (288, 144, 72)),
}


@pytest.mark.parametrize("key", SYSTEMS)
def test_schedules_are_the_published_ones(key):
    num_layers, layers, kept = GOLDEN[key]
    plan = SYSTEMS[key].plan(num_layers)
    assert column(plan, "layer") == layers
    assert plan.num_kept(576) == kept
    assert plan.positions == ("reset" if key == "pyramiddrop" else "keep")


@pytest.mark.parametrize(
    ("key", "selectors"),
    [
        ("btp_paper", {"joint"}),
        ("btp_released", {"balanced"}),
        ("fastv", {"attention"}),
        ("pyramiddrop", {"attention"}),
        ("divprune", {"diversity"}),
        ("cdpruner", {"dpp"}),
        ("dart", {"dart"}),
        ("random", {"random"}),
        ("uniform", {"uniform"}),
    ],
)
def test_a_system_chooses_by_its_own_rule(key, selectors):
    assert set(column(SYSTEMS[key].plan(32), "selector")) == selectors


@pytest.mark.parametrize(
    ("family", "num_layers", "layers", "keep", "weights", "oversample"),
    [
        ("llava-1.5", 32, [3, 6, 14], [1 / 2, 1 / 4, 1 / 8], [0.6, 0.8, 1.0], CANDIDATES),
        ("llava-1.6", 32, [3, 6, 14], [1 / 2, 1 / 4, 1 / 8], [0.4, 0.7, 1.0], CANDIDATES),
        ("qwen2.5-vl", 28, [3, 6, 15, 22], [3 / 4, 1 / 2, 1 / 4, 1 / 8], [0.2, 0.5, 0.8, 1.0], [1.0, 1.0, 1.0, 1.2]),
    ],
)
def test_btp_as_the_paper_has_it(family, num_layers, layers, keep, weights, oversample):
    plan = presets.btp_paper(num_layers, family=family)
    assert column(plan, "layer") == layers
    assert column(plan, "keep") == keep
    assert column(plan, "attention_weight") == weights
    assert column(plan, "oversample") == pytest.approx(oversample)
    assert column(plan, "seeds") == [0.5] + [0.0] * (len(layers) - 1)
    assert set(column(plan, "attention")) == {"softmax"}
    found = range(num_layers - len(layers), num_layers)
    assert column(presets.btp_paper(num_layers, family=family, layers=found), "layer") == list(found)


@pytest.mark.parametrize(
    ("family", "num_layers", "layers", "keep", "weights", "attention"),
    [
        ("llava-1.5", 32, [3, 6, 14, 22], [1 / 2, 1 / 4, 1 / 12, 0], [0.3, 0.9, 1.0], "logits"),
        ("qwen2.5-vl", 28, [3, 6, 15, 22], [1 / 2, 1 / 4, 1 / 8, 0], [0.1, 0.4, 1.0], "softmax"),
    ],
)
def test_btp_as_the_code_has_it(family, num_layers, layers, keep, weights, attention):
    plan = presets.btp_released(num_layers, family=family)
    assert column(plan, "layer") == layers[:3]
    assert column(plan, "keep") == keep[:3]
    assert column(plan, "attention_weight") == weights
    assert column(plan, "oversample") == [3.7, 1.5, 1.2]
    assert set(column(plan, "attention")) == {attention}
    assert set(column(plan, "seeds")) == {0.0}
    dropped = presets.btp_released(num_layers, family=family, drop_last=True)
    assert dropped.stages[:3] == plan.stages
    assert (dropped.stages[3].layer, dropped.stages[3].keep) == (22, 0.0)


def test_btp_takes_other_settings():
    plan = presets.btp_released(32, layers=(10, 25), keep=(0.4, 0.1), attention_weights=(0.2, 0.7), oversample=(2, 1))
    assert column(plan, "layer") == [10, 25]
    assert column(plan, "keep") == [0.4, 0.1]
    assert column(plan, "attention_weight") == [0.2, 0.7]
    assert column(plan, "oversample") == [2, 1]
    below = presets.btp_released(32, layers=(10, 14, 25), drop_last=True)
    assert column(below, "layer") == [10, 14, 25, 26]


def test_scaling_keeps_relative_depth():
    assert presets.scale_layers((3, 6, 14), 40) == (4, 8, 18)
    assert presets.scale_layers((3, 6, 14), 28) == (3, 5, 12)
    assert presets.scale_layers((3, 6, 15, 22), 32, reference_depth=28) == (3, 7, 17, 25)
    assert presets.scale_layers((3, 6, 14, 22), 4) == (0, 1, 2, 3)
    with pytest.raises(PlanError, match="3 stages need as many decoder layers, got 2"):
        presets.btp_released(2)


def test_todre_drops_the_rest_only_where_little_attention_is_left():
    for variant in ("k_center", "max_sum"):
        plan = presets.todre(32, variant=variant, keep=0.1, drop_below=0.2)
        assert plan.stages == (
            Stage(layer=0, keep=0.1, selector=variant),
            Stage(layer=28, keep=0.0, attention_below=0.2),
        )
        assert SYSTEMS[f"todre_{variant}"].plan(32).stages[0].selector == variant
    assert presets.todre(32).stages[1].attention_below == 0.10
    assert presets.todre(32, drop_below=None).stages == presets.todre(32).stages[:1]
    assert column(presets.todre(40), "layer") == [0, 35]
    assert column(presets.todre(4), "layer") == [0, 3]  # 7L/8 rounds to a layer that is not there
    with pytest.raises(PlanError, match="'max_sum' or 'k_center', got 'sum'"):
        presets.todre(32, variant="sum")


@pytest.mark.parametrize("system", [presets.fastv, presets.dart])
def test_one_cut_systems_take_their_layer_and_share(system):
    (stage,) = system(32, layer=7, keep=0.3).stages
    assert (stage.layer, stage.keep) == (7, 0.3)
    assert system(28).stages[0].layer == 2
    assert presets.vtw(32, layer=9).stages[0].layer == 9
    assert presets.cdpruner(32, keep=0.2).num_kept(100) == presets.divprune(32, keep=0.2).num_kept(100) == (20,)


def test_controls_change_the_selector_and_nothing_else():
    plan = presets.btp_paper(32)
    for control, name in ((presets.random_control(plan), "random"), (presets.uniform_control(plan), "uniform")):
        assert set(column(control, "selector")) == {name}
        for field in ("layer", "keep", "attention_weight", "oversample", "seeds"):
            assert column(control, field) == column(plan, field)
        assert SYSTEMS[name].plan(32) == control


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: presets.btp_released(32, layers=(3, 6)), "of one length, got 2, 3, 3, 3; give one value a stage"),
        (lambda: presets.btp_released(32, oversample=(2.0,)), "of one length, got 3, 3, 3, 1"),
        (lambda: presets.btp_paper(28, layers=(3, 6, 15), family="qwen2.5-vl"), "of one length, got 3, 4, 4, 4"),
        (lambda: presets.btp_released(32, keep=(0.5, 0.2)), "got 2 keep values; pass layers as well"),
        (lambda: presets.btp_released(32, keep=()), "got 0 keep values; pass layers as well"),
        (lambda: presets.btp_paper(32, family="llava"), "one of llava-1.5, llava-1.6, qwen2.5-vl, got 'llava'"),
        (lambda: presets.btp_released(32, family="llava-1.6"), "one of llava-1.5, qwen2.5-vl, got 'llava-1.6'"),
    ],
)
def test_btp_refuses_uneven_settings(build, message):
    with pytest.raises(PlanError, match=message):
        build()
