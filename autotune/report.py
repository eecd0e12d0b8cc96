"""Pictures of a study: the front as PNG, and as an interactive page that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from autotune.config import Limit
from autotune.objective import Told, front
from btp.plan import Plan

__all__ = ["write_front"]

FIXED = {"hand-set": "s", "hand-set at limit": "P", "hand-set, calibrated layers": "X", "random": "v", "uniform": "^"}
SCORE = "macro accuracy on `select`"


def describe(plan: Plan) -> str:
    """The schedule in one line a stage: layer, share kept, selector, lambda."""
    return "<br>".join(
        f"before layer {s.layer}: keep {s.keep:.2f}, {s.selector}, lambda {s.attention_weight:.2f}" for s in plan.stages
    )


def _latency(limit: Limit) -> str:
    return f"{limit.metric} {limit.quantile}, ratio to dense (measured)"


def write_front(told: Sequence[Told], tuned: Plan, limit: Limit, out: Path) -> None:
    """Write `front.png` and `front.html` into `out`."""
    _write_png(told, tuned, limit, out / "front.png")
    _write_html(told, tuned, limit, out / "front.html")


def _write_png(told: Sequence[Told], tuned: Plan, limit: Limit, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for t in told:
        if t.name in FIXED:
            axes.plot(t.ratio, t.score, FIXED[t.name], markersize=8, label=t.name)
            continue
        color = "tab:blue" if t.feasible else "0.7"
        width = [[t.ratio - t.ratio_low], [t.ratio_high - t.ratio]]
        axes.errorbar(t.ratio, t.score, xerr=width, fmt="o", color=color, markersize=4, elinewidth=0.6)
    axes.step(
        [t.ratio for t in front(told)], [t.score for t in front(told)], where="post", color="tab:blue", label="front"
    )
    axes.axvline(told[0].limit, color="tab:red", linestyle="--", label=f"limit {limit}")
    for t in told:
        if t.plan == tuned:
            axes.plot(t.ratio, t.score, "*", color="tab:orange", markersize=17, label="tuned", zorder=5)
            break
    axes.set(xlabel=_latency(limit), ylabel=SCORE)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path)


def _write_html(told: Sequence[Told], tuned: Plan, limit: Limit, path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    groups: dict[str, list[Told]] = {}
    for t in told:
        kind = t.name if t.name in FIXED else "trial" if t.feasible else "trial over the limit"
        groups.setdefault(kind, []).append(t)
    groups["tuned"] = [t for t in told if t.plan == tuned][:1]
    for name, members in groups.items():
        figure.add_trace(go.Scatter(name=name, mode="markers", **_points(members, size=16 if name == "tuned" else 9)))
    figure.add_trace(
        go.Scatter(
            name="front",
            x=[t.ratio for t in front(told)],
            y=[t.score for t in front(told)],
            mode="lines",
            line={"shape": "hv", "width": 1.5},
            hoverinfo="skip",
        )
    )
    figure.add_vline(x=told[0].limit, line_dash="dash", annotation_text=f"limit {limit}")
    figure.update_layout(xaxis_title=_latency(limit), yaxis_title=SCORE, template="plotly_white", title="Pareto front")
    figure.write_html(path, include_plotlyjs=True, full_html=True)


def _points(members: Sequence[Told], size: int) -> dict[str, Any]:
    texts = [
        f"<b>{t.name}</b><br>{t.score:.3f} at {t.ratio:.3f}x<br>"
        + "<br>".join(f"{task} {value:.2f}" for task, value in t.by_task.items())
        + f"<br>{describe(t.plan)}"
        for t in members
    ]
    errors = {
        "array": [t.ratio_high - t.ratio for t in members],
        "arrayminus": [t.ratio - t.ratio_low for t in members],
        "thickness": 0.8,
    }
    return {
        "x": [t.ratio for t in members],
        "y": [t.score for t in members],
        "error_x": errors,
        "marker": {"size": size},
        "hovertext": texts,
        "hoverinfo": "text",
    }
