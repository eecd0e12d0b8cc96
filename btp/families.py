"""The model families. The only file that knows how Hugging Face lays out its vision-language models.

A family is one function from a model to an `Anatomy`, listed in `_FAMILIES` under the class users load. Everything
else in the package talks to the Anatomy, so a new family adds a function here and touches nothing else.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from btp.anatomy import Anatomy, ClsAttention
from btp.cost import DecoderShape
from btp.errors import RealizationError, UnsupportedModelError
from btp.ops import Grids

__all__ = ["anatomy_of"]

_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")
# Decoders whose layers norm their input, project queries and keys apart, and rotate them by halves.
_DECODERS = (
    "Gemma3TextModel",
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Qwen2VLTextModel",
    "Qwen2_5_VLTextModel",
    "Qwen3Model",
    "Qwen3VLTextModel",
)


def anatomy_of(model: nn.Module) -> Anatomy:
    """The model's parts. Raises UnsupportedModelError for any model or attention kernel not known to work."""
    name = next((cls.__name__ for cls in type(model).__mro__ if cls.__name__ in _FAMILIES), None)
    if name is None:
        raise UnsupportedModelError(
            f"the model must be one of {', '.join(sorted(_FAMILIES))}, got {type(model).__name__}; "
            "load it with that class, or add its family to btp/families.py"
        )
    anatomy = _FAMILIES[name](model)
    kernel = anatomy.attention_kernel
    if kernel not in _KERNELS:
        raise UnsupportedModelError(
            f"the attention kernel must be one of {', '.join(_KERNELS)}, got {kernel}; "
            "load the model with attn_implementation='sdpa'"
        )
    if kernel.startswith("flash") and any(anatomy.decoder.windows):
        raise UnsupportedModelError(
            f"a decoder with sliding windows must run on sdpa or eager, got {kernel}, which counts the window over "
            "the surviving tokens, not over the original places; load the model with attn_implementation='sdpa'"
        )
    return anatomy


def _parts(model: nn.Module, language_model: str = "language_model", **details: Any) -> Anatomy:
    """What all families share: model.model holds the encoder and the decoder, model.config.text_config its sizes."""
    multimodal, config = cast(Any, model).model, cast(Any, model).config
    decoder = getattr(multimodal, language_model)
    if type(decoder).__name__ not in _DECODERS:
        raise UnsupportedModelError(
            f"the decoder of {type(model).__name__} must be one of {', '.join(_DECODERS)}, got "
            f"{type(decoder).__name__}; use a checkpoint with one of those, or add it to btp/families.py once it is "
            "known to compute its attention alike"
        )
    return Anatomy(
        model=model,
        multimodal=multimodal,
        language_model=decoder,
        layers=tuple(decoder.layers[: decoder.config.num_hidden_layers]),
        image_token_id=config.image_token_id,
        decoder=_decoder_shape(decoder.config),
        **details,
    )


def _decoder_shape(text: Any) -> DecoderShape:
    window, kinds = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    windows: tuple[int | None, ...] = ()
    if window is not None:
        kinds = kinds or ["sliding_attention"] * text.num_hidden_layers
        windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return DecoderShape(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        vocab_size=text.vocab_size,
        windows=windows if any(windows) else (),
    )


def _llava(model: nn.Module) -> Anatomy:
    """LLaVA-1.5: a ViT on square pictures of one size."""
    config = cast(Any, model).config
    side = _tower_side(model)
    if config.vision_feature_select_strategy != "default" and config.vision_config.model_type == "clip_vision_model":
        raise UnsupportedModelError(
            "LLaVA's image tokens must be its patches alone (vision_feature_select_strategy='default'), got "
            f"'{config.vision_feature_select_strategy}' with a CLIP tower, whose [CLS] token lies on no grid; use a "
            "checkpoint without it"
        )
    return _parts(
        model, grid=(side, side), cls_attention=_clip_cls(model, config, lambda value_VP, _: value_VP.flatten())
    )


def _llava_next(model: nn.Module) -> Anatomy:
    """LLaVA-NeXT (1.6): any-resolution tiles, stitched and cut to the picture, a newline token after every row."""
    side = _tower_side(model)
    return _parts(
        model,
        picture_grids=partial(_stitched_grids, cast(Any, model).config, side),
        cls_attention=_clip_cls(model, cast(Any, model).config, partial(_pack_like_features, cast(Any, model))),
    )


def _llava_onevision(model: nn.Module) -> Anatomy:
    """LLaVA-OneVision: as LLaVA-NeXT, and large stitched pictures are scaled down; several pictures are not tiled."""
    return _parts(model, picture_grids=partial(_stitched_grids, cast(Any, model).config, _tower_side(model)))


def _qwen_vl(model: nn.Module) -> Anatomy:
    """Qwen2-VL and Qwen2.5-VL: dynamic resolution, positions on three axes (M-RoPE)."""
    merge = cast(Any, model).config.vision_config.spatial_merge_size
    return _parts(model, picture_grids=partial(_merged_grids, merge), mrope=True)


def _qwen3_vl(model: nn.Module) -> Anatomy:
    """Qwen3-VL: as Qwen2.5-VL, and the first decoder layers each get visual features added (DeepStack)."""
    merge = cast(Any, model).config.vision_config.spatial_merge_size
    return _parts(model, picture_grids=partial(_merged_grids, merge), mrope=True, deepstack=True)


def _internvl(model: nn.Module) -> Anatomy:
    """InternVL: square tiles and a thumbnail, each a grid of its own; how the tiles lie is not in the inputs."""
    config = cast(Any, model).config
    (height, width), (patch_height, patch_width) = config.vision_config.image_size, config.vision_config.patch_size
    rows, columns = height // patch_height, width // patch_width
    merge = round(1 / config.downsample_ratio)

    def pooled(value_VP: Tensor, prompt: Mapping[str, Any]) -> Tensor:
        return nn.functional.avg_pool2d(value_VP.view(-1, 1, rows, columns), merge).flatten()

    attention = cast(Any, model).model.vision_tower.encoder.layer[_feature_layer(config)].attention
    cls_attention = ClsAttention(attention.q_norm, attention.k_norm, attention.num_heads, pooled)
    has_cls = config.vision_feature_select_strategy == "default"
    return _parts(model, grid=(rows // merge, columns // merge), cls_attention=cls_attention if has_cls else None)


def _idefics3(model: nn.Module) -> Anatomy:
    """Idefics3 and SmolVLM: square tiles and a thumbnail, each a grid of its own, text tokens between them."""
    config = cast(Any, model).config
    side = config.vision_config.image_size // config.vision_config.patch_size // config.scale_factor
    return _parts(model, "text_model", grid=(side, side))


def _gemma3(model: nn.Module) -> Anatomy:
    """Gemma 3: pooled SigLIP features, sliding and full layers mixed, image tokens that see one another both ways."""
    side = int(cast(Any, model).config.mm_tokens_per_image ** 0.5)
    return _parts(model, grid=(side, side))


_FAMILIES: dict[str, Callable[[nn.Module], Anatomy]] = {
    "Gemma3ForConditionalGeneration": _gemma3,
    "Idefics3ForConditionalGeneration": _idefics3,
    "InternVLForConditionalGeneration": _internvl,
    "LlavaForConditionalGeneration": _llava,
    "LlavaNextForConditionalGeneration": _llava_next,
    "LlavaOnevisionForConditionalGeneration": _llava_onevision,
    "Qwen2VLForConditionalGeneration": _qwen_vl,
    "Qwen2_5_VLForConditionalGeneration": _qwen_vl,
    "Qwen3VLForConditionalGeneration": _qwen3_vl,
    "SmolVLMForConditionalGeneration": _idefics3,
}


def _tower_side(model: nn.Module) -> int:
    """Patches along one side of the square view of a CLIP-style tower."""
    vision = cast(Any, model).config.vision_config
    image_size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if not isinstance(image_size, int) or not isinstance(patch_size, int) or vision.model_type == "pixtral":
        raise UnsupportedModelError(
            f"{type(model).__name__} must see patches of one square view size, got vision tower {vision.model_type}; "
            "use a checkpoint with a CLIP or SigLIP tower"
        )
    return image_size // patch_size


def _feature_layer(config: Any) -> int:
    """The encoder layer (0-based) whose output becomes the image features; the last of several."""
    num_layers, chosen = config.vision_config.num_hidden_layers, config.vision_feature_layer
    layers = [chosen] if isinstance(chosen, int) else chosen
    return max(layer - 1 if layer > 0 else num_layers + layer for layer in layers)


def _clip_cls(
    model: nn.Module, config: Any, arrange: Callable[[Tensor, Mapping[str, Any]], Tensor]
) -> ClsAttention | None:
    if config.vision_config.model_type != "clip_vision_model" or config.vision_feature_select_strategy != "default":
        return None
    tower = cast(Any, model).model.vision_tower
    encoder = getattr(tower, "vision_model", tower).encoder
    attention = encoder.layers[_feature_layer(config)].self_attn
    return ClsAttention(attention.q_proj, attention.k_proj, attention.num_heads, arrange)


def _merged_grids(merge: int, prompt: Mapping[str, Any]) -> list[Grids]:
    """Qwen: time, height and width in patches, of which merge x merge become one token."""
    if (grid_thw := prompt.get("image_grid_thw")) is None:
        raise RealizationError("image_grid_thw must come with the prompt, got none; pass what the processor returns")
    return [((time * height // merge, width // merge),) for time, height, width in grid_thw.tolist()]


def _stitched_grids(config: Any, side: int, prompt: Mapping[str, Any]) -> list[Grids]:
    """LLaVA-NeXT and -OneVision: the whole view, then the stitched tiles with a column of newlines.

    A picture that is not tiled is its whole view and one newline token; Hugging Face's packing decides the sizes.
    """
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

    if (sizes := prompt.get("image_sizes")) is None:
        raise RealizationError("image_sizes must come with the prompt, got none; pass what the processor returns")
    ratio = prompt.get("vision_aspect_ratio") or getattr(config, "vision_aspect_ratio", None)
    per_prompt = prompt.get("batch_num_images")
    tiled = [True] * len(sizes) if per_prompt is None else [n == 1 for n in per_prompt for _ in range(int(n))]
    grids: list[Grids] = []
    for size, is_tiled in zip(torch.as_tensor(sizes).tolist(), tiled, strict=True):
        if not is_tiled:
            grids.append(((side, side), (1, 1)))
            continue
        down, across = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
        rows, columns = unpad_image(torch.empty(1, down * side, across * side, device="meta"), size).shape[1:]
        if ratio is not None:
            shrink = (rows * columns / (int(ratio.removeprefix("anyres_max_")) * side**2)) ** 0.5
            rows, columns = (int(rows // shrink), int(columns // shrink)) if shrink > 1.1 else (rows, columns)
        grids.append(((side, side), (rows, columns + 1)))
    return grids


def _pack_like_features(model: Any, value_VP: Tensor, prompt: Mapping[str, Any]) -> Tensor:
    """One value a patch of every view, brought to the order of the image tokens; newline tokens get 0."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    config, sizes = model.config, prompt["image_sizes"]
    pinpoints, view = config.image_grid_pinpoints, config.vision_config.image_size
    views = value_VP.unsqueeze(2).split([image_size_to_num_patches(size, pinpoints, view) for size in sizes])
    packed, _ = model.model.pack_image_features(
        views, sizes, vision_feature_select_strategy="default", image_newline=value_VP.new_zeros(1)
    )
    return torch.cat(list(packed)).flatten()
