"""Studies that nobody ran: as many believable trials as a page is to be tried with, in the tables within moments."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from sqlalchemy import Connection, func, insert, select

from autotune.objective import Told
from autotune.registry import Registry
from autotune.store import Database
from autotune.store.tables import evaluation, job, lease
from btp.plan import Plan, Stage, round_half_up
from tests.autotune.registries import CERTIFIED, PROFILE, register

__all__ = ["DENSE", "TASKS", "certify", "make_study", "told_trials"]

TASKS = ("attribute", "caption", "counting", "existence", "reading", "spatial")
HARD = (0.10, 0.25, 0.30, 0.08, 0.60, 0.35)  # how much of each task's accuracy the image's last token holds
GOOD = {
    "diversity": 1.0,
    "max_sum": 0.95,
    "joint": 0.9,
    "balanced": 0.8,
    "attention": 0.6,
    "uniform": 0.5,
    "random": 0.4,
}
FIXED = {
    "hand-set": "balanced",
    "hand-set at limit": "balanced",
    "random": "random",
    "uniform": "uniform",
    "hand-set, calibrated layers": "balanced",
    "diversity in stages": "diversity",
    "BTP (paper) at limit": "joint",
    "FastV at limit": "attention",
    "DivPrune at limit": "diversity",
}
NUM_LAYERS, NUM_IMAGE_TOKENS, NUM_SAMPLES = 24, 576, 288
LOOKS = (32, 96, NUM_SAMPLES)
DENSE_BY_TASK = dict(zip(TASKS, (0.96, 0.88, 0.91, 0.99, 0.84, 0.90), strict=True))
DENSE: dict[str, Any] = {
    "score": float(np.mean(list(DENSE_BY_TASK.values()))),
    "by_task": DENSE_BY_TASK,
    "gflops": 310.0,
    "cache_mib": 54.0,
    "ms": 84.0,
}
TRIAL_S = 20.0
WORKER = "made-up/00000000/pid:[1]/1/1"


def make_study(
    database: Database, name: str, num_trials: int, seed: int, limit: float = 0.6, device: str = "made-up"
) -> None:
    """Write a closed study with all its trials told; two that differ in name and seed alone ask the same question."""
    settings = {"model": "org/made-up-vlm", "name": "made-up", "seed": seed, "device": "cpu", "sampler": "gp"}
    settings |= {"guard": None, "limit": f"prefill_p50<={limit:g}x", "num_trials": num_trials, "threads": 1}
    fits = {"model": _digest("model"), **{f"data, {split}": _digest(split) for split in ("select", "certify")}}
    fits |= {"name": device, "dtype": "float32", "attention": "sdpa", "batch_size": 1}
    fits |= {"prompt_tokens": NUM_IMAGE_TOKENS + 40, "image_tokens": NUM_IMAGE_TOKENS}
    config = {"settings": settings, "fits": fits, "scope": _digest(device), "registry": "", "dense": DENSE}
    trials = told_trials(num_trials, seed, limit)
    began = time.time() - TRIAL_S * num_trials

    def act(connection: Connection) -> None:
        row = {"study": name, "config": config, "target": num_trials, "is_open": False, "created": began}
        connection.execute(insert(job), [row])
        first = (connection.execute(select(func.max(lease.c.token))).scalar() or 0) + 1
        connection.execute(insert(lease), [_lease(name, first, told) for told in trials])
        connection.execute(insert(evaluation), [_evaluation(name, first, told, began) for told in trials])

    database.run(act)


def certify(home: Path, study: str, told: Told) -> None:
    """Register a trial's plan as certified, in the registry of a folder."""
    model = replace(PROFILE.model, num_layers=NUM_LAYERS, num_image_tokens=NUM_IMAGE_TOKENS)
    evidence = {"certificate": CERTIFIED, "study": study}
    replace(PROFILE, plan=told.plan, model=model, evidence=evidence).save(home / "profile.json")
    tags = {"study": study, "plan": told.plan.digest}
    register(Registry(f"sqlite:///{home / 'mlflow.db'}"), "made-up", home / "profile.json", tags=tags)


def told_trials(num_trials: int, seed: int, limit: float = 0.6) -> list[Told]:
    """What the trials of such a study came to: fixed plans first, then draws that get better."""
    chance = np.random.default_rng([seed, 7])
    names = [*FIXED, *(f"trial {number}" for number in range(len(FIXED), num_trials))][:num_trials]
    return [_told(number, name, limit, chance) for number, name in enumerate(names)]


def _told(number: int, name: str, limit: float, chance: np.random.Generator) -> Told:
    plan = _plan(name, limit, chance)
    tokens = _tokens(plan)
    alive = float(np.mean(tokens)) / NUM_IMAGE_TOKENS
    ratio = 0.15 + 0.85 * alive + float(chance.normal(0, 0.01))
    worth = GOOD[plan.stages[-1].selector]
    late = plan.stages[0].layer / NUM_LAYERS
    by_task = {
        task: float(np.clip(DENSE_BY_TASK[task] * (1 - hard * (1.3 - worth) * (1 - alive) ** 2 * (1 + late)), 0, 1))
        for task, hard in zip(TASKS, HARD, strict=True)
    }
    by_task = {task: float(np.clip(value + chance.normal(0, 0.008), 0, 1)) for task, value in by_task.items()}
    score = float(np.mean(list(by_task.values())))
    looks = LOOKS if score > 0.88 - 0.04 * chance.random() or name in FIXED else LOOKS[: int(chance.integers(1, 3))]
    measured = len(looks) > 1
    half = float(chance.uniform(0.004, 0.02)) if measured else 0.0
    proxy = float(0.02 + (DENSE["score"] - score) * chance.uniform(0.8, 1.2)) if score < DENSE["score"] else 0.02
    early = ((look, score + float(chance.normal(0, 0.2 / look**0.5)), proxy) for look in looks[:-1])
    told = Told(
        number=number,
        name=name,
        plan=plan,
        draw=None if name in FIXED else {"budget": alive, "selector": plan.stages[-1].selector},
        num_samples=looks[-1],
        score=score,
        proxy=proxy,
        nll=0.2 + proxy,
        by_task=by_task,
        worst_task=min(by_task[task] / DENSE_BY_TASK[task] for task in TASKS),
        ratio=ratio,
        ratio_low=ratio - half,
        ratio_high=ratio + half,
        measured=measured,
        limit=limit,
        complete=looks == LOOKS,
        looks=(*early, (looks[-1], score, proxy)),
    )
    return _with_intervals(told, tokens, alive)


def _with_intervals(told: Told, tokens: tuple[int, ...], alive: float) -> Told:
    sizes = {"tokens": tokens, "image_gflops": DENSE["gflops"] * alive, "cache_mib": DENSE["cache_mib"] * alive}
    if not told.complete:
        return replace(told, **sizes)
    wide = 0.5 / told.num_samples**0.5
    minus = {task: told.by_task[task] - DENSE_BY_TASK[task] for task in TASKS}
    minus["macro"] = told.score - DENSE["score"]
    return replace(
        told,
        score_low=max(0.0, told.score - wide),
        score_high=min(1.0, told.score + wide),
        minus_dense={task: (value, value - wide / 2, value + wide / 2) for task, value in minus.items()},
        **sizes,
    )


def _plan(name: str, limit: float, chance: np.random.Generator) -> Plan:
    """Two stages that come to about the limit; drawn ones to anything about it."""
    selector = FIXED.get(name) or str(chance.choice(list(GOOD)[:5]))
    aimed = limit if name in FIXED and name != "hand-set" else float(chance.uniform(0.6, 1.25)) * limit
    aimed = 1.15 * limit if name == "hand-set" else aimed
    share = float(np.clip((aimed - 0.15) / 0.85, 0.05, 0.9))
    first = int(chance.integers(0, max(1, int(share * NUM_LAYERS / 2)) + 1))
    keep = float(np.clip((share * NUM_LAYERS - first) / (NUM_LAYERS - first) * 1.15, 0.02, 0.98))
    second = first + 1 + int(chance.integers(4, 10))
    weight = float(chance.uniform(0.2, 0.6))
    stages = [Stage(layer=first, keep=keep, selector=selector, attention_weight=weight)]
    if second < NUM_LAYERS:
        stages.append(Stage(layer=second, keep=keep * 0.8, selector=selector, attention_weight=min(1.0, 2 * weight)))
    return Plan(stages=tuple(stages))


def _tokens(plan: Plan) -> tuple[int, ...]:
    alive = np.full(NUM_LAYERS, NUM_IMAGE_TOKENS)
    for stage in plan.stages:
        alive[stage.layer :] = round_half_up(stage.keep * NUM_IMAGE_TOKENS)
    return tuple(alive.tolist())


def _lease(study: str, first: int, told: Told) -> dict[str, Any]:
    is_fixed = told.name in FIXED
    work: Mapping[str, Any] = told.plan.to_dict() if is_fixed else dict(told.draw or {})
    return {
        "token": first + told.number,
        "study": study,
        "number": told.number,
        "attempt": 0,
        "name": told.name if is_fixed else None,
        "draw_index": None if is_fixed else told.number - len(FIXED),
        "work": work,
        "state": "told",
        "settled": True,
        "worker": WORKER,
    }


def _evaluation(study: str, first: int, told: Told, began: float) -> dict[str, Any]:
    at = began + TRIAL_S * (told.number + 1)
    known = {"study": study, "token": first + told.number, "number": told.number, "key": told.plan.digest}
    return {**known, "record": told.to_dict(), "told": at}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
