"""Selectors: which image tokens stay. A selector decides once; one other place slices by what it decided.

Shapes: B batch, N image tokens entering the stage, T text tokens, D hidden size, K kept. A selector gets a read-only
view of the tokens, how many to keep, and the stage's settings, and returns (B, K) distinct indices into N, sorted. It
is deterministic, treats the rows of a batch alike, and never reads a tensor's value on the host.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from btp import ops
from btp.ops import Grids
from btp.plan import Stage, round_half_up
from btp.tokens import ImageTokens

__all__ = ["PICTURE_ONLY", "READS", "SELECTORS", "Selector"]

FEATURE_SHARE = 1 / 8  # of the diverse picks, chosen by features; the rest by place (BTP: "a few more")
_PIVOTS = 4  # of the image and as many of the instruction (DART)
_SEED = 20250522


Selector = Callable[[ImageTokens, int, Stage], Tensor]


def attention(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Top-k by last-token attention (FastV, PyramidDrop), with position re-balancing when stage.oversample > 1.

    Re-balancing is the BTP paper's: of round(oversample * k) candidates, those in the first half of the entering
    sequence (index < N / 2) come first, then the others, each in attention order.
    """
    score_BN = _attention(tokens, stage)
    return _attended(score_BN, num_keep, stage.oversample, _half(score_BN)).sort(dim=1).values


def balanced(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """BTP's released code: round(attention_weight * k) tokens by attention, the rest by diversity.

    Diversity is max-min first on the grid by Manhattan distance, then, for a share of 1/8, on features away from all
    picked so far. Re-balancing is the code's: candidates of index < k come first, k being what the stage keeps; the
    paper's N / 2 is the same wherever the stage keeps half. Source: github.com/EmbodiedCity/NeurIPS2025-Balanced-
    Token-Pruning. We differ in that no token is kept twice and exactly k are: the code keeps a token picked by both
    criteria twice, and a union may overflow k; here the second criterion passes over what the first one picked.
    """
    num_attended = round_half_up(stage.attention_weight * num_keep)
    num_feature = int(FEATURE_SHARE * (num_keep - num_attended))
    num_spatial = num_keep - num_attended - num_feature
    picked: list[Tensor] = []
    if num_attended:
        picked.append(_attended(_attention(tokens, stage), num_attended, stage.oversample, num_keep))
    if num_spatial:
        picked.append(_spread_on_grid(tokens, num_spatial, picked))
    if num_feature:
        picked.append(ops.farthest_first(tokens.hidden, num_feature, torch.cat(picked, dim=1)))
    return torch.cat(picked, dim=1).sort(dim=1).values


def joint(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """BTP's objective, greedily: each pick maximises w * a + (1 - w) * d, w being stage.attention_weight.

    a is attention, min-max normalised over the entering tokens; d is half the smallest distance 1 - cosine to the
    picks so far, to the nearest other token for the first. Both are in [0, 1], so w = 1 is `attention` and w = 0 is
    `diversity`. With stage.oversample > 1 positions are re-balanced as in `attention`: the values of a stay the same
    set, but the highest goes to the token that is first in the re-balanced order, and so on. At w = 1 equal attention
    goes by the lower index, not by distance. The first
    round(stage.seeds * k) tokens are those that farthest-first on the grid reaches earliest (spatial initialisation).
    Source: arXiv 2505.22038, which sums attention and takes max-min diversity over all stages, gives the two no
    common scale and no algorithm for the sum; scale and greedy order are ours. The released code splits the count.
    """
    weight, num_seeds = stage.attention_weight, round_half_up(stage.seeds * num_keep)
    seeds = [_spread_on_grid(tokens, num_seeds, [])] if num_seeds else []
    if weight == 1.0:
        score_BN = _attention(tokens, stage)
        order_BN = _attended(score_BN, num_keep, stage.oversample, _half(score_BN), everyone=True)
        return _first_of(order_BN, num_keep, seeds).sort(dim=1).values
    bonus_BN = 2 * weight / (1 - weight) * _merit(tokens, num_keep, stage) if weight else None
    picks_BK = ops.farthest_first(tokens.hidden, num_keep - num_seeds, *seeds, bonus_BN=bonus_BN)
    return torch.cat((*seeds, picks_BK), dim=1).sort(dim=1).values


def diversity(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Greedy max-min on 1 - cosine of the hidden states (DivPrune, arXiv 2503.02175, github.com/vbdi/divprune)."""
    return ops.farthest_first(tokens.hidden, num_keep).sort(dim=1).values


def k_center(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Greedy k-center on 1 - cosine, from a pivot (ToDRE, arXiv 2505.18757v1, stage 1).

    The pivot is the token with the highest [CLS] attention. Where the encoder has no [CLS], it is the token nearest
    to the mean of all unit features, a choice of ours. The paper works on what the encoder puts out; here it is the
    hidden states that enter the stage's layer, at layer 0 the projected encoder output.
    """
    pivot_B1 = _pivot(tokens)
    picks_BK = ops.farthest_first(tokens.hidden, num_keep - 1, pivot_B1)
    return torch.cat((pivot_B1, picks_BK), dim=1).sort(dim=1).values


def max_sum(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Greedy max-sum on 1 - cosine, from the same pivot as `k_center` (ToDRE, arXiv 2505.18757v2, stage 1)."""
    pivot_B1 = _pivot(tokens)
    picks_BK = ops.largest_sum(tokens.hidden, num_keep - 1, pivot_B1)
    return torch.cat((pivot_B1, picks_BK), dim=1).sort(dim=1).values


def dpp(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Greedy MAP of a DPP on the kernel r_i * cos_ij * r_j (CDPruner, NeurIPS 2025, arXiv 2506.10967).

    r is the relevance to the instruction: the negative mean cosine to its tokens, min-max normalised with 1e-6 added
    above and below. Source: github.com/Theia-4869/CDPruner. We differ in that both sides are taken from the decoder's
    own space, as OpenVINO GenAI does: the paper's CLIP text tower and pre-projector features are not in a VLM's
    checkpoint. And we normalise each row by itself, the code the batch as a whole.
    """
    unit_BND = ops.unit(tokens.hidden)
    text = tokens.text
    word_BTD = ops.unit(text.hidden_BTD).masked_fill(~text.instruction_BT.unsqueeze(2), 0.0)
    mean_BD1 = (word_BTD.sum(dim=1) / text.instruction_BT.sum(dim=1, keepdim=True)).unsqueeze(2)
    against_BN = -(unit_BND @ mean_BD1).squeeze(2)
    low_B1, high_B1 = against_BN.amin(dim=1, keepdim=True), against_BN.amax(dim=1, keepdim=True)
    relevance_BN = (against_BN - low_B1 + 1e-6) / (high_B1 - low_B1 + 1e-6)
    scaled_BND = unit_BND * relevance_BN.unsqueeze(2)
    return ops.determinantal(scaled_BND @ scaled_BND.mT, num_keep).sort(dim=1).values


def dart(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Keep pivots and what duplicates them least (DART, arXiv 2502.11494).

    Pivots are the 4 image and the 4 instruction tokens with the longest keys (L1 norm); of fewer instruction tokens
    the last is repeated, of fewer kept tokens all are image pivots. Image pivots stay. Then each pivot, image ones
    first and longest first, takes an equal share of the remaining tokens: those least similar to it (cosine of hidden
    states) that are still free; a remainder goes one each to the first. Source: github.com/ZichenWen1/DART, which
    walks through the pivots as a Python set, so in arbitrary order, and lets the count follow from rounding.
    """
    pivot_BP = ops.top_indices(tokens.key_norm.float(), min(_PIVOTS, num_keep))
    text = tokens.text
    norm_BT = text.key_norm_BT.float().masked_fill(~text.instruction_BT, -torch.inf)
    last_B1 = text.instruction_BT.sum(dim=1, keepdim=True) - 1
    place_BP = torch.arange(_PIVOTS, device=norm_BT.device).minimum(last_B1)
    word_BP = ops.top_indices(norm_BT, norm_BT.shape[1]).gather(1, place_BP)
    pivots = ops.take_rows(tokens.hidden, pivot_BP), ops.take_rows(text.hidden_BTD, word_BP)
    picks_BK = ops.least_similar(tokens.hidden, torch.cat(pivots, dim=1), num_keep - pivot_BP.shape[1], pivot_BP)
    return torch.cat((pivot_BP, picks_BK), dim=1).sort(dim=1).values


def random(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """A fixed permutation of the original tokens, the same for every row: nested from stage to stage. A control."""
    return ops.top_indices(-tokens.of_original(_random_rank), num_keep).sort(dim=1).values


def uniform(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Evenly spaced along the Z-order curve through the survivors, so evenly spread over the grid. A control."""
    num_tokens = tokens.origin_BN.shape[1]
    order_BN = tokens.of_original(ops.morton_rank).argsort(dim=1)
    step_K = torch.arange(num_keep, device=order_BN.device)
    place_K = ((2 * step_K + 1) * num_tokens) // (2 * num_keep)  # the middle of each of num_keep equal stretches
    return order_BN.index_select(1, place_K).sort(dim=1).values


SELECTORS: dict[str, Selector] = {
    "attention": attention,
    "balanced": balanced,
    "dart": dart,
    "diversity": diversity,
    "dpp": dpp,
    "joint": joint,
    "k_center": k_center,
    "max_sum": max_sum,
    "random": random,
    "uniform": uniform,
}
_SCORED = frozenset({"attention", "oversample"})
_NOTHING: frozenset[str] = frozenset()
READS: Mapping[str, frozenset[str]] = {
    "attention": _SCORED,
    "balanced": _SCORED | {"attention_weight"},
    "dart": _NOTHING,
    "diversity": _NOTHING,
    "dpp": _NOTHING,
    "joint": _SCORED | {"attention_weight", "seeds"},
    "k_center": _NOTHING,
    "max_sum": _NOTHING,
    "random": _NOTHING,
    "uniform": _NOTHING,
}
"""The fields of a stage that each selector's choice depends on; take one that is not here to read them all."""
PICTURE_ONLY: frozenset[str] = frozenset({"diversity", "k_center", "max_sum", "random", "uniform"})
"""Selectors that look at image tokens alone: not at the text, nor at what the prompt's last token attends to."""


def _attention(tokens: ImageTokens, stage: Stage) -> Tensor:
    return tokens.attention.softmax if stage.attention == "softmax" else tokens.attention.logits


def _half(score_BN: Tensor) -> int:
    """Where the second half begins: the first index that is not under N / 2."""
    return (score_BN.shape[1] + 1) // 2


def _attended(score_BN: Tensor, num_pick: int, oversample: float, boundary: int, everyone: bool = False) -> Tensor:
    """The best-attended indices, re-balanced by position where oversample > 1: attention favours late tokens. (B, K)

    Of round(oversample * num_pick) candidates those of index < boundary come first, then all others, each in
    attention order. everyone: go on after num_pick, through all tokens.
    """
    num_tokens = score_BN.shape[1]
    order_BN = ops.top_indices(score_BN, num_tokens)
    if oversample > 1.0:
        lifted_BN = (order_BN < boundary).to(torch.uint8)
        lifted_BN[:, round_half_up(oversample * num_pick) :] = 0
        order_BN = order_BN.gather(1, ops.top_indices(lifted_BN, num_tokens))
    return order_BN if everyone else order_BN[:, :num_pick]


def _merit(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """`joint`'s attention term, in [0, 1]: the attention values, handed out in the re-balanced order. (B, N)"""
    score_BN = _attention(tokens, stage).float()
    order_BN = _attended(score_BN, num_keep, stage.oversample, _half(score_BN), everyone=True)
    value_BN = score_BN.sort(dim=1, descending=True).values
    low_B1, span_B1 = value_BN[:, -1:], value_BN[:, :1] - value_BN[:, -1:]
    merit_BN = (value_BN - low_B1) / span_B1.masked_fill(span_B1 == 0, 1.0)
    return torch.zeros_like(merit_BN).scatter(1, order_BN, merit_BN)


def _spread_on_grid(tokens: ImageTokens, num_pick: int, picked: list[Tensor]) -> Tensor:
    """The survivors that farthest-first on the full grid reaches earliest, without those already picked."""
    rank_BN = tokens.of_original(ops.grid_farthest_first_rank)
    last = sum(rows * columns for rows, columns in tokens.grids[0])
    for index_BK in picked:
        rank_BN = rank_BN.scatter(1, index_BK, last)
    return rank_BN.argsort(dim=1, stable=True)[:, :num_pick]


def _first_of(order_BN: Tensor, num_pick: int, picked: list[Tensor]) -> Tensor:
    """What is picked already, then the first of the others in `order`, num_pick in all."""
    rank_BN = order_BN.argsort(dim=1)
    for index_BK in picked:
        rank_BN = rank_BN.scatter(1, index_BK, -1)
    return rank_BN.argsort(dim=1, stable=True)[:, :num_pick]


def _pivot(tokens: ImageTokens) -> Tensor:
    """The token ToDRE starts from. (B, 1)"""
    score_BN = tokens.cls_attention
    if score_BN is None:
        unit_BND = ops.unit(tokens.hidden)
        score_BN = (unit_BND @ unit_BND.mean(dim=1).unsqueeze(2)).squeeze(2)
    return score_BN.argmax(dim=1, keepdim=True)


@lru_cache(maxsize=64)
def _random_rank(grids: Grids, device: torch.device) -> Tensor:
    num_tokens = sum(rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(num_tokens, generator=generator).to(device)
