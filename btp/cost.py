"""What a plan costs in FLOPs, by the formula of the BTP paper (arXiv 2505.22038). Plain Python."""

from collections.abc import Iterable, Sequence

from btp.errors import PlanError
from btp.plan import Plan

__all__ = ["image_token_flops", "mean_tokens", "tokens_per_layer"]


def tokens_per_layer(plan: Plan, num_layers: int, num_image_tokens: int) -> tuple[int, ...]:
    """How many image tokens each decoder layer sees under the plan."""
    counts = [num_image_tokens] * num_layers
    for stage, kept in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
        if stage.layer >= num_layers:
            raise PlanError(
                f"a stage's layer must be below the model's {num_layers} layers, got {stage.layer}; "
                "scale the plan to this model's depth"
            )
        counts[stage.layer :] = [kept] * (num_layers - stage.layer)
    return tuple(counts)


def mean_tokens(alive_counts: Sequence[int]) -> float:
    """Mean image tokens a layer, zeros included: what papers on pruning inside the decoder call "N tokens"."""
    return sum(alive_counts) / len(alive_counts)


def image_token_flops(alive_counts: Iterable[int], hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of the image tokens alone: the sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m.

    n image tokens in the layer, d hidden size, m intermediate size of the feed-forward block.
    """
    d, m = hidden_size, intermediate_size
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in alive_counts)
