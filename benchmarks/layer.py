"""One decoder layer's attention with random weights, and what a stage before it reads.

Shapes: B batch, N image tokens, S tokens of the prompt, the picture's first, D hidden size, H heads, E head dimension.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm

from btp.anatomy import Anatomy
from btp.cost import DecoderShape
from btp.ops import Grids
from btp.tokens import Attention, ImageTokens, TextTokens

__all__ = ["Layer"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A Llama layer's norm and attention, as btp sees it."""

    anatomy: Anatomy
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def random(cls, hidden_size: int, num_heads: int, device: str, dtype: torch.dtype) -> "Layer":
        config = LlamaConfig(hidden_size=hidden_size, num_attention_heads=num_heads, num_hidden_layers=1)
        config._attn_implementation = "eager"
        layer = nn.Module()
        layer.self_attn, layer.input_layernorm = LlamaAttention(config, 0), LlamaRMSNorm(hidden_size)
        layer = layer.to(device, dtype).eval()
        shape = DecoderShape(
            num_layers=1,
            hidden_size=hidden_size,
            intermediate_size=config.intermediate_size,
            num_heads=num_heads,
            num_key_value_heads=num_heads,
            head_dim=hidden_size // num_heads,
            vocab_size=config.vocab_size,
        )
        anatomy = Anatomy(
            model=layer, multimodal=layer, language_model=layer, layers=(layer,), image_token_id=0, decoder=shape
        )
        return cls(anatomy=anatomy, head_dim=hidden_size // num_heads, dtype=dtype)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def embeddings(self, hidden_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of some angles. (B, S, E) each"""
        batch, length = hidden_BSD.shape[:2]
        angle_S1 = torch.arange(length, device=hidden_BSD.device, dtype=torch.float32).unsqueeze(1)
        rate_E = torch.linspace(1, 0, self.head_dim // 2, device=hidden_BSD.device).repeat(2)
        angle_BSE = (angle_S1 * rate_E).expand(batch, -1, -1)
        return angle_BSE.cos().to(self.dtype), angle_BSE.sin().to(self.dtype)

    def row(self, hidden_BSD: Tensor) -> Attention:
        """The last token's attention to all tokens, as head means. Both (B, S)"""
        batch, length = hidden_BSD.shape[:2]
        last_B1 = torch.full((batch, 1), length - 1, device=hidden_BSD.device)
        logits_BHS = self.anatomy.attention_logits(0, hidden_BSD, self.embeddings(hidden_BSD), last_B1)[:, :, 0]
        return Attention(logits_BHS.softmax(dim=-1).mean(dim=1), logits_BHS.mean(dim=1))

    def whole(self, hidden_BSD: Tensor) -> Attention:
        """The same row, out of eager attention of the whole layer; its logits are not to be had."""
        layer: Any = self.anatomy.layers[0]
        length = hidden_BSD.shape[1]
        mask_SS = torch.full((length, length), -torch.inf, dtype=self.dtype, device=hidden_BSD.device).triu(1)
        weight_BHSS: Tensor = layer.self_attn(
            layer.input_layernorm(hidden_BSD), self.embeddings(hidden_BSD), mask_SS[None, None]
        )[1]
        softmax_BS = weight_BHSS[:, :, -1].mean(dim=1)
        return Attention(softmax_BS, softmax_BS)

    def view(
        self, hidden_BSD: Tensor, origin_BN: Tensor, grids: Grids, attention: Attention | None = None
    ) -> ImageTokens:
        """As a stage would hand it to a selector; without `attention` it is worked out when it is read."""
        batch, num_tokens = origin_BN.shape

        def read_attention() -> Attention:
            row = self.row(hidden_BSD) if attention is None else attention
            return Attention(row.softmax[:, :num_tokens], row.logits[:, :num_tokens])

        return ImageTokens(
            origin_BN=origin_BN,
            grids=(grids,) * batch,
            read_hidden=lambda: hidden_BSD[:, :num_tokens],
            read_attention=read_attention,
            read_key_norm=_keys_unread,
            read_text=_text_unread,
            read_cls_attention=lambda: None,
        )


def _keys_unread() -> Tensor:
    raise LookupError("the benchmark's view has attention and hidden states only, and the selector reads keys")


def _text_unread() -> TextTokens:
    raise LookupError("the benchmark's view has attention and hidden states only, and the selector reads the text")
