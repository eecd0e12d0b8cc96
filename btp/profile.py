"""A profile is a plan with its papers: the model it fits, where it was measured, and the evidence.

It is plain JSON with a SHA-256 over its canonical form, so a registry can hand it out as a file and nobody has to
trust the way it came. Standard library only.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self, TypeVar

from btp.errors import PlanError, ProfileError
from btp.plan import Plan
from btp.sealed import SCHEMA_VERSION, read_object, seal, verify

__all__ = ["DeviceKey", "ModelIdentity", "Profile", "Workload", "differences"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelIdentity:
    """What must agree between a profile and the model it is applied to."""

    architecture: str
    num_layers: int
    hidden_size: int
    num_image_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What was run when the profile was made. `attention` is the attention kernel, such as "sdpa"."""

    image_tokens: int
    prompt_tokens: int
    batch_size: int
    dtype: str
    attention: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKey:
    """Where a latency holds. Latencies of different keys are never compared. threads: of the CPU; 0 on a GPU."""

    name: str
    driver: str
    cuda: str
    torch: str
    transformers: str
    attention: str
    dtype: str
    threads: int
    batch_size: int
    prompt_tokens: int
    image_tokens: int

    @property
    def slug(self) -> str:
        """The device's name as a registry alias: "NVIDIA H200" becomes "nvidia-h200"."""
        words = re.sub(r"\((r|tm|c)\)|@.*", " ", self.name.lower())
        return re.sub(r"[^a-z0-9]+", "-", words).strip("-") or "unknown-device"


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """A plan with its papers. `evidence` is free-form JSON: scores and latencies with intervals, the dense baseline.

    Under "certificate" the evidence may hold what held-out data said: an object with "certified" and "reasons" in it.
    """

    plan: Plan
    model: ModelIdentity
    workload: Workload
    device: DeviceKey
    evidence: dict[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def digest(self) -> str:
        """The SHA-256 the saved file carries."""
        return str(self.to_dict()["sha256"])

    @property
    def uncertified_because(self) -> tuple[str, ...]:
        """Why the plan is not proven as good as dense and within its limit, in plain words; nothing where it is."""
        certificate = self.evidence.get("certificate")
        if not isinstance(certificate, Mapping):
            return ("it carries no certificate",)
        if certificate.get("certified") is True:
            return ()
        reasons = certificate.get("reasons")
        return tuple(map(str, reasons)) if isinstance(reasons, list) and reasons else ("its certificate says so",)

    @property
    def certified(self) -> bool:
        return not self.uncertified_because

    def to_dict(self) -> dict[str, Any]:
        """Plain data with its digest under "sha256". Raises ProfileError when the evidence is no JSON."""
        body = {**asdict(self), "plan": self.plan.to_dict()}
        try:
            return seal(body)
        except (TypeError, ValueError) as error:
            raise ProfileError(f"evidence must be plain JSON without NaN, but: {error}; convert it first") from error

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), sort_keys=True, indent=2, allow_nan=False)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """The profile in a file. Raises ProfileError when it is cut, altered, foreign, or from a newer schema."""
        body = verify(read_object(path), path)
        _check_keys(cls, body, path, "profile")
        if not isinstance(body["evidence"], dict):
            raise ProfileError(f"{path}: evidence must be an object, got {body['evidence']!r}; is this a profile?")
        try:
            plan = Plan.from_dict(body["plan"])
        except PlanError as error:
            raise ProfileError(f"{path}: the plan in it is not legal: {error}") from error
        return cls(
            plan=plan,
            model=_record(ModelIdentity, body["model"], path, "model"),
            workload=_record(Workload, body["workload"], path, "workload"),
            device=_record(DeviceKey, body["device"], path, "device"),
            evidence=body["evidence"],
            schema_version=body["schema_version"],
        )

    def check_fits(self, identity: ModelIdentity) -> None:
        """Raise ProfileError unless the profile was made for a model of this identity."""
        if differing := differences(asdict(self.model), asdict(identity)):
            raise ProfileError(
                f"the profile must be applied to the model it was made for, which has {'; '.join(differing)}; "
                "load that model, or tune a profile for this one"
            )


def differences(wanted: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, everything in `here` that is otherwise in `wanted`: "torch 2.11.0, here 2.13.0"."""
    return [f"{name} {wanted[name]}, here {value}" for name, value in here.items() if wanted[name] != value]


_Record = TypeVar("_Record", ModelIdentity, Workload, DeviceKey)


def _record(cls: type[_Record], data: object, path: str | Path, name: str) -> _Record:
    checked = _check_keys(cls, data, path, name)
    for entry in fields(cls):
        if type(checked[entry.name]) is not entry.type:
            raise ProfileError(f"{path}: {name}.{entry.name} must be {entry.type}, got {checked[entry.name]!r}")
    return cls(**checked)


def _check_keys(cls: type, data: object, path: str | Path, name: str) -> Mapping[str, Any]:
    known = {entry.name for entry in fields(cls)}
    if not isinstance(data, Mapping) or set(data) != known:
        came = sorted(map(str, data)) if isinstance(data, Mapping) else data
        raise ProfileError(f"{path}: {name} must hold exactly {sorted(known)}, got {came}; is this a profile?")
    return data
