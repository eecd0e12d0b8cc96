"""Tensor functions the selectors are made of: torch, and Triton where there is a kernel. Nothing here knows a model.

Shapes: B batch, N image tokens, D features, M taken before, P pivots, K picked. Nothing reads a tensor's value on the
host, so nothing synchronises a GPU; loops run only where the algorithm is sequential.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

__all__ = [
    "Grids",
    "determinantal",
    "farthest_first",
    "grid_cells",
    "grid_farthest_first_rank",
    "indices_of",
    "largest_sum",
    "least_similar",
    "morton_rank",
    "take_rows",
    "top_indices",
    "unit",
]

Grids = tuple[tuple[int, int], ...]  # rows and columns of each picture or tile of one prompt, in order


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


def farthest_first(
    feature_BND: Tensor, num_pick: int, taken_BM: Tensor | None = None, *, bonus_BN: Tensor | None = None
) -> Tensor:
    """Greedy max-min on the distance 1 - cosine: each pick is the token farthest from all picked so far. (B, K)

    taken_BM: indices already picked by others; picks keep away from them and never repeat them. Without it the first
    pick is the token whose nearest neighbour is farthest, as in DivPrune. bonus_BN: added to each token's distance, so
    that a token may make up in merit for what it lacks in distance. The lower index wins a tie.

    On a CUDA device all steps are one launch of `btp.kernels.max_min` where Triton can build it, and a loop in torch
    otherwise. Both pick the same from the same cosines; the cosines, all of them products in float32, may differ in
    the last bits between devices and between roads, and with them the order of tokens that are that close to a tie.
    """
    unit_BND = unit(feature_BND)
    cosine_BNN: Tensor | None = None
    if taken_BM is None:
        cosine_BNN = unit_BND @ unit_BND.mT
        cosine_BNN.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        closeness_BN = cosine_BNN.amax(dim=2)
    else:
        closeness_BN = _cosines_to(unit_BND, taken_BM).amax(dim=2).scatter_(1, taken_BM, torch.inf)
    restart = taken_BM is None
    kernels = _kernels_for(unit_BND)
    if kernels is None:
        row_of = _cosine_rows(unit_BND, num_pick, cosine_BNN)
        return _greedy(row_of, closeness_BN, num_pick, torch.maximum, bonus_BN, restart)
    if cosine_BNN is None and not kernels.few(unit_BND, num_pick):
        cosine_BNN = unit_BND @ unit_BND.mT
    source = {"unit_BND": unit_BND} if cosine_BNN is None else {"cosine_BNN": cosine_BNN}
    picks_BK: Tensor = kernels.max_min(closeness_BN, num_pick, **source, bonus_BN=bonus_BN, restart=restart)
    return picks_BK


def largest_sum(feature_BND: Tensor, num_pick: int, taken_BM: Tensor) -> Tensor:
    """Greedy max-sum: each pick has the largest sum of distances 1 - cosine to all picked so far. (B, K)

    taken_BM: indices already picked by others, at least one; they count and are never repeated. The lower index wins
    a tie.
    """
    unit_BND = unit(feature_BND)
    total_BN = _cosines_to(unit_BND, taken_BM).sum(dim=2).scatter_(1, taken_BM, torch.inf)
    return _greedy(_cosine_rows(unit_BND, num_pick), total_BN, num_pick, torch.add)


def determinantal(kernel_BNN: Tensor, num_pick: int) -> Tensor:
    """Greedy MAP of a determinantal point process: each pick adds most to the picks' log determinant. (B, K)

    By incremental Cholesky: the residual of a token is its diagonal entry less what the picks explain of it. A residual
    under 1e-6 of the row's largest diagonal entry counts as zero; of equals, zeros among them, the lower index wins.
    Source: Chen et al., Fast Greedy MAP Inference for Determinantal Point Process, NeurIPS 2018, arXiv 1709.05135.
    """
    residual_BN = kernel_BNN.diagonal(dim1=1, dim2=2).clone()
    smallest_B1 = (1e-6 * residual_BN.amax(dim=1, keepdim=True)).clamp(min=torch.finfo(residual_BN.dtype).tiny)
    spent_BN = torch.zeros_like(residual_BN)  # what a zero residual is worth: less once it is picked
    row_of = _rows_of(kernel_BNN)
    factor_BKN = torch.zeros_like(kernel_BNN[:, :num_pick])
    picks: list[Tensor] = []
    for step in range(num_pick):
        worth_BN = torch.where(residual_BN < smallest_B1, spent_BN, residual_BN)
        pick_B1 = worth_BN.argmax(dim=1, keepdim=True)
        picks.append(pick_B1)
        pivot_B1 = worth_BN.gather(1, pick_B1)
        scale_B1 = torch.where(pivot_B1 < smallest_B1, 0.0, torch.maximum(pivot_B1, smallest_B1).rsqrt())
        earlier_BMN = factor_BKN[:, :step]
        at_pick_B1M = earlier_BMN.gather(2, pick_B1.unsqueeze(1).expand(-1, step, 1)).mT
        factor_BN = (row_of(pick_B1) - (at_pick_B1M @ earlier_BMN).squeeze(1)) * scale_B1
        factor_BKN[:, step] = factor_BN
        residual_BN.sub_(factor_BN.square()).scatter_(1, pick_B1, -torch.inf)
        spent_BN.scatter_(1, pick_B1, -1.0)
    return torch.cat(picks, dim=1)


def least_similar(feature_BND: Tensor, pivot_BPD: Tensor, num_pick: int, taken_BM: Tensor) -> Tensor:
    """Each pivot in turn takes its share of num_pick tokens: those of least cosine to it that are still free. (B, K)

    The shares are equal, the remainder goes one each to the first pivots; taken_BM is not free from the start. The
    lower index wins a tie.
    """
    cosine_BNP = unit(feature_BND) @ unit(pivot_BPD).mT
    num_pivots = cosine_BNP.shape[2]
    picks = [taken_BM]
    for pivot in range(num_pivots):
        share = num_pick // num_pivots + (pivot < num_pick % num_pivots)
        if share:
            cosine_BN = cosine_BNP[:, :, pivot].scatter(1, torch.cat(picks, dim=1), torch.inf)
            picks.append(top_indices(-cosine_BN, share))
    return torch.cat(picks, dim=1)[:, taken_BM.shape[1] :]


def unit(feature_BND: Tensor) -> Tensor:
    """The features at length one, in float32."""
    return torch.nn.functional.normalize(feature_BND.float(), dim=-1)


def _greedy(
    row_of: Callable[[Tensor], Tensor],
    closeness_BN: Tensor,
    num_pick: int,
    combine: Callable[..., Tensor],
    bonus_BN: Tensor | None = None,
    restart: bool = False,
) -> Tensor:
    """Pick the least close token over and over; `combine` takes the row of each pick into the closeness. (B, K)

    restart: the closeness decides the first pick only; after it, that pick's row takes its place.
    """
    picks = [torch.empty(len(closeness_BN), 0, dtype=torch.int64, device=closeness_BN.device)]
    for step in range(num_pick):
        if step == 1 and restart:
            closeness_BN = row_of(picks[-1])
        elif step:
            combine(closeness_BN, row_of(picks[-1]), out=closeness_BN)
        picks.append(_least(closeness_BN, bonus_BN))
    return torch.cat(picks, dim=1)


def _least(closeness_BN: Tensor, bonus_BN: Tensor | None) -> Tensor:
    return (closeness_BN if bonus_BN is None else closeness_BN - bonus_BN).argmin(dim=1, keepdim=True)


def _kernels_for(unit_BND: Tensor) -> ModuleType | None:
    """`btp.kernels`, where it can take these tokens."""
    kernels = _kernels() if unit_BND.is_cuda else None
    return None if kernels is None or unit_BND.shape[1] > kernels.MAX_TOKENS else kernels


@lru_cache(maxsize=1)
def _kernels() -> ModuleType | None:
    """`btp.kernels`, where Triton can build it: at first use it compiles a launcher against Python's C headers."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if find_spec("triton") is None or not compiler or not headers.exists():
        return None
    from btp import kernels

    return kernels


def _cosines_to(unit_BND: Tensor, index_BM: Tensor) -> Tensor:
    return unit_BND @ take_rows(unit_BND, index_BM).mT


def _cosine_rows(unit_BND: Tensor, num_rows: int, cosine_BNN: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """From a token's index (B, 1) to its cosines to all, infinite to itself, so that no pick is picked again. (B, N)

    The square of all cosines pays where it is there already or a good part of its rows is wanted.
    """
    if cosine_BNN is None and 4 * num_rows < unit_BND.shape[1]:
        return lambda index_B1: _cosines_to(unit_BND, index_B1).squeeze(2).scatter_(1, index_B1, torch.inf)
    cosine_BNN = unit_BND @ unit_BND.mT if cosine_BNN is None else cosine_BNN
    cosine_BNN.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    return _rows_of(cosine_BNN)


def _rows_of(square_BNN: Tensor) -> Callable[[Tensor], Tensor]:
    """From an index (B, 1) to that row of each square. (B, N)"""
    batch, num_rows = square_BNN.shape[:2]
    rows = square_BNN.flatten(0, 1)
    start_B1 = torch.arange(0, batch * num_rows, num_rows, device=rows.device).unsqueeze(1)
    return lambda index_B1: rows.index_select(0, (index_B1 + start_B1).flatten())


@lru_cache(maxsize=64)
def grid_cells(grids: Grids, device: torch.device) -> Tensor:
    """Row and column of every token of stacked row-major grids, the first grid on top. (N, 2)"""
    cells, top = [], 0
    for rows, columns in grids:
        row, column = torch.arange(top, top + rows), torch.arange(columns)
        cells.append(torch.cartesian_prod(row, column).view(-1, 2))
        top += rows
    return torch.cat(cells).to(device)


@lru_cache(maxsize=64)
def grid_farthest_first_rank(grids: Grids, device: torch.device) -> Tensor:
    """The step at which Manhattan farthest-first from index 0 reaches each cell of the full grids. (N,)

    The first k steps are a max-min diverse set for every k at once, so a selector only filters by rank.
    """
    row, column = grid_cells(grids, torch.device("cpu")).unbind(dim=1)
    cell = torch.arange(len(row))
    distance = (row - row[0]).abs() + (column - column[0]).abs()
    rank = torch.zeros_like(cell)
    for step in range(1, len(cell)):
        pick = (distance * len(cell) - cell).argmax()  # farthest; of equals the lower index
        rank[pick] = step
        distance = torch.minimum(distance, (row - row[pick]).abs() + (column - column[pick]).abs())
    return rank.to(device)


@lru_cache(maxsize=64)
def morton_rank(grids: Grids, device: torch.device) -> Tensor:
    """Each cell's place along the Z-order curve: evenly spaced along it is evenly spread over the grids. (N,)"""
    row, column = grid_cells(grids, torch.device("cpu")).unbind(dim=1)
    code = torch.zeros_like(row)
    for bit in range(int(max(row.max(), column.max())).bit_length()):
        code |= ((column >> bit) & 1) << (2 * bit)
        code |= ((row >> bit) & 1) << (2 * bit + 1)
    return code.argsort().argsort().to(device)
