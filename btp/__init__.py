"""Balanced token pruning: make a vision-language model faster by dropping image tokens inside the forward pass.

    profile = btp.Profile.load("profile.json")
    with btp.prune(model, profile) as trace:
        model.generate(**inputs)

Importing this package imports neither torch nor transformers; a name loads what it needs when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from btp import presets
    from btp.calibration import cosine_shift, stage_layers, withdrawal_layer
    from btp.capture import CaptureError
    from btp.errors import (
        BTPError,
        BusyDeviceError,
        PlanError,
        ProfileError,
        RealizationError,
        UnsupportedModelError,
    )
    from btp.families import anatomy_of
    from btp.graphs import GraphedPrefill
    from btp.latency import LatencyBlocks, device_key, measure
    from btp.plan import Plan, Stage
    from btp.prefill import Trace
    from btp.prefix import encode_images
    from btp.profile import DeviceKey, ModelIdentity, Profile, Workload
    from btp.pruning import prune
    from btp.selection import SELECTORS, Selector
    from btp.tokens import ImageTokens

__all__ = [
    "SELECTORS",
    "BTPError",
    "BusyDeviceError",
    "CaptureError",
    "DeviceKey",
    "GraphedPrefill",
    "ImageTokens",
    "LatencyBlocks",
    "ModelIdentity",
    "Plan",
    "PlanError",
    "Profile",
    "ProfileError",
    "RealizationError",
    "Selector",
    "Stage",
    "Trace",
    "UnsupportedModelError",
    "Workload",
    "anatomy_of",
    "cosine_shift",
    "device_key",
    "encode_images",
    "measure",
    "presets",
    "prune",
    "stage_layers",
    "withdrawal_layer",
]

_HOME = {
    "BTPError": "errors",
    "BusyDeviceError": "errors",
    "CaptureError": "capture",
    "DeviceKey": "profile",
    "GraphedPrefill": "graphs",
    "ImageTokens": "tokens",
    "LatencyBlocks": "latency",
    "ModelIdentity": "profile",
    "Plan": "plan",
    "PlanError": "errors",
    "Profile": "profile",
    "ProfileError": "errors",
    "RealizationError": "errors",
    "SELECTORS": "selection",
    "Selector": "selection",
    "Stage": "plan",
    "Trace": "prefill",
    "UnsupportedModelError": "errors",
    "Workload": "profile",
    "anatomy_of": "families",
    "cosine_shift": "calibration",
    "device_key": "latency",
    "encode_images": "prefix",
    "measure": "latency",
    "prune": "pruning",
    "stage_layers": "calibration",
    "withdrawal_layer": "calibration",
}


def __getattr__(name: str) -> Any:
    if name == "presets":
        return import_module("btp.presets")
    if name not in _HOME:
        raise AttributeError(f"module 'btp' has no attribute {name!r}")
    return getattr(import_module(f"btp.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
