"""Find, prove, register and serve image-token pruning plans.

    applied = autotune.apply(model, "models:/NAME@ALIAS")

Importing this package imports nothing of it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autotune.resolver import apply

__all__ = ["apply"]


def __getattr__(name: str) -> Any:
    if name != "apply":
        raise AttributeError(f"module 'autotune' has no attribute {name!r}")
    from importlib import import_module

    return import_module("autotune.resolver").apply
