"""The comparison: every published system at equal FLOPs, on the same questions and the same device.

Each step can be killed; running the comparison again with the same settings takes up where it stopped.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any

from autotune.bench import Bench
from autotune.certify import Interval
from autotune.config import CompareConfig, Limit, check_folder
from autotune.data import Example
from autotune.evaluation import Scores, is_conditional
from autotune.report import Point, write_comparison, write_task_scores
from autotune.results import Comparison, Result
from btp import presets
from btp.budget import fit_flops
from btp.cost import image_token_flops, kv_cache_bytes, mean_tokens, token_counts, tokens_per_layer
from btp.plan import Plan, round_half_up
from btp.presets import SYSTEMS

__all__ = ["Progress", "paths", "run"]

Progress = Callable[[str, int, int], None]
"""Told of every step: what is going on, steps done, steps in all."""

PREFILL = Limit("prefill", "p50", 1.0, "x")  # the latency that is measured
CALIBRATED = ("btp_paper", "btp_released", "random", "uniform")
Counts = tuple[int, ...]


def run(config: CompareConfig, splits: Mapping[str, Sequence[Example]], progress: Progress) -> Comparison:
    """Compare the systems, and write compare.json, .md and .png. Raises AutotuneError or BTPError."""
    rivals = [name for name in config.systems if name != "dense"]
    steps = count()

    def say(what: str) -> None:
        progress(what, next(steps), 3 + len(rivals) * len(config.fractions))

    check_folder(config.out)
    say("loading the model")
    bench = Bench(config, splits, PREFILL)
    if config.fresh:
        bench.results.forget()
    say("calibrating")
    layers, withdrawal = _calibrate(config, bench)
    say("answering with dense")
    judge = _Judge(config, bench)
    starts = _starting_plans(rivals, judge.num_layers, layers, withdrawal)
    results = [judge.result("dense", None, SYSTEMS["dense"].plan(judge.num_layers))]
    for fraction in config.fractions:
        for name, plan in starts.items():
            say(f"{SYSTEMS[name].name} at {fraction:g}")
            results.append(judge.result(name, fraction, judge.fitted(plan, fraction), start=plan))
    found = Comparison(
        **_setting(config, bench, judge),
        calibrated_layers=layers,
        withdrawal_layer=withdrawal,
        dense=results[0],
        results=tuple(results[1:]),
    )
    _write(config, found)
    return found


def _setting(config: CompareConfig, bench: Bench, judge: _Judge) -> dict[str, Any]:
    """What was run, on what, and where."""
    return {
        "command": config.command,
        "model": config.model,
        "model_digest": bench.model_digest,
        "data_digests": bench.data_digests,
        "split": config.split,
        "num_questions": len(bench.splits[config.split]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("btp-autotune", "torch", "transformers")},
        },
        "device": asdict(bench.key),
        "num_layers": judge.num_layers,
        "num_image_tokens": bench.key.image_tokens,
        "num_text_tokens": judge.num_text_tokens,
        "fractions": config.fractions,
    }


def _calibrate(config: CompareConfig, bench: Bench) -> tuple[tuple[int, ...] | None, int | None]:
    """BTP's stage layers and VTW's layer for this model, each only where a system asks."""
    layers = withdrawal = None
    if set(config.systems) & set(CALIBRATED):
        num_stages = len(presets.btp_paper(bench.anatomy.decoder.num_layers).stages)
        kept = bench.results.once(f"calibration-{config.seed}", lambda: {"layers": bench.calibrated_layers(num_stages)})
        layers = tuple(kept["layers"])
    if "vtw" in config.systems:
        kept = bench.results.once(f"withdrawal-{config.seed}", lambda: {"layer": bench.withdrawal_layer()})
        withdrawal = kept["layer"]
    return layers, withdrawal


def _starting_plans(
    names: Sequence[str], num_layers: int, layers: tuple[int, ...] | None, withdrawal: int | None
) -> dict[str, Plan]:
    """Each system's own plan for this model, before a budget is asked of it."""
    paper = presets.btp_paper(num_layers, layers=layers)
    searched = {
        "btp_paper": paper,
        "btp_released": presets.btp_released(num_layers, layers=layers),
        "vtw": presets.vtw(num_layers, layer=withdrawal),
        "random": presets.random_control(paper),
        "uniform": presets.uniform_control(paper),
    }
    return {name: searched.get(name, SYSTEMS[name].plan(num_layers)) for name in names}


class _Judge:
    """Fits plans to budgets, and judges each by its answers, its measured latency and its counted cost."""

    def __init__(self, config: CompareConfig, bench: Bench) -> None:
        self._config, self._bench = config, bench
        self._decoder, self._num_image_tokens = bench.anatomy.decoder, bench.key.image_tokens
        self.num_layers = self._decoder.num_layers
        self.num_text_tokens = bench.num_text_tokens(config.split)
        self._dense = bench.scores(Plan(stages=()), config.split)
        self._dense_flops = self._flops((self._num_image_tokens,) * self.num_layers)

    def fitted(self, plan: Plan, fraction: float) -> Plan:
        """The system's plan with the FLOPs of `fraction` of the image tokens, to the nearest token, in every layer."""
        num_tokens = max(1, round_half_up(fraction * self._num_image_tokens))
        return fit_flops(
            plan,
            self._flops((num_tokens,) * self.num_layers),
            num_layers=self.num_layers,
            num_image_tokens=self._num_image_tokens,
            hidden_size=self._decoder.hidden_size,
            intermediate_size=self._decoder.intermediate_size,
        )

    def result(self, name: str, fraction: float | None, plan: Plan, start: Plan | None = None) -> Result:
        """What is found of a plan; `start` is the system's own, before the budget was asked of it."""
        bench, split = self._bench, self._config.split
        found, table = bench.scores(plan, split), bench.table(split)
        latency, dense_ms = bench.kept_ratio(plan)
        worst_task, worst = table.worst_task(found.scores, self._dense.scores)
        weighed = self._weighed_counts(plan, found)
        flops = sum(share * self._flops(counts) for counts, share in weighed.items())
        full = tokens_per_layer(plan, self.num_layers, self._num_image_tokens, conditional=False)
        return Result(
            name=name,
            title=SYSTEMS[name].name,
            reference=SYSTEMS[name].reference,
            fraction=fraction,
            plan=plan,
            tokens_mean=sum(share * mean_tokens(counts) for counts, share in weighed.items()),
            tokens_literal=token_counts(plan, self.num_layers, self._num_image_tokens).literal,
            image_gflops=flops / 1e9,
            flops_share=flops / self._dense_flops,
            latency=latency if plan.stages else Interval(1.0, 1.0, 1.0),
            dense_ms=dense_ms,
            macro=table.macro(found.scores),
            minus_dense=table.difference(found.scores, self._dense.scores),
            worst_task=worst_task,
            worst=worst,
            by_task=table.by_task(found.scores),
            cache_bytes=sum(share * self._cache_bytes(counts) for counts, share in weighed.items()),
            carried_out=1 - weighed.get(full, 0.0) if is_conditional(plan) else None,
            moved_out=start is not None and bool(plan.stages) and plan.stages[0].layer < min(1, start.stages[0].layer),
        )

    def _weighed_counts(self, plan: Plan, found: Scores) -> dict[Counts, float]:
        """Image tokens by layer, and the share of prompts that had them: as planned or, where it depends, realised."""
        if not is_conditional(plan):
            return {tokens_per_layer(plan, self.num_layers, self._num_image_tokens): 1.0}
        num_samples = sum(num for _, num in found.realised)
        return {counts: num / num_samples for counts, num in found.realised}

    def _flops(self, counts: Counts) -> int:
        return image_token_flops(counts, self._decoder.hidden_size, self._decoder.intermediate_size)

    def _cache_bytes(self, counts: Counts) -> int:
        size = self._bench.model.dtype.itemsize
        return kv_cache_bytes(self._decoder, counts, self.num_text_tokens, bytes_per_number=size)


def paths(config: CompareConfig) -> tuple[Path, Path, Path, Path]:
    """The files a comparison writes: all figures as JSON, the tables as Markdown, accuracy against latency, by task."""
    names = ("compare.json", "compare.md", "compare.png", "compare-tasks.png")
    figures, tables, picture, tasks = (config.out / name for name in names)
    return figures, tables, picture, tasks


def _write(config: CompareConfig, found: Comparison) -> None:
    figures, tables, picture, tasks = paths(config)
    figures.write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    tables.write_text(found.markdown(), encoding="utf-8")
    panels = {found.title(fraction): [_point(row) for row in found.at(fraction)] for fraction in found.fractions}
    score = f"macro accuracy on {found.split}, %"
    write_comparison(panels, score, picture)
    by_task = {
        found.title(fraction): {row.title: row.by_task for row in found.at(fraction)} for fraction in found.fractions
    }
    write_task_scores(by_task, f"accuracy on {found.split}, %", tasks)


def _point(row: Result) -> Point:
    ratio, macro = row.latency, row.macro
    return Point(
        name=row.title,
        style=list(SYSTEMS).index(row.name),
        ratio=(ratio.low, ratio.value, ratio.high),
        score=(100 * macro.low, 100 * macro.value, 100 * macro.high),
    )
