"""Attention masks for sequences that lost tokens. torch only.

A decoder layer gets its mask in the form its attention kernel wants: None (causal, nothing padded), (B, S) padding for
flash attention, or (B or 1, 1, Q, S), bool for sdpa (True attends) and additive float for eager.

Shapes: B batch, Q queries, S keys, K surviving tokens.
"""

import torch
from torch import Tensor

from btp.ops import take_rows

__all__ = ["decode_mask", "query_bias", "take_square"]


def take_square(mask: Tensor | None, kept_BK: Tensor) -> Tensor | None:
    """A prefill mask with only the kept tokens as queries and keys, in the same form."""
    if mask is None:  # causal stays causal, since the kept tokens stay in order
        return None
    if mask.dim() == 2:
        return take_rows(mask, kept_BK)
    rows_BKS = take_rows(mask[:, 0], kept_BK)
    return rows_BKS.gather(2, kept_BK.unsqueeze(1).expand(-1, kept_BK.shape[1], -1)).unsqueeze(1)


def query_bias(mask: Tensor | None, query_BQ: Tensor, num_keys: int) -> Tensor:
    """What the mask adds to the logits of these queries against every key, 0 or very negative. (B, 1, Q, S)"""
    if mask is not None and mask.dim() == 4:
        row_BQS = take_rows(mask[:, 0], query_BQ)
        return (row_BQS if row_BQS.is_floating_point() else _additive(row_BQS, torch.float32)).unsqueeze(1)
    visible_BQS = torch.arange(num_keys, device=query_BQ.device) <= query_BQ.unsqueeze(2)
    if mask is not None:
        visible_BQS = visible_BQS & mask.bool().unsqueeze(1)
    return _additive(visible_BQS, torch.float32).unsqueeze(1)


def decode_mask(
    dense_mask: Tensor | None, columns_BK: Tensor, hidden_BQD: Tensor, kernel: str, window: int | None
) -> Tensor | None:
    """The mask of new tokens against one layer's cache.

    dense_mask: what the caller gave for the whole unpruned sequence: None, (B, S), or a ready (B or 1, 1, Q, S).
    columns_BK: which tokens of that sequence the keys are, (B or 1, K), the new ones last. hidden_BQD: the new tokens,
    for their number, dtype and device. window: how many of the latest places a token sees; None for all.
    """
    num_queries = hidden_BQD.shape[1]
    if dense_mask is not None:
        dense_mask = _take_columns(dense_mask, columns_BK)
    if kernel.startswith("flash") or (dense_mask is not None and dense_mask.dim() == 4):
        return dense_mask
    if dense_mask is None and num_queries == 1 and window is None:
        return None
    query_BQ1 = columns_BK[:, -num_queries:, None]
    visible = columns_BK.unsqueeze(1) <= query_BQ1
    if window is not None:
        visible = visible & (columns_BK.unsqueeze(1) > query_BQ1 - window)
    if dense_mask is not None:
        visible = visible & dense_mask.bool().unsqueeze(1)
    visible = visible.unsqueeze(1)
    return visible if kernel == "sdpa" else _additive(visible, hidden_BQD.dtype)


def _take_columns(mask: Tensor, columns_BK: Tensor) -> Tensor:
    batch = max(len(mask), len(columns_BK))
    columns_BK = columns_BK.expand(batch, -1)
    if mask.dim() == 2:
        return mask.expand(batch, -1).gather(1, columns_BK)
    index = columns_BK[:, None, None, :].expand(-1, *mask.shape[1:3], -1)
    return mask.expand(batch, -1, -1, -1).gather(3, index)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    zero = torch.zeros((), dtype=dtype, device=visible.device)
    return torch.where(visible, zero, torch.finfo(dtype).min)
