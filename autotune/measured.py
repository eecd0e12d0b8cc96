"""A latency as it was measured, run by run, and how it is measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from autotune.config import AutotuneError, JobConfig, Limit
from btp.intervals import Interval, ratio_interval
from btp.sealed import sha256_of

__all__ = ["Measured", "measure_fresh"]

Runs = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A plan's latency on a device, at the metric and quantile of a limit.

    ratio: to dense, paired, which took dense_ms. ms: the plan's own milliseconds, 95 %. blocks: milliseconds of dense
    and of the plan, pair by pair, in the order they were measured. device: its key.
    """

    limit: str
    ratio: Interval
    ms: Interval
    dense_ms: float
    blocks: tuple[Runs, ...]
    device: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        limit: Limit,
        ratio: Interval,
        dense_ms: float,
        blocks: Sequence[tuple[Sequence[float], Sequence[float]]],
        device: Mapping[str, Any],
    ) -> Self:
        runs = [run for _, pruned in blocks for run in pruned]
        return cls(
            limit=str(limit),
            ratio=ratio,
            ms=ratio_interval([1.0] * len(runs), runs, limit.share),  # of one millisecond each
            dense_ms=dense_ms,
            blocks=tuple((tuple(dense), tuple(pruned)) for dense, pruned in blocks),
            device=device,
        )

    @property
    def limit_ratio(self) -> float:
        """The limit as a ratio to how fast dense was beside it."""
        return Limit.parse(self.limit).ratio(self.dense_ms)

    @property
    def met(self) -> bool:
        return self.ratio.value <= self.limit_ratio

    def summary(self) -> dict[str, Any]:
        """Plain data without the runs, as it stands in a profile's evidence under "latency"."""
        limit = Limit.parse(self.limit)
        device = {"device_key": sha256_of(dict(self.device))}
        figures = {**device, "ratio": asdict(self.ratio), "ms": asdict(self.ms), "dense_ms": self.dense_ms}
        return {"metric": limit.metric, "quantile": limit.quantile, **figures}

    def to_dict(self) -> dict[str, Any]:
        blocks = [{"dense_ms": list(dense), "pruned_ms": list(pruned)} for dense, pruned in self.blocks]
        return {"limit": self.limit, "met": self.met, **self.summary(), "device": dict(self.device), "blocks": blocks}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Self:
        return cls(
            limit=kept["limit"],
            ratio=Interval(**kept["ratio"]),
            ms=Interval(**kept["ms"]),
            dense_ms=kept["dense_ms"],
            blocks=tuple((tuple(block["dense_ms"]), tuple(block["pruned_ms"])) for block in kept["blocks"]),
            device=kept["device"],
        )


def measure_fresh(config: JobConfig, path: Path) -> Measured:
    """The latency of the profile or plan in a file, in a process of its own, by the command a user would type."""
    command = [sys.executable, "-m", "autotune.cli", "measure", str(path), "--model", config.model, "--json"]
    command += ["--limit", str(config.limit), "--repeats", str(3 * config.repeats)]
    command += ["--threads", str(config.threads), "--device", config.device]
    if config.data is not None:
        command += ["--data", str(config.data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if not done.stdout:
        raise AutotuneError(f"measuring {path} in a fresh process must succeed, got: {done.stderr.strip()}")
    return Measured.from_dict(json.loads(done.stdout))
