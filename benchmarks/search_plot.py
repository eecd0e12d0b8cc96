"""Curves of what searches found, trial by trial."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_curves"]

COLORS = {"gp": "#0072B2", "tpe": "#D55E00", "nsga2": "#009E73", "qmc": "#CC79A7", "random": "#000000"}
ROWS = {"hypervolume": "share of the best hypervolume", "best_score": "best feasible macro accuracy"}


def write_curves(found: Mapping[str, Any], path: Path) -> None:
    """Hypervolume and best score against trials, a column a space; dashed by the whole front, dotted with racing.

    Dash-dotted where the published systems are tried first.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ROWS), len(found["spaces"]), sharex=True, squeeze=False)
    for column, (space, result) in enumerate(found["spaces"].items()):
        for row, (quantity, label) in enumerate(ROWS.items()):
            axes = panels[row][column]
            for name, searcher in result["searchers"].items():
                color = COLORS[name.split(",")[0]]
                style = "--" if "front" in name else "-." if "first" in name else "-"
                curve = searcher["plain"][quantity]
                axes.plot(range(1, len(curve) + 1), curve, style, color=color, label=name)
                if name == "gp":
                    raced = searcher["raced"][quantity]
                    axes.plot(range(1, len(raced) + 1), raced, ":", color=color, label="gp, racing")
            if quantity == "hypervolume":
                axes.axhline(result["target"], color="0.6", linewidth=0.8, label="random search's, in the end")
                axes.set_title(f"{space}: {result['num_plans']} plans, {found['seeds']} seeds")
            curves = [s["plain"][quantity] for s in result["searchers"].values()]
            axes.set(xscale="log", ylabel=label, ylim=(min(c[min(7, len(c) - 1)] for c in curves), None))
            axes.grid(alpha=0.3, which="both")
        panels[-1][column].set_xlabel("trials")
    panels[0][0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
