"""Every draw is a family of legal plans, plans find their draws again, and the space files say what they may."""

import random
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotune.config import AutotuneError
from autotune.latency_model import LatencyModel
from autotune.ranges import constant
from autotune.space import Choice, Float, Int, SearchSpace, random_draw, realised_key, rescale
from btp import Plan, Stage, presets, prune
from btp.cost import tokens_per_layer
from btp.families import anatomy_of
from tests.btp.families import FAMILIES

FOLDER = Path(__file__).parents[2] / "search_spaces"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
FILE_OF = {
    "gemma3": "gemma3",
    "idefics3": "internvl",
    "internvl": "internvl",
    "llava": "llava",
    "llava_next": "llava_next",
    "llava_onevision": "llava_next",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen2_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "smolvlm": "internvl",
}
FALLS = (0.0, 0.01, 0.3, 1.0, 2.0, 3.4, 3.6, 5.0, 6.9, 7.0, 64.0)


@cache
def load(name):
    return SearchSpace.load(FOLDER / f"{name}.yaml")


def draws(name):
    return st.integers(0, 2**32).map(lambda number: random_draw(load(name).ranges, random.Random(number)))


@pytest.mark.parametrize("name", FILES)
def test_every_draw_is_a_family_of_legal_plans_that_keep_ever_fewer(name):
    space, rng = load(name), random.Random(0)
    for _ in range(200):
        family = space.schedule(random_draw(space.ranges, rng), depth := rng.choice((2, 4, 8, 28, 40)))
        counts = [tokens_per_layer(family(t), depth, 10_000) for t in FALLS]  # refuses layers beyond the last
        for more, fewer in pairwise(counts):
            assert all(a >= b for a, b in zip(more, fewer, strict=True))
        assert min(counts[0]) in (0, *range(9_980, 10_001))  # nothing is gone yet, but for a final drop
        assert max(counts[-1][1:]) <= 30


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_no_draw_of_a_familys_file_is_refused_by_its_models(family):
    space, model, inputs = load(FILE_OF[family]), FAMILIES[family].build(), FAMILIES[family].inputs()
    decoder, rng = anatomy_of(model).decoder, random.Random(1)
    num_image_tokens = int((inputs["input_ids"] == FAMILIES[family].image_token).sum())
    flops = LatencyModel.from_flops(decoder, num_image_tokens, inputs["input_ids"].shape[1] - num_image_tokens)
    for ratio in (0.95, 0.8, 0.7, 0.6, 0.5):
        plan = flops.solve(space.schedule(random_draw(space.ranges, rng), decoder.num_layers), ratio)
        with torch.no_grad(), prune(model, plan) as trace:
            model(**inputs)
        assert trace.counts == tokens_per_layer(plan, decoder.num_layers, num_image_tokens)


def test_every_file_is_some_familys_and_every_family_has_one():
    assert set(FILE_OF) == set(FAMILIES)
    assert {*FILE_OF.values(), "reference"} == set(FILES)


@pytest.mark.parametrize(("depth", "num_image_tokens"), [(4, 25), (8, 256), (28, 400), (32, 2880)])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_plan_of_the_space_finds_a_draw_that_realises_the_same(depth, num_image_tokens, data):
    name = data.draw(st.sampled_from(FILES))
    space, draw = load(name), data.draw(draws(name))
    fall = data.draw(st.floats(0.05, 3.4))  # beyond, stages move, and two draws may come to mean the same
    plan = space.schedule(draw, depth)(fall)
    assume(
        all(count or not stage.keep for count, stage in zip(plan.num_kept(num_image_tokens), plan.stages, strict=True))
    )
    found = space.draw_of(plan, depth, num_image_tokens, draw["budget"])
    assert found is not None
    assert set(found) == set(space.ranges)
    again = space.schedule(found, depth)(fall)
    assert realised_key(rounded(again), depth, num_image_tokens) == realised_key(rounded(plan), depth, num_image_tokens)


def rounded(plan):
    """Without the last digits of what was added up and taken apart again."""
    return replace(plan, stages=tuple(replace(s, attention_weight=round(s.attention_weight, 9)) for s in plan.stages))


EXPRESSED = {
    "dense": presets.dense,
    "fastv": presets.fastv,
    "vtw": presets.vtw,
    "divprune": presets.divprune,
    "ToDRE v1, stage 1": lambda depth: presets.todre(depth, variant="k_center", drop_below=None),
    "ToDRE v2, stage 1": lambda depth: presets.todre(depth, drop_below=None),
}


@pytest.mark.parametrize("depth", [8, 32])
@pytest.mark.parametrize("name", EXPRESSED)
def test_published_systems_are_draws_of_the_reference_space(name, depth):
    plan = EXPRESSED[name](depth)
    draw = load("reference").draw_of(plan, depth, 256, 0.95)
    assert draw is not None
    family = load("reference").schedule(draw, depth)
    kept = min((stage.keep for stage in plan.stages if stage.keep), default=1.0)
    got = family(-torch.tensor(kept).double().log().item())
    assert realised_key(got, depth, 256) == realised_key(plan, depth, 256)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("todre_max_sum", "a stage with a condition"),
        ("btp_paper", "k'/k differs by stage"),
        ("btp_released", "k'/k differs by stage"),
        ("pyramiddrop", "positions are reset"),
        ("cdpruner", "not in selectors_before"),
        ("dart", "not in selectors"),
    ],
)
def test_what_the_reference_space_cannot_say_has_no_draw_there(name, why):
    assert load("reference").draw_of(presets.SYSTEMS[name].plan(8), 8, 256, 0.95) is None, why


def test_a_wider_space_says_the_paper_and_the_code_of_btp_and_pyramiddrop():
    wide = replace(
        load("reference"),
        free_oversample=True,
        free_selector=True,
        oversample=Float(1.0, 4.0),
        seeds=Float(0.0, 0.5),
        attention=Choice(("softmax", "logits")),
        positions=Choice(("keep", "reset")),
    )
    for system in (presets.btp_paper, presets.btp_released, presets.pyramiddrop):
        assert wide.draw_of(system(32), 32, 576, 0.95) is not None


def test_a_plan_has_no_draw_at_a_budget_that_the_space_has_not():
    space, plan = load("reference"), presets.fastv(8)
    assert space.draw_of(plan, 8, 256, 0.5) is None
    assert space.draw_of(plan, 8, 256, 0.9)["budget"] == 0.9
    assert space.draw_of(presets.fastv(32), 1, 256, 0.9) is None  # another depth's


def test_a_nearly_possible_plan_is_taken_and_a_distant_one_is_not():
    space = load("reference")
    before = Stage(layer=0, keep=0.5, selector="max_sum")
    near = Plan(stages=(before, Stage(layer=2, keep=0.5**4.1, selector="attention")))  # a shape of 3.1, where 3 is most
    assert space.draw_of(near, 8, 256, 0.9)["shape_0"] == 3.0
    far = Plan(stages=(before, Stage(layer=2, keep=0.5**5, selector="attention")))
    assert space.draw_of(far, 8, 256, 0.9) is None


def test_ranges_are_what_a_draw_can_differ_in():
    ranges = load("reference").ranges
    assert 12 <= len(ranges) <= 19
    assert not any(setting.is_constant for setting in ranges.values())
    space = replace(load("reference"), selectors=Choice(("attention",)), before=constant(False), budget=Float(1.0, 1.0))
    gone = {"before", "selector_before", "shape_0", "selector", "attention_weight", "attention_step_1", "budget"}
    assert set(ranges) - set(space.ranges) == {*gone, "attention_step_2", "attention_step_3"}
    free = replace(load("reference"), free_attention_weight=True, free_selector=True).ranges
    assert {"attention_weight_0", "attention_weight_2", "selector_0", "selector_2"} <= set(free)
    assert not {"attention_weight", "attention_step_1", "selector"} & set(free)


def test_a_draw_of_another_space_is_refused():
    draw = random_draw(load("reference").ranges, random.Random(0))
    with pytest.raises(AutotuneError, match="missing or unknown: selector, selector_0"):
        replace(load("reference"), num_stages=Int(0, 1), free_selector=True).schedule(
            {name: value for name, value in draw.items() if not name.endswith(("_1", "_2", "_3"))}, 8
        )


def test_draws_are_seeded_and_reach_the_whole_range():
    ranges = {"a": Int(1, 3), "b": Choice(("x", "y")), "c": Float(0.0, 1.0)}
    many = [random_draw(ranges, random.Random(seed)) for seed in range(60)]
    assert many[7] == random_draw(ranges, random.Random(7))
    assert {draw["a"] for draw in many} == {1, 2, 3}
    assert {draw["b"] for draw in many} == {"x", "y"}
    assert min(draw["c"] for draw in many) < 0.1 < 0.9 < max(draw["c"] for draw in many)


def test_lambda_rises_to_one_and_the_grid_seeds_are_the_first_stages():
    space = replace(load("reference"), seeds=Float(0.0, 0.5))
    draw = {name: setting.middle for name, setting in space.ranges.items()}
    draw |= {"num_stages": 3, "before": True, "attention_weight": 0.5, "attention_step_1": 0.2, "attention_step_2": 0.6}
    plan = space.schedule(draw | {"final_layer": 0.9, "layer_gap_1": 0.2, "layer_gap_2": 0.2, "first_layer": 0.0}, 8)(
        1.0
    )
    assert [stage.layer for stage in plan.stages] == [0, 1, 3, 5, 7]
    assert [stage.attention_weight for stage in plan.stages[1:4]] == [0.5, 0.7, 1.0]
    assert [stage.seeds for stage in plan.stages[1:4]] == [0.25, 0.0, 0.0]
    assert plan.stages[-1].keep == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("num_stage: [1, 2]", r"no 'num_stage'; known are num_stages, .*did you mean num_stages"),
        ("num_stages: [1, 2.5]", "num_stages must be two rising whole numbers"),
        ("num_stages: [3, 1]", "num_stages must be two rising whole numbers"),
        ("num_stages: [1, 2, 3]", r"num_stages must be \[low, high\]"),
        ("first_layer: [0, 1.2]", r"first_layer must lie within \[0, 1\]"),
        ("shape: deep", "shape must be two rising numbers"),
        ("selectors: [joint, jont]", r"selectors must be some of attention, .*got \['jont'\]"),
        ("selectors: []", "selectors must be one or more options"),
        ("selectors_before: [joint]", r"must do without attention.*\['joint'\]"),
        ("before: perhaps", r"before must be some of False, True, got \['perhaps'\]"),
        ("free_selector: [true]", "free_selector must be true or false"),
        ("positions: [keep, keep]", "each once"),
    ],
)
def test_files_that_break_a_rule_name_the_file_the_key_and_the_rule(tmp_path, line, message):
    key = line.partition(":")[0]
    text = (FOLDER / "reference.yaml").read_text(encoding="utf-8")
    path = tmp_path / "mine.yaml"
    path.write_text("\n".join(row for row in text.splitlines() if not row.startswith(f"{key}:")) + f"\n{line}\n")
    with pytest.raises(AutotuneError, match=f"mine.yaml: .*{message}"):
        SearchSpace.load(path)


@pytest.mark.parametrize("text", ["num_stages: [1, 2]", "[1, 2]", "a: [", ""])
def test_files_that_are_no_search_space_are_refused(tmp_path, text):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(AutotuneError, match=r"mine.yaml: a search space must"):
        SearchSpace.load(tmp_path / "mine.yaml")


def test_rescaling_is_the_plan_at_one_and_keeps_what_drops_all():
    plan = presets.btp_released(32, drop_last=True)
    assert [s.keep for s in rescale(plan)(1.0).stages] == pytest.approx([s.keep for s in plan.stages])
    assert rescale(plan)(2.0).stages[1].keep == pytest.approx(1 / 16)
    assert all(rescale(plan)(t).stages[-1].keep == 0 for t in (0.0, 0.3, 64.0))


def test_plans_of_one_realised_key_keep_the_same_tokens():
    model, inputs, rng = FAMILIES["llava"].build(), FAMILIES["llava"].inputs(), random.Random(5)
    by_key, num_plans = {}, 0
    for _ in range(120):
        selector = rng.choice(("attention", "joint", "diversity", "max_sum"))
        changed = {"attention_weight": rng.choice((0.2, 0.9)), "seeds": rng.choice((0.0, 0.5))}
        first = Stage(layer=1, keep=rng.choice((0.5, 0.51, 0.99)), selector=selector, **changed)
        last = Stage(
            layer=2, keep=rng.choice((0.3, 0.31, 0.0)), selector=selector, attention=rng.choice(("softmax", "logits"))
        )
        plan = Plan(stages=(first, last))
        with torch.no_grad(), prune(model, plan) as trace:
            model(**inputs)
        kept = [origin.tolist() for origin in trace.alive]
        assert by_key.setdefault(realised_key(plan, 4, 25), kept) == kept
        num_plans += 1
    assert len(by_key) < num_plans / 2  # many plans did share one


def test_realised_keys_tell_what_may_differ_apart():
    plan = Plan(stages=(Stage(layer=1, keep=0.5, selector="joint"),))
    others = [{"layer": 2}, {"keep": 0.6}, {"selector": "attention"}, {"attention_weight": 0.6}, {"seeds": 0.1}]
    others += [{"oversample": 2.0}, {"attention": "logits"}, {"attention_below": 0.1}]
    plans = [plan, *(Plan(stages=(replace(plan.stages[0], **other),)) for other in others)]
    plans += [replace(plan, positions="reset"), Plan(stages=())]
    assert len({realised_key(p, 8, 256) for p in plans}) == len(plans)
    unknown = [Plan(stages=(Stage(layer=1, keep=0.5, selector="mine", seeds=share),)) for share in (0.0, 0.5)]
    assert realised_key(unknown[0], 8, 256) != realised_key(unknown[1], 8, 256)
    below_a_condition = Plan(stages=(Stage(layer=1, keep=0.3, attention_below=0.1), Stage(layer=2, keep=0.299)))
    assert "[2,77," in realised_key(below_a_condition, 8, 256)
