"""Profiles over HTTP: which there are, which is best under a limit, what an alias names, and promotions."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from autotune.registered import ALIAS, Version
from autotune.server.auth import Promoter, Reader
from autotune.server.problems import declared
from autotune.server.schemas import (
    MODEL_NAME,
    AliasPath,
    ModelPath,
    ProfileView,
    PromotionPage,
    PromotionRequest,
    PromotionView,
    RollbackRequest,
    VersionPage,
    VersionPath,
    VersionView,
)
from autotune.server.service import Service, ServiceParameter

__all__ = ["router"]

router = APIRouter(prefix="/v1/profiles", tags=["profiles"])

Name = Annotated[str | None, Query(pattern=MODEL_NAME, description="Of a registered model; default: of all.")]


@router.get("", operation_id="listProfiles", responses=declared(404, 422))
def versions(key: Reader, service: ServiceParameter, name: Name = None) -> VersionPage:
    """List registered profiles, newest first."""
    return VersionPage(versions=[VersionView.model_validate(version) for version in service.profiles.list(name)])


@router.get("/best", operation_id="getBestProfile", responses=declared(404, 422))
def best(
    key: Reader,
    service: ServiceParameter,
    max_latency_ms: Annotated[float, Query(gt=0, le=1e9, description="By the upper bound of the latency.")],
    device: Annotated[str, Query(max_length=250, description="A part of the device's name.")] = "",
    name: Name = None,
) -> VersionView:
    """The certified profile that keeps most accuracy within a latency, the median of a prefill's."""
    found = service.profiles.best(max_latency_ms=max_latency_ms, device=device, name=name)
    return VersionView.model_validate(found)


@router.get("/{name}/aliases/{alias}", operation_id="getProfileByAlias", responses=declared(404, 422))
def by_alias(name: ModelPath, alias: AliasPath, key: Reader, service: ServiceParameter) -> ProfileView:
    """The profile that an alias names now."""
    return _view(service, service.profiles.find(f"models:/{name}@{alias}"))


@router.get("/{name}/versions/{version}", operation_id="getProfile", responses=declared(404, 422))
def by_version(name: ModelPath, version: VersionPath, key: Reader, service: ServiceParameter) -> ProfileView:
    """A profile, which never changes."""
    return _view(service, service.profiles.find(f"models:/{name}/{version}"))


@router.get("/{name}/promotions", operation_id="listPromotions", responses=declared(404, 422))
def promotions(
    name: ModelPath,
    key: Reader,
    service: ServiceParameter,
    alias: Annotated[str | None, Query(pattern=ALIAS)] = None,
) -> PromotionPage:
    """The log: who moved which alias, from where to where, and why; newest first."""
    return PromotionPage(promotions=[PromotionView.model_validate(row) for row in service.profiles.log(name, alias)])


@router.post(
    "/{name}/promotions",
    status_code=201,
    operation_id="promoteProfile",
    responses=declared(400, 404, 409, 413, 415, 422),
)
def promote(name: ModelPath, asked: PromotionRequest, key: Promoter, service: ServiceParameter) -> PromotionView:
    """Have an alias name a version, if every gate lets it."""
    version = service.profiles.find(f"models:/{name}/{asked.version}")
    row = service.profiles.promote(version, who=key.name, why=asked.why, alias=asked.alias)
    return PromotionView.model_validate(row)


@router.post(
    "/{name}/rollbacks",
    status_code=201,
    operation_id="rollBackProfile",
    responses=declared(400, 404, 409, 413, 415, 422),
)
def roll_back(name: ModelPath, asked: RollbackRequest, key: Promoter, service: ServiceParameter) -> PromotionView:
    """Have an alias name the version that it named before, which is a promotion as any other."""
    return PromotionView.model_validate(service.profiles.rollback(name, asked.alias, who=key.name, why=asked.why))


def _view(service: Service, version: Version) -> ProfileView:
    told = VersionView.model_validate(version).model_dump()
    return ProfileView(**told, profile=service.profiles.profile(version).to_dict())
