"""A plan's latency ratio as the tuner takes it: look by look, until it is clear on which side of the limit it lies."""

import random
from typing import Any

import pytest
import torch

from autotune import plan_file
from autotune.config import Limit
from autotune.plan_file import MAX_ROUNDS, MIN_PAIRS_OF_A_TAIL, measure_ratio
from btp import LatencyBlocks, Plan, Stage
from btp.device_state import DeviceState, bearable_share
from btp.latency import WarmUp, Window
from btp.timing import Run

PLAN = Plan(stages=(Stage(layer=1, keep=0.5),))


class Device:
    """Stands for `measure`: dense takes 40 ms, or 50 with the encoder, the plan `ratio` of it, with noise."""

    def __init__(self, ratio: float, noise: float) -> None:
        self.ratio, self.noise, self.draw = ratio, noise, random.Random(0)
        self.asked: list[dict[str, Any]] = []

    def run(self, ratio: float) -> Run:
        slowed = self.draw.lognormvariate(0, self.noise)
        return Run(40 * ratio * slowed, 50 * ratio * slowed)

    def __call__(self, model: Any, inputs: Any, plan: Plan, **asked: Any) -> LatencyBlocks:
        self.asked.append(asked)
        dense = tuple(self.run(1.0) for _ in range(asked["repeats"] + 1))
        pruned = tuple(self.run(self.ratio) for _ in range(asked["repeats"]))
        window = Window(dense=dense, pruned=pruned, state=DeviceState())
        warmup = WarmUp(num_pairs=2, settled=True, slope=0.0)
        return LatencyBlocks(key=None, warmup=warmup, windows=(window,), refused=())  # type: ignore[arg-type]


def measured(monkeypatch: pytest.MonkeyPatch, device: Device, limit: str, width: float | None = None) -> Any:
    monkeypatch.setattr(plan_file, "measure", device)
    return measure_ratio(None, {}, PLAN, Limit.parse(limit), 12, width)


def test_what_is_clear_at_once_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.5, noise=0.05)
    interval, dense_ms = measured(monkeypatch, device, "prefill_p50<=0.8x")
    assert [asked["repeats"] for asked in device.asked] == [12]
    assert interval.low <= interval.value <= interval.high < 0.8
    assert dense_ms == pytest.approx(40, rel=0.1)


def test_what_is_not_clear_is_looked_at_again_without_another_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.8, noise=0.1)
    interval, _ = measured(monkeypatch, device, "prefill_p50<=0.8x")
    assert len(device.asked) == MAX_ROUNDS
    assert [asked["max_warmup"] > 0 for asked in device.asked] == [True, False, False, False]
    assert interval.low <= 0.8 < interval.high
    wide = Device(0.5, noise=0.2)
    measured(monkeypatch, wide, "prefill_p50<=0.9x", width=0.01)
    assert len(wide.asked) == MAX_ROUNDS


def test_a_tail_needs_many_pairs_and_ttft_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.5, noise=0.01)
    interval, dense_ms = measured(monkeypatch, device, "ttft_p95<=45ms")
    assert device.asked[0]["repeats"] == MIN_PAIRS_OF_A_TAIL
    assert dense_ms == pytest.approx(51, rel=0.02)
    assert interval.high < 45 / dense_ms


def test_others_may_have_the_cores_that_are_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(0.5, noise=0.05)
    measured(monkeypatch, device, "prefill_p50<=0.8x")
    assert device.asked[0]["max_others"] == bearable_share(torch.get_num_threads())
