"""The reference-135m VLM: a CLIP-style ViT of ours, a projector, and SmolLM2-135M as decoder.

Only the ViT, the projector and low-rank adapters (LoRA) of the decoder are ours to ship; `assemble` merges them with
the base into one plain folder that transformers loads by itself.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from autotune.reference_135m import scenes
from autotune.reference_135m.base import base_folder

__all__ = ["LORA_RANK", "LORA_SCALE", "VISION_WIDTH", "assemble", "build_model", "build_processor", "start_vision"]

VISION_WIDTH = 256
LORA_RANK, LORA_SCALE = 16, 2.0
SPARE_TOKEN = "<repo_name>"  # id 3: SmolLM2 reserves it for code corpora
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


def build_processor() -> LlavaProcessor:
    """SmolLM2's tokenizer with a spare token as `<image>`, and CLIP's pixel statistics."""
    vocabulary = json.loads(AutoTokenizer.from_pretrained(base_folder()).backend_tokenizer.to_str())
    vocabulary["model"]["vocab"]["<image>"] = vocabulary["model"]["vocab"].pop(SPARE_TOKEN)
    for token in vocabulary["added_tokens"]:
        token["content"] = "<image>" if token["content"] == SPARE_TOKEN else token["content"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(vocabulary)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=scenes.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's [CLS], which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: Any) -> Any:
    """LLaVA with the pretrained decoder, in float32; the ViT (6 x 256) and the projector are untrained."""
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=4 * VISION_WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=scenes.IMAGE_SIZE,
        patch_size=scenes.PATCH_SIZE,
    )
    text = LlamaConfig.from_pretrained(base_folder())
    text.pad_token_id = tokenizer.pad_token_id
    text.dtype = torch.float32
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=scenes.NUM_PATCHES**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model: Any = LlavaForConditionalGeneration(config)
    base: Any = LlamaForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    model.model.language_model.load_state_dict(base.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


@torch.no_grad()
def assemble(parts: Path, folder: Path) -> None:
    """Write the whole model, LoRA merged, float32, and its processor into `folder`.

    parts: safetensors with `vision_tower.*`, `multi_modal_projector.*` and, relative to the decoder, LoRA factors
    `*.lora_A.weight` (LORA_RANK, in) and `*.lora_B.weight` (out, LORA_RANK).
    """
    processor = build_processor()
    model = build_model(processor.tokenizer)
    own = {name: tensor.float() for name, tensor in load_file(parts).items()}
    for part in ("vision_tower", "multi_modal_projector"):
        mine = {name.removeprefix(f"{part}."): own[name] for name in own if name.startswith(f"{part}.")}
        getattr(model.model, part).load_state_dict(mine)
    for name in own:
        if name.endswith(".lora_A.weight"):
            target = name.removesuffix(".lora_A.weight")
            delta = LORA_SCALE * own[f"{target}.lora_B.weight"] @ own[name]
            model.model.language_model.get_submodule(target).weight += delta
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def start_vision(model: Any, pixels: Tensor) -> None:
    """Starts that save steps: whitened patch filters (from pixels, (B, 3, H, W)) and 2-D sine positions."""
    embeddings = model.model.vision_tower.embeddings
    filters = embeddings.patch_embedding.weight
    patches = F.unfold(pixels, scenes.PATCH_SIZE, stride=scenes.PATCH_SIZE).transpose(1, 2).flatten(0, 1)
    busy = patches[patches.std(1) > patches.std(1).quantile(0.7)]
    _, spread, directions = torch.linalg.svd(busy - busy.mean(0), full_matrices=False)
    scale = math.sqrt(len(busy)) / (spread + 0.03 * spread[0])
    filters.copy_(0.5 * (scale[:, None] * directions)[: len(filters)].reshape(filters.shape))
    quarter = VISION_WIDTH // 4
    angle = torch.arange(scenes.NUM_PATCHES)[:, None] / 100 ** (torch.arange(quarter) / quarter)
    wave = torch.cat((angle.sin(), angle.cos()), 1)
    rows = wave[:, None].expand(-1, scenes.NUM_PATCHES, -1)
    embeddings.position_embedding.weight[1:] = 0.5 * torch.cat((rows, rows.transpose(0, 1)), -1).flatten(0, 1)
