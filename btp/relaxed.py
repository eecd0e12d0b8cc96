"""A plan's stages as differentiable masks: how a loss changes with what each stage keeps, and by which rule.

A dropped image token is one that no later token attends to, so a stage is a mask on the image columns of attention. The
forward pass takes the hard mask of the selector `joint` and so computes what a pruned model does; the backward pass
takes the slope of a soft one, the straight-through estimator of arXiv 1308.3432. `joint` is the rule whose relaxation
is exact: its greedy picks are just the tokens whose value at their pick reaches that of the last pick, so that
keeping is a threshold on a score that is linear in lambda.

Shapes: B batch, S tokens of the prompt and what follows it, N image tokens, A of them alive, K kept, D hidden size,
Q queries, H query heads.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from btp import masks, ops
from btp.anatomy import Anatomy
from btp.errors import RealizationError, UnsupportedModelError
from btp.families import anatomy_of
from btp.plan import round_half_up
from btp.pruning import is_pruned

__all__ = ["RelaxedStage", "relaxed", "soft_top"]

_LEAK = 1e-12  # the attention weight factor of a masked token: nothing to the result, all that its gradient comes from
_NUM_HALVINGS = 60


@dataclass(frozen=True, eq=False)
class RelaxedStage:
    """Right before decoder layer `layer`: leave `share` of the prompt's image tokens, chosen by `joint` with lambda.

    share: of the original tokens, as `btp.plan.Stage.keep`; attention_weight: lambda, under 1. Both are scalars that a
    gradient flows to, in float64. attention: which head mean ranks the tokens.
    """

    layer: int
    share: Tensor
    attention_weight: Tensor
    attention: Literal["softmax", "logits"] = "softmax"


@contextmanager
def relaxed(
    model: nn.Module,
    stages: Sequence[RelaxedStage],
    image_mask_BS: Tensor,
    last_B1: Tensor,
    *,
    temperature: float,
    hard: bool = True,
) -> Iterator[None]:
    """Within it, one forward of these sequences without a cache has the stages' masks in its attention.

    image_mask_BS: where the image tokens are, equally many a row. last_B1: the place of each prompt's last token, whose
    attention counts; an answer may follow it. temperature: width of the slope in standard deviations of the scores.
    hard: False puts the soft masks into the forward pass too, so that the loss is smooth where picks do not change.

    Raises UnsupportedModelError for flash attention, which takes no such mask, and for float16, in which the gradient
    of a dropped token underflows; RealizationError inside `prune`, and for rows with no or unequally many image tokens.
    """
    anatomy = anatomy_of(model)
    if is_pruned(model):
        raise RealizationError("a relaxed model must be the dense one, got one inside prune(); leave the `with`")
    if anatomy.attention_kernel.startswith("flash"):
        raise UnsupportedModelError(
            f"a relaxed stage needs an attention kernel that takes an additive mask, got {anatomy.attention_kernel}; "
            "load the model with attn_implementation='sdpa' or 'eager'"
        )
    if next(model.parameters()).dtype == torch.float16:
        raise UnsupportedModelError(
            "a relaxed stage needs the exponents of float32, got a model in float16; load it in bfloat16 or float32"
        )
    counts: list[int] = image_mask_BS.sum(dim=1).tolist()
    if len(set(counts)) > 1 or not counts[0]:
        raise RealizationError(
            f"the rows of a batch must hold equally many image tokens, at least one, got {counts}; group the prompts"
        )
    run = _Run(anatomy, stages, ops.indices_of(image_mask_BS, counts[0]), last_B1, temperature, hard)
    with ExitStack() as cleanup:
        for index, layer in enumerate(anatomy.layers):
            handle = layer.register_forward_pre_hook(partial(run.before_layer, index), with_kwargs=True)
            cleanup.callback(handle.remove)
        yield


def soft_top(score_BN: Tensor, weight_BN: Tensor, count: Tensor, temperature_B1: Tensor) -> Tensor:
    """Soft membership of the best `count` tokens: sigmoid((score - threshold) / temperature). (B, N)

    A row's threshold is the one at which memberships, each times its weight, sum to the count, which must lie between
    0 and the sum of the weights; gradients flow through it by the implicit function theorem.
    """
    with torch.no_grad():
        reach_B1 = (40 + math.log(score_BN.shape[1])) * temperature_B1
        low_B1 = score_BN.amin(dim=1, keepdim=True) - reach_B1
        high_B1 = score_BN.amax(dim=1, keepdim=True) + reach_B1
        for _ in range(_NUM_HALVINGS):
            middle_B1 = (low_B1 + high_B1) / 2
            member_BN = ((score_BN - middle_B1) / temperature_B1).sigmoid()
            over_B1 = (member_BN * weight_BN).sum(dim=1, keepdim=True) > count
            low_B1, high_B1 = torch.where(over_B1, middle_B1, low_B1), torch.where(over_B1, high_B1, middle_B1)
        slope_BN = member_BN * (1 - member_BN) * weight_BN / temperature_B1
        slope_B1 = slope_BN.sum(dim=1, keepdim=True).clamp(min=torch.finfo(score_BN.dtype).tiny)
    there_BN = ((score_BN - middle_B1) / temperature_B1).sigmoid() * weight_BN
    threshold_B1 = middle_B1 + (there_BN.sum(dim=1, keepdim=True) - count) / slope_B1  # one step of Newton's method
    return ((score_BN - threshold_B1) / temperature_B1).sigmoid()


class _Run:
    """One forward: the mask on the image tokens as it stands, and what the layers get of it."""

    def __init__(
        self,
        anatomy: Anatomy,
        stages: Sequence[RelaxedStage],
        image_BN: Tensor,
        last_B1: Tensor,
        temperature: float,
        hard: bool,
    ) -> None:
        self._anatomy, self._stages = anatomy, {stage.layer: stage for stage in stages}
        self._image_BN, self._last_B1 = image_BN, last_B1
        self._temperature, self._hard = temperature, hard
        self._mask_BN = torch.ones(image_BN.shape, dtype=torch.float64, device=image_BN.device)
        self._alive_BA = torch.arange(image_BN.shape[1], device=image_BN.device).expand_as(image_BN)
        self._entered = False

    def before_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        if (stage := self._stages.get(index)) is not None:
            self._cut(stage, hidden_BSD, {**kwargs, "attention_mask": self._biased(kwargs, hidden_BSD)})
            self._entered = True
        return (args, {**kwargs, "attention_mask": self._biased(kwargs, hidden_BSD)}) if self._entered else None

    def _biased(self, inputs: Mapping[str, Any], hidden_BSD: Tensor) -> Tensor | None:
        """The layer's attention mask, additive, with the logarithm of the image tokens' masks in their columns."""
        mask: Tensor | None = inputs.get("attention_mask")
        if not self._entered:
            return mask
        length = hidden_BSD.shape[1]
        bias_BS = torch.zeros(hidden_BSD.shape[:2], dtype=torch.float64, device=hidden_BSD.device)
        bias_BS = bias_BS.scatter(1, self._image_BN, (self._mask_BN + _LEAK).log()).to(hidden_BSD.dtype)
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=hidden_BSD.device).tril()
        return _additive(mask, hidden_BSD.dtype) + bias_BS[:, None, None]

    def _cut(self, stage: RelaxedStage, hidden_BSD: Tensor, inputs: Mapping[str, Any]) -> None:
        num_alive, num_tokens = self._alive_BA.shape[1], self._image_BN.shape[1]
        asked = stage.share * num_tokens
        num_keep = min(max(round_half_up(float(asked.detach())), 1), num_alive)
        with torch.no_grad():
            merit_BN = self._merit(stage, hidden_BSD, inputs)
            weight = float(stage.attention_weight.detach())
            picks_BK, distance_BN = self._greedy(ops.take_rows(hidden_BSD, self._image_BN), merit_BN, weight, num_keep)
        score_BN = stage.attention_weight * merit_BN + (1 - stage.attention_weight) * distance_BN
        mask_BN = self._soft(score_BN, asked, num_alive)
        if self._hard:
            mask_BN = self._hard_mask(score_BN.detach(), picks_BK) + (mask_BN - mask_BN.detach())
            self._alive_BA = picks_BK.sort(dim=1).values
        self._mask_BN = self._mask_BN * mask_BN

    def _merit(self, stage: RelaxedStage, hidden_BSD: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Attention of the last prompt token, 0 and 1 at the least and most attended that are alive. (B, N)"""
        embeddings, length = inputs["position_embeddings"], hidden_BSD.shape[1]
        logits_BHQS = self._anatomy.attention_logits(stage.layer, hidden_BSD, embeddings, self._last_B1)
        if stage.attention == "softmax":
            bias = masks.query_bias(inputs["attention_mask"], self._last_B1, length)
            logits_BHQS = (logits_BHQS + bias).softmax(dim=3)
        score_BN = logits_BHQS[:, :, 0].mean(dim=1).gather(1, self._image_BN).double()
        alive_BA = score_BN.gather(1, self._alive_BA)
        low_B1, high_B1 = alive_BA.amin(dim=1, keepdim=True), alive_BA.amax(dim=1, keepdim=True)
        span_B1 = high_B1 - low_B1
        return (score_BN - low_B1) / span_B1.masked_fill(span_B1 == 0, 1.0)

    def _greedy(self, hidden_BND: Tensor, merit_BN: Tensor, weight: float, num_keep: int) -> tuple[Tensor, Tensor]:
        """The picks of `joint`, in order, and each token's half distance to them: a pick's to those before it.

        (B, K) and (B, N). The first pick's distance is that to the nearest other token, as the selector has it.
        """
        bonus_BA = 2 * weight / max(1 - weight, 1e-9) * merit_BN.gather(1, self._alive_BA).float()
        alive_BAD = ops.take_rows(hidden_BND, self._alive_BA)
        order_BK = ops.farthest_first(alive_BAD, num_keep, bonus_BN=bonus_BA)
        picks_BK = self._alive_BA.gather(1, order_BK)
        unit_BND = ops.unit(hidden_BND)
        pick_BKD = ops.take_rows(unit_BND, picks_BK)
        cosine_BN = (unit_BND @ pick_BKD.mT).amax(dim=2)
        later_KK = torch.ones(num_keep, num_keep, dtype=torch.bool, device=unit_BND.device).triu()
        earlier_BK = (pick_BKD @ pick_BKD.mT).masked_fill(later_KK, -torch.inf).amax(dim=2)
        to_first_BA = (ops.unit(alive_BAD) @ pick_BKD[:, 0].unsqueeze(2)).squeeze(2)
        earlier_BK[:, 0] = to_first_BA.scatter(1, order_BK[:, :1], -1.0).amax(dim=1)
        return picks_BK, (1 - cosine_BN.scatter(1, picks_BK, earlier_BK).double()) / 2

    def _soft(self, score_BN: Tensor, asked: Tensor, num_alive: int) -> Tensor:
        """Soft masks of a stage that is asked for so many tokens; what is dropped already has one too."""
        alive_BA = score_BN.detach().gather(1, self._alive_BA)
        spread_B1 = alive_BA.std(dim=1, keepdim=True, correction=0).clamp(min=1e-6)
        most = num_alive * (1 - 1e-3) if self._hard else float(self._mask_BN.detach().sum(dim=1).amin()) * (1 - 1e-3)
        count = asked + (asked.detach().clamp(max=most) - asked.detach())  # there are no more than that
        return soft_top(score_BN, self._mask_BN, count, self._temperature * spread_B1)

    def _hard_mask(self, score_BN: Tensor, picks_BK: Tensor) -> Tensor:
        """1 for the picks, 0 for the others; of tokens that are dropped already, as their score would have it."""
        would_BN = (score_BN >= score_BN.gather(1, picks_BK[:, -1:])).to(score_BN.dtype)
        return would_BN.scatter(1, self._alive_BA, 0.0).scatter(1, picks_BK, 1.0)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as something to add to attention logits: 0 or very negative."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
