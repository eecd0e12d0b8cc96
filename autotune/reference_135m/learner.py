"""What the training stages share: the model with adapters, and its losses on patches and on questions.

Shapes: B pictures, Q questions of length L after a prefix of P tokens, N = 196 image tokens of which K are kept,
T = Q x L tokens, D width of the decoder, F width of the vision tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autotune.reference.batches import Questions
from autotune.reference_135m import scenes
from autotune.reference_135m.architecture import LORA_RANK, LORA_SCALE, VISION_WIDTH, build_model, build_processor
from autotune.reference_135m.batches import PREFIX, Asked, GroupedSharedPrefix

__all__ = ["Learner"]

ITEM_GROUPS = ("color", "digit", "word", "order")
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
"""The decoder's matrices with adapters: not the widest two, whose adapters cost the most time a parameter."""
POSITION_SHARE = 0.5
"""Weight of the words for a patch's place beside those for what lies there, in the projector's targets."""


class Learner(nn.Module):
    """The VLM with linear patch heads and, for the joint stage, LoRA adapters on a frozen bfloat16 decoder."""

    def __init__(self, device: str) -> None:
        super().__init__()
        from peft import LoraConfig, inject_adapter_in_model

        processor = build_processor()
        self.tokenizer = processor.tokenizer
        self.vlm = build_model(self.tokenizer)
        decoder = self.vlm.model.language_model.requires_grad_(False).to(torch.bfloat16)
        self.vlm.tie_weights()
        settings = LoraConfig(r=LORA_RANK, lora_alpha=int(LORA_RANK * LORA_SCALE), target_modules=list(ADAPTED))
        inject_adapter_in_model(settings, decoder)
        for name, parameter in decoder.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        for module in decoder.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False  # autocast does it, once and to bfloat16
        self.heads = nn.ModuleDict({name: nn.Linear(VISION_WIDTH, len(words)) for name, words in scenes.LABELS.items()})
        self.to(device)
        self.device = device
        self.attention = GroupedSharedPrefix()
        self.prefix_ids = torch.tensor(self.tokenizer.encode(PREFIX, add_special_tokens=False), device=device)
        self.word_embeddings = {name: self._embed_words(words) for name, words in scenes.LABELS.items()}

    @property
    def vision_tower(self) -> nn.Module:
        tower: nn.Module = self.vlm.model.vision_tower
        return tower

    @property
    def projector(self) -> Any:
        return self.vlm.model.multi_modal_projector

    @property
    def adapters(self) -> dict[str, nn.Parameter]:
        named = self.vlm.model.language_model.named_parameters()
        return {name.replace(".default", ""): parameter for name, parameter in named if "lora_" in name}

    def shipped(self) -> dict[str, Tensor]:
        """The tensors that `architecture.assemble` merges with the base, in float16."""
        parts = {"vision_tower": self.vision_tower, "multi_modal_projector": self.projector}
        tensors = {f"{part}.{name}": tensor for part, module in parts.items() for name, tensor in _floating(module)}
        return {name: tensor.detach().half().cpu().contiguous() for name, tensor in (tensors | self.adapters).items()}

    def _embed_words(self, words: tuple[str, ...]) -> Tensor:
        """Mean embedding of each word's tokens, (number of words, D), float32; digits without a space, as in text."""
        embedding = self.vlm.get_input_embeddings().weight.float()
        pieces = [
            self.tokenizer.encode(f"{'' if word.isdigit() else ' '}{word}", add_special_tokens=False) for word in words
        ]
        return torch.stack([embedding[piece].mean(0) for piece in pieces]).detach()

    def features(self, pixels: Tensor) -> Tensor:
        """What the ViT says of each patch, (B, N, F)."""
        outputs = self.vision_tower(pixels.to(self.device), output_hidden_states=True)
        features: Tensor = outputs.hidden_states[-1][:, 1:]
        return features

    def ideal(self, labels: dict[str, Tensor]) -> Tensor:
        """Sum of the embeddings of the words of each patch, (B, N, D): what the projector starts from."""
        total = torch.zeros(*labels["kind"].shape, self.word_embeddings["kind"].shape[1], device=self.device)
        for name, embeddings in self.word_embeddings.items():
            share = POSITION_SHARE if name.startswith("half") else 1.0
            known = labels[name] >= 0
            total += share * embeddings[labels[name].clamp(min=0)] * known[..., None]
        return total

    def patch_loss(self, features: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of each group's head; patches with something on them count as much as all the empty ones."""
        total, accuracy = torch.zeros((), device=self.device), {}
        busy = labels["kind"] > 0
        for name, head in self.heads.items():
            known = labels[name] >= 0
            parts = (
                [known & busy, known & ~busy] if name == "kind" else [known & busy if name in ITEM_GROUPS else known]
            )
            for part in parts:
                scores, target = head(features[part]).float(), labels[name][part]
                if len(target):
                    total = total + F.cross_entropy(scores, target) / len(parts)
                if part is parts[0] and len(target):
                    accuracy[name] = (scores.argmax(-1) == target).float().mean().item()
        return total, accuracy

    def question_loss(
        self, image_tokens: Tensor, patches: Tensor, blocks: list[Asked]
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of the answers' tokens, and per task the share of questions answered without a wrong token.

        image_tokens (B, K, D) of the patches with the indices (B, K); each keeps the position it has among all N.
        """
        embed = self.vlm.get_input_embeddings()
        texts = [embed(block.ids_BT.to(self.device)) for block in blocks]
        before = embed(self.prefix_ids).expand(len(image_tokens), -1, -1)
        inputs = torch.cat((before, image_tokens.to(before.dtype), *texts), 1)
        hidden = self._decode(inputs, patches, blocks)[:, before.shape[1] + image_tokens.shape[1] :]
        targets = torch.cat([block.targets_BT for block in blocks], 1).to(self.device)
        asked = targets >= 0
        logits = self.vlm.lm_head(hidden[asked]).float()
        wrong = torch.zeros_like(asked)
        wrong[asked] = logits.argmax(-1) != targets[asked]
        return F.cross_entropy(logits, targets[asked]), _solved(wrong, blocks)

    def _decode(self, inputs: Tensor, patches: Tensor, blocks: Sequence[Questions]) -> Tensor:
        """Hidden states (B, P + T, D) of a prefix with the image tokens of `patches`, and of the blocks behind it."""
        decoder: Any = self.vlm.model.language_model
        start = len(self.prefix_ids)
        stop = start + scenes.NUM_PATCHES**2
        rows = [torch.arange(start)] + [(stop + torch.arange(block.length)).repeat(block.num) for block in blocks]
        before, *after = (row.expand(len(inputs), -1).to(self.device) for row in rows)
        self.attention.prefix = start + patches.shape[1]
        self.attention.blocks = [(block.num, block.length) for block in blocks]
        own = decoder.config._attn_implementation
        decoder.set_attn_implementation("shared_prefix")
        outputs = decoder(
            inputs_embeds=inputs,
            position_ids=torch.cat((before, start + patches, *after), 1),
            attention_mask=torch.zeros(
                len(inputs), 1, 1, 1, device=self.device
            ),  # unused: the blocks say who sees whom
            use_cache=False,
        )
        decoder.set_attn_implementation(own)
        hidden: Tensor = outputs.last_hidden_state
        return hidden


def _solved(wrong_BT: Tensor, blocks: list[Asked]) -> dict[str, float]:
    """Per task the share of its questions without a wrong token; tasks that were not asked are left out."""
    solved: dict[str, list[float]] = {}
    for part, block in zip(wrong_BT.split([block.num * block.length for block in blocks], 1), blocks, strict=True):
        missed = part.unflatten(1, (block.num, block.length)).any(-1).flatten()
        for task, miss in zip(block.tasks, missed.tolist(), strict=True):
            solved.setdefault(task, []).append(1.0 - miss)
    return {task: sum(right) / len(right) for task, right in solved.items()}


def _floating(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in module.state_dict().items() if tensor.is_floating_point()]
