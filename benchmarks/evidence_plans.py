"""The plans that the evidence compares: published systems brought to one measured latency, champions, learned plans."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from autotune.bench import Bench
from autotune.certify import Interval, finalists
from autotune.config import AutotuneError, JobConfig
from autotune.latency_model import LatencyModel
from autotune.objective import Told
from autotune.search import CONTROLS, Search, learning_budget, summary
from autotune.space import SearchSpace, rescale
from autotune.study import Study
from btp import presets
from btp.budget import fit_flops
from btp.cost import image_token_flops
from btp.plan import Plan

__all__ = ["CALIBRATED", "HAND_SET", "TOLERANCE", "AtLimit", "Lab", "brought", "presets_of"]

TOLERANCE = 0.02  # how far under the limit a measured ratio may stay, as a share of it
ROUNDS, MORE_ROUNDS = 4, 7  # measurements, the first before any correction; more only while none is under the limit
EFFORT = 2  # times the usual pairs
HAND_SET = "btp_released"  # the plan of the released code, before the layers that it names
CALIBRATED = "btp_released_calibrated"  # the same before the layers that calibration finds

Family = Callable[[float], Plan]  # from a latency ratio to the plan that is modelled to have it


@dataclass(frozen=True, kw_only=True, slots=True)
class AtLimit:
    """A plan at a measured latency. rounds: aimed and measured ratios, in turn. reached: within `TOLERANCE` under."""

    plan: Plan
    measured: Interval
    rounds: tuple[tuple[float, float], ...]
    reached: bool


def brought(family: Family, limit: float, measure: Callable[[Plan], Interval]) -> AtLimit:
    """The family's plan that measures at the limit, or within `TOLERANCE` under it.

    The target is corrected by the wanted over the measured ratio, or, once there are targets on both sides, by linear
    interpolation; up to `ROUNDS` times in all. A family without such a plan, as one of whole layers, gives the slowest
    measured plan under the limit, and its fastest where none is under.
    """
    target = limit * (1 - TOLERANCE / 2)
    tried: list[tuple[Plan, Interval]] = []
    rounds: list[tuple[float, float]] = []
    while len(rounds) < ROUNDS or (len(rounds) < MORE_ROUNDS and all(m.value > limit for _, m in tried)):
        plan = family(target)
        measured = measure(plan)
        tried.append((plan, measured))
        rounds.append((target, measured.value))
        if limit * (1 - TOLERANCE) <= measured.value <= limit:
            return AtLimit(plan=plan, measured=measured, rounds=tuple(rounds), reached=True)
        target = _next_target(rounds, limit * (1 - TOLERANCE / 2))
    under = [pair for pair in tried if pair[1].value <= limit]
    plan, measured = max(under, key=_ratio) if under else min(tried, key=_ratio)
    return AtLimit(plan=plan, measured=measured, rounds=tuple(rounds), reached=False)


def _next_target(rounds: Sequence[tuple[float, float]], wanted: float) -> float:
    """rounds: targets and what they measured."""
    low = max((pair for pair in rounds if pair[1] <= wanted), default=None)
    high = min((pair for pair in rounds if pair[1] > wanted), default=None)
    if low and high and low[0] < high[0]:
        return low[0] + (wanted - low[1]) / (high[1] - low[1]) * (high[0] - low[0])
    target, measured = rounds[-1]
    return target * wanted / measured


def _ratio(pair: tuple[Plan, Interval]) -> float:
    return pair[1].value


def presets_of(num_layers: int, calibrated: tuple[int, ...], withdrawal: int | None) -> dict[str, Plan]:
    """Every published system's own plan, with the layers of its calibration, and the controls on BTP's schedule."""
    paper = presets.btp_paper(num_layers, layers=calibrated)
    special = {
        "btp_paper": paper,
        "vtw": presets.vtw(num_layers, layer=withdrawal),
        **{name: control(paper) for name, control in CONTROLS.items()},
    }
    own = {name: special.get(name) or system.plan(num_layers) for name, system in presets.SYSTEMS.items()}
    found = {name: plan for name, plan in own.items() if name != "dense"}
    return {**found, CALIBRATED: presets.btp_released(num_layers, layers=calibrated)}


class Lab:
    """One model at one limit: its bench, the latency model that all seeds share, and what each of them found."""

    def __init__(
        self, config: JobConfig, bench: Bench, space: SearchSpace, first_seed: int, done: Callable[[str, str], None]
    ) -> None:
        self.config, self.bench, self._space, self._first_seed, self._done = config, bench, space, first_seed, done
        self._champions: dict[int, tuple[Told, Study]] = {}
        self.limit = config.limit.bound
        self._decoder, self._num_image_tokens = bench.anatomy.decoder, bench.key.image_tokens
        self.num_layers = self._decoder.num_layers

    @cached_property
    def notes(self) -> Mapping[str, Any]:
        """What every study of this limit rests on, measured once: by that of the first seed."""
        _, study = self.champion(self._first_seed)
        rests_on = {key: value for key, value in study.notes.items() if key not in ("limit", "steering")}
        return {**rests_on, "limit": study.notes["limit"]}  # last: it says that the rest is there

    @cached_property
    def latency(self) -> LatencyModel:
        return LatencyModel.from_dict(self.notes["latency"])

    def measure(self, plan: Plan) -> Interval:
        """Latency ratio to dense; measured once, also over runs."""
        if not plan.stages:
            return Interval(1.0, 1.0, 1.0)

        def compute() -> dict[str, Any]:
            ratio, dense_ms = self.bench.ratio(plan, EFFORT)
            return {"ratio": asdict(ratio), "dense_ms": dense_ms}

        name = f"evidence-{self.limit:g}-{EFFORT * self.config.repeats}-{plan.digest[:20]}"
        return Interval(**self.bench.results.once(name, compute)["ratio"])

    def presets(self, names: tuple[str, ...] | None = None) -> dict[str, AtLimit]:
        """Every published system at the limit, by name; by default all."""
        starts = presets_of(self.num_layers, tuple(self.notes["calibrated_layers"]), self.notes["withdrawal_layer"])
        found = {}
        for name in names or tuple(starts):
            found[name] = self._preset(starts[name])
            self._done("system", f"{name} at {found[name].measured.value:.3f}")
        return found

    def _preset(self, start: Plan) -> AtLimit:
        """Keep fractions and layers scaled by one factor; then, where layers are too coarse, keep fractions alone."""
        found = brought(self._by_flops(start), self.limit, self.measure)
        if found.reached:
            return found
        finer = brought(self._by_model(rescale(found.plan)), self.limit, self.measure)
        return replace(finer if finer.reached else found, rounds=(*found.rounds, *finer.rounds))

    def champion(self, seed: int) -> tuple[Told, Study]:
        """The best plan of the seed's study by `select`, within the limit by the upper bound of its measured ratio."""
        if seed not in self._champions:
            self._champions[seed] = self._searched(seed)
        return self._champions[seed]

    def _searched(self, seed: int) -> tuple[Told, Study]:
        study = self._study(seed)
        if seed != self._first_seed and "limit" not in study.notes:
            for key, value in self.notes.items():
                study.note(key, value)
        for _ in range(min(study.num_done, self.config.num_trials)):
            self._done("trial", f"seed {seed}: a trial of an earlier run")
        search = Search(replace(self.config, seed=seed), self.bench, study, self._space, self._say)
        search.prepare(self.limit, {})
        study.leases.open({}, self.config.num_trials)
        search.run()
        study.leases.close()
        search.finish()
        able = [t for t in study.told() if t.name not in CONTROLS and t.complete and t.measured]
        if found := finalists(able, study.notes["limit"], 1):
            return found[0], study
        raise AutotuneError(
            f"some plan of seed {seed} must stay within {self.config.limit} by the upper bound of its measured ratio, "
            "but none does; raise the limit or the number of trials"
        )

    def learned(self, steps: int) -> tuple[AtLimit, dict[str, Any]]:
        """The gradient-learned plan at the limit, its layers and lambdas as learned, and how learning went.

        Learned as the search learns it; its keep fractions alone are then scaled until the measured ratio is there.
        """
        budget = learning_budget(self.latency, self._decoder, self.limit)
        kept = self.bench.learned(budget, lambda _: None, steps)
        plan = Plan.from_dict(kept["plan"])
        found = brought(self._by_model(rescale(plan)), self.limit, self.measure)
        self._done("learned", f"learned plan at {found.measured.value:.3f}")
        return found, kept

    def study_summary(self, study: Study, seed: int, champion: Told) -> dict[str, Any]:
        """The study as raw numbers: its champion, how the search went, and every trial."""
        trials = [
            {
                "name": t.name,
                "plan": t.plan.to_dict(),
                "score": t.score,
                "ratio": t.ratio,
                "complete": t.complete,
                "feasible": t.feasible,
            }
            for t in study.told()
        ]
        return {"seed": seed, "study": study.name, "champion": champion.name, **summary(study), "trials": trials}

    def _by_flops(self, plan: Plan) -> Family:
        least, most = (self._flops((n,) * self.num_layers) for n in (len(plan.stages) + 1, self._num_image_tokens))

        def schedule(t: float) -> Plan:
            return fit_flops(
                plan,
                max(least, most * math.exp(-t)),
                num_layers=self.num_layers,
                num_image_tokens=self._num_image_tokens,
                hidden_size=self._decoder.hidden_size,
                intermediate_size=self._decoder.intermediate_size,
            )

        return self._by_model(schedule)

    def _by_model(self, schedule: Family) -> Family:
        """`schedule`, asked by modelled ratio: without the margin, as it is the measured ratio that decides."""
        return lambda ratio: self.latency.solve(schedule, ratio * (1 + self.latency.error.margin))

    def _flops(self, counts: tuple[int, ...]) -> int:
        return image_token_flops(counts, self._decoder.hidden_size, self._decoder.intermediate_size)

    def _study(self, seed: int) -> Study:
        """Of this model, data, device, limit, space and first seed; another question is another study."""
        parts = [self.bench.digest, str(self.bench.key), str(self.config.limit), str(self._space), self._first_seed]
        digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]
        return Study(self.bench.database, f"{self.config.name}-{self.limit:g}-seed-{seed}-{digest}", seed)

    def _say(self, what: str) -> None:
        kind = "trial" if what == "searching" else "probe" if what.startswith("measuring probe") else "other"
        self._done(kind, what)
