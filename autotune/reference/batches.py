"""Scenes as training batches: pixels, patch labels, and many questions a picture that share its prefix.

Shapes: B pictures, Q questions of length L after a prefix of P tokens, N = 256 image tokens, T = Q x L tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from autotune.reference import questions, scenes

__all__ = ["Questions", "SharedPrefix", "labels_of", "pixels_of", "questions_of"]

SHORT, LONG = 18, 34  # room for question and answer: captions are long, everything else is short
SHORT_TASKS = ("existence", "attribute", "counting", "spatial", "reading")


def pixels_of(batch: list[scenes.Scene]) -> Tensor:
    """(B, 3, H, W) as the processor's CLIP statistics make them."""
    images = torch.from_numpy(np.stack([np.asarray(scenes.draw(scene)) for scene in batch])).permute(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (images / 255 - mean) / std


def labels_of(batch: list[scenes.Scene]) -> dict[str, Tensor]:
    """Per label group (B, N) word indices."""
    each = [scenes.patch_labels(scene) for scene in batch]
    return {name: torch.from_numpy(np.stack([labels[name].reshape(-1) for labels in each])) for name in scenes.LABELS}


@dataclass(frozen=True)
class Questions:
    """Token ids and targets (-100 where not trained) of `num` questions a picture, padded to `length`."""

    ids_BT: Tensor
    targets_BT: Tensor
    num: int
    length: int


def questions_of(
    batch: list[scenes.Scene], rng: np.random.Generator, tokenizer: Any, num_short: int, num_long: int
) -> list[Questions]:
    blocks = []
    for num, length, tasks in ((num_short, SHORT, SHORT_TASKS), (num_long, LONG, ("caption",))):
        ids = torch.full((len(batch), num, length), tokenizer.pad_token_id)
        targets = torch.full((len(batch), num, length), -100)
        for b, scene in enumerate(batch):
            for q in range(num):
                asked = None
                while asked is None:
                    asked = questions.ask(scene, tasks[int(rng.integers(len(tasks)))], rng)
                prompt = tokenizer.encode(f"\n{asked.question} ASSISTANT:", add_special_tokens=False)
                answer = [*tokenizer.encode(f" {asked.answer}", add_special_tokens=False), tokenizer.eos_token_id]
                stop = len(prompt) + len(answer)
                ids[b, q, :stop] = torch.tensor(prompt + answer)
                targets[b, q, len(prompt) - 1 : stop - 1] = torch.tensor(answer)
        blocks.append(Questions(ids.flatten(1), targets.flatten(1), num, length))
    return blocks


class SharedPrefix:
    """Attention in which every question sees the prefix and its own past only, as an interface of transformers."""

    def __init__(self) -> None:
        self.prefix, self.blocks = 0, [(0, 0)]
        ALL_ATTENTION_FUNCTIONS.register("shared_prefix", self)

    def __call__(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **_: Any) -> tuple[Tensor, None]:
        P = self.prefix
        q = q * q.shape[-1] ** -0.5
        k_P, v_P = k[:, :, :P], v[:, :, :P]
        outs = [_masked_softmax(q[:, :, :P] @ k_P.mT).to(v.dtype) @ v_P]
        start = P
        for num, length in self.blocks:
            stop = start + num * length
            own = [x[:, :, start:stop].unflatten(2, (num, length)) for x in (q, k, v)]
            outs.append(self._block(own[0], own[1], own[2], k_P, v_P))
            start = stop
        return torch.cat(outs, 2).transpose(1, 2), None

    @staticmethod
    def _block(q: Tensor, k: Tensor, v: Tensor, k_P: Tensor, v_P: Tensor) -> Tensor:
        """`num` questions of one length, (B, H, num, length, D) each, over the shared prefix (B, H, P, D)."""
        num, length = q.shape[2:4]
        past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        local = (q @ k.mT).masked_fill(~past, -torch.inf)
        weights = (
            torch.cat((q.flatten(2, 3) @ k_P.mT, local.flatten(2, 3)), -1).softmax(-1, dtype=torch.float32).to(v.dtype)
        )
        weights_P, weights_own = weights.split((k_P.shape[2], length), -1)
        out: Tensor = weights_P @ v_P + (weights_own.unflatten(2, (num, length)) @ v).flatten(2, 3)
        return out


def _masked_softmax(scores: Tensor) -> Tensor:
    past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return scores.masked_fill(~past, -torch.inf).softmax(-1, dtype=torch.float32)
