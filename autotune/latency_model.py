"""A plan's latency before it is measured: costs added up over layers and stages, fitted to a few measured probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from scipy.stats import qmc, t

from autotune.costs import WorkCounts
from autotune.space import SearchSpace
from btp.cost import DecoderShape
from btp.plan import Plan

__all__ = ["CPU_TILES", "TILES", "FitError", "LatencyModel"]

TILES = (1, 16, 64, 128)  # tokens that a kernel may work on at once
CPU_TILES = (1, 16)
NOISES = (0.01, 0.03, 0.1)  # relative error of a probe, against which the prior weighs
SPREAD = {"constant": 0.3, "linear": 0.5, "quadratic": 0.3}  # how far a coefficient may be from the analytic one
SELECTION_SPREAD = 0.1
DENSE_WEIGHT = 10.0  # of the one point that is known: dense against dense
CLEARLY = 1.25  # times the squared error of the best tile: a smaller one that is not worse than that is taken
NUM_DESIGNS = 16  # sets of probes to choose from
CONFIDENCE = 0.95  # with which a solved plan shall be within its ratio

Vector = NDArray[np.float64]
Probe = tuple[Plan, float]


@dataclass(frozen=True, slots=True)
class FitError:
    """Relative errors of the model on probes that it was fitted, and its settings chosen, without.

    margin: what of a limit is left unspent so that 19 plans in 20 meet it: the errors' root mean square times
    Student's t for as many probes.
    """

    median: float
    worst: float
    margin: float


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Latency ratio to dense = sum of coefficients x `WorkCounts` of the plan, 1 for dense.

    Layers add up: each costs a constant, a share that is linear in its tokens and one that is quadratic, over counts
    rounded up to whole tiles. Every stage adds a cost, and selection one by selector, with the tokens kept and with
    tokens in times tokens kept, as greedy selection needs. No cost is negative.
    """

    counts: WorkCounts
    coefficients: Mapping[str, float]
    error: FitError

    @classmethod
    def from_flops(cls, decoder: DecoderShape, num_image_tokens: int, num_text_tokens: int) -> Self:
        """The ratio of multiply-accumulates instead of latency, selection free: exact, and without any probe."""
        counts = WorkCounts.of(decoder, num_image_tokens, num_text_tokens)
        return cls(counts=counts, coefficients=counts.analytic, error=FitError(0.0, 0.0, 0.0))

    @classmethod
    def fit(
        cls,
        probes: Sequence[Probe],
        decoder: DecoderShape,
        num_image_tokens: int,
        num_text_tokens: int,
        tiles: Sequence[int] = TILES,
    ) -> Self:
        """Non-negative least squares of the relative errors, drawn towards the analytic costs.

        probes: plans and their measured ratios; 10 to 20 will do. tiles: those that the device may have; on a CPU give
        `CPU_TILES`, so that noise is not taken for larger ones. The tile and how much the analytic costs weigh are
        those that predict left-out probes best; of tiles not clearly worse, the smallest. Raises ValueError for under
        3 probes.
        """
        if len(probes) < 3:
            raise ValueError(f"a fit needs at least 3 probes, got {len(probes)}; measure 10 to 20")
        counts = WorkCounts.of(decoder, num_image_tokens, num_text_tokens)
        tables = {tile: _Table.of(probes, replace(counts, tile=tile)) for tile in tiles}
        everything = np.arange(len(probes))
        left_out = np.array([_error_without(tables, everything, index) for index in range(len(probes))])
        tile, noise = _best_settings(tables, everything)
        error = FitError(
            median=float(np.median(np.abs(left_out))),
            worst=float(np.abs(left_out).max()),
            margin=float(np.sqrt(np.mean(left_out**2)) * t.ppf(CONFIDENCE, len(probes) - 1)),
        )
        found = tables[tile].solve(everything, noise)
        names = tables[tile].names
        coefficients = dict(zip(names, map(float, found), strict=True))
        return cls(counts=replace(counts, tile=tile), coefficients=coefficients, error=error)

    def ratio(self, plan: Plan) -> float:
        """The plan's modelled ratio to dense. A selector without a probe costs what every stage costs, and no more."""
        counts = self.counts(plan)
        return sum(self.coefficients[name] * count for name, count in counts.items() if name in self.coefficients)

    def solve(self, schedule: Callable[[float], Plan], ratio: float) -> Plan:
        """The plan of a family, ever shorter as its argument rises from 0, that keeps most within `ratio`.

        Within ratio / (1 + margin), by bisection on the argument in [0, 64], so that the plan meets the ratio in spite
        of the model's own error; the shortest plan where even that one is over. A stage that keeps any keeps at least
        one token.
        """
        low, high, target = 0.0, 64.0, ratio / (1 + self.error.margin)
        for _ in range(30):  # to within 1e-7 nats
            middle = (low + high) / 2
            low, high = (middle, high) if self.ratio(self._with_a_token(schedule(middle))) > target else (low, middle)
        return self._with_a_token(schedule(high))

    def probes(self, space: SearchSpace, ratios: Sequence[float], seed: int = 0) -> list[Plan]:
        """Plans of the space to measure, one for each of the ratios that this model takes them to run at.

        Their draws are a Latin hypercube, so that layers, shapes, numbers of stages and selectors all vary; of some
        such cubes the one that tells most of the coefficients (D-optimal). To begin with, take them from `from_flops`
        at ratios spread below 1; once these are measured, from the fit, at the limit, where it will be asked.
        """
        designs = [self._design(space, ratios, NUM_DESIGNS * seed + number) for number in range(NUM_DESIGNS)]
        return max(designs, key=lambda plans: _Table.of([(plan, 1.0) for plan in plans], self.counts).information())

    def _design(self, space: SearchSpace, ratios: Sequence[float], seed: int) -> list[Plan]:
        ranges = space.ranges
        cube = qmc.LatinHypercube(max(len(ranges), 1), rng=seed).random(len(ratios))
        plans = []
        for row, ratio in zip(cube, ratios, strict=True):
            draw = {name: setting.at(share) for (name, setting), share in zip(ranges.items(), row, strict=False)}
            plans.append(self.solve(space.schedule(draw, self.counts.num_layers), ratio))
        return plans

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "counts": asdict(self.counts),
            "coefficients": dict(self.coefficients),
            "error": asdict(self.error),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        return cls(
            counts=WorkCounts(**data["counts"]),
            coefficients=dict(data["coefficients"]),
            error=FitError(**data["error"]),
        )

    def _with_a_token(self, plan: Plan) -> Plan:
        """Keep fractions at or over what rounds to one token, falling from stage to stage as they must."""
        num_stages, num_image_tokens = len(plan.stages), self.counts.num_image_tokens
        if all(not stage.keep or stage.keep >= 1 / num_image_tokens for stage in plan.stages):
            return plan
        least = [(1 - 0.25 * index / num_stages) / num_image_tokens for index in range(num_stages)]
        stages = (
            replace(stage, keep=max(stage.keep, share)) if stage.keep else stage
            for stage, share in zip(plan.stages, least, strict=True)
        )
        return replace(plan, stages=tuple(stages))


@dataclass(frozen=True, eq=False)
class _Table:
    """Counts of the probes by one tile, a column a coefficient, and the ratios measured."""

    names: tuple[str, ...]
    work: NDArray[np.float64]
    ratios: Vector
    dense: Vector
    prior: Vector
    spread: Vector

    @classmethod
    def of(cls, probes: Sequence[Probe], counts: WorkCounts) -> Self:
        rows = [counts(plan) for plan, _ in probes]
        names = tuple(dict.fromkeys((*counts.analytic, "stage", *(name for row in rows for name in row))))
        dense = counts(Plan(stages=()))
        return cls(
            names=names,
            work=np.array([[row.get(name, 0.0) for name in names] for row in rows]),
            ratios=np.array([ratio for _, ratio in probes]),
            dense=np.array([dense.get(name, 0.0) for name in names]),
            prior=np.array([counts.analytic.get(name, 0.0) for name in names]),
            spread=np.array([SPREAD.get(name, SELECTION_SPREAD) for name in names]),
        )

    def solve(self, chosen: NDArray[np.int64], noise: float) -> Vector:
        """The coefficients by these probes."""
        ratios = self.ratios[chosen]
        work = self.work[chosen] / (noise * ratios)[:, None]
        matrix = np.vstack((work, DENSE_WEIGHT / noise * self.dense, np.diag(1 / self.spread)))
        target = np.concatenate((np.full(len(ratios), 1 / noise), [DENSE_WEIGHT / noise], self.prior / self.spread))
        found: Vector = nnls(matrix, target)[0]
        return found

    def information(self) -> float:
        """What the probes tell of the coefficients beyond the prior: the log determinant of Bayesian D-optimality."""
        scaled = self.work * self.spread / NOISES[0]
        return float(np.linalg.slogdet(np.eye(len(self.names)) + scaled.T @ scaled)[1])

    def error(self, fitted: Vector, index: int) -> float:
        """How much longer, relative to the prediction, the probe really ran."""
        return float(self.ratios[index] / (self.work[index] @ fitted) - 1)


def _best_settings(tables: Mapping[int, _Table], chosen: NDArray[np.int64]) -> tuple[int, float]:
    """The tile and the noise that predict each of these probes best from the others; a tile only where it is clear."""

    def squares(setting: tuple[int, float]) -> float:
        table, noise = tables[setting[0]], setting[1]
        return sum(table.error(table.solve(chosen[chosen != index], noise), index) ** 2 for index in chosen)

    best = [min((squares((tile, noise)), noise) for noise in NOISES) for tile in tables]
    clear = CLEARLY * min(found for found, _ in best)
    return next((tile, noise) for tile, (found, noise) in zip(tables, best, strict=True) if found <= clear)


def _error_without(tables: Mapping[int, _Table], everything: NDArray[np.int64], index: int) -> float:
    """The error on a probe that had no part in the fit, nor in choosing its settings."""
    others = everything[everything != index]
    tile, noise = _best_settings(tables, others)
    return tables[tile].error(tables[tile].solve(others, noise), index)
