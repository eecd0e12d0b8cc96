"""How often does a measurement, made again, land inside the interval of the first? On the reference VLM.

    python -m benchmarks.repeatability [--times 30] [--repeats 40] [--small] [--max-others 0.1] [--out FILE]

Measures a few plans in turns, `--times` times over, each measurement with its own warm-up. Counted are, for every plan
and metric, the ordered pairs in which one measurement's ratio lies inside the other's interval, and the measurements
whose confidence interval holds the median of all the others. Writes JSON; exits 1 where fewer than 9 of 10 pairs of the
p50 lie inside.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import torch

from autotune import data, reference
from autotune.evaluation import prompt_inputs
from benchmarks import machine
from btp import BusyDeviceError, LatencyBlocks, Plan, measure, presets
from btp.intervals import Interval

TARGET = 0.9
QUANTILES = {"p50": 0.5, "p95": 0.95}


def plans() -> dict[str, Plan]:
    """A mild one, one of three stages, and one that leaves a tenth."""
    return {
        "fastv": presets.fastv(8),
        "btp_paper": presets.btp_paper(8, layers=(1, 2, 4)),
        "divprune": presets.divprune(8),
    }


def inside(intervals: Sequence[Interval]) -> float:
    """Share of the ordered pairs in which the second measurement's value lies in the first one's interval."""
    pairs = list(permutations(intervals, 2))
    return sum(first.low <= second.value <= first.high for first, second in pairs) / len(pairs)


def around_the_others(intervals: Sequence[Interval]) -> float:
    """Share of the measurements whose interval holds the median of all the others' values."""
    found = 0
    for index, interval in enumerate(intervals):
        others = [other.value for place, other in enumerate(intervals) if place != index]
        found += interval.low <= median(others) <= interval.high
    return found / len(intervals)


def lag_one(values: Sequence[float]) -> float:
    """Autocorrelation of neighbours in time; near 0 where one says nothing of the next."""
    centred = [value - fmean(values) for value in values]
    power = sum(value * value for value in centred)
    return sum(a * b for a, b in pairwise(centred)) / power if power else 0.0


def summary(measured: Sequence[LatencyBlocks], metric: Any, quantile: float) -> dict[str, Any]:
    """How well measurements of one plan agree."""
    repeated = [blocks.repeated_ratio(quantile, metric) for blocks in measured]
    confident = [blocks.ratio(quantile, metric) for blocks in measured]
    values = [interval.value for interval in repeated]
    ratios = [
        pruned / dense
        for blocks in measured
        for pruned, dense in zip(blocks.pruned_ms(metric), blocks.dense_ms(metric), strict=True)
    ]
    return {
        "median": median(values),
        "spread": pstdev(values) / fmean(values),
        "pairs_inside": inside(repeated),
        "pairs_inside_confidence_interval": inside(confident),
        "others_median_inside_confidence_interval": around_the_others(confident),
        "width": fmean(interval.high - interval.low for interval in repeated) / median(values),
        "lag_one_of_blocks": lag_one(ratios),
        "lag_one_of_measurements": lag_one(values),
        "values": values,
    }


def repeated(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Every measurement as it came: when, and its blocks; a plan's turn that the device was too busy for says why."""
    model, processor = reference.load()
    inputs = prompt_inputs(processor, data.from_dataset(reference.dataset("calibrate"), "calibrate")[:1], "cpu")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in plans()}
    start = time.monotonic()
    for _ in range(options.times):
        for name, plan in plans().items():
            entry: dict[str, Any] = {"at_s": time.monotonic() - start, "load": os.getloadavg()[0]}
            try:
                entry["blocks"] = measure(
                    model, inputs, plan, repeats=options.repeats, max_others=options.max_others, max_refused=30
                )
            except BusyDeviceError as error:
                entry["busy"] = str(error)
            found[name].append(entry)
            print(f"{name} {len(found[name])}/{options.times} {entry.get('busy', '')}", file=sys.stderr)
            if time.monotonic() - start > options.budget_s:
                return found
    return found


def logged(entry: dict[str, Any]) -> dict[str, Any]:
    """What the device did during one measurement."""
    if "busy" in entry:
        return entry
    blocks: LatencyBlocks = entry["blocks"]
    states = [window.state for window in blocks.windows]
    others = [state.others for state in states if state.others is not None]
    stolen = [state.steal for state in states if state.steal is not None]
    return {
        "at_s": round(entry["at_s"], 1),
        "load": entry["load"],
        "dense_p50_ms": round(median(blocks.dense_ms()), 3),
        "warmup_pairs": blocks.warmup.num_pairs,
        "settled": blocks.warmup.settled,
        "windows": len(states),
        "refused": len(blocks.refused),
        "most_others": round(max(others), 3) if others else None,
        "most_steal": round(max(stolen), 3) if stolen else None,
        "clock_mhz": states[-1].clock_mhz,
        "temperature_c": states[-1].temperature_c,
        "throttled": states[-1].throttled,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=30, help="measurements of each plan")
    parser.add_argument("--repeats", type=int, default=40, help="blocks of each measurement")
    parser.add_argument("--max-others", type=float, default=0.1, help="share of the cores that others may use")
    parser.add_argument("--budget-s", type=float, default=3600.0, help="stop early with what there is")
    parser.add_argument("--small", action="store_true", help="a few short measurements, whoever else runs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if options.small:
        options.times, options.repeats, options.max_others = 3, 6, 1.0
    torch.set_num_threads(1)
    found = repeated(options)
    measured = {name: [entry["blocks"] for entry in entries if "blocks" in entry] for name, entries in found.items()}
    if short := [name for name, blocks in measured.items() if len(blocks) < 2]:
        print(f"{', '.join(short)} must be measured at least twice; quieten the machine or raise --max-others")
        return 2
    rows = [
        {"plan": name, "metric": metric, "quantile": text, "times": len(blocks), **summary(blocks, metric, quantile)}
        for name, blocks in measured.items()
        for metric in ("prefill", "first_token")
        for text, quantile in QUANTILES.items()
    ]
    key = measured["fastv"][0].key
    share = fmean(row["pairs_inside"] for row in rows if row["quantile"] == "p50")
    result = {
        **machine.setting("benchmarks.repeatability", arguments),
        "device": key.name,
        "threads": key.threads,
        "repeats": options.repeats,
        "max_others": options.max_others,
        "target": TARGET,
        "p50_pairs_inside": share,
        "p95_pairs_inside": fmean(row["pairs_inside"] for row in rows if row["quantile"] == "p95"),
        "rows": rows,
        "measurements": {name: [logged(entry) for entry in entries] for name, entries in found.items()},
    }
    path: Path = options.out or machine.default_path("repeatability", key.slug)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        print(
            f"{row['plan']:10} {row['metric']:11} {row['quantile']}  {row['median']:.3f} spread {row['spread']:.2%} "
            f"width {row['width']:.2%}  inside {row['pairs_inside']:.0%}"
        )
    print(f"a repetition's p50 ratio lies inside another's interval {share:.1%} of the time (target {TARGET:.0%})")
    return int(share < TARGET)


if __name__ == "__main__":
    sys.exit(main())
