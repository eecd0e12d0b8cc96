"""Masks in each kernel's form; sdpa and eager are also covered end to end by the oracle, flash attention here."""

import pytest
import torch

from btp import masks

KEPT = torch.tensor([[0, 2, 3], [1, 2, 4]])
PADDING = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


def test_no_mask_stays_no_mask():
    assert masks.take_square(None, KEPT) is None


def test_padding_masks_lose_columns():
    assert masks.take_square(PADDING, KEPT).tolist() == [[1, 1, 1], [1, 1, 1]]
    assert masks.take_square(PADDING, torch.tensor([[0, 1], [0, 1]])).tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_square_masks_lose_rows_and_columns(batch, dtype):
    mask = (torch.rand(batch, 1, 5, 5, generator=torch.Generator().manual_seed(0)) > 0.5).to(dtype)
    taken = masks.take_square(mask, KEPT)
    for row in range(2):
        for i, query in enumerate(KEPT[row]):
            for j, key in enumerate(KEPT[row]):
                assert taken[row, 0, i, j] == mask[row % batch, 0, query, key]


def test_rows_of_any_form_become_an_addition():
    query = torch.tensor([[4, 2], [4, 2]])
    visible = PADDING.bool()[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 5, 5).masked_fill(~visible, -1e9)
    for mask in (PADDING, visible, added):
        bias = masks.query_bias(mask, query, 5)
        assert bias.shape == (2, 1, 2, 5)
        assert torch.equal(bias > -1e8, visible[:, :, [4, 2]])
    causal = torch.tensor([[True] * 5, [True, True, True, False, False]])
    assert torch.equal(masks.query_bias(None, query, 5) == 0, causal.expand(2, 1, -1, -1))


def test_flash_attention_decodes_with_the_surviving_padding_columns():
    hidden = torch.zeros(2, 1, 8)
    mask = torch.cat((PADDING, torch.ones(2, 1, dtype=torch.long)), dim=1)
    columns = torch.tensor([[0, 2, 5], [0, 2, 5]])
    taken = masks.decode_mask(mask, columns, hidden, "flash_attention_2", None)
    assert taken.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert masks.decode_mask(None, columns, hidden, "flash_attention_2", None) is None


def test_one_new_token_without_padding_needs_no_mask_and_several_are_causal():
    columns = torch.tensor([[0, 2, 5, 6]])
    assert masks.decode_mask(None, columns, torch.zeros(1, 1, 8), "sdpa", None) is None
    several = masks.decode_mask(None, columns, torch.zeros(1, 2, 8), "sdpa", None)
    assert several[0, 0].tolist() == [[True, True, True, False], [True] * 4]
    added = masks.decode_mask(None, columns, torch.zeros(1, 2, 8), "eager", None)
    assert torch.equal(added == 0, several)


def test_a_window_counts_the_places_that_were_dropped_too():
    columns = torch.tensor([[0, 2, 5, 6]])
    one = masks.decode_mask(None, columns, torch.zeros(1, 1, 8), "sdpa", 4)
    assert one[0, 0].tolist() == [[False, False, True, True]]
    several = masks.decode_mask(None, columns, torch.zeros(1, 2, 8), "sdpa", 4)
    assert several[0, 0].tolist() == [[False, True, True, False], [False, False, True, True]]
