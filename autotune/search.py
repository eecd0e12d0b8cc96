"""The search: published plans first, then draws of the space, as each of a study's workers goes about it."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from autotune.bench import NUM_LEARNED, Bench
from autotune.config import NO_ROOM, AutotuneError, JobConfig
from autotune.evaluation import AnswererDiedError
from autotune.latency_model import CPU_TILES, TILES, LatencyModel
from autotune.objective import Told, front, steering
from autotune.prefix_store import PrefixTooLargeError
from autotune.realised import realised_key
from autotune.schedule import flops_of
from autotune.scoring import DENSE, Scoring, dense_of
from autotune.space import Draw, SearchSpace, rescale
from autotune.stopping import StoppedError
from autotune.store import LeaseLostError, StoreError
from autotune.study import Asked, Study
from btp import presets
from btp.budget import fit_flops
from btp.cost import DecoderShape, image_token_flops, tokens_per_layer
from btp.errors import BusyDeviceError
from btp.plan import Plan, Stage

__all__ = [
    "CONTROLS",
    "DENSE",
    "LEARNED",
    "PUBLISHED",
    "Search",
    "in_stages",
    "learning_budget",
    "scaled",
    "summary",
    "title",
]

logger = logging.getLogger(__name__)

CONTROLS = {"random": presets.random_control, "uniform": presets.uniform_control}
PUBLISHED = tuple(name for name in presets.SYSTEMS if name not in ("dense", "btp_released", *CONTROLS))
"""Tried at the limit beside the hand-set plan, which is the released code's."""
LEARNED = "learned by gradient"
SPREAD_PROBES, LIMIT_PROBES = 9, 6  # plans measured to model the latency: all over the range, then at the limit
FASTEST_PROBE, SLOWEST_PROBE = 0.2, 0.9  # of dense's multiplications
SHARE_OF_SEEDS, SHARE_CLOSER = 0.5, 0.25  # of the trials
MOST_TO_LEARN = 0.95  # of dense's FLOPs
CLOSE = 0.015  # of the limit: left unspent by a plan whose like was measured, about what an interval is wide
PROMISING = 0.03  # of the best merit: three points of accuracy, about what chance does on 300 questions
FAR = 0.1  # over the limit by more than this share, a plan is not as good as it looks there
IDLE_S = 0.2  # between looks at whether there is something to try again
MAX_FAILED_IN_A_ROW = 3  # of one worker's trials, before it is taken for broken itself
BEATS = 4  # signs of life that a lease has room for
CLOSER, AGAIN = ", closer to the limit", ", again"


class Search:
    """One study's trials, from the first probe to the last draw, as one of its workers sees them."""

    def __init__(
        self, config: JobConfig, bench: Bench, study: Study, space: SearchSpace, say: Callable[[str], None]
    ) -> None:
        self._config, self._bench, self._study, self._space, self._say = config, bench, study, space, say
        self._decoder, self._num_image_tokens = bench.anatomy.decoder, bench.key.image_tokens
        self._num_layers = self._decoder.num_layers
        self._failed_in_a_row = 0

    def prepare(self, limit: float, known: Mapping[str, Plan]) -> None:
        """Begin the study, if nobody has, and have every fixed plan wait to be tried.

        known: plans that the registry has of this model, by name; those of the study's beginning are tried.
        """
        if "limit" not in self._study.notes:
            self._study.note("known", {name: plan.to_dict() for name, plan in known.items()})
            self._begin(limit)
        for name, plan in self._seeds().items():
            self._study.enqueue(name, plan)

    def run(self, stop: Callable[[], bool] = lambda: False) -> None:
        """Try what there is to try, beside any number of others, until the study has its trials or it is closed.

        A trial that cannot be scored fails with its reason, and the next is tried; one whose lease is lost is dropped.
        Once `stop` says so, and whatever else ends this, the trial that is being tried is handed back. Raises
        StoppedError in the first case.
        """
        self._say("answering `select` with dense")
        with self._pulsing(_unless(stop)):
            dense = dense_of(self._bench)
        self._study.leases.add("dense", dense)
        while not self._study.is_done(self._config.num_trials) and self._study.leases.opened is not None:
            if stop():
                raise StoppedError
            if not self._study.has_waiting:
                self._bring_closer()
            asked = self._study.ask(self._space.ranges, self._config.sampler, self._config.num_trials, self._same)
            if asked is None:
                time.sleep(IDLE_S)
                continue
            self._take(asked, stop)
            self._say("searching")
        self._study.mirror.flush()

    def finish(self) -> None:
        """Note how the search was steered, once there is nothing more to try."""
        self._study.mirror.sweep()
        self._study.note("steering", steering(self._study.told()).reason)

    def _take(self, asked: Asked, stop: Callable[[], bool]) -> None:
        """Try a trial under its lease, and tell what it came to."""
        try:
            with self._alive(asked, stop):
                told, key = self._outcome(asked)
            self._study.tell(asked, told, key)
        except LeaseLostError as lost:
            logger.warning("%s", lost)
        except StoreError:
            raise  # there is nobody to hand the trial back to: its lease runs out
        except AnswererDiedError as error:  # the plan may be why
            self._study.give_up(asked, str(error))
            raise
        except PrefixTooLargeError as error:
            self._failed(asked, error)
        except (AutotuneError, BusyDeviceError, StoppedError, KeyboardInterrupt, SystemExit) as error:
            self._study.release(asked, f"its worker stopped: {error or type(error).__name__}")
            raise
        except Exception as error:  # the trial boundary: what is wrong with one plan is no reason to end the search
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                self._study.release(asked, f"no room: {error}")
                raise AutotuneError(
                    f"a trial needs room on the disk, but: {error}; free some, and run again"
                ) from error
            self._failed(asked, error)
        else:
            self._failed_in_a_row = 0

    def _failed(self, asked: Asked, error: Exception) -> None:
        """Finish a trial without a result. Raises AutotuneError where it is the worker that seems to be broken."""
        reason = f"{type(error).__name__}: {error}"
        logger.warning("%s failed: %s", asked.name, reason)
        self._study.fail(asked, reason)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            raise AutotuneError(
                f"some trials must succeed, but {self._failed_in_a_row} failed one after the other, the last with "
                f"{reason}; mend that, and run the same command again to resume"
            ) from error

    @contextmanager
    def _alive(self, asked: Asked, stop: Callable[[], bool]) -> Iterator[None]:
        """Show signs of life while the bench works, and have it end where it is to stop, or the lease is lost."""
        last = time.monotonic()
        unless_stopped = _unless(stop)

        def pulse() -> None:
            nonlocal last
            unless_stopped()
            if time.monotonic() - last > self._study.leases.seconds / BEATS:
                self._study.beat(asked)
                last = time.monotonic()

        with self._pulsing(pulse):
            yield

    @contextmanager
    def _pulsing(self, pulse: Callable[[], None]) -> Iterator[None]:
        self._bench.pulse = pulse
        try:
            yield
        finally:
            self._bench.pulse = lambda: None

    def _outcome(self, asked: Asked) -> tuple[Told, str]:
        """What a trial comes to, and what its plan realises; another's result where that one's realises the same."""
        if isinstance(asked.work, Plan):
            plan, draw = asked.work, self._draw_of(asked.work)
        else:
            plan, draw = self._decoded(asked.work), asked.work
        key = self._key(plan)
        same = self._study.same_as(key)
        number, name = asked.number, asked.name
        told = self._scoring(number, name, plan) if same is None else replace(same, number=number, name=name)
        return replace(told, draw=draw), key

    @cached_property
    def limit(self) -> float:
        """The limit as a ratio, as it was when the study began."""
        return float(self._study.notes["limit"])

    @cached_property
    def latency(self) -> LatencyModel:
        """Fitted to the study's own probes."""
        return LatencyModel.from_dict(self._study.notes["latency"])

    @cached_property
    def _scoring(self) -> Scoring:
        return Scoring(self._bench, self._study, self.latency, self.limit, self._config.guard)

    def at_limit(self, plan: Plan) -> Plan:
        """The same system with its keep fractions and layers scaled until its modelled latency is the limit."""
        return self._solved(self._scaled(plan), self.limit)

    def _scaled(self, plan: Plan) -> Callable[[float], Plan]:
        return scaled(plan, self._decoder, self._num_image_tokens)

    def _solved(self, schedule: Callable[[float], Plan], ratio: float) -> Plan:
        """The plan of a family that keeps most within a ratio, by the model and what plans like it have measured.

        Without one the model leaves its margin unspent. With one it is off by as much as there, and `CLOSE` is left.
        """
        plan = self.latency.solve(schedule, ratio)
        off = self._off(plan)
        if off is None:
            return plan
        return self.latency.solve(schedule, ratio * (1 - CLOSE) / off * (1 + self.latency.error.margin))

    def _off(self, plan: Plan) -> float | None:
        """Measured to modelled ratio of the measured plan with the same selectors that is nearest by modelled ratio."""
        like = [t for t in self._study.told() if t.measured and _selectors(t.plan) == _selectors(plan)]
        modelled = {t.number: self.latency.ratio(t.plan) for t in like}
        aimed = self.latency.ratio(plan)
        nearest = min(like, key=lambda t: abs(modelled[t.number] - aimed), default=None)
        return None if nearest is None else nearest.ratio / modelled[nearest.number]

    def _bring_closer(self) -> None:
        """Have the best trial that is not at the limit, or just over it, tried again nearer to it, if it has not been.

        Of those on the front and those not far below its best. The model's margin is for plans that it does not know;
        what this one measured says how far it can go. At most `SHARE_CLOSER` of the trials go that way.
        """
        told = self._study.told()
        names, members = self._study.names, front(told)
        if sum(CLOSER in name for name in names) >= SHARE_CLOSER * self._config.num_trials or not members:
            return
        least = members[-1].merit - PROMISING
        for t in sorted(told, key=lambda t: -t.merit):
            near = self.limit * (1 - 2 * CLOSE) < t.ratio_high <= self.limit or t.ratio > self.limit * (1 + FAR)
            first = t.name.removesuffix(AGAIN).removesuffix(CLOSER) + CLOSER
            closer = first + AGAIN if t.name == first else first
            if near or not t.measured or closer in names or t.name in CONTROLS:
                continue
            plan = self._solved(self._scaled(t.plan), self.limit)
            if (t.merit >= least or t in members) and self._study.same_as(self._key(plan)) is None:
                self._study.enqueue(closer, plan, within=self._config.num_trials)
                return

    def _begin(self, limit: float) -> None:
        """What the whole study rests on, measured once: the latency model and the calibrated layers."""
        num_text_tokens = self._bench.key.prompt_tokens - self._num_image_tokens
        sizes = (self._decoder, self._num_image_tokens, num_text_tokens)
        spread = np.linspace(FASTEST_PROBE, SLOWEST_PROBE, SPREAD_PROBES).tolist()
        plans = LatencyModel.from_flops(*sizes).probes(self._space, spread, self._config.seed)
        tiles = CPU_TILES if self._config.device == "cpu" else TILES
        probes: list[tuple[Plan, float]] = []
        for wave in ("spread", "at the limit"):
            for plan in plans:
                self._say(f"measuring probe {len(probes) + 1} of {SPREAD_PROBES + LIMIT_PROBES}")
                probes.append((plan, self._bench.ratio(plan)[0].value))
            fitted = LatencyModel.fit(probes, *sizes, tiles=tiles)
            if wave == "spread":
                plans = fitted.probes(self._space, [limit] * LIMIT_PROBES, self._config.seed)
        self._say("calibrating")
        self._study.note("latency", fitted.to_dict())
        self._study.note("probes", [{"plan": plan.to_dict(), "ratio": ratio} for plan, ratio in probes])
        num_stages = len(presets.btp_released(self._num_layers).stages)
        self._study.note("calibrated_layers", self._bench.calibrated_layers(num_stages))
        self._study.note("withdrawal_layer", self._bench.withdrawal_layer())
        self._study.note("limit", limit)

    def _seeds(self) -> dict[str, Plan]:
        """What is tried before anything is drawn: the hand-set plan, its controls, the published, the registered.

        These take `SHARE_OF_SEEDS` of the trials at most. The user's own plans and the learned one come as well,
        however many trials there are. Those that are over the limit by the latency model are shrunk until they are not.
        """
        layers = tuple(self._study.notes["calibrated_layers"])
        hand_set = presets.btp_released(self._num_layers)
        at_limit = self.latency.solve(rescale(hand_set), self.limit)
        found = {
            "hand-set": hand_set,
            "hand-set at limit": at_limit,
            **{name: control(at_limit) for name, control in CONTROLS.items()},
            "hand-set, calibrated layers": self.at_limit(presets.btp_released(self._num_layers, layers=layers)),
        }
        found["diversity in stages"] = self.at_limit(in_stages(self._num_layers))
        room = max(0, int(SHARE_OF_SEEDS * self._config.num_trials) - len(found))
        found |= {title(name): self.at_limit(self._system(name)) for name in PUBLISHED[:room]}
        known = list(self._study.notes["known"].items())[: max(0, room - len(PUBLISHED))]
        found |= {name: self._within(Plan.from_dict(plan)) for name, plan in known}
        found |= {f"plan {path.stem}": self._within(Plan.load(path)) for path in self._config.plans}
        return found | ({LEARNED: self._learned()} if self._config.learn else {})

    def _learned(self) -> Plan:
        """Learned at the FLOPs that a like plan has at the limit, then brought to the limit itself."""
        found = self._bench.learned(learning_budget(self.latency, self._decoder, self.limit), self._say)
        return self.latency.solve(rescale(Plan.from_dict(found["plan"])), self.limit)

    def _within(self, plan: Plan) -> Plan:
        fits = self.latency.ratio(plan) <= self.limit / (1 + self.latency.error.margin)
        return plan if fits else self.latency.solve(rescale(plan), self.limit)

    def _system(self, name: str) -> Plan:
        """A published system's own plan for this model, with the layers that its own calibration finds."""
        notes = self._study.notes
        calibrated: dict[str, Callable[[], Plan]] = {
            "btp_paper": lambda: presets.btp_paper(self._num_layers, layers=tuple(notes["calibrated_layers"])),
            "vtw": lambda: presets.vtw(self._num_layers, layer=notes["withdrawal_layer"]),
        }
        return calibrated.get(name, lambda: presets.SYSTEMS[name].plan(self._num_layers))()

    @cached_property
    def _sizes(self) -> list[int]:
        """How many image tokens the prompts of `select` have."""
        return sorted({counts[0] for counts, _ in self._bench.scores(DENSE, "select").realised})

    def _key(self, plan: Plan) -> str:
        """Equal where plans keep the same tokens of every prompt."""
        return "; ".join(realised_key(plan, self._num_layers, size) for size in self._sizes)

    def _same(self, draw: Draw) -> Told | None:
        return self._study.same_as(self._key(self._decoded(draw)))

    def _draw_of(self, plan: Plan) -> Draw | None:
        off = self._off(plan)
        left = self.limit / (1 + self.latency.error.margin) if off is None else self.limit * (1 - CLOSE) / off
        budget = self.latency.ratio(plan) / left
        if budget > 1 + CLOSE:  # as a draw it would be a smaller plan
            return None
        return self._space.draw_of(plan, self._num_layers, self._num_image_tokens, min(budget, 1.0))

    def _decoded(self, draw: Draw) -> Plan:
        share = draw.get("budget", self._space.budget.high)
        return self._solved(self._space.schedule(draw, self._num_layers), float(share) * self.limit)


def _unless(stop: Callable[[], bool]) -> Callable[[], None]:
    def check() -> None:
        if stop():
            raise StoppedError

    return check


def _selectors(plan: Plan) -> tuple[str, ...]:
    return tuple(stage.selector for stage in plan.stages if stage.keep)


def scaled(plan: Plan, decoder: DecoderShape, num_image_tokens: int) -> Callable[[float], Plan]:
    """The same system scaled to exp(-t) of dense's FLOPs, keep fractions and layers alike, for `LatencyModel.solve`."""
    sizes = {"hidden_size": decoder.hidden_size, "intermediate_size": decoder.intermediate_size}
    num_tokens = len(plan.stages) + 1  # so many in every layer pay for a token of each stage
    least, most = (
        image_token_flops((tokens,) * decoder.num_layers, **sizes) for tokens in (num_tokens, num_image_tokens)
    )

    def schedule(t: float) -> Plan:
        flops = max(least, most * math.exp(-t))
        return fit_flops(plan, flops, num_layers=decoder.num_layers, num_image_tokens=num_image_tokens, **sizes)

    return schedule


def in_stages(num_layers: int) -> Plan:
    """DivPrune's rule in as many stages as a learned plan has: what an expert would try after the published."""
    layers = (index * num_layers // NUM_LEARNED for index in range(NUM_LEARNED))
    stages = (Stage(layer=layer, keep=0.5 ** (index + 1), selector="diversity") for index, layer in enumerate(layers))
    return Plan(stages=tuple(stages))


def learning_budget(latency: LatencyModel, decoder: DecoderShape, limit: float) -> float:
    """Share of dense's image-token FLOPs at which to learn a plan for a latency ratio: that of `in_stages` there."""
    num_tokens = latency.counts.num_image_tokens
    like = latency.solve(rescale(in_stages(decoder.num_layers)), limit)
    share = flops_of(decoder, num_tokens)(tokens_per_layer(like, decoder.num_layers, num_tokens))
    return min(round(share, 3), MOST_TO_LEARN)


def title(system: str) -> str:
    """The name of a published system's trial."""
    return f"{presets.SYSTEMS[system].name} at limit"


def summary(study: Study) -> dict[str, Any]:
    """How the search went, as plain data: what steered it, what stopping saved, how well latency was known.

    saved: the share of the answers to `select` that trials did not have to give, plans tried twice counted once.
    """
    tried = {t.plan: t for t in study.told()}.values()
    full = max((t.num_samples for t in tried), default=0) * len(tried)
    return {
        "steering": study.notes.get("steering", ""),
        "saved": 1 - sum(t.num_samples for t in tried) / full if full else 0.0,
        "num_stopped": sum(not t.complete for t in tried),
        "num_tried": len(tried),
        "latency_model_error": study.notes["latency"]["error"],
    }
