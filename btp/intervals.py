"""How sure a measured latency is: quantiles, block bootstrap intervals, and a slope that outliers do not bend.

Shapes: N runs in the order they were made, R resamples, S stretches drawn for each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

from btp.errors import PlanError

__all__ = ["Interval", "percentile", "ratio_interval", "repetition_interval", "theil_sen_slope"]

NUM_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its percentile bootstrap interval."""

    value: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        """ "value [low, high]", each number by the format; the whole as it is for none."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]" if spec else str(self)

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def theil_sen_slope(values: Sequence[float]) -> float:
    """Median slope over all pairs of points, a step apart each (Theil 1950; Sen 1968); 0 for fewer than two."""
    slopes = [(values[j] - values[i]) / (j - i) for i, j in combinations(range(len(values)), 2)]
    return median(slopes) if slopes else 0.0


def ratio_interval(
    dense_ms: Sequence[float], pruned_ms: Sequence[float], quantile: float = 0.5, confidence: float = 0.95
) -> Interval:
    """Ratio of a quantile of the pruned latencies to that of the dense ones, and where the device's own ratio lies.

    dense_ms, pruned_ms: equally many, paired, in the order they were measured. Stretches of `stretch_length(N)`
    consecutive pairs are resampled, around the end to the beginning, so that what slows a device for a while slows a
    whole stretch (circular block bootstrap, Politis & Romano 1992). Deterministic. Raises PlanError for no pairs,
    unequal numbers, or a quantile or confidence outside (0, 1).
    """
    value, resampled_R = _resampled(dense_ms, pruned_ms, quantile, confidence, seed=0)
    return _interval(value, resampled_R, confidence)


def repetition_interval(
    dense_ms: Sequence[float], pruned_ms: Sequence[float], quantile: float = 0.5, confidence: float = 0.95
) -> Interval:
    """The same ratio, and where that of another measurement like this one lies.

    Wider than `ratio_interval`, for the other measurement errs as much as this one: the value plus the difference of
    two independent resamples. A 95 % interval of the device's own ratio holds another measurement's only 83 % of the
    time where errors are normal, 1.96 / sqrt(2) standard deviations. Raises as `ratio_interval`.
    """
    value, first_R = _resampled(dense_ms, pruned_ms, quantile, confidence, seed=0)
    _, second_R = _resampled(dense_ms, pruned_ms, quantile, confidence, seed=1)
    return _interval(value, value + first_R - second_R, confidence)


def stretch_length(num_pairs: int) -> int:
    """Consecutive pairs that are resampled together: the cube root of their number, the usual rate, rounded up."""
    return math.ceil(round(math.cbrt(num_pairs), 9))


def _resampled(
    dense_ms: Sequence[float], pruned_ms: Sequence[float], quantile: float, confidence: float, seed: int
) -> tuple[float, Tensor]:
    """The ratio, and the ratio of every resample. (R)"""
    if not dense_ms or len(dense_ms) != len(pruned_ms):
        raise PlanError(
            f"dense and pruned runs must come in pairs, at least one, got {len(dense_ms)} and {len(pruned_ms)}; "
            "give each pruned run its dense one"
        )
    if not 0 < quantile < 1 or not 0 < confidence < 1:
        raise PlanError(f"quantile and confidence must be in (0, 1), got {quantile} and {confidence}; 95 % is 0.95")
    num_pairs = len(dense_ms)
    dense_N = torch.tensor(dense_ms, dtype=torch.float64, device="cpu")
    pruned_N = torch.tensor(pruned_ms, dtype=torch.float64, device="cpu")
    generator = torch.Generator("cpu").manual_seed(seed)
    length = stretch_length(num_pairs)
    shape = (NUM_RESAMPLES, math.ceil(num_pairs / length), 1)
    start_RS1 = torch.randint(num_pairs, shape, generator=generator, device="cpu")
    place_RN = ((start_RS1 + torch.arange(length, device="cpu")) % num_pairs).flatten(1)[:, :num_pairs]
    resampled_R = pruned_N[place_RN].quantile(quantile, dim=1) / dense_N[place_RN].quantile(quantile, dim=1)
    return float(pruned_N.quantile(quantile) / dense_N.quantile(quantile)), resampled_R


def _interval(value: float, resampled_R: Tensor, confidence: float) -> Interval:
    tails = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=torch.float64, device="cpu")
    low, high = resampled_R.quantile(tails).tolist()
    return Interval(value, low, high)
