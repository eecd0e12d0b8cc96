"""Greedy answers by verifying a guess: what `generate` would say, in far fewer forwards.

A guess is any text that the answer may turn out to be. Fed after the prompt in one forward, it brings to light the
model's own choice at every place; as far as they agree, the guess is what greedy decoding would have said. Where they
part, the model's own choice stands and the rest of the guess is tried after it, until every row has ended. The
prompt's prefill sees nothing of the guess, so that pruning cannot either.
Source: the verification of speculative decoding (arXiv 2211.17192), greedy, with a given text in place of a draft
model.

Shapes: B rows of a batch, T tokens fed at once or places of a guess, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, inf

from autotune.continuation import Continuation, own_inputs
from btp.families import anatomy_of

__all__ = ["Answers", "Line", "followed", "generated", "verified", "why_not_verified", "without_end"]

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


@dataclass(frozen=True, slots=True)
class Line:
    """What goes on after a row's prefill: the rest of the prompt, then a guess at the answer, without an end token.

    limit: the most new tokens, at least 1.
    """

    guess: list[int]
    limit: int
    rest: list[int] = field(default_factory=list)

    @property
    def fed(self) -> list[int]:
        """The rest of the prompt, and of the guess all but what would be a last token anyway."""
        return [*self.rest, *self.guess[: self.limit - 1]]


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
    ids = model.generate(**own_inputs(inputs), max_new_tokens=max(limits), do_sample=False)
    new: Answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [_until_end(model, row[:limit]) for row, limit in zip(new, limits, strict=True)]


def followed(prompts: Continuation, lines: Sequence[Line]) -> list[Tensor]:
    """The logits for every place of each row's guess, its end included, whatever the model would have said. (T, V)"""
    return _of_guesses(prompts.feed([line.fed for line in lines]), lines)


def verified(model: Any, prompts: Continuation, lines: Sequence[Line]) -> tuple[Answers, list[Tensor]]:
    """The answers that `generate` gives, by verifying the guesses; and what `followed` gives."""
    rows = [_Row(model, line) for line in lines]
    logits_BTV = prompts.feed([line.fed for line in lines])
    of_guesses, going = _of_guesses(logits_BTV, lines), rows
    while True:
        choices = _choices(model, logits_BTV)
        prompts.reject([row.accept(own) for row, own in zip(going, choices, strict=True)])
        places = [place for place, row in enumerate(going) if not row.ended]
        if not places:
            return [row.tokens for row in rows], of_guesses
        if len(places) < len(going):
            prompts, going = prompts.branch(places), [going[place] for place in places]
        logits_BTV = prompts.feed([row.fed for row in going])


def _of_guesses(logits_BTV: Tensor, lines: Sequence[Line]) -> list[Tensor]:
    return [logits_TV[len(line.rest) : 1 + len(line.fed)] for logits_TV, line in zip(logits_BTV, lines, strict=True)]


class _Row:
    """One answer as far as it is known, and what to feed next."""

    def __init__(self, model: Any, line: Line) -> None:
        self._model, self._line = model, line
        self._before, self._ahead = line.rest, line.guess[: line.limit - 1]
        self.tokens: list[int] = []
        self.ended = False

    @property
    def fed(self) -> list[int]:
        """What is settled, but not in the cache yet, and what is left of the guess after it."""
        return [*self._before, *self._ahead]

    def accept(self, choices: list[int]) -> int:
        """Take in the model's choices after each fed token, as far as these were right; how many of them were."""
        own = choices[len(self._before) :]
        num_right = sum(1 for _ in takewhile(bool, map(int.__eq__, self._ahead, own)))
        num_kept = len(self._before) + num_right
        self.tokens = _until_end(self._model, [*self.tokens, *own[: num_right + 1]])
        limit = self._line.limit
        self.ended = len(self.tokens) == limit or self.tokens[-1] in _end_tokens(self._model)
        self._before, self._ahead = self.tokens[-1:], self._line.guess[len(self.tokens) : limit - 1]
        return num_kept


def _choices(model: Any, logits_BTV: Tensor) -> Answers:
    if suppressed := model.generation_config.suppress_tokens:
        logits_BTV = logits_BTV.clone()
        logits_BTV[..., suppressed] = -inf
    choices: Answers = logits_BTV.argmax(dim=-1).tolist()
    return choices


def without_end(model: Any, tokens: list[int]) -> list[int]:
    """An answer less the end token that it may have."""
    return tokens[:-1] if tokens and tokens[-1] in _end_tokens(model) else tokens


def _until_end(model: Any, tokens: list[int]) -> list[int]:
    ends = _end_tokens(model)
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in ends), tokens)


def _end_tokens(model: Any) -> frozenset[int]:
    end = model.generation_config.eos_token_id
    return frozenset(() if end is None else end if isinstance(end, list) else [end])
