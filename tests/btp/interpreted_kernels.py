"""The kernels under Triton's interpreter, on the CPU. Run by test_kernels.py in a process of its own:

    TRITON_INTERPRET=1 pytest tests/btp/interpreted_kernels.py

Shapes: B batch, N image tokens, D features, M taken before, K picked.
"""

import math

import pytest
import torch

from btp import kernels, ops

EXACT = ((1, 0, 0, 0), (0, 1, 0, 0), (-1, 0, 0, 0), (0.5, 0.5, 0.5, 0.5), (0.5, -0.5, 0.5, -0.5))
SHAPES = [  # B, N, D, K: one of everything; one column, so that all cosines tie; tiles full and not; everything picked
    (1, 1, 1, 1),
    (3, 7, 1, 7),
    (2, 33, 5, 12),
    (3, 32, 256, 6),
    (1, 64, 257, 5),
    (2, 65, 300, 65),
    (1, 100, 33, 20),
]


def naive(features, num_pick, taken=(), bonus=None):
    """One row, in float64: greedy max-min on 1 - cosine."""
    norms = [math.hypot(*feature) for feature in features]
    everyone = range(len(features))
    picked, picks = list(taken), []

    def cosine(i, j):
        return sum(a * b for a, b in zip(features[i], features[j], strict=True)) / (norms[i] * norms[j])

    nearest = {i: max((cosine(i, j) for j in picked), default=-math.inf) for i in everyone}
    if not picked:
        nearest = {i: max((cosine(i, j) for j in everyone if j != i), default=-math.inf) for i in everyone}
    while len(picks) < num_pick:
        worth = {i: (bonus[i] if bonus else 0.0) - nearest[i] for i in everyone if i not in picked}
        picks.append(max(worth, key=lambda i: (worth[i], -i)))
        restart = not picked
        picked.append(picks[-1])
        nearest = {i: max(-math.inf if restart else nearest[i], cosine(i, picks[-1])) for i in everyone}
    return picks


@pytest.fixture(params=["square", "features"])
def road(request, monkeypatch):
    """`ops.farthest_first` runs the kernel on the CPU, by one road or the other."""
    monkeypatch.setattr(ops, "_kernels_for", lambda unit_BND: kernels)
    monkeypatch.setattr(kernels, "few", lambda unit_BND, num_pick: request.param == "features")
    return request.param


def draw(batch, num_tokens, size, seed=0):
    return torch.randn(batch, num_tokens, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def both(monkeypatch, feature_BND, num_pick, *taken, **settings):
    """The kernel's picks and the torch loop's."""
    ours = ops.farthest_first(feature_BND, num_pick, *taken, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "_kernels_for", lambda unit_BND: None)
        return ours, ops.farthest_first(feature_BND, num_pick, *taken, **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("batch", "num_tokens", "size", "num_pick"), SHAPES)
@pytest.mark.parametrize("with_bonus", [False, True])
def test_picks_are_the_torch_loops_and_the_naive_ones(
    road, monkeypatch, batch, num_tokens, size, num_pick, dtype, with_bonus
):
    feature_BND = draw(batch, num_tokens, size).to(dtype)
    bonus_BN = draw(batch, num_tokens, 1, seed=1)[:, :, 0].float() if with_bonus else None
    ours, torchs = both(monkeypatch, feature_BND, num_pick, bonus_BN=bonus_BN)
    assert ours.dtype == torch.int64
    assert torch.equal(ours, torchs)
    for row in range(batch):
        bonus = bonus_BN[row].tolist() if with_bonus else None
        assert ours[row].tolist() == naive(feature_BND[row].double().tolist(), num_pick, bonus=bonus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_pick", [0, 1, 9, 28])
@pytest.mark.parametrize("with_bonus", [False, True])
def test_picks_keep_away_from_what_is_taken(road, monkeypatch, dtype, num_pick, with_bonus):
    feature_BND = draw(3, 31, 11).to(dtype)
    taken_BM = torch.tensor([[0, 5, 7], [30, 1, 21], [9, 8, 29]])
    bonus_BN = draw(3, 31, 1, seed=2)[:, :, 0].float() if with_bonus else None
    ours, torchs = both(monkeypatch, feature_BND, num_pick, taken_BM, bonus_BN=bonus_BN)
    assert torch.equal(ours, torchs)
    for row in range(3):
        bonus = bonus_BN[row].tolist() if with_bonus else None
        features = feature_BND[row].double().tolist()
        assert ours[row].tolist() == naive(features, num_pick, taken_BM[row].tolist(), bonus)


@pytest.mark.parametrize("features", [EXACT, EXACT[:2], EXACT[3:4]], ids=["several", "two", "constant"])
@pytest.mark.parametrize("with_bonus", [False, True])
@pytest.mark.parametrize("taken", [None, [[3, 40], [0, 1]]])
def test_ties_go_to_the_lower_index(road, monkeypatch, features, with_bonus, taken):
    generator = torch.Generator().manual_seed(0)
    feature_BND = torch.tensor(features)[torch.randint(len(features), (2, 41), generator=generator)]
    bonus_BN = torch.randint(3, (2, 41), generator=generator) / 2 if with_bonus else None
    taken_BM = None if taken is None else torch.tensor(taken)
    num_pick = 41 if taken is None else 39
    ours, torchs = both(monkeypatch, feature_BND, num_pick, taken_BM, bonus_BN=bonus_BN)
    assert torch.equal(ours, torchs)
    for row in range(2):
        bonus = bonus_BN[row].tolist() if with_bonus else None
        assert ours[row].tolist() == naive(feature_BND[row].tolist(), num_pick, taken[row] if taken else (), bonus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("num_tokens", [31, 600])
def test_equal_cosines_give_equal_picks(num_tokens, restart, dtype):
    """On a few levels, so that nearly every step is a tie; the square need not be symmetric."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(-2, 3, (2, num_tokens, num_tokens), generator=generator).to(dtype) / 2
    closeness_BN = levels[:, 0].clone()
    ours = kernels.max_min(closeness_BN, 31, cosine_BNN=levels, restart=restart)
    square = levels.to(torch.float32, copy=True)
    start_BN = square[:, 0].clone()
    square.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    torchs = ops._greedy(ops._rows_of(square), start_BN, 31, torch.maximum, None, restart)
    assert torch.equal(ours, torchs)
    assert torch.equal(closeness_BN, levels[:, 0])


def test_half_precision_features_are_worked_out_in_single_precision():
    unit_BND = ops.unit(draw(2, 64, 257)).bfloat16()
    start = torch.zeros(2, 64)
    wanted = kernels.max_min(start, 40, unit_BND=unit_BND.float(), restart=True)
    assert torch.equal(kernels.max_min(start, 40, unit_BND=unit_BND, restart=True), wanted)
    rounded = kernels.max_min(start, 40, cosine_BNN=unit_BND @ unit_BND.mT, restart=True)
    assert not torch.equal(rounded, wanted)


def test_strided_tensors_are_read_as_they_stand():
    unit_BND = ops.unit(draw(2, 40, 9))
    square = unit_BND @ unit_BND.mT
    square[:, :, 0] *= 2  # not symmetric: a transposed read would show
    start = square[:, 3].clone()
    apart = square.mT.contiguous().mT, start.repeat_interleave(2, dim=1)[:, ::2]
    wanted = kernels.max_min(start, 9, cosine_BNN=square, bonus_BN=square[:, 5].clone())
    assert torch.equal(kernels.max_min(apart[1], 9, cosine_BNN=apart[0], bonus_BN=square[:, 5]), wanted)


@pytest.mark.parametrize("road", ["cosine_BNN", "unit_BND"])
def test_what_is_not_a_number_stays_inside(road):
    source = torch.full((1, 5, 5), torch.nan)
    picks = kernels.max_min(source[:, 0], 3, **{road: source})
    assert ((picks >= 0) & (picks < 5)).all()


def test_what_the_kernel_cannot_take_is_refused():
    closeness_BN = torch.zeros(1, 4)
    square = torch.zeros(1, 4, 4)
    for sources, what in (({}, "neither"), ({"cosine_BNN": square, "unit_BND": square}, "both")):
        with pytest.raises(ValueError, match=what):
            kernels.max_min(closeness_BN, 2, **sources)
    long_BN = torch.zeros(1, kernels.MAX_TOKENS + 1)
    with pytest.raises(ValueError, match=r"at most 8192 tokens a row, got 8193; loop in torch"):
        kernels.max_min(long_BN, 2, unit_BND=long_BN.unsqueeze(2))
