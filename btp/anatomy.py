"""The parts of a host model that pruning touches, and the arithmetic of its decoder layers.

What differs from family to family is in `btp.families`, which builds the Anatomy; everything else in the package talks
to the Anatomy alone.

Shapes: B batch, S tokens in the sequence, N image tokens, Q query tokens, D hidden size, H query heads, G key heads,
E head dimension.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from btp import ops
from btp.cost import DecoderShape
from btp.errors import RealizationError
from btp.ops import Grids
from btp.profile import ModelIdentity

__all__ = ["Anatomy", "ClsAttention", "PositionEmbeddings", "take_positions"]

PositionEmbeddings = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, S, E), or (3, B, S, E) by axis (M-RoPE)


@dataclass(frozen=True, eq=False)
class ClsAttention:
    """Where the vision encoder's [CLS] attention can be read off.

    query, key: modules whose outputs, (views, 1 + patches, heads * E), are the queries and keys of the layer that the
    image features come from. arrange: from (views, patches) to one value an image token, given the prompt. (B * N,)
    """

    query: nn.Module
    key: nn.Module
    num_heads: int
    arrange: Callable[[Tensor, Mapping[str, Any]], Tensor]

    def record(self, into: dict[str, Tensor]) -> Iterator[Any]:
        """Hooks that put the encoder's latest "query" and "key" into the dictionary; handed out one by one."""
        for name, module in (("query", self.query), ("key", self.key)):
            yield module.register_forward_hook(lambda _module, _args, output, name=name: into.update({name: output}))

    def read(self, query: Tensor, key: Tensor, prompt: Mapping[str, Any]) -> Tensor:
        """Head mean of the [CLS] token's attention to the patches, one value an image token. (B * N,)"""
        views, length, width = key.shape
        query_VH1E = query[:, 0].view(views, self.num_heads, 1, -1).float()
        key_VHLE = key.view(views, length, self.num_heads, -1).transpose(1, 2).float()
        weight_VHL = (query_VH1E @ key_VHLE.mT * (width // self.num_heads) ** -0.5).softmax(dim=3).squeeze(2)
        return self.arrange(weight_VHL[:, :, 1:].mean(dim=1), prompt)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The parts of one model.

    model: what the user calls; multimodal: the module whose forward sees input_ids and calls language_model;
    language_model: the decoder, whose `layers` run in order. grid: rows and columns of every picture's (or tile's)
    tokens; None where they depend on the picture, and `picture_grids` tells them, a picture each, from the inputs.
    mrope: positions have three axes. deepstack: the decoder adds visual features after its first layers.
    """

    model: nn.Module
    multimodal: nn.Module
    language_model: nn.Module
    layers: tuple[nn.Module, ...]
    image_token_id: int
    decoder: DecoderShape
    grid: tuple[int, int] | None = None
    picture_grids: Callable[[Mapping[str, Any]], Sequence[Grids]] | None = None
    cls_attention: ClsAttention | None = None
    mrope: bool = False
    deepstack: bool = False

    @property
    def identity(self) -> ModelIdentity:
        """num_image_tokens is 0 where it depends on the picture."""
        return ModelIdentity(
            architecture=type(self.model).__name__,
            num_layers=len(self.layers),
            hidden_size=self.decoder.hidden_size,
            num_image_tokens=0 if self.grid is None else self.grid[0] * self.grid[1],
        )

    @property
    def attention_kernel(self) -> str:
        """The attention implementation in force, which can change after the model is built."""
        return str(cast(Any, self.language_model).config._attn_implementation)

    def window(self, layer: int) -> int | None:
        """How many of the latest tokens the layer attends to, itself included; None for all of them."""
        return self.decoder.windows[layer] if self.decoder.windows else None

    def image_mask(self, prompt: Mapping[str, Any]) -> Tensor:
        """True where the prompt has an image token, by its id or, without ids, by its embedding. (B, S)

        Raises RealizationError for embeddings in which no place still holds the image token's own embedding.
        """
        if (input_ids_BS := prompt.get("input_ids")) is not None:
            return cast(Tensor, input_ids_BS == self.image_token_id)
        embeds_BSD = cast(Tensor, prompt["inputs_embeds"])
        token = torch.full((), self.image_token_id, dtype=torch.long, device=embeds_BSD.device)
        mask_BS: Tensor = (embeds_BSD == cast(Any, self.model).get_input_embeddings()(token)).all(dim=-1)
        if not bool(mask_BS.any()):
            raise RealizationError(
                "inputs_embeds must still hold the image token's own embedding where image tokens go, got none: "
                "image tokens cannot be told from embeddings that have them already; pass input_ids, or unmerged "
                "embeddings together with pixel_values"
            )
        return mask_BS

    def grids(self, pictures: Sequence[Grids] | None, num_rows: int, num_image_tokens: int) -> tuple[Grids, ...]:
        """The grids that each row's image tokens lie on; `pictures` are those of each picture, where they differ.

        Raises RealizationError where they do not add up.
        """
        if self.grid is not None:
            num_pictures, rest = divmod(num_image_tokens, self.grid[0] * self.grid[1])
            if rest:
                raise RealizationError(
                    f"image tokens must come in whole images of {self.grid[0]} x {self.grid[1]}, got "
                    f"{num_image_tokens} a prompt; prepare the prompt with the model's own processor"
                )
            return ((self.grid,) * num_pictures,) * num_rows
        if pictures is None:
            raise RealizationError(
                "encoded pictures must tell the grid their tokens lie on, got some encoded outside of btp; pass "
                "pixel_values, or encode them with btp.encode_images"
            )
        rows: list[Grids] = [()]
        for grids in pictures:
            if _num_cells(rows[-1]) >= num_image_tokens:
                rows.append(())
            rows[-1] += grids
        repeats, rest = divmod(num_rows, len(rows))  # beams and sequences of one prompt share its pictures
        if rest or any(_num_cells(row) != num_image_tokens for row in rows):
            raise RealizationError(
                f"the pictures' grids must add up to the {num_image_tokens} image tokens of each of {num_rows} rows, "
                f"got {[_num_cells(row) for row in rows]}; prepare the prompt with the model's own processor"
            )
        return tuple(row for row in rows for _ in range(repeats))

    def position_embeddings(self, layer: int, hidden_BSD: Tensor, position_ids: Tensor) -> PositionEmbeddings:
        """Rotary cosines and sines of the given positions for one layer, in the dtype of the hidden states.

        position_ids: (B, S), or (3 or 4, B, S) with M-RoPE, where a fourth axis in front is the text's.
        """
        if self.mrope:
            axes = position_ids[-3:] if position_ids.dim() == 3 else position_ids[None]
            position_ids = axes.expand(3, -1, -1)
        decoder = cast(Any, self.language_model)
        by_kind = hasattr(
            decoder.rotary_emb, "sliding_attention_inv_freq"
        )  # Gemma 3: other frequencies where it slides
        kind = (decoder.config.layer_types[layer],) if by_kind else ()
        cosines, sines = decoder.rotary_emb(hidden_BSD, position_ids, *kind)
        return cosines, sines

    def keys(self, layer: int, hidden_BSD: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        """The keys layer `layer` makes of these hidden states, rotated. (B, G, S, E)"""
        attention, normed_BSD = self._normed(layer, hidden_BSD)
        return self._rotated(self._heads(attention, "k", normed_BSD), embeddings)

    def attention_logits(
        self, layer: int, hidden_BSD: Tensor, embeddings: PositionEmbeddings, query_BQ: Tensor
    ) -> Tensor:
        """Logits of the query tokens against every key, as layer `layer` would compute them, unmasked. (B, H, Q, S)

        Costs the layer's input norm, its key projection and the queries asked for: fused kernels give no weights away.
        """
        attention, normed_BSD = self._normed(layer, hidden_BSD)
        key_BGSE = self._rotated(self._heads(attention, "k", normed_BSD), embeddings)
        query_BHQE = self._rotated(
            self._heads(attention, "q", ops.take_rows(normed_BSD, query_BQ)),
            (take_positions(embeddings[0], query_BQ), take_positions(embeddings[1], query_BQ)),
        )
        batch, num_keys = key_BGSE.shape[0], key_BGSE.shape[1]
        grouped = query_BHQE.view(batch, num_keys, -1, *query_BHQE.shape[2:])  # query heads by their key head
        return (grouped @ key_BGSE.unsqueeze(2).mT).float().flatten(1, 2) * float(attention.scaling)

    def _normed(self, layer: int, hidden_BSD: Tensor) -> tuple[Any, Tensor]:
        block = cast(Any, self.layers[layer])
        return block.self_attn, block.input_layernorm(hidden_BSD)

    def _heads(self, attention: Any, name: str, normed_BSD: Tensor) -> Tensor:
        """Queries ("q") or keys ("k") by head, before rotation. (B, H or G, S, E)"""
        batch, length = normed_BSD.shape[:2]
        states: Tensor = getattr(attention, f"{name}_proj")(normed_BSD).view(batch, length, -1, attention.head_dim)
        norm = getattr(attention, f"{name}_norm", None)
        return (states if norm is None else norm(states)).transpose(1, 2)

    def _rotated(self, states_BHSE: Tensor, embeddings: PositionEmbeddings) -> Tensor:
        cosines_BSE, sines_BSE = (self._one_axis(part) for part in embeddings)
        rotated = cast(Tensor, rotate_half(states_BHSE))
        return states_BHSE * cosines_BSE.unsqueeze(1) + rotated * sines_BSE.unsqueeze(1)

    def _one_axis(self, part: Tensor) -> Tensor:
        """M-RoPE's three axes woven into one, as transformers before 5.17 leaves to attention. (B, S, E)"""
        if part.dim() == 3:
            return part
        sections = cast(Any, self.language_model).config.rope_parameters["mrope_section"] * 2
        return torch.cat([axes[i % 3] for i, axes in enumerate(part.split(sections, dim=-1))], dim=-1)


def take_positions(part: Tensor, index_BK: Tensor) -> Tensor:
    """Cosines or sines of the tokens at index_BK."""
    if part.dim() == 3:
        return ops.take_rows(part, index_BK)
    return torch.stack([ops.take_rows(axis_BSE, index_BK) for axis_BSE in part])


def _num_cells(grids: Grids) -> int:
    return sum(rows * columns for rows, columns in grids)
