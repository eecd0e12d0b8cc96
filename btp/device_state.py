"""What a device was like while something was measured on it: clock, temperature, throttling, and who else used it."""

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

import torch

__all__ = ["CpuWatch", "DeviceState", "GpuWatch", "Watch", "bearable_share", "watch"]

MIN_WATCH_S = 0.2  # 20 ticks of the kernel's 100 Hz accounting: a tick more or less on each core is then 5 % of it
_LOOKBACK_US = 1_000_000  # NVML samples utilisation about once a second
_THROTTLES = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal",
    0x40: "hardware thermal",
    0x80: "power brake",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceState:
    """A device over one stretch of time. None stands for what this machine does not tell.

    clock_mhz: of the SMs, or mean of the cores, as the stretch ended. temperature_c: of the GPU, or the machine's
    hottest zone. throttled: why the clock was held down; empty for not at all. steal: share of the cores' time that
    the hypervisor gave away. others: share of the cores' time that went to other processes and to the hypervisor; None
    for less than `MIN_WATCH_S` too, and on a GPU. other_pids: processes that computed on the GPU besides this one; None
    on a CPU.
    """

    clock_mhz: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] | None = None
    steal: float | None = None
    others: float | None = None
    other_pids: tuple[int, ...] | None = None

    def refusal(self, max_others: float) -> str | None:
        """Why nothing measured meanwhile counts, or None: a process on the GPU, or more than `max_others` of a CPU."""
        if self.other_pids:
            return f"process {', '.join(map(str, self.other_pids))} computed on the GPU as well"
        if self.others is not None and self.others > max_others:
            return f"other processes used {self.others:.0%} of the cores, more than {max_others:.0%}"
        return None


class Watch(Protocol):
    """Watches from `start` to `stop`; may be started again."""

    def start(self) -> None: ...
    def stop(self) -> DeviceState: ...


def watch(device: torch.device) -> Watch:
    """What watches the device that a model is on."""
    if device.type == "cuda":
        return GpuWatch(str(torch.cuda.get_device_properties(device).uuid))
    return CpuWatch()


def bearable_share(threads: int) -> float:
    """Of the time of the cores this process may run on: what `threads` leave free, and a fifth of what they need.

    As `max_others` of `btp.measure` it goes on where others use the other cores, which widens the interval, and refuses
    where they take cores away.
    """
    cores = len(_allowed_cores())
    return 1 - 0.8 * min(threads, cores) / cores


class CpuWatch:
    """The cores this process may run on, by Linux's /proc and /sys; elsewhere nothing is known.

    What other processes used is all that was not idle (/proc/stat, steal included) less this process's own time. All
    allowed cores count, also those that its threads leave free: neighbours share caches, power and often a core.
    """

    def __init__(self, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self._proc, self._sys = proc, sys
        self._cores = _allowed_cores()
        self._ticks_a_s = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100

    def start(self) -> None:
        self._throttles = self._throttle_counts()
        self._before = (time.perf_counter(), time.process_time(), self._idle_and_stolen())

    def stop(self) -> DeviceState:
        now, own, ticks = time.perf_counter(), time.process_time(), self._idle_and_stolen()
        then, own_before, ticks_before = self._before
        wall_s = now - then
        others = steal = None
        if ticks is not None and ticks_before is not None and wall_s >= MIN_WATCH_S:
            idle_s, stolen_s = ((a - b) / self._ticks_a_s for a, b in zip(ticks, ticks_before, strict=True))
            cores_s = wall_s * len(self._cores)
            others = min(1.0, max(0.0, (cores_s - idle_s - (own - own_before)) / cores_s))
            steal = min(1.0, stolen_s / cores_s)
        return DeviceState(
            clock_mhz=self._clock_mhz(),
            temperature_c=self._temperature_c(),
            throttled=self._throttled(),
            steal=steal,
            others=others,
        )

    def _idle_and_stolen(self) -> tuple[int, int] | None:
        """Ticks since boot, over the cores: idle and waiting for disks; given away by the hypervisor."""
        wanted = {f"cpu{core}" for core in self._cores}
        rows = [line.split() for line in _text(self._proc / "stat").splitlines()]
        cores = [list(map(int, row[1:])) for row in rows if row and row[0] in wanted and len(row) > 8]
        if len(cores) < len(wanted):
            return None
        return sum(core[3] + core[4] for core in cores), sum(core[7] for core in cores)

    def _clock_mhz(self) -> float | None:
        lines = _text(self._proc / "cpuinfo").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        ours = [mhz for core, mhz in enumerate(found) if core in self._cores]
        return fmean(ours) if ours else None

    def _temperature_c(self) -> float | None:
        zones = (_text(path).strip() for path in self._sys.glob("class/thermal/thermal_zone*/temp"))
        return max((int(text) / 1000 for text in zones if text.lstrip("-").isdigit()), default=None)

    def _throttled(self) -> tuple[str, ...] | None:
        now = self._throttle_counts()
        if not now or now.keys() != self._throttles.keys():
            return None
        return ("hardware thermal",) if any(now[path] > self._throttles[path] for path in now) else ()

    def _throttle_counts(self) -> dict[Path, int]:
        names = [f"devices/system/cpu/cpu{core}/thermal_throttle/core_throttle_count" for core in self._cores]
        texts = {self._sys / name: _text(self._sys / name).strip() for name in names}
        return {path: int(text) for path, text in texts.items() if text.isdigit()}


class GpuWatch:
    """An NVIDIA GPU, by NVML through the package nvidia-ml-py where it is installed; else nothing is known.

    Another process is one that NVML lists as a compute process, unless its utilisation samples say that it rested:
    other workers may have their model there while this one measures. Where NVML lists pids of another namespace than
    ours, as in a container, the busiest unknown one is taken for this process.
    """

    def __init__(self, uuid: str, nvml: Any = None) -> None:
        self._nvml, self._handle = nvml or _nvml(), None
        if self._nvml is not None:
            names = (uuid,) if uuid.startswith(("GPU-", "MIG-")) else (f"GPU-{uuid}", f"MIG-{uuid}")
            handles = (self._ask(self._nvml.nvmlDeviceGetHandleByUUID, name) for name in names)
            self._handle = next((handle for handle in handles if handle is not None), None)

    def start(self) -> None:
        self._since_us = int(time.time() * 1e6) - _LOOKBACK_US

    def stop(self) -> DeviceState:
        nvml, handle = self._nvml, self._handle
        if handle is None:
            return DeviceState()
        reasons_of = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        reasons = self._ask(reasons_of or nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return DeviceState(
            clock_mhz=self._ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            temperature_c=self._ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            throttled=None if reasons is None else tuple(name for bit, name in _THROTTLES.items() if reasons & bit),
            other_pids=self._other_pids(),
        )

    def _other_pids(self) -> tuple[int, ...] | None:
        listed = self._ask(self._nvml.nvmlDeviceGetComputeRunningProcesses, self._handle)
        if listed is None:
            return None
        samples = self._ask(self._nvml.nvmlDeviceGetProcessUtilization, self._handle, self._since_us) or ()
        used: dict[int, int] = {}
        for sample in samples:
            used[sample.pid] = max(used.get(sample.pid, 0), sample.smUtil)
        others = _others([process.pid for process in listed], os.getpid(), used)
        return tuple(pid for pid in others if used.get(pid, 0) > 0 or not used)

    def _ask(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except self._nvml.NVMLError:
            return None


def _allowed_cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _others(pids: Sequence[int], own: int, used: Mapping[int, int]) -> list[int]:
    others = sorted({pid for pid in pids if pid != own})
    unknown = [pid for pid in others if not Path(f"/proc/{pid}").exists()]
    if own not in pids and unknown:
        others.remove(max(unknown, key=lambda pid: used.get(pid, 0)))
    return others


def _nvml() -> Any:
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
