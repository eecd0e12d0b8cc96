"""What there is to read of a prompt at one stage: the view that selectors get, and the cross-modal attention shares.

Shapes: B batch, S tokens of the whole prompt, L tokens in the sequence as it stands, N image tokens alive, T text
tokens (pads among them), H query heads, D hidden size.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from btp import masks, ops
from btp.anatomy import Anatomy
from btp.encoding import Notes
from btp.errors import RealizationError
from btp.ops import Grids
from btp.tokens import Attention, ImageTokens, TextTokens

__all__ = ["Reading"]


class Reading:
    """One prompt with images. `enter` moves it to a stage; the rest reads there.

    Everything about the prompt that needs a value on the host is asked for here, in one transfer from the device.
    Where pads are is read off a 2-D attention mask; beside a ready 4-D one they must be on the left.
    """

    def __init__(self, anatomy: Anatomy, image_mask_BS: Tensor, prompt: Mapping[str, Any], notes: Notes | None) -> None:
        self._anatomy, self._notes = anatomy, notes
        padding = prompt.get("attention_mask")
        real_BS = torch.ones_like(image_mask_BS)
        if isinstance(padding, Tensor) and padding.dim() == 2:
            real_BS = padding.bool()
        self.from_end_B1 = real_BS.flip(1).to(torch.uint8).argmax(dim=1, keepdim=True)  # pads on the right
        self.num_left_pads_B1 = real_BS.to(torch.uint8).argmax(dim=1, keepdim=True)
        last_B1 = image_mask_BS.shape[1] - 1 - self.from_end_B1
        self.num_image_tokens = _equal_count(image_mask_BS, last_B1)
        self.image_BN = ops.indices_of(image_mask_BS, self.num_image_tokens)
        self._image_mask_BS, self._real_BS = image_mask_BS, real_BS
        self._grids: tuple[Grids, ...] = ()
        if self.num_image_tokens:
            pictures = None if notes is None else notes.grids
            self._grids = anatomy.grids(pictures, len(image_mask_BS), self.num_image_tokens)

    def enter(
        self, layer: int, hidden_BLD: Tensor, inputs: Mapping[str, Any], image_BN: Tensor, origin_BN: Tensor
    ) -> None:
        """Look at the sequence as it stands before `layer`: where its image tokens are, and which ones they are."""
        self._layer, self._hidden_BLD, self._inputs = layer, hidden_BLD, inputs
        self._here_BN, self._origin_BN = image_BN, origin_BN
        self._key_norm_here_BL: Tensor | None = None

    def image_tokens(self) -> ImageTokens:
        return ImageTokens(
            origin_BN=self._origin_BN,
            grids=self._grids,
            read_hidden=lambda: ops.take_rows(self._hidden_BLD, self._here_BN),
            read_attention=self._attention,
            read_key_norm=lambda: self._key_norm_BL().gather(1, self._here_BN),
            read_text=self._text,
            read_cls_attention=self._cls_attention,
        )

    def cross_attention_shares(self) -> Tensor:
        """How much of the text's attention goes to the image, and of the image's to the text. (B, 2)

        Means over heads and over the instruction's, or the image's, tokens of the attention weights summed. The first
        real token is left out of what the image attends to: attention parks there whatever it says.
        """
        batch, length = self._hidden_BLD.shape[:2]
        every_BL = torch.arange(length, device=self._hidden_BLD.device).expand(batch, -1)
        weight_BHLL = self._weights(every_BL)
        weight_BLL = weight_BHLL.mean(dim=1)
        image_BL = torch.zeros_like(every_BL, dtype=torch.bool).scatter(1, self._here_BN, True)
        instruction_BL = torch.zeros_like(image_BL).scatter(1, self._text_here(), self._instruction())
        text_BL = ~image_BL & (every_BL != self.num_left_pads_B1)
        return torch.stack((_share(weight_BLL, instruction_BL, image_BL), _share(weight_BLL, image_BL, text_BL)), dim=1)

    def _attention(self) -> Attention:
        last_B1 = self._hidden_BLD.shape[1] - 1 - self.from_end_B1
        logits_BHL = self._logits(last_B1)[:, :, 0]
        weight_BHL = self._masked(logits_BHL.unsqueeze(2), last_B1).softmax(dim=-1)[:, :, 0]
        return Attention(
            softmax=weight_BHL.mean(dim=1).gather(1, self._here_BN),
            logits=logits_BHL.mean(dim=1).gather(1, self._here_BN),
        )

    def _weights(self, query_BQ: Tensor) -> Tensor:
        """(B, H, Q, L)"""
        return self._masked(self._logits(query_BQ), query_BQ).softmax(dim=-1)

    def _logits(self, query_BQ: Tensor) -> Tensor:
        embeddings = self._inputs["position_embeddings"]
        return self._anatomy.attention_logits(self._layer, self._hidden_BLD, embeddings, query_BQ)

    def _masked(self, logits_BHQL: Tensor, query_BQ: Tensor) -> Tensor:
        return logits_BHQL + masks.query_bias(self._inputs.get("attention_mask"), query_BQ, logits_BHQL.shape[3])

    def _key_norm_BL(self) -> Tensor:
        if self._key_norm_here_BL is not None:  # image and text ask for it
            return self._key_norm_here_BL
        key_BGLE = self._anatomy.keys(self._layer, self._hidden_BLD, self._inputs["position_embeddings"])
        self._key_norm_here_BL = key_BGLE.float().abs().sum(dim=(1, 3))
        return self._key_norm_here_BL

    def _text(self) -> TextTokens:
        here_BT = self._text_here()
        return TextTokens(
            hidden_BTD=ops.take_rows(self._hidden_BLD, here_BT),
            key_norm_BT=self._key_norm_BL().gather(1, here_BT),
            instruction_BT=self._instruction(),
        )

    def _instruction(self) -> Tensor:
        """Real text after the row's last image token, among the prompt's text. (B, T)"""
        text_BT = ops.indices_of(~self._image_mask_BS, self._image_mask_BS.shape[1] - self.num_image_tokens)
        return (text_BT > self.image_BN[:, -1:]) & self._real_BS.gather(1, text_BT)

    def _text_here(self) -> Tensor:
        """Where the prompt's text is in the sequence as it stands. (B, T)"""
        is_text_BL = torch.ones(self._hidden_BLD.shape[:2], dtype=torch.bool, device=self._here_BN.device)
        num_text = is_text_BL.shape[1] - self._here_BN.shape[1]
        return ops.indices_of(is_text_BL.scatter(1, self._here_BN, False), num_text)

    def _cls_attention(self) -> Tensor | None:
        whole = None if self._notes is None else self._notes.cls_attention
        if whole is None:
            return None
        whole_BN = whole.to(self._origin_BN.device).view(-1, self.num_image_tokens)
        return whole_BN.repeat_interleave(len(self._origin_BN) // len(whole_BN), dim=0).gather(1, self._origin_BN)


def _share(weight_BLL: Tensor, from_BL: Tensor, to_BL: Tensor) -> Tensor:
    """Mean over the tokens `from` of the attention weight they put on the tokens `to`. (B,)"""
    given_BL = (weight_BLL * to_BL.unsqueeze(1)).sum(dim=2)
    return (given_BL * from_BL).sum(dim=1) / from_BL.sum(dim=1)


def _equal_count(image_mask_BS: Tensor, last_B1: Tensor) -> int:
    """Image tokens a row. Reads the device once a prefill; only a conditional stage does so again."""
    ends_B1 = image_mask_BS.gather(1, last_B1)
    read: list[list[int]] = torch.cat((image_mask_BS.sum(dim=1, keepdim=True), ends_B1), dim=1).tolist()
    counts = [count for count, _ in read]
    if len(set(counts)) > 1:
        raise RealizationError(
            f"the rows of a batch must hold equally many image tokens, got {counts}; batch prompts with the same "
            "number of images, or run them one by one"
        )
    if any(is_image for _, is_image in read):
        raise RealizationError(
            "a prompt must end with text, got an image token at its end: the answer is read off the last token, which "
            "pruning could drop; put the question after the image"
        )
    return counts[0]
