"""The command line: reads what the user typed, wires the concrete parts, prints. The only place that does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from autotune.config import AutotuneError, CompareConfig, JobConfig, Limit
from autotune.options import (
    CORES,
    DebugOption,
    DeviceOption,
    FinalistsOption,
    FreshOption,
    GuardOption,
    JsonOption,
    LimitOption,
    MarginOption,
    OutOption,
    RegistryOption,
    RepeatsOption,
    SamplerOption,
    SeedOption,
    ThreadsOption,
    TrialsOption,
    WorkersOption,
)
from btp.errors import BTPError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Find, prove and hand out image-token pruning plans for vision-language models.",
)
stderr = Console(stderr=True)


@app.command()
def demo(
    limit: LimitOption = "prefill_p50<=0.5x",
    out: OutOption = Path("runs/demo"),
    trials: TrialsOption = 40,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = 0,
    repeats: RepeatsOption = 12,
    sampler: SamplerOption = "gp",
    guard: GuardOption = "",
    margin: MarginOption = 0.02,
    num_finalists: FinalistsOption = 4,
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
            sampler=sampler,
            guard=_guard(guard),
            margin=margin,
            num_finalists=num_finalists,
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
    sampler: SamplerOption = "gp",
    guard: GuardOption = "",
    margin: MarginOption = 0.02,
    num_finalists: FinalistsOption = 4,
    plan: Annotated[list[Path] | None, typer.Option(help="File with a plan to try too; may be given again.")] = None,
    fresh: FreshOption = False,
    space: Annotated[Path | None, typer.Option(help="Search space YAML; default: the one that comes along.")] = None,
    device: DeviceOption = "cpu",
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
            sampler=sampler,
            guard=_guard(guard),
            margin=margin,
            num_finalists=num_finalists,
            plans=tuple(plan or ()),
        )
        _run_job(config, as_json)


@app.command()
def compare(
    model: Annotated[str, typer.Option(help="Local folder or hub id of your model; default: the reference VLM.")] = "",
    data: Annotated[Path | None, typer.Option(help="Your questions, as for tune; default: the reference's.")] = None,
    tokens: Annotated[
        str, typer.Option(help="Budgets: FLOPs of these fractions of the image tokens in every layer.")
    ] = "0.33,0.22,0.11",
    systems: Annotated[str, typer.Option(help="Only these, such as fastv,dart; default: all. Dense always runs.")] = "",
    split: Annotated[
        Literal["select", "certify"],
        typer.Option(help="Questions to answer; to choose a method by certify is to spend it."),
    ] = "select",
    out: Annotated[
        Path, typer.Option(help="Folder for the tables, the picture and the scores; another run into it writes anew.")
    ] = Path("runs/compare"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw of calibration samples.")] = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = 0,
    repeats: RepeatsOption = 12,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew: forget this comparison's scores.")] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the published systems on your model at equal FLOPs: accuracy, measured latency, cache."""
    with _errors(debug):
        fractions, names = CompareConfig.parse_fractions(tokens), CompareConfig.parse_systems(systems)
        if bool(model) != (data is not None):
            raise AutotuneError("--model and --data must be given together, or neither for the reference VLM")
        from autotune.reference import WEIGHTS

        config = CompareConfig(
            model=model or str(WEIGHTS),
            data=data,
            fractions=fractions,
            systems=names,
            split=split,
            out=out,
            seed=seed,
            repeats=repeats,
            threads=threads,
            workers=workers or (CORES if device == "cpu" else 1),
            fresh=fresh,
            device=device,
        )
        _run_comparison(config, as_json)


@app.command()
def measure(
    profile: Annotated[Path, typer.Argument(help="A profile.json, or a plan.")],
    model: Annotated[str, typer.Option(help="Local folder or hub id of the model it was made for.")] = "",
    data: Annotated[Path | None, typer.Option(help="Where to take the prompt from; default: the reference's.")] = None,
    limit: LimitOption = "prefill_p50<=1x",
    threads: ThreadsOption = 1,
    repeats: RepeatsOption = 36,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Measure a profile's latency on this device, paired with dense; exit 1 where it misses the limit."""
    with _errors(debug):
        from autotune.bench import measure_file

        bound = Limit.parse(limit)
        ratio, dense_ms, met = measure_file(profile, model, data, bound, threads, repeats, device)
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


def _guard(text: str) -> float | None:
    from autotune.objective import Guard

    return Guard.parse(text).share if text else None


def _default_space() -> Path:
    """The search space that comes along, in an installed wheel or in a checkout."""
    inside = Path(__file__).parent / "search_spaces" / "reference.yaml"
    return inside if inside.exists() else Path(__file__).parents[1] / "search_spaces" / "reference.yaml"


def _run_job(config: JobConfig, as_json: bool) -> None:
    from autotune import data, delivery, job

    with _bar() as bar:
        line = bar.add_task("reading the data", total=config.num_trials + job.STEPS_AFTER, told="")

        def show(what: str, num_told: int, steps: int, best: float | None) -> None:
            told = f"{num_told}/{config.num_trials} trials, best {'-' if best is None else f'{best:.3f}'}"
            bar.update(line, description=what, completed=steps, told=told)

        outcome = job.run(config, data.load_splits(config.data), show)
    if as_json:
        print(json.dumps(outcome.to_dict()))
    else:
        rows = [row.cells() for row in outcome.rows]
        _print([Table(title=outcome.title)], delivery.HEADINGS, [rows], outcome.lines(), 120)
    if not (outcome.met and outcome.reproduced):
        raise typer.Exit(1)


def _run_comparison(config: CompareConfig, as_json: bool) -> None:
    from autotune import compare, data, results

    with _bar() as bar:
        line = bar.add_task("reading the data", total=None, told="")

        def show(what: str, done: int, steps: int) -> None:
            bar.update(line, description=what, completed=done, total=steps, told=f"{done}/{steps}")

        found = compare.run(config, data.load_splits(config.data), show)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        files = [f"  {path}" for path in compare.paths(config)]
        for fraction in found.fractions:
            rows = [row.cells() for row in found.at(fraction)]
            _print([_plain(found.title(fraction))], results.HEADINGS, [rows], [], 100)
            headings, by_task = found.by_task(fraction)
            _print([_plain("accuracy by task, %")], headings, [by_task], [], 100)
        _print([], (), [], [*found.notes(), *files], 100)


def _bar() -> Progress:
    columns = (
        TextColumn("{task.description}", table_column=Column(width=30, no_wrap=True)),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[told]}"),
    )
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr)


def _plain(title: str) -> Table:
    return Table(title=title, box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))


def _print(
    tables: Sequence[Table],
    headings: Sequence[str],
    rows: Sequence[Sequence[Sequence[str]]],
    lines: Sequence[str],
    width: int,
) -> None:
    """The tables with their rows, then the lines; a pipe is no reason to break a table."""
    console = Console(highlight=False)
    console.width = max(console.width, width)
    for table, own in zip(tables, rows, strict=True):
        for index, heading in enumerate(headings):
            text = not any(character.isdigit() for character in own[0][index][:1])
            table.add_column(heading, justify="left" if text else "right", no_wrap=True)
        for cells in own:
            table.add_row(*cells)
        console.print(table)
    for line in lines:
        console.print(line, markup=False)


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
