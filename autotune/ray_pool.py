"""A pool of workers that Ray places: one Ray Tune trial is one long-lived worker, which asks the shared study.

Ray decides where workers run and starts those that die again; what is tried, and what it came to, is the database's.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune

from autotune.config import OPTUNA_PROXY, STORAGE, AutotuneError, JobConfig
from autotune.study import Study
from autotune.worker import Overrides, serve

__all__ = ["RayPool", "Serve"]

MAX_DEATHS = 20  # of one worker; what it was at is tried by another, so a death costs one trial's time
LOCAL, AUTO = "local", "auto"
KNOCK_S = 5.0

Serve = Callable[[str, str, Overrides, Callable[[], bool], Callable[[str], None]], int]


@dataclass(frozen=True)
class RayPool:
    """So many workers on a Ray cluster, each with so many CPUs and GPUs to itself.

    address: of the cluster, auto for the one that runs here, local for one of this process's own. serve: what a worker
    does, as `autotune.worker.serve`. A worker that measures latency has to own a whole GPU.
    """

    num_workers: int
    address: str = AUTO
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    serve: Serve = serve

    def __call__(self, study: Study, config: JobConfig, say: Callable[[str], None]) -> None:
        """Return once the study has its trials. Raises AutotuneError for a cluster that is not there or too small."""
        if self.gpus_per_worker % 1 or (config.device.startswith("cuda") and not self.gpus_per_worker):
            raise AutotuneError(
                f"--gpus-per-worker must be a whole number, and at least 1 for {config.device}, got "
                f"{self.gpus_per_worker:g}; on a GPU that others use no latency can be measured"
            )
        self._connect()
        here = Overrides(answerers=max(1, int(self.cpus_per_worker)) if config.device == "cpu" else 1)
        resources = {"cpu": self.cpus_per_worker, "gpu": self.gpus_per_worker}
        self._check_room(resources)
        trainable = tune.with_parameters(_work, job=(_environment(study), study.name, here, self.serve))
        with tempfile.TemporaryDirectory(prefix="btp-ray-") as folder, ExitStack() as stack:
            if self.address == LOCAL:
                stack.callback(ray.shutdown)
            tuner = tune.Tuner(
                tune.with_resources(trainable, resources),
                param_space={"worker": tune.grid_search(list(range(self.num_workers)))},
                run_config=tune.RunConfig(
                    name=study.name,
                    storage_path=folder,
                    failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
                    callbacks=[_Says(say)],
                    verbose=0,
                ),
            )
            results = tuner.fit()
        if not study.is_done(config.num_trials):
            metrics = [results[index].metrics or {} for index in range(len(results))]
            refused = [last["refused"] for last in metrics if "refused" in last]
            said = [*map(str, results.errors), *refused]
            raise AutotuneError(
                f"Ray's workers must finish the study, but they ended before: {said[-1] if said else 'no error'}; mend "
                "that, and run the same command again to resume"
            )

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        try:
            self._knock()
            ray.init(
                address=None if self.address == LOCAL else self.address,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (OSError, ValueError) as error:
            raise AutotuneError(
                f"--ray must be the address of a running cluster, got {self.address!r}; start one with ray start "
                "--head, or give local"
            ) from error

    def _knock(self) -> None:
        """Raise OSError or ValueError where nobody listens at the address: Ray itself would try for minutes."""
        if self.address not in (LOCAL, AUTO):
            host, _, port = self.address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), timeout=KNOCK_S).close()

    def _check_room(self, resources: dict[str, float]) -> None:
        """Ray would wait for ever for a machine that may come."""
        there: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, least in resources.items():
            if there.get(name.upper(), 0.0) < least:
                raise AutotuneError(
                    f"one worker needs {least:g} {name.upper()} of Ray's cluster, which has "
                    f"{there.get(name.upper(), 0.0):g}; add machines, or give fewer --gpus-per-worker"
                )


def _environment(study: Study) -> dict[str, str]:
    """What a worker has to have in its environment: Ray's own would show it in its dashboard."""
    kept = {name: value for name, value in os.environ.items() if name.startswith("PG") or name == OPTUNA_PROXY}
    return {**kept, STORAGE: study.storage}


def _work(settings: dict[str, Any], job: tuple[dict[str, str], str, Overrides, Serve]) -> None:
    """One worker, in a process of Ray's. The model is loaded once, however many trials it tries."""
    environment, name, here, work = job
    os.environ.update(environment)
    told = 0

    def say(what: str) -> None:
        nonlocal told
        told += "told" in what
        tune.report({"worker": settings["worker"], "says": what, "told": told})

    try:
        work(environment[STORAGE], name, here, lambda: False, say)
    except AutotuneError as error:  # to start again would change nothing
        tune.report({"worker": settings["worker"], "refused": str(error)})


class _Says(tune.Callback):
    """Says that there is something new, whenever a worker does."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def on_trial_result(self, *_: Any, **__: Any) -> None:
        self._say("searching")
