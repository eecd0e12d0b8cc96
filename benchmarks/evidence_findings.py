"""What the raw numbers of the evidence say of lambda, of depth, and of selectors against schedules, in plain words.

Everything here is computed from the JSON that `benchmarks.evidence` writes, so that the report can be written again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.evidence_plans import HAND_SET
from btp import presets
from btp.selection import PICTURE_ONLY, READS

__all__ = [
    "WeightedStage",
    "depth_lines",
    "lambda_lines",
    "variance_lines",
    "variance_shares",
    "weighted_stages",
]

KEEPS = 0.95  # of its dense accuracy: a task that keeps that much is taken not to need what was dropped

Found = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WeightedStage:
    """A stage's lambda. depth: its layer as a share of the decoder's. set_by: the tuner, or the gradient."""

    set_by: str
    limit: float
    plan: str
    depth: float
    weight: float


def _weight(stage: Found) -> float | None:
    """The stage's lambda; 1 where it looks at attention alone, 0 at the picture alone, None where it has none."""
    if not stage["keep"] or stage["selector"] in ("random", "uniform"):
        return None
    if "attention_weight" in READS.get(stage["selector"], ()):
        return float(stage["attention_weight"])
    return 1.0 if stage["selector"] == "attention" else 0.0 if stage["selector"] in PICTURE_ONLY else None


def weighted_stages(found: Found) -> list[WeightedStage]:
    """Every stage of the champions and learned plans that has a lambda, in the order of the limits and the layers."""
    return [
        WeightedStage(row["kind"], at["limit"], row["name"], stage["layer"] / found["num_layers"], weight)
        for at in found["limits"]
        for row in at["rows"]
        if row["kind"] in ("tuned", "learned")
        for stage in row["plan"]["stages"]
        if (weight := _weight(stage)) is not None
    ]


def lambda_lines(found: Found) -> list[str]:
    """What lambda looks like over depth, by who set it, against the paper's."""
    paper = [stage.attention_weight for stage in presets.btp_paper(found["num_layers"]).stages]
    lines = [f"The paper's lambda rises with depth: {', '.join(f'{weight:g}' for weight in paper)}."]
    for set_by in ("tuned", "learned"):
        stages = [stage for stage in weighted_stages(found) if stage.set_by == set_by]
        plans: dict[tuple[float, str], list[float]] = {}
        for stage in stages:
            plans.setdefault((stage.limit, stage.plan), []).append(stage.weight)
        several = [weights for weights in plans.values() if len(weights) > 1]
        rises, falls = (sum(sign * (w[-1] - w[0]) > 0.01 for w in several) for sign in (1, -1))
        thirds = [[s.weight for s in stages if i <= 3 * s.depth < i + 1] for i in range(3)]
        shown = ", ".join(f"{np.mean(third):.2f} (of {len(third)})" if third else "no stage" for third in thirds)
        lines.append(
            f"{set_by}: mean lambda {shown} in the first, second and last third of the depth; {_rank(stages)}; from "
            f"first to last stage it rises in {rises}, falls in {falls} and stays in {len(several) - rises - falls} of "
            f"the {len(several)} plans with several stages."
        )
    lines.append(
        "A stage that looks at attention alone counts as 1, at the picture alone as 0. The search space lets lambda "
        "rise from stage to stage and not fall; learning may do either."
    )
    return lines


def _rank(stages: Sequence[WeightedStage]) -> str:
    depths, weights = [s.depth for s in stages], [s.weight for s in stages]
    if len(set(depths)) < 2 or len(set(weights)) < 2 or len(stages) < 3:
        return "too few different stages for a rank correlation with depth"
    return f"rank correlation with depth {stats.spearmanr(depths, weights).statistic:+.2f}"


def depth_lines(found: Found) -> list[str]:
    """From which layer on each task does without image tokens."""
    depth = found["depth"]
    layers = sorted(map(int, depth["without"]))
    lines = []
    for task, dense in depth["dense"].items():
        kept = {layer: depth["without"][str(layer)][task] for layer in layers}
        enough = [layer for layer in layers if all(kept[i] >= KEEPS * dense for i in layers if i >= layer)]
        start = f"{task} ({100 * dense:.1f} % dense, {100 * kept[layers[0]]:.1f} % without image tokens)"
        if enough:
            lines.append(f"{start} keeps {KEEPS:.0%} of it with every image token dropped before layer {enough[0]}")
        else:
            deepest = f"before layer {layers[-1]} of {depth['num_layers']} leaves {100 * kept[layers[-1]]:.1f} %"
            lines.append(f"{start} needs them to the end: dropping all {deepest}")
    return lines


def variance_shares(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Two-way analysis of variance without replication, {schedule: {selector: score}}: shares of the sum of squares."""
    table = np.array([list(row.values()) for row in scores.values()])
    around = table - table.mean()
    total = float((around**2).sum())
    schedule = table.shape[1] * float((around.mean(axis=1) ** 2).sum())
    selector = table.shape[0] * float((around.mean(axis=0) ** 2).sum())
    parts = {"schedule": schedule, "selector": selector, "both together": max(0.0, total - schedule - selector)}
    return {name: part / total if total else 0.0 for name, part in parts.items()}


def variance_lines(found: Found) -> list[str]:
    """Whether the selector or the schedule matters more: shares of variance, and the champion's swaps."""
    lines = []
    for at in found["limits"]:
        scores, own = at["crossing"]["scores"], at["crossing"]["own"]
        shares = variance_shares(scores)
        champion = next(name for name in scores if name.startswith("tuned"))
        more = "schedule" if shares["schedule"] >= shares["selector"] else "selector"
        by_score = sorted(scores[champion].items(), key=lambda pair: -pair[1])
        (best, best_score), (least, least_score) = by_score[0], by_score[-1]
        # Where selectors differ by chance only, so does which one is best: its score is that of the best of several.
        hand_set = f"{100 * own[HAND_SET]:.1f} % as it is, {100 * scores[HAND_SET][best]:.1f} % with {best}"
        lines.append(
            f"at {at['limit']:g}x the {more} matters more: over {len(scores)} schedules x {len(scores[champion])} "
            f"selectors, the schedule explains {shares['schedule']:.0%} of the variance, the selector "
            f"{shares['selector']:.0%}, their fit {shares['both together']:.0%}. The champion's schedule "
            f"({100 * own[champion]:.1f} % as found) with one selector throughout is best with {best} "
            f"({100 * best_score:.1f} %) and worst with {least} ({100 * least_score:.1f} %); hand-set BTP's schedule "
            f"has {hand_set}."
        )
    return lines
