"""Learn a plan by gradient: how a budget is split over the layers, and lambda of each stage, in minutes.

The weights stay as they are. What is learned are a keep ratio and a lambda before every candidate layer, through
`btp.relaxed`, so that the answers of the dense model stay likely: the loss is KL(dense || pruned), in nats, on the
tokens of the dense model's own answers. The budget is held by a Lagrangian whose multiplier is
estimated by least squares at every step (Nocedal and Wright, Numerical Optimization), and by bringing the keep ratios
back to the budget after it. Halfway only the stages that matter most are kept, and learned on.
Learning masks under a FLOPs budget by straight-through gradients and a Lagrangian is the idea of VisPCO; there the
outcome is a keep ratio a layer for a given score, here it is a plan, and what the stages choose by is learned too.

Shapes: L decoder layers, C candidate layers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from autotune.config import AutotuneError
from autotune.data import Example
from autotune.schedule import Cost, Schedule, flops_of
from autotune.teaching import Lesson, lessons
from btp.families import anatomy_of
from btp.plan import Plan, round_half_up
from btp.relaxed import relaxed

__all__ = ["Learned", "Step", "learn"]

NUM_EXAMPLES = 96
MAX_CANDIDATES = 12
PASS_RATE, WEIGHT_RATE = 0.1, 0.3  # of the logits; distances are small beside attention, so lambda may have to be
TEMPERATURES = 1.0, 0.1  # first and last, in standard deviations of the scores
AVERAGED = 1 / 4  # of the steps, the last ones


@dataclass(frozen=True, slots=True)
class Step:
    """One step of learning, before its update: the batch's loss in nats, the cost, and every stage as it stood.

    multiplier: nats that one more dense model's cost would be worth, by this batch.
    """

    loss: float
    cost: float
    multiplier: float
    layers: tuple[int, ...]
    keep: tuple[float, ...]
    attention_weights: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Learned:
    """plan: of at most as many stages as asked for. cost: its share of dense, within the budget. seconds: in all."""

    plan: Plan
    cost: float
    history: tuple[Step, ...]
    seconds: float


def learn(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    budget: float,
    *,
    seed: int,
    steps: int = 120,
    max_stages: int = 4,
    layers: Sequence[int] | None = None,
    cost: Cost | None = None,
    attention: Literal["softmax", "logits"] = "softmax",
    batch_size: int = 8,
    say: Callable[[str], None] = lambda _: None,
) -> Learned:
    """The plan of `joint` stages that answers most like the dense model at a cost of at most `budget` of dense.

    examples: of `calibrate`; NUM_EXAMPLES of them are drawn by the seed. layers: the candidates, by default all, or
    MAX_CANDIDATES evenly through a deeper decoder. cost: by default FLOPs; another one, such as a latency model's
    ratio, must rise with every count. The same seed gives the same plan, on one machine with one thread.

    Raises AutotuneError for a budget outside (0, 1) or under what one token from the first candidate on costs, for
    candidates that are no layers of the model, and for fewer than 4 steps or 1 stage.
    """
    started = time.perf_counter()
    anatomy = anatomy_of(model)
    num_layers = len(anatomy.layers)
    candidates = _candidates(num_layers, layers)
    if steps < 4 or max_stages < 1:
        raise AutotuneError(f"learning needs at least 4 steps and 1 stage, got {steps} and {max_stages}; raise them")
    drawn = random.Random(seed).sample(range(len(examples)), min(NUM_EXAMPLES, len(examples)))
    taught = lessons(model, processor, [examples[index] for index in drawn], batch_size)
    num_tokens = sorted(lesson.num_image_tokens for lesson in taught)[len(taught) // 2]
    cost = cost or flops_of(anatomy.decoder, num_tokens)
    schedule = Schedule.even(candidates, num_layers, num_tokens, attention, cost, budget)
    _check_budget(budget, schedule.least_cost(cost))
    learner = _Learner(model, taught, cost, budget, steps, random.Random(seed), say)
    with _frozen(model):
        whole = learner.run(schedule, steps // 2)
        schedule = learner.run(whole.thinned(max_stages, cost, budget).fitted(cost, budget), steps - steps // 2)
    plan = schedule.plan(cost, budget)
    return Learned(plan, cost(schedule.counts_of(plan)), tuple(learner.history), time.perf_counter() - started)


class _Learner:
    """Steps over the lessons, again and again, each time in another order; the temperature falls from run to run."""

    def __init__(
        self,
        model: Any,
        taught: Sequence[Lesson],
        cost: Cost,
        budget: float,
        num_steps: int,
        rng: random.Random,
        say: Callable[[str], None],
    ) -> None:
        self._model, self._taught, self._rng, self._say = model, taught, rng, say
        self._cost, self._budget, self._num_steps = cost, budget, num_steps
        self._ahead: list[Lesson] = []
        self.history: list[Step] = []

    def run(self, schedule: Schedule, num_steps: int) -> Schedule:
        """The schedule after as many steps, the mean over the last of them: single batches pull it here and there."""
        rates = zip(schedule.parameters, (PASS_RATE, WEIGHT_RATE), strict=True)
        optimiser = torch.optim.Adam([{"params": [parameter], "lr": rate} for parameter, rate in rates])
        num_averaged = max(1, round_half_up(AVERAGED * num_steps))
        latest: list[Schedule] = []
        for number in range(num_steps):
            optimiser.zero_grad()
            self._differentiate(schedule, self._next_lesson())
            optimiser.step()
            schedule.fit(self._cost, self._budget)
            if number >= num_steps - num_averaged:
                latest.append(schedule.copy())
        return Schedule.mean(latest)

    def _differentiate(self, schedule: Schedule, lesson: Lesson) -> None:
        """Put the gradient of the Lagrangian on one lesson into the parameters."""
        stages, temperature = schedule.stages(), self._temperature()
        with relaxed(self._model, stages, lesson.image_mask_BS, lesson.last_B1, temperature=temperature):
            divergence = lesson.divergence(self._model).double().mean()
        cost = schedule.relaxed_cost(self._cost)
        divergence.backward()
        (dearer_C,) = torch.autograd.grad(cost, schedule.pass_C)
        nearer_C = cast(Tensor, schedule.pass_C.grad)
        multiplier = -(nearer_C @ dearer_C) / (dearer_C @ dearer_C)  # the one that leaves the smallest gradient
        nearer_C += multiplier * dearer_C
        self._note(schedule, float(divergence.detach()), float(cost.detach()), float(multiplier))

    def _temperature(self) -> float:
        first, last = TEMPERATURES
        return math.exp(math.log(first) + len(self.history) / self._num_steps * math.log(last / first))

    def _next_lesson(self) -> Lesson:
        if not self._ahead:
            self._ahead = self._rng.sample(self._taught, len(self._taught))
        return self._ahead.pop()

    def _note(self, schedule: Schedule, loss: float, cost: float, multiplier: float) -> None:
        keep, weights = schedule.values()
        step = Step(loss, cost, multiplier, schedule.layers, keep, weights)
        self.history.append(step)
        stages = ", ".join(
            f"{k:.3f} before {i} (λ {w:.2f})" for i, k, w in zip(step.layers, keep, weights, strict=True)
        )
        self._say(f"step {len(self.history)}/{self._num_steps}: KL {loss:.4f}, cost {cost:.3f}: {stages}")


@contextmanager
def _frozen(model: Any) -> Iterator[None]:
    """No weight of the model asks for a gradient; afterwards those do that did before."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _candidates(num_layers: int, layers: Sequence[int] | None) -> tuple[int, ...]:
    if layers is None:
        count = min(num_layers, MAX_CANDIDATES)
        return tuple(math.floor(index * num_layers / count) for index in range(count))
    if not layers or sorted(set(layers)) != list(layers) or not 0 <= layers[0] <= layers[-1] < num_layers:
        raise AutotuneError(
            f"candidate layers must rise and lie among the model's {num_layers}, got {list(layers)}; leave them out "
            "for all of them"
        )
    return tuple(layers)


def _check_budget(budget: float, least: float) -> None:
    if not least <= budget < 1:
        raise AutotuneError(
            f"the budget must be under 1, the dense model's cost, and at least {least:.3g}, the cost of one "
            f"image token from the first candidate layer on, got {budget:g}; ask for a share in between"
        )
