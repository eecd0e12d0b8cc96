"""How far a plan moves the model from its own dense answers: a score that needs no expected answer.

Both runs are fed the dense model's answer, so that they are compared place by place: the Kullback-Leibler divergence
from the dense to the pruned distribution of the next token, and the negative log-likelihood of the dense token. The
same forward verifies that answer as the pruned model's own (`autotune.answering`).

Shapes: T places of an answer, P places of several, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autotune.answering import Answers, Line, followed, generated, verified, why_not_verified, without_end
from autotune.batches import Batch, Branch
from autotune.continuation import Continuation

__all__ = ["DenseAnswers", "Outcome", "divergences"]

MOST_NATS = 50.0  # no token that a float32 softmax knows of is less likely than exp(-104)

DEVICE_BYTES = 2**29  # of dense logits beside the model; what is more lies in the host's memory


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said to one prompt, the end token included, and how far the next-token distributions are from dense's.

    kl, nll: as in `divergences`.
    """

    tokens: list[int]
    kl: float
    nll: float


@dataclass(frozen=True, slots=True)
class _Dense:
    """line: the answer as a guess for plans to be fed; logits_TV: for every place of it."""

    tokens: list[int]
    line: Line
    logits_TV: Tensor


class DenseAnswers:
    """What the dense model says to each sample, found once, and what is said under a plan beside it.

    guesses, limits: by sample, the expected answer's tokens and the most new ones. Dense logits are kept in the
    model's own dtype, so that nothing is lost, and on its device up to `DEVICE_BYTES`.
    """

    def __init__(self, model: Any, guesses: Sequence[list[int]], limits: Sequence[int]) -> None:
        self._model, self.decodes_because = model, why_not_verified(model)
        self._expected = [Line(guess, limit) for guess, limit in zip(guesses, limits, strict=True)]
        self._dense: dict[int, _Dense] = {}
        self._free_bytes = DEVICE_BYTES

    def find(self, batch: Batch, branch: Branch, prompts: Continuation) -> list[Outcome]:
        """Without a plan: the dense answers, kept for `compare`."""
        expected = {sample: self._expected[sample] for sample in branch.samples}
        answers, _ = self._answered(batch, branch, prompts, expected)
        lines = {
            sample: replace(expected[sample], guess=without_end(self._model, tokens))
            for sample, tokens in zip(branch.samples, answers, strict=True)
        }
        logits = followed(prompts.branch(branch.rows), _continuing(branch, lines))
        for (sample, line), tokens, logits_TV in zip(lines.items(), answers, logits, strict=True):
            self._dense[sample] = _Dense(tokens, line, self._kept(logits_TV))
        return self._outcomes(branch, answers, logits)

    def compare(self, batch: Batch, branch: Branch, prompts: Continuation) -> list[Outcome]:
        """Under a plan, for samples whose dense answers are found."""
        lines = {sample: self._dense[sample].line for sample in branch.samples}
        return self._outcomes(branch, *self._answered(batch, branch, prompts, lines))

    def _answered(
        self, batch: Batch, branch: Branch, prompts: Continuation, lines: Mapping[int, Line]
    ) -> tuple[Answers, list[Tensor]]:
        """The answers, and the logits for every place of the guesses."""
        going = prompts.branch(branch.rows)
        if self.decodes_because is None:
            return verified(self._model, going, _continuing(branch, lines))
        limits = [lines[sample].limit for sample in branch.samples]
        return generated(self._model, batch.inputs, limits), followed(going, _continuing(branch, lines))

    def _outcomes(self, branch: Branch, answers: Answers, logits: Sequence[Tensor]) -> list[Outcome]:
        dense = [self._dense[sample] for sample in branch.samples]
        kl, nll = divergences([d.logits_TV for d in dense], logits, [d.tokens for d in dense])
        return [Outcome(*values) for values in zip(answers, kl, nll, strict=True)]

    def _kept(self, logits_TV: Tensor) -> Tensor:
        own_TV = logits_TV.clone()  # of the batch's only this part
        self._free_bytes -= own_TV.nbytes
        return own_TV if self._free_bytes >= 0 else own_TV.cpu()


def divergences(
    dense: Sequence[Tensor], pruned: Sequence[Tensor], tokens: Sequence[list[int]]
) -> tuple[list[float], list[float]]:
    """Mean over an answer's places of KL(dense || pruned) in nats, and of -log p of its tokens under `pruned`.

    dense, pruned: the logits, (T, V) an answer. Where they are not finite, or rule out what dense would say, both are
    `MOST_NATS` and no more.
    """
    pruned_PV = torch.cat(list(pruned)).float().log_softmax(dim=1)
    dense_PV = torch.cat([logits_TV.to(pruned_PV.device) for logits_TV in dense]).float().log_softmax(dim=1)
    token_P1 = torch.tensor([token for answer in tokens for token in answer], device=pruned_PV.device).unsqueeze(1)
    gap_PV = torch.where(dense_PV > -torch.inf, dense_PV - pruned_PV, 0.0)  # what dense rules out does not count
    kl_P = (dense_PV.exp() * gap_PV).sum(dim=1)
    nll_P = -pruned_PV.gather(1, token_P1).squeeze(1)
    parts = torch.stack((kl_P, nll_P)).cpu().split([len(answer) for answer in tokens], dim=1)
    kl, nll = (
        torch.stack([part.mean(dim=1) for part in parts]).nan_to_num(nan=MOST_NATS).clamp(0.0, MOST_NATS).T.tolist()
    )
    return kl, nll


def _continuing(branch: Branch, lines: Mapping[int, Line]) -> list[Line]:
    return [replace(lines[sample], rest=rest) for sample, rest in zip(branch.samples, branch.rests, strict=True)]
