"""Where, when and of what a benchmark's figures are."""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["RESULTS", "default_path", "gpu_state", "setting"]

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_GPU_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "power.draw",
    "clocks_throttle_reasons.active",
)


def setting(module: str, arguments: Sequence[str] | None, commit: str | None = None) -> dict[str, Any]:
    """Command, date, commit, machine and versions; what is not known is None."""
    return {
        "command": " ".join(("python -m", module, *(sys.argv[1:] if arguments is None else arguments))),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
        "machine": {"platform": platform.platform(), "cores": _cores(), "load": _load()},
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("btp-autotune", "torch", "transformers", "triton")},
        },
    }


def gpu_state() -> dict[str, str] | None:
    """The GPU's clocks, temperature, power and reasons for throttling right now; None where nvidia-smi cannot tell."""
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    line = _output("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader", "-i", uuid)
    return None if line is None else dict(zip(_GPU_FIELDS, map(str.strip, line.split(",")), strict=True))


def default_path(benchmark: str, device: str) -> Path:
    """benchmarks/results/<benchmark>-<device, in lower case and hyphens>.json."""
    return RESULTS / f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def _commit() -> str | None:
    """With "-dirty" where tracked files differ from it."""
    commit, changes = _output("git", "rev-parse", "HEAD"), _output("git", "status", "--porcelain", "-uno")
    return f"{commit}-dirty" if commit and changes else commit


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except subprocess.SubprocessError:
        return None
    return done.stdout.strip()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _load() -> float:
    return os.getloadavg()[0]
