"""The contract every selector must keep, as a pytest class to inherit. Needs pytest.

class TestMySelector(SelectorContract):
    selectors = ("mine",)
"""

import pytest
import torch
from torch import Tensor

from btp.plan import Stage
from btp.selection import SELECTORS, ImageTokens

__all__ = ["SelectorContract", "image_tokens"]


def image_tokens(origin_BN: Tensor, grid: tuple[int, int], hidden_BND: Tensor, logits_BN: Tensor) -> ImageTokens:
    """A view over plain tensors, as a stage would hand it to a selector."""
    return ImageTokens(origin_BN, grid, lambda: hidden_BND, lambda: (logits_BN.softmax(dim=1), logits_BN))


class SelectorContract:
    """Distinct, sorted, exactly as many as asked, blind to the order of the batch, deterministic."""

    selectors: tuple[str, ...] = tuple(sorted(SELECTORS))
    device = "cpu"
    grid = (5, 6)
    num_alive = 22  # of the grid's 30: a later stage's view, with other survivors in each row

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "selector" in metafunc.fixturenames:
            metafunc.parametrize("selector", self.selectors)
        if "num_keep" in metafunc.fixturenames:
            metafunc.parametrize("num_keep", (1, 2, 9, 21, 22))
        if "attention_weight" in metafunc.fixturenames:
            metafunc.parametrize("attention_weight", (0.0, 0.3, 1.0))

    def test_indices_are_distinct_sorted_and_exactly_as_many(
        self, selector: str, num_keep: int, attention_weight: float
    ) -> None:
        selected = self._select(selector, self._tokens(), num_keep, attention_weight)
        assert selected.shape == (4, num_keep)
        assert selected.dtype == torch.int64
        assert (selected.diff(dim=1) > 0).all()
        assert selected.min() >= 0
        assert selected.max() < self.num_alive

    def test_rows_do_not_depend_on_the_order_of_the_batch(self, selector: str, attention_weight: float) -> None:
        order = torch.tensor([2, 0, 3, 1], device=self.device)
        straight = self._select(selector, self._tokens(), 9, attention_weight)
        shuffled = self._select(selector, self._tokens(order), 9, attention_weight)
        assert torch.equal(shuffled, straight[order])

    def test_a_row_alone_is_treated_as_in_the_batch(self, selector: str, attention_weight: float) -> None:
        batched = self._select(selector, self._tokens(), 9, attention_weight)
        for row in range(4):
            alone = self._tokens(torch.tensor([row], device=self.device))
            assert torch.equal(self._select(selector, alone, 9, attention_weight), batched[row : row + 1])

    def test_the_same_input_gives_the_same_choice(self, selector: str, attention_weight: float) -> None:
        first = self._select(selector, self._tokens(), 9, attention_weight)
        torch.manual_seed(1)
        assert torch.equal(self._select(selector, self._tokens(), 9, attention_weight), first)

    def test_the_view_is_left_as_it_was(self, selector: str, attention_weight: float) -> None:
        tokens, untouched = self._tokens(), self._tokens()
        self._select(selector, tokens, 9, attention_weight)
        for name in ("origin_BN", "hidden", "attention", "attention_logits", "coordinates"):
            assert torch.equal(getattr(tokens, name), getattr(untouched, name))

    def _tokens(self, rows: Tensor | None = None) -> ImageTokens:
        generator = torch.Generator().manual_seed(0)
        shuffled = torch.rand(4, self.grid[0] * self.grid[1], generator=generator).argsort(dim=1)
        origin = shuffled[:, : self.num_alive].sort(dim=1).values
        hidden = torch.randn(4, self.num_alive, 8, generator=generator)
        logits = torch.randn(4, self.num_alive, generator=generator)
        tensors = [tensor.to(self.device) for tensor in (origin, hidden, logits)]
        origin, hidden, logits = tensors if rows is None else [tensor[rows] for tensor in tensors]
        return image_tokens(origin, self.grid, hidden, logits)

    def _select(self, selector: str, tokens: ImageTokens, num_keep: int, attention_weight: float) -> Tensor:
        stage = Stage(layer=0, keep=num_keep / 30, selector=selector, attention_weight=attention_weight, oversample=1.5)
        return SELECTORS[selector](tokens, num_keep, stage)
