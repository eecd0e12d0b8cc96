"""The search benchmark: its table, its loop and its arithmetic, against naive ones and against pymoo."""

import itertools
import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from pymoo.indicators.hv import HV

from autotune import racing, reference
from autotune.data import digest, from_dataset
from autotune.evaluation import Evaluator, load_model
from autotune.latency_model import LatencyModel
from autotune.objective import front
from autotune.ranges import Choice, Int
from autotune.realised import realised_key
from benchmarks import search
from benchmarks.grid import GRID, LIMIT, Grid
from benchmarks.record_table import plans_tried_first
from benchmarks.replay import Searcher, errors_of_racing, replay, saved
from benchmarks.search_summary import Scale, best_scores, trials_to
from benchmarks.tabular import TABLE, Table, hypervolume
from btp.cost import DecoderShape
from btp.plan import Plan, Stage

DECODER = DecoderShape(
    num_layers=8,
    hidden_size=192,
    intermediate_size=512,
    num_heads=6,
    num_key_value_heads=6,
    head_dim=32,
    vocab_size=447,
)
NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS = 256, 14
INSIDE = search.SPACES["inside"]


@pytest.fixture(scope="module")
def table():
    return Table.load()


def made(scores, ratios):
    """A table of one task and of plans that have no cell: dense first."""
    plans = tuple(Plan(stages=(Stage(layer=1, keep=1 / (2 + number)),)) for number in range(len(scores) - 1))
    values = np.array(scores, float)
    return Table(
        plans=(Plan(stages=()), *plans),
        cells=np.zeros(1, np.int64),
        first=(),
        ratios=np.array(ratios),
        tasks=("counting",) * values.shape[1],
        data="",
        device="",
        scores=values,
        kl=1 - values,
        nll=1 - values,
    )


# ----------------------------------------------------------------------------------------------------------------- grid


def test_cells_are_numbered_in_their_order():
    assert [GRID.index(cell) for cell in GRID.cells()] == list(range(2592))


def test_a_draw_names_a_cell_by_options_and_by_places_of_numbers():
    assert INSIDE.ranges["first_layer"] == Int(0, 2)
    assert INSIDE.ranges["selector"] == Choice(("joint", "attention"))
    assert "before" not in INSIDE.ranges
    drawn = dict.fromkeys(INSIDE.ranges, 1) | {"selector": "attention"}
    cell = INSIDE.cell(drawn)
    assert (cell["first_layer"], cell["budget"], cell["num_stages"]) == (0.2, 0.8, 1)
    assert (cell["before"], cell["selector_before"], cell["shape_0"]) == (False, "max_sum", 1.0)
    assert cell in list(INSIDE.cells())


def test_levels_are_those_of_the_space():
    with pytest.raises(ValueError, match=r"exactly the settings of the space, not so: budget"):
        Grid(space=GRID.space, levels={name: values for name, values in GRID.levels.items() if name != "budget"})
    with pytest.raises(ValueError, match=r"levels that it has, not so: first_layer"):
        GRID.restricted(first_layer=0.1)


# ---------------------------------------------------------------------------------------------------------------- table


def test_every_cell_has_the_plan_that_the_space_solves_it_to(table):
    latency = LatencyModel.from_flops(DECODER, NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS)
    for cell in random.Random(0).sample(list(GRID.cells()), 40):
        number, plan = table.number(cell), GRID.plan(cell, latency)
        ours, kept = (realised_key(p, 8, NUM_IMAGE_TOKENS) for p in (plan, table.plans[number]))
        assert ours == kept
        assert table.ratios[number] == pytest.approx(latency.ratio(plan))
        assert latency.ratio(plan) <= cell["budget"] * LIMIT


def test_the_table_holds_every_plan_once_on_every_sample(table):
    num_plans = len(table.plans)
    assert len(set(table.plans)) == num_plans > 500
    assert table.plans[0] == Plan(stages=())
    assert table.cells.shape == (2592,)
    assert set(table.cells.tolist()) | set(table.first) == set(range(1, num_plans))
    assert table.scores.shape == table.kl.shape == table.nll.shape == (num_plans, 288)
    assert ((table.scores >= 0) & (table.scores <= 1)).all()
    assert (table.kl > -1e-3).all()
    assert (table.kl[0] == 0).all()
    assert TABLE.stat().st_size < 6e6


def test_a_trial_is_told_what_plain_loops_find(table):
    for number, num_samples in ((5, 32), (17, 96), (300, 288)):
        told = table.told(number, num_samples)
        by_task, dense = {}, {}
        for place, task in enumerate(table.tasks[:num_samples]):
            by_task.setdefault(task, []).append(table.scores[number, place])
            dense.setdefault(task, []).append(table.scores[0, place])
        means = {task: sum(values) / len(values) for task, values in by_task.items()}
        assert told.by_task == pytest.approx(means)
        assert told.score == pytest.approx(sum(means.values()) / 6)
        assert told.worst_task == pytest.approx(
            min(means[task] / (sum(dense[task]) / len(dense[task])) for task in means)
        )
        assert told.proxy == pytest.approx(sum(table.kl[number, :num_samples]) / num_samples)
        assert (told.complete, told.measured) == (num_samples == 288, num_samples > 32)
        assert told.feasible


@pytest.mark.slow
def test_the_model_still_answers_as_recorded(table):
    select = from_dataset(reference.dataset("select"), "select")
    order = racing.order([e.task for e in select], [e.image_id for e in select], seed=0)
    examples = [select[index] for index in order]
    assert digest(examples) == table.data
    torch.set_num_threads(1)
    model, processor = load_model(str(reference.WEIGHTS), "cpu")
    evaluator = Evaluator(model, processor, examples[:32])
    for number in (0, 40, 250):
        found = evaluator(table.plans[number])
        assert np.mean(np.abs(np.array(found.scores) - table.scores[number, :32]) > 1e-3) <= 1 / 32
        assert np.array(found.kl) == pytest.approx(table.kl[number, :32], abs=2e-3, rel=2e-2)


# --------------------------------------------------------------------------------------------------------- hypervolume


def test_hypervolume_is_pymoos(table):
    rng = np.random.default_rng(0)
    reference_point = (0.2, 0.9)
    indicator = HV(ref_point=np.array([-reference_point[0], reference_point[1]]))
    some = table.told(1)
    for size in (*range(1, 20), 200):
        points = rng.random((size, 2))
        trials = [replace(some, score=s, ratio=r, ratio_high=0.1) for s, r in points.tolist()]
        ours = hypervolume(front(trials), reference_point)
        assert ours == pytest.approx(indicator(points * [-1, 1]), abs=1e-12)
    assert hypervolume([], reference_point) == 0


def test_hypervolume_of_the_table_is_pymoos(table):
    trials = [table.told(number) for number in table.numbers(INSIDE)]
    scale = Scale.of(trials)
    points = np.array([(-t.score, t.ratio) for t in trials])
    assert scale.reference == (min(t.score for t in trials), 1.0)
    assert scale.best == pytest.approx(HV(ref_point=np.array([-scale.reference[0], 1.0]))(points))
    assert scale.curve(trials)[-1] == pytest.approx(1)


def test_curves_are_read_where_they_first_get_there(table):
    assert trials_to([0.1, 0.4, 0.4, 0.9], 0.4) == 2
    assert trials_to([0.1, 0.4], 0.5) is None
    some = table.told(1)
    trials = [replace(some, score=0.5), replace(some, score=0.9, complete=False), replace(some, score=0.6)]
    late = replace(some, score=0.99, ratio_high=2 * LIMIT)
    assert best_scores([late, *trials]) == [0, 0.5, 0.5, 0.6]


# --------------------------------------------------------------------------------------------------------------- replay


def test_a_replay_is_the_same_again_and_repeats_what_it_tried(table):
    one, again, other = (replay(table, INSIDE, Searcher("tpe"), seed, 30, racing=False) for seed in (0, 0, 1))
    assert one == again
    assert [t.draw for t in one] != [t.draw for t in other]
    assert [t.number for t in one] == list(range(30))
    assert all(t.complete and t.plan == table.plans[table.number(INSIDE.cell(t.draw))] for t in one)
    full = {t.plan: t for t in one}
    assert len(full) == 30  # a repeat is drawn anew
    few = INSIDE.restricted(num_stages=1, first_layer=0.2, selector="joint", attention_weight=0.4, final_layer=0.75)
    repeated = replay(table, few, Searcher("tpe"), 0, 14, racing=False)
    full = {t.plan: t for t in repeated}
    assert len(full) < 14
    assert all(replace(t, number=0, draw=None) == replace(full[t.plan], number=0, draw=None) for t in repeated)


def test_what_a_job_tries_first_comes_first_and_is_no_draw(table):
    latency = LatencyModel.from_flops(DECODER, NUM_IMAGE_TOKENS, NUM_TEXT_TOKENS)
    tried = plans_tried_first(latency, DECODER)
    kept = [realised_key(table.plans[number], 8, NUM_IMAGE_TOKENS) for number in table.first]
    assert kept == list(dict.fromkeys(realised_key(plan, 8, NUM_IMAGE_TOKENS) for plan in tried))
    assert all(table.ratios[number] <= LIMIT for number in table.first)
    num_first = len(table.first)
    told = replay(table, GRID, Searcher("qmc", published_first=True), 0, num_first + 5, racing=False)
    assert [t.plan for t in told[:num_first]] == [table.plans[number] for number in table.first]
    assert [t.draw is None for t in told] == [True] * num_first + [False] * 5
    without = replay(table, GRID, Searcher("qmc"), 0, 5, racing=False)
    assert [t.draw for t in told[num_first:]] == [t.draw for t in without]


def test_who_learns_nothing_draws_the_same_with_racing_as_without(table):
    plain, raced = (replay(table, INSIDE, Searcher("random"), 3, 60, racing=racing) for racing in (False, True))
    assert [t.plan for t in plain] == [t.plan for t in raced]
    again = errors_of_racing(table, plain).raced
    assert {t.plan: t.num_samples for t in again} == {t.plan: t.num_samples for t in raced}


def test_racing_leaves_out_what_it_says(table):
    raced = replay(table, GRID, Searcher("qmc"), 0, 40, racing=True)
    spent = {t.plan: t.num_samples for t in raced}
    assert set(spent.values()) <= {32, 96, 288}
    assert 0 < saved(raced, 288) == pytest.approx(1 - sum(spent.values()) / (288 * len(spent)))


def test_a_stop_is_wrong_only_where_the_trial_would_have_beaten_the_front():
    num = 288
    steady, bad = np.tile([1.0, 0.0], num // 2), np.zeros(num)
    late = np.concatenate([np.zeros(96), np.ones(num - 96)])  # 2/3, but it does not look like that
    dense = np.ones(num)
    table = made([dense, steady, bad, late], [1.0, 0.2, 0.3, 0.3])
    found = errors_of_racing(table, [table.told(number) for number in (1, 2, 3)])
    assert [t.num_samples for t in found.raced] == [288, 32, 32]
    assert (found.stopped, found.wrong, found.same_front) == (2, 1, False)
    harmless = errors_of_racing(table, [table.told(number) for number in (1, 2)])
    assert (harmless.stopped, harmless.wrong, harmless.same_front) == (1, 0, True)
    faster = made([dense, steady, bad], [1.0, 0.2, 0.1])  # nobody is as fast as the bad one
    assert errors_of_racing(faster, [faster.told(number) for number in (1, 2)]).stopped == 0


# ------------------------------------------------------------------------------------------------------ the whole of it


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one small run wrote."""
    out = tmp_path_factory.mktemp("search")
    plot = out / "search.png"
    assert search.main(["--small", "--commit", "abc", "--out", str(out / "s.json"), "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    return json.loads((out / "s.json").read_text())


def test_every_searcher_is_replayed_on_every_space(found):
    assert found["commit"] == "abc"
    assert set(found["spaces"]) == {"whole", "inside"}
    names = {f"{name}{whole}" for name in ("gp", "nsga2", "tpe") for whole in ("", ", whole front")} | {"qmc", "random"}
    for name, space in found["spaces"].items():
        assert space["searchers"].keys() == names | ({"gp, published first"} if name == "whole" else set())
        for row, how in itertools.product(space["searchers"].values(), ("plain", "raced")):
            curve = row[how]["hypervolume"]
            assert 0 < curve[-1] <= 1 + 1e-9
            assert all(b >= a - 1e-12 for a, b in itertools.pairwise(curve))
    assert found["spaces"]["inside"]["num_plans"] < found["spaces"]["whole"]["num_plans"]


def test_the_target_is_what_random_search_has_in_the_end(found):
    for space in found["spaces"].values():
        row = space["searchers"]["random"]["plain"]
        assert space["target"] == pytest.approx(row["hypervolume"][-1])
        assert row["trials_to_target"] == [trials_to(row["hypervolume"], space["target"])]


def test_the_table_has_a_line_a_searcher_and_space(found):
    lines = search.table_of(found).splitlines()
    assert len(lines) == 2 + 2 * 8 + 1
    assert any(line.startswith("| inside | gp, whole front |") for line in lines)
