"""The tuning job: dense baseline, calibration, search, certification, registration, and the pull that proves it.

Each step can be killed; running the job again with the same settings takes up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from autotune.bench import Bench
from autotune.certify import Certificate, Interval, ScoreTable, certify, finalists
from autotune.config import AutotuneError, JobConfig
from autotune.data import Example
from autotune.delivery import Outcome, check_out, deliver, registry_of
from autotune.measured import Measured, measure_fresh
from autotune.objective import Told, front
from autotune.papers import Proof, Row, code_version
from autotune.samplers import SAMPLERS
from autotune.search import CONTROLS, DENSE, LEARNED, PUBLISHED, Search, title
from autotune.sights import keep_sights
from autotune.space import SearchSpace
from autotune.study import Study
from btp.cost import image_token_flops, tokens_per_layer
from btp.plan import Plan, Stage

__all__ = ["STEPS_AFTER", "Pool", "Progress", "identity", "registered", "run", "study_name"]

Progress = Callable[[str, int, int, float | None], None]
"""Told of every step: what is going on, trials done, steps done, best feasible score so far."""
Pool = Callable[[Study, JobConfig, Callable[[str], None]], None]
"""Has workers try the trials of a study that is open, and returns when it has them all; says so from time to time."""
STEPS_AFTER = 25  # what is said between the last trial and the end, for the time left

FASTEST = Plan(stages=(Stage(layer=0, keep=0.0, selector="uniform"),))


def run(
    config: JobConfig,
    splits: Mapping[str, Sequence[Example]],
    progress: Progress,
    pool: Pool | None = None,
    opened: Callable[[str], None] = lambda study: None,
) -> Outcome:
    """Tune `config.model` on the splits. Raises AutotuneError, BTPError or RegistryError for what a user can mend.

    pool: has others try the trials; without one this process does. opened: told the study's name as soon as workers
    may ask it.
    """
    began = time.monotonic()
    space = SearchSpace.load(config.space)
    progress("loading the model", 0, 0, None)
    _check_settings(config)
    check_out(config)
    bench = Bench(config, splits, config.limit)
    _check_plans(config, bench)
    registry_of(config).check_home(config.name, bench.anatomy.identity, bench.workload)
    progress("measuring dense", 0, 0, None)
    limit, dense_ms = _feasible_limit(bench, config)
    config.out.mkdir(parents=True, exist_ok=True)
    name = study_name(bench, config, space)
    study = Study(bench.database, name, config.seed)
    with study.driven() as alive:
        if config.fresh:
            study = _anew(study, bench, config)
            alive()
        say = _Reporter(study, config.num_trials, progress, alive)
        search = Search(config, bench, study, space, say)
        search.prepare(limit, registered(config, bench))
        study.leases.open({"settings": config.to_dict(), **context(config, bench, dense_ms)}, config.num_trials)
        opened(name)
        if pool is None:
            search.run()
        else:
            pool(study, config, say)
        if not study.is_done(config.num_trials):
            raise AutotuneError(f"{name} was closed before it had its trials; run the same command again to resume")
        study.leases.close()
        search.finish()
        proof = _proven(bench, study, config, say)
        outcome = deliver(config, bench, study, proof, say, began)
        say("noting what the plans look at")
        keep_sights(bench, _shown(study, proof))
        return outcome


def _anew(study: Study, bench: Bench, config: JobConfig) -> Study:
    """Forget a study, and what the model answered where no other one can rest on that; the registry keeps its history.

    Raises AutotuneError while workers are at it.
    """
    if study.leases.counts().get("held"):
        raise AutotuneError(
            f"--fresh forgets a study that nobody is at, but workers try trials of {study.name}; stop them"
        )
    Study.forget(bench.database, study.name)
    if config.storage is None:
        bench.results.forget()
    return Study(bench.database, study.name, config.seed)


def _check_settings(config: JobConfig) -> None:
    if config.sampler not in SAMPLERS:
        raise AutotuneError(f"--sampler must be one of {', '.join(SAMPLERS)}, got {config.sampler!r}")
    if not 0 < config.margin < 1:
        raise AutotuneError(f"--margin must be in (0, 1), got {config.margin}; two points of accuracy are 0.02")
    stems = [path.stem for path in config.plans]
    if len(set(stems)) < len(stems):
        raise AutotuneError(f"--plan files must have different names, got {', '.join(stems)}; rename one")


def _check_plans(config: JobConfig, bench: Bench) -> None:
    for path in config.plans:
        tokens_per_layer(Plan.load(path), bench.anatomy.identity.num_layers, bench.key.image_tokens)


def registered(config: JobConfig, bench: Bench) -> dict[str, Plan]:
    """Plans that studies of this model have registered, for whatever device and data: where a search may start.

    What these weights answered to these questions elsewhere is not asked again; only latency is measured here.
    """
    registry = registry_of(config)
    known = registry.nearest(bench.anatomy.identity)
    for each in known:
        if each.answered(bench.model_digest, bench.data_digests["select"], bench.key.dtype) and (
            answers := registry.answers(each)
        ):
            bench.adopt(each.plan, answers)
    return {f"{each.version.name} version {each.version.version}": each.plan for each in known}


def identity(bench: Bench) -> dict[str, Any]:
    """What a worker's model, data and device have to be for it to be of use: accuracy depends on the first two."""
    return {
        "model": bench.model_digest,
        **{f"data, {split}": digest for split, digest in bench.data_digests.items()},
        **asdict(bench.key),
    }


def context(config: JobConfig, bench: Bench, dense_ms: float) -> dict[str, Any]:
    """What a study is about: for its workers, what they have to have, and for whoever looks at it.

    "scope" is under what its results are kept. Of "dense" the milliseconds are known when it is opened; workers add
    `scoring.dense_of`.
    """
    registry = registry_of(config).address
    return {"fits": identity(bench), "scope": bench.digest, "registry": registry, "dense": {"ms": dense_ms}}


class _Reporter:
    """Turns steps into progress, a step a trial, then a step a saying; and shows that the driver lives."""

    def __init__(self, study: Study, num_trials: int, progress: Progress, alive: Callable[[], None]) -> None:
        self._study, self._num_trials, self._progress, self._after = study, num_trials, progress, 0
        self._alive = alive

    def __call__(self, what: str) -> None:
        self._alive()
        told = self._study.told()
        self._after += len(told) >= self._num_trials
        best = max((t.score for t in told if t.feasible and t.complete), default=None)
        self._progress(what, len(told), min(len(told), self._num_trials) + self._after, best)


def _feasible_limit(bench: Bench, config: JobConfig) -> tuple[float, float]:
    """The limit as a ratio, and dense's milliseconds. Refuses one that nothing can meet before anything is written."""
    fastest, dense_ms = bench.ratio(FASTEST)
    limit = config.limit.ratio(dense_ms)
    if fastest.value > limit:
        raise AutotuneError(
            f"some plan must meet the limit {config.limit}, but the fastest, which drops every image token at once, "
            f"reached {fastest.value:.2f}x of dense ({fastest.value * dense_ms:.1f} of {dense_ms:.1f} ms); "
            "raise the limit"
        )
    return limit, dense_ms


def study_name(bench: Bench, config: JobConfig, space: SearchSpace) -> str:
    """One name for one question: model, data, device, limit, space and seed. A different question is another study."""
    parts = [
        bench.digest,
        str(bench.key),
        str(config.limit),
        str(space),
        str(config.seed),
        config.sampler,
        config.guard,
    ]
    return f"{config.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"


def _finalists(study: Study, config: JobConfig) -> list[Told]:
    """The best plans by `select`, controls aside, that are within the limit; what is certified is one of them."""
    told = study.told()
    able = [t for t in told if t.name not in CONTROLS and t.complete and t.measured]
    found = finalists(able, study.notes["limit"], config.num_finalists)
    if found:
        return found
    if not told:
        raise AutotuneError(f"some trial must succeed, but all failed: {_reasons(study)}; mend that, and use --fresh")
    fastest = min(told, key=lambda t: t.ratio)
    guard = "" if config.guard is None else f" and keep {config.guard:g} of every task"
    raise AutotuneError(
        f"some plan must stay within {config.limit} by the upper bound of its measured ratio{guard}, but of "
        f"{len(told)} trials none does; the fastest, {fastest.name!r}, reached {fastest.ratio:.2f}x of dense (at most "
        f"{fastest.ratio_high:.2f}x) and kept {fastest.worst_task:.2f} of its worst task; raise the limit, measure "
        "with more --repeats, or run more --trials"
    )


def _reasons(study: Study) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in study.failures.items())


def _proven(bench: Bench, study: Study, config: JobConfig, say: Callable[[str], None]) -> Proof:
    """The proof, found once for what the study tried: run again, the job is to hand out the profile that it did."""
    chosen = {t.name: t for t in _finalists(study, config)}

    def compute() -> dict[str, Any]:
        certificates, measured = _certified(chosen, bench, study, config, say)
        name = next((name for name, each in certificates.items() if each.certified), next(iter(certificates)))
        rows, minus = _compared(bench, study, chosen[name], say)
        return Proof(
            champion=chosen[name],
            code_version=code_version(),
            certificates=certificates,
            measured=measured[name],
            rows=tuple(rows),
            minus=minus,
        ).to_dict()

    rests_on = [study.name, config.margin, config.num_finalists, config.repeats, [t.to_dict() for t in study.told()]]
    digest = hashlib.sha256(json.dumps(rests_on, sort_keys=True).encode()).hexdigest()
    proof: Proof = Proof.from_dict(bench.results.once(f"proof-{digest[:20]}", compute))
    return proof


def _shown(study: Study, proof: Proof) -> list[Plan]:
    """The plans that anyone may want to look at: dense, the champion, the front, and those that were set by hand."""
    complete = [t for t in study.told() if t.complete and t.measured]
    fixed = [t.plan for t in complete if not t.name.startswith("trial ")]
    return list(dict.fromkeys([DENSE, proof.champion.plan, *(t.plan for t in front(complete)), *fixed]))


def _certified(
    chosen: Mapping[str, Told], bench: Bench, study: Study, config: JobConfig, say: Callable[[str], None]
) -> tuple[dict[str, Certificate], dict[str, Measured]]:
    """A certificate of every finalist in the order of `select`; measured is the first that is certified, or the first.

    The others are as they are: to take the one that did best on held-out pictures would be to choose by them.
    """
    scores = {}
    for name, finalist in chosen.items():
        say(f"certifying {name}")
        scores[name] = bench.scores(finalist.plan, "certify").scores
    dense = bench.scores(DENSE, "certify").scores
    measured: dict[str, Measured] = {}

    def certificates() -> dict[str, Certificate]:
        # A limit in milliseconds is another ratio where dense is slower.
        limit = min(study.notes["limit"], *(m.limit_ratio for m in measured.values()), math.inf)
        latency = {name: m.ratio for name, m in measured.items()}
        return certify(scores, dense, bench.table("certify"), latency, limit, config.margin, guard=config.guard)

    def measure(name: str) -> None:
        say(f"measuring {name} in a fresh process")
        path = config.out / "finalist.json"
        chosen[name].plan.save(path)
        measured[name] = measure_fresh(config, path)
        path.unlink()

    for name, certificate in certificates().items():
        if certificate.as_good:
            measure(name)
            if certificates()[name].certified:
                return certificates(), measured
    if (first := next(iter(chosen))) not in measured:
        measure(first)
    return certificates(), measured


def _compared(
    bench: Bench, study: Study, champion: Told, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, Interval]]:
    """Score dense, the fixed plans and the champion on held-out pictures: a row each, and the champion minus each."""
    plans = {"dense": DENSE, **_rivals(bench, study, champion, say), "tuned": champion.plan}
    scores: dict[str, tuple[float, ...]] = {}
    for name, plan in plans.items():
        say(f"answering `certify` with {name}")
        scores[name] = bench.scores(plan, "certify").scores
    table = bench.table("certify")
    rows = []
    for name, plan in plans.items():
        say(f"measuring {name}")
        rows.append(_row(bench, table, name, plan, scores[name], scores["dense"]))
    minus = {name: table.difference(scores["tuned"], other) for name, other in scores.items() if name != "tuned"}
    return rows, minus


def _rivals(bench: Bench, study: Study, champion: Told, say: Callable[[str], None]) -> dict[str, Plan]:
    """The hand-set plans, the best published one, and the controls on the schedule that suits them better.

    Which published one and which schedule is decided by `select`.
    """
    told = {t.name: t for t in study.told()}
    found: dict[str, Plan] = {n: told[n].plan for n in ("hand-set", "hand-set at limit") if n in told}
    published = [told[title(name)] for name in PUBLISHED if title(name) in told]
    if able := [t for t in published if t.feasible and t.complete]:
        best = max(able, key=lambda t: t.score)
        found[best.name] = best.plan
    if LEARNED in told:
        found[LEARNED] = told[LEARNED].plan
    for name, control in CONTROLS.items():
        say(f"scoring {name}, tuned schedule")
        plans = [control(champion.plan), *([told[name].plan] if name in told else [])]
        found[name] = max(reversed(plans), key=lambda plan: bench.macro(plan, "select")[0])
    return found


def _row(
    bench: Bench, table: ScoreTable, name: str, plan: Plan, scores: Sequence[float], dense: Sequence[float]
) -> Row:
    decoder = bench.anatomy.decoder
    counts = tokens_per_layer(plan, decoder.num_layers, bench.key.image_tokens)
    worst_task, worst = table.worst_task(scores, dense)
    return Row(
        name=name,
        plan=plan,
        image_gflops=image_token_flops(counts, decoder.hidden_size, decoder.intermediate_size) / 1e9,
        latency=bench.ratio(plan, 2)[0] if plan.stages else Interval(1.0, 1.0, 1.0),
        macro=table.macro(scores),
        worst_task=worst_task,
        worst=worst,
        by_task=table.by_task(scores),
        scores=tuple(scores),
    )
