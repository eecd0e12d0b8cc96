"""Time the prefill of every published system against dense, on random weights of published shapes.

    python -m benchmarks.prefill --device cuda                # LLaVA-1.5-7B and LLaVA-NeXT-7B, bf16, batch 1, 8 and 32
    OMP_NUM_THREADS=1 python -m benchmarks.prefill --shapes cpu        # 1/8 of the width, float32, batch 1, one thread
    python -m benchmarks.prefill --small                      # tiny shapes, seconds

Runs from the repository's root with torch and transformers alone. Accuracy is not the point: weights, pictures and
words are random, so a condition on attention (ToDRE's last drop) is met or not by chance; what was realised is what is
counted. The dense system's row is dense under `btp.prune` with a plan of no stages, against dense without it. On CUDA
every row comes twice, launched eagerly and by graphs, dense launched like it: the targets are 2.5x at batch 8 and, by
graphs, 1.8x at batch 1.

Shapes: B batch, N image tokens, S tokens of the prompt.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import table
from benchmarks.machine import default_path, gpu_state, setting
from benchmarks.shapes import SHAPES, Shape
from btp import Plan, presets, prune
from btp.capture import CaptureError
from btp.cost import image_token_flops, kv_cache_bytes, mean_tokens, prefill_multiplies
from btp.device_lock import device_lock
from btp.errors import BusyDeviceError
from btp.families import anatomy_of
from btp.intervals import percentile
from btp.latency import LatencyBlocks, Launch, device_key, measure
from btp.plan import Stage
from btp.selection import SELECTORS
from btp.tokens import ImageTokens

SMALL = Path("runs/prefill-small.json")  # not a result
MIN_PAIRS, MAX_PAIRS, NUM_SELECTOR_RUNS = 3, 20, 3


def systems(num_layers: int) -> dict[str, tuple[str, Plan]]:
    """Every published system at its own budget, and BTP's code with its last drop: 0.847 TFLOPs on LLaVA-1.5-7B."""
    found = {key: (system.name, system.plan(num_layers)) for key, system in presets.SYSTEMS.items()}
    released = presets.btp_released(num_layers, drop_last=True)
    return {**found, "btp_released_drop": ("BTP (released, last drop)", released)}


def launches(device: str) -> tuple[Launch, ...]:
    """A CPU has no graphs."""
    return ("eager", "graphs") if device == "cuda" else ("eager",)


def paired_runs(
    model: Any, inputs: Mapping[str, Tensor], plan: Plan, num_pairs: int, launch: Launch = "eager"
) -> LatencyBlocks:
    """Dense and pruned in turns, launched alike; half as many untimed pairs before, or fewer once they are steady."""
    cores = len(os.sched_getaffinity(0))
    spared = 1 - 0.8 * min(torch.get_num_threads(), cores) / cores  # what our threads leave free, and a fifth of theirs
    most = max(1, num_pairs // 2)
    warmup = {"min_warmup": 1, "max_warmup": most}
    return measure(model, inputs, plan, repeats=num_pairs, max_others=spared, launch=launch, **warmup)


def summary(blocks: LatencyBlocks, metric: Literal["prefill", "first_token"]) -> dict[str, Any]:
    """All runs, their medians and 95th percentiles, and the ratios of these with their 95 % intervals."""
    dense_ms, pruned_ms = blocks.dense_ms(metric), blocks.pruned_ms(metric)
    found: dict[str, Any] = {"dense_ms": dense_ms, "pruned_ms": pruned_ms}
    for percent in (50, 95):
        ratio = blocks.ratio(percent / 100, metric)
        found[f"dense_p{percent}_ms"] = percentile(dense_ms, percent)
        found[f"pruned_p{percent}_ms"] = percentile(pruned_ms, percent)
        found[f"ratio_p{percent}"] = [ratio.value, ratio.low, ratio.high]
    return found


@contextmanager
def timed_selectors(device: str) -> Iterator[Callable[[], float]]:
    """Within it every selector is timed, what it reads included; the function tells the milliseconds so far."""
    marks: list[tuple[Any, Any]] = []
    untimed = dict(SELECTORS)

    def stamp() -> Any:
        if device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(name: str, tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
        start = stamp()
        kept_BK = untimed[name](tokens, num_keep, stage)
        marks.append((start, stamp()))
        return kept_BK

    def total_ms() -> float:
        if device == "cpu":
            return float(sum(1e3 * (end - start) for start, end in marks))
        torch.cuda.synchronize()
        return sum(float(start.elapsed_time(end)) for start, end in marks)

    SELECTORS.update({name: partial(timed, name) for name in untimed})
    try:
        yield total_ms
    finally:
        SELECTORS.update(untimed)


@torch.inference_mode()
def realised(model: Any, inputs: Mapping[str, Tensor], plan: Plan) -> dict[str, Any]:
    """What one prefill under the plan keeps, costs and leaves; what it costs more is not in the milliseconds."""
    decoder, device = anatomy_of(model).decoder, inputs["input_ids"].device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with prune(model, plan) as trace:
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    batch, length = inputs["input_ids"].shape
    num_text, full = length - trace.num_image_tokens, (trace.num_image_tokens,) * decoder.num_layers
    cached = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
    size = model.dtype.itemsize
    counted = kv_cache_bytes(decoder, trace.counts, num_text, batch=batch, bytes_per_number=size)
    if cached != counted:
        raise RuntimeError(f"the cache must hold what btp.cost counts, {counted} bytes, got {cached}; mend btp/cost.py")
    flops = [image_token_flops(c, decoder.hidden_size, decoder.intermediate_size) for c in (trace.counts, full)]
    multiplies = [prefill_multiplies(decoder, counts, num_text) for counts in (trace.counts, full)]
    return {
        "image_tokens": trace.num_image_tokens,
        "text_tokens": num_text,
        "mean_tokens": mean_tokens(trace.counts),
        "image_tflops": flops[0] / 1e12,
        "image_flops_share": flops[0] / flops[1],
        "ideal_speedup": multiplies[1] / multiplies[0],
        "cache_bytes": cached,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
    }


@torch.inference_mode()
def selector_ms(model: Any, inputs: Mapping[str, Tensor], plan: Plan) -> tuple[float, float]:
    """The selectors' own milliseconds in a prefill, as a median of extra runs, and the seconds such a run took."""
    device = inputs["input_ids"].device.type
    found, started = [], time.perf_counter()
    for _ in range(NUM_SELECTOR_RUNS):
        with timed_selectors(device) as total_ms, prune(model, plan):
            model(**inputs, use_cache=True, logits_to_keep=1)
        found.append(total_ms())
    return float(percentile(tuple(found), 50)), (time.perf_counter() - started) / NUM_SELECTOR_RUNS


def measured(
    model: Any, inputs: Mapping[str, Tensor], plan: Plan, launch: Launch, share_s: float, dense_s: float
) -> dict[str, Any]:
    """One row's figures, in about `share_s` seconds but with `MIN_PAIRS` pairs at least; dense_s: of one dense run.

    Selectors' milliseconds and peak memory are those of an eager launch.
    """
    end = time.perf_counter() + share_s
    found = realised(model, inputs, plan)
    own_ms, run_s = selector_ms(model, inputs, plan)
    pair_s = (dense_s or run_s) + run_s
    num_pairs = int((end - time.perf_counter()) / (1.5 * pair_s))  # up to half as many to warm up
    blocks = paired_runs(model, inputs, plan, min(MAX_PAIRS, max(MIN_PAIRS, num_pairs)), launch)
    prefill = summary(blocks, "prefill")
    return {
        **found,
        "run_s": run_s,
        "selector_ms": own_ms,
        "selector_share_of_dense": own_ms / prefill["dense_p50_ms"],
        "prefill": prefill,
        "first_token": summary(blocks, "first_token"),
        "share_of_ideal": 1 / prefill["ratio_p50"][0] / found["ideal_speedup"],
        "warmup": asdict(blocks.warmup),
        "refused": blocks.refused,
        "states": [asdict(window.state) for window in blocks.windows],
        "gpu": gpu_state() if inputs["input_ids"].is_cuda else None,
    }


class Budget:
    """Shares what is left of the seconds among the rows left: by the root of their tokens, so that none starves."""

    def __init__(self, seconds: float, cells: Sequence[tuple[Shape, int]], rows_per_cell: int) -> None:
        self._end = time.perf_counter() + seconds
        roots = [math.sqrt(shape.num_image_tokens * batch) for shape, batch in cells]
        self._weights = [root for root in roots for _ in range(rows_per_cell)]

    def next_share_s(self) -> float:
        share = (self._end - time.perf_counter()) * self._weights[0] / sum(self._weights)
        del self._weights[0]
        return share


def attempted(
    model: Any, inputs: Mapping[str, Tensor], plan: Plan, launch: Launch, share_s: float, dense_s: float
) -> dict[str, Any]:
    """`measured`, or a note why not."""
    if share_s <= 0:
        return {"note": "not measured: the budget was spent"}
    try:
        return measured(model, inputs, plan, launch, share_s, dense_s)
    except torch.cuda.OutOfMemoryError:
        reason = "out of memory"
    except (BusyDeviceError, CaptureError) as error:
        reason = str(error)
    if inputs["input_ids"].is_cuda:
        torch.cuda.empty_cache()  # here, where the error no longer holds on to tensors
    return {"note": f"not measured: {reason}"}


def run(shapes: Sequence[Shape], batches: Sequence[int], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row a shape, batch, launch and system; one that could not be measured has a `note` in place of figures."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    cells = [(shape, batch) for shape in shapes for batch in batches]
    budget = Budget(seconds, cells, len(launches(device)) * len(systems(32)))
    for shape in shapes:
        model = shape.build(device, dtype)
        for batch in batches:
            inputs, dense_s = shape.inputs(batch, device, dtype), 0.0
            setup = {"shape": shape.name, "batch": batch, "key": asdict(device_key(model, inputs))}
            plans = systems(anatomy_of(model).decoder.num_layers)
            for launch, (system, (name, plan)) in product(launches(device), plans.items()):
                found = attempted(model, inputs, plan, launch, budget.next_share_s(), dense_s)
                dense_s = dense_s or found.get("run_s", 0.0)
                yield {**setup, "launch": launch, "system": system, "name": name, "plan": plan.to_dict(), **found}
        del model
        if device == "cuda":
            torch.cuda.empty_cache()


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", choices=tuple(SHAPES), help="7b on CUDA, cpu on a CPU")
    parser.add_argument("--small", action="store_true", help="tiny shapes, batch 1 and 2, about 15 seconds")
    parser.add_argument("--batches", help="such as 1,8,32, which is the default on CUDA; 1 on a CPU")
    parser.add_argument("--budget", type=float, help="seconds in all, about: 480 on CUDA, 330 on a CPU")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--commit", help="where there is no Git to ask")
    parser.add_argument("--out", type=Path, help=f"benchmarks/results/prefill-<device>.json; small: {SMALL}")
    options = parser.parse_args(arguments)
    on_gpu = options.device == "cuda"
    options.shapes = "small" if options.small else options.shapes or ("7b" if on_gpu else "cpu")
    options.batches = options.batches or ("1,2" if options.small else "1,8,32" if on_gpu else "1")
    options.budget = options.budget or (15.0 if options.small else 480.0 if on_gpu else 330.0)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    found: dict[str, Any] = {**setting("benchmarks.prefill", arguments, options.commit), "rows": []}
    out = options.out or SMALL
    batches = [int(batch) for batch in options.batches.split(",")]
    with device_lock(torch.device(options.device)):  # selectors and memory are measured outside of `measure`
        for row in run(SHAPES[options.shapes], batches, options.device, options.budget):
            found["device"] = row["key"]["name"]
            found["rows"].append(row)
            print(f"{row['shape']}, batch {row['batch']}, {row['launch']}: {row['name']}", file=sys.stderr)
            if options.out is None and options.shapes != "small":
                out = default_path("prefill", found["device"])
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table.of_run(found))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
