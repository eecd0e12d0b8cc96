"""Prompts of a batch, prefilled, and what is fed after them, on one key-value cache.

Shapes: B rows, S tokens of a row so far, T tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from btp.families import anatomy_of
from btp.prefix import cache_of_rows, discount_masked

__all__ = ["Continuation", "own_inputs"]


class Continuation:
    """Born by the prefill of its prompts; `feed` goes on, `reject` takes back, `branch` goes several ways.

    inputs: left-padded where prompts differ in length. Rejected tokens stay in the cache, masked.
    """

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model = model
        anatomy = anatomy_of(model)
        self._mrope, self._num_layers = anatomy.mrope, len(anatomy.layers)
        ids_BS, mask_BS = inputs["input_ids"], inputs.get("attention_mask")
        self._mask_BS = torch.ones_like(ids_BS) if mask_BS is None else mask_BS
        self._pad = int(ids_BS[0, 0])  # what stands in for nothing; never looked at
        # M-RoPE's positions are the model's own affair; elsewhere pads on the left must not count, as in `generate`.
        positions = {} if self._mrope else {"position_ids": (self._mask_BS.cumsum(dim=1) - 1).clamp(min=0)}
        output = model(**{**own_inputs(inputs), **positions}, use_cache=True, logits_to_keep=1)
        self._cache: Any = output.past_key_values
        self._logits_BV: Tensor = output.logits[:, -1]  # of the latest token that counts
        self._fed_logits_BTV: Tensor = self._logits_BV.unsqueeze(1)
        self._next_B1 = self._mask_BS.sum(dim=1, keepdim=True)  # the place after the latest token that counts
        if self._mrope:
            self._next_B1 = self._next_B1 + model.model.rope_deltas

    def branch(self, rows: Sequence[int]) -> Self:
        """These rows, each as often as given, on a cache of their own; this continuation stays as it is."""
        index_K = torch.tensor(rows, device=self._mask_BS.device)
        branch = object.__new__(type(self))
        branch.__dict__.update(self.__dict__)
        branch._cache = cache_of_rows(self._cache, rows, self._num_layers)
        branch._mask_BS, branch._next_B1 = self._mask_BS[index_K], self._next_B1[index_K]
        branch._logits_BV = self._logits_BV[index_K]
        return branch

    def feed(self, tokens: Sequence[list[int]]) -> Tensor:
        """The logits after what came before, and after each of the tokens, a list a row. (B, 1 + T, V)

        Short rows are padded on the right: what lies behind their own tokens means nothing. All of them may be empty.
        """
        before_B1V = self._fed_logits_BTV = self._logits_BV.unsqueeze(1)
        num_fed = max(map(len, tokens))
        if not num_fed:
            return before_B1V
        device = self._mask_BS.device
        padded = [[*row, *[self._pad] * (num_fed - len(row))] for row in tokens]
        ids_BT = torch.tensor(padded, device=device)
        self._mask_BS = torch.cat((self._mask_BS, torch.ones_like(ids_BT)), dim=1)
        position_BT = self._next_B1 + torch.arange(num_fed, device=device)
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BS,
            position_ids=position_BT.expand(3, -1, -1) if self._mrope else position_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        fed_BTV = self._fed_logits_BTV = torch.cat((before_B1V, output.logits), dim=1)
        return fed_BTV

    def reject(self, num_kept: Sequence[int]) -> None:
        """Of the tokens fed last, keep as many of each row, and never look at the others again."""
        num_fed = self._fed_logits_BTV.shape[1] - 1
        if not num_fed:
            return
        kept_B1 = torch.tensor(num_kept, device=self._mask_BS.device).unsqueeze(1)
        self._logits_BV = self._fed_logits_BTV[torch.arange(len(kept_B1), device=kept_B1.device), kept_B1[:, 0]]
        self._mask_BS[:, -num_fed:] = (torch.arange(num_fed, device=kept_B1.device) < kept_B1).to(self._mask_BS.dtype)
        self._next_B1 = self._next_B1 + kept_B1
        discount_masked(self._cache, num_fed - kept_B1, self._num_layers)


def own_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy, since the model fills the dictionary of encoder outputs it is handed."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}
