"""What a job that is handed in may ask for, and where its files may lie: checked by who takes it and by who runs it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from autotune.config import MIN_TRIALS, AutotuneError

__all__ = ["REFERENCE", "REGISTRY", "JobSettings", "Place", "Roots", "Whole"]

REFERENCE = "reference-vlm"
REGISTRY = "MLFLOW_TRACKING_URI"
_ABOVE_ZERO = r"(0?\.[0-9]{0,6}[1-9][0-9]{0,6}|[1-9][0-9]{0,5}(\.[0-9]{1,6})?)"
_SHARE = r"(0?\.[0-9]{0,6}[1-9][0-9]{0,6}|1(\.0{1,6})?)"
_LIMIT = rf"(prefill|ttft)_(p50|p95)<={_ABOVE_ZERO}(x|ms)"
_GUARD = rf"worst_task>={_SHARE}"
_RELATIVE = "relative to the folder that the service was started with"


def _whole(value: object) -> object:
    """To JSON, 2.0 is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _as(rule: str, pattern: str) -> Callable[[str], str]:
    """A check that says in words what the schema says by a pattern."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(rule)
        return text

    return check


def _schema(pattern: str) -> dict[str, Any]:
    return {"pattern": f"^{pattern}$"}


Whole = Annotated[int, BeforeValidator(_whole)]
Text = Annotated[str, Field(min_length=1, max_length=255)]


Limit = Annotated[
    str,
    AfterValidator(_as("a limit reads as prefill_p50<=0.7x or ttft_p95<=40ms do, with a number above 0", _LIMIT)),
    Field(json_schema_extra=_schema(_LIMIT)),
]
Guard = Annotated[
    str,
    AfterValidator(_as("a guard reads as worst_task>=0.95 does, with a share in (0, 1]", _GUARD)),
    Field(json_schema_extra=_schema(_GUARD)),
]


class JobSettings(BaseModel):
    """Settings of a tuning job, as those of `autotune tune`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: Text = Field(REFERENCE, description=f"The built-in {REFERENCE}, or a model's folder, {_RELATIVE}.")
    data: Text | None = Field(None, description=f"Questions, {_RELATIVE}; none for the built-in model.")
    limit: Limit = Field(description="Latency to stay within.", examples=["prefill_p50<=0.7x"])
    trials: Whole = Field(40, ge=MIN_TRIALS, le=2000, description="Finished trials to reach.")
    seed: Whole = Field(0, ge=0, lt=2**31)
    repeats: Whole = Field(12, ge=4, le=200, description="Pairs of a latency measurement.")
    sampler: Literal["gp", "tpe", "nsga2", "qmc", "random"] = "gp"
    guard: Guard | None = Field(
        None,
        description="Least share of its dense accuracy that a task must keep.",
        examples=["worst_task>=0.95"],
    )
    margin: float = Field(0.02, gt=0, le=0.1, description="Macro accuracy below dense that a certified plan may be.")
    finalists: Whole = Field(4, ge=1, le=8, description="Plans to certify, best first.")
    learn: bool = Field(False, description="Try a plan learned by gradient too.")
    workers: Whole = Field(1, ge=1, le=16, description="Processes that try trials.")
    name: str | None = Field(
        None,
        pattern="^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Of the registered model; the model's own where it is left out.",
    )
    device: str = Field("cpu", pattern="^(cpu|cuda(:[0-9]{1,2})?)$", description="Of the worker's host.")

    @model_validator(mode="after")
    def _check_pair(self) -> JobSettings:
        if (self.model == REFERENCE) != (self.data is None):
            raise ValueError(f"data must be left out for {REFERENCE}, and be given for any other model")
        return self


@dataclass(frozen=True, kw_only=True, slots=True)
class Roots:
    """The only folders that a job's model and data may lie in; None where no job brings its own."""

    models: Path | None = None
    data: Path | None = None

    def check(self, settings: JobSettings) -> None:
        """Raise AutotuneError unless what the settings name is there."""
        self.files(settings)

    def files(self, settings: JobSettings) -> tuple[Path, Path] | None:
        """Model and data, symbolic links followed; None for the built-in model. Raises AutotuneError."""
        if settings.model == REFERENCE or settings.data is None:
            return None
        model, data = _inside(self.models, "model", settings.model), _inside(self.data, "data", settings.data)
        if not model.is_dir():
            raise AutotuneError(f"model must be a folder, got the file {settings.model!r}; name the folder it is in")
        return model, data


def _inside(root: Path | None, what: str, text: str) -> Path:
    """What lies under a root; to name what lies elsewhere says nothing of whether it is there."""
    rule = AutotuneError(
        f"{what} must be a relative path of what lies in the service's folder for it, got {text!r}; have it put there, "
        "or name another"
    )
    if root is None:
        raise AutotuneError(f"{what} must be left out, for this service has no folder for it, got {text!r}")
    try:
        top = root.resolve(strict=True)
        found = (top / text).resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # not there; links in a circle; a NUL in it
        raise rule from None
    if Path(text).is_absolute() or found == top or not found.is_relative_to(top):
        raise rule
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where jobs run, and what they write to. home: a folder.

    registry: MLflow's address, perhaps with a password; empty where there is none, for who only looks.
    """

    home: Path
    registry: str
    roots: Roots = Roots()

    def environment(self) -> Mapping[str, str]:
        """What whoever runs a job is told beside the command line, which anybody on its host can read."""
        return {REGISTRY: self.registry}

    def arguments(self, settings: JobSettings, job: str, promoter: str | None) -> Sequence[str]:
        """What follows `autotune` on the command line that runs a job. Raises AutotuneError as `Roots.files`.

        promoter: who stands in the log for what the job promotes; None where it may promote nothing.
        """
        files = self.roots.files(settings)
        options = settings.model_dump(exclude={"model", "data", "learn"}, exclude_none=True)
        options |= {"out": self.home.absolute() / "jobs" / job, "progress": "jsonl"}
        if files is not None:
            options |= {"model": files[0], "data": files[1]}
        if promoter is not None:
            options |= {"who": promoter}
        words = [f"--{name}={value}" for name, value in options.items()]
        flags = ["--until-stdin-closes", "--no-promote" if promoter is None else "--promote"]
        flags += ["--learn"] if settings.learn else []
        return ["demo" if files is None else "tune", *words, *flags]
