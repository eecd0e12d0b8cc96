"""What stands in a registry: versions, what is known of a model, and files that are staged, tagged and checked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from autotune.config import AutotuneError
from btp.errors import ProfileError
from btp.plan import Plan
from btp.profile import DeviceKey, ModelIdentity, Profile
from btp.sealed import canonical_json, sha256_of

__all__ = [
    "ANSWERS",
    "CERTIFIED",
    "PROFILE",
    "REASONS",
    "Known",
    "RegistryError",
    "Version",
    "certificate_tags",
    "check",
    "identity_of",
    "put",
    "stage",
]

PROFILE = "profile/profile.json"  # in a run's artifacts
ANSWERS = "select.json"  # in the folder `evidence` beside it
CERTIFIED = "certified"
REASONS = "reasons"
MAX_TAG = 5000  # characters


class RegistryError(AutotuneError):
    """The registry could not do what was asked; nothing half-written was left behind."""


@dataclass(frozen=True)
class Version:
    """One registered profile. `uri` names it for ever; an alias is free to move on to a later version.

    certified: as registered; reasons: why it is not, in one text.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    sha256: str
    uri: str
    certified: bool
    reasons: str

    @property
    def alias(self) -> str | None:
        """The first alias that points here, if any."""
        return self.aliases[0] if self.aliases else None


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
        return dict(self.profile.evidence.get("data", {}))

    @property
    def model_digest(self) -> str:
        """Of the weights: an identity tells a model's shape only."""
        return str(self.profile.evidence.get("model_digest", ""))

    def answered(self, model_digest: str, questions: str, dtype: str) -> bool:
        """Whether it was these weights, in this dtype, that answered these questions: a digest of `select`."""
        told = (self.model_digest, self.data_digests.get("select"), self.device.dtype)
        return bool(self.answers_digest) and told == (model_digest, questions, dtype)


def stage(folder: Path, profile_path: Path, evidence: Mapping[str, Path]) -> Profile:
    """Lay the run's artifacts out in `folder`, and return the profile among them.

    What is checked here is the copy that is uploaded: a file that changes in between cannot slip through.
    """
    Profile.load(profile_path)  # so that an error names the caller's file
    copy = folder / PROFILE
    copy.parent.mkdir()
    shutil.copyfile(profile_path, copy)
    profile = Profile.load(copy)
    for name, source in evidence.items():
        target = folder / "evidence" / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RegistryError(f"evidence is named inside its folder, got {name!r}; drop the leading / or the ..")
        if not source.exists():
            raise RegistryError(f"evidence must exist before it is registered, got {source} for {name!r}")
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copyfile(source, target)
    return profile


def certificate_tags(profile: Profile) -> dict[str, str]:
    """The certificate, a tag for each thing it says; reasons that would be too long are cut, and say so."""
    reasons, cut = "; ".join(profile.uncertified_because), " ... (more in the profile)"
    if len(reasons) > MAX_TAG:
        reasons = reasons[: MAX_TAG - len(cut)] + cut
    tags = {CERTIFIED: "true" if profile.certified else "false", **({REASONS: reasons} if reasons else {})}
    certificate = profile.evidence.get("certificate")
    said = certificate.items() if isinstance(certificate, Mapping) else ()
    flat = {f"certificate.{key}": canonical_json(value) for key, value in said if key not in (CERTIFIED, REASONS)}
    return {**tags, **{key: text for key, text in flat.items() if len(text) <= MAX_TAG}}


def identity_of(model: ModelIdentity) -> str:
    """A digest, as a search condition cannot quote every name."""
    return sha256_of(asdict(model))


def check(path: Path, version: Version) -> Profile:
    """The profile in a file that must be the one that `version` was registered with. Raises RegistryError."""
    try:
        profile = Profile.load(path)
    except ProfileError as error:
        raise RegistryError(f"{version.uri} is damaged, {error}; register it again") from error
    if profile.digest != version.sha256:
        raise RegistryError(
            f"{version.uri} must have SHA-256 {version.sha256 or '(none is recorded)'}, got {profile.digest}; "
            "it was changed after it was registered, so register it again"
        )
    return profile


def put(source: Path, target: Path) -> None:
    """Move a file into place in one step, also from another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    beside.replace(target)
