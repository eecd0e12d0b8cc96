"""What a selector may look at: the image tokens of a prompt, as they enter one stage.

Shapes: B batch, N image tokens entering the stage, T text tokens (pads among them), D hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from btp import ops
from btp.ops import Grids

__all__ = ["Attention", "ImageTokens", "TextTokens"]


@dataclass(frozen=True, eq=False)
class Attention:
    """The last prompt token's attention to the image tokens, as head means. Both (B, N)

    softmax: of the weights over all keys. logits: of the raw logits, which rank differently.
    """

    softmax: Tensor
    logits: Tensor


@dataclass(frozen=True, eq=False)
class TextTokens:
    """The prompt's other tokens, in order.

    hidden_BTD: entering the stage's layer. key_norm_BT: L1 norm of their keys there, all heads together.
    instruction_BT: True for real text after the row's last image token, which every row has at least one of.
    """

    hidden_BTD: Tensor
    key_norm_BT: Tensor
    instruction_BT: Tensor


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """A read-only view. What costs something is computed when a selector first reads it, and once.

    origin_BN: each token's index among the prompt's original image tokens, rising along a row.
    grids: a row each, the grids its original tokens lie on, in order; rows of a batch may differ in shape, not in
    their number of tokens. Pictures and tiles that belong to no common grid are stacked on top of one another, and a
    newline token after each row of a stitched picture is one more column.
    """

    origin_BN: Tensor
    grids: tuple[Grids, ...]
    read_hidden: Callable[[], Tensor]
    read_attention: Callable[[], Attention]
    read_key_norm: Callable[[], Tensor]
    read_text: Callable[[], TextTokens]
    read_cls_attention: Callable[[], Tensor | None]

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states entering the stage's layer. (B, N, D)"""
        return self.read_hidden()

    @cached_property
    def attention(self) -> Attention:
        """The last prompt token's attention at the stage's layer."""
        return self.read_attention()

    @cached_property
    def key_norm(self) -> Tensor:
        """L1 norm of each token's keys at the stage's layer, all heads together. (B, N)"""
        return self.read_key_norm()

    @cached_property
    def text(self) -> TextTokens:
        """The prompt's text tokens at the stage's layer."""
        return self.read_text()

    @cached_property
    def cls_attention(self) -> Tensor | None:
        """The vision encoder's [CLS] attention to each token, a head mean; None where it has no [CLS]. (B, N)"""
        return self.read_cls_attention()

    @property
    def coordinates(self) -> Tensor:
        """Row and column of each token. (B, N, 2)"""
        return self.of_original(ops.grid_cells)

    def of_original(self, table: Callable[[Grids, torch.device], Tensor]) -> Tensor:
        """What `table(grids, device)`, (N0, ...) over a row's original tokens, says of each token here. (B, N, ...)"""
        tables = [table(grids, self.origin_BN.device) for grids in self.grids]
        if len(set(self.grids)) == 1:
            return tables[0][self.origin_BN]
        return torch.stack([values[origin_N] for values, origin_N in zip(tables, self.origin_BN, strict=True)])
