"""The tuning job: dense baseline, calibration, search, certification, registration, and the pull that proves it.

Each step can be killed; running the job again with the same settings takes up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence

from autotune.bench import Bench
from autotune.certify import Interval, ScoreTable
from autotune.config import AutotuneError, JobConfig
from autotune.data import Example
from autotune.delivery import Outcome, Row, check_out, deliver
from autotune.latency_model import LatencyModel
from autotune.objective import Told
from autotune.space import SearchSpace, rescale
from autotune.study import Study
from btp import presets
from btp.cost import image_token_flops, tokens_per_layer
from btp.plan import Plan, Stage

__all__ = ["STEPS_AFTER", "Progress", "run"]

Progress = Callable[[str, int, int, float | None], None]
"""Told of every step: what is going on, trials done, steps done, best feasible score so far."""
STEPS_AFTER = 22  # what is said between the last trial and the end, for the time left

DENSE = Plan(stages=())
FASTEST = Plan(stages=(Stage(layer=0, keep=0.0, selector="uniform"),))
CONTROLS = {"random": presets.random_control, "uniform": presets.uniform_control}
HEADROOM = 0.95  # of the limit, for the fixed plans that are scaled to it


def run(config: JobConfig, splits: Mapping[str, Sequence[Example]], progress: Progress) -> Outcome:
    """Tune `config.model` on the splits. Raises AutotuneError, BTPError or RegistryError for what a user can mend."""
    began = time.monotonic()
    space = SearchSpace.load(config.space)
    progress("loading the model", 0, 0, None)
    check_out(config)
    bench = Bench(config, splits, config.limit)
    progress("measuring dense", 0, 0, None)
    floor, limit = _feasible_limit(bench, config)
    name = _study_name(bench, config, space)
    if config.fresh:  # only this study and its scores; the registry keeps its history
        Study.forget(config.out / "study.db", name)
        shutil.rmtree(bench.evaluations, ignore_errors=True)
    study = Study(config.out / "study.db", name, config.seed)
    say = _Reporter(study, config.num_trials, progress)
    _Job(config, bench, study, space, say).search(floor, limit)
    champion = _champion(bench, study, config, say)
    rows, minus = _certify(bench, study, champion, say)
    return deliver(config, bench, study, champion, rows, minus, say, began)


class _Reporter:
    """Turns steps into progress: a step a trial, then a step a saying."""

    def __init__(self, study: Study, num_trials: int, progress: Progress) -> None:
        self._study, self._num_trials, self._progress, self._after = study, num_trials, progress, 0

    def __call__(self, what: str) -> None:
        told = self._study.told()
        self._after += len(told) >= self._num_trials
        best = max((t.score for t in told if t.feasible), default=None)
        self._progress(what, len(told), min(len(told), self._num_trials) + self._after, best)


def _feasible_limit(bench: Bench, config: JobConfig) -> tuple[float, float]:
    """Ratio of the fastest plan, and the limit as a ratio. Refuses a limit that nothing can meet before any writing."""
    fastest, dense_ms = bench.ratio(FASTEST)
    limit = config.limit.ratio(dense_ms)
    if fastest.value > limit:
        raise AutotuneError(
            f"some plan must meet the limit {config.limit}, but the fastest, which drops every image token at once, "
            f"reached {fastest.value:.2f}x of dense ({fastest.value * dense_ms:.1f} of {dense_ms:.1f} ms); "
            "raise the limit"
        )
    return fastest.value, limit


def _study_name(bench: Bench, config: JobConfig, space: SearchSpace) -> str:
    """One name for one question: model, data, device, limit, space and seed. A different question is another study."""
    parts = [bench.digest, str(bench.key), str(config.limit), str(space), str(config.seed)]
    return f"{config.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"


class _Job:
    """The search: fixed plans first, then draws of the space, until the study has its number of finished trials."""

    def __init__(
        self, config: JobConfig, bench: Bench, study: Study, space: SearchSpace, say: Callable[[str], None]
    ) -> None:
        self._config, self._bench, self._study, self._space, self._say = config, bench, study, space, say

    def search(self, floor: float, limit: float) -> None:
        if "limit" not in self._study.notes:
            self._begin(floor, limit)
        notes, num_layers = self._study.notes, self._bench.anatomy.identity.num_layers
        limit = notes["limit"]
        latency = {
            selector: LatencyModel(floor, num_layers, self._bench.key.image_tokens)
            for selector, floor in notes["floors"].items()
        }
        for name, plan in self._fixed_plans(latency["balanced"], notes["calibrated_layers"], limit).items():
            self._study.enqueue(name, plan)
        self._say("encoding the pictures of `select`")
        while self._study.num_done < self._config.num_trials:
            number, name, asked = self._study.ask(self._space)
            if not isinstance(asked, Plan):
                schedule = self._space.schedule(asked, num_layers)
                asked = latency[asked["selector"]].solve(schedule, asked["budget"] * limit)
            self._study.tell(self._try(number, name, asked, limit))
            self._say("searching")

    def _begin(self, floor: float, limit: float) -> None:
        """What the whole study rests on, measured once: the latency model and the calibrated layers."""
        self._say("calibrating")
        num_layers, num_image_tokens = self._bench.anatomy.identity.num_layers, self._bench.key.image_tokens
        hand_set = presets.btp_released(num_layers)
        floors = {"balanced": floor}
        for selector in dict.fromkeys(("balanced", *self._space.selectors)):  # they take their own time to select
            fitted = LatencyModel(floors["balanced"], num_layers, num_image_tokens)
            probes: list[tuple[Plan, float]] = []
            for _ in range(3):  # the plan as it stands, then twice where the limit seems to be
                probed = presets.with_selector(hand_set, selector)
                plan = fitted.solve(rescale(probed), HEADROOM * limit) if probes else probed
                probes.append((plan, self._bench.ratio(plan)[0].value))
                fitted = LatencyModel.fit(probes, num_layers, num_image_tokens)
            floors[selector] = fitted.floor
        self._study.note("floors", floors)
        self._study.note("calibrated_layers", self._bench.calibrated_layers(len(hand_set.stages)))
        self._study.note("limit", limit)

    def _fixed_plans(self, latency: LatencyModel, calibrated: Sequence[int], limit: float) -> dict[str, Plan]:
        """What every study tries: the released code's plan as it stands, and scaled to the limit with its controls."""
        num_layers = self._bench.anatomy.identity.num_layers
        hand_set, found = presets.btp_released(num_layers), presets.btp_released(num_layers, layers=calibrated)
        at_limit = latency.solve(rescale(hand_set), HEADROOM * limit)
        return {
            "hand-set": hand_set,
            "hand-set at limit": at_limit,
            "hand-set, calibrated layers": latency.solve(rescale(found), HEADROOM * limit),
            **{name: control(at_limit) for name, control in CONTROLS.items()},
        }

    def _try(self, number: int, name: str, plan: Plan, limit: float) -> Told:
        ratio, _ = self._bench.ratio(plan)
        score, by_task = self._bench.macro(plan, "select")
        return Told(
            number=number,
            name=name,
            plan=plan,
            score=score,
            by_task=by_task,
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            limit=limit,
        )


def _champion(bench: Bench, study: Study, config: JobConfig, say: Callable[[str], None]) -> Told:
    """The best plan, controls aside, that meets the limit when it is measured again with three times the pairs."""
    told, limit = study.told(), study.notes["limit"]
    for candidate in sorted((t for t in told if t.feasible), key=lambda t: (-t.score, t.ratio)):
        if candidate.name in CONTROLS:
            continue
        say(f"measuring {candidate.name} again")
        if bench.ratio(candidate.plan, 3)[0].high <= limit:
            return candidate
    fastest = min(told, key=lambda t: t.ratio)
    raise AutotuneError(
        f"some plan must stay within {config.limit} by the upper bound of its measured ratio, but the fastest of "
        f"{len(told)} trials, {fastest.name!r}, reached {fastest.ratio:.2f}x of dense "
        f"(at most {fastest.ratio_high:.2f}x); "
        "raise the limit, measure with more --repeats, or run more --trials"
    )


def _certify(
    bench: Bench, study: Study, champion: Told, say: Callable[[str], None]
) -> tuple[list[Row], dict[str, Interval]]:
    """Score dense, the fixed plans and the champion on held-out pictures: a row each, and the champion minus each."""
    plans = {"dense": DENSE, **_rivals(bench, study, champion, say), "tuned": champion.plan}
    scores: dict[str, tuple[float, ...]] = {}
    for name, plan in plans.items():
        say(f"certifying {name}")
        scores[name] = bench.scores(plan, "certify").scores
    table = bench.table("certify")
    rows = []
    for name, plan in plans.items():
        say(f"measuring {name}")
        rows.append(_row(bench, table, name, plan, scores[name], scores["dense"]))
    minus = {name: table.difference(scores["tuned"], other) for name, other in scores.items() if name != "tuned"}
    return rows, minus


def _rivals(bench: Bench, study: Study, champion: Told, say: Callable[[str], None]) -> dict[str, Plan]:
    """The fixed plans; as controls, the better on `select` of those on the paper's and on the champion's schedule."""
    told = {t.name: t for t in study.told()}
    rivals = {name: told[name].plan for name in ("hand-set", "hand-set at limit")}
    for name, control in CONTROLS.items():
        say(f"scoring {name}, tuned schedule")
        own = control(champion.plan)
        rivals[name] = own if bench.macro(own, "select")[0] > told[name].score else told[name].plan
    return rivals


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
