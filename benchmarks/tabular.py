"""The recorded plans of the grid: what a trial of each comes to, on all samples or on the first of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from autotune.objective import Told
from autotune.racing import looks
from autotune.ranges import Draw
from benchmarks.grid import GRID, LIMIT, Grid
from btp.plan import Plan

__all__ = ["TABLE", "Table", "hypervolume"]

TABLE = Path(__file__).parent / "tables" / "reference-vlm.npz"


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Plans by number, 0 being dense, scored on samples in racing order.

    cells: the number of every cell's plan, in the order of `GRID.cells`. first: the numbers of what a job tries before
    it draws, in its order; some are no cell's. ratios: multiply-accumulates to dense's. tasks: of the samples. data:
    digest of the samples. device: where they were scored. scores, kl, nll: (plans, samples); scores in [0, 1],
    KL(dense || pruned) and negative log-likelihood in nats a token.
    """

    plans: tuple[Plan, ...]
    cells: NDArray[np.int64]
    first: tuple[int, ...]
    ratios: NDArray[np.float64]
    tasks: tuple[str, ...]
    data: str
    device: str
    scores: NDArray[np.float64]
    kl: NDArray[np.float64]
    nll: NDArray[np.float64]

    @classmethod
    def load(cls, path: Path = TABLE) -> Self:
        with np.load(path) as found:
            return cls(
                plans=tuple(Plan.from_dict(json.loads(text)) for text in found["plans"].tolist()),
                cells=found["cells"].astype(np.int64),
                first=tuple(found["first"].tolist()),
                ratios=found["ratios"],
                tasks=tuple(found["tasks"].tolist()),
                data=str(found["data"]),
                device=str(found["device"]),
                **{name: found[name].astype(np.float64) for name in ("scores", "kl", "nll")},
            )

    @property
    def looks(self) -> tuple[int, ...]:
        return looks(len(self.tasks))

    @cached_property
    def places(self) -> dict[Plan, int]:
        """The numbers by plan."""
        return {plan: number for number, plan in enumerate(self.plans)}

    def number(self, cell: Draw) -> int:
        """Which plan the cell stands for."""
        return int(self.cells[GRID.index(cell)])

    def numbers(self, grid: Grid) -> list[int]:
        """The plans of a grid's cells, each once."""
        return sorted({self.number(cell) for cell in grid.cells()})

    def told(self, number: int, num_samples: int | None = None) -> Told:
        """What a trial of the plan is told with after so many samples; after all of them without a number."""
        num_samples = num_samples or len(self.tasks)
        by_task, dense = (self._by_task(plan, num_samples) for plan in (number, 0))
        ratio = float(self.ratios[number])
        return Told(
            number=0,
            name="",
            plan=self.plans[number],
            num_samples=num_samples,
            score=float(np.mean(list(by_task.values()))),
            proxy=float(self.kl[number, :num_samples].mean()),
            nll=float(self.nll[number, :num_samples].mean()),
            by_task=by_task,
            worst_task=min(by_task[task] / dense[task] for task in by_task if dense[task]),
            ratio=ratio,
            ratio_low=ratio,
            ratio_high=ratio,
            measured=num_samples > self.looks[0],
            limit=LIMIT,
            complete=num_samples == len(self.tasks),
        )

    def _by_task(self, number: int, num_samples: int) -> dict[str, float]:
        values = self.scores[number, :num_samples]
        return {task: float(values[where[:num_samples]].mean()) for task, where in self._of_task.items()}

    @cached_property
    def _of_task(self) -> dict[str, NDArray[np.bool_]]:
        return {task: np.array([t == task for t in self.tasks]) for task in sorted(set(self.tasks))}


def hypervolume(front: Iterable[Told], reference: tuple[float, float]) -> float:
    """Area between the front and a reference point (score, ratio): of the points that a member beats in both.

    Members, fastest first and each better than the one before, reach from their ratio to the next one's.
    """
    least, most = reference
    members = [(t.ratio, t.score) for t in front if t.ratio < most and t.score > least]
    edges = [*(ratio for ratio, _ in members), most]
    return sum((end - ratio) * (score - least) for (ratio, score), end in zip(members, edges[1:], strict=True))
