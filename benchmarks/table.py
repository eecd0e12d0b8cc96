"""The README's performance table, from the figures in benchmarks/results.

    python -m benchmarks.table            # write it between <!-- performance --> and <!-- /performance -->
    python -m benchmarks.table --check    # exit 1 where the README has another one

Standard library only. What a target speaks of and no file has reads "not measured".
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BATCHES = (1, 8, 32)
WANTED = tuple(
    ("NVIDIA H200", shape, launch) for shape in ("LLaVA-1.5-7B", "LLaVA-NeXT-7B") for launch in ("eager", "graphs")
)
NOT_MEASURED = "not measured"
_BLOCK = re.compile(r"(<!-- performance -->\n).*?(<!-- /performance -->)", re.DOTALL)

Row = Mapping[str, Any]


def of_run(found: Mapping[str, Any]) -> str:
    """Every row of one run, with all that a reader compares."""
    head = "shape batch launch system tokens TFLOPs p50/ms p95/ms ratio-p50 ratio-p95 TTFT/ms TTFT-ratio selector/ms"
    lines = [_of_row(row) for row in found["rows"]]
    return f"{found['device']}\n\n" + markdown([*head.split(), "ideal x", "of ideal", "peak/MiB", "cache/MiB"], lines)


def _of_row(row: Row) -> list[str]:
    start = [row["shape"], str(row["batch"]), row["launch"], row["name"]]
    if "prefill" not in row:
        return [*start, row["note"], *[""] * 12]
    prefill, first = row["prefill"], row["first_token"]
    return [
        *start,
        f"{row['mean_tokens']:.1f}",
        f"{row['image_tflops']:.3g}",
        f"{prefill['pruned_p50_ms']:.1f}",
        f"{prefill['pruned_p95_ms']:.1f}",
        interval(prefill["ratio_p50"]),
        interval(prefill["ratio_p95"]),
        f"{first['pruned_p50_ms']:.1f}",
        interval(first["ratio_p50"]),
        f"{row['selector_ms']:.2f}",
        f"{row['ideal_speedup']:.2f}",
        f"{row['share_of_ideal']:.0%}",
        "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f}",
        f"{row['cache_bytes'] / 2**20:.1f}",
    ]


def block(results: Iterable[Mapping[str, Any]]) -> str:
    """The README's table: a line a system, a column a batch size; `results` are the contents of prefill-*.json."""
    cells: dict[tuple[str, str, str], dict[str, dict[int, Row]]] = {}
    for found in results:
        for row in found["rows"]:
            setup = cells.setdefault((_device(row), row["shape"], row["launch"]), {})
            setup.setdefault(row["name"], {})[row["batch"]] = row
    lines = []
    for setup_key in (*WANTED, *(key for key in cells if key not in WANTED)):
        if setup_key not in cells:
            lines.append([*setup_key, "every system", "", *[NOT_MEASURED] * len(BATCHES)])
        for name, by_batch in cells.get(setup_key, {}).items():
            tokens = next((f"{row['mean_tokens']:.0f}" for row in by_batch.values() if "mean_tokens" in row), "")
            lines.append([*setup_key, name, tokens, *(_cell(by_batch.get(batch)) for batch in BATCHES)])
    columns = ["device", "shape", "launch", "system", "tokens", *(f"batch {batch}" for batch in BATCHES)]
    return markdown(columns, lines)


def _device(row: Row) -> str:
    threads = row["key"]["threads"]  # none on a GPU
    return f"{row['key']['name']}, {threads} thread{'s' * (threads > 1)}" if threads else str(row["key"]["name"])


def _cell(row: Row | None) -> str:
    if row is None or "prefill" not in row:
        return NOT_MEASURED
    return f"{interval(row['prefill']['ratio_p50'])}, {row['share_of_ideal']:.0%}"


def interval(value_and_ends: Sequence[float]) -> str:
    value, low, high = value_and_ends
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(columns)
    return "".join(f"| {' | '.join(line)} |\n" for line in (columns, rule, *lines))


def written(readme: str, table: str) -> str:
    """The README with this table in its block. Raises ValueError where it has no block."""
    if _BLOCK.search(readme) is None:
        raise ValueError(
            "the README must have <!-- performance --> and <!-- /performance -->, got none; put them where the table "
            "goes"
        )
    return _BLOCK.sub(lambda found: f"{found[1]}{table}{found[2]}", readme)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    options = parser.parse_args(arguments)
    files = sorted(options.results.glob("prefill-*.json"))
    before = options.readme.read_text(encoding="utf-8")
    after = written(before, block(json.loads(file.read_text(encoding="utf-8")) for file in files))
    if options.check:
        if after != before:
            print(
                "the README's table is not what benchmarks/results says; run python -m benchmarks.table",
                file=sys.stderr,
            )
        return int(after != before)
    options.readme.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
