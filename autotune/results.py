"""What a comparison found: a row for each system and budget, as plain data, as cells of a table and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from autotune.certify import Interval
from btp.plan import Plan

__all__ = ["HEADINGS", "Comparison", "Result"]

HEADINGS = ("system", "tokens", "GFLOPs", "latency", "macro %", "worst task %", "MiB")


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One system at one budget; dense has none.

    name: in `btp.presets.SYSTEMS`; title: as printed. tokens_mean: over layers, zeros included; tokens_literal: kept at
    the last stage that keeps any. image_gflops: of the image tokens alone, and flops_share what share of dense's they
    are. latency: prefill p50, ratio to dense, which took dense_ms beside it. minus_dense: paired, of macro accuracy.
    cache_bytes: of the median prompt. carried_out: share of the samples whose conditional stages were carried out;
    None for a plan without such stages. moved_out: the system prunes inside the decoder, but the budget is under what
    one dense layer costs, so that it had to cut before the first.
    """

    name: str
    title: str
    reference: str
    fraction: float | None
    plan: Plan
    tokens_mean: float
    tokens_literal: int
    image_gflops: float
    flops_share: float
    latency: Interval
    dense_ms: float
    macro: Interval
    minus_dense: Interval
    worst_task: str
    worst: Interval
    by_task: Mapping[str, float]
    cache_bytes: float
    carried_out: float | None
    moved_out: bool

    def cells(self) -> tuple[str, ...]:
        """Under `HEADINGS`."""
        return (
            self.title,
            f"{round(self.tokens_mean, 1):g}/{self.tokens_literal}",
            f"{_short(self.image_gflops)} {self.flops_share:.0%}",
            f"{self.latency:.2f}",
            _percent(self.macro),
            f"{self.worst_task} {100 * self.worst.value:.1f}",
            _short(self.cache_bytes / 2**20),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_dict(), "plan_digest": self.plan.digest}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Every result, and what they rest on.

    calibrated_layers, withdrawal_layer: None where no system asked, and where VTW's search found no layer.
    """

    command: str
    model: str
    model_digest: str
    data_digests: Mapping[str, str]
    split: str
    num_questions: int
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    num_layers: int
    num_image_tokens: int
    num_text_tokens: int
    fractions: tuple[float, ...]
    calibrated_layers: tuple[int, ...] | None
    withdrawal_layer: int | None
    dense: Result
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        rows = [result.to_dict() for result in (self.dense, *self.results)]
        kept = {name: value for name, value in asdict(self).items() if name not in ("dense", "results")}
        return {**kept, "notes": self.notes(), "results": rows}

    def at(self, fraction: float) -> tuple[Result, ...]:
        """Dense and every system at one budget, in the order they were run."""
        return self.dense, *(result for result in self.results if result.fraction == fraction)

    def title(self, fraction: float) -> str:
        return f"FLOPs of {fraction * self.num_image_tokens:.0f} of {self.num_image_tokens} image tokens in every layer"

    def by_task(self, fraction: float) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Accuracy by task at one budget, in percent: headings and cells, a system a row."""
        tasks = tuple(self.dense.by_task)
        rows = [(r.title, *(f"{100 * r.by_task[task]:.1f}" for task in tasks)) for r in self.at(fraction)]
        return ("system", *tasks), rows

    def notes(self) -> list[str]:
        """How the columns are to be read, a sentence or two each."""
        notes = [
            f"{self.num_questions} questions of `{self.split}`; intervals are 95 %, bootstrapped over pictures; the "
            "worst task keeps least of its dense accuracy.",
            "tokens: mean over layers / kept by the last stage that keeps any. GFLOPs: image tokens in the decoder, "
            "share of dense.",
            f"latency: prefill p50 on {self.device['name']}, ratio to dense measured in turns. MiB: key-value cache of "
            f"the median prompt ({self.num_image_tokens} image and {self.num_text_tokens} text tokens).",
        ]
        if self.calibrated_layers is not None:
            layers = ", ".join(map(str, self.calibrated_layers))
            notes.append(
                f"BTP and the controls start from stages before layers {layers} of {self.num_layers}, as calibrated. A "
                "budget scales every system's layers and keep fractions together."
            )
        if any(result.name == "vtw" for result in self.results):
            layer = "no layer" if self.withdrawal_layer is None else f"layer {self.withdrawal_layer}"
            notes.append(
                f"VTW's layer search found {layer} of {self.num_layers}. It spends whole layers and nothing finer, so "
                "it stays under the budget."
            )
        if moved := dict.fromkeys(result.title for result in self.results if result.moved_out):
            notes.append(
                f"{', '.join(moved)} had to cut before the first layer where the budget is under what one dense layer "
                "costs: no layer has attended to anything there."
            )
        if shares := {r.carried_out for r in self.results if r.carried_out is not None}:
            low, high = min(shares), max(shares)
            share = f"{100 * low:.0f} %" if low == high else f"{100 * low:.0f} to {100 * high:.0f} %"
            notes.append(
                f"ToDRE's conditional last drop was carried out on {share} of the prompts; its tokens, FLOPs and cache "
                "are means of what was realised while answering."
            )
        return notes

    def markdown(self) -> str:
        """Two tables a budget, all figures and accuracy by task, and the notes."""
        parts = [f"`{self.command}`"]
        for fraction in self.fractions:
            rows = self.at(fraction)
            headings = (*HEADINGS[:5], "minus dense", *HEADINGS[5:])
            full = [(*r.cells()[:5], _minus(r), *r.cells()[5:]) for r in rows]
            parts += [f"**{self.title(fraction)}**", _table(headings, full)]
            parts += ["Accuracy by task, %:", _table(*self.by_task(fraction))]
        return "\n\n".join([*parts, "\n".join(f"- {note}" for note in self.notes())]) + "\n"


def _short(number: float) -> str:
    """Five characters of any number under 100000."""
    return f"{number:.3f}" if number < 10 else f"{number:.1f}" if number < 1000 else f"{number:.0f}"


def _percent(interval: Interval, sign: str = "") -> str:
    value, low, high = (100 * part for part in (interval.value, interval.low, interval.high))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def _minus(result: Result) -> str:
    return "" if result.fraction is None else _percent(result.minus_dense, sign="+")


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
