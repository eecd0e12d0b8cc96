"""Samplers as pure functions: legal draws, the same for the same arguments, and better ones as they learn."""

import math
import random
import warnings
from functools import cache

import numpy as np
import pytest
import torch

from autotune.config import AutotuneError
from autotune.ranges import Choice, Float, Int, random_draw
from autotune.samplers import MAX_GP, NUM_START, SAMPLERS, Observed, suggest

RANGES = {
    "num_stages": Int(1, 4),
    "shape": Float(0.1, 2.0),
    "budget": Float(0.9, 1.0),
    "selector": Choice(("attention", "diversity", "joint")),
    "reset": Choice((False, True)),
}


def outcome(draw):
    """Best: diversity, two stages, shape 1.2, no reset, as much budget as the limit allows, which is 0.98."""
    loss = abs(draw["num_stages"] - 2) + (draw["shape"] - 1.2) ** 2 + 2 * (1 - draw["budget"])
    loss += {"diversity": 0.0, "joint": 0.5, "attention": 1.0}[draw["selector"]] + 0.5 * draw["reset"]
    return Observed(draw, loss, draw["budget"], draw["budget"] - 0.98)


def search(sampler, num_draws, seed=0, observed=()):
    found = list(observed)
    while len(found) < num_draws:
        found.append(outcome(suggest(sampler, RANGES, found, seed)))
    return found


@cache
def sixty_one():
    rng = random.Random(0)
    return tuple(outcome(random_draw(RANGES, rng)) for _ in range(MAX_GP + 1))


def observations(number):
    return sixty_one()[:number]


def is_legal(draw):
    legal = draw.keys() == RANGES.keys() and type(draw["num_stages"]) is int and type(draw["reset"]) is bool
    return (
        legal
        and 1 <= draw["num_stages"] <= 4
        and 0.1 <= draw["shape"] <= 2.0
        and 0.9 <= draw["budget"] <= 1.0
        and draw["selector"] in RANGES["selector"].options
    )


@pytest.mark.parametrize("number", [0, 1, NUM_START, MAX_GP + 1])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_draw_is_legal_and_hangs_on_the_arguments_alone(sampler, number):
    observed = observations(number)
    draw = suggest(sampler, RANGES, observed, seed=3)
    suggest(sampler, RANGES, observations(4), seed=9)  # what others ask in between changes nothing
    assert is_legal(draw)
    assert suggest(sampler, dict(reversed(RANGES.items())), observed, seed=3) == draw
    assert suggest(sampler, RANGES, observed, seed=4) != draw


def test_an_unknown_sampler_is_refused():
    with pytest.raises(AutotuneError, match="must be one of gp, nsga2, qmc, random, tpe, got 'cma'"):
        suggest("cma", RANGES, [], 0)


@pytest.mark.parametrize("sampler", ["gp", "qmc", "tpe"])
def test_the_start_fills_every_range_evenly(sampler):
    draws = [known.draw for known in search(sampler, 8)]
    assert sorted(d["num_stages"] for d in draws) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert sum(d["reset"] for d in draws) == 4
    assert sorted(int((d["shape"] - 0.1) / 1.9 * 8) for d in draws) == list(range(8))


def best(found):
    return min(known.loss for known in found if known.over <= 0)


@pytest.mark.parametrize(("sampler", "num_draws"), [("tpe", 40), ("nsga2", 60)])
def test_those_that_learn_find_more_than_chance(sampler, num_draws):
    learned = np.median([best(search(sampler, num_draws, seed)) for seed in range(3)])
    chance = np.median([best(search("random", num_draws, seed)) for seed in range(9)])
    assert learned < chance


def test_a_gp_learns_the_loss_and_where_the_limit_is():
    ranges, found = {"x": Float(0.0, 1.0), "kind": Choice(("good", "bad"))}, []
    for _ in range(NUM_START + 5):
        draw = suggest("gp", ranges, found, 0)
        loss = (1 - draw["x"]) + 0.3 * (draw["kind"] == "bad")
        found.append(Observed(draw, loss, draw["x"], draw["x"] - 0.7))
    start, learned = found[:NUM_START], found[NUM_START:]
    assert best(learned) < best(start)
    assert best(learned) < 0.32
    assert sum(known.draw["kind"] == "good" for known in learned) >= 4
    assert all(known.over < 0.1 for known in learned)


def test_the_whole_front_is_sought_where_that_is_asked_for():
    ranges = {"x": Float(0.0, 1.0), "y": Float(0.0, 1.0)}
    spread = {}
    for whole_front in (False, True):
        found = []
        for _ in range(30):
            draw = suggest("tpe", ranges, found, 1, whole_front=whole_front)
            found.append(Observed(draw, draw["x"] + (draw["y"] - 0.5) ** 2, 1 - draw["x"], -1.0))
        spread[whole_front] = np.std([known.draw["x"] for known in found[NUM_START:]])
    assert spread[True] > spread[False]


def test_infeasible_draws_all_over_do_not_stop_the_search():
    late = [Observed(known.draw, known.loss, known.ratio, 1.0) for known in observations(NUM_START + 2)]
    assert all(is_legal(suggest(sampler, RANGES, late, 0)) for sampler in SAMPLERS)


def test_asking_leaves_the_threads_of_torch_alone():
    before = torch.get_num_threads()
    suggest("gp", RANGES, observations(NUM_START), 0)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_asking_warns_of_nothing(sampler):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        suggest(sampler, RANGES, observations(NUM_START + 1), 0)


def test_equal_losses_do_not_break_a_gp():
    flat = [Observed(known.draw, 0.5, 0.5, -0.1) for known in observations(NUM_START)]
    draw = suggest("gp", RANGES, flat, 0)
    assert is_legal(draw)
    assert math.isfinite(draw["shape"])
