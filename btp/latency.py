"""How long a plan takes on this device, paired with dense and with the selector's time included.

Runs alternate dense, pruned, dense, pruned, ..., dense. Each pruned run is compared with the mean of the dense runs
right before and right after it, so that a device that warms up or slows down favours neither.
"""

import platform
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from btp.errors import PlanError
from btp.families import anatomy_of
from btp.plan import Plan
from btp.profile import DeviceKey
from btp.pruning import prune

__all__ = ["LatencyBlocks", "device_key", "measure", "percentile"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyBlocks:
    """Raw milliseconds, in the order they were run: one more dense run than pruned ones.

    prefill: from the language model's start to the last token's logits. first_token: from the call to the same end,
    with the vision encoder. Both come from the same runs.
    """

    dense_prefill_ms: tuple[float, ...]
    pruned_prefill_ms: tuple[float, ...]
    dense_first_token_ms: tuple[float, ...]
    pruned_first_token_ms: tuple[float, ...]

    @property
    def dense_ms(self) -> tuple[float, ...]:
        """Each pruned prefill's baseline: the mean of its two dense neighbours."""
        return _baselines(self.dense_prefill_ms)

    @property
    def pruned_ms(self) -> tuple[float, ...]:
        return self.pruned_prefill_ms

    @property
    def ratios(self) -> tuple[float, ...]:
        """Pruned over dense prefill, pair by pair: under 1 is faster."""
        return _ratios(self.dense_prefill_ms, self.pruned_prefill_ms)

    @property
    def first_token_ratios(self) -> tuple[float, ...]:
        """Pruned over dense time to first token, pair by pair."""
        return _ratios(self.dense_first_token_ms, self.pruned_first_token_ms)

    @property
    def dense_p50_ms(self) -> float:
        return percentile(self.dense_prefill_ms, 50)

    @property
    def dense_p95_ms(self) -> float:
        return percentile(self.dense_prefill_ms, 95)

    @property
    def pruned_p50_ms(self) -> float:
        return percentile(self.pruned_prefill_ms, 50)

    @property
    def pruned_p95_ms(self) -> float:
        return percentile(self.pruned_prefill_ms, 95)

    @property
    def ratio_p50(self) -> float:
        return percentile(self.ratios, 50)


def measure(
    model: nn.Module, inputs: Mapping[str, Any], plan: Plan, *, repeats: int = 20, warmup: int = 3
) -> LatencyBlocks:
    """Time `repeats` pruned prefills of `inputs` against dense ones, after `warmup` untimed pairs."""
    if repeats < 1 or warmup < 0:
        raise PlanError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    dense, pruned = [], []
    for _ in range(warmup):
        _timed_run(model, inputs, None)
        _timed_run(model, inputs, plan)
    dense.append(_timed_run(model, inputs, None))
    for _ in range(repeats):
        pruned.append(_timed_run(model, inputs, plan))
        dense.append(_timed_run(model, inputs, None))
    return LatencyBlocks(
        dense_prefill_ms=tuple(run[0] for run in dense),
        pruned_prefill_ms=tuple(run[0] for run in pruned),
        dense_first_token_ms=tuple(run[1] for run in dense),
        pruned_first_token_ms=tuple(run[1] for run in pruned),
    )


def device_key(model: nn.Module, inputs: Mapping[str, Any]) -> DeviceKey:
    """Where and on what workload `measure(model, inputs, ...)` measures."""
    anatomy = anatomy_of(model)
    parameter = next(model.parameters())
    input_ids_BS = inputs["input_ids"]
    on_gpu = parameter.device.type == "cuda"
    return DeviceKey(
        name=torch.cuda.get_device_name(parameter.device) if on_gpu else _cpu_name(),
        driver=_driver_version() if on_gpu else "none",
        cuda=(torch.version.cuda or "none") if on_gpu else "none",
        torch=str(torch.__version__),
        transformers=version("transformers"),
        attention=anatomy.attention_kernel,
        dtype=str(parameter.dtype).removeprefix("torch."),
        threads=0 if on_gpu else torch.get_num_threads(),
        batch_size=input_ids_BS.shape[0],
        prompt_tokens=input_ids_BS.shape[1],
        image_tokens=int(anatomy.image_mask({"input_ids": input_ids_BS[:1]}).sum()),
    )


def percentile(values: tuple[float, ...], percent: float) -> float:
    """Linear interpolation between the two nearest order statistics."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class _Clock(Protocol):
    def mark(self) -> None: ...
    def since_ms(self, index: int) -> float: ...


class _CpuClock:
    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(time.perf_counter())

    def since_ms(self, index: int) -> float:
        return (self._marks[-1] - self._marks[index]) * 1e3


class _CudaClock:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._marks: list[torch.cuda.Event] = []
        self._stream.synchronize()

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        self._marks.append(event)

    def since_ms(self, index: int) -> float:
        self._marks[-1].synchronize()
        return float(self._marks[index].elapsed_time(self._marks[-1]))


@torch.inference_mode()
def _timed_run(model: nn.Module, inputs: Mapping[str, Any], plan: Plan | None) -> tuple[float, float]:
    """One prefill to the last token's logits: (prefill ms, time to first token ms)."""
    device = next(model.parameters()).device
    clock: _Clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()

    def mark(module: nn.Module, args: tuple[Any, ...]) -> None:
        clock.mark()

    handle = anatomy_of(model).language_model.register_forward_pre_hook(mark)  # before prune's: its work counts
    try:
        with prune(model, plan) if plan is not None else nullcontext():
            clock.mark()
            model(**inputs, use_cache=True, logits_to_keep=1)
            clock.mark()
    finally:
        handle.remove()
    return clock.since_ms(1), clock.since_ms(0)


def _baselines(dense_ms: tuple[float, ...]) -> tuple[float, ...]:
    return tuple((before + after) / 2 for before, after in pairwise(dense_ms))


def _ratios(dense_ms: tuple[float, ...], pruned_ms: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(pruned / dense for pruned, dense in zip(pruned_ms, _baselines(dense_ms), strict=True))


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
