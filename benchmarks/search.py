"""What samplers find in how many trials, and what racing saves: studies replayed on the reference VLM's recorded plans.

    python -m benchmarks.search [--small] [--seeds N] [--table FILE] [--out FILE] [--plot FILE]

The table holds every plan of a grid over the reference search space (`benchmarks.grid`), scored sample by sample; a
study of it asks, races and learns as a job's does, at the ratio of multiply-accumulates instead of a measured latency;
`published first` tries what a job does before it draws, the others leave that out. Hypervolume is the area between a
front and the reference point (lowest score of the space, ratio 1), as a share of what all plans of the space have.
Random search's hypervolume after 400 trials, the median of the seeds, is what the others are timed against. Writes JSON
and a picture.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

from autotune.objective import Told, front, steering
from autotune.racing import ERROR_RATE
from autotune.samplers import MAX_GP, NUM_START, SAMPLERS
from benchmarks.grid import GRID, LIMIT, Grid
from benchmarks.machine import ROOT, default_path, setting
from benchmarks.replay import Searcher, errors_of_racing, replay, saved
from benchmarks.search_plot import write_curves
from benchmarks.search_summary import WITHIN, Scale, Sizes, of_errors, of_runs
from benchmarks.table import markdown
from benchmarks.tabular import TABLE, Table

LEARNERS = ("gp", "nsga2", "tpe")
SPACES = {"whole": GRID, "inside": GRID.restricted(before=False, selector_before="max_sum")}
"""`inside`: no stage before layer 0, as in BTP."""
LONG = 400  # trials of random search, whose hypervolume a tuner is to reach in `WITHIN`
SMALL = ROOT / "runs" / "search-small"


FULL = Sizes(seeds=10, trials=100, long=LONG, checkpoints=(10, 20, WITHIN, 60, 100))
FEW = Sizes(seeds=1, trials=14, long=30, checkpoints=(10, 14))


def searchers(grid: Grid) -> list[Searcher]:
    """Every sampler by the loss alone, those that learn by the whole front as well; on all plans, what a job does."""
    plain = [Searcher(name, whole) for name in SAMPLERS for whole in (False, True) if name in LEARNERS or not whole]
    return [*plain, Searcher(SAMPLERS[0], published_first=True)] if grid == GRID else plain


def of_space(table: Table, grid: Grid, sizes: Sizes) -> dict[str, Any]:
    """Every searcher on one space, with racing and without."""
    plans = [table.told(number) for number in table.numbers(grid)]
    scale = Scale.of(plans)
    plain = {searcher: replays(table, grid, searcher, sizes, racing=False) for searcher in searchers(grid)}
    target = median(scale.curve(told)[-1] for told in plain[Searcher("random")].studies)
    return {
        "settings": {name: list(levels) for name, levels in grid.free.items()},
        "num_cells": len(list(grid.cells())),
        "num_plans": len(plans),
        "reference_point": scale.reference,
        "best_score": max(t.score for t in plans),
        "front": [{"score": t.score, "ratio": t.ratio, "plan": t.plan.to_dict()} for t in front(plans)],
        "correlation": steering(plans).correlation,
        "target": target,
        "searchers": {
            str(searcher): of_searcher(
                table, run, replays(table, grid, searcher, sizes, racing=True), scale, target, sizes
            )
            for searcher, run in plain.items()
        },
    }


@dataclass(frozen=True, slots=True)
class Replays:
    """Studies by seed, and the processor's seconds that a trial took."""

    studies: list[list[Told]]
    seconds: float


def replays(table: Table, grid: Grid, searcher: Searcher, sizes: Sizes, *, racing: bool) -> Replays:
    num_trials = sizes.long if searcher.sampler == "random" and not racing else sizes.trials
    started = time.process_time()
    studies = [replay(table, grid, searcher, seed, num_trials, racing=racing) for seed in range(sizes.seeds)]
    seconds = (time.process_time() - started) / (num_trials * sizes.seeds)
    print(f"{searcher}, {'with' if racing else 'without'} racing: {seconds:.3f} s a trial", file=sys.stderr)
    return Replays(studies, seconds)


def of_searcher(
    table: Table, plain: Replays, raced: Replays, scale: Scale, target: float, sizes: Sizes
) -> dict[str, Any]:
    """What it finds without racing and with it, and what racing would have done to the trials without it."""
    again = [errors_of_racing(table, told[: sizes.trials]) for told in plain.studies]
    share = fmean(saved(told, len(table.tasks)) for told in raced.studies)
    return {
        "seconds_a_trial": plain.seconds,
        "plain": of_runs(plain.studies, scale, target, sizes),
        "raced": of_runs(raced.studies, scale, target, sizes) | {"saved": share},
        "errors": of_errors(again, scale),
    }


def table_of(found: Mapping[str, Any]) -> str:
    """A line a searcher and space."""
    columns = ["space", "searcher", "hypervolume", f"best score at {found['checkpoint']}", "trials to target"]
    columns += [f"within {WITHIN}", "plans/trials", "raced: hypervolume", "saved", "wrong stops", "fronts changed"]
    columns += ["correlation, raced"]
    lines = []
    for space, result in found["spaces"].items():
        for name, row in result["searchers"].items():
            lines.append([space, name, *_cells(row, str(found["checkpoint"]), found["seeds"])])
    return markdown(columns, lines)


def _cells(row: Mapping[str, Any], at: str, num_seeds: int) -> list[str]:
    plain, raced, errors = row["plain"], row["raced"], row["errors"]
    reached = sorted(LONG + 1 if number is None else number for number in plain["trials_to_target"])
    middle = reached[len(reached) // 2]
    correlations = [
        f"{fmean(known):.2f}" if (known := [c for c in run["correlation"][at] if c is not None]) else "none"
        for run in (plain, raced)
    ]
    return [
        f"{fmean(plain['hypervolume_by_seed'][at]):.4f} [{min(plain['hypervolume_by_seed'][at]):.4f}]",
        f"{fmean(plain['best_score_by_seed'][at]):.4f}",
        "not reached" if middle > LONG else str(middle),
        f"{plain['within']} of {num_seeds}",
        f"{plain['distinct_plans']:.2f}",
        f"{fmean(raced['hypervolume_by_seed'][at]):.4f} [{min(raced['hypervolume_by_seed'][at]):.4f}]",
        f"{raced['saved']:.0%}",
        f"{errors['wrong']} of {errors['num_plans']}",
        f"{errors['fronts_changed']} of {errors['fronts']}",
        ", ".join(correlations),
    ]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="one seed and a few trials, for a smoke test")
    parser.add_argument("--seeds", type=int, default=None, help=f"by default {FULL.seeds}")
    parser.add_argument("--table", type=Path, default=TABLE)
    parser.add_argument("--commit", default=None, help="the commit, where git cannot tell")
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--plot", type=Path, default=None)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    sizes = FEW if options.small else FULL
    sizes = replace(sizes, seeds=options.seeds or sizes.seeds)
    table = Table.load(options.table)
    found = {
        **setting("benchmarks.search", arguments, options.commit),
        "device": table.device,
        "data": table.data,
        "limit": LIMIT,
        "seeds": sizes.seeds,
        "checkpoint": WITHIN if WITHIN in sizes.checkpoints else sizes.checkpoints[-1],
        "samples": len(table.tasks),
        "dense_score": table.told(0).score,
        "constants": {"NUM_START": NUM_START, "MAX_GP": MAX_GP, "ERROR_RATE": ERROR_RATE},
        "spaces": {name: of_space(table, grid, sizes) for name, grid in SPACES.items()},
    }
    out = options.out or (SMALL.with_suffix(".json") if options.small else default_path("search", table.device))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    out.write_text(text + "\n", encoding="utf-8")
    found = json.loads(text)
    plot = options.plot or (SMALL.with_suffix(".png") if options.small else ROOT / "docs" / "search.png")
    write_curves(found, plot)
    print(table_of(found))
    print(out, plot, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
