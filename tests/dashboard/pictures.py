"""What plans look at, for pages to show: drawn pictures, kept as a job keeps them."""

from __future__ import annotations

import base64
import functools
import io
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from autotune.store import Database, Results
from btp.plan import Plan

__all__ = ["GRID", "QUESTIONS", "keep_sights", "samples_of", "seen"]

GRID = 24  # tokens a side
SIZE = 336  # pixels a side
QUESTIONS = (("Which shape is left?", "circle", "spatial"), ("How many squares are there?", "2", "counting"))


def keep_sights(database: Database, scope: str, *plans: Plan) -> None:
    """Keep the pictures under "sights", and what each of the plans leaves of them."""
    results = Results(database, scope)
    results.once("sights", samples_of)
    for plan in plans:
        results.once(f"sight-{plan.digest[:20]}", functools.partial(seen, plan))


def samples_of() -> dict[str, Any]:
    return {"samples": [_sample(*told, seed) for seed, told in enumerate(QUESTIONS)]}


def seen(plan: Plan, grid: int = GRID) -> dict[str, Any]:
    """What a plan leaves of each picture, by chance but for a seed. grid: tokens a side."""
    return {"samples": [_seen(plan, answer, seed, grid) for seed, (_, answer, _) in enumerate(QUESTIONS)]}


def _sample(question: str, answer: str, task: str, seed: int) -> dict[str, Any]:
    picture = Image.new("RGB", (SIZE, SIZE), ("#d7e8f5", "#f3e6c8")[seed % 2])
    pen = ImageDraw.Draw(picture)
    pen.ellipse((40, 90, 150, 200), fill="#c0392b")
    pen.rectangle((200, 60, 290, 150), fill="#2c7a4b")
    pen.rectangle((210, 220, 300, 310), fill="#34495e")
    file = io.BytesIO()
    picture.save(file, "PNG")
    image = base64.b64encode(file.getvalue()).decode()
    told = {"question": question, "answer": answer, "task": task, "dense": answer}
    return {"image": image, "width": SIZE, "height": SIZE, **told}


def _seen(plan: Plan, answer: str, seed: int, grid: int) -> dict[str, Any]:
    order = np.random.default_rng(seed).permutation(grid * grid).tolist()
    boxes = [(index % grid / grid, index // grid / grid, 1 / grid, 1 / grid) for index in range(grid * grid)]
    kept = zip(plan.stages, plan.num_kept(grid * grid), strict=True)
    stages = [{"layer": stage.layer, "tokens": sorted(order[:num])} for stage, num in kept]
    return {"answer": answer, "score": 1.0, "grid": boxes, "stages": stages}
