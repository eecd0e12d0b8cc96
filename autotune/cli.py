"""The command line: reads what the user typed, wires the concrete parts, prints. The only place that does."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from autotune.config import MIN_TRIALS, AutotuneError, JobConfig, Limit
from btp.errors import BTPError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, prove and hand out image-token pruning plans for vision-language models.",
)
stderr = Console(stderr=True)

LimitOption = Annotated[
    str, typer.Option(help='Latency to stay within, such as "prefill_p50<=0.7x" or "ttft_p95<=50ms".')
]
OutOption = Annotated[Path, typer.Option(help="Folder for the study, the registry and everything written.")]
TrialsOption = Annotated[
    int, typer.Option("--trials", min=MIN_TRIALS, help="Finished trials to reach, earlier ones counted.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of the search.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads a latency is measured with.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that answer questions, one thread each; 0: every core, or 1 on a GPU.")
]
RepeatsOption = Annotated[int, typer.Option(min=4, help="Pairs of a latency measurement.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew: forget the study that --out holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
RegistryOption = Annotated[str | None, typer.Option("--registry", help="MLflow address; default: SQLite in --out.")]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@app.command()
def demo(
    limit: LimitOption = "prefill_p50<=0.5x",
    out: OutOption = Path("runs/demo"),
    trials: TrialsOption = 40,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = 0,
    repeats: RepeatsOption = 12,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune the reference VLM on its own questions: the whole job on two cores in minutes."""
    with _errors(debug):
        from autotune.reference import WEIGHTS

        config = JobConfig(
            model=str(WEIGHTS),
            data=None,
            limit=Limit.parse(limit),
            out=out,
            name="reference-vlm",
            num_trials=trials,
            seed=seed,
            space=_default_space(),
            repeats=repeats,
            threads=threads,
            workers=workers or CORES,
            fresh=fresh,
        )
        _run_job(config, as_json)


@app.command()
def tune(
    model: Annotated[str, typer.Option(help="Local folder or hub id of a supported vision-language model.")],
    data: Annotated[Path, typer.Option(help="JSONL of image path, question, answer, task; or a dataset folder.")],
    limit: LimitOption,
    out: OutOption = Path("runs/tune"),
    name: Annotated[str, typer.Option(help="Name of the registered model; default: the model's own.")] = "",
    trials: TrialsOption = 40,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = 0,
    repeats: RepeatsOption = 12,
    fresh: FreshOption = False,
    space: Annotated[Path | None, typer.Option(help="Search space YAML; default: the one that comes along.")] = None,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")] = "cpu",
    registry: RegistryOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune your own model on your own questions."""
    with _errors(debug):
        config = JobConfig(
            model=model,
            data=data,
            limit=Limit.parse(limit),
            out=out,
            name=name or Path(model).resolve().name,
            num_trials=trials,
            seed=seed,
            space=space or _default_space(),
            repeats=repeats,
            threads=threads,
            workers=workers or (CORES if device == "cpu" else 1),
            fresh=fresh,
            tracking_uri=registry,
            device=device,
        )
        _run_job(config, as_json)


@app.command()
def measure(
    profile: Annotated[Path, typer.Argument(help="A profile.json, or a plan.")],
    model: Annotated[str, typer.Option(help="Local folder or hub id of the model it was made for.")] = "",
    data: Annotated[Path | None, typer.Option(help="Where to take the prompt from; default: the reference's.")] = None,
    limit: LimitOption = "prefill_p50<=1x",
    threads: ThreadsOption = 1,
    repeats: RepeatsOption = 36,
    device: Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")] = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a profile's latency on this device, paired with dense; exit 1 where it misses the limit."""
    with _errors(debug):
        import torch

        from autotune.bench import measure_ratio
        from autotune.evaluation import load_model, prompt_inputs
        from autotune.reference import WEIGHTS
        from btp.anatomy import anatomy_of
        from btp.plan import Plan
        from btp.profile import Profile

        torch.set_num_threads(threads)
        bound, plan = Limit.parse(limit), Plan.load(profile)
        loaded, processor = load_model(model or str(WEIGHTS), device)
        if "schema_version" in json.loads(profile.read_text(encoding="utf-8")):
            Profile.load(profile).check_fits(anatomy_of(loaded).identity)
        inputs = prompt_inputs(processor, _splits(data)["calibrate"][:1], device)
        ratio, dense_ms = measure_ratio(loaded, inputs, plan, bound, repeats)
        met = ratio.value <= bound.ratio(dense_ms)
        if as_json:
            print(json.dumps({"ratio": asdict(ratio), "dense_ms": dense_ms, "limit": str(bound), "met": met}))
        else:
            word = "meets" if met else "misses"
            print(f"{ratio.value:.3f}x of dense [{ratio.low:.3f}, {ratio.high:.3f}], {dense_ms:.1f} ms: {word} {bound}")
    if not met:
        raise typer.Exit(1)


@app.command()
def pull(
    reference: Annotated[str, typer.Argument(help="models:/NAME@ALIAS")],
    to: Annotated[Path, typer.Option(help="Where to write the profile.")] = Path("profile.json"),
    registry: Annotated[str, typer.Option(help="MLflow address.")] = "sqlite:///runs/demo/mlflow.db",
    debug: DebugOption = False,
) -> None:
    """Fetch a registered profile by alias, checked by its digest."""
    with _errors(debug):
        from autotune.registry import Registry

        name, at, alias = reference.removeprefix("models:/").partition("@")
        if not (at and name and alias):
            raise AutotuneError(f"a reference reads models:/NAME@ALIAS, got {reference!r}")
        print(Registry(registry).pull(name, alias, to))


def _default_space() -> Path:
    """The search space that comes along, in an installed wheel or in a checkout."""
    inside = Path(__file__).parent / "search_spaces" / "reference.yaml"
    return inside if inside.exists() else Path(__file__).parents[1] / "search_spaces" / "reference.yaml"


def _splits(path: Path | None) -> Mapping[str, Any]:
    from autotune import data, reference

    if path is not None:
        return data.split(data.load(path))
    return {name: data.from_dataset(reference.dataset(name), name) for name in data.SPLITS}


def _run_job(config: JobConfig, as_json: bool) -> None:
    from autotune import job

    columns = (
        TextColumn("{task.description}", table_column=Column(width=30, no_wrap=True)),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[told]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr) as bar:
        line = bar.add_task("reading the data", total=config.num_trials + job.STEPS_AFTER, told="")

        def show(what: str, num_told: int, steps: int, best: float | None) -> None:
            told = f"{num_told}/{config.num_trials} trials, best {'-' if best is None else f'{best:.3f}'}"
            bar.update(line, description=what, completed=steps, told=told)

        outcome = job.run(config, _splits(config.data), show)
    if as_json:
        print(json.dumps(outcome.to_dict()))
    else:
        _print(outcome)
    if not (outcome.met and outcome.reproduced):
        raise typer.Exit(1)


def _print(outcome: Any) -> None:
    console = Console()
    console.width = max(console.width, 120)  # a pipe is no reason to break the table
    table = Table(title=f"{outcome.study}: {outcome.limit}, {outcome.num_trials} trials, on `certify`")
    for heading in ("plan", "image GFLOPs", "latency ratio", "macro accuracy", "worst task"):
        table.add_column(heading, justify="left" if heading in ("plan", "worst task") else "right", no_wrap=True)
    for row in outcome.rows:
        table.add_row(
            row.name,
            f"{row.image_gflops:.3f}",
            _interval(row.latency),
            _interval(row.macro),
            f"{row.worst_task} {_interval(row.worst)}",
        )
    console.print(table)
    for name, interval in outcome.tuned_minus.items():
        sure = "excludes" if interval.excludes_zero else "includes"
        console.print(f"tuned - {name}: {_interval(interval, sign='+')}, {sure} zero")
    console.print(f"\n{outcome.version} registered, alias {outcome.alias}")
    word = "meets" if outcome.met else "MISSES"
    console.print(f"in a fresh process: {_interval(outcome.fresh_ratio)} of dense, {word} {outcome.limit}")
    console.print(f"score reproduced by the pulled profile: {'yes' if outcome.reproduced else 'NO'}")
    for path in outcome.paths.values():
        console.print(f"  {path}", highlight=False)
    console.print(f"{outcome.seconds:.0f} s")


def _interval(interval: Any, sign: str = "") -> str:
    return f"{interval.value:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}]"


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """One line and exit code 2 for what a user can mend; the traceback only on request."""
    try:
        yield
    except KeyboardInterrupt:
        stderr.print("interrupted; what is finished is kept: run the same command again to resume", style="red")
        raise typer.Exit(130) from None
    except (AutotuneError, BTPError) as error:
        if debug:
            raise
        stderr.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def main() -> None:
    app()


if __name__ == "__main__":
    main()
