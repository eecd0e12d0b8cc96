"""The study's memory: what is asked and told survives a kill, a resume and a second look through Optuna."""

import multiprocessing
import os
import signal

import optuna
import pytest
from optuna.trial import TrialState

from autotune.config import AutotuneError
from autotune.objective import Told
from autotune.ranges import Choice, Float, Int
from autotune.store import Database
from autotune.study import MAX_REPEATS, Study, next_draw
from btp import presets
from btp.plan import Plan, Stage

RANGES = {"layer": Int(0, 7), "weight": Float(0.0, 1.0), "selector": Choice(("attention", "diversity"))}
HAND_SET = presets.btp_released(8)


def told(number, draw=None, plan=None, name="", ratio=0.5, **changes):
    """A replayed trial with a known optimum: diversity at weight 0.8 before layer 4."""
    loss = 1.0 if draw is None else abs(draw["weight"] - 0.8) + 0.1 * abs(draw["layer"] - 4)
    loss += 0.3 * (draw is not None and draw["selector"] != "diversity")
    settings = {
        "name": name or f"trial {number}",
        "plan": plan or Plan(stages=(Stage(layer=draw["layer"], keep=0.5, attention_weight=draw["weight"]),)),
        "num_samples": 288,
        "score": 1 - loss / 2,
        "proxy": loss,
        "nll": 0.2,
        "by_task": {"reading": 1 - loss / 2},
        "worst_task": 0.9,
        "ratio_low": ratio - 0.01,
        "ratio_high": ratio + 0.01,
        "measured": True,
        "limit": 0.7,
    }
    return Told(number=number, draw=draw, ratio=ratio, **{**settings, **changes})


def study_in(storage, name="replay", seed=0, **terms):
    """A study in an SQLite file, as another worker sees it whenever it is called."""
    return Study(Database(f"sqlite:///{storage}"), name, seed, **terms)


def ask(study, sampler="tpe", target=1000):
    asked = study.ask(RANGES, sampler, target)
    assert asked is not None
    return asked


def step(study, sampler="tpe", **changes):
    asked = ask(study, sampler)
    fixed = isinstance(asked.work, Plan)
    draw, plan = (None, asked.work) if fixed else (asked.work, None)
    finished = told(asked.number, draw, plan, asked.name, **changes)
    study.tell(asked, finished)
    study.mirror.flush()
    return finished


def search(storage, num_trials, stop_after=None, seed=3, sampler="tpe"):
    study = study_in(storage, seed=seed)
    study.enqueue("hand-set", HAND_SET)
    while study.num_done < num_trials and study.num_done != stop_after:
        step(study, sampler)
    return study


def stored(tmp_path):
    return optuna.load_study(study_name="replay", storage=f"sqlite:///{tmp_path / 'study.db'}")


def test_what_is_told_is_kept_as_it_was(tmp_path):
    study = study_in(tmp_path / "study.db")
    study.enqueue("hand-set", HAND_SET)
    finished = [step(study), step(study, guard=0.8), step(study, complete=False, num_samples=32, measured=False)]
    assert study_in(tmp_path / "study.db").told() == finished
    assert finished[0].name == "hand-set"
    assert finished[0].draw is None
    assert finished[1].draw.keys() == RANGES.keys()


def test_a_draw_is_recorded_as_the_trials_parameters(tmp_path):
    study = search(tmp_path / "study.db", 4)
    assert [t.params for t in stored(tmp_path).trials] == [t.draw or {} for t in study.told()]


def test_a_fixed_plan_is_enqueued_once(tmp_path):
    for _ in range(2):
        study = search(tmp_path / "study.db", 3)
    assert [t.name for t in study.told()] == ["hand-set", "trial 1", "trial 2"]


@pytest.mark.parametrize(("sampler", "num_trials", "stop_after"), [("tpe", 13, 11), ("qmc", 5, 3)])
def test_an_interrupted_study_asks_what_an_unbroken_one_asks(tmp_path, sampler, num_trials, stop_after):
    whole = search(tmp_path / "whole.db", num_trials, sampler=sampler).told()
    search(tmp_path / "broken.db", num_trials, stop_after, sampler=sampler)
    assert search(tmp_path / "broken.db", num_trials, sampler=sampler).told() == whole


def test_another_seed_asks_something_else(tmp_path):
    draws = [search(tmp_path / f"{seed}.db", 3, seed=seed).told()[1].draw for seed in (3, 4)]
    assert draws[0] != draws[1]


def test_the_search_learns(tmp_path):
    scores = [t.score for t in search(tmp_path / "study.db", 26).told()]
    assert max(scores) > 0.9
    assert sum(scores[18:]) / 8 > sum(scores[1:11]) / 10


def test_a_fixed_plan_that_the_space_can_express_teaches_the_sampler(tmp_path):
    asked = {}
    for name, draw in {"known": {"layer": 4, "weight": 0.8, "selector": "diversity"}, "unknown": None}.items():
        study = study_in(tmp_path / f"{name}.db")
        study.enqueue("hand-set", HAND_SET)
        asked_first = ask(study, "qmc")
        study.tell(asked_first, told(asked_first.number, draw, HAND_SET, "hand-set"))
        asked[name] = [step(study, "qmc").draw for _ in range(3)]
    assert asked["unknown"][1:] == asked["known"][:2]  # it took the first place in the sequence


def test_the_trials_of_a_dead_worker_are_asked_again_with_their_parameters(tmp_path):
    def ask_twice(pipe):
        study = study_in(tmp_path / "study.db")
        study.enqueue("hand-set", HAND_SET)
        asked = [ask(study) for _ in range(2)]
        study.mirror.flush()
        pipe.send(asked)
        os.kill(os.getpid(), signal.SIGKILL)

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    worker = context.Process(target=ask_twice, args=(theirs,))
    worker.start()
    asked = ours.recv()
    worker.join()
    again = study_in(tmp_path / "study.db")
    again.enqueue("hand-set", HAND_SET)
    retried = [ask(again) for _ in range(2)]
    assert [each.work for each in retried] == [each.work for each in asked]
    assert retried[0].name == "hand-set"
    assert [each.number for each in retried] == [each.number for each in asked]  # nobody has overtaken them
    assert [each.lease.retry_of for each in retried] == [each.lease.token for each in asked]
    assert again.num_done == 0
    again.mirror.settle()
    trials = stored(tmp_path).trials
    assert [t.state for t in trials] == [TrialState.FAIL] * 2 + [TrialState.RUNNING] * 2
    assert [t.params for t in trials[:2]] == [t.params for t in trials[2:]]
    assert [t.user_attrs["retry_of"] for t in trials[2:]] == [each.lease.token for each in asked]


def test_what_turns_up_late_of_a_lost_attempt_says_why_it_failed(tmp_path):
    """As where a server carries out what a killed worker had sent it."""
    study = study_in(tmp_path / "study.db")
    asked = ask(study, sampler="random")
    study.mirror.flush()
    study.release(asked, "its worker stopped")
    late = study.mirror._made(asked.lease, asked.work)
    study.mirror.sweep()
    trial = study.mirror.storage.get_trial(late)
    assert (trial.state.name, trial.user_attrs["reason"]) == ("FAIL", "its worker stopped")


def test_every_finished_trial_carries_the_one_constraint(tmp_path):
    study = search(tmp_path / "study.db", 3)
    late = step(study, ratio=0.9)
    stopped = step(study, complete=False, num_samples=96)
    trials = [t for t in stored(tmp_path).trials if t.state.is_finished()]
    assert [list(t.constraints) for t in trials] == [["over"]] * 5
    assert trials[3].constraints["over"] == pytest.approx(late.over)
    assert trials[4].constraints["over"] == pytest.approx(stopped.over)


def test_a_stopped_trial_counts_and_teaches_but_is_never_optunas_best(tmp_path):
    study = search(tmp_path / "study.db", 2)
    stopped = step(study, complete=False, num_samples=32, score=1.0, ratio=0.1)
    late = step(study, score=1.0, ratio=0.9)
    assert study.num_done == 4
    best = {t.number for t in stored(tmp_path).best_trials}
    assert best
    assert best.isdisjoint({stopped.number, late.number})
    assert stored(tmp_path).trials[stopped.number].state == TrialState.PRUNED
    next_draw = ask(study, "qmc").work
    without = study_in(tmp_path / "without.db", seed=3)
    without.enqueue("hand-set", HAND_SET)
    for _ in range(2):
        step(without, "qmc")
    assert ask(without, "qmc").work != next_draw


@pytest.mark.parametrize("sampler", ["qmc", "random"])
def test_a_sampler_that_learns_nothing_draws_by_its_place_alone(sampler):
    known = [told(number, {"layer": number % 8, "weight": 0.1, "selector": "diversity"}) for number in range(3)]
    draws = [
        next_draw(sampler, RANGES, finished, 0, lambda draw: None, index=index, pending=pending)
        for finished, index, pending in ((known, None, ()), (known[:1], 3, [known[2].draw]), ([], 3, ()))
    ]
    assert draws[0] == draws[1] == draws[2]
    assert next_draw(sampler, RANGES, known, 0, lambda draw: None, index=4) != draws[0]


def test_a_draw_that_repeats_is_mutated_until_it_is_new():
    known = [told(number, {"layer": 4, "weight": 0.8, "selector": "diversity"}) for number in range(12)]
    first = next_draw("tpe", RANGES, known, 0, lambda draw: None)

    def same(draw):  # the weight is no part of the plan
        return known[0] if draw["layer"] == first["layer"] and draw["selector"] == first["selector"] else None

    found = next_draw("tpe", RANGES, known, 0, same)
    assert same(found) is None
    assert found == next_draw("tpe", RANGES, known, 0, same)
    assert found.keys() == RANGES.keys()
    asked = []
    next_draw("tpe", RANGES, known, 0, lambda draw: asked.append(draw) or known[0])
    assert len(asked) == MAX_REPEATS  # all the plans are tried: one of them is tried again
    changed = [sum(draw[name] != first[name] for name in RANGES) for draw in asked]
    assert changed[0] == 0 < changed[-1]


def test_the_same_result_is_found_by_its_key(tmp_path):
    study = study_in(tmp_path / "study.db")
    finished = []
    for key, complete in (("a", False), ("b", True), ("a", True), ("a", True), ("", True)):
        asked = ask(study, "random")
        finished.append(told(asked.number, asked.work, complete=complete))
        study.tell(asked, finished[-1], key)
    assert study.same_as("a") == finished[2]
    assert study.same_as("b") == finished[1]
    assert study.same_as("c") is None
    assert study.same_as("") is None


def test_fresh_forgets_one_study_and_leaves_the_others(tmp_path):
    storage = tmp_path / "study.db"
    database = Database(f"sqlite:///{storage}")
    Study.forget(database, "one")  # nothing there yet
    assert not storage.exists()
    for name in ("one", "two"):
        study_in(storage, name).note("limit", 0.5)
        step(study_in(storage, name))
    Study.forget(database, "one")
    assert study_in(storage, "one").notes == {}
    assert study_in(storage, "one").told() == []
    assert study_in(storage, "two").notes == {"limit": 0.5}
    assert study_in(storage, "two").num_done == 1


def test_any_seed_from_zero_up_can_ask(tmp_path):
    for sampler in ("random", "qmc"):
        assert ask(study_in(tmp_path / f"{sampler}.db", seed=2**40), sampler).number == 0


def test_storage_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "study.db").write_text("my diary, with quite a few words in it")
    with pytest.raises(AutotuneError, match="must be an SQLite database"):
        study_in(tmp_path / "study.db")
    assert (tmp_path / "study.db").read_text().startswith("my diary")
