"""What plans look at: for a few questions, which image tokens each stage leaves, and where in the picture they lie."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image

import btp
from autotune.bench import Bench
from autotune.data import Example
from btp.ops import Grids
from btp.plan import Plan

__all__ = ["SAMPLES", "boxes", "keep_sights", "sight_name"]

SAMPLES = "sights"  # under which the pictures and questions are kept, once for all plans
NUM_SAMPLES = 4
MAX_SIDE = 336  # pixels of a kept picture
NOWHERE = (0.0, 0.0, 0.0, 0.0)

Box = tuple[float, float, float, float]


def sight_name(plan: Plan) -> str:
    """Under which it is kept what a plan looks at."""
    return f"sight-{plan.digest[:20]}"


def keep_sights(bench: Bench, plans: Iterable[Plan]) -> None:
    """Note what every plan looks at in a few questions of `select`, each task's first; what is kept is not done again.

    The pictures are kept with it, scaled down, in the database.
    """
    chosen = _chosen(bench.splits["select"])
    dense = bench.scores(Plan(stages=()), "select")

    def samples() -> dict[str, Any]:
        return {"samples": [_sample(bench, number, dense.answers[number]) for number in chosen]}

    bench.results.once(SAMPLES, samples)
    for plan in plans:

        def seen(plan: Plan = plan) -> dict[str, Any]:
            return {"samples": [_seen(bench, plan, number) for number in chosen]}

        bench.results.once(sight_name(plan), seen)


def _chosen(examples: Sequence[Example]) -> list[int]:
    """Numbers of the first question of each task, no picture twice where that can be."""
    found: dict[str, int] = {}
    pictures: set[str] = set()
    for number, example in enumerate(examples):
        if example.task not in found and example.image_id not in pictures:
            found[example.task] = number
            pictures.add(example.image_id)
    return list(found.values())[:NUM_SAMPLES]


def _sample(bench: Bench, number: int, answer: str) -> dict[str, Any]:
    example = bench.splits["select"][number]
    picture = _picture(bench, example)
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return {
        "image": base64.b64encode(file.getvalue()).decode(),
        "width": picture.width,
        "height": picture.height,
        "question": example.question,
        "answer": example.answer,
        "task": example.task,
        "dense": answer,
    }


def _picture(bench: Bench, example: Example) -> Image.Image:
    """The picture as the encoder sees it, where that is one view of fixed size: a processor may crop."""
    inputs, processor = bench.inputs_of(example), bench.image_processor
    pixels = inputs.get("pixel_values")
    grids = _grids(bench, inputs)
    if bench.anatomy.grid is None or len(grids) > 1 or pixels is None or not getattr(processor, "do_normalize", False):
        return example.image.copy()
    view_CHW = pixels.reshape(-1, *pixels.shape[-3:])[0].float().cpu()
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in (processor.image_mean, processor.image_std))
    shown_HWC = (view_CHW * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8).permute(1, 2, 0)
    return Image.fromarray(shown_HWC.numpy())


@torch.inference_mode()
def _seen(bench: Bench, plan: Plan, number: int) -> dict[str, Any]:
    inputs = bench.inputs_of(bench.splits["select"][number])
    with btp.prune(bench.model, plan) as trace:
        bench.model(**inputs, logits_to_keep=1)
    stages = [{"layer": stage.layer, "tokens": trace.alive[stage.layer][0].tolist()} for stage in plan.stages]
    scores = bench.scores(plan, "select")
    return {
        "answer": scores.answers[number],
        "score": scores.scores[number],
        "grid": [[round(side, 5) for side in box] for box in boxes(_grids(bench, inputs), bench.anatomy.grid is None)],
        "stages": stages,
    }


def _grids(bench: Bench, inputs: Mapping[str, Any]) -> Grids:
    anatomy = bench.anatomy
    pictures = None if anatomy.picture_grids is None else anatomy.picture_grids(inputs)
    num_tokens = int((inputs["input_ids"] == anatomy.image_token_id).sum())
    return anatomy.grids(pictures, 1, num_tokens)[0]


def boxes(grids: Grids, by_picture: bool) -> list[Box]:
    """Where each image token lies: left, top, width and height, as shares of the picture.

    by_picture: the grids depend on the picture, and each covers all of it, the second's last column, of newlines,
    aside. Else they are tiles, of which only the last, a thumbnail of all, is known to lie anywhere; tokens that lie
    nowhere have no width.
    """
    found: list[Box] = []
    for index, (rows, columns) in enumerate(grids):
        lies = by_picture or index == len(grids) - 1
        across = columns - 1 if by_picture and index else columns
        cells = ((row, column) for row in range(rows) for column in range(columns))
        found += [
            (column / across, row / rows, 1 / across, 1 / rows) if lies and column < across else NOWHERE
            for row, column in cells
        ]
    return found
