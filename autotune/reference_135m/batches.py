"""Scenes as training batches: pixels, patch labels, and many questions a picture that share its prefix.

Shapes: B pictures, Q questions of length L after a prefix of P tokens, N = 196 image tokens of which K are kept,
T = Q x L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from autotune.reference.batches import Questions, SharedPrefix
from autotune.reference_135m import questions, scenes

__all__ = ["PREFIX", "Asked", "GroupedSharedPrefix", "labels_of", "pixels_of", "questions_of", "thin_out"]

PREFIX = "<|im_start|>user\n"
SHORT, LONG = 21, 40  # room for question and answer: captions are long, everything else is short
SHORT_TASKS = tuple(task for task in questions.TASKS if task != "caption")


def pixels_of(batch: list[scenes.Scene]) -> Tensor:
    """(B, 3, H, W) as the processor's CLIP statistics make them."""
    images = torch.from_numpy(np.stack([np.asarray(scenes.draw(scene)) for scene in batch])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images / 255 - mean) / std


def labels_of(batch: list[scenes.Scene]) -> dict[str, Tensor]:
    """Per label group (B, N) word indices."""
    each = [scenes.patch_labels(scene) for scene in batch]
    return {name: torch.from_numpy(np.stack([labels[name].reshape(-1) for labels in each])) for name in scenes.LABELS}


def thin_out(kind_BN: Tensor, num_kept: int, rng: np.random.Generator) -> Tensor:
    """Indices (B, K), rising, of `num_kept` patches a picture: those with an item on them first, the others drawn.

    kind_BN: index into `scenes.LABELS["kind"]`, 0 where nothing lies, negative where an item only grazes the patch.
    """
    rank_BN = torch.from_numpy(rng.random(kind_BN.shape)).to(kind_BN.device) + (kind_BN != 0)
    return rank_BN.topk(num_kept, 1).indices.sort(1).values


@dataclass(frozen=True)
class Asked(Questions):
    """Questions, and of which task each is: B x Q names, picture by picture."""

    tasks: tuple[str, ...]


def questions_of(
    batch: list[scenes.Scene], rng: np.random.Generator, tokenizer: Any, num_short: int, num_long: int
) -> list[Asked]:
    """A block of short questions and one of captions, as the chat template puts them after the image."""
    blocks = []
    for num, length, tasks in ((num_short, SHORT, SHORT_TASKS), (num_long, LONG, ("caption",))):
        ids = torch.full((len(batch), num, length), tokenizer.pad_token_id)
        targets = torch.full((len(batch), num, length), -100)
        names = []
        for b, scene in enumerate(batch):
            for q in range(num):
                asked = None
                while asked is None:
                    asked = questions.ask(scene, tasks[int(rng.integers(len(tasks)))], rng)
                text = f"\n{asked.question}<|im_end|>\n<|im_start|>assistant\n"
                prompt = tokenizer.encode(text, add_special_tokens=False)
                answer = [*tokenizer.encode(asked.answer, add_special_tokens=False), tokenizer.eos_token_id]
                stop = len(prompt) + len(answer)
                ids[b, q, :stop] = torch.tensor(prompt + answer)
                targets[b, q, len(prompt) - 1 : stop - 1] = torch.tensor(answer)
                names.append(asked.task)
        blocks.append(Asked(ids.flatten(1), targets.flatten(1), num, length, tuple(names)))
    return blocks


class GroupedSharedPrefix(SharedPrefix):
    """The same for decoders in which several query heads share one key and value head."""

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        groups = q.shape[1] // k.shape[1]
        return super().__call__(module, q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), mask)
