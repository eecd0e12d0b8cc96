"""Options that several commands share: their types, flags and help texts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from autotune.config import MIN_TRIALS, STORAGE

__all__ = [
    "CORES",
    "AnswerersOption",
    "DataOption",
    "DebugOption",
    "DeviceOption",
    "FinalistsOption",
    "FreshOption",
    "GuardOption",
    "JsonOption",
    "LearnOption",
    "LimitOption",
    "MarginOption",
    "ModelOption",
    "OutOption",
    "PromoteOption",
    "RegistryOption",
    "RepeatsOption",
    "SamplerOption",
    "SeedOption",
    "StorageOption",
    "ThreadsOption",
    "TrialsOption",
    "WhoOption",
    "WorkersOption",
]

ModelOption = Annotated[str, typer.Option(help="Local folder or hub id of your model; default: the reference VLM.")]
DataOption = Annotated[Path | None, typer.Option(help="Your questions, as for tune; default: the reference's.")]
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
    int, typer.Option(min=1, help="Processes that try trials; with several, each loads the model and has its cores.")
]
AnswerersOption = Annotated[
    int,
    typer.Option("--workers", min=0, help="Processes that answer questions, one thread each; 0: every core, or 1 GPU."),
]
StorageOption = Annotated[
    str | None,
    typer.Option(
        envvar=STORAGE,
        help="Database of the study, for workers on several hosts: postgresql+psycopg://…; default: an SQLite file.",
    ),
]
RepeatsOption = Annotated[int, typer.Option(min=4, help="Pairs of a latency measurement.")]
FreshOption = Annotated[bool, typer.Option("--fresh", help="Start anew: forget the study that --out holds.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
SamplerOption = Annotated[str, typer.Option(help="Who draws: gp, tpe, nsga2, qmc or random.")]
GuardOption = Annotated[
    str, typer.Option(help='Least share of its dense accuracy that the worst task must keep: "worst_task>=0.95".')
]
MarginOption = Annotated[float, typer.Option(min=0.0, help="Macro accuracy below dense that a certified plan may be.")]
FinalistsOption = Annotated[int, typer.Option("--finalists", min=1, max=8, help="Plans to certify, best first.")]
LearnOption = Annotated[bool, typer.Option("--learn", help="Try a plan learned by gradient too; takes minutes.")]
RegistryOption = Annotated[
    str | None,
    typer.Option("--registry", envvar="MLFLOW_TRACKING_URI", help="MLflow address; default: an SQLite file."),
]
PromoteOption = Annotated[
    bool, typer.Option("--promote/--no-promote", help="Make what is certified champion of its device.")
]
WhoOption = Annotated[str, typer.Option(help="Who promotes, for the log; default: this process.")]
DeviceOption = Annotated[str, typer.Option(help="torch device, such as cpu or cuda.")]
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
