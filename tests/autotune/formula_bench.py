"""A device and a model that are formulas, for what the search, its workers and their deaths are tested on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from autotune import racing
from autotune.certify import Interval, ScoreTable
from autotune.config import JobConfig, Limit
from autotune.evaluation import Scores
from autotune.realised import realised_key
from btp.cost import DecoderShape, tokens_per_layer
from btp.plan import Plan, Stage

SPACE = Path(__file__).parents[2] / "search_spaces" / "reference.yaml"
TASKS = ("counting", "reading")
NUM_SAMPLES, NUM_LAYERS, NUM_IMAGE_TOKENS = 120, 8, 256
LIMIT = 0.6
DECODER = DecoderShape(
    num_layers=NUM_LAYERS,
    hidden_size=64,
    intermediate_size=160,
    num_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    vocab_size=100,
)
GOOD = {"max_sum": 1.0, "diversity": 0.9, "k_center": 0.9, "joint": 0.6, "balanced": 0.5, "attention": 0.3}


TOO_SLOW = Plan(stages=(Stage(layer=6, keep=0.5),))
KNOWN = Plan(stages=(Stage(layer=0, keep=0.3, selector="max_sum"), Stage(layer=4, keep=0.1, selector="max_sum")))


class FormulaBench:
    """A plan is the better the more tokens it keeps, by a better selector; latency is the share of tokens alive."""

    def __init__(self) -> None:
        self.splits = {"select": [SimpleNamespace(task=TASKS[i % 2], image_id=str(i // 4)) for i in range(NUM_SAMPLES)]}
        self.looks = racing.looks(NUM_SAMPLES)
        self.anatomy = SimpleNamespace(decoder=DECODER)
        self.key = SimpleNamespace(image_tokens=NUM_IMAGE_TOKENS, prompt_tokens=NUM_IMAGE_TOKENS + 20)
        self.evaluated: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()
        self.counts: tuple[Counter[str], Counter[str]]
        self.pulse: Callable[[], None] = lambda: None
        self._difficulty = np.random.default_rng(0).random(NUM_SAMPLES)

    def alive(self, plan: Plan) -> float:
        return float(np.mean(tokens_per_layer(plan, NUM_LAYERS, NUM_IMAGE_TOKENS))) / NUM_IMAGE_TOKENS

    def ratio(self, plan: Plan, effort: int = 1) -> tuple[Interval, float]:
        self.measured[key(plan)] += 1
        value = 0.2 + 0.8 * self.alive(plan) + 0.005 * len(plan.stages)
        return Interval(value, value - 0.005, value + 0.005), 40.0

    def ability(self, plan: Plan) -> float:
        worth = np.mean([GOOD.get(stage.selector, 0.1) for stage in plan.stages]) if plan.stages else 1.0
        return float(0.95 * min(1.0, 0.3 + 0.7 * worth * self.alive(plan) ** 0.3))

    def scores(self, plan: Plan, split: str) -> Scores:
        *_, whole = self._running(plan)
        return whole

    def running_scores(self, plan: Plan, split: str) -> Iterator[Scores]:
        for scores in self._running(plan):
            self.evaluated[key(plan)] += 1
            self.pulse()
            yield scores

    def _running(self, plan: Plan) -> Iterator[Scores]:
        ability = self.ability(plan)
        for stop in self.looks:
            right = tuple((self._difficulty[:stop] < ability).astype(float).tolist())
            realised = ((tokens_per_layer(plan, NUM_LAYERS, NUM_IMAGE_TOKENS), stop),)
            yield Scores(("",) * stop, right, realised, (1 - ability,) * stop, (1 - ability,) * stop)

    def table(self, split: str) -> ScoreTable:
        examples = self.splits[split]
        return ScoreTable([e.image_id for e in examples], [e.task for e in examples], num_resamples=20)

    def cost_of(self, tokens: tuple[int, ...]) -> tuple[float, float]:
        return sum(tokens) / 1e3, sum(tokens) / 2e3

    def calibrated_layers(self, num_stages: int) -> tuple[int, ...]:
        return tuple(range(1, num_stages + 1))

    def withdrawal_layer(self) -> int:
        return 5


def key(plan: Plan) -> str:
    return realised_key(plan, NUM_LAYERS, NUM_IMAGE_TOKENS)


def config(out: Path, num_trials: int, guard: float | None = None) -> JobConfig:
    return JobConfig(
        model="none",
        data=None,
        out=out,
        limit=Limit.parse(f"prefill_p50<={LIMIT}x"),
        name="fake",
        num_trials=num_trials,
        space=SPACE,
        sampler="tpe",
        guard=guard,
    )
