"""The YAML of a search space: its keys and the types of their values. What the values mean is the space's to check."""

from __future__ import annotations

from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from autotune.config import AutotuneError
from autotune.ranges import Choice, Float, Int

__all__ = ["read_space"]


def read_space(path: Path, space: type) -> dict[str, Any]:
    """The file's settings, by the fields of the dataclass `space`, which are ranges and flags.

    Ranges of numbers are [low, high] or one number, choices a list or one option. Raises AutotuneError that names the
    key, the ones there are, and the nearest.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise AutotuneError(f"a search space must be a readable YAML file, but {error}") from error
    kinds = {field.name: get_type_hints(space)[field.name] for field in fields(space)}
    if not isinstance(data, dict):
        raise AutotuneError(f"a search space must be keys and values, got {data!r}; known are {', '.join(kinds)}")
    for key in data:
        if key not in kinds:
            near = get_close_matches(str(key), kinds, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise AutotuneError(f"a search space has no {key!r}; known are {', '.join(kinds)}{hint}")
    if missing := [f.name for f in fields(space) if f.default is MISSING and f.name not in data]:
        raise AutotuneError(f"a search space must have {', '.join(missing)}; add a range or a constant for each")
    return {key: _value(key, kinds[key], value) for key, value in data.items()}


def _value(key: str, kind: type, value: Any) -> Any:
    if kind is bool:
        if not isinstance(value, bool):
            raise AutotuneError(f"{key} must be true or false, got {value!r}")
        return value
    given = value if isinstance(value, list) else [value]
    try:
        if kind is Choice:
            if not all(isinstance(option, str | bool) for option in given):
                raise AutotuneError(f"must be names or flags, got {value!r}")
            return Choice(tuple(given))
        if len(given) > 2 or not given:
            raise AutotuneError(f"must be [low, high] or one number, got {value!r}")
        return Int(given[0], given[-1]) if kind is Int else Float(given[0], given[-1])
    except AutotuneError as error:
        raise AutotuneError(f"{key} {error}") from error
