"""What the evidence's findings rest on: schedules crossed with selectors, and all image tokens dropped at each depth.

Both on `select`; nothing is chosen by them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from autotune.bench import Bench
from autotune.search import DENSE
from btp.plan import Plan, Stage
from btp.selection import SELECTORS

__all__ = ["CROSSED", "crossing", "depth_scores", "with_one_selector"]

CROSSED = tuple(name for name in SELECTORS if name not in ("random", "uniform"))
MAX_DEPTHS = 12  # layers before which everything is dropped; evenly through a deeper decoder


def with_one_selector(plan: Plan, selector: str) -> Plan:
    """The same layers and counts, every stage that keeps any by one selector; lambda where it was."""
    return replace(plan, stages=tuple(replace(s, selector=selector) if s.keep else s for s in plan.stages))


def crossing(
    bench: Bench, schedules: Mapping[str, Plan], selectors: Sequence[str], done: Callable[[str, str], None]
) -> dict[str, Any]:
    """Macro accuracy of every schedule with every selector: {schedule: {selector: score}}, and each with its own."""
    scores: dict[str, dict[str, float]] = {}
    for name, plan in schedules.items():
        scores[name] = {}
        for selector in selectors:
            scores[name][selector] = bench.macro(with_one_selector(plan, selector), "select")[0]
            done("crossing", f"{name} with {selector}")
    own = {name: bench.macro(plan, "select")[0] for name, plan in schedules.items()}
    return {"scores": scores, "own": own, "plans": {name: plan.to_dict() for name, plan in schedules.items()}}


def depth_scores(bench: Bench, done: Callable[[str, str], None]) -> dict[str, Any]:
    """Accuracy by task, of dense and with every image token dropped before a layer."""
    num_layers = bench.anatomy.decoder.num_layers
    count = min(num_layers, MAX_DEPTHS)
    without = {}
    for layer in (index * num_layers // count for index in range(count)):
        plan = Plan(stages=(Stage(layer=layer, keep=0.0, selector="uniform"),))
        without[str(layer)] = bench.macro(plan, "select")[1]
        done("depth", f"no image token from layer {layer} on")
    return {"num_layers": num_layers, "dense": bench.macro(DENSE, "select")[1], "without": without}
