"""What a plan makes a device do, counted: the columns of the latency model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from autotune.realised import without_idle_stages
from btp.cost import DecoderShape, prefill_multiplies, tokens_per_layer
from btp.plan import Plan

__all__ = ["WorkCounts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkCounts:
    """Counts relative to dense, for prompts of so many image and text tokens.

    tile: sequences count as rounded up to a multiple of it. linear, quadratic: shares of dense's multiply-accumulates
    in the decoder's layers that grow with the tokens and with their square; the LM head's are the rest.
    """

    num_layers: int
    num_image_tokens: int
    num_text_tokens: int
    linear: float
    quadratic: float
    tile: int = 1

    @classmethod
    def of(cls, decoder: DecoderShape, num_image_tokens: int, num_text_tokens: int) -> Self:
        num_tokens = num_image_tokens + num_text_tokens
        none, one, two = (prefill_multiplies(decoder, [n] * decoder.num_layers, 0) for n in range(3))
        square = (two - 2 * one + none) / 2
        dense = prefill_multiplies(decoder, [num_image_tokens] * decoder.num_layers, num_text_tokens)
        return cls(
            num_layers=decoder.num_layers,
            num_image_tokens=num_image_tokens,
            num_text_tokens=num_text_tokens,
            linear=(one - none - square) * num_tokens / dense,
            quadratic=square * num_tokens**2 / dense,
        )

    @property
    def analytic(self) -> dict[str, float]:
        """Coefficients of a device that takes equally long for every multiply-accumulate, and for nothing else."""
        constant = 1 - self.linear - self.quadratic
        return {"constant": constant, "linear": self.linear, "quadratic": self.quadratic}

    def __call__(self, plan: Plan) -> dict[str, float]:
        """Counts by name. Conditional stages count as skipped: they may be.

        constant: 1. linear, quadratic: over the layers, of dense's tokens and of their squares. stage: those that cut;
        `stage:x` those by the selector x, `picks:x` what these keep and `pairs:x` what enters times what is kept, of
        all image tokens and of their square.
        """
        total = self.num_image_tokens
        dense = self._tiled(total)
        shares = [self._tiled(n) / dense for n in tokens_per_layer(plan, self.num_layers, total, conditional=False)]
        counts = {
            "constant": 1.0,
            "linear": sum(shares) / self.num_layers,
            "quadratic": sum(share**2 for share in shares) / self.num_layers,
        }
        entering = total
        for stage, kept in without_idle_stages(plan, self.num_layers, total):
            if stage.attention_below is not None:
                continue
            work = {"stage": 1.0}
            if kept:
                pairs = entering * kept / total**2
                work |= {
                    f"{name}:{stage.selector}": c
                    for name, c in zip(("stage", "picks", "pairs"), (1.0, kept / total, pairs), strict=True)
                }
            for name, count in work.items():
                counts[name] = counts.get(name, 0.0) + count
            entering = kept
        return counts

    def _tiled(self, num_image_tokens: int) -> int:
        """The sequence's tokens in whole tiles."""
        return -(-(num_image_tokens + self.num_text_tokens) // self.tile) * self.tile
