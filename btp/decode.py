"""One forward of new tokens over a pruned cache: each layer's mask and positions, from that layer's own cache."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from btp import masks
from btp.anatomy import Anatomy
from btp.errors import RealizationError
from btp.prefill import CacheLayout

__all__ = ["Decode", "attach_layout", "layout_of"]

_ATTRIBUTE = "_btp_layout"
_ALONE = (
    "after a stage before layer 0 `generate` cannot tell how much of a conversation is cached: hand model(...) the new "
    "tokens alone"
)


def attach_layout(cache: object, layout: CacheLayout | None) -> None:
    """Write down in the cache what its prefill left in it; None clears what an earlier prefill wrote."""
    if layout is not None:
        setattr(cache, _ATTRIBUTE, layout)
    elif hasattr(cache, _ATTRIBUTE):
        delattr(cache, _ATTRIBUTE)


def layout_of(cache: Any, num_layers: int) -> CacheLayout | None:
    """What a pruned prefill left in the cache; None for a dense one.

    Raises RealizationError for a cache that lost its layout where that shows: after a cut before layer 0 all layers
    are of one length, and a cache rebuilt from its tensors cannot be told from a dense one.
    """
    layout = cast(CacheLayout | None, getattr(cache, _ATTRIBUTE, None))
    if layout is None and cache.get_seq_length(0) != cache.get_seq_length(num_layers - 1):
        raise RealizationError(
            "a cache whose layers differ in length must come from a pruned prefill, but this one has no record of it; "
            "continue on the cache object the prefill returned, or on its copy.deepcopy"
        )
    return layout


class Decode:
    """Gives every layer the mask and the positions that fit its cache.

    prompt: the inputs of the multimodal module, if it was called. decoder_inputs: the keyword inputs of the language
    model for the new tokens, as if nothing had been dropped; the object's own `decoder_inputs` is what the language
    model shall get instead.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        layout: CacheLayout,
        prompt: Mapping[str, Any] | None,
        decoder_inputs: dict[str, Any],
    ) -> None:
        self._anatomy, self._layout = anatomy, layout
        cache, self._hidden_BQD = decoder_inputs["past_key_values"], decoder_inputs["inputs_embeds"]
        self._num_decoded = _num_decoded(cache, layout)
        given = decoder_inputs if prompt is None else prompt
        self._mask = self._checked_mask(given.get("attention_mask"))
        self._position_ids = self._dense_positions(given.get("position_ids"), decoder_inputs.get("position_ids"))
        self._inputs_by_kind: dict[tuple[int, int | None], dict[str, Any]] = {}
        # Without a mask the language model makes a trivial one; each layer's own replaces it below.
        self.decoder_inputs = {**decoder_inputs, "attention_mask": None, "position_ids": self._position_ids}

    def enter_layer(self, layer: int, hidden_BQD: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder layer `layer` shall get in place of these hidden states and keyword inputs."""
        kind = self._layout.depth_of_layer[layer], self._anatomy.window(layer)
        if kind not in self._inputs_by_kind:
            self._inputs_by_kind[kind] = self._inputs_at(layer, *kind)
        return hidden_BQD, {**inputs, **self._inputs_by_kind[kind]}

    def leave_layer(self, layer: int, hidden_BQD: Tensor) -> Tensor:
        """The layer's output, unchanged: new tokens are text."""
        return hidden_BQD

    def _inputs_at(self, layer: int, depth: int, window: int | None) -> dict[str, Any]:
        kernel = self._anatomy.attention_kernel
        columns_BK = self._columns(depth, window)
        mask = masks.decode_mask(self._mask, columns_BK, self._hidden_BQD, kernel, window)
        shift_B1 = self._layout.shifts[depth]
        if shift_B1 is None:
            return {"attention_mask": mask}
        position_ids = self._position_ids - shift_B1
        embeddings = self._anatomy.position_embeddings(layer, self._hidden_BQD, position_ids)
        text_ids = position_ids if position_ids.dim() == 2 else position_ids[0]
        return {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": text_ids}

    def _columns(self, depth: int, window: int | None) -> Tensor:
        """The places in the unpruned sequence of the keys a layer will see. (B or 1, K)"""
        num_prompt, num_new = self._layout.prompt_length, self._hidden_BQD.shape[1]
        device = self._hidden_BQD.device
        new_T = torch.arange(num_prompt, num_prompt + self._num_decoded + num_new, device=device)[None]
        columns_BK = self._layout.columns[depth]
        if columns_BK is None:
            columns_BK = torch.arange(num_prompt, device=device)[None]
        whole_BK = torch.cat((columns_BK, new_T.expand(len(columns_BK), -1)), dim=1)
        # A sliding layer's cache holds its latest window - 1 tokens, and the new ones come on top.
        return whole_BK if window is None else whole_BK[:, -(window - 1 + num_new) :]

    def _checked_mask(self, mask: object) -> Tensor | None:
        """The caller's mask, or None when it hides nothing. Reads the device once a forward, as transformers does."""
        if not isinstance(mask, Tensor):
            return None
        length = self._layout.prompt_length + self._num_decoded + self._hidden_BQD.shape[1]
        if mask.shape[-1] != length:
            raise RealizationError(
                f"attention_mask must cover the whole unpruned sequence, {length} tokens, got {mask.shape[-1]}; "
                f"append a 1 a new token to the prompt's mask, as if nothing had been dropped; {_ALONE}"
            )
        return None if mask.dim() == 2 and bool(mask.all()) else mask

    def _dense_positions(self, given: Tensor | None, received: Tensor | None) -> Tensor:
        """Positions of the new tokens in the unpruned sequence. (B or 1, Q), or (3 or 4, B, Q) with M-RoPE

        What the caller gave holds. What the model worked out itself (M-RoPE) runs over the whole mask, or counts from
        the first layer's cache, which may be shorter than the unpruned sequence.
        """
        num_new = self._hidden_BQD.shape[1]
        if given is not None:
            received = given if received is None else received
            self._check_goes_on(received)
            return received
        if received is None:
            start = self._layout.prompt_length + self._num_decoded
            return torch.arange(start, start + num_new, device=self._hidden_BQD.device).unsqueeze(0)
        if received.shape[-1] > num_new:
            return received[..., -num_new:]
        return received + self._layout.prompt_length - self._layout.num_cached(0)

    def _check_goes_on(self, position_ids: Tensor) -> None:
        """Raise where a caller that counts cached tokens by the first layer feeds some of them again."""
        if self._hidden_BQD.shape[1] == 1 or self._layout.num_cached(0) == self._layout.prompt_length:
            return
        axis_BQ = position_ids if position_ids.dim() == 2 else position_ids[-1]
        if bool((axis_BQ[:, :1] < self._layout.next_position + self._num_decoded).any()):
            raise RealizationError(
                f"positions must go on from the unpruned sequence, but start before its end; {_ALONE}"
            )


def _num_decoded(cache: Any, layout: CacheLayout) -> int:
    """New tokens already in the cache, which every layer must agree on."""
    last = len(layout.depth_of_layer) - 1
    first_count = cache.get_seq_length(0) - layout.num_cached(0)
    last_count = cache.get_seq_length(last) - layout.num_cached(last)
    if first_count != last_count or first_count < 0:
        raise RealizationError(
            f"every layer's cache must hold its part of the pruned prompt and the same new tokens, got {first_count} "
            f"new ones in the first layer and {last_count} in the last: it was cropped, as assisted generation does by "
            "the unpruned length; leave that off, or prefill again"
        )
    return int(first_count)
