"""Where a prompt's tokens stand, and where its survivors stand once they are renumbered.

Shapes: B batch, S tokens of the whole prompt, K surviving tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from btp.anatomy import Anatomy, take_positions
from btp.reading import Reading

__all__ = ["Positions"]


class Positions:
    """The positions of a prompt's tokens, and of its survivors once they are renumbered.

    Renumbered positions are the first K of the old ones, since pads come first; on three axes (M-RoPE), where the old
    ones follow the picture, every real survivor counts up by one on all of them, as text does.
    """

    def __init__(self, anatomy: Anatomy, decoder_inputs: Mapping[str, Any], reading: Reading) -> None:
        self._anatomy, self._reading = anatomy, reading
        self._hidden_BSD = decoder_inputs["inputs_embeds"]
        position_ids = decoder_inputs.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(self._hidden_BSD.shape[1], device=self._hidden_BSD.device)[None]
        self._axes = position_ids[-3:] if position_ids.dim() == 3 else position_ids[None]  # (1 or 3, B or 1, S)

    def embeddings(
        self, layer: int, whole: tuple[Tensor, Tensor], columns_BK: Tensor, *, reset: bool
    ) -> tuple[Tensor, Tensor]:
        """Rotary cosines and sines of the survivors."""
        if not reset:
            return take_positions(whole[0], columns_BK), take_positions(whole[1], columns_BK)
        num_surviving = columns_BK.shape[1]
        if not self._anatomy.mrope:
            return whole[0][:, :num_surviving], whole[1][:, :num_surviving]
        position_ids = self._renumbered(num_surviving).expand(3, -1, -1)
        return self._anatomy.position_embeddings(layer, self._hidden_BSD, position_ids)

    def after_prompt(self) -> Tensor:
        """The position that follows each row's last prompt token, on whichever axis is furthest. (B, 1)"""
        from_end_B1 = self._reading.from_end_B1
        last_1B1 = (self._axes.shape[2] - 1 - from_end_B1)[None].expand(len(self._axes), -1, -1)
        return self._axes.expand(-1, len(from_end_B1), -1).gather(2, last_1B1).amax(dim=0) + 1

    def shift(self, num_surviving: int) -> Tensor:
        """How much lower the position after the prompt is once it is renumbered. (B, 1)"""
        from_end_B1 = self._reading.from_end_B1
        new_BK = self._renumbered(num_surviving)[0].expand(len(from_end_B1), -1)
        return self.after_prompt() - 1 - new_BK.gather(1, num_surviving - 1 - from_end_B1)

    def _renumbered(self, num_surviving: int) -> Tensor:
        """(1, B or 1, K)"""
        if not self._anatomy.mrope:
            return self._axes[:1, :, :num_surviving]
        place_K = torch.arange(num_surviving, device=self._axes.device)
        return (place_K - self._reading.num_left_pads_B1).clamp(min=0)[None]
