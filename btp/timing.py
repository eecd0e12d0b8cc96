"""One prefill, timed: on the CPU's clock, or by events on the GPU's stream."""

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from btp.families import anatomy_of
from btp.graphs import GraphedPrefill
from btp.plan import Plan
from btp.pruning import prune

__all__ = ["Run", "timed_run"]


class Run(NamedTuple):
    """One prefill, in milliseconds.

    prefill_ms: from the language model's start to the last token's logits. first_token_ms: from the call to the same
    end, with the vision encoder.
    """

    prefill_ms: float
    first_token_ms: float


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
def timed_run(
    model: nn.Module, inputs: Mapping[str, Any], plan: Plan | None, graph: GraphedPrefill | None = None
) -> Run:
    """One prefill to the last token's logits, of the dense model for no plan; `graph`: of these, launched by it.

    A graph must have been recorded before. Its copying of inputs counts, and in the time to first token the telling of
    its bucket.
    """
    device = next(model.parameters()).device
    clock: _Clock = _CudaClock(device) if device.type == "cuda" else _CpuClock()
    prefill: Callable[..., Any] = partial(model, use_cache=True, logits_to_keep=1) if graph is None else graph

    def mark(module: nn.Module, args: tuple[Any, ...]) -> None:
        clock.mark()

    handle = anatomy_of(model).language_model.register_forward_pre_hook(mark)  # before prune's: its work counts
    try:
        with prune(model, plan) if plan is not None and graph is None else nullcontext():
            clock.mark()
            prefill(**inputs)
            clock.mark()
    finally:
        handle.remove()
    return Run(clock.since_ms(1), clock.since_ms(0))
