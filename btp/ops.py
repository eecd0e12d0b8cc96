"""Tensor functions the selectors are made of. torch only: nothing here knows a model.

Shapes: B batch, N image tokens, D features, K picked. Nothing reads a tensor's value on the host, so nothing
synchronises a GPU; loops run only where the algorithm is sequential.
"""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["farthest_first", "grid_farthest_first_rank", "indices_of", "morton_rank", "take_rows", "top_indices"]


def take_rows(source_BSX: Tensor, index_BK: Tensor) -> Tensor:
    """source[b, index[b, k]] for every b and k, as one row copy. A source with batch 1 serves every row."""
    batch, num_picked = index_BK.shape
    if source_BSX.shape[0] == 1:
        taken = source_BSX[0].index_select(0, index_BK.reshape(-1))
    else:
        length = source_BSX.shape[1]
        starts_B1 = torch.arange(0, batch * length, length, device=index_BK.device).unsqueeze(1)
        taken = source_BSX.flatten(0, 1).index_select(0, (index_BK + starts_B1).reshape(-1))
    return taken.view(batch, num_picked, *source_BSX.shape[2:])


def top_indices(score_BN: Tensor, num_pick: int) -> Tensor:
    """The num_pick best-scored indices, best first; of equal scores the lower index wins. (B, K)"""
    return score_BN.argsort(dim=1, descending=True, stable=True)[:, :num_pick]


def indices_of(mask_BN: Tensor, num_true: int) -> Tensor:
    """Indices of the True entries in rising order, given that every row has num_true of them. (B, K)"""
    return top_indices(mask_BN.to(torch.uint8), num_true)


def farthest_first(feature_BND: Tensor, num_pick: int, taken_BM: Tensor | None = None) -> Tensor:
    """Greedy max-min on the distance 1 - cosine: each pick is the token farthest from all picked so far. (B, K)

    taken_BM: indices already picked by others; picks keep away from them and never repeat them. Without it the first
    pick is the token whose nearest neighbour is farthest, as in DivPrune. The lower index wins a tie.
    """
    unit_BND = torch.nn.functional.normalize(feature_BND.float(), dim=-1)
    if taken_BM is not None:
        return _farthest_from(unit_BND, num_pick, taken_BM)
    similarity_BNN = unit_BND @ unit_BND.mT
    batch, num_tokens = similarity_BNN.shape[:2]
    similarity_BNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    nearest_BN = similarity_BNN.amax(dim=2)
    similarity_BNN.diagonal(dim1=1, dim2=2).fill_(torch.inf)  # a picked token is nearest to itself: never again
    rows = similarity_BNN.view(batch * num_tokens, num_tokens)
    start_B = torch.arange(0, batch * num_tokens, num_tokens, device=rows.device)
    picks = [nearest_BN.argmin(dim=1)]
    nearest_BN = rows.index_select(0, picks[0] + start_B)
    while len(picks) < num_pick:
        pick_B = nearest_BN.argmin(dim=1)
        picks.append(pick_B)
        torch.maximum(nearest_BN, rows.index_select(0, pick_B + start_B), out=nearest_BN)
    return torch.stack(picks[:num_pick], dim=1)


def _farthest_from(unit_BND: Tensor, num_pick: int, taken_BM: Tensor) -> Tensor:
    """Few picks after many: only the similarities to what is picked are worth computing."""
    nearest_BN = (unit_BND @ take_rows(unit_BND, taken_BM).mT).amax(dim=2)
    nearest_BN.scatter_(1, taken_BM, torch.inf)
    picks: list[Tensor] = []
    while len(picks) < num_pick:
        pick_B1 = nearest_BN.argmin(dim=1, keepdim=True)
        picks.append(pick_B1)
        similarity_BN1 = unit_BND @ take_rows(unit_BND, pick_B1).mT
        torch.maximum(nearest_BN, similarity_BN1.squeeze(2), out=nearest_BN)
        nearest_BN.scatter_(1, pick_B1, torch.inf)
    return torch.cat(picks, dim=1)


@lru_cache(maxsize=64)
def grid_farthest_first_rank(rows: int, columns: int, device: torch.device) -> Tensor:
    """The step at which Manhattan farthest-first from index 0 reaches each cell of a full grid. (rows * columns,)

    The first k steps are a max-min diverse set for every k at once, so a selector only filters by rank.
    """
    cell = torch.arange(rows * columns)
    row, column = cell // columns, cell % columns
    distance = row + column
    rank = torch.zeros_like(cell)
    for step in range(1, rows * columns):
        pick = (distance * len(cell) - cell).argmax()  # farthest; of equals the lower index
        rank[pick] = step
        distance = torch.minimum(distance, (row - row[pick]).abs() + (column - column[pick]).abs())
    return rank.to(device)


@lru_cache(maxsize=64)
def morton_rank(rows: int, columns: int, device: torch.device) -> Tensor:
    """Each cell's place along the Z-order curve: evenly spaced along it is evenly spread over the grid."""
    cell = torch.arange(rows * columns)
    row, column = cell // columns, cell % columns
    code = torch.zeros_like(cell)
    for bit in range(max(rows, columns).bit_length()):
        code |= ((column >> bit) & 1) << (2 * bit)
        code |= ((row >> bit) & 1) << (2 * bit + 1)
    return code.argsort().argsort().to(device)
