"""What is inside a host model. The only file that knows Hugging Face model families.

A family is one function from a model to an `Anatomy`, listed in `_FAMILIES`. Everything else in the package talks to
the Anatomy, so a new family adds a function here and touches nothing else.

Shapes: B batch, S tokens in the sequence, N image tokens, D hidden size, H query heads, G query heads per key head,
E head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaModel, rotate_half

from btp import ops
from btp.errors import UnsupportedModelError
from btp.profile import ModelIdentity

__all__ = ["Anatomy", "PositionEmbeddings", "anatomy_of"]

PositionEmbeddings = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, S, E)

_KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3")


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model that pruning touches.

    model: what the user calls; multimodal: the module whose forward sees input_ids and calls language_model;
    language_model: the decoder, whose `layers` run in order. grid: rows and columns of one image's tokens.
    """

    model: nn.Module
    multimodal: nn.Module
    language_model: nn.Module
    layers: tuple[nn.Module, ...]
    image_token_id: int
    grid: tuple[int, int]
    hidden_size: int
    intermediate_size: int

    @property
    def identity(self) -> ModelIdentity:
        return ModelIdentity(
            architecture=type(self.model).__name__,
            num_layers=len(self.layers),
            hidden_size=self.hidden_size,
            num_image_tokens=self.grid[0] * self.grid[1],
        )

    @property
    def attention_kernel(self) -> str:
        """The attention implementation in force, which can change after the model is built."""
        return str(cast(Any, self.language_model).config._attn_implementation)

    def image_mask(self, input_ids_BS: Tensor) -> Tensor:
        """True where the prompt has an image token. (B, S)"""
        return input_ids_BS == self.image_token_id

    def position_embeddings(self, hidden_BSD: Tensor, position_ids_BS: Tensor) -> PositionEmbeddings:
        """Rotary cosines and sines of the given positions, in the dtype of the hidden states."""
        cosines, sines = cast(Any, self.language_model).rotary_emb(hidden_BSD, position_ids=position_ids_BS)
        return cosines, sines

    def attention_logits(
        self, layer: int, hidden_BSD: Tensor, embeddings: PositionEmbeddings, query_B1: Tensor
    ) -> Tensor:
        """Logits of one query token a row against every key, as layer `layer` would compute them. (B, H, S)

        Costs the layer's input norm, its key projection and one row of queries: fused kernels give no weights away.
        """
        block = cast(Any, self.layers[layer])
        attention = block.self_attn
        normed_BSD = block.input_layernorm(hidden_BSD)
        batch, length = normed_BSD.shape[:2]
        key_BHSE: Tensor = attention.k_proj(normed_BSD).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        query_BH1E: Tensor = attention.q_proj(ops.take_rows(normed_BSD, query_B1)).view(
            batch, -1, 1, attention.head_dim
        )
        cosines, sines = embeddings
        key_BHSE = _rotate(key_BHSE, cosines, sines)
        query_BH1E = _rotate(query_BH1E, ops.take_rows(cosines, query_B1), ops.take_rows(sines, query_B1))
        query_BHGE = query_BH1E.view(batch, key_BHSE.shape[1], -1, attention.head_dim)
        logits_BHGS = (query_BHGE @ key_BHSE.mT).float() * float(attention.scaling)
        return logits_BHGS.flatten(1, 2)


def anatomy_of(model: nn.Module) -> Anatomy:
    """The model's parts. Raises UnsupportedModelError for any model or attention kernel not known to work."""
    family = _FAMILIES.get(type(model).__name__)
    if family is None:
        raise UnsupportedModelError(
            f"the model must be one of {', '.join(sorted(_FAMILIES))}, got {type(model).__name__}; "
            "load it with that class, or add its family to btp/anatomy.py"
        )
    anatomy = family(model)
    if anatomy.attention_kernel not in _KERNELS:
        raise UnsupportedModelError(
            f"the attention kernel must be one of {', '.join(_KERNELS)}, got {anatomy.attention_kernel}; "
            "load the model with attn_implementation='sdpa'"
        )
    return anatomy


def _llava(model: nn.Module) -> Anatomy:
    """LLaVA: CLIP-style vision tower with square images, Llama decoder."""
    multimodal = cast(Any, model).model
    language_model, config = multimodal.language_model, cast(Any, model).config
    if not isinstance(language_model, LlamaModel):
        raise UnsupportedModelError(
            f"LLaVA's decoder must be a LlamaModel, got {type(language_model).__name__}; "
            "use a LLaVA checkpoint with a Llama or Vicuna decoder"
        )
    vision = config.vision_config
    image_size, patch_size = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    fixed_grid = isinstance(image_size, int) and isinstance(patch_size, int) and vision.model_type != "pixtral"
    if not fixed_grid:
        raise UnsupportedModelError(
            f"LLaVA's image tokens must be the patches of one square image size, got vision tower {vision.model_type}; "
            "use a checkpoint with a CLIP or SigLIP tower"
        )
    side = cast(int, image_size) // cast(int, patch_size)
    return Anatomy(
        model=model,
        multimodal=multimodal,
        language_model=language_model,
        layers=tuple(language_model.layers[: language_model.config.num_hidden_layers]),
        image_token_id=config.image_token_id,
        grid=(side, side),
        hidden_size=config.text_config.hidden_size,
        intermediate_size=config.text_config.intermediate_size,
    )


_FAMILIES: dict[str, Callable[[nn.Module], Anatomy]] = {"LlavaForConditionalGeneration": _llava}


def _rotate(states_BHSE: Tensor, cosines_BSE: Tensor, sines_BSE: Tensor) -> Tensor:
    rotated = cast(Tensor, rotate_half(states_BHSE))
    return states_BHSE * cosines_BSE.unsqueeze(1) + rotated * sines_BSE.unsqueeze(1)
