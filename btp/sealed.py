"""Plain JSON files that carry their own SHA-256. Standard library only; nothing is ever executed or unpickled."""

import hashlib
import json
from pathlib import Path
from typing import Any

from btp.errors import ProfileError

__all__ = ["SCHEMA_VERSION", "canonical_json", "parse_object", "read_object", "seal", "sha256_of", "verify"]

SCHEMA_VERSION = 1
_SEAL = "sha256"


def canonical_json(data: object) -> str:
    """One text per value: sorted keys, no spaces, no NaN. Raises ValueError or TypeError for what JSON cannot say."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def sha256_of(data: object) -> str:
    return hashlib.sha256(canonical_json(data).encode()).hexdigest()


def seal(data: dict[str, Any]) -> dict[str, Any]:
    """`data` with the digest of everything else in it under "sha256"."""
    body = {key: value for key, value in data.items() if key != _SEAL}
    return {**body, _SEAL: sha256_of(body)}


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ProfileError when there is none."""
    try:
        return parse_object(Path(path).read_bytes(), path)
    except OSError as error:
        raise ProfileError(f"{path}: cannot be read ({error.strerror}); check the path") from error


def parse_object(text: bytes, path: str | Path) -> dict[str, Any]:
    """As `read_object`, of what was read already. path: where it came from, for the error."""
    try:
        data = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise ProfileError(
            f"{path}: must be JSON, but parsing stops with '{error}'; the file is cut or altered, fetch it again"
        ) from error
    if not isinstance(data, dict):
        raise ProfileError(f"{path}: must hold a JSON object, got {type(data).__name__}; is this a plan or a profile?")
    return data


def verify(data: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The body of a sealed profile, or ProfileError when the schema or the digest does not fit."""
    version = data.get("schema_version")
    if type(version) is not int or version < 1:
        raise ProfileError(f"{path}: schema_version must be a whole number from 1, got {version!r}; not a profile")
    if version > SCHEMA_VERSION:
        raise ProfileError(
            f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest known here; upgrade btp"
        )
    body = {key: value for key, value in data.items() if key != _SEAL}
    try:
        stored, actual = data.get(_SEAL), sha256_of(body)
    except (ValueError, RecursionError) as error:  # Python reads numbers that JSON does not have
        raise ProfileError(
            f"{path}: must hold finite numbers, not too deep, but: {error}; fetch it again from where it was published"
        ) from error
    if stored != actual:
        raise ProfileError(
            f"{path}: the content's SHA-256 must be the stored one ({stored}), but is {actual}; "
            "the file was altered after it was saved, fetch it again from where it was published"
        )
    return body
