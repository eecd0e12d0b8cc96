"""Triton kernels. Needs Triton, so `btp.ops` imports this file only where it is going to launch one.

Shapes: B batch, N image tokens, D features, K picked; inside a kernel N is padded to a power of two, T and C are the
tokens and columns of one tile.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MAX_TOKENS", "few", "max_min"]

MAX_TOKENS = 8192  # a row of the running maximum, of the cosines and of the bonus lie in one program's registers
_TILE_TOKENS = 32
_TILE_COLUMNS = 256
_PICKS_PER_SQUARE = 512


def few(unit_BND: Tensor, num_pick: int) -> bool:
    """Whether so few picks should work out the rows they want, instead of reading them off the square of all cosines.

    A row's program is one multiprocessor, and the square is made by all of them at once. So it pays from few picks on,
    later the more rows are at work; where exactly is reckoned from a chip's arithmetic and not measured.
    """
    return _PICKS_PER_SQUARE * num_pick < unit_BND.shape[0] * unit_BND.shape[1]


def max_min(
    closeness_BN: Tensor,
    num_pick: int,
    *,
    cosine_BNN: Tensor | None = None,
    unit_BND: Tensor | None = None,
    bonus_BN: Tensor | None = None,
    restart: bool = False,
) -> Tensor:
    """Greedy max-min in one launch: one program per row takes all steps, and nothing waits for the host. (B, K) int64

    Each step picks the token of least closeness less bonus, the lower index of equals, then raises every closeness to
    the cosine with the pick, and the pick's own to infinity. closeness_BN: to start with, infinite where no pick may
    fall; it is left as it is. restart: it decides the first pick only (DivPrune), after which the picks alone count.
    The cosines are rows of cosine_BNN or, given unit_BND, worked out as they are wanted, in tiles over N and D. All
    may be float32 or bfloat16.

    The running maximum stays on the chip. Of cosine_BNN the picks are those of a loop over its rows, exactly: maximum
    and subtraction do not round beyond float32. Of unit_BND each cosine is summed in float32: over columns c,
    c + 256, c + 512, ... first, rising, then over the 256 sums as a tree. That is the same order for every token, so
    equal tokens tie, and another than a matrix product's, so tokens whose cosines differ by a rounding may swap.
    A row that is not a number gives indices below N and no more.
    Raises ValueError for more than MAX_TOKENS tokens, and unless it is given one of cosine_BNN and unit_BND.
    """
    batch, num_tokens = closeness_BN.shape
    if num_tokens > MAX_TOKENS:
        raise ValueError(f"the kernel takes at most {MAX_TOKENS} tokens a row, got {num_tokens}; loop in torch instead")
    if (cosine_BNN is None) == (unit_BND is None):
        given = "neither" if cosine_BNN is None else "both"
        raise ValueError(f"max_min reads either cosine_BNN or unit_BND, got {given}; pass one of them")
    picks_BK = torch.empty(batch, num_pick, dtype=torch.int64, device=closeness_BN.device)
    if not picks_BK.numel():
        return picks_BK
    source = (cosine_BNN if unit_BND is None else unit_BND).contiguous()  # type: ignore[union-attr]
    closeness_BN = closeness_BN.contiguous()
    row_BN = closeness_BN if unit_BND is None else torch.empty_like(closeness_BN, dtype=torch.float32)
    padded = max(32, triton.next_power_of_2(num_tokens))  # Triton 3.6 fails to compile for one lane
    with torch.cuda.device_of(source):
        _max_min[(batch,)](
            source,
            closeness_BN,
            closeness_BN if bonus_BN is None else bonus_BN.contiguous(),
            row_BN,
            picks_BK,
            num_tokens,
            num_pick,
            NUM_COLUMNS=source.shape[2] if unit_BND is not None else 0,
            BY_FEATURE=unit_BND is not None,
            BONUS=bonus_BN is not None,
            RESTART=restart,
            PADDED=padded,
            TOKENS=_TILE_TOKENS,
            COLUMNS=_TILE_COLUMNS,
            num_warps=16 if unit_BND is not None else min(16, max(4, padded // 512)),
        )
    return picks_BK


@triton.jit(do_not_specialize=["num_pick"])  # type: ignore[untyped-decorator]
def _max_min(
    source: tl.tensor,
    closeness: tl.tensor,
    bonus: tl.tensor,
    row: tl.tensor,
    picks: tl.tensor,
    num_tokens: tl.tensor,
    num_pick: tl.tensor,
    NUM_COLUMNS: tl.constexpr,
    BY_FEATURE: tl.constexpr,
    BONUS: tl.constexpr,
    RESTART: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    batch = tl.program_id(0).to(tl.int64)
    source += batch * num_tokens * (NUM_COLUMNS if BY_FEATURE else num_tokens)
    row += batch * num_tokens
    picks += batch * num_pick
    token_N = tl.arange(0, PADDED)
    inside_N = token_N < num_tokens
    infinite = float("inf")
    closeness_N = tl.load(closeness + batch * num_tokens + token_N, mask=inside_N, other=infinite).to(tl.float32)
    bonus_N = tl.zeros((PADDED,), tl.float32)
    if BONUS:
        bonus_N = tl.load(bonus + batch * num_tokens + token_N, mask=inside_N, other=0.0).to(tl.float32)
    pick = _least(closeness_N - bonus_N, num_tokens)
    tl.store(picks, pick)
    if RESTART:
        closeness_N = tl.where(inside_N, -infinite, infinite)
    step = 1
    while step < num_pick:
        if BY_FEATURE:
            _write_cosines(source, row, pick, num_tokens, NUM_COLUMNS, TOKENS, COLUMNS)
            row_N = tl.load(row + token_N, mask=inside_N, other=infinite)
        else:
            row_N = tl.load(source + pick * num_tokens + token_N, mask=inside_N, other=infinite).to(tl.float32)
        closeness_N = tl.where(token_N == pick, infinite, tl.maximum(closeness_N, row_N))
        pick = _least(closeness_N - bonus_N, num_tokens)
        tl.store(picks + step, pick)
        step += 1


@triton.jit  # type: ignore[untyped-decorator]
def _least(worth_N: tl.tensor, num_tokens: tl.tensor) -> tl.tensor:
    """Where the least value is, the lower index of equals; never past the end, whatever NaN does to comparisons."""
    _, index = tl.min(worth_N, axis=0, return_indices=True, return_indices_tie_break_left=True)
    return tl.minimum(index, num_tokens - 1)


@triton.jit  # type: ignore[untyped-decorator]
def _write_cosines(
    unit: tl.tensor,
    row: tl.tensor,
    pick: tl.tensor,
    num_tokens: tl.tensor,
    NUM_COLUMNS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """The cosines of all tokens with the pick, into `row`. The barriers keep two steps' rows apart."""
    tl.debug_barrier()
    first = 0
    while first < num_tokens:
        token_T = first + tl.arange(0, TOKENS)
        total_TC = tl.zeros((TOKENS, COLUMNS), tl.float32)
        for column in range(0, NUM_COLUMNS, COLUMNS):
            column_C = column + tl.arange(0, COLUMNS)
            inside_C = column_C < NUM_COLUMNS
            inside_TC = (token_T < num_tokens)[:, None] & inside_C[None, :]
            tile = unit + token_T[:, None] * NUM_COLUMNS + column_C[None, :]
            pick_C = tl.load(unit + pick * NUM_COLUMNS + column_C, mask=inside_C, other=0.0).to(tl.float32)
            total_TC += tl.load(tile, mask=inside_TC, other=0.0).to(tl.float32) * pick_C[None, :]
        tl.store(row + token_T, tl.sum(total_TC, axis=1), mask=token_T < num_tokens)
        first += TOKENS
    tl.debug_barrier()
