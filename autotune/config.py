"""Settings of a tuning job and of a comparison, and the one error a user can mend."""

from __future__ import annotations

import errno
import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from btp.presets import SYSTEMS

__all__ = [
    "MIN_TRIALS",
    "NO_ROOM",
    "OPTUNA_PROXY",
    "STORAGE",
    "AutotuneError",
    "CompareConfig",
    "DrivenError",
    "JobConfig",
    "Limit",
    "RunConfig",
    "check_folder",
    "check_sqlite",
]

STORAGE = "AUTOTUNE_STORAGE"
"""The variable with the database's address: a command line, and a password in it, is for all to read."""
OPTUNA_PROXY = "AUTOTUNE_OPTUNA_PROXY"
"""The variable with HOST:PORT of Optuna's gRPC storage proxy, where workers are to share one."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
MIN_TRIALS = 6  # the five fixed plans of every study, and one draw


class AutotuneError(Exception):
    """What the user handed in breaks a rule; the text names the rule, what came and the way out."""


class DrivenError(AutotuneError):
    """Another process drives the study."""

    def __init__(self, study: str, driver: str) -> None:
        super().__init__(
            f"one process at a time may drive a study, but {driver} drives {study}; let it end, or join it with "
            f"autotune worker --study {study}"
        )
        self.study = study


def _begins(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def check_sqlite(path: Path) -> None:
    """Raise AutotuneError where something that is no SQLite database stands at `path`."""
    if path.exists() and not (path.is_file() and _begins(path) in (b"", b"SQLite format 3\0")):
        raise AutotuneError(
            f"{path} must be an SQLite database, or not be there yet; move it away or use another --out"
        )


def check_folder(path: Path) -> None:
    """Raise AutotuneError where `path` is no folder, nor can become one that can be written. Makes nothing."""
    if path.exists() and not path.is_dir():
        raise AutotuneError(f"--out must be a folder, or not be there yet, got the file {path}")
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise AutotuneError(f"--out must be a folder that can be written, got {path}, but {there} cannot be")


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
class RunConfig:
    """A model, its data and its device. data: None stands for the reference VLM's. seed: of every draw.

    answerers: processes that answer questions, one thread each. storage: address of the database; None for the one
    in `out`.
    """

    model: str
    data: Path | None
    out: Path
    seed: int = 0
    repeats: int = 12
    threads: int = 1
    answerers: int = 1
    fresh: bool = False
    device: str = "cpu"
    storage: str | None = None

    @property
    def database(self) -> str:
        """Address of the database."""
        return self.storage or f"sqlite:///{self.out / 'study.db'}"


_FOR_WORKERS = ("model", "name", "seed", "repeats", "threads", "device", "num_trials", "sampler", "guard")


@dataclass(frozen=True, kw_only=True, slots=True)
class JobConfig(RunConfig):
    """Everything a tuning job is started with; the same values resume the same study.

    sampler: in `autotune.samplers.SAMPLERS`. guard: the least retention of the worst task that a plan may have; None
    for any. margin: how much macro accuracy below dense a plan may be and still be certified. num_finalists: plans that
    are certified. plans: files with plans to try beside the published ones. learn: try one that is learned by gradient.
    promote: whether a certified plan becomes its device's champion; who: does that, for the log.
    """

    limit: Limit
    name: str
    num_trials: int = 40
    space: Path
    sampler: str = "gp"
    guard: float | None = None
    margin: float = 0.02
    num_finalists: int = 4
    plans: tuple[Path, ...] = ()
    learn: bool = False
    tracking_uri: str | None = None
    promote: bool = True
    who: str = ""

    def to_dict(self) -> dict[str, Any]:
        """All that a worker has to know to try trials, as plain data; the search space as it stands in its file."""
        kept = {name: getattr(self, name) for name in _FOR_WORKERS}
        return {
            **kept,
            "model": str(Path(self.model).resolve()) if Path(self.model).is_dir() else self.model,
            "data": None if self.data is None else str(self.data.resolve()),
            "limit": str(self.limit),
            "space": self.space.read_text(encoding="utf-8"),
        }

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], folder: Path, storage: str) -> Self:
        """As `to_dict` wrote it. folder: where the search space is written to, and what else a worker writes."""
        space = folder / "space.yaml"
        space.write_text(kept["space"], encoding="utf-8")
        return cls(
            **{name: kept[name] for name in _FOR_WORKERS},
            data=None if kept["data"] is None else Path(kept["data"]),
            limit=Limit.parse(kept["limit"]),
            space=space,
            out=folder,
            storage=storage,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig(RunConfig):
    """Everything a comparison is started with; the same values resume it.

    fractions: budgets, each the image-token FLOPs of that share of the image tokens in every layer. systems: names in
    `btp.presets.SYSTEMS`. split: whose questions are answered.
    """

    fractions: tuple[float, ...]
    systems: tuple[str, ...]
    split: str = "select"

    @staticmethod
    def parse_fractions(text: str) -> tuple[float, ...]:
        """The budgets in "0.33,0.22": different numbers in (0, 1]. Raises AutotuneError."""
        try:
            found = tuple(float(word) for word in text.split(","))
        except ValueError:
            found = ()
        if not found or not all(0 < fraction <= 1 for fraction in found) or len(set(found)) < len(found):
            raise AutotuneError(
                f"--tokens must be different fractions in (0, 1], separated by commas, got {text!r}; try 0.33,0.22,0.11"
            )
        return found

    @staticmethod
    def parse_systems(text: str) -> tuple[str, ...]:
        """The names in "fastv,dart", in the order of `SYSTEMS`; all of them for an empty text. Raises AutotuneError."""
        words = {word.strip() for word in text.split(",")} if text else set(SYSTEMS)
        if unknown := sorted(words - set(SYSTEMS)):
            raise AutotuneError(f"--systems must be some of {', '.join(SYSTEMS)}, got {', '.join(map(repr, unknown))}")
        return tuple(name for name in SYSTEMS if name in words)

    @property
    def command(self) -> str:
        """The command line that starts it."""
        words = ["autotune", "compare"]
        if self.data is not None:
            words += ["--model", self.model, "--data", str(self.data)]
        words += ["--tokens", ",".join(f"{fraction:g}" for fraction in self.fractions)]
        if self.systems != tuple(SYSTEMS):
            words += ["--systems", ",".join(self.systems)]
        options = {"out": self.out, "split": self.split, "seed": self.seed, "repeats": self.repeats}
        options |= {"threads": self.threads, "workers": self.answerers, "device": self.device}
        return shlex.join([*words, *(word for name, value in options.items() for word in (f"--{name}", str(value)))])
