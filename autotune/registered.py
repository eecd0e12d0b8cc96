"""What stands in a registry: versions, what is known of a model, and what is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotune.config import AutotuneError
from btp.plan import Plan
from btp.profile import DeviceKey, Profile

__all__ = [
    "ALIAS",
    "ANSWERS",
    "CERTIFIED",
    "IDENTITY",
    "MANIFEST",
    "REASONS",
    "SHA256",
    "TEXT",
    "WORKLOAD",
    "GateError",
    "Known",
    "NotRegisteredError",
    "Reference",
    "RegistryError",
    "Version",
    "is_alias",
]

ALIAS = "^[A-Za-z0-9][A-Za-z0-9_-]{0,249}$"
"""What an alias is made of, everywhere; `is_alias` has the rest."""
ANSWERS = "select.json"  # among a version's evidence
CERTIFIED = "certified"
REASONS = "reasons"
SHA256 = "sha256"
MANIFEST = "manifest"
IDENTITY = "model_identity"
WORKLOAD = "workload"
TEXT = ".text"  # what follows a digest's tag where the same is told in words
SCHEME = "models:/"


class RegistryError(AutotuneError):
    """The registry could not do what was asked; nothing half-written was left behind."""


class NotRegisteredError(RegistryError):
    """The registry has no such name, alias or version."""


class GateError(RegistryError):
    """A promotion that must not be; the alias stays where it is."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A version by alias or by number: one of the two is there."""

    name: str
    alias: str | None = None
    version: int | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Of models:/NAME@ALIAS or models:/NAME/VERSION, the scheme left out or not. Raises RegistryError."""
        rest = text.removeprefix(SCHEME)
        name, at, alias = rest.partition("@")
        if at and name and alias and "/" not in name:
            return cls(name, alias=alias)
        name, _, number = rest.partition("/")
        if name and number.isascii() and number.isdigit() and not at:
            return cls(name, version=int(number))
        raise RegistryError(
            f"a reference reads models:/NAME@ALIAS or models:/NAME/VERSION, got {text!r}; "
            "autotune profiles list shows which there are"
        )

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}" + (f"/{self.version}" if self.alias is None else f"@{self.alias}")


@dataclass(frozen=True)
class Version:
    """One registered profile. `uri` names it for ever; an alias is free to move on to a later version.

    sha256: the profile's digest; manifest: its folder's, empty where it was registered without one. certified: as
    registered; reasons: why it is not, in one text. device: as in an alias. retention: macro accuracy as a share of
    dense's on held-out pictures; worst_task_retention: the worst task's. ratio: latency to dense's, at `metric`
    and `quantile`. plan: its digest. experiment_id: of its run. What a profile does not tell is empty or None. created:
    in seconds since 1970.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    sha256: str
    uri: str
    certified: bool
    reasons: str
    manifest: str = ""
    device: str = ""
    device_name: str = ""
    dtype: str = ""
    limit: str = ""
    retention: float | None = None
    worst_task_retention: float | None = None
    ratio: float | None = None
    ratio_high: float | None = None
    latency_ms: float | None = None
    latency_high_ms: float | None = None
    created: float = 0.0
    study: str = ""
    plan: str = ""
    experiment_id: str = ""
    data_digest: str = ""
    code_version: str = ""
    metric: str = ""
    quantile: str = ""

    @property
    def alias(self) -> str | None:
        """The first alias that points here, if any."""
        return self.aliases[0] if self.aliases else None

    @property
    def digest(self) -> str:
        """What tells its files from all others'."""
        return self.manifest or self.sha256

    @classmethod
    def of_tags(cls, tags: Mapping[str, str], **known: Any) -> Version:
        """With what the tags of a version say."""
        told: dict[str, Any] = {name: tags.get(name, "") for name in (*TEXTS, SHA256, MANIFEST, REASONS)}
        told |= {name: _number(tags.get(name)) for name in NUMBERS}
        return cls(certified=tags.get(CERTIFIED) == "true", **told, **known)


TEXTS = (
    *("device", "device_name", "dtype", "limit", "metric", "quantile"),
    *("study", "plan", "experiment_id", "data_digest", "code_version"),
)
NUMBERS = ("retention", "worst_task_retention", "ratio", "ratio_high", "latency_ms", "latency_high_ms")


@dataclass(frozen=True)
class Known:
    """A registered profile of a model like the one that is to be tuned: where a new search may start.

    Answers do not depend on the device, so the same weights in the same dtype give them to the same questions again;
    latency must be measured anew. What a profile from before does not tell is empty.
    """

    version: Version
    profile: Profile

    @property
    def plan(self) -> Plan:
        return self.profile.plan

    @property
    def device(self) -> DeviceKey:
        return self.profile.device

    @property
    def answers_digest(self) -> str:
        """SHA-256 of the file `ANSWERS` among its evidence: what the plan answered to `select`, and how it scored."""
        return str(self.profile.evidence.get("answers", ""))

    @property
    def data_digests(self) -> Mapping[str, str]:
        """By split; equal digests are the same questions about the same pictures."""
        told = self.profile.evidence.get("data")
        return dict(told) if isinstance(told, Mapping) else {}

    @property
    def model_digest(self) -> str:
        """Of the weights: an identity tells a model's shape only."""
        return str(self.profile.evidence.get("model_digest", ""))

    def answered(self, model_digest: str, questions: str, dtype: str) -> bool:
        """Whether it was these weights, in this dtype, that answered these questions: a digest of `select`."""
        told = (self.model_digest, self.data_digests.get("select"), self.device.dtype)
        return bool(self.answers_digest) and told == (model_digest, questions, dtype)


def is_alias(text: str) -> bool:
    """Whether it can be an alias: latest, and v1 and the like, are MLflow's own."""
    own = re.fullmatch(r"latest|v\d+", text, re.ASCII | re.IGNORECASE)
    return own is None and re.fullmatch(ALIAS, text) is not None


def _number(text: str | None) -> float | None:
    try:
        number = math.nan if text is None else float(text)
    except ValueError:  # a tag can be changed by anyone
        return None
    return number if math.isfinite(number) else None
