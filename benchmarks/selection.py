"""Time what choosing tokens costs: farthest-first, grid seeds, the attention row, and BTP's three stages together.

    python -m benchmarks.selection --device cuda              # 576 -> 144 and 2,880 -> 720 of 4,096 features
    OMP_NUM_THREADS=1 python -m benchmarks.selection          # the same on one thread of a CPU
    python -m benchmarks.selection --small                    # tiny shapes, seconds

Runs from the repository's root with torch and transformers alone. Features and weights are random: what is chosen has
no meaning here. The ways of one case take turns, so that a device that slows down favours none. The published loop is
DivPrune's, which BTP's code has too, from its description: all distances at once, then a step at a time the rows of
everything picked so far are gathered, their minimum taken, its maximum read on the host. It takes one picture at a
time and works in the features' dtype; ours works in float32.

Shapes: B batch, N image tokens, S tokens of the prompt, D hidden size, K picked.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.layer import Layer
from benchmarks.machine import default_path, setting
from benchmarks.table import NOT_MEASURED, markdown
from benchmarks.turns import Bench, Row, Run, Size
from btp import ops, presets
from btp.plan import Plan
from btp.selection import SELECTORS
from btp.tokens import Attention

LOOP, TORCH, TRITON = "published loop", "torch", "triton"
NUM_TEXT = 64  # tokens of the prompt around the picture


FULL = Size(side=24, views=5, hidden=4096, heads=32, batches=(1, 8))  # LLaVA-1.5-7B; five views are LLaVA-NeXT's
SMALL = Size(side=6, views=2, hidden=64, heads=4, batches=(1, 2))


def published_loop(feature_BND: Tensor, num_pick: int) -> Tensor:
    return torch.stack([_published_row(feature_ND, num_pick) for feature_ND in feature_BND])


def _published_row(feature_ND: Tensor, num_pick: int) -> Tensor:
    unit_ND = feature_ND / feature_ND.norm(dim=-1, keepdim=True)
    distance_NN = 1 - unit_ND @ unit_ND.mT
    pick_K = torch.empty(num_pick, dtype=torch.int64, device=feature_ND.device)
    for step in range(num_pick):
        if step:
            nearest_N = distance_NN.index_select(0, pick_K[:step]).amin(dim=0)
        else:
            nearest_N = distance_NN.topk(2, dim=0, largest=False).values[1]  # the first is the token itself
        pick_K[step] = nearest_N.argmax().item()
    return pick_K


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`ops.farthest_first` by torch alone, or as it comes."""
    chosen = ops._kernels_for
    if name == TORCH:
        ops._kernels_for = lambda unit_BND: None
    try:
        yield
    finally:
        ops._kernels_for = chosen


def farthest_first(bench: Bench) -> Iterator[Row]:
    """Every backend against the published loop."""
    side, hidden = bench.size.side, bench.size.hidden
    for num_tokens in (side**2, bench.size.views * side**2):
        for dtype in (torch.bfloat16, torch.float32):
            for batch in bench.size.batches:
                feature_BND = bench.random(batch, num_tokens, hidden, dtype=dtype)
                case = {
                    "what": "farthest-first",
                    "case": f"{num_tokens} -> {num_tokens // 4} of {hidden}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "batch": batch,
                }
                yield from _farthest_first(bench, case, feature_BND, num_tokens // 4)


def _farthest_first(bench: Bench, case: Row, feature_BND: Tensor, num_pick: int) -> Iterator[Row]:
    def ours(name: str) -> Tensor:
        with backend(name):
            return ops.farthest_first(feature_BND, num_pick)

    missing = missing_triton(feature_BND)
    runs: dict[str, Run] = {LOOP: partial(published_loop, feature_BND, num_pick), TORCH: partial(ours, TORCH)}
    if missing is None:
        runs[TRITON] = partial(ours, TRITON)
    found = bench.times(runs)
    for name in (LOOP, TORCH, TRITON):
        if name not in found:
            yield {**case, "way": name, "note": f"{NOT_MEASURED}: {missing}"}
            continue
        yield {**case, "way": name, **found[name], "speedup": found[LOOP]["p50_ms"] / found[name]["p50_ms"]}


def missing_triton(feature_BND: Tensor) -> str | None:
    """Why `ops.farthest_first` does without Triton on these features."""
    if not feature_BND.is_cuda:
        return "no CUDA device"
    return "Triton cannot build kernels here" if ops._kernels_for(feature_BND) is None else None


def grid_seeds(bench: Bench) -> Iterator[Row]:
    """The order in which farthest-first reaches a grid: worked out once a grid, looked up from then on."""
    device = torch.device(bench.device)
    for views in (1, bench.size.views):
        grids = ((bench.size.side, bench.size.side),) * views

        def first(grids: ops.Grids = grids) -> Tensor:
            ops.grid_farthest_first_rank.cache_clear()
            return ops.grid_farthest_first_rank(grids, device)

        runs: dict[str, Run] = {"first use": first, "cached": partial(ops.grid_farthest_first_rank, grids, device)}
        for way, row in bench.times(runs).items():
            yield {"what": "grid seeds", "case": f"{views} of {grids[0][0]} x {grids[0][1]}", "way": way, **row}


def attention_row(bench: Bench, layer: Layer) -> Iterator[Row]:
    """The one row that a stage reads, against eager attention of its whole layer."""
    num_tokens = bench.size.side**2
    for batch in bench.size.batches:
        hidden_BSD = bench.random(batch, num_tokens + NUM_TEXT, bench.size.hidden, dtype=layer.dtype)
        runs: dict[str, Run] = {
            "eager attention": partial(layer.whole, hidden_BSD),
            "one row": partial(layer.row, hidden_BSD),
        }
        found = bench.times(runs)
        case = {"what": "attention row", "case": f"{num_tokens} + {NUM_TEXT} tokens of {bench.size.hidden}"}
        for way, row in found.items():
            speedup = found["eager attention"]["p50_ms"] / row["p50_ms"]
            yield {**case, "dtype": layer.dtype_name, "batch": batch, "way": way, **row, "speedup": speedup}


def stages(bench: Bench, layer: Layer) -> Iterator[Row]:
    """All of BTP's stages, one after another: choose, then take the rows of what was chosen."""
    num_tokens = bench.size.side**2
    plans = {"BTP, paper": presets.btp_paper(32), "BTP, released": presets.btp_released(32)}
    for batch in bench.size.batches:
        hidden_BSD = bench.random(batch, num_tokens + NUM_TEXT, bench.size.hidden, dtype=layer.dtype)
        for name, plan in plans.items():
            runs: dict[str, Run] = {
                "attention row given": partial(run_stages, plan, layer, hidden_BSD, bench.size.side, given=True),
                "all of it": partial(run_stages, plan, layer, hidden_BSD, bench.size.side, given=False),
            }
            kept = " -> ".join(map(str, (num_tokens, *plan.num_kept(num_tokens))))
            case = {"what": "stages", "case": f"{name}: {kept}", "dtype": layer.dtype_name, "batch": batch}
            for way, row in bench.times(runs).items():
                yield {**case, "way": way, **row}


def run_stages(plan: Plan, layer: Layer, hidden_BSD: Tensor, side: int, *, given: bool) -> Tensor:
    """The original indices of what is left. given: the attention row costs nothing. (B, K)"""
    num_tokens = side**2
    text_BTD, alive_BND = hidden_BSD[:, num_tokens:], hidden_BSD[:, :num_tokens]
    origin_BN = torch.arange(num_tokens, device=hidden_BSD.device).expand(len(hidden_BSD), -1)
    for stage, num_keep in zip(plan.stages, plan.num_kept(num_tokens), strict=True):
        score_BN = alive_BND[:, :, 0].float()
        row = Attention(score_BN, score_BN) if given else None
        view = layer.view(torch.cat((alive_BND, text_BTD), dim=1), origin_BN, ((side, side),), row)
        index_BK = SELECTORS[stage.selector](view, num_keep, stage)
        alive_BND, origin_BN = ops.take_rows(alive_BND, index_BK), origin_BN.gather(1, index_BK)
    return origin_BN


def run(bench: Bench) -> Iterator[Row]:
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    layer = Layer.random(bench.size.hidden, bench.size.heads, bench.device, dtype)
    for rows in (farthest_first(bench), grid_seeds(bench), attention_row(bench, layer), stages(bench, layer)):
        yield from rows


def table_of(rows: Sequence[Row]) -> str:
    columns = ["what", "case", "dtype", "batch", "way", "p50/ms", "p95/ms", "repeats", "speed-up"]
    return markdown(columns, map(_line, rows))


def _line(row: Row) -> list[str]:
    start = [str(row.get(name, "")) for name in ("what", "case", "dtype", "batch", "way")]
    if "note" in row:
        return [*start, row["note"], "", "", ""]
    speedup = f"{row['speedup']:.1f}" if "speedup" in row else ""
    return [*start, f"{row['p50_ms']:.3f}", f"{row['p95_ms']:.3f}", str(row["repeats"]), speedup]


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine() or "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--repeats", type=int, default=50, help="of every case, at most")
    parser.add_argument("--seconds", type=float, default=10.0, help="a case; at least three repeats whatever they take")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU")
    parser.add_argument("--commit", help="where there is no Git to ask")
    parser.add_argument("--out", type=Path, help="the JSON; otherwise benchmarks/results/selection-<device>.json")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        torch.set_num_threads(options.threads)
    size = SMALL if options.small else FULL
    bench = Bench(size=size, device=options.device, repeats=options.repeats, seconds=options.seconds)
    rows = []
    with torch.inference_mode():
        for row in run(bench):
            rows.append(row)
            print(*_line(row), sep="  ", file=sys.stderr)
    device, threads = _device_name(options.device), torch.get_num_threads() if options.device == "cpu" else 0
    found = {
        **setting("benchmarks.selection", arguments, options.commit),
        "device": device,
        "threads": threads,
        "rows": rows,
    }
    out = options.out or default_path("selection-small" if options.small else "selection", device)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table_of(rows))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
