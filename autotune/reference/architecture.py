"""The untrained reference VLM: its sizes, and the starts that save training steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from autotune.reference import scenes
from autotune.reference.batches import pixels_of

__all__ = ["build_model"]


def build_model(processor: LlavaProcessor) -> Any:
    """An untrained LLaVA: a CLIP-style ViT (4 x 128) and a Llama decoder (8 x 192) with tied embeddings."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.PATCH_SIZE,
    )
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        max_position_embeddings=1024,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e6,
        },  # slow rotations: content can match across the image
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=scenes.NUM_PATCHES**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    _initialise(model)
    return model


def _initialise(model: Any) -> None:
    """Starts that save steps: whitened patch filters, 2-D sine positions, lookup heads in the decoder."""
    embeddings = model.model.vision_tower.embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight.copy_(_whitening(embeddings.patch_embedding.weight))
        embeddings.position_embedding.weight[1:] = 0.5 * _sine_positions(embeddings.position_embedding.weight.shape[1])
        for layer in model.model.language_model.layers:
            _match_and_copy(layer.self_attn)
        model.get_input_embeddings().weight.normal_(std=0.07)


def _match_and_copy(attention: Any, num_slow: int = 10) -> None:
    """Half of the heads start as lookups: attend to tokens like this one, wherever they are, and add what they hold.

    Queries equal keys on the slowest `num_slow` rotary frequencies and vanish on the others, so distance does not
    matter; the output matrix starts as a tenth of the transpose of the value matrix. After "mimetic initialization"
    (Trockman and Kolter 2023, arXiv 2305.09828), made insensitive to position.
    """
    width, dim = attention.o_proj.weight.shape[0], attention.head_dim
    for head in range(attention.o_proj.weight.shape[1] // dim // 2):
        rows = slice(head * dim, (head + 1) * dim)
        match = torch.randn(dim, width) * 0.08
        match.unflatten(0, (2, dim // 2))[:, : dim // 2 - num_slow] = 0
        attention.q_proj.weight[rows] = match
        attention.k_proj.weight[rows] = match
        attention.v_proj.weight[rows] = torch.randn(dim, width) / math.sqrt(width)
        attention.o_proj.weight[:, rows] = 0.1 * attention.v_proj.weight[rows].T


def _whitening(like: Tensor) -> Tensor:
    """Principal components of picture patches scaled to unit variance, as patch filters (D, 3, 20, 20)."""
    rng = np.random.default_rng(0)
    pixels = pixels_of([scenes.sample(rng) for _ in range(100)])
    patches = F.unfold(pixels, scenes.PATCH_SIZE, stride=scenes.PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    busy = patches[patches.std(1) > patches.std(1).quantile(0.7)]
    _, spread, directions = torch.linalg.svd(busy - busy.mean(0), full_matrices=False)
    scale = math.sqrt(len(busy)) / (spread + 0.03 * spread[0])
    filters: Tensor = (scale[:, None] * directions)[: len(like)].reshape(like.shape) * 0.5
    return filters


def _sine_positions(width: int) -> Tensor:
    quarter = width // 4
    angle = torch.arange(scenes.NUM_PATCHES)[:, None] / 100 ** (torch.arange(quarter) / quarter)
    wave = torch.cat((angle.sin(), angle.cos()), 1)
    rows = wave[:, None].expand(-1, scenes.NUM_PATCHES, -1)
    return torch.cat((rows, rows.transpose(0, 1)), -1).flatten(0, 1)
