"""How many workers one database serves: trials a second, and what asking and telling take as a study grows.

    python -m benchmarks.workers [--workers 1,2,4,8,16,32,64] [--seconds 2] [--storage URL] [--small] [--out FILE]

Workers are processes with connections of their own, and trials are looked up in the recorded table and take
`--seconds` of sleep, so what is left of linear speed-up is lost to the database and to this machine's cores. A worker's
first trial is not counted: start-up falls into it, and all wait for the last one before they go on at once, so that
they ask in the same moment, the worst case. Without `--storage` the server is PostgreSQL of this benchmark's own, its
files on this machine's disk; SQLite is measured beside it. Growth is one study told without sleep; an ask and a tell of
its last trials are held against those around its hundredth. With AUTOTUNE_OPTUNA_PROXY all go through Optuna's proxy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autotune.store import Database
from autotune.study import Study
from benchmarks.machine import ROOT, default_path, setting
from benchmarks.postgresql import own_server
from benchmarks.replayed_worker import open_study, work
from benchmarks.table import markdown
from benchmarks.tabular import Table

__all__ = ["Timed", "grown", "main", "served", "timed"]

EFFICIENCY = 0.9  # of linear, at so many workers with trials of so many seconds
AT_WORKERS, AT_SECONDS = 32, 2.0
GROWTH = 3.0  # times what an ask and a tell take around trial 100
ON_SQLITE = (1, 2, 4, 8)
LINKED = (2, 4)  # studies that the most workers share, evenly
TRIALS_PER_WORKER, MIN_TRIALS = 10, 12
GROWTH_WORKERS = 4
GROWN_TO = {"random": (100, 500, 1000, 2000), "tpe": (100, 200, 300)}
SMALL_GROWN_TO = {"random": (20, 40)}
PATIENCE_S = 600.0  # for workers to begin, and to end
SMALL = ROOT / "runs" / "workers-small.json"


@dataclass(frozen=True, slots=True)
class Timed:
    """A trial after the first: when it was told, by a clock that all processes share, and what it took in seconds."""

    number: int
    told_at: float
    ask: float
    tell: float


def timed(
    storage: str, sampler: str, num_workers: int, num_trials: int, seconds: float, table: Table, num_studies: int = 1
) -> tuple[float, list[Timed]]:
    """When so many workers began together, and the trials that they told from then on, oldest first.

    They share as many studies, evenly. Raises RuntimeError where a worker fails, or a trial is told twice or never.
    """
    names = [f"workers-{uuid.uuid4().hex[:12]}" for _ in range(num_studies)]
    target = (num_workers + num_trials) // num_studies
    for seed, name in enumerate(names):
        open_study(storage, name, target, sampler, seed)
    fork = multiprocessing.get_context("fork")  # what is imported and loaded is there already
    together, sent = fork.Barrier(num_workers), fork.SimpleQueue()

    def try_trials(name: str) -> None:
        began, told = 0.0, []

        def note(trial: str) -> None:
            nonlocal began
            told.append((int(trial.split()[-1]), time.perf_counter()))
            if len(told) == 1:
                together.wait(PATIENCE_S)
                began = time.perf_counter()

        _, times = work(storage, name, seconds, lambda: False, note, table)
        counted = zip(told[1:], times[1:], strict=True)
        sent.put((began, told[0][0], [Timed(number, at, *took) for (number, at), took in counted]))

    processes = [
        fork.Process(target=try_trials, args=(names[n % num_studies],), daemon=True) for n in range(num_workers)
    ]
    for process in processes:
        process.start()
    found = [_received(sent, processes) for _ in processes]
    for process in processes:
        process.join(PATIENCE_S)
    trials = sorted((trial for _, _, told in found for trial in told), key=lambda trial: trial.told_at)
    numbers = sorted([first for _, first, _ in found] + [trial.number for trial in trials])
    if numbers != sorted([*range(target)] * num_studies):
        raise RuntimeError(f"{num_workers} workers must tell trials 0 to {target - 1} once each, told {numbers}")
    for name in names:
        Study.forget(Database(storage), name)
    return min(began for began, _, _ in found), trials


def _received(sent: Any, processes: Sequence[Any]) -> tuple[float, int, list[Timed]]:
    until = time.monotonic() + PATIENCE_S
    while sent.empty():
        failed = [process.exitcode for process in processes if process.exitcode]
        if failed or time.monotonic() > until:
            raise RuntimeError(f"workers must end by themselves, but: exit codes {failed}; see their errors above")
        time.sleep(0.05)
    received: tuple[float, int, list[Timed]] = sent.get()
    return received


def served(
    storage: str, num_workers: int, seconds: float, trials_each: int, table: Table, num_studies: int = 1
) -> dict[str, Any]:
    """Throughput of so many workers, to linear's."""
    num_trials = max(num_workers * trials_each, MIN_TRIALS)
    began, trials = timed(storage, "random", num_workers, num_trials, seconds, table, num_studies)
    wall_s = trials[-1].told_at - began
    linear = num_workers / seconds
    return {
        "workers": num_workers,
        "studies": num_studies,
        "trials": num_trials,
        "wall_s": wall_s,
        "trials_per_s": num_trials / wall_s,
        "efficiency": num_trials / wall_s / linear,
        **_percentiles("ask", [trial.ask for trial in trials]),
        **_percentiles("tell", [trial.tell for trial in trials]),
    }


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, (50, 95))
    return {f"{name}_p50_ms": 1000 * float(p50), f"{name}_p95_ms": 1000 * float(p95)}


def grown(storage: str, sampler: str, sizes: Sequence[int], table: Table) -> dict[str, Any]:
    """What an ask and a tell of a study take around each size, the last trials before it where it grows no further."""
    _, trials = timed(storage, sampler, GROWTH_WORKERS, sizes[-1] - GROWTH_WORKERS, 0.0, table)
    half = min(50, sizes[0] // 2)
    windows = {}
    for size in sizes:
        low, high = (size - 2 * half, size) if size == sizes[-1] else (size - half, size + half)
        inside = [trial for trial in trials if low <= trial.number < high]
        both = [trial.ask + trial.tell for trial in inside]
        parts = {name: [getattr(trial, name) for trial in inside] for name in ("ask", "tell")}
        windows[str(size)] = {
            "ask_and_tell_p50_ms": 1000 * float(np.median(both)),
            **{f"{name}_p50_ms": 1000 * float(np.median(took)) for name, took in parts.items()},
        }
    first, last = (windows[str(size)]["ask_and_tell_p50_ms"] for size in (sizes[0], sizes[-1]))
    return {"sampler": sampler, "workers": GROWTH_WORKERS, "windows": windows, "ratio": last / first}


def judged(found: Mapping[str, Any]) -> dict[str, Any]:
    """The targets that the figures speak of: what is wanted, what came, and whether that is enough."""
    targets = {}
    for row in found["throughput"]:
        if (row["workers"], row["studies"], found["seconds"]) == (AT_WORKERS, 1, AT_SECONDS):
            name = f"efficiency with {AT_WORKERS} workers and trials of {AT_SECONDS:g} s"
            came = row["efficiency"]
            targets[name] = {"at_least": EFFICIENCY, "came": came, "met": came >= EFFICIENCY}
    for growth in found["growth"]:
        first, *_, last = growth["windows"]
        name = f"an ask and a tell of {growth['sampler']} around trial {last}, to trial {first}"
        targets[name] = {"at_most": GROWTH, "came": growth["ratio"], "met": growth["ratio"] <= GROWTH}
    return targets


def table_of(found: Mapping[str, Any]) -> str:
    """All figures as tables, and the targets met or missed."""
    head = [
        "workers",
        "studies",
        "trials",
        "trials/s",
        "of linear",
        "ask p50/ms",
        "ask p95/ms",
        "tell p50/ms",
        "tell p95/ms",
    ]
    text = f"{found['device']}, {found['machine']['cores']} cores, trials of {found['seconds']:g} s\n"
    for kind, rows in (("storage", found["throughput"]), ("sqlite", found["sqlite"])):
        text += f"\n{found['storage'] if kind == 'storage' else 'sqlite'}\n\n" + markdown(head, map(_line, rows))
    lines = [
        [
            growth["sampler"],
            size,
            *(f"{row[f'{name}_p50_ms']:.1f}" for name in ("ask", "tell", "ask_and_tell")),
        ]
        for growth in found["growth"]
        for size, row in growth["windows"].items()
    ]
    text += "\n" + markdown(["sampler", "around trial", "ask p50/ms", "tell p50/ms", "both p50/ms"], lines)
    for name, target in found["targets"].items():
        bound = f"at least {target['at_least']:.0%}" if "at_least" in target else f"at most {target['at_most']:g}x"
        came = f"{target['came']:.1%}" if "at_least" in target else f"{target['came']:.2f}x"
        text += f"\n{'met' if target['met'] else 'MISSED'}: {name}: {came}, {bound} wanted"
    return text


def _line(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row[f'{name}_{which}_ms']:.1f}" for name in ("ask", "tell") for which in ("p50", "p95")]
    counts = [str(row[name]) for name in ("workers", "studies", "trials")]
    return [*counts, f"{row['trials_per_s']:.2f}", f"{row['efficiency']:.1%}", *times]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=_counts, default=None, help="by default 1,2,4,8,16,32,64")
    parser.add_argument("--seconds", type=float, default=None, help="of a trial, by default 2")
    parser.add_argument("--storage", default=None, help="by default PostgreSQL of this benchmark's own")
    parser.add_argument("--small", action="store_true", help="a few workers, short trials, for a smoke test")
    parser.add_argument("--commit", default=None, help="the commit, where git cannot tell")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    options.workers = options.workers or ((1, 2) if options.small else (1, 2, 4, 8, 16, 32, 64))
    options.seconds = options.seconds or (0.2 if options.small else AT_SECONDS)
    return options


def _counts(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    table = Table.load()
    each = 2 if options.small else TRIALS_PER_WORKER
    say: Callable[[str], None] = lambda what: print(what, file=sys.stderr, flush=True)  # noqa: E731
    with ExitStack() as stack:
        storage = options.storage or stack.enter_context(own_server())
        sqlite = f"sqlite:///{stack.enter_context(tempfile.TemporaryDirectory(prefix='btp-workers-'))}/study.db"
        found: dict[str, Any] = {
            **setting("benchmarks.workers", arguments, options.commit),
            "device": processor(),
            "storage": storage.partition(":")[0].partition("+")[0],
            "seconds": options.seconds,
            "throughput": [],
            "sqlite": [],
            "growth": [],
        }
        for num_workers in options.workers:
            found["throughput"].append(served(storage, num_workers, options.seconds, each, table))
            say(f"{found['storage']}: {' | '.join(_line(found['throughput'][-1]))}")
        for num_studies in [] if options.small else LINKED:
            most = max(options.workers)
            found["throughput"].append(served(storage, most, options.seconds, each, table, num_studies))
            say(f"{found['storage']}: {' | '.join(_line(found['throughput'][-1]))}")
        for num_workers in [number for number in ON_SQLITE if number <= max(options.workers)]:
            found["sqlite"].append(served(sqlite, num_workers, options.seconds, each, table))
            say(f"sqlite: {' | '.join(_line(found['sqlite'][-1]))}")
        for sampler, sizes in (SMALL_GROWN_TO if options.small else GROWN_TO).items():
            found["growth"].append(grown(storage, sampler, sizes, table))
            say(f"{sampler}: {found['growth'][-1]}")
    found["targets"] = judged(found)
    out = options.out or (SMALL if options.small else default_path("workers", found["device"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table_of(found))
    print(out)
    return 0


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
