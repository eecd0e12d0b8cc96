"""Record the table that the search benchmark replays: every plan of the grid, and what a job tries before it draws.

    python -m benchmarks.record_table [--most N]

Plans are scored sample by sample, in a random order, so that a part of the table is a fair sample of it, and each is
written at once to runs/search-table.jsonl, from which a killed run goes on. The table is packed once all of them are
there.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autotune import racing, reference
from autotune.data import Example, digest, from_dataset
from autotune.evaluation import Evaluator, load_model, prompt_inputs
from autotune.latency_model import LatencyModel
from autotune.search import CONTROLS, PUBLISHED, in_stages, scaled
from autotune.space import rescale
from benchmarks.grid import GRID, LIMIT, digest_of
from benchmarks.machine import ROOT
from btp import presets
from btp.cost import DecoderShape
from btp.families import anatomy_of
from btp.latency import device_key
from btp.plan import Plan

RECORD = ROOT / "runs" / "search-table.jsonl"
TABLE = ROOT / "benchmarks" / "tables" / "reference-vlm.npz"
SEED = 0
PREFIX_BYTES = 3 * 2**30  # enough that no dense prefix is written to disk
VALUES = ("scores", "kl", "nll")


def plans_of_cells(latency: LatencyModel) -> tuple[list[str], dict[str, Plan]]:
    """The digest of every cell's plan, and the plans by digest; the first is the dense model's."""
    sizes = (latency.counts.num_layers, latency.counts.num_image_tokens)
    dense = Plan(stages=())
    cells, plans = [], {digest_of(dense, *sizes): dense}
    for cell in GRID.cells():
        plan = GRID.plan(cell, latency)
        cells.append(digest_of(plan, *sizes))
        plans.setdefault(cells[-1], plan)
    return cells, plans


def plans_tried_first(latency: LatencyModel, decoder: DecoderShape) -> list[Plan]:
    """What a job tries before it draws, as far as it needs no calibration: at the limit, in a job's order."""
    num_layers, num_image_tokens = latency.counts.num_layers, latency.counts.num_image_tokens
    hand_set = latency.solve(rescale(presets.btp_released(num_layers)), LIMIT)
    systems = [in_stages(num_layers), *(presets.SYSTEMS[name].plan(num_layers) for name in PUBLISHED)]
    at_limit = [latency.solve(scaled(plan, decoder, num_image_tokens), LIMIT) for plan in systems]
    return [hand_set, *(control(hand_set) for control in CONTROLS.values()), *at_limit]


def recorded() -> dict[str, dict[str, list[float]]]:
    """What is on file, by digest; the line that a killed run left unfinished is left out."""
    if not RECORD.exists():
        return {}
    lines = RECORD.read_text(encoding="utf-8").split("\n")[:-1]
    return {row["plan"]: row for row in map(json.loads, lines)}


def record(evaluator: Evaluator, plans: dict[str, Plan], most: int | None) -> None:
    """Score what is not on file yet, dense first."""
    done = recorded()
    dense, *others = plans
    random.Random(SEED).shuffle(others)
    missing = [name for name in (dense, *others) if name not in done][:most]
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    with RECORD.open("a", encoding="utf-8") as file:
        for number, name in enumerate(missing, start=1):
            started = time.perf_counter()
            found = evaluator(plans[name])
            row = {"plan": name, **{value: [round(x, 7) for x in getattr(found, value)] for value in VALUES}}
            print(json.dumps(row), file=file, flush=True)
            print(f"{number} of {len(missing)}: {time.perf_counter() - started:.1f} s", file=sys.stderr)


def pack(
    cells: Sequence[str],
    first: Sequence[str],
    plans: dict[str, Plan],
    latency: LatencyModel,
    examples: Sequence[Example],
    device: str,
) -> None:
    """Write the table; its first plan is dense."""
    rows = recorded()
    place = {name: number for number, name in enumerate(plans)}
    arrays: dict[str, Any] = {
        "cells": np.array([place[name] for name in cells], np.int16),
        "first": np.array([place[name] for name in first], np.int16),
        "plans": np.array([plan.to_json() for plan in plans.values()]),
        "ratios": np.array([latency.ratio(plan) for plan in plans.values()]),
        "tasks": np.array([e.task for e in examples]),
        "data": np.array(digest(examples)),
        "device": np.array(device),
    }
    arrays |= {value: np.array([rows[name][value] for name in plans], np.float16) for value in VALUES}
    TABLE.parent.mkdir(exist_ok=True)
    np.savez_compressed(TABLE, **arrays)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=None, help="plans to score in this run, by default all")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, processor = load_model(str(reference.WEIGHTS), "cpu")
    select = from_dataset(reference.dataset("select"), "select")
    order = racing.order([e.task for e in select], [e.image_id for e in select], seed=0)  # as a study has it
    examples = [select[index] for index in order]
    key = device_key(model, prompt_inputs(processor, examples[:1], "cpu"))
    sizes = (anatomy_of(model).decoder, key.image_tokens, key.prompt_tokens - key.image_tokens)
    latency = LatencyModel.from_flops(*sizes)
    cells, plans = plans_of_cells(latency)
    tried_first = {
        digest_of(plan, latency.counts.num_layers, latency.counts.num_image_tokens): plan
        for plan in plans_tried_first(latency, sizes[0])
    }
    plans = {**plans, **{name: plan for name, plan in tried_first.items() if name not in plans}}
    print(f"{len(cells)} cells, {len(plans) - 1} plans within {LIMIT:g} of dense", file=sys.stderr)
    evaluator = Evaluator(model, processor, examples, racing.looks(len(examples)), PREFIX_BYTES)
    record(evaluator, plans, options.most)
    missing = len(plans.keys() - recorded().keys())
    if missing:
        print(f"{missing} plans are missing: run it again")
        return 1
    pack(cells, list(tried_first), plans, latency, examples, key.name)
    print(TABLE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
