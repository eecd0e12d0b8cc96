"""Racing on replayed tables: it saves evaluations, and does not cost the front a member more often than it says."""

from collections import Counter

import numpy as np
import pytest

from autotune.racing import ERROR_RATE, Race, looks, order

TASKS, NUM_SAMPLES = 6, 288


def samples(num_samples=NUM_SAMPLES, num_tasks=TASKS):
    return [f"task {i % num_tasks}" for i in range(num_samples)], [
        f"picture {i // num_tasks}" for i in range(num_samples)
    ]


def test_looks_grow_threefold_up_to_all_samples():
    assert looks(288) == (32, 96, 288)
    assert looks(1000) == (32, 96, 288, 864, 1000)
    assert looks(20) == (20,)
    assert looks(32) == (32,)


def test_every_prefix_is_balanced_over_tasks_and_spread_over_pictures():
    tasks, pictures = samples()
    found = order(tasks, pictures, seed=3)
    assert sorted(found) == list(range(NUM_SAMPLES))
    for end in range(1, NUM_SAMPLES):
        counts = Counter(tasks[i] for i in found[:end])
        assert max(counts.values()) - min(counts.get(t, 0) for t in set(tasks)) <= 1
    assert len({pictures[i] for i in found[:32]}) == 32
    assert len({pictures[i] for i in found[:96]}) == 48


def test_a_rare_task_has_its_share_of_every_prefix():
    tasks = ["common"] * 240 + ["rare"] * 48
    found = order(tasks, [str(i) for i in range(288)], seed=0)
    for end in (32, 96, 200):
        assert sum(tasks[i] == "rare" for i in found[:end]) == pytest.approx(end / 6, abs=1.5)


def test_the_order_hangs_on_the_seed_alone():
    tasks, pictures = samples()
    assert order(tasks, pictures, 1) == order(tasks, pictures, 1)
    assert order(tasks, pictures, 1) != order(tasks, pictures, 2)


def naive_wealth(tasks, values, members):
    """The bets one by one, in plain Python."""
    n, counts = len(tasks), Counter(tasks)
    weight = [min(counts.values()) / counts[t] for t in tasks]
    par = [sum(m[i] for m in members) / len(members) for i in range(n)]
    target = max(sum(w * x for w, x in zip(weight, m, strict=True)) for m in members)
    target -= sum(w * p for w, p in zip(weight, par, strict=True))
    best, wealth, so_far = 1.0, [1.0] * 4, 0.0
    for i, value in enumerate(values):
        lead, mean = weight[i] * (value - par[i]), min((target - so_far) / (n - i), 0.98)
        wealth = [w * (1 + c / (1 - mean) * (mean - lead)) for w, c in zip(wealth, (0.3, 0.5, 0.7, 0.9), strict=True)]
        so_far += lead
        best = max(best, sum(wealth) / 4)
    return best


@pytest.mark.parametrize("shares", [(1, 1, 1), (1, 2, 5)])
def test_the_wealth_is_what_the_bets_come_to(shares):
    rng = np.random.default_rng(0)
    tasks = rng.choice(["a", "b", "c"], 80, p=np.array(shares) / sum(shares)).tolist()
    for _ in range(5):
        members, values = rng.random((3, 80)), rng.random(60) * 0.7
        assert Race(tasks).wealth(values, members) == pytest.approx(naive_wealth(tasks, values, members), rel=1e-9)


def test_no_trial_is_stopped_without_rivals_or_samples():
    tasks, _ = samples()
    assert not Race(tasks).is_dominated([0.0] * 96, [])
    assert not Race(tasks).is_dominated([], [[1.0] * NUM_SAMPLES])


def test_a_hopeless_trial_is_stopped_at_the_first_look_and_an_equal_one_never():
    tasks, _ = samples()
    member = np.tile([1.0, 1.0, 0.0], 96)
    assert Race(tasks).is_dominated(np.zeros(32), [member])
    assert not any(Race(tasks).is_dominated(member[:look], [member]) for look in looks(NUM_SAMPLES))


def test_what_cannot_be_raced_is_refused():
    race = Race(["a"] * 10)
    with pytest.raises(ValueError, match="score members on all samples"):
        race.wealth([0.5] * 5, [[0.5] * 9])
    with pytest.raises(ValueError, match="at most, and a member exactly"):
        race.wealth([0.5] * 11, [[0.5] * 10])
    with pytest.raises(ValueError, match="a divergence has no bound"):
        race.wealth([0.5, 3.0], [[0.5] * 10])
    with pytest.raises(ValueError, match=r"error_rate must be in \(0, 1\)"):
        Race(["a"], error_rate=5)


def table(rng, quality, spread=0.5):
    """Scores of plans on samples whose difficulty they share; tasks hurt each plan differently; one task is graded."""
    num_plans, (tasks, _) = len(quality), samples()
    task = np.array([int(name[5:]) for name in tasks])
    hurt = rng.normal(0, spread, (num_plans, TASKS))[:, task]
    ability = np.quantile(rng.normal(0, np.sqrt(1 + 2 * spread**2), 4000), quality)[:, None]
    values = (ability + hurt + rng.normal(0, spread, hurt.shape) > rng.normal(0, 1, NUM_SAMPLES)).astype(float)
    return np.where(task == 5, np.clip(0.9 * values + rng.choice([0.0, 0.1], values.shape), 0, 1), values)


@pytest.mark.parametrize("num_apart", [6, 24, 72])
@pytest.mark.parametrize("by_task", [False, True])
def test_a_trial_that_ends_no_worse_is_stopped_no_more_often_than_stated(num_apart, by_task):
    """The hardest true hypothesis: a tie over all samples. by_task: the trial loses on half the tasks, wins on half."""
    stopped, rng, (tasks, pictures) = 0, np.random.default_rng(1), samples()
    task = np.array([int(name[5:]) for name in tasks])
    for seed in range(400):
        member, other = (rng.random((2, NUM_SAMPLES)) < 0.8).astype(float)
        halves = (np.flatnonzero(task < 3), np.flatnonzero(task >= 3)) if by_task else np.split(rng.permutation(288), 2)
        lost, won = (rng.choice(places, num_apart // 2, replace=False) for places in halves)
        member[lost], member[won] = 1, 0
        trial = member.copy()
        trial[lost], trial[won] = 0, 1
        assert member.sum() == trial.sum()
        places = order(tasks, pictures, seed)
        members = [member[places], np.minimum(other, member)[places]]
        race = Race([tasks[i] for i in places])
        stopped += any(race.is_dominated(trial[places][:look], members) for look in looks(NUM_SAMPLES)[:-1])
    assert stopped / 400 <= ERROR_RATE + 2 * np.sqrt(ERROR_RATE / 400)


def pareto(scores, ratios, among):
    best = []
    for i in sorted(among, key=lambda i: (ratios[i], -scores[i])):
        if not best or scores[i] > scores[best[-1]]:
            best.append(i)
    return best


def replay(values, ratios, seed):
    """Trial after trial against the front so far. The share of evaluations saved, and whether the front is the same."""
    tasks, pictures = samples()
    places = order(tasks, pictures, seed)
    race, scores, ordered = Race([tasks[i] for i in places]), values.mean(axis=1), values[:, places]
    complete, used = [], 0
    for trial in range(len(values)):
        members = ordered[[i for i in pareto(scores, ratios, complete) if ratios[i] <= ratios[trial]]]
        for look in looks(NUM_SAMPLES):
            if look == NUM_SAMPLES:
                complete.append(trial)
            elif race.is_dominated(ordered[trial, :look], members):
                break
        used += look
    same = pareto(scores, ratios, complete) == pareto(scores, ratios, range(len(values)))
    return 1 - used / values.size, same


def test_racing_saves_half_of_a_random_search_and_keeps_its_front():
    saved, kept = [], []
    for seed in range(24):
        rng = np.random.default_rng(seed)
        quality = 0.08 + 0.86 * rng.beta(3, 1.5, 60)  # as wide as random draws of the search space are
        share, same = replay(table(rng, quality), rng.uniform(0.4, 0.5, 60), seed)
        saved.append(share)
        kept.append(same)
    assert np.mean(saved) >= 0.5
    assert np.mean(kept) >= 1 - ERROR_RATE
