"""What a plan costs: in the BTP paper's formula (arXiv 2505.22038), in exact multiply-accumulates, in cache bytes.

Importing this needs the standard library only; `encoder_multiplies` loads torch when it is called.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from btp.errors import PlanError, UnsupportedModelError
from btp.plan import Plan

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = [
    "DecoderShape",
    "TokenCounts",
    "encoder_multiplies",
    "image_token_flops",
    "kv_cache_bytes",
    "mean_tokens",
    "prefill_multiplies",
    "token_counts",
    "tokens_per_layer",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderShape:
    """The sizes of a decoder with grouped-query attention and gated feed-forward blocks (Llama, Qwen2, Mistral, ...).

    num_heads: of the queries. windows: the sliding window of each layer in tokens, None where it attends to all;
    empty when no layer has one. Raises UnsupportedModelError for windows that are not one a layer or under 2 tokens.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    windows: tuple[int | None, ...] = ()

    def __post_init__(self) -> None:
        if self.windows and len(self.windows) != self.num_layers:
            raise UnsupportedModelError(
                f"windows must be one a layer, {self.num_layers}, got {len(self.windows)}; leave it empty for none"
            )
        if any(window is not None and window < 2 for window in self.windows):
            raise UnsupportedModelError(
                f"a window must be None or at least 2 tokens, got {self.windows}; None is full attention"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenCounts:
    """The two things papers mean by "N tokens"; print both.

    mean: over the decoder's layers, zeros included, as papers on pruning inside the decoder count. literal: left by the
    last stage that is always carried out and leaves any, as papers on pruning before the decoder count.
    """

    mean: float
    literal: int


def tokens_per_layer(
    plan: Plan, num_layers: int, num_image_tokens: int, *, conditional: bool = True
) -> tuple[int, ...]:
    """How many image tokens each decoder layer sees under the plan.

    conditional: stages with `attention_below` are counted as carried out (True) or as skipped (False).
    Raises PlanError for a stage beyond the last layer.
    """
    counts = [num_image_tokens] * num_layers
    for stage, kept in zip(plan.stages, plan.num_kept(num_image_tokens), strict=True):
        if stage.layer >= num_layers:
            raise PlanError(
                f"a stage's layer must be below the model's {num_layers} layers, got {stage.layer}; "
                "scale the plan to this model's depth"
            )
        if conditional or stage.attention_below is None:
            counts[stage.layer :] = [kept] * (num_layers - stage.layer)
    return tuple(counts)


def mean_tokens(alive_counts: Sequence[int]) -> float:
    """Mean image tokens a layer, zeros included: what papers on pruning inside the decoder call "N tokens"."""
    return sum(alive_counts) / len(alive_counts)


def token_counts(plan: Plan, num_layers: int, num_image_tokens: int, *, conditional: bool = True) -> TokenCounts:
    """The plan's image tokens by both ways of counting; `conditional` as for `tokens_per_layer`, for the mean.

    literal is `num_image_tokens` for a plan that prunes nothing, or only ever drops everything after a while (VTW).
    """
    certain = tokens_per_layer(plan, num_layers, num_image_tokens, conditional=False)
    return TokenCounts(
        mean=mean_tokens(tokens_per_layer(plan, num_layers, num_image_tokens, conditional=conditional)),
        literal=next((count for count in reversed(certain) if count), 0),
    )


def image_token_flops(alive_counts: Iterable[int], hidden_size: int, intermediate_size: int) -> int:
    """FLOPs of the image tokens alone: the sum over layers of 4 n d^2 + 2 n^2 d + 3 n d m.

    n image tokens in the layer, d hidden size, m intermediate size of the feed-forward block. This is the formula of
    the BTP paper (arXiv 2505.22038). It counts multiplications, which the paper calls FLOPs: half of what a count of
    multiplications and additions gives. It takes key and value heads for as many as query heads and leaves the text
    out; `prefill_multiplies` does neither.
    """
    d, m = hidden_size, intermediate_size
    return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in alive_counts)


def prefill_multiplies(
    shape: DecoderShape, image_counts: Sequence[int], num_text_tokens: int, *, num_logits: int = 1
) -> int:
    """Multiply-accumulates of one prompt's prefill through the decoder and its LM head.

    image_counts: image tokens each layer sees, as from `tokens_per_layer`. num_text_tokens: the prompt's other tokens,
    pads among them. num_logits: tokens the LM head is run on; `generate` asks for 1.

    Both attention products are counted over the full n x n matrix, as an eager kernel computes them, sliding window
    or not; causal kernels may do half. Norms, rotary embeddings, softmax and a selector's own work are not counted.
    Raises PlanError unless there is one count a layer.
    """
    _check_counts(shape, image_counts)
    query_size, key_size = shape.num_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
    projections = 2 * shape.hidden_size * (query_size + key_size)
    feed_forward = 3 * shape.hidden_size * shape.intermediate_size
    lengths = [count + num_text_tokens for count in image_counts]
    layers = sum(n * (projections + feed_forward) + 2 * n * n * query_size for n in lengths)
    return layers + num_logits * shape.hidden_size * shape.vocab_size


def kv_cache_bytes(
    shape: DecoderShape, image_counts: Sequence[int], num_text_tokens: int, *, batch: int = 1, bytes_per_number: int
) -> int:
    """Bytes of the keys and values that a prefill leaves in a transformers DynamicCache.

    Arguments as for `prefill_multiplies`; bytes_per_number is 2 for bfloat16. A layer with a sliding window w keeps
    the last w - 1 tokens, the next one being the w-th (DynamicSlidingWindowLayer). During the prefill itself such a
    layer holds all of them. Raises PlanError unless there is one count a layer.
    """
    _check_counts(shape, image_counts)
    windows = shape.windows or (None,) * shape.num_layers
    lengths = [count + num_text_tokens for count in image_counts]
    cached = sum(n if w is None else min(n, w - 1) for n, w in zip(lengths, windows, strict=True))
    return 2 * batch * shape.num_key_value_heads * shape.head_dim * cached * bytes_per_number


def encoder_multiplies(model: "nn.Module", inputs: Mapping[str, "Tensor"]) -> int:
    """Multiply-accumulates of the vision encoder and projector on these inputs, all images of the batch together.

    Counted by torch's FlopCounterMode (2 FLOPs a multiply-accumulate) around `model.get_image_features`, which is
    given those of the inputs that it names. While it runs, attention goes through the math backend of
    scaled_dot_product_attention, because the counter misses the fused kernel of the CPU and those of the flash-attn
    package; so it takes memory for whole attention matrices. On the "meta" device nothing is computed or allocated.

    Raises UnsupportedModelError for a model without `get_image_features`.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    read_features: Callable[..., Any] | None = getattr(model, "get_image_features", None)
    if read_features is None:
        raise UnsupportedModelError(
            f"the model must have get_image_features(), got {type(model).__name__}; "
            "load it with its ForConditionalGeneration class"
        )
    wanted = {name: inputs[name] for name in inspect.signature(read_features).parameters if name in inputs}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), _attention_kernel(model, "sdpa"), sdpa_kernel(SDPBackend.MATH), counter:
        read_features(**wanted)
    return int(counter.get_total_flops()) // 2


def _check_counts(shape: DecoderShape, image_counts: Sequence[int]) -> None:
    if len(image_counts) != shape.num_layers:
        raise PlanError(
            f"image_counts must be one a layer, {shape.num_layers}, got {len(image_counts)}; "
            "take them from tokens_per_layer for this model's depth"
        )


@contextmanager
def _attention_kernel(model: "nn.Module", kernel: str) -> Iterator[None]:
    """Run every part of the model with this attention implementation, and put back what each had."""
    configs = {id(module.config): cast(Any, module.config) for module in model.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    try:
        for config, _ in before:  # not through the property, which would set sub-configs as well
            config._attn_implementation_internal = kernel
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
