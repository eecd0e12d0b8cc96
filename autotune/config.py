"""Settings of a tuning job, and the one error a user can mend."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["MIN_TRIALS", "AutotuneError", "JobConfig", "Limit", "check_sqlite"]

MIN_TRIALS = 6  # the five fixed plans of every study, and one draw


class AutotuneError(Exception):
    """What the user handed in breaks a rule; the text names the rule, what came and the way out."""


def check_sqlite(path: Path) -> None:
    """Raise AutotuneError where something that is no SQLite database stands at `path`."""
    if path.exists() and not (path.is_file() and path.read_bytes()[:16] in (b"", b"SQLite format 3\0")):
        raise AutotuneError(
            f"{path} must be an SQLite database, or not be there yet; move it away or use another --out"
        )


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on a measured latency: `prefill_p50<=0.7x` (of dense) or `ttft_p95<=50ms` (absolute).

    `prefill` is the language model on a prompt with its image tokens, selection included; `ttft` adds the vision
    encoder.
    """

    metric: Literal["prefill", "ttft"]
    quantile: Literal["p50", "p95"]
    bound: float
    unit: Literal["x", "ms"]

    @classmethod
    def parse(cls, text: str) -> Limit:
        found = re.fullmatch(r"(prefill|ttft)_(p50|p95)<=(\d+(?:\.\d+)?|\.\d+)(x|ms)", text.replace(" ", ""))
        if found is None or float(found[3]) <= 0:
            raise AutotuneError(
                f"a limit reads (prefill|ttft)_(p50|p95)<=(number)(x|ms) with a number above 0, got {text!r}; "
                'try --limit "prefill_p50<=0.7x"'
            )
        return cls(found[1], found[2], float(found[3]), found[4])  # type: ignore[arg-type]

    def ratio(self, dense_ms: float) -> float:
        """The bound as a ratio to dense, which took `dense_ms` at this metric and quantile."""
        return self.bound if self.unit == "x" else self.bound / dense_ms

    @property
    def share(self) -> float:
        """The quantile as a share: 0.5 or 0.95."""
        return 0.5 if self.quantile == "p50" else 0.95

    def __str__(self) -> str:
        return f"{self.metric}_{self.quantile}<={self.bound:g}{self.unit}"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig:
    """Everything a tuning job is started with; the same values resume the same study."""

    model: str
    data: Path | None
    limit: Limit
    out: Path
    name: str
    num_trials: int = 40
    seed: int = 0
    space: Path
    repeats: int = 12
    threads: int = 1
    workers: int = 1
    fresh: bool = False
    tracking_uri: str | None = None
    device: str = "cpu"
