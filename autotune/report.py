"""Pictures: a study's front as PNG and as an interactive page that needs no network, and a comparison as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autotune.config import Limit
from autotune.objective import Told, front
from btp.plan import WEIGHTED, Plan

__all__ = ["Point", "write_comparison", "write_front", "write_task_scores"]

FIXED = {
    "hand-set": "s",
    "hand-set at limit": "P",
    "hand-set, calibrated layers": "X",
    "learned by gradient": "D",
    "random": "v",
    "uniform": "^",
}
STYLES: dict[str, dict[str, Any]] = {
    "trial": {"fmt": "o", "color": "tab:blue", "label": "trial"},
    "published": {"fmt": "d", "color": "tab:green", "label": "published, at the limit"},
    "over the limit": {"fmt": "o", "color": "0.6", "label": "over the limit"},
    "stopped": {"fmt": "x", "color": "0.75", "label": "stopped early, on fewer samples"},
}
SCORE = "macro accuracy on `select`"
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito's
MARKERS = "*oosDvP^X<>ds"
LABEL_GAP = 0.062  # of a panel's height, from one label to the next


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One system in one panel. ratio, score: lower bound, value, upper bound. style: one a system, 0 for dense."""

    name: str
    style: int
    ratio: tuple[float, float, float]
    score: tuple[float, float, float]

    @property
    def color(self) -> str:
        return COLORS[(self.style - 1) % len(COLORS)] if self.style else "black"


def describe(plan: Plan) -> str:
    """The schedule in one line a stage: layer, share kept, selector, and lambda where the selector has one."""
    return "<br>".join(
        f"before layer {s.layer}: keep {s.keep:.2f}, {s.selector}"
        + (f", lambda {s.attention_weight:.2f}" if s.selector in WEIGHTED else "")
        for s in plan.stages
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
        if (kind := _kind(t)) in FIXED:
            name = kind if t.complete else f"{kind}, on {t.num_samples} samples"
            axes.plot(t.ratio, t.score, FIXED[kind], markersize=8, alpha=1.0 if t.complete else 0.4, label=name)
            continue
        width = [[t.ratio - t.ratio_low], [t.ratio_high - t.ratio]]
        axes.errorbar(t.ratio, t.score, xerr=width, markersize=4, elinewidth=0.6, **STYLES[kind])
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
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))  # one entry a name
    axes.legend(handles.values(), handles.keys(), fontsize=8)
    figure.savefig(path)


def _kind(t: Told) -> str:
    """What a trial is drawn as: a fixed plan by its name, the others by how they ended."""
    if t.name in FIXED:
        return t.name
    if not t.complete:
        return "stopped"
    if not t.feasible:
        return "over the limit"
    return "trial" if t.name.startswith("trial ") else "published"


def _write_html(told: Sequence[Told], tuned: Plan, limit: Limit, path: Path) -> None:
    import plotly.graph_objects as go

    figure = go.Figure()
    groups: dict[str, list[Told]] = {}
    for t in told:
        groups.setdefault(_kind(t), []).append(t)
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
        f"<b>{t.name}</b><br>{t.score:.3f} on {t.num_samples}, KL {t.proxy:.3f}, at {t.ratio:.3f}x<br>"
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


def write_comparison(panels: Mapping[str, Sequence[Point]], score: str, path: Path) -> None:
    """Write the panels, score over measured latency, one below the other, every point labelled at the right edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.6 + 4.2 * len(panels)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)
    for axes, (title, points) in zip(grid[:, 0], panels.items(), strict=True):
        for point in points:
            _draw_point(axes, point)
        axes.axvline(1.0, color="0.6", linestyle=":", linewidth=1)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_ylabel(score)
        axes.grid(alpha=0.3)
    grid[-1, 0].set_xlabel("prefill p50, ratio to dense (measured)")
    for axes, points in zip(grid[:, 0], panels.values(), strict=True):
        _label_points(axes, points)
    figure.savefig(path)


def write_task_scores(panels: Mapping[str, Mapping[str, Mapping[str, float]]], score: str, path: Path) -> None:
    """Write a panel a budget, one beside the other: systems down, tasks across, the score in percent in each cell."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = max(map(len, panels.values()))
    figure = Figure(figsize=(1.6 + 4.4 * len(panels), 1.2 + 0.34 * rows), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    image: Any = None
    for index, (axes, (title, scores)) in enumerate(
        zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True)
    ):
        tasks = list(next(iter(scores.values())))
        cells = [[100 * by_task[task] for task in tasks] for by_task in scores.values()]
        image = axes.imshow(cells, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                color = "black" if value > 55 else "white"
                axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", fontsize=8)
        axes.set_yticks(range(len(scores)), list(scores) if index == 0 else [], fontsize=8)
        axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(image, ax=figure.axes, label=score, shrink=0.8)
    figure.savefig(path)


def _draw_point(axes: Any, point: Point) -> None:
    (x_low, x, x_high), (y_low, y, y_high) = point.ratio, point.score
    marker = MARKERS[point.style % len(MARKERS)]
    axes.errorbar(
        *(x, y, [[y - y_low], [y_high - y]], [[x - x_low], [x_high - x]]),
        fmt=marker,
        color=point.color,
        markersize=13 if marker == "*" else 7,
        elinewidth=0.7,
        alpha=0.9,
    )


def _label_points(axes: Any, points: Sequence[Point]) -> None:
    """Names in a column right of the panel, in the order of the scores, each with a line to its point."""
    low, high = axes.get_ylim()
    ordered = sorted(points, key=lambda point: (point.score[1], -point.ratio[1]))
    heights = _spread([(point.score[1] - low) / (high - low) for point in ordered])
    for point, height in zip(ordered, heights, strict=True):
        axes.annotate(
            point.name,
            xy=(point.ratio[1], point.score[1]),
            xytext=(1.03, height),
            textcoords="axes fraction",
            fontsize=9,
            color=point.color,
            va="center",
            arrowprops={"arrowstyle": "-", "color": point.color, "linewidth": 0.5, "alpha": 0.5, "shrinkB": 4},
        )


def _spread(heights: Sequence[float]) -> list[float]:
    """Rising heights moved apart to at least `LABEL_GAP`, crowds about their own middle, all within [0, 1] if they fit.

    Less index x gap, they must not fall: isotonic regression by pooling neighbours that do.
    """
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pool = [height - index * LABEL_GAP]
        while pools and sum(pools[-1]) * len(pool) > sum(pool) * len(pools[-1]):
            pool = pools.pop() + pool
        pools.append(pool)
    highest = max(0.0, 1 - LABEL_GAP * (len(heights) - 1))
    level = [min(max(sum(pool) / len(pool), 0.0), highest) for pool in pools for _ in pool]
    return [base + index * LABEL_GAP for index, base in enumerate(level)]
