"""Attention masks for sequences that lost tokens. torch only.

A decoder layer gets its mask in the form its attention kernel wants: None (causal, nothing padded), (B, S) padding for
flash attention, or (B or 1, 1, Q, S), bool for sdpa (True attends) and additive float for eager.

Shapes: B batch, Q queries, S keys, K surviving tokens.
"""

import torch
from torch import Tensor

from btp.ops import take_rows

__all__ = ["decode_mask", "key_bias", "take_square"]


def take_square(mask: Tensor | None, kept_BK: Tensor) -> Tensor | None:
    """A prefill mask with only the kept tokens as queries and keys, in the same form."""
    if mask is None:  # causal stays causal, since the kept tokens stay in order
        return None
    if mask.dim() == 2:
        return take_rows(mask, kept_BK)
    rows_BKS = take_rows(mask[:, 0], kept_BK)
    return rows_BKS.gather(2, kept_BK.unsqueeze(1).expand(-1, kept_BK.shape[1], -1)).unsqueeze(1)


def key_bias(mask: Tensor | None, query_B1: Tensor) -> Tensor | None:
    """What one query row adds to its logits, 0 or very negative. (B, 1, S), or None when it attends to every key."""
    if mask is None:
        return None
    row_B1S = mask.unsqueeze(1) if mask.dim() == 2 else take_rows(mask[:, 0], query_B1)
    return row_B1S if row_B1S.is_floating_point() else _additive(row_B1S.bool(), torch.float32)


def decode_mask(
    dense_mask: Tensor | None, columns_BK: Tensor | None, num_keys: int, hidden_BQD: Tensor, kernel: str
) -> Tensor | None:
    """The mask of new tokens against a pruned layer's cache.

    dense_mask: what the caller gave for the whole unpruned sequence: None, (B, S), or a ready (B or 1, 1, Q, S).
    columns_BK: the surviving columns, the new tokens' included; None when none was dropped.
    num_keys: K, cached and new together. hidden_BQD: the new tokens, for their number, dtype and device.
    """
    num_queries = hidden_BQD.shape[1]
    if dense_mask is not None and columns_BK is not None:
        dense_mask = _take_columns(dense_mask, columns_BK)
    if (dense_mask is not None and dense_mask.dim() == 4) or kernel.startswith("flash"):
        return dense_mask
    if dense_mask is None and num_queries == 1:
        return None
    key_K = torch.arange(num_keys, device=hidden_BQD.device)
    visible = (key_K <= key_K[num_keys - num_queries :, None])[None, None]  # causal, aligned to the last key
    if dense_mask is not None:
        visible = visible & dense_mask.bool()[:, None, None, :]
    return visible if kernel == "sdpa" else _additive(visible, hidden_BQD.dtype)


def _take_columns(mask: Tensor, columns_BK: Tensor) -> Tensor:
    if mask.dim() == 2:
        return mask.gather(1, columns_BK)
    heads, queries = mask.shape[1:3]
    index = columns_BK[:, None, None, :].expand(-1, heads, queries, -1)
    return mask.expand(len(columns_BK), -1, -1, -1).gather(3, index)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)
