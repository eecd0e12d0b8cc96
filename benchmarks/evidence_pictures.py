"""The evidence in pictures: accuracy against measured latency, and lambda over depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.evidence_findings import WeightedStage, weighted_stages
from benchmarks.evidence_plans import HAND_SET
from btp import presets

__all__ = ["rows_of", "write_front", "write_lambda"]

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
MARKERS = "osDvP^X<>dshp"
OURS = {"tuned": ("*", 14), "learned": ("D", 8)}  # drawn in black: marker and its size

Found = Mapping[str, Any]


def rows_of(at: Found) -> list[Any]:
    """The rows as they are listed, with the mean over the tuned plans after them."""
    rows = [row for row in at["rows"] if row["kind"] not in ("tuned", "learned")]
    seeds = [row for row in at["rows"] if row["kind"] == "tuned"]
    mean = {
        "name": "tuned",
        "title": f"**tuned, mean of {len(seeds)}**",
        "kind": "mean",
        "reached": True,
        "latency": {part: sum(row["latency"][part] for row in seeds) / len(seeds) for part in ("value", "low", "high")},
        "minus_hand_set": at["minus"]["tuned"][HAND_SET],
        **at["tuned"],
    }
    return [*rows, *seeds, mean, *(row for row in at["rows"] if row["kind"] == "learned")]


def write_front(founds: Sequence[Found], path: Path) -> None:
    """A panel a model: macro accuracy over measured latency, a line a system through all limits, with intervals."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6 * len(founds)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, found in zip(figure.subplots(len(founds), squeeze=False)[:, 0], founds, strict=True):
        lines: dict[str, list[Any]] = {}
        for at in found["limits"]:
            axes.axvline(at["limit"], color="0.6", linestyle=":", linewidth=1)
            for row in rows_of(at):
                if row["kind"] != "tuned":
                    lines.setdefault(row["name"], []).append(row)
        for index, rows in enumerate(lines.values()):
            _draw_system(axes, rows, index)
        axes.set(xlabel="prefill p50, ratio to dense (measured)", ylabel="macro accuracy on `certify`, %")
        axes.set_title(found["model"])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.savefig(path)


def _draw_system(axes: Any, rows: Sequence[Found], index: int) -> None:
    """One system at every limit. index: of dense 0, the others have colors and markers by it."""
    rows = sorted(rows, key=lambda row: row["latency"]["value"])[: 1 if index == 0 else None]
    latency, macro = ([row[key] for row in rows] for key in ("latency", "macro"))
    spread = [[100 * abs(m[end] - m["value"]) for m in macro] for end in ("low", "high")]
    marker, size = OURS.get(rows[0]["name"], (MARKERS[index % len(MARKERS)], 5))
    is_ours = rows[0]["name"] in OURS or index == 0
    axes.errorbar(
        [one["value"] for one in latency],
        [100 * one["value"] for one in macro],
        yerr=spread,
        marker=marker,
        markersize=size,
        color="black" if is_ours else COLORS[index % len(COLORS)],
        linewidth=1.8 if is_ours else 0.9,
        elinewidth=0.6,
        zorder=3 if is_ours else 2,
        label=rows[0]["title"].strip("*"),
    )


def write_lambda(founds: Sequence[Found], path: Path) -> None:
    """A panel a model: lambda of every stage over its depth, tuned and learned, a color a limit, and the paper's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2 * len(founds)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, found in zip(figure.subplots(len(founds), squeeze=False)[:, 0], founds, strict=True):
        for color, at in zip(COLORS, found["limits"], strict=False):
            here = [stage for stage in weighted_stages(found) if stage.limit == at["limit"]]
            _draw_plans(axes, [s for s in here if s.set_by == "tuned"], color, "o:", f"tuned, {at['limit']:g}x")
            _draw_plans(axes, [s for s in here if s.set_by == "learned"], color, "D-", f"learned, {at['limit']:g}x")
        paper = presets.btp_paper(found["num_layers"]).stages
        depths, weights = zip(*((s.layer / found["num_layers"], s.attention_weight) for s in paper), strict=True)
        axes.plot(depths, weights, "k--s", label="BTP (paper)")
        axes.set(xlabel="depth, share of the decoder", ylabel="lambda", title=found["model"], ylim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path)


def _draw_plans(axes: Any, stages: Sequence[WeightedStage], color: str, style: str, label: str) -> None:
    """A line a plan, one entry in the legend."""
    for plan in dict.fromkeys(stage.plan for stage in stages):
        own = [stage for stage in stages if stage.plan == plan]
        weights = [stage.weight for stage in own]
        axes.plot([s.depth for s in own], weights, style, color=color, alpha=0.7, markersize=5, label=label)
        label = "_"
