"""One forward of new tokens over a pruned cache: each layer's mask and positions, from that layer's own cache."""

from typing import Any, cast

import torch
from torch import Tensor

from btp import masks
from btp.anatomy import Anatomy
from btp.errors import RealizationError
from btp.prefill import CacheLayout

__all__ = ["Decode", "attach_layout", "layout_of"]

_ATTRIBUTE = "_btp_layout"


def attach_layout(cache: object, layout: CacheLayout | None) -> None:
    """Write down in the cache what its prefill left in it; None clears what an earlier prefill wrote."""
    if layout is not None:
        setattr(cache, _ATTRIBUTE, layout)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def layout_of(cache: Any, num_layers: int) -> CacheLayout | None:
    """What a pruned prefill left in the cache; None for a dense one. Raises when a pruned cache lost its layout."""
    layout = cast(CacheLayout | None, getattr(cache, _ATTRIBUTE, None))
    if layout is None and cache.get_seq_length(0) != cache.get_seq_length(num_layers - 1):
        raise RealizationError(
            "a cache whose layers differ in length must come from a pruned prefill, but this one has no record of it; "
            "continue on the cache object the prefill returned, or on its copy.deepcopy"
        )
    return layout


class Decode:
    """Gives every layer the mask and the positions that fit its cache.

    decoder_inputs: the keyword inputs of the language model for the new tokens, as if nothing had been dropped; the
    object's own `decoder_inputs` is what the language model shall get instead.
    """

    def __init__(self, anatomy: Anatomy, layout: CacheLayout, decoder_inputs: dict[str, Any]) -> None:
        self._anatomy, self._layout = anatomy, layout
        cache, self._hidden_BQD = decoder_inputs["past_key_values"], decoder_inputs["inputs_embeds"]
        self._num_decoded = _num_decoded(cache, layout)
        self._mask = self._checked_mask(decoder_inputs.get("attention_mask"))
        self._position_ids = self._dense_positions(decoder_inputs.get("position_ids"))
        self._inputs_by_depth: dict[int, dict[str, Any]] = {}
        # Without a mask the language model makes a trivial one; each layer's own replaces it below.
        self.decoder_inputs = {**decoder_inputs, "attention_mask": None, "position_ids": self._position_ids}

    def enter_layer(self, layer: int, hidden_BQD: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder layer `layer` shall get in place of these hidden states and keyword inputs."""
        depth = self._layout.depth_of_layer[layer]
        if depth not in self._inputs_by_depth:
            self._inputs_by_depth[depth] = self._inputs_at(depth)
        return hidden_BQD, {**inputs, **self._inputs_by_depth[depth]}

    def _inputs_at(self, depth: int) -> dict[str, Any]:
        columns_BK = self._layout.columns[depth]
        num_new = self._num_decoded + self._hidden_BQD.shape[1]
        num_prompt = self._layout.prompt_length
        num_cached = num_prompt if columns_BK is None else columns_BK.shape[1]
        if columns_BK is not None and self._mask is not None:
            new_T = torch.arange(num_prompt, num_prompt + num_new, device=columns_BK.device)
            columns_BK = torch.cat((columns_BK, new_T.expand(len(columns_BK), -1)), dim=1)
        kernel = self._anatomy.attention_kernel
        mask = masks.decode_mask(self._mask, columns_BK, num_cached + num_new, self._hidden_BQD, kernel)
        if not self._layout.reset or columns_BK is None:
            return {"attention_mask": mask}
        position_ids = self._position_ids - (num_prompt - num_cached)
        embeddings = self._anatomy.position_embeddings(self._hidden_BQD, position_ids)
        return {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": position_ids}

    def _checked_mask(self, mask: Tensor | None) -> Tensor | None:
        """The caller's mask, or None when it hides nothing. Reads the device once a forward, as transformers does."""
        if mask is None or (mask.dim() == 2 and bool(mask.all())):
            return None
        length = self._layout.prompt_length + self._num_decoded + self._hidden_BQD.shape[1]
        if mask.shape[-1] != length:
            raise RealizationError(
                f"attention_mask must cover the whole unpruned sequence, {length} tokens, got {mask.shape[-1]}; "
                "append a 1 a new token to the prompt's mask, as if nothing had been dropped"
            )
        return mask

    def _dense_positions(self, position_ids: Tensor | None) -> Tensor:
        """Positions of the new tokens in the unpruned sequence: the cache is too short to count them from it."""
        if position_ids is not None:
            return position_ids
        start = self._layout.prompt_length + self._num_decoded
        num_new = self._hidden_BQD.shape[1]
        return torch.arange(start, start + num_new, device=self._hidden_BQD.device).unsqueeze(0)


def _num_decoded(cache: Any, layout: CacheLayout) -> int:
    """New tokens already in the cache, which every layer must agree on."""
    last = len(layout.depth_of_layer) - 1
    first_count = cache.get_seq_length(0) - layout.num_cached(0)
    last_count = cache.get_seq_length(last) - layout.num_cached(last)
    if first_count != last_count or first_count < 0:
        raise RealizationError(
            f"every layer's cache must hold its part of the pruned prompt and the same new tokens, got {first_count} "
            f"new ones in the first layer and {last_count} in the last; prefill again"
        )
    return int(first_count)
