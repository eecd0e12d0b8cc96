"""What learning is taught by: the dense model's own answers, and how likely it found each of their tokens.

Shapes: B batch, S tokens of the prompt, T of the longest answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from autotune.answering import generated
from autotune.continuation import own_inputs
from autotune.data import Example
from autotune.prompts import expected_text, prompt_inputs
from btp.families import anatomy_of
from btp.prefix import encode_images

__all__ = ["Lesson", "lessons"]

NUM_SPARE_TOKENS = 4  # that an answer may be longer than the expected one


@dataclass(frozen=True, eq=False)
class Lesson:
    """A batch of prompts, each followed by the dense model's answer: what to feed at once, and what should come out.

    image_mask_BS and last_B1: where the image tokens and each prompt's last token are. dense_BTV: the dense model's
    log-probabilities at every token of the answers. answer_BT: True where a row's answer has a token.
    """

    inputs: dict[str, Any]
    image_mask_BS: Tensor
    last_B1: Tensor
    dense_BTV: Tensor
    answer_BT: Tensor

    @property
    def num_image_tokens(self) -> int:
        """A row."""
        return int(self.image_mask_BS[0].sum())

    def log_probs(self, model: Any) -> Tensor:
        """The model's log-probabilities at every token of the answers, as it is now. (B, T, V)"""
        return _log_probs(model, self.inputs, self.answer_BT.shape[1])

    def divergence(self, model: Any) -> Tensor:
        """KL(dense || the model as it is now) in nats: each row's mean over its answer, end token included. (B,)"""
        kl_BT = kl_div(self.log_probs(model), self.dense_BTV, reduction="none", log_target=True).sum(dim=2)
        return (kl_BT * self.answer_BT).sum(dim=1) / self.answer_BT.sum(dim=1)


def lessons(model: Any, processor: Any, examples: Iterable[Example], batch_size: int) -> list[Lesson]:
    """The examples in batches of equally many image tokens, in the order they came otherwise."""
    device, anatomy = str(model.device), anatomy_of(model)
    counted = [
        (int(anatomy.image_mask(prompt_inputs(processor, [example], device)).sum()), example) for example in examples
    ]
    taught = []
    for _, alike in groupby(sorted(counted, key=lambda pair: pair[0]), key=lambda pair: pair[0]):
        same = [example for _, example in alike]
        for start in range(0, len(same), batch_size):
            taught.append(_lesson(model, processor, same[start : start + batch_size], device))
    return taught


@torch.no_grad()
def _lesson(model: Any, processor: Any, examples: Sequence[Example], device: str) -> Lesson:
    prompt = encode_images(model, prompt_inputs(processor, examples, device))
    encode = processor.tokenizer.encode
    texts = [expected_text(processor, e) for e in examples]
    limits = [len(encode(text, add_special_tokens=False)) + NUM_SPARE_TOKENS for text in texts]
    answers = generated(model, prompt, limits)
    image_mask_BS = anatomy_of(model).image_mask(prompt)
    inputs, answer_BT = _answered(prompt, answers)
    last_B1 = torch.full((len(examples), 1), image_mask_BS.shape[1] - 1, device=image_mask_BS.device)
    whole_BS = torch.cat((image_mask_BS, torch.zeros_like(answer_BT)), dim=1)
    return Lesson(inputs, whole_BS, last_B1, _log_probs(model, inputs, answer_BT.shape[1]), answer_BT)


def _answered(prompt: dict[str, Any], answers: Sequence[Sequence[int]]) -> tuple[dict[str, Any], Tensor]:
    """Model inputs of left-padded prompts with their answers after them, and where these have tokens. (B, T)"""
    ids_BS, longest = prompt["input_ids"], max(map(len, answers))
    padded = [[*answer, *[answer[-1]] * (longest - len(answer))] for answer in answers]
    answer_BT = torch.tensor([[place < len(answer) for place in range(longest)] for answer in answers])
    answer_BT = answer_BT.to(ids_BS.device)
    added = {"input_ids": torch.tensor(padded, device=ids_BS.device), "attention_mask": answer_BT}
    inputs = {"attention_mask": torch.ones_like(ids_BS), **prompt}
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == ids_BS.shape:  # beside these, the types of the tokens
            addition = added.get(name, torch.zeros_like(answer_BT))
            inputs[name] = torch.cat((value, addition.to(value.dtype)), dim=1)
    return inputs, answer_BT


def _log_probs(model: Any, inputs: dict[str, Any], num_answer_tokens: int) -> Tensor:
    own = own_inputs(inputs)
    if not anatomy_of(model).mrope:  # pads on the left must not count, as in `generate`; M-RoPE sees to it itself
        own["position_ids"] = (own["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
    logits_BTV = model(**own, use_cache=False, logits_to_keep=num_answer_tokens + 1).logits[:, :-1]
    return logits_BTV.float().log_softmax(dim=-1)  # type: ignore[no-any-return]
