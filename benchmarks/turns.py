"""The ways of one case, timed in turn."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Bench", "Row", "Run", "Size"]

MIN_REPEATS = 3
Run = Callable[[], object]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Size:
    """side: of a view, in tokens; views: of the larger prompt; hidden, heads: of the decoder."""

    side: int
    views: int
    hidden: int
    heads: int
    batches: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Repeats a case until it has `repeats` or `seconds` are over, but at least three times."""

    size: Size
    device: str
    repeats: int
    seconds: float

    def times(self, runs: Mapping[str, Run]) -> dict[str, Row]:
        """Milliseconds of each, in turn, after a round that is not counted."""
        found: dict[str, list[float]] = {name: [] for name in runs}
        start = time.perf_counter()
        for repeat in range(-1, self.repeats):
            if repeat >= MIN_REPEATS and time.perf_counter() - start > self.seconds:
                break
            for name, run in runs.items():
                elapsed_ms = self._once(run)
                if repeat >= 0:
                    found[name].append(elapsed_ms)
        return {name: _summary(values) for name, values in found.items()}

    def _once(self, run: Run) -> float:
        self._wait()
        start = time.perf_counter()
        run()
        self._wait()
        return (time.perf_counter() - start) * 1000

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def random(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(self.device, dtype)


def _summary(values_ms: Sequence[float]) -> Row:
    ordered = torch.tensor(values_ms, dtype=torch.float64)
    p50_ms, p95_ms = ordered.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {"p50_ms": p50_ms, "p95_ms": p95_ms, "repeats": len(values_ms)}
