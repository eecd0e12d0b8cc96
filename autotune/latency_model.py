"""A plan's latency before it is measured: one line through dense and a few probes, and its inverse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from btp.cost import mean_tokens, tokens_per_layer
from btp.plan import Plan

__all__ = ["LatencyModel"]


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Latency ratio to dense = floor + (1 - floor) x mean share of image tokens alive over the layers.

    floor: ratio at which a plan without any image token would run; the text, the launch overhead, the selectors.
    """

    floor: float
    num_layers: int
    num_image_tokens: int

    @classmethod
    def fit(cls, probes: Sequence[tuple[Plan, float]], num_layers: int, num_image_tokens: int) -> LatencyModel:
        """Least squares of the measured ratios of `probes` (plan, ratio), through dense at 1."""
        dense = cls(0.0, num_layers, num_image_tokens)
        dropped = np.array([1 - dense.alive_share(plan) for plan, _ in probes])
        saved = np.array([1 - ratio for _, ratio in probes])
        slope = float(dropped @ saved / (dropped @ dropped))
        return cls(float(np.clip(1 - slope, 0.0, 0.95)), num_layers, num_image_tokens)

    def alive_share(self, plan: Plan) -> float:
        """Mean over the layers of the share of image tokens alive, in [0, 1]."""
        counts = tokens_per_layer(plan, self.num_layers, self.num_image_tokens)
        return mean_tokens(counts) / self.num_image_tokens

    def ratio(self, plan: Plan) -> float:
        return self.floor + (1 - self.floor) * self.alive_share(plan)

    def solve(self, schedule: Callable[[float], Plan], ratio: float) -> Plan:
        """The plan of a family, ever shorter as its argument rises from 0, that keeps most within `ratio`.

        Bisection on the argument in [0, 64]; the shortest plan where even that one is over. A stage that keeps any
        keeps at least one token.
        """
        low, high = 0.0, 64.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self.ratio(schedule(middle)) > ratio else (low, middle)
        return self._with_a_token(schedule(high))

    def _with_a_token(self, plan: Plan) -> Plan:
        """Keep fractions at or over what rounds to one token, falling from stage to stage as they must."""
        least = [(1 - 0.25 * index / len(plan.stages)) / self.num_image_tokens for index in range(len(plan.stages))]
        stages = (
            replace(stage, keep=max(stage.keep, share)) if stage.keep else stage
            for stage, share in zip(plan.stages, least, strict=True)
        )
        return replace(plan, stages=tuple(stages))
