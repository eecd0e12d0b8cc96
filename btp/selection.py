"""Selectors: which image tokens stay. A selector decides once; one other place slices by what it decided.

Shapes: B batch, N image tokens entering the stage, D hidden size, K kept. A selector gets a read-only view of the
tokens, how many to keep, and the stage's settings, and returns (B, K) distinct indices into N, sorted. It is
deterministic, treats the rows of a batch alike, and never reads a tensor's value on the host.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from btp import ops
from btp.plan import Stage, round_half_up

__all__ = ["SELECTORS", "ImageTokens", "Selector"]

FEATURE_SHARE = 1 / 8  # of the diverse picks, chosen by features; the rest by place (BTP: "a few more")
_SEED = 20250522


@dataclass(frozen=True, eq=False)
class ImageTokens:
    """What a selector may look at. Hidden states and attention are computed only if a selector reads them.

    origin_BN: each token's index among the prompt's original image tokens, rising along a row.
    grid: rows and columns of the original tokens; several images count as stacked on top of one another.
    read_hidden: gives (B, N, D); read_attention: gives the attention of the last prompt token as two (B, N) tensors,
    the head mean of its softmax over all keys and the head mean of its raw logits.
    """

    origin_BN: Tensor
    grid: tuple[int, int]
    read_hidden: Callable[[], Tensor]
    read_attention: Callable[[], tuple[Tensor, Tensor]]

    @cached_property
    def hidden(self) -> Tensor:
        """Hidden states entering the stage's layer. (B, N, D)"""
        return self.read_hidden()

    @cached_property
    def coordinates(self) -> Tensor:
        """Row and column of each token. (B, N, 2)"""
        columns = self.grid[1]
        return torch.stack((self.origin_BN // columns, self.origin_BN % columns), dim=-1)

    @cached_property
    def _attention_row(self) -> tuple[Tensor, Tensor]:
        return self.read_attention()

    @property
    def attention(self) -> Tensor:
        """Head mean of the softmax of the last prompt token's query against all keys. (B, N)"""
        return self._attention_row[0]

    @property
    def attention_logits(self) -> Tensor:
        """Head mean of the raw logits, which rank differently: what BTP's released LLaVA code averages. (B, N)"""
        return self._attention_row[1]


Selector = Callable[[ImageTokens, int, Stage], Tensor]


def attention(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Top-k by last-token attention (FastV, PyramidDrop), with position re-balancing when stage.oversample > 1."""
    return _attended(tokens.attention, num_keep, stage.oversample).sort(dim=1).values


def diversity(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Greedy max-min on 1 - cosine of the hidden states (DivPrune)."""
    return ops.farthest_first(tokens.hidden, num_keep).sort(dim=1).values


def balanced(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """BTP: round(attention_weight * k) tokens by attention, the rest by diversity, none twice and exactly k in all.

    Diversity is max-min first on the grid by Manhattan distance, then, for a share of 1/8, on features away from all
    picked so far. The released code keeps a token picked by both criteria twice; here the second criterion passes it.
    """
    num_attended = round_half_up(stage.attention_weight * num_keep)
    num_feature = int(FEATURE_SHARE * (num_keep - num_attended))
    num_spatial = num_keep - num_attended - num_feature
    picked: list[Tensor] = []
    if num_attended:
        picked.append(_attended(tokens.attention, num_attended, stage.oversample))
    if num_spatial:
        picked.append(_spread_on_grid(tokens, num_spatial, picked))
    if num_feature:
        picked.append(ops.farthest_first(tokens.hidden, num_feature, torch.cat(picked, dim=1)))
    return torch.cat(picked, dim=1).sort(dim=1).values


def random(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """A fixed permutation of the original tokens, the same for every row: nested from stage to stage. A control."""
    rank_N = _random_rank(tokens.grid[0] * tokens.grid[1], tokens.origin_BN.device)
    return ops.top_indices(-rank_N[tokens.origin_BN], num_keep).sort(dim=1).values


def uniform(tokens: ImageTokens, num_keep: int, stage: Stage) -> Tensor:
    """Evenly spaced along the Z-order curve through the survivors, so evenly spread over the grid. A control."""
    num_tokens = tokens.origin_BN.shape[1]
    order_BN = ops.morton_rank(*tokens.grid, tokens.origin_BN.device)[tokens.origin_BN].argsort(dim=1)
    step_K = torch.arange(num_keep, device=order_BN.device)
    place_K = ((2 * step_K + 1) * num_tokens) // (2 * num_keep)  # the middle of each of num_keep equal stretches
    return order_BN.index_select(1, place_K).sort(dim=1).values


SELECTORS: dict[str, Selector] = {
    "attention": attention,
    "balanced": balanced,
    "diversity": diversity,
    "random": random,
    "uniform": uniform,
}


def _attended(score_BN: Tensor, num_pick: int, oversample: float) -> Tensor:
    """The best-attended indices, re-balanced by position: attention favours late tokens (BTP, section on balancing).

    Of round(oversample * num_pick) candidates, those in the first half of the entering sequence (index < N / 2) come
    first, then the second half, each in attention order.
    """
    num_tokens = score_BN.shape[1]
    num_candidates = min(max(num_pick, round_half_up(oversample * num_pick)), num_tokens)
    candidate_BC = ops.top_indices(score_BN, num_candidates)
    if num_candidates == num_pick:
        return candidate_BC
    early_first_BC = ops.top_indices((2 * candidate_BC < num_tokens).to(torch.uint8), num_pick)
    return candidate_BC.gather(1, early_first_BC)


def _spread_on_grid(tokens: ImageTokens, num_pick: int, picked: list[Tensor]) -> Tensor:
    """The survivors that farthest-first on the full grid reaches earliest, without those already picked."""
    rank_N = ops.grid_farthest_first_rank(*tokens.grid, tokens.origin_BN.device)
    rank_BN = rank_N[tokens.origin_BN]
    for index_BK in picked:
        rank_BN = rank_BN.scatter(1, index_BK, len(rank_N))
    return rank_BN.argsort(dim=1, stable=True)[:, :num_pick]


@lru_cache(maxsize=64)
def _random_rank(num_tokens: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(_SEED)
    return torch.randperm(num_tokens, generator=generator).to(device)
