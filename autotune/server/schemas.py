"""What the service answers with, as the OpenAPI declares it; times are in seconds since 1970."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Path
from pydantic import BaseModel, ConfigDict, Field

from autotune.registered import ALIAS
from autotune.submitted import REFERENCE, Whole

__all__ = [
    "AliasPath",
    "Health",
    "JobId",
    "JobPage",
    "JobView",
    "ModelPath",
    "PlanView",
    "ProfileView",
    "PromotionPage",
    "PromotionRequest",
    "PromotionView",
    "RollbackRequest",
    "StudyDetail",
    "StudyFront",
    "StudyPage",
    "StudyPath",
    "StudyView",
    "VersionPage",
    "VersionPath",
    "VersionView",
]

MODEL_NAME = r"^[^\x00-\x20\x7f-\x9f/:@%?#]{1,250}$"
STUDY_NAME = r"^[^\x00-\x1f\x7f-\x9f/]{1,250}$"
LARGEST = 2**31 - 1

JobId = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="Of a job.")]
StudyPath = Annotated[str, Path(pattern=STUDY_NAME, description="Of a study.")]
ModelPath = Annotated[str, Path(pattern=MODEL_NAME, examples=[REFERENCE], description="Of a registered model.")]
AliasPath = Annotated[str, Path(pattern=ALIAS, description="An alias of the model, such as champion-nvidia-h200.")]
VersionPath = Annotated[int, Path(ge=1, le=LARGEST, description="A version of the model.")]


class View(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class JobView(View):
    """A job. reason: why it failed. study: its name, once it has begun."""

    id: str
    by: str = Field(description="Name of the key it was handed in with.")
    settings: dict[str, Any]
    state: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    cancel_requested: bool
    attempt: int
    study: str | None
    outcome: dict[str, Any] | None
    reason: str | None
    created: float
    started: float | None
    finished: float | None


class JobPage(BaseModel):
    """Newest first. next: the `after` of the next page; null where this is the last."""

    jobs: list[JobView]
    next: str | None


class StudyView(BaseModel):
    """A study. num_told: trials that have finished, of `target`."""

    name: str
    limit: str | None
    sampler: str | None
    seed: int | None
    guard: float | None
    device: str | None
    num_told: int
    target: int
    is_open: bool
    created: float


class StudyDetail(StudyView):
    """num_complete: trials scored on all samples. best: the highest score of those that are feasible."""

    num_complete: int
    num_feasible: int
    best: float | None


class StudyPage(BaseModel):
    """By name. next: the `after` of the next page; null where this is the last."""

    studies: list[StudyView]
    next: str | None


class PlanView(BaseModel):
    """A trial on the front. proxy: KL divergence to dense, nats a token. Ratios are latency to dense's."""

    number: int
    name: str
    plan: dict[str, Any]
    score: float | None
    proxy: float | None
    worst_task: float | None
    by_task: dict[str, float | None]
    ratio: float | None
    ratio_low: float | None
    ratio_high: float | None


class StudyFront(BaseModel):
    """What no other trial beats in both accuracy and latency, fastest first."""

    study: str
    front: list[PlanView]


class VersionView(View):
    """A registered profile, by what is told of it. sha256: of the profile."""

    name: str
    version: int
    aliases: list[str]
    run_id: str
    sha256: str
    uri: str
    certified: bool
    reasons: str
    device: str
    device_name: str
    dtype: str
    limit: str
    retention: float | None
    worst_task_retention: float | None
    ratio: float | None
    ratio_high: float | None
    latency_ms: float | None
    latency_high_ms: float | None
    created: float
    study: str
    data_digest: str
    code_version: str


class ProfileView(VersionView):
    """With the profile itself, as it is applied."""

    profile: dict[str, Any]


class VersionPage(BaseModel):
    """Newest first."""

    versions: list[VersionView]


class Request(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    why: str = Field(min_length=1, max_length=2000, pattern=r"^[^\s\x00-\x1f][^\x00]*$", description="For the log.")


class PromotionRequest(Request):
    """alias: where it is left out, the champion's of the device that the version was measured on."""

    version: Whole = Field(ge=1, le=LARGEST)
    alias: str | None = Field(None, pattern=ALIAS)


class RollbackRequest(Request):
    alias: str = Field(pattern=ALIAS)


class PromotionView(View):
    """A row of the log. before, after: versions. applied: whether the alias was seen to follow."""

    id: int
    name: str
    alias: str
    kind: str
    before: int | None
    after: int
    who: str = Field(description="Name of the key.")
    why: str
    at: float
    applied: bool


class PromotionPage(BaseModel):
    """Newest first."""

    promotions: list[PromotionView]
