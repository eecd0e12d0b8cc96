"""The reference VLM: a small LLaVA trained from nothing in this repository, and the questions it answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["SPLITS", "WEIGHTS", "dataset", "load"]

WEIGHTS = Path(__file__).parent / "weights"
SPLITS = {"calibrate": (1, 64), "select": (2, 48), "certify": (3, 340)}
"""Per split: the stream its scenes are drawn from, and how many scenes it has."""
STREAMS = 20250522  # first entropy word of those streams; training draws from streams that begin with its --seed


def load(device: str = "cpu") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model, in evaluation mode, and its processor; the way any local model is loaded."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(WEIGHTS)
    model: Any = AutoModelForImageTextToText.from_pretrained(WEIGHTS, dtype="float32")
    return model.to(device).eval(), processor


def dataset(split: str, seed: int | None = None) -> datasets.Dataset:
    """Columns image, question, answer, task: one question of every task about each scene of a split.

    split: "calibrate", "select" or "certify". seed: None for the split itself, the same pictures every time; a number
    for as many fresh scenes of the same distribution. Raises ValueError for an unknown split.
    """
    import datasets

    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    rows = list(_rows(split, seed))
    features = datasets.Features(
        image=datasets.Image(),
        question=datasets.Value("string"),
        answer=datasets.Value("string"),
        task=datasets.Value("string"),
    )
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=features)


def _rows(split: str, seed: int | None) -> Any:
    import io

    from autotune.reference import questions, scenes

    stream, num_scenes = SPLITS[split]
    rng = np.random.default_rng((STREAMS, stream, 0 if seed is None else seed + 1))
    found = 0
    while found < num_scenes:
        scene = scenes.sample(rng)
        asked = [questions.ask(scene, task, rng) for task in questions.TASKS]
        if None in asked:  # nothing unique to ask about
            continue
        found += 1
        file = io.BytesIO()
        scenes.draw(scene).save(file, "PNG")
        for entry in asked:
            assert entry is not None
            image = {"bytes": file.getvalue(), "path": None}
            yield {"image": image, "question": entry.question, "answer": entry.answer, "task": entry.task}
