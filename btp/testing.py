"""The contract every selector must keep, as a pytest class to inherit. Needs pytest.

class TestMySelector(SelectorContract):
    selectors = ("mine",)
"""

from typing import cast

import pytest
import torch
from torch import Tensor

from btp.ops import Grids
from btp.plan import Stage
from btp.selection import SELECTORS
from btp.tokens import Attention, ImageTokens, TextTokens

__all__ = ["SelectorContract", "image_tokens"]


def image_tokens(
    origin_BN: Tensor,
    grids: Grids | tuple[Grids, ...],
    hidden_BND: Tensor,
    logits_BN: Tensor,
    *,
    key_norm_BN: Tensor | None = None,
    text: TextTokens | None = None,
    cls_attention_BN: Tensor | None = None,
) -> ImageTokens:
    """A view over plain tensors, as a stage would hand it to a selector.

    grids: of every row, or one for all rows. Left out, the keys are as long as the hidden states, the text is one
    token of zeros, and the encoder has no [CLS].
    """
    batch, _, size = hidden_BND.shape
    zeros_B1 = torch.zeros(batch, 1, dtype=hidden_BND.dtype, device=hidden_BND.device)
    plain = TextTokens(zeros_B1.unsqueeze(2).expand(-1, -1, size), zeros_B1, torch.ones_like(zeros_B1).bool())
    same = isinstance(grids[0][0], int)
    return ImageTokens(
        origin_BN=origin_BN,
        grids=cast(tuple[Grids, ...], (grids,) * batch if same else grids),
        read_hidden=lambda: hidden_BND,
        read_attention=lambda: Attention(logits_BN.softmax(dim=1), logits_BN),
        read_key_norm=lambda: hidden_BND.abs().sum(dim=2) if key_norm_BN is None else key_norm_BN,
        read_text=lambda: plain if text is None else text,
        read_cls_attention=lambda: cls_attention_BN,
    )


class SelectorContract:
    """Distinct, sorted, exactly as many as asked, blind to the order of the batch, deterministic."""

    selectors: tuple[str, ...] = tuple(sorted(SELECTORS))
    device = "cpu"
    grids = (((5, 6),), ((3, 10),), ((5, 6),), ((2, 3), (6, 4)))  # 30 tokens a row, in other shapes
    num_alive = 22  # of the 30: a later stage's view, with other survivors in each row

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
        for before, after in zip(_everything(untouched), _everything(tokens), strict=True):
            assert torch.equal(before, after)

    def _tokens(self, rows: Tensor | None = None) -> ImageTokens:
        """Four rows, or those asked for: hidden states of size 8, 7 text tokens of which 2 to 5 are instruction."""
        generator = torch.Generator().manual_seed(0)
        shuffled = torch.rand(4, 30, generator=generator).argsort(dim=1)
        order = torch.arange(4) if rows is None else rows.cpu()
        tensors = {
            "origin": shuffled[:, : self.num_alive].sort(dim=1).values,
            "hidden": torch.randn(4, self.num_alive, 8, generator=generator),
            "logits": torch.randn(4, self.num_alive, generator=generator),
            "key_norm": torch.rand(4, self.num_alive, generator=generator),
            "cls": torch.rand(4, self.num_alive, generator=generator),
            "text": torch.randn(4, 7, 8, generator=generator),
            "text_norm": torch.rand(4, 7, generator=generator),
            "instruction": torch.arange(7) >= torch.tensor([[2], [3], [4], [5]]),
        }
        there = {name: tensor[order].to(self.device) for name, tensor in tensors.items()}
        return image_tokens(
            there["origin"],
            tuple(self.grids[row] for row in order.tolist()),
            there["hidden"],
            there["logits"],
            key_norm_BN=there["key_norm"],
            text=TextTokens(there["text"], there["text_norm"], there["instruction"]),
            cls_attention_BN=there["cls"],
        )

    def _select(self, selector: str, tokens: ImageTokens, num_keep: int, attention_weight: float) -> Tensor:
        stage = Stage(
            layer=0,
            keep=num_keep / 30,
            selector=selector,
            attention_weight=attention_weight,
            oversample=1.5,
            seeds=0.25,
        )
        return SELECTORS[selector](tokens, num_keep, stage)


def _everything(tokens: ImageTokens) -> list[Tensor]:
    assert tokens.cls_attention is not None
    text, attention = tokens.text, tokens.attention
    own = [tokens.origin_BN, tokens.coordinates, tokens.hidden, tokens.key_norm, tokens.cls_attention]
    return [*own, attention.softmax, attention.logits, text.hidden_BTD, text.key_norm_BT, text.instruction_BT]
