"""Models of published shapes with random weights, and prompts for them.

Shapes: B batch, S tokens of the prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPES", "Shape"]

IMAGE_TOKEN, NUM_BEFORE, NUM_AFTER = 32000, 35, 29  # text tokens before the picture (system prompt) and after it

_VICUNA_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_EIGHTH = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 32, "num_attention_heads": 8}
_CLIP_QUARTER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 4}
_TINY = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 8, "num_attention_heads": 4}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A LLaVA, or with `tiled` a LLaVA-NeXT, whose picture fills two by two tiles beside the whole view.

    text, vision: the sizes of the Llama decoder and of the CLIP encoder; side: of a view, in patches of 14 pixels.
    """

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    side: int = 24
    tiled: bool = False

    def config(self) -> Any:
        """Published values of llava-hf/llava-1.5-7b-hf and llava-hf/llava-v1.6-vicuna-7b-hf, but for the sizes."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

        view = 14 * self.side
        pinpoints = [[down * view, across * view] for down, across in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
        return (LlavaNextConfig if self.tiled else LlavaConfig)(
            vision_config=CLIPVisionConfig(image_size=view, patch_size=14, projection_dim=768, **self.vision),
            text_config=LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5, **self.text),
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            **({"image_grid_pinpoints": pinpoints} if self.tiled else {"image_seq_length": self.side**2}),
        )

    @property
    def num_image_tokens(self) -> int:
        """The view's patches and, where tiled, those of the tiles with a newline token after every row."""
        return self.side**2 + (2 * self.side * (2 * self.side + 1) if self.tiled else 0)

    def build(self, device: str, dtype: torch.dtype) -> Any:
        """Random weights, made on the device in their dtype."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(self.config(), dtype=dtype, attn_implementation="sdpa")
        return model.eval()

    def inputs(self, batch: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """A picture of noise between random words in every row, no padding."""
        generator = torch.Generator().manual_seed(0)
        ids_BS = torch.randint(3, 31999, (batch, NUM_BEFORE + self.num_image_tokens + NUM_AFTER), generator=generator)
        ids_BS[:, NUM_BEFORE:-NUM_AFTER] = IMAGE_TOKEN
        view = 14 * self.side
        size = (batch, 5, 3, view, view) if self.tiled else (batch, 3, view, view)
        inputs = {"input_ids": ids_BS, "pixel_values": torch.randn(size, generator=generator).to(dtype)}
        if self.tiled:
            inputs["image_sizes"] = torch.tensor([[2 * view, 2 * view]] * batch)
        return {name: tensor.to(device) for name, tensor in inputs.items()}


SHAPES = {
    "7b": (
        Shape(name="LLaVA-1.5-7B", text=_VICUNA_7B, vision=_CLIP_L),
        Shape(name="LLaVA-NeXT-7B", text=_VICUNA_7B, vision=_CLIP_L, tiled=True),
    ),
    "cpu": (Shape(name="LLaVA-1.5, 1/8 width", text=_EIGHTH, vision=_CLIP_QUARTER),),
    "small": (
        Shape(name="tiny LLaVA", text=_TINY, vision=_TINY, side=6),
        Shape(name="tiny LLaVA-NeXT", text=_TINY, vision=_TINY, side=4, tiled=True),
    ),
}
