"""Whether a profile fits: the model that is here, how it runs, and the device it is on."""

import platform
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from btp.anatomy import Anatomy
from btp.errors import ProfileError
from btp.profile import Profile, differences

__all__ = ["check_fit", "device_here", "kernel_here"]


def check_fit(profile: Profile, anatomy: Anatomy, allow_device: bool) -> None:
    """Raise ProfileError, with every difference, unless the profile was made for this model, run like this, here.

    With allow_device another device, or other software on it, is a warning: plans and scores hold on any device.
    """
    model = differences(asdict(profile.model), asdict(anatomy.identity))
    run = differences(asdict(profile.workload), kernel_here(anatomy))
    device = differences(asdict(profile.device), device_here(anatomy))
    if model or run or (device and not allow_device):
        ways = []
        if model:
            ways.append("load the model it was made for, or tune a profile for this one")
        if run:
            ways.append("load the model with that dtype and attn_implementation")
        if device and not allow_device:
            ways.append(_way_to_the_device(profile, anatomy))
        found = "; ".join([*model, *run, *device])
        raise ProfileError(
            f"a profile must fit the model and the device, but it was made for {found}; {', '.join(ways)}"
        )
    if device:
        warnings.warn(
            f"the profile's latency is not certified here: it was measured on {'; '.join(device)}", stacklevel=4
        )


def _way_to_the_device(profile: Profile, anatomy: Anatomy) -> str:
    """What can be done about another device: of all that tells one, only the threads can be set from here."""
    anyway = "pass allow_device=True to go without a certified latency"
    wanted, here = asdict(profile.device), device_here(anatomy)
    differing = {name for name in here if wanted[name] != here[name]}
    if "threads" not in differing or not (wanted["threads"] and here["threads"]):
        return anyway
    return f"call torch.set_num_threads({wanted['threads']}){', or' if differing == {'threads'} else ' and'} {anyway}"


def kernel_here(anatomy: Anatomy) -> Mapping[str, Any]:
    """What of a workload does not depend on the prompt."""
    dtype = str(next(anatomy.model.parameters()).dtype).removeprefix("torch.")
    return {"dtype": dtype, "attention": anatomy.attention_kernel}


def device_here(anatomy: Anatomy) -> Mapping[str, Any]:
    """What of a device key does not depend on the workload."""
    device = next(anatomy.model.parameters()).device
    on_gpu = device.type == "cuda"
    return {
        "name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "driver": _driver_version() if on_gpu else "none",
        "cuda": (torch.version.cuda or "none") if on_gpu else "none",
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "threads": 0 if on_gpu else torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _driver_version() -> str:
    try:
        line = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return "unknown"
    return next((word for word in line.split() if word[0].isdigit() and "." in word), "unknown")
