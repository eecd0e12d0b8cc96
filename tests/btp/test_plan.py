"""Plans: legal by construction, JSON there and back, one rounding rule."""

import dataclasses
import json
import math
import random

import pytest

from btp import Plan, PlanError, ProfileError, Stage
from btp.plan import round_half_up


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer": -1}, "layer must be a whole number from 0, got -1"),
        ({"layer": True}, "layer must be a whole number from 0, got True"),
        ({"layer": 2.0}, "layer must be a whole number from 0, got 2.0"),
        ({"keep": 1.01}, r"keep must be a number in \[0, 1\], got 1.01"),
        ({"keep": -0.1}, "keep must be"),
        ({"keep": math.nan}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"keep": "0.5"}, "keep must be"),
        ({"attention_weight": 1.5}, "attention_weight must be"),
        ({"oversample": 0.9}, "oversample must be a number finite and at least 1, got 0.9"),
        ({"oversample": math.inf}, "oversample must be"),
        ({"selector": ""}, "selector must be a name"),
        ({"selector": "a b"}, "selector must be a name"),
    ],
)
def test_illegal_stages_are_refused(values, message):
    with pytest.raises(PlanError, match=message):
        Stage(**{"layer": 1, "keep": 0.5, **values})


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(3, 0.5), (3, 0.2)], "layers must rise from stage to stage, got 3 after 3"),
        ([(3, 0.5), (2, 0.2)], "layers must rise"),
        ([(1, 0.2), (2, 0.3)], "keep must fall from stage to stage, got 0.3 after 0.2"),
        ([(1, 0.2), (2, 0.2)], "keep must fall"),
    ],
)
def test_illegal_sequences_are_refused(stages, message):
    with pytest.raises(PlanError, match=message):
        Plan(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages))


def test_other_illegal_plans_are_refused():
    with pytest.raises(PlanError, match="'keep' or 'reset', got 'shift'"):
        Plan(stages=(), positions="shift")
    with pytest.raises(PlanError, match="must be a list of Stage objects"):
        Plan(stages=({"layer": 1, "keep": 0.5},))


def random_plan(rng):
    num_stages = rng.randint(0, 4)
    layers = sorted(rng.sample(range(32), num_stages))
    keeps = sorted((rng.random() for _ in range(num_stages)), reverse=True)
    stages = (
        Stage(layer=layer, keep=keep, attention_weight=rng.random(), oversample=1 + rng.random())
        for layer, keep in zip(layers, keeps, strict=True)
    )
    return Plan(stages=tuple(stages), positions=rng.choice(["keep", "reset"]))


@pytest.mark.parametrize("seed", range(50))
def test_plans_survive_json_and_counts_never_rise(seed, tmp_path):
    rng = random.Random(seed)
    plan, num_tokens = random_plan(rng), rng.randint(0, 3000)
    plan.save(tmp_path / "plan.json")
    loaded = Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert loaded.digest == plan.digest
    assert hash(loaded) == hash(plan)
    counts = plan.num_kept(num_tokens)
    assert list(counts) == sorted(counts, reverse=True)
    assert all(abs(count - stage.keep * num_tokens) <= 0.5 for count, stage in zip(counts, plan.stages, strict=True))
    # any swap of two stages is illegal
    if len(plan.stages) > 1:
        with pytest.raises(PlanError):
            Plan(stages=plan.stages[::-1])


def test_halves_round_up():
    assert [round_half_up(count) for count in (0.49, 0.5, 1.5, 2.5)] == [0, 1, 2, 3]
    assert Plan(stages=(Stage(layer=0, keep=0.5), Stage(layer=1, keep=1 / 12))).num_kept(25) == (13, 2)
    assert Plan(stages=()).num_kept(576) == ()


def test_equal_plans_are_equal_however_they_were_written():
    assert Plan(stages=[Stage(layer=1, keep=1)]) == Plan(stages=(Stage(layer=1, keep=1.0),))
    assert Plan(stages=[Stage(layer=1, keep=1)]).digest == Plan(stages=(Stage(layer=1, keep=1.0),)).digest
    assert Plan(stages=()).digest != Plan(stages=(), positions="reset").digest


def test_plans_are_frozen():
    plan = Plan(stages=(Stage(layer=1, keep=0.5),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.positions = "reset"
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.stages[0].keep = 0.1


@pytest.mark.parametrize("stages", [None, 3, Stage(layer=1, keep=0.5), "stages", [None]])
def test_stages_that_are_no_list_of_stages(stages):
    with pytest.raises(PlanError, match="list of Stage objects"):
        Plan(stages=stages)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"stages": [], "color": 1}, "a plan has no color; known are stages, positions"),
        (
            {"stages": [{"layer": 1, "keep": 0.5, "lambda": 1}]},
            "a stage has no lambda; known are layer, keep, selector",
        ),
        ({"stages": [{"layer": 1}]}, "a stage needs keep"),
        ({"positions": "keep"}, "a plan needs stages"),
        ({"stages": 3}, "stages must be a list"),
        ({"stages": [3]}, "a stage must be an object"),
        ({"stages": [{"layer": 1, "keep": 2}]}, "keep must be"),
    ],
)
def test_foreign_data_is_refused_and_the_file_named(data, message, tmp_path):
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(PlanError, match=rf"plan\.json: .*{message}"):
        Plan.load(path)


@pytest.mark.parametrize("text", ['{"stages": [', "", "\x00", "[1, 2]", '"plan"'])
def test_broken_files_are_refused_and_named(text, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ProfileError, match=r"plan\.json: must"):
        Plan.load(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ProfileError, match=r"none\.json: cannot be read"):
        Plan.load(tmp_path / "none.json")
