"""How long a plan takes on this device, paired with dense and with the selector's time included.

Runs alternate dense, pruned, dense, pruned, ..., dense. A block is a pruned run with the dense runs right before and
right after it, so that a device that warms up or slows down favours neither. Blocks run in windows, unbroken and long
enough to tell what else the device did; a window in which it did something else is thrown away and run again.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from torch import nn

from btp.capture import CaptureError
from btp.device_lock import device_lock
from btp.device_state import MIN_WATCH_S, DeviceState, Watch, watch
from btp.errors import BusyDeviceError, PlanError
from btp.families import anatomy_of
from btp.fitting import device_here, kernel_here
from btp.graphs import GraphedPrefill
from btp.intervals import Interval, ratio_interval, repetition_interval, theil_sen_slope
from btp.plan import Plan
from btp.profile import DeviceKey
from btp.timing import Run, timed_run

__all__ = ["LatencyBlocks", "Launch", "Run", "WarmUp", "Window", "device_key", "measure"]

Metric = Literal["prefill", "first_token"]
Launch = Literal["eager", "graphs"]
MAX_SLOPE = 0.01  # of the median run, from one run to the next
SLOPE_SPAN = 8  # runs the slope is taken over
MAX_OTHERS = 0.10  # of the cores' time
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 5.0  # after a refused window, doubled each time


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmUp:
    """Untimed pairs before the measurement. settled: both slopes were flat; slope: the steeper, of the median a run."""

    num_pairs: int
    settled: bool
    slope: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Blocks without a break, in the order they were run: one more dense run than pruned ones.

    The first dense run is the last one of the window before, unless a refused window lies between.
    """

    dense: tuple[Run, ...]
    pruned: tuple[Run, ...]
    state: DeviceState


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencyBlocks:
    """A measurement: raw runs by window, and all that is needed to judge them.

    refused: why windows were thrown away, one text each. launch: of dense and pruned runs alike. metric: "prefill" or
    "first_token", of the same runs.
    """

    key: DeviceKey
    warmup: WarmUp
    windows: tuple[Window, ...]
    refused: tuple[str, ...]
    launch: Launch = "eager"

    def pruned_ms(self, metric: Metric = "prefill") -> tuple[float, ...]:
        """The pruned runs, one a block."""
        return tuple(_milliseconds(run, metric) for window in self.windows for run in window.pruned)

    def dense_ms(self, metric: Metric = "prefill") -> tuple[float, ...]:
        """The dense run at the end of each block: as many as pruned ones, none counted twice, none averaged."""
        return tuple(_milliseconds(run, metric) for window in self.windows for run in window.dense[1:])

    def ratio(self, quantile: float = 0.5, metric: Metric = "prefill", confidence: float = 0.95) -> Interval:
        """Quantile of the pruned latencies over that of the dense ones, with `ratio_interval`: under 1 is faster."""
        return ratio_interval(self.dense_ms(metric), self.pruned_ms(metric), quantile, confidence)

    def repeated_ratio(self, quantile: float = 0.5, metric: Metric = "prefill", confidence: float = 0.95) -> Interval:
        """The same ratio, with where another measurement's falls (`repetition_interval`)."""
        return repetition_interval(self.dense_ms(metric), self.pruned_ms(metric), quantile, confidence)


def measure(
    model: nn.Module,
    inputs: Mapping[str, Any],
    plan: Plan,
    *,
    repeats: int = 20,
    min_warmup: int = 3,
    max_warmup: int = 30,
    max_others: float = MAX_OTHERS,
    max_refused: int = 10,
    lock_timeout_s: float = 600.0,
    launch: Launch = "eager",
    pulse: Callable[[], None] = lambda: None,
) -> LatencyBlocks:
    """Time `repeats` pruned prefills of `inputs` against dense ones, alone on the device.

    min_warmup, max_warmup: untimed pairs before that, until the latencies' slope is flat: the Theil-Sen slope of the
    last `SLOPE_SPAN` dense and pruned runs under `MAX_SLOPE` of their median a run. max_others: share of the time of
    the cores this process may run on that others may use; 1.0 lets them. max_refused: windows thrown away for that, or
    for another process on the GPU, with a pause after each, before giving up. The device's lock is held all the time.
    launch: "graphs" replays dense and pruned prefills alike, each recorded before the warm-up (`GraphedPrefill`).
    pulse: called while the lock is waited for and between windows, for whoever wants a sign of life; what it raises
    ends the measurement.

    Raises PlanError for illegal numbers; BusyDeviceError where too many windows were refused, or another process held
    the lock for `lock_timeout_s`; CaptureError where either prefill has no graph: the two are never launched unlike.
    """
    if repeats < 1 or not 0 <= min_warmup <= max_warmup:
        raise PlanError(
            "repeats must be at least 1 and 0 <= min_warmup <= max_warmup, "
            f"got {repeats}, {min_warmup} and {max_warmup}; measure(..., repeats=20) will do for most"
        )
    device = next(model.parameters()).device
    session = _Session(model, inputs, plan, watch(device), max_others, max_refused, pulse)
    with device_lock(device, lock_timeout_s, pulse):
        if launch == "graphs":
            session.record()
        warmup = session.warm_up(min_warmup, max_warmup)
        session.run(repeats)
    return LatencyBlocks(
        key=device_key(model, inputs),
        warmup=warmup,
        windows=tuple(session.windows),
        refused=tuple(session.refused),
        launch=launch,
    )


class _Session:
    """One measurement while it runs."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        plan: Plan,
        watch: Watch,
        max_others: float,
        max_refused: int,
        pulse: Callable[[], None],
    ) -> None:
        self._pulse = pulse
        self._model, self._inputs, self._plan = model, inputs, plan
        self._watch, self._max_others, self._max_refused = watch, max_others, max_refused
        self._dense_graph: GraphedPrefill | None = None
        self._pruned_graph: GraphedPrefill | None = None
        self.windows: list[Window] = []
        self.refused: list[str] = []

    def record(self) -> None:
        """Launch by graphs from now on."""
        self._dense_graph, self._pruned_graph = GraphedPrefill(self._model), GraphedPrefill(self._model, self._plan)
        for name, graph in (("dense", self._dense_graph), ("pruned", self._pruned_graph)):
            graph(**self._inputs)
            if graph.fallback_because is not None:
                raise CaptureError(
                    f"dense and pruned prefills must both be recorded to be compared, but the {name} one has no graph: "
                    f"{graph.fallback_because}; measure with launch='eager'"
                )

    def warm_up(self, at_least: int, at_most: int) -> WarmUp:
        dense: list[float] = []
        pruned: list[float] = []
        while True:
            slope = max(_relative_slope(dense), _relative_slope(pruned))
            settled = len(dense) >= 3 and slope < MAX_SLOPE
            if len(dense) >= at_most or (settled and len(dense) >= at_least):
                return WarmUp(num_pairs=len(dense), settled=settled, slope=slope)
            dense.append(self._dense().prefill_ms)
            pruned.append(self._pruned().prefill_ms)

    def run(self, repeats: int) -> None:
        """Windows until they have `repeats` blocks."""
        left, first = repeats, self._dense()
        while left:
            self._pulse()
            window = self._window(first, left)
            reason = window.state.refusal(self._max_others)
            if reason is None:
                self.windows.append(window)
                left -= len(window.pruned)
                first = window.dense[-1]
            else:
                self._refuse(reason)
                self._pruned()
                first = self._dense()

    def _window(self, first: Run, left: int) -> Window:
        """As many blocks as fill `MIN_WATCH_S`, and the last few where they would not fill another one."""
        dense = [first]
        pruned: list[Run] = []
        self._watch.start()
        start = time.perf_counter()
        while len(pruned) < left:
            pruned.append(self._pruned())
            dense.append(self._dense())
            elapsed_s = time.perf_counter() - start
            rest_s = elapsed_s / len(pruned) * (left - len(pruned))
            if min(elapsed_s, rest_s) >= MIN_WATCH_S * 1.25:
                break
        return Window(dense=tuple(dense), pruned=tuple(pruned), state=self._watch.stop())

    def _refuse(self, reason: str) -> None:
        self.refused.append(reason)
        if len(self.refused) > self._max_refused:
            raise BusyDeviceError(
                f"a latency must be measured on a device that does nothing else, but {len(self.refused)} windows were "
                f"refused, the last because {reason}; stop that, or pin this process to free cores (taskset), "
                "or allow more with max_others and max_refused"
            )
        time.sleep(min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (len(self.refused) - 1)))

    def _dense(self) -> Run:
        return timed_run(self._model, self._inputs, None, self._dense_graph)

    def _pruned(self) -> Run:
        return timed_run(self._model, self._inputs, self._plan, self._pruned_graph)


def _relative_slope(values: Sequence[float]) -> float:
    """Steepness of the last runs, up or down, as a share of their median."""
    last = values[-SLOPE_SPAN:]
    return abs(theil_sen_slope(last)) / median(last) if last else 0.0


def _milliseconds(run: Run, metric: Metric) -> float:
    return run.prefill_ms if metric == "prefill" else run.first_token_ms


def device_key(model: nn.Module, inputs: Mapping[str, Any]) -> DeviceKey:
    """Where and on what workload `measure(model, inputs, ...)` measures."""
    anatomy = anatomy_of(model)
    input_ids_BS = inputs["input_ids"]
    return DeviceKey(
        **device_here(anatomy),
        **kernel_here(anatomy),
        batch_size=input_ids_BS.shape[0],
        prompt_tokens=input_ids_BS.shape[1],
        image_tokens=int(anatomy.image_mask({"input_ids": input_ids_BS[:1]}).sum()),
    )
