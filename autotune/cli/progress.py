"""How a running job shows how far it is: to a person a bar, to a program a JSON object a line, or not at all."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer

from autotune.cli.console import bar
from autotune.job_process import SILENCE_S

__all__ = ["Kind", "ProgressOption", "Shown", "UntilOption", "end_with_parent", "showing"]

Kind = Literal["bar", "jsonl", "none"]
ProgressOption = Annotated[
    Kind, typer.Option(help="A bar for a terminal, jsonl: a JSON object a step on standard output, or none.")
]
UntilOption = Annotated[bool, typer.Option("--until-stdin-closes", hidden=True)]
GRACE_S = 20.0  # for a process whose parent is gone


@dataclass(frozen=True, slots=True)
class Shown:
    """step: of every step, as `autotune.job.Progress`. opened: of the study's name. over: of the outcome.

    driven: of a study that another process drives, so that this one ends.
    """

    step: Callable[[str, int, int, float | None], None]
    opened: Callable[[str], None]
    over: Callable[[dict[str, Any]], None]
    driven: Callable[[str], None]


@contextmanager
def showing(kind: Kind, target: int, num_steps: int, quiet: bool) -> Iterator[Shown]:
    """target: trials to reach. quiet: a bar says no more than how far it is."""
    if kind == "jsonl":
        yield _lines(target, num_steps)
    elif kind == "none":
        yield Shown(lambda *_: None, lambda _: None, lambda _: None, lambda _: None)
    else:
        with bar() as progress:
            line = progress.add_task("reading the data", total=num_steps, told="")

            def step(what: str, num_told: int, steps: int, best: float | None) -> None:
                told = f"{num_told}/{target} trials, best {'-' if best is None else f'{best:.3f}'}"
                progress.update(line, description=what, completed=steps, told=told)

            def opened(study: str) -> None:
                if not quiet:
                    text = f"others may join: autotune worker --study {study} --storage DATABASE"
                    progress.console.print(f"study {study}\n{text}", markup=False, soft_wrap=True)

            yield Shown(step, opened, lambda _: None, lambda _: None)


def _lines(target: int, num_steps: int) -> Shown:
    studies: list[str] = []

    def step(what: str, num_told: int, steps: int, best: float | None) -> None:
        counts = {"told": num_told, "target": target, "done": steps, "steps": num_steps}
        say({"event": "progress", "what": what, **counts, "best": best, "study": studies[-1] if studies else None})

    def say(data: dict[str, Any]) -> None:
        print(json.dumps(data), flush=True)

    return Shown(
        step,
        studies.append,
        lambda outcome: say({"event": "outcome", **outcome}),
        lambda study: say({"event": "driven", "study": study}),
    )


def end_with_parent() -> None:
    """Have this process end as by SIGTERM when standard input does, which is when whoever holds its other end ends.

    Also where something came there before and nothing more does: that one may be stopped, and another at work instead.
    Where it does not end in time, it and all that it started are killed, if it leads a group of its own.
    """

    def watch() -> None:
        there, patience_s = sys.stdin.fileno(), None
        while select.select([there], [], [], patience_s)[0] and os.read(there, 4096):
            patience_s = SILENCE_S
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_S)
        os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
