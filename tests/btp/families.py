"""A tiny random model of every family, prompts for it, and the grids its image tokens lie on, worked out by hand.

Shapes: B batch, S tokens in the sequence.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

__all__ = [
    "FAMILIES",
    "IMAGE_TOKEN",
    "NUM_LAYERS",
    "VIDEO_TOKEN",
    "WINDOW",
    "Family",
    "decoder",
    "decoder_layers",
    "llava_family",
]

IMAGE_TOKEN, VIDEO_TOKEN = 63, 62
NUM_LAYERS = 4
WINDOW = 12  # of Gemma 3's sliding layers: shorter than any prompt
_TILE_BREAK = 60  # the text token between two tiles
_NUM_TEXT_AFTER = 6

Grids = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Picture:
    """size: pixels, or patches where the family counts in those. runs: image tokens, a text token between two runs."""

    size: tuple[int, int]
    grids: Grids
    runs: tuple[int, ...] = ()

    @property
    def token_runs(self) -> tuple[int, ...]:
        return self.runs or (sum(rows * columns for rows, columns in self.grids),)


@dataclass(frozen=True)
class Family:
    """model: makes the module from a kernel. shapes: the pictures that rows take in turn.

    features: what the processor would add for these rows of pictures. types: the input that marks image tokens with 1.
    together: the picture's form where a prompt has several, if it is another one.
    """

    name: str
    model: Callable[[str], nn.Module]
    shapes: tuple[Picture, ...]
    features: Callable[[Sequence[Sequence[Picture]], torch.Generator], dict[str, Tensor]]
    types: str | None = None
    takes_video: bool = False
    together: Picture | None = None
    image_token: int = IMAGE_TOKEN

    def build(self, kernel: str = "sdpa", seed: int = 0) -> Any:
        """Four decoder layers in evaluation mode. Flash attention is the decoder's only; the encoder stays on sdpa."""
        torch.manual_seed(seed)
        flash = kernel.startswith("flash")
        model: Any = self.model("sdpa" if flash else kernel).eval()
        _redraw_constants(model)
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
        model.generation_config.suppress_tokens = [0, VIDEO_TOKEN, IMAGE_TOKEN]  # they would call for more pictures
        if flash:
            for config in (decoder(model).config, model.config.get_text_config()):
                config._attn_implementation = kernel
        return model

    def pictures(self, row: int, images: int) -> tuple[Picture, ...]:
        if images > 1 and self.together is not None:
            return (self.together,) * images
        return tuple(self.shapes[(row + index) % len(self.shapes)] for index in range(images))

    def grids(self, inputs: dict[str, Tensor]) -> tuple[Grids, ...]:
        """The grids of every row of what `inputs` gave."""
        count = int((inputs["input_ids"][0] == self.image_token).sum())
        for images in range(4):
            if sum(sum(picture.token_runs) for picture in self.pictures(0, images)) == count:
                rows = range(len(inputs["input_ids"]))
                return tuple(sum((picture.grids for picture in self.pictures(row, images)), ()) for row in rows)
        raise AssertionError(f"no prompt of {self.name} has {count} image tokens")

    def inputs(
        self,
        batch: int = 1,
        padding: str = "none",
        seed: int = 0,
        images: int | Sequence[int] = 1,
        device: str = "cpu",
    ) -> dict[str, Tensor]:
        """Prompts with text before, between and after the images; with padding, every row has another length.

        images: a number for all rows, or one a row, which needs padding.
        """
        generator = torch.Generator().manual_seed(seed)
        counts = [images] * batch if isinstance(images, int) else images
        pictures = [self.pictures(row, count) for row, count in enumerate(counts)]
        prompts = []
        for row in range(batch):
            num_text = 4 + _NUM_TEXT_AFTER + 2 * batch - (2 * row + 1 if padding != "none" else 0)
            prompts.append(_prompt(pictures[row], torch.randint(2, 60, (num_text,), generator=generator)))
        length = max(map(len, prompts)) + (padding != "none")
        padded = [_pad(prompt, length, padding) for prompt in prompts]
        inputs = {"input_ids": torch.stack(padded)}
        if padding != "none":
            inputs["attention_mask"] = torch.stack([_pad(torch.ones_like(p), length, padding) for p in prompts])
        if any(counts):
            inputs |= self.features(pictures, generator)
        if self.types is not None:
            inputs[self.types] = (inputs["input_ids"] == self.image_token).long()
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def decoder(model: Any) -> Any:
    """The language model inside the multimodal one."""
    inner = model.model
    return inner.language_model if hasattr(inner, "language_model") else inner.text_model


def decoder_layers(model: Any) -> tuple[nn.Module, ...]:
    return tuple(decoder(model).layers)


def _pad(row_S: Tensor, length: int, padding: str) -> Tensor:
    missing = length - len(row_S)
    return nn.functional.pad(row_S, (0, missing) if padding == "right" else (missing, 0))


def _prompt(pictures: Sequence[Picture], text: Tensor) -> Tensor:
    pieces = [torch.tensor([1]), text[:-_NUM_TEXT_AFTER]]
    for index, picture in enumerate(pictures):
        if index:
            pieces.append(text[:3].flip(0))
        for run, length in enumerate(picture.token_runs):
            if run:
                pieces.append(torch.tensor([_TILE_BREAK]))
            pieces.append(torch.full((length,), IMAGE_TOKEN))
    return torch.cat((*pieces, text[-_NUM_TEXT_AFTER:]))


@torch.no_grad()
def _redraw_constants(model: nn.Module) -> None:
    """Norms start as ones and biases as zeros: draw them, so that forgetting one shows."""
    for parameter in model.parameters():
        first = parameter.flatten()[0].item()
        if bool((parameter == first).all()):
            parameter.normal_(mean=first, std=0.2)


def _model(architecture: str, vision: Any, text: Any, **settings: Any) -> Callable[[str], nn.Module]:
    """A function from the attention kernel to the model; vision and text are functions that make the configs."""

    def make(kernel: str) -> nn.Module:
        model_class = getattr(hf, f"{architecture}ForConditionalGeneration")
        config = model_class.config_class(vision_config=vision(), text_config=text(), **settings)
        config._attn_implementation = kernel
        return model_class(config)

    return make


def _text(config_class: type, **settings: Any) -> Callable[[], Any]:
    """2 key heads for 4 query heads; weights far from zero, so that attention and logits really differ."""
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4}
    common |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 256, "initializer_range": 0.3}
    common |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return lambda: config_class(**{**common, **settings})


def _vision(config_class: type, image_size: int, **settings: Any) -> Callable[[], Any]:
    common = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common |= {"image_size": image_size, "patch_size": 4, "initializer_range": 0.3}
    return lambda: config_class(**{**common, **settings})


def _qwen_vision(config_class: type, **settings: Any) -> Callable[[], Any]:
    common = {"depth": 2, "num_heads": 2, "patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return lambda: config_class(**{**common, "hidden_size": 16, "initializer_range": 0.3, **settings})


def _squares(side: int, tiles: int = 1) -> Callable[..., dict[str, Tensor]]:
    def features(rows: Sequence[Sequence[Picture]], generator: torch.Generator) -> dict[str, Tensor]:
        count = tiles * sum(len(row) for row in rows)
        return {"pixel_values": torch.randn(count, 3, side, side, generator=generator)}

    return features


def _tiles_by_row(side: int, tiles: int) -> Callable[..., dict[str, Tensor]]:
    """Idefics3: pictures of a row side by side, with a mask that tells pixels from padding."""

    def features(rows: Sequence[Sequence[Picture]], generator: torch.Generator) -> dict[str, Tensor]:
        shape = len(rows), tiles * max(len(row) for row in rows)
        pixels = torch.randn(*shape, 3, side, side, generator=generator)
        for row, pictures in enumerate(rows):
            pixels[row, tiles * len(pictures) :] = 0  # tiles that are not there
        return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(*shape, side, side, dtype=torch.bool)}

    return features


def _any_resolution(rows: Sequence[Sequence[Picture]], generator: torch.Generator) -> dict[str, Tensor]:
    """LLaVA-NeXT: as many tiles as the largest picture has, and each picture's own size."""
    sizes = torch.tensor([picture.size for row in rows for picture in row])
    return {"pixel_values": torch.randn(len(sizes), 4, 3, 16, 16, generator=generator), "image_sizes": sizes}


def _any_resolution_or_base(rows: Sequence[Sequence[Picture]], generator: torch.Generator) -> dict[str, Tensor]:
    """LLaVA-OneVision: several pictures in a prompt come as base views only."""
    counts = torch.tensor([len(row) for row in rows])
    return _any_resolution(rows, generator) | ({"batch_num_images": counts} if counts.max() > 1 else {})


def _patches(rows: Sequence[Sequence[Picture]], generator: torch.Generator) -> dict[str, Tensor]:
    """Qwen: patches of all pictures in one sequence."""
    sizes = [picture.size for row in rows for picture in row]
    num_patches = sum(height * width for height, width in sizes)
    pixels = torch.randn(num_patches, 3 * 2 * 4 * 4, generator=generator)
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([(1, *size) for size in sizes])}


def llava_family(side: int = 5) -> Family:
    """LLaVA with side x side image tokens a picture."""
    vision = _vision(hf.CLIPVisionConfig, 4 * side, projection_dim=16)
    settings = {"image_token_index": IMAGE_TOKEN, "image_seq_length": side * side, "vision_feature_layer": -1}
    model = _model("Llava", vision, _text(hf.LlamaConfig), **settings, vision_feature_select_strategy="default")
    return Family("llava", model, (Picture((4 * side, 4 * side), ((side, side),)),), _squares(4 * side))


# 16 x 32 pixels stitch to 4 x 8 patches. 48 x 8 pixels fill a canvas of 48 x 16, 12 x 4 patches, of which the outer
# columns are padding. Each row of patches ends in a newline token, so that both have 36 of them.
_NEXT = (Picture((16, 32), ((4, 4), (4, 9))), Picture((48, 8), ((4, 4), (12, 3))))
# Held to two base views' worth, 12 x 4 patches shrink by sqrt(48 / 32) to 9 x 3; 4 x 8 are just as many as allowed.
_ONEVISION = (Picture((16, 32), ((4, 4), (4, 9))), Picture((48, 16), ((4, 4), (9, 4))))
_PINPOINTS = [[16, 32], [48, 16]]
# In patches, of which 2 x 2 make a token. The last one's text goes on from another position than the others'.
_QWEN = (Picture((8, 12), ((4, 6),)), Picture((12, 8), ((6, 4),)), Picture((6, 16), ((3, 8),)))
_IDS = {"image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_TILES = Picture((24, 24), ((3, 3),) * 3, runs=(9, 9, 9))


def _qwen(name: str, architecture: str, prefix: str, vision: dict[str, Any], **text: Any) -> Family:
    make_vision = _qwen_vision(getattr(hf, f"{prefix}Config").sub_configs["vision_config"], **vision)
    text_class = getattr(hf, f"{prefix}Config").sub_configs["text_config"]
    make_text = _text(text_class, rope_parameters=_MROPE, **text)
    model = _model(architecture, make_vision, make_text, **_IDS)
    return Family(name, model, _QWEN, _patches, types="mm_token_type_ids", takes_video=True)


def _idefics(name: str, architecture: str) -> Family:
    vision = _vision(getattr(hf, f"{architecture}Config").sub_configs["vision_config"], 24)
    model = _model(architecture, vision, _text(hf.LlamaConfig), image_token_id=IMAGE_TOKEN, scale_factor=2)
    return Family(name, model, (_TILES,), _tiles_by_row(24, tiles=3))


def _families() -> tuple[Family, ...]:
    next_vision = _vision(hf.CLIPVisionConfig, 16, projection_dim=16)
    next_settings = {"image_token_index": IMAGE_TOKEN, "image_grid_pinpoints": _PINPOINTS}
    one_settings = {**next_settings, "video_token_index": VIDEO_TOKEN, "vision_aspect_ratio": "anyres_max_2"}
    one_vision = _vision(hf.SiglipVisionConfig, 16, vision_use_head=False)
    intern_vision = _vision(hf.InternVLVisionConfig, 24)
    gemma_text = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
    gemma_text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    gemma_vision = _vision(hf.SiglipVisionConfig, 40, vision_use_head=False)
    gemma_settings = {"image_token_index": IMAGE_TOKEN, "mm_tokens_per_image": 25, "boi_token_index": 58}
    return (
        llava_family(),
        Family(
            "llava_next",
            _model("LlavaNext", next_vision, _text(hf.LlamaConfig), **next_settings),
            _NEXT,
            _any_resolution,
        ),
        Family(
            "llava_onevision",
            _model("LlavaOnevision", one_vision, _text(hf.Qwen2Config), **one_settings),
            _ONEVISION,
            _any_resolution_or_base,
            takes_video=True,
            together=Picture((16, 32), ((4, 4), (1, 1))),
        ),
        _qwen("qwen2_vl", "Qwen2VL", "Qwen2VL", {"embed_dim": 16, "hidden_size": 32}),
        _qwen(
            "qwen2_5_vl",
            "Qwen2_5_VL",
            "Qwen2_5_VL",
            {"intermediate_size": 32, "out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
        ),
        _qwen(
            "qwen3_vl",
            "Qwen3VL",
            "Qwen3VL",
            {"intermediate_size": 32, "out_hidden_size": 32, "depth": 3, "num_position_embeddings": 64}
            | {"deepstack_visual_indexes": [0, 1]},
            head_dim=8,
        ),
        Family(
            "internvl",
            _model("InternVL", intern_vision, _text(hf.Qwen3Config, head_dim=8), image_token_id=IMAGE_TOKEN),
            (Picture((24, 24), ((3, 3),) * 3),),
            _squares(24, tiles=3),
        ),
        _idefics("idefics3", "Idefics3"),
        _idefics("smolvlm", "SmolVLM"),
        Family(
            "gemma3",
            _model("Gemma3", gemma_vision, _text(hf.Gemma3TextConfig, **gemma_text), **gemma_settings),
            (Picture((40, 40), ((5, 5),)),),
            _squares(40),
            types="token_type_ids",
        ),
    )


FAMILIES: dict[str, Family] = {family.name: family for family in _families()}
