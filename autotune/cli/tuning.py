"""Tuning from the command line: jobs, their workers, comparisons, and what is measured of one plan."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.table import Table

from autotune.cli.console import bar, errors, plain, print_tables, stderr
from autotune.cli.options import (
    CORES,
    AnswerersOption,
    DataOption,
    DebugOption,
    DeviceOption,
    FinalistsOption,
    FreshOption,
    GuardOption,
    JsonOption,
    LearnOption,
    LimitOption,
    MarginOption,
    ModelOption,
    OutOption,
    PromoteOption,
    RegistryOption,
    RepeatsOption,
    SamplerOption,
    SeedOption,
    StorageOption,
    ThreadsOption,
    TrialsOption,
    WhoOption,
    WorkersOption,
)
from autotune.cli.progress import Kind, ProgressOption, UntilOption, end_with_parent, showing
from autotune.cli.service import HomeOption, ModelsOption, run_jobs
from autotune.config import STORAGE, AutotuneError, CompareConfig, DrivenError, JobConfig, Limit

if TYPE_CHECKING:
    from autotune.job import Pool

app = typer.Typer()


@app.command()
def demo(
    limit: LimitOption = "prefill_p50<=0.6x",
    out: OutOption = Path("runs/demo"),
    trials: TrialsOption = 40,
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    workers: WorkersOption = 1,
    repeats: RepeatsOption = 12,
    sampler: SamplerOption = "gp",
    guard: GuardOption = "",
    margin: MarginOption = 0.02,
    num_finalists: FinalistsOption = 4,
    learn: LearnOption = False,
    fresh: FreshOption = False,
    name: Annotated[str, typer.Option(help="Name of the registered model.")] = "reference-vlm",
    device: DeviceOption = "cpu",
    storage: StorageOption = None,
    registry: RegistryOption = None,
    promote: PromoteOption = True,
    who: WhoOption = "",
    progress: ProgressOption = "bar",
    as_json: JsonOption = False,
    until_stdin_closes: UntilOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune the reference VLM on its own questions: the whole job on two cores in minutes."""
    with errors(debug):
        from autotune.reference import WEIGHTS

        config = JobConfig(
            model=str(WEIGHTS),
            data=None,
            limit=Limit.parse(limit),
            out=out,
            name=name,
            num_trials=trials,
            seed=seed,
            space=_default_space(),
            repeats=repeats,
            threads=threads,
            answerers=CORES if device == "cpu" else 1,
            fresh=fresh,
            storage=storage,
            tracking_uri=registry,
            device=device,
            sampler=sampler,
            guard=_guard(guard),
            margin=margin,
            num_finalists=num_finalists,
            learn=learn,
            promote=promote,
            who=who,
        )
        pool = _pool(workers, CORES if device == "cpu" else workers)
        _run_job(config, pool, progress, as_json, until_stdin_closes)


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
    workers: WorkersOption = 1,
    ray: Annotated[str, typer.Option(help="Have Ray place the workers: address of its cluster, or auto.")] = "",
    gpus_per_worker: Annotated[float, typer.Option(min=0.0, help="GPUs that Ray gives to each worker.")] = 0.0,
    repeats: RepeatsOption = 12,
    sampler: SamplerOption = "gp",
    guard: GuardOption = "",
    margin: MarginOption = 0.02,
    num_finalists: FinalistsOption = 4,
    learn: LearnOption = False,
    plan: Annotated[list[Path] | None, typer.Option(help="File with a plan to try too; may be given again.")] = None,
    fresh: FreshOption = False,
    space: Annotated[Path | None, typer.Option(help="Search space YAML; default: the one that comes along.")] = None,
    device: DeviceOption = "cpu",
    storage: StorageOption = None,
    registry: RegistryOption = None,
    promote: PromoteOption = True,
    who: WhoOption = "",
    progress: ProgressOption = "bar",
    as_json: JsonOption = False,
    until_stdin_closes: UntilOption = False,
    debug: DebugOption = False,
) -> None:
    """Tune your own model on your own questions."""
    with errors(debug):
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
            answerers=CORES if device == "cpu" else 1,
            fresh=fresh,
            storage=storage,
            tracking_uri=registry,
            device=device,
            sampler=sampler,
            guard=_guard(guard),
            margin=margin,
            num_finalists=num_finalists,
            learn=learn,
            promote=promote,
            who=who,
            plans=tuple(plan or ()),
        )
        pool = _pool(workers, CORES if device == "cpu" else workers, ray, gpus_per_worker)
        _run_job(config, pool, progress, as_json, until_stdin_closes)


@app.command()
def worker(
    study: Annotated[str, typer.Option(help="Name of the study, as autotune tune prints it.")] = "",
    storage: StorageOption = None,
    model: Annotated[str | None, typer.Option(help="Where the model lies here, if elsewhere than there.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Where the questions lie here, if elsewhere than there; of --jobs, the folder of all data."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="torch device here, if another than there.")] = None,
    answerers: Annotated[
        int, typer.Option(min=0, help="Processes that answer questions, one thread each; 0: every core.")
    ] = 0,
    jobs: Annotated[bool, typer.Option("--jobs", help="Run the jobs that autotune serve takes.")] = False,
    home: HomeOption = Path("runs/service"),
    models: ModelsOption = None,
    registry: RegistryOption = None,
    once: Annotated[bool, typer.Option("--once", help="Of --jobs: end when nothing waits.")] = False,
    until_stdin_closes: UntilOption = False,
    debug: DebugOption = False,
) -> None:
    """Try trials of a running study, or run jobs, on any host; Ctrl-C hands the current one back."""
    with errors(debug):
        if jobs == bool(study):
            raise AutotuneError("autotune worker takes --study NAME to try its trials, or --jobs, got both or neither")
        if jobs:
            run_jobs(home, models, data, storage, registry, once, until_stdin_closes)
        else:
            here = {"model": model, "data": data, "device": device, "answerers": answerers or CORES}
            _try_trials(study, storage, here, until_stdin_closes)


def _try_trials(study: str, storage: str | None, here: dict[str, Any], until_stdin_closes: bool) -> None:
    from autotune import stopping
    from autotune import worker as workers

    if storage is None:
        raise AutotuneError(f"--storage must be the database of the study, best through {STORAGE}, got none")
    with stopping.stopping(with_parent=until_stdin_closes) as stop:
        try:
            told = workers.serve(storage, study, workers.Overrides(**here), stop, stderr.print)
        except stopping.StoppedError:
            stderr.print("stopped; what it was at is handed back")
            return
    stderr.print(f"done: {told} trials told by this worker")


@app.command()
def compare(
    model: ModelOption = "",
    data: DataOption = None,
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
    workers: AnswerersOption = 0,
    repeats: RepeatsOption = 12,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew: forget this comparison's scores.")] = False,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare the published systems on your model at equal FLOPs: accuracy, measured latency, cache."""
    with errors(debug):
        fractions, names = CompareConfig.parse_fractions(tokens), CompareConfig.parse_systems(systems)
        _check_pair(model, data)
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
            answerers=workers or (CORES if device == "cpu" else 1),
            fresh=fresh,
            device=device,
        )
        _run_comparison(config, as_json)


@app.command("learn")
def learn_plan(
    model: ModelOption = "",
    data: DataOption = None,
    tokens: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="FLOPs of this fraction of the image tokens in every layer.")
    ] = 0.33,
    steps: Annotated[int, typer.Option(min=4, help="Steps of 8 prompts each.")] = 120,
    stages: Annotated[int, typer.Option(min=1, help="Stages, at most.")] = 4,
    out: Annotated[Path, typer.Option(help="Where to write the plan.")] = Path("learned.json"),
    seed: SeedOption = 0,
    threads: ThreadsOption = 1,
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Learn keep ratios and lambda of every stage by gradient, label-free, in minutes; `tune --plan` tries the plan."""
    with errors(debug):
        _check_pair(model, data)
        from autotune.plan_file import learn_file

        with bar() as progress:
            line = progress.add_task("learning", total=None, told="")
            found = learn_file(
                model,
                data,
                tokens,
                out,
                steps=steps,
                max_stages=stages,
                seed=seed,
                threads=threads,
                device=device,
                say=lambda what: progress.update(line, description="learning", told=what),
            )
    if as_json:
        print(json.dumps({"plan": found.plan.to_dict(), "cost": found.cost, "seconds": found.seconds}))
    else:
        for stage in found.plan.stages:
            print(f"before layer {stage.layer}: keep {stage.keep:.3f}, lambda {stage.attention_weight:.3f}")
        print(f"{found.cost:.3f} of dense's image-token FLOPs, {found.seconds:.0f} s\n  {out}")


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
    with errors(debug):
        from autotune.plan_file import measure_file

        found = measure_file(profile, model, data, Limit.parse(limit), threads, repeats, device)
        if as_json:
            print(json.dumps(found.to_dict()))
        else:
            word = "meets" if found.met else "misses"
            print(f"{found.ms:.1f} ms, {found.ratio:.3f} of dense's {found.dense_ms:.1f} ms: {word} {found.limit}")
    if not found.met:
        raise typer.Exit(1)


def _check_pair(model: str, data: Path | None) -> None:
    if bool(model) != (data is not None):
        raise AutotuneError("--model and --data must be given together, or neither for the reference VLM")


def _guard(text: str) -> float | None:
    from autotune.objective import Guard

    return Guard.parse(text).share if text else None


def _default_space() -> Path:
    """The search space that comes along, in an installed wheel or in a checkout."""
    inside = Path(__file__).parents[1] / "search_spaces" / "reference.yaml"
    return inside if inside.exists() else Path(__file__).parents[2] / "search_spaces" / "reference.yaml"


def _pool(num_workers: int, cores: int, ray: str = "", gpus: float = 0.0) -> Pool | None:
    """Who tries the trials; None for this process itself."""
    if ray:
        from autotune.ray_pool import RayPool

        return RayPool(num_workers=num_workers, address=ray, gpus_per_worker=gpus)
    if num_workers == 1:
        return None
    from autotune.worker import LocalPool

    return LocalPool(num_workers, cores)


def _run_job(config: JobConfig, pool: Pool | None, kind: Kind, as_json: bool, until_stdin_closes: bool) -> None:
    from autotune import data, delivery, job

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # whatever is being tried is handed back
    if until_stdin_closes:
        end_with_parent()
    with showing(kind, config.num_trials, config.num_trials + job.STEPS_AFTER, quiet=as_json) as shown:
        try:
            outcome = job.run(config, data.load_splits(config.data), shown.step, pool, shown.opened)
        except DrivenError as error:
            shown.driven(error.study)
            raise
        shown.over(outcome.to_dict())
    if as_json:
        print(json.dumps(outcome.to_dict()))
    elif kind != "jsonl":
        rows = [row.cells() for row in outcome.rows]
        print_tables([Table(title=outcome.title)], delivery.HEADINGS, [rows], outcome.lines(), 120)
    if not (outcome.met and outcome.reproduced):
        raise typer.Exit(1)


def _run_comparison(config: CompareConfig, as_json: bool) -> None:
    from autotune import compare, data, results

    with bar() as progress:
        line = progress.add_task("reading the data", total=None, told="")

        def show(what: str, done: int, steps: int) -> None:
            progress.update(line, description=what, completed=done, total=steps, told=f"{done}/{steps}")

        found = compare.run(config, data.load_splits(config.data), show)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        files = [f"  {path}" for path in compare.paths(config)]
        for fraction in found.fractions:
            rows = [row.cells() for row in found.at(fraction)]
            print_tables([plain(found.title(fraction))], results.HEADINGS, [rows], [], 100)
            headings, by_task = found.by_task(fraction)
            print_tables([plain("accuracy by task, %")], headings, [by_task], [], 100)
        print_tables([], (), [], [*found.notes(), *files], 100)
