"""Greedy answers by verifying a guess: what `generate` would say, in far fewer forwards.

The guess is the expected answer. Fed after the prompt in one forward, it brings to light the model's own choice at
every place; as far as they agree, the guess is what greedy decoding would have said. Where they part, the model's own
choice stands and the rest of the guess is tried after it, until every row has ended. The prompt's prefill sees nothing
of the guess, so that pruning cannot either.
Source: the verification of speculative decoding (arXiv 2211.17192), greedy, with a given text in place of a draft
model.

Shapes: B rows of a batch that have not ended, S tokens of the prompt, T tokens fed at once, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from btp.families import anatomy_of
from btp.prefix import discount_masked, take_cache_rows

__all__ = ["Answers", "generated", "verified", "why_not_verified"]

# Generation settings that greedy decoding into an ordinary cache does not look at, or that are honoured here.
_HONOURED = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "suppress_tokens",
    "temperature",
    "top_k",
    "top_p",
    "transformers_version",
    "use_cache",
}

Answers = list[list[int]]  # new tokens a row, the end token included


def why_not_verified(model: Any) -> str | None:
    """Why this model's answers must be decoded by `generate`; None where guesses can be verified instead."""
    if anatomy_of(model).decoder.windows:
        return "its sliding windows would count rejected guesses among the latest tokens"
    changed = model.generation_config.to_diff_dict()
    unknown = [
        name
        for name, value in changed.items()
        if not name.startswith("_") and name not in _HONOURED and value not in (None, False)
    ]
    return f"its generation settings ask for {', '.join(sorted(unknown))}" if unknown else None


def generated(model: Any, inputs: dict[str, Any], limits: Sequence[int]) -> Answers:
    """The answers by `generate`; limits: the most new tokens, a row each."""
    ids = model.generate(**_own(inputs), max_new_tokens=max(limits), do_sample=False)
    new: Answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    ends = _end_tokens(model)
    return [_until_end(row[:limit], ends) for row, limit in zip(new, limits, strict=True)]


def verified(model: Any, inputs: dict[str, Any], guesses: Sequence[list[int]], limits: Sequence[int]) -> Answers:
    """The same answers by verifying the guesses, tokens a row each, without an end token."""
    sequence = _Sequence(model, inputs)
    ends = _end_tokens(model)
    rows = [
        _Row(index, guess, limit, ends)
        for index, (guess, limit) in enumerate(zip(guesses, limits, strict=True))
        if limit
    ]
    answers: Answers = [[] for _ in limits]
    choices = sequence.prefill()
    while True:
        for row, choice in zip(rows, choices, strict=True):
            row.accept(choice)
            answers[row.index] = row.tokens
        going = [place for place, row in enumerate(rows) if not row.ended]
        if not going:
            return answers
        if len(going) < len(rows):
            sequence.take_rows(going)
            rows = [rows[place] for place in going]
        choices = sequence.extend([row.next_fed() for row in rows])
        sequence.reject([row.num_agreed(choice) for row, choice in zip(rows, choices, strict=True)])


@dataclass(slots=True)
class _Row:
    """One answer as far as it is known, and what to feed next."""

    index: int
    guess: list[int]
    limit: int
    ends: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    fed: list[int] = field(default_factory=list)

    @property
    def ended(self) -> bool:
        return len(self.tokens) >= self.limit or self.tokens[-1] in self.ends

    def next_fed(self) -> list[int]:
        """The model's latest choice, and what is left of the guess after it, no more than the answer may hold."""
        left = self.guess[len(self.tokens) : self.limit - 1]
        self.fed = [self.tokens[-1], *left]
        return self.fed

    def num_agreed(self, choices: list[int]) -> int:
        """How many of the fed tokens greedy decoding would have fed."""
        agreed = 1
        while agreed < len(self.fed) and choices[agreed - 1] == self.fed[agreed]:
            agreed += 1
        return agreed

    def accept(self, choices: list[int]) -> None:
        """Take in the model's choices after each fed token, as far as these were right."""
        num_new = self.num_agreed(choices) if self.fed else 1
        self.tokens = _until_end([*self.tokens, *choices[:num_new]][: self.limit], self.ends)


class _Sequence:
    """A batch of prompts and what was fed after them, on one cache; rejected tokens stay in it, masked."""

    def __init__(self, model: Any, inputs: dict[str, Any]) -> None:
        self._model, self._inputs = model, inputs
        ids_BS = inputs["input_ids"]
        mask = inputs.get("attention_mask")
        self._mask_BS = torch.ones_like(ids_BS) if mask is None else mask
        self._next_B1 = self._mask_BS.sum(dim=1, keepdim=True)  # the place after the latest token that counts
        self._suppressed = model.generation_config.suppress_tokens
        anatomy = anatomy_of(model)
        self._mrope, self._num_layers = anatomy.mrope, len(anatomy.layers)
        self._cache: Any = None
        self._num_fed = 0
        self._pad = int(ids_BS[0, 0])  # what stands in for nothing; never looked at

    def prefill(self) -> list[list[int]]:
        """The first choice of every row."""
        # M-RoPE's positions are the model's own affair; elsewhere pads on the left must not count, as in `generate`.
        positions = {} if self._mrope else {"position_ids": (self._mask_BS.cumsum(dim=1) - 1).clamp(min=0)}
        output = self._model(**{**_own(self._inputs), **positions}, use_cache=True, logits_to_keep=1)
        self._cache = output.past_key_values
        if self._mrope:
            self._next_B1 = self._next_B1 + self._model.model.rope_deltas
        return self._choices(output.logits)

    def extend(self, fed: Sequence[list[int]]) -> list[list[int]]:
        """Feed each row's tokens, and return the choice after each of them; short rows are padded on the right."""
        self._num_fed = max(map(len, fed))
        device = self._mask_BS.device
        ids_BT = torch.tensor([[*row, *[self._pad] * (self._num_fed - len(row))] for row in fed], device=device)
        self._mask_BS = torch.cat((self._mask_BS, torch.ones_like(ids_BT)), dim=1)
        position_BT = self._next_B1 + torch.arange(self._num_fed, device=device)
        output = self._model(
            input_ids=ids_BT,
            attention_mask=self._mask_BS,
            position_ids=position_BT.expand(3, -1, -1) if self._mrope else position_BT,
            past_key_values=self._cache,
            use_cache=True,
        )
        return self._choices(output.logits)

    def reject(self, num_agreed: Sequence[int]) -> None:
        """Of the tokens fed last, keep as many of each row, and never look at the others again."""
        agreed_B1 = torch.tensor(num_agreed, device=self._mask_BS.device).unsqueeze(1)
        fed_T = torch.arange(self._num_fed, device=self._mask_BS.device)
        self._mask_BS[:, -self._num_fed :] = (fed_T < agreed_B1).to(self._mask_BS.dtype)
        self._next_B1 = self._next_B1 + agreed_B1
        discount_masked(self._cache, self._num_fed - agreed_B1, self._num_layers)

    def take_rows(self, places: Sequence[int]) -> None:
        take_cache_rows(self._cache, places, self._num_layers)
        index_K = torch.tensor(places, device=self._mask_BS.device)
        self._mask_BS, self._next_B1 = self._mask_BS[index_K], self._next_B1[index_K]

    def _choices(self, logits_BTV: Tensor) -> list[list[int]]:
        logits_BTV = logits_BTV.float()
        if self._suppressed:
            logits_BTV[..., self._suppressed] = -torch.inf
        choices: list[list[int]] = logits_BTV.argmax(dim=-1).tolist()
        return choices


def _own(inputs: dict[str, Any]) -> dict[str, Any]:
    """A copy, since the model fills the dictionary of encoder outputs it is handed."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}


def _end_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset(() if end is None else end if isinstance(end, list) else [end])


def _until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in ends), tokens)
