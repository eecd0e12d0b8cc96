"""Where to prune a model: BTP's calibration (arXiv 2505.22038) and VTW's layer search (arXiv 2405.05803).

Shapes: B batch, S tokens, N image tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from btp.errors import PlanError, RealizationError
from btp.families import anatomy_of
from btp.plan import Plan, Stage
from btp.pruning import is_pruned, prune

__all__ = ["cosine_shift", "stage_layers", "withdrawal_layer"]


@torch.no_grad()
def cosine_shift(model: nn.Module, batches: Iterable[Mapping[str, Any]], tau: float = 0.93) -> list[int]:
    """Per decoder layer, how many image tokens the layer turns: cosine similarity before/after it under tau.

    batches: model inputs with input_ids and images; the paper uses 64 random samples. Counts are summed over all of
    them. Runs the dense model, so call it outside `prune`.
    """
    anatomy = anatomy_of(model)
    if is_pruned(model):
        raise RealizationError("calibration must see the dense model, got one inside prune(); leave the `with`")
    shifted = torch.zeros(len(anatomy.layers), dtype=torch.long, device=next(model.parameters()).device)
    num_seen = 0
    for batch in batches:
        image_mask_BS = anatomy.image_mask(batch)
        num_seen += int(image_mask_BS.sum())
        with ExitStack() as cleanup:
            for index, layer in enumerate(anatomy.layers):
                count = partial(_count_shifted, shifted[index], image_mask_BS, tau)
                cleanup.callback(layer.register_forward_hook(count, with_kwargs=True).remove)
            model(**batch, use_cache=False, logits_to_keep=1)
    _check_seen(num_seen)
    return [int(count) for count in shifted.tolist()]


def stage_layers(shifts: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Layers to prune before, right after the peaks of `shifts`, rising.

    A peak is a layer that turns at least as many tokens as both its neighbours. The num_stages highest peaks are
    taken, the earlier of equals first; where there are fewer, the highest other layers fill up. A peak at layer i
    puts a stage before layer i + 1, so the last layer never counts.
    """
    candidates = range(len(shifts) - 1)
    if not 0 <= num_stages <= len(candidates):
        raise PlanError(
            f"num_stages must be from 0 to one less than the model's {len(shifts)} layers, got {num_stages}; "
            "ask for fewer stages"
        )
    padded = [-1, *shifts, -1]
    peaks = {i for i in candidates if padded[i] <= shifts[i] >= padded[i + 2]}
    by_height = sorted(candidates, key=lambda i: (i not in peaks, -shifts[i], i))
    return tuple(sorted(i + 1 for i in by_height[:num_stages]))


@torch.no_grad()
def withdrawal_layer(model: nn.Module, batches: Iterable[Mapping[str, Any]], max_kl: float = 0.003) -> int:
    """VTW's `findk`: the earliest layer before which all image tokens can go.

    There, the Kullback-Leibler divergence (nats) of the next token's distribution from the dense model's, averaged over
    the prompts, is at most max_kl, of which the default is ours. batches: model inputs, padded on the left if at all;
    the paper uses 20 samples. Layer 0 is never tried: before it the model would be blind.

    Raises PlanError where no layer will do, RealizationError for prompts without images.
    """
    prompts = list(batches)
    _check_seen(sum(int(anatomy_of(model).image_mask(batch).sum()) for batch in prompts))
    dense = [_next_token(model, batch) for batch in prompts]
    num_prompts = sum(len(log_prob_BV) for log_prob_BV in dense)
    for layer in range(1, len(anatomy_of(model).layers)):
        with prune(model, Plan(stages=(Stage(layer=layer, keep=0.0),))):
            blind = [_next_token(model, batch) for batch in prompts]
        pairs = zip(blind, dense, strict=True)
        if sum(float(kl_div(b, d, reduction="sum", log_target=True)) for b, d in pairs) <= max_kl * num_prompts:
            return layer
    raise PlanError(
        f"a layer must bring the divergence from dense to at most {max_kl:g} nats, but none does; raise max_kl, or "
        "keep image tokens to the end"
    )


def _check_seen(num_image_tokens: int) -> None:
    if not num_image_tokens:
        raise RealizationError("calibration needs prompts with images, got no image token in any batch; pass some")


def _next_token(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Log-probabilities of the token after each prompt. (B, V)"""
    return cast(Tensor, model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].float().log_softmax(dim=-1))


def _count_shifted(
    total: Tensor,
    image_mask_BS: Tensor,
    tau: float,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor | tuple[Tensor, ...],
) -> None:
    before_BSD = args[0] if args else kwargs["hidden_states"]
    after_BSD = output if isinstance(output, Tensor) else output[0]
    similarity_BS = torch.cosine_similarity(before_BSD.float(), after_BSD.float(), dim=-1)
    total += ((similarity_BS < tau) & image_mask_BS.to(similarity_BS.device)).sum()
