"""The search on a device and a model that are formulas: every trial raced, measured, told once, and resumed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autotune.config import JobConfig
from autotune.evaluation import Scores
from autotune.objective import front
from autotune.realised import realised_key
from autotune.search import CLOSE, CLOSER, CONTROLS, PUBLISHED, Search, summary, title
from autotune.space import SearchSpace
from autotune.store import Database
from autotune.study import Study
from btp.plan import Plan, Stage
from tests.autotune.formula_bench import KNOWN, LIMIT, NUM_SAMPLES, SPACE, TOO_SLOW, FormulaBench, config, key


def searched(out: Path, bench: FormulaBench, num_trials: int, **changes: Any) -> Study:
    study = study_in(out)
    study.enqueue("too slow", TOO_SLOW)
    return run(study, config(out, num_trials, **changes), bench, {"registered": KNOWN})


def study_in(out: Path) -> Study:
    return Study(Database(f"sqlite:///{out / 'study.db'}"), "fake", 0)


def run(study: Study, settings: JobConfig, bench: Any, known: Mapping[str, Plan]) -> Study:
    search = Search(settings, bench, study, SearchSpace.load(SPACE), lambda _: None)
    search.prepare(LIMIT, known)
    study.leases.open({}, settings.num_trials)
    search.run()
    search.finish()
    return study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, FormulaBench]:
    bench = FormulaBench()
    study = searched(tmp_path_factory.mktemp("search"), bench, 40)
    bench.evaluated, bench.measured, counted = Counter(), Counter(), (bench.evaluated, bench.measured)
    bench.counts = counted
    return study, bench


def test_the_number_of_trials_is_reached_and_the_published_come_before_the_draws(
    finished: tuple[Study, FormulaBench],
) -> None:
    names = [t.name for t in finished[0].told()]
    assert len(names) == len(set(names)) == 40
    assert {"hand-set", "hand-set at limit", *CONTROLS, *(title(system) for system in PUBLISHED)} < set(names)
    assert sum(name.startswith("trial") for name in names) >= 15


def test_every_front_member_is_measured_within_the_limit_and_scored_on_everything(
    finished: tuple[Study, FormulaBench],
) -> None:
    members = front(finished[0].told())
    assert members
    assert all(t.num_samples == NUM_SAMPLES and t.measured and t.ratio_high <= LIMIT for t in members)
    assert members[-1].name.startswith("trial") or CLOSER in members[-1].name


def test_good_plans_are_brought_closer_to_the_limit_than_the_model_dared(finished: tuple[Study, FormulaBench]) -> None:
    told = {t.name: t for t in finished[0].told()}
    pairs = [(told[name.split(CLOSER)[0]], told[name]) for name in told if CLOSER in name]
    assert {first.name for first, _ in pairs} >= {"registered", title("divprune")}
    for first, closer in pairs:
        assert [s.selector for s in closer.plan.stages] == [s.selector for s in first.plan.stages]
        assert abs(closer.ratio / LIMIT - 1) < max(abs(first.ratio / LIMIT - 1), 2 * CLOSE)


def test_racing_keeps_the_front_that_there_would_be_without_it(finished: tuple[Study, FormulaBench]) -> None:
    study, bench = finished
    told = study.told()
    assert any(not t.complete for t in told)
    assert summary(study)["saved"] > 0.1
    assert summary(study)["num_stopped"] == sum(not t.complete for t in told)
    for t in told:
        if not t.complete and bench.ratio(t.plan)[0].high <= LIMIT:
            score = np.mean(bench.scores(t.plan, "select").scores)
            faster = [m for m in front(told) if m.ratio <= bench.ratio(t.plan)[0].value * 1.05]
            assert score <= max(m.score for m in faster) + 1e-9


def test_no_realised_plan_is_evaluated_or_measured_twice(finished: tuple[Study, FormulaBench]) -> None:
    study, bench = finished
    evaluated, measured = bench.counts
    assert max(evaluated.values()) <= len(bench.looks)
    probes = {key(Plan.from_dict(probe["plan"])) for probe in study.notes["probes"]}
    assert all(count == 1 for plan, count in measured.items() if plan not in probes)
    assert len({t.plan for t in study.told()}) == len({key(t.plan) for t in study.told()})


def test_slow_plans_are_stopped_at_the_first_look(finished: tuple[Study, FormulaBench]) -> None:
    slow = [t for t in finished[0].told() if t.measured and t.ratio_low > LIMIT]
    assert "too slow" in [t.name for t in slow]
    assert all(t.num_samples == finished[1].looks[0] and not t.feasible for t in slow)


def test_a_guard_is_a_constraint(tmp_path: Path) -> None:
    study = searched(tmp_path, FormulaBench(), 14, guard=0.97)
    told = [t for t in study.told() if t.complete]
    assert any(t.ratio_high <= LIMIT and not t.feasible for t in told)
    assert all(t.worst_task >= 0.97 for t in front(told))


class Stopped(KeyboardInterrupt):
    """Raised in the middle of a search, as by a user."""


def test_an_interrupted_search_goes_on_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unbroken = searched(tmp_path / "unbroken", FormulaBench(), 20)
    told, tell = 0, Study.tell

    def until(self: Study, *args: Any) -> None:
        nonlocal told
        told += 1
        if told in (5, 16):
            raise Stopped
        tell(self, *args)

    monkeypatch.setattr(Study, "tell", until)
    bench = FormulaBench()
    for _ in range(2):
        with pytest.raises(Stopped):
            searched(tmp_path / "broken", bench, 20)
    study = searched(tmp_path / "broken", bench, 20)
    assert study.told() == unbroken.told()


def test_the_draws_decode_to_plans_that_use_the_limit(finished: tuple[Study, FormulaBench]) -> None:
    drawn = [t.ratio for t in finished[0].told() if t.draw is not None and t.measured and t.name.startswith("trial")]
    assert np.median(drawn) > 0.8 * LIMIT
    assert sum(ratio <= LIMIT for ratio in drawn) >= 0.9 * len(drawn)


def test_the_registered_come_after_the_published_and_only_as_far_as_there_is_room(
    finished: tuple[Study, FormulaBench], tmp_path: Path
) -> None:
    names = [t.name for t in finished[0].told()]
    assert names.index("registered") == names.index(title(PUBLISHED[-1])) + 1
    few = [t.name for t in searched(tmp_path, FormulaBench(), 12).told()]
    assert "registered" not in few
    assert title(PUBLISHED[-1]) not in few


def test_a_plan_of_ones_own_is_tried_however_few_trials_there_are_and_on_a_finished_study_too(tmp_path: Path) -> None:
    bench: Any = FormulaBench()
    names: list[list[str]] = []
    for own in ((), ("late.json",)):
        for name in own:
            KNOWN.save(tmp_path / name)
        settings = replace(config(tmp_path, 7), plans=tuple(tmp_path / name for name in own))
        study = run(study_in(tmp_path), settings, bench, {})
        names.append([t.name for t in study.told()])
    assert names[1] == [*names[0], "plan late"]


def test_plans_that_keep_the_same_of_one_prompt_and_not_of_another_are_two(tmp_path: Path) -> None:
    class TwoSizes(FormulaBench):
        def scores(self, plan: Plan, split: str) -> Scores:
            return replace(super().scores(plan, split), realised=(((100,) * 8, 60), ((1000,) * 8, 60)))

    bench: Any = TwoSizes()
    study = study_in(tmp_path)
    search = Search(config(tmp_path, 7), bench, study, SearchSpace.load(SPACE), lambda _: None)
    one, other = (Plan(stages=(Stage(layer=1, keep=keep),)) for keep in (0.3, 0.304))
    assert realised_key(one, 8, 100) == realised_key(other, 8, 100)
    assert search._key(one) != search._key(other)


def test_published_systems_at_the_limit_keep_their_shape(finished: tuple[Study, FormulaBench]) -> None:
    told = {t.name: t.plan for t in finished[0].told()}
    divprune = told[title("divprune")]
    assert [(s.layer, s.selector) for s in divprune.stages] == [(0, "diversity")]
    pyramid = told[title("pyramiddrop")].stages
    assert all(above.keep > below.keep for above, below in pairwise(pyramid))
