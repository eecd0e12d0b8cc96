"""The search without a model: draws are legal plans within the budget, studies resume, known optima are found."""

from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autotune.config import AutotuneError
from autotune.latency_model import LatencyModel
from autotune.objective import Told, front
from autotune.space import SearchSpace, rescale
from autotune.study import Study
from btp import presets
from btp.plan import Plan, Stage

SPACE = Path(__file__).parents[2] / "search_spaces" / "reference.yaml"
LATENCY = LatencyModel(floor=0.2, num_layers=8, num_image_tokens=256)


def told(number: int, score: float, ratio: float, limit: float = 0.7, plan: Plan | None = None, name: str = "") -> Told:
    return Told(
        number=number,
        name=name or f"trial {number}",
        plan=plan or Plan(stages=()),
        score=score,
        by_task={"reading": score},
        ratio=ratio,
        ratio_low=ratio - 0.01,
        ratio_high=ratio + 0.01,
        limit=limit,
    )


@given(st.integers(0, 10_000), st.floats(0.4, 0.9))
def test_every_draw_is_a_legal_plan_within_its_budget(seed: int, limit: float) -> None:
    space = SearchSpace.load(SPACE)
    rng = np.random.default_rng(seed)

    class Random:
        def suggest_int(self, name: str, low: int, high: int) -> int:
            return int(rng.integers(low, high + 1))

        def suggest_float(self, name: str, low: float, high: float) -> float:
            return float(rng.uniform(low, high))

        def suggest_categorical(self, name: str, choices: list[str]) -> str:
            return str(rng.choice(choices))

    draw = space.suggest(Random())
    plan = LATENCY.solve(space.schedule(draw, 8), draw["budget"] * limit)
    assert all(stage.layer < 8 for stage in plan.stages)
    assert Plan.from_dict(plan.to_dict()) == plan
    empty = Plan(stages=(Stage(layer=plan.stages[0].layer, keep=0.0),))
    reachable = LATENCY.ratio(empty) <= draw["budget"] * limit  # a late first stage cannot save more than it can
    if reachable:
        assert LATENCY.ratio(plan) == pytest.approx(draw["budget"] * limit, abs=0.01)


def test_rescaling_by_one_is_the_plan_itself() -> None:
    plan = presets.btp_released(8)
    again = rescale(plan)(1.0)
    assert [s.layer for s in again.stages] == [s.layer for s in plan.stages]
    assert [s.keep for s in again.stages] == pytest.approx([s.keep for s in plan.stages])


def test_a_budget_out_of_reach_still_leaves_a_token() -> None:
    hand_set = presets.btp_released(8)
    shortest = LATENCY.solve(rescale(hand_set), 0.01)
    assert shortest.num_kept(256) == (1, 1, 1)
    assert shortest.num_kept(256) < LATENCY.solve(rescale(hand_set), 0.5).num_kept(256)
    withdrawal = Plan(stages=(Stage(layer=2, keep=0.5), Stage(layer=5, keep=0.0)))
    assert LATENCY.solve(lambda _: withdrawal, 0.01) == withdrawal


def test_the_latency_model_recovers_a_line() -> None:
    truth = LatencyModel(floor=0.3, num_layers=8, num_image_tokens=256)
    plans = [presets.btp_released(8), presets.fastv(8), Plan(stages=(Stage(layer=0, keep=0.0),))]
    fitted = LatencyModel.fit([(plan, truth.ratio(plan)) for plan in plans], 8, 256)
    assert fitted.floor == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"colour": [0, 1]}, "colour"),
        ({"budget": [1.0, 0.5]}, "budget must be a rising [low, high]"),
        ({"budget": [float("nan"), 1]}, "budget must be a rising [low, high]"),
        ({"attention_weight": [0, 2]}, "within [0, 1], got [0, 2]"),
        ({"oversample": [0.5, 2]}, "oversample must be"),
        ({"first_layer": [20, 30]}, "first_layer must be"),
        ({"shape": 3}, "shape must be a list of two numbers, got 3"),
        ({"num_stages": [1.5, 2.5]}, "num_stages must be a list of two whole numbers"),
        ({"selectors": "balanced"}, "selectors must be a list of selector names"),
        ({"selectors": None}, "selectors must be a list of selector names"),
        ({"selectors": []}, "got none"),
        ({"selectors": ["magic"]}, "got ['magic']"),
    ],
)
def test_a_broken_space_is_refused(tmp_path: Path, change: dict[str, object], named: str) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(SPACE.read_text()), **change}))
    with pytest.raises(AutotuneError) as raised:
        SearchSpace.load(path)
    assert named in str(raised.value)


def test_the_front_holds_what_nobody_feasible_beats() -> None:
    trials = [told(0, 0.5, 0.3), told(1, 0.4, 0.4), told(2, 0.8, 0.5), told(3, 0.9, 0.8)]
    assert [t.number for t in front(trials)] == [0, 2]


def test_fresh_forgets_one_study_and_leaves_the_others(tmp_path: Path) -> None:
    storage = tmp_path / "study.db"
    Study.forget(storage, "one")  # nothing there yet
    for name in ("one", "two"):
        Study(storage, name, 0).note("limit", 0.5)
    Study.forget(storage, "one")
    assert Study(storage, "one", 0).notes == {}
    assert Study(storage, "two", 0).notes == {"limit": 0.5}


def test_any_seed_from_zero_up_can_ask(tmp_path: Path) -> None:
    number, _, draw = Study(tmp_path / "study.db", "seeded", 2**40).ask(SearchSpace.load(SPACE))
    assert number == 0
    assert not isinstance(draw, Plan)


def test_storage_that_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_text("my diary, with quite a few words in it")
    with pytest.raises(AutotuneError, match="must be an SQLite database"):
        Study(tmp_path / "study.db", "one", 0)
    assert (tmp_path / "study.db").read_text().startswith("my diary")


def replayed(plan: Plan) -> float:
    """A table with a known optimum: attention at lambda 0.8, first stage before layer 4."""
    first = plan.stages[0]
    return 1 - abs(first.attention_weight - 0.8) - 0.1 * abs(first.layer - 4) - 0.2 * (first.selector != "attention")


def search(storage: Path, num_trials: int, stop_after: int | None = None, seed: int = 3) -> Study:
    space = SearchSpace.load(SPACE)
    study = Study(storage, "replay", seed)
    study.enqueue("hand-set", presets.btp_released(8))
    while study.num_done < num_trials and study.num_done != stop_after:
        number, name, asked = study.ask(space)
        plan = asked if isinstance(asked, Plan) else LATENCY.solve(space.schedule(asked, 8), asked["budget"] * 0.7)
        study.tell(told(number, replayed(plan), LATENCY.ratio(plan), plan=plan, name=name))
    return study


def test_the_search_nears_a_known_optimum_and_beats_its_random_start(tmp_path: Path) -> None:
    found = search(tmp_path / "study.db", 40).told()
    assert found[0].name == "hand-set"
    assert max(t.score for t in found) > 0.7
    assert np.mean([t.score for t in found[25:]]) > np.mean([t.score for t in found[1:13]])


def test_an_interrupted_study_asks_what_an_unbroken_one_asks(tmp_path: Path) -> None:
    whole = search(tmp_path / "whole.db", 18).told()
    search(tmp_path / "broken.db", 18, stop_after=9)
    resumed = search(tmp_path / "broken.db", 18).told()
    assert [t.plan for t in resumed] == [t.plan for t in whole]
    other = search(tmp_path / "other.db", 18, seed=4).told()
    assert [t.plan for t in other[1:]] != [t.plan for t in whole[1:]]


def test_a_killed_trial_is_asked_again_with_its_parameters(tmp_path: Path) -> None:
    space = SearchSpace.load(SPACE)
    study = Study(tmp_path / "study.db", "replay", 0)
    study.enqueue("hand-set", presets.btp_released(8))
    asked = [study.ask(space) for _ in range(2)]  # and the process dies here
    again = Study(tmp_path / "study.db", "replay", 0)
    again.enqueue("hand-set", presets.btp_released(8))
    retried = [again.ask(space) for _ in range(2)]
    assert [entry[2] for entry in retried] == [entry[2] for entry in asked]
    assert retried[0][1] == "hand-set"
    assert {entry[0] for entry in retried}.isdisjoint(entry[0] for entry in asked)


def test_every_finished_trial_carries_the_one_constraint(tmp_path: Path) -> None:
    search(tmp_path / "study.db", 6)
    trials = optuna.load_study(study_name="replay", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    done = [t for t in trials if t.state == optuna.trial.TrialState.COMPLETE]
    assert len(done) == 6
    assert all(list(t.constraints) == ["latency_over_limit"] for t in done)
