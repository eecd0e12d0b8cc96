"""What a version and its name can be searched by: tags, out of what a profile says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autotune.registered import CERTIFIED, IDENTITY, REASONS, TEXT, WORKLOAD
from btp.profile import ModelIdentity, Profile, Workload
from btp.sealed import canonical_json, sha256_of

__all__ = ["home_tags", "identity_of", "part_of", "profile_tags"]

MAX_TAG = 5000  # characters


def profile_tags(profile: Profile) -> dict[str, str]:
    """What a version can be searched by, as far as the profile tells it; its certificate, a tag for each thing.

    Reasons that would be too long are cut, and say so.
    """
    reasons, cut = "; ".join(profile.uncertified_because), " ... (more in the profile)"
    if len(reasons) > MAX_TAG:
        reasons = reasons[: MAX_TAG - len(cut)] + cut
    tags = {CERTIFIED: "true" if profile.certified else "false", **({REASONS: reasons} if reasons else {})}
    certificate = part_of(profile.evidence, "certificate")
    flat = {f"certificate.{key}": canonical_json(certificate[key]) for key in certificate if key not in tags}
    found = {**_texts(profile), **{key: f"{value:.4f}" for key, value in _numbers(profile).items()}}
    return {**tags, **{key: text for key, text in {**flat, **found}.items() if text and len(text) <= MAX_TAG}}


def _texts(profile: Profile) -> dict[str, str]:
    told = {name: str(profile.evidence.get(name, "")) for name in ("study", "limit", "code_version")}
    data = profile.evidence.get("data")
    device = {"device": profile.device.slug, "device_name": profile.device.name, "dtype": profile.device.dtype}
    measured = part_of(profile.evidence, "latency")
    how = {name: str(measured.get(name, "")) for name in ("metric", "quantile")}
    return {**told, **device, **how, "plan": profile.plan.digest, "data_digest": sha256_of(data) if data else ""}


def _numbers(profile: Profile) -> dict[str, float]:
    """Latency as measured in a process of its own, or else as the certificate has it."""
    latency = part_of(profile.evidence, "latency")
    ratio = part_of(latency, "ratio") or part_of(part_of(profile.evidence, "certificate"), "latency")
    measured = part_of(latency, "ms")
    dense, tuned = (_row(profile, name) for name in ("dense", "tuned"))
    by_task = part_of(dense, "by_task")
    kept = [_share(value, by_task.get(task)) for task, value in part_of(tuned, "by_task").items()]
    found = {
        "retention": _share(part_of(tuned, "macro").get("value"), part_of(dense, "macro").get("value")),
        "worst_task_retention": min((each for each in kept if each is not None), default=None),
        "ratio": ratio.get("value"),
        "ratio_high": ratio.get("high"),
        "latency_ms": measured.get("value"),
        "latency_high_ms": measured.get("high"),
    }
    return {key: value for key, value in found.items() if isinstance(value, int | float)}


def _row(profile: Profile, name: str) -> Mapping[str, Any]:
    rows = profile.evidence.get("rows")
    named = (row for row in rows if isinstance(row, Mapping)) if isinstance(rows, list) else ()
    return next((row for row in named if row.get("name") == name), {})


def _share(value: Any, of: Any) -> float | None:
    return value / of if isinstance(value, int | float) and isinstance(of, int | float) and of else None


def part_of(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key; an empty one where there is none, as evidence is free-form."""
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def identity_of(model: ModelIdentity) -> str:
    """A digest, as a search condition cannot quote every name."""
    return sha256_of(asdict(model))


def home_tags(model: ModelIdentity, workload: Workload) -> dict[str, str]:
    """What a registered model is for: a digest each, and the same in words."""
    parts = {IDENTITY: asdict(model), WORKLOAD: asdict(workload)}
    digests = {name: sha256_of(part) for name, part in parts.items()}
    return {**digests, **{f"{name}{TEXT}": canonical_json(part) for name, part in parts.items()}}
