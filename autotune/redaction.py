"""What is kept of a text, and told to others, that a process of this host wrote: no password, none of its folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["redacted", "without_passwords"]

_USERINFO = re.compile(r"(?<=://)[^/\s]*@")
_ABOVE = re.compile(r"(?:(?<![\w/:.~@%-])|(?<=sqlite:///)|(?<=file://))/(?:[^\s/'\"<>|:;,()]+/)+(?=[^\s/])")


def without_passwords(text: str) -> str:
    """Addresses without who asks there."""
    return _USERINFO.sub("", text)


def redacted(told: Any) -> Any:
    """The same plain data, with every text in it without passwords, and of a file's path only the name."""
    if isinstance(told, str):
        return _ABOVE.sub("…/", without_passwords(told))
    if isinstance(told, Mapping):
        return {key: redacted(value) for key, value in told.items()}
    if isinstance(told, list | tuple):
        return [redacted(value) for value in told]
    return told
