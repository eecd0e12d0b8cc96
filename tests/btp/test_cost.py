"""Costs against figures worked out from the BTP paper, against torch's own counter, and against real caches."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
)

from btp import Plan, PlanError, Stage, UnsupportedModelError, prune
from btp.cost import (
    DecoderShape,
    TokenCounts,
    encoder_multiplies,
    image_token_flops,
    kv_cache_bytes,
    mean_tokens,
    prefill_multiplies,
    token_counts,
    tokens_per_layer,
)

LLAVA_7B = {"hidden_size": 4096, "intermediate_size": 11008}
LLAVA_13B = {"hidden_size": 5120, "intermediate_size": 13824}


def plan_of(*stages, selector="uniform", **settings):
    return Plan(stages=tuple(Stage(layer=layer, keep=keep, selector=selector) for layer, keep in stages), **settings)


DENSE = plan_of()
BTP_RELEASED = plan_of((3, 1 / 2), (6, 1 / 4), (14, 1 / 12), (22, 0))
BTP_KEPT = plan_of((3, 1 / 2), (6, 1 / 4), (14, 1 / 12))
DIVPRUNE = plan_of((0, 128 / 576))
FASTV = plan_of((2, 98 / 576))
VTW = plan_of((15, 0))
PYRAMIDDROP = plan_of((8, 0.5), (16, 0.25), (24, 0.125), positions="reset")
TODRE = Plan(stages=(Stage(layer=0, keep=0.25), Stage(layer=28, keep=0.0, attention_below=0.1)))


# ------------------------------------------------------------------------------------------------- the paper's formula


@pytest.mark.parametrize(
    ("plan", "num_layers", "sizes", "mean", "tflops"),
    [
        (DENSE, 32, LLAVA_7B, 576, 3.817),
        (DENSE, 40, LLAVA_13B, 576, 7.444),
        (BTP_RELEASED, 32, LLAVA_7B, 129.0, 0.847),
        (plan_of((3, 1 / 2), (6, 1 / 4), (14, 1 / 8), (22, 0)), 32, LLAVA_7B, 135.0, 0.886),
        (DIVPRUNE, 32, LLAVA_7B, 128, 0.833),
        (plan_of((0, 64 / 576)), 32, LLAVA_7B, 64, 0.416),
        (FASTV, 32, LLAVA_7B, 127.875, 0.836),
        (PYRAMIDDROP, 32, LLAVA_7B, 270, 1.78),
    ],
)
def test_golden_flops(plan, num_layers, sizes, mean, tflops):
    counts = tokens_per_layer(plan, num_layers, 576)
    assert mean_tokens(counts) == mean
    assert image_token_flops(counts, **sizes) / 1e12 == pytest.approx(tflops, abs=0.006 if tflops == 1.78 else 0.0006)


def test_tokens_per_layer_refuses_a_plan_for_a_deeper_model():
    with pytest.raises(PlanError, match="below the model's 2 layers, got 3"):
        tokens_per_layer(plan_of((3, 0.5)), 2, 10)
    with pytest.raises(PlanError, match="below the model's 20 layers, got 28"):
        tokens_per_layer(TODRE, 20, 10, conditional=False)


def test_conditional_stages_count_as_carried_out_or_as_skipped():
    assert tokens_per_layer(TODRE, 32, 576) == (144,) * 28 + (0,) * 4
    assert tokens_per_layer(TODRE, 32, 576, conditional=False) == (144,) * 32
    assert tokens_per_layer(VTW, 32, 576, conditional=False) == tokens_per_layer(VTW, 32, 576)


@pytest.mark.parametrize(
    ("plan", "mean", "literal"),
    [
        (DENSE, 576, 576),
        (BTP_RELEASED, 129.0, 48),
        (DIVPRUNE, 128, 128),
        (FASTV, 127.875, 98),
        (PYRAMIDDROP, 270, 72),
        (VTW, 270, 576),
        (plan_of((0, 0)), 0, 0),
        (TODRE, 126, 144),
    ],
)
def test_token_counts_are_the_mean_and_the_literal_one(plan, mean, literal):
    assert token_counts(plan, 32, 576) == TokenCounts(mean=mean, literal=literal)


def test_token_counts_without_conditional_stages():
    assert token_counts(TODRE, 32, 576, conditional=False) == TokenCounts(mean=144, literal=144)


# ---------------------------------------------------------------------------------------------------- exact multiplies


def shape_of(config, windows=()):
    return DecoderShape(
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        vocab_size=config.vocab_size,
        windows=windows,
    )


def counted_multiplies(model, plan, inputs, **settings):
    """The decoder and LM head by torch's counter, less the rotary angles where they are computed as a product."""
    with torch.no_grad(), prune(model, plan) as trace, FlopCounterMode(display=False) as counter:
        model(**inputs, **settings)
    flops = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    decoder = flops["model.language_model"] - flops.get("model.language_model.rotary_emb", 0)
    return (decoder + flops["lm_head"]) // 2, trace.counts


PLANS_OF_FOUR_LAYERS = [
    DENSE,
    plan_of((0, 0.3)),
    plan_of((1, 0.5), (2, 0.2), (3, 0.0)),
    plan_of((2, 0.0)),
    plan_of((1, 0.6), (3, 0.1), positions="reset"),
]


@pytest.mark.parametrize("plan", PLANS_OF_FOUR_LAYERS)
def test_prefill_multiplies_are_exactly_what_torch_counts(llava, inputs_for, plan):
    model, inputs = llava("eager"), inputs_for()
    num_text_tokens = inputs["input_ids"].shape[1] - 25
    shape = shape_of(model.config.text_config)
    counts = tokens_per_layer(plan, 4, 25)

    counted, realised = counted_multiplies(model, plan, inputs, logits_to_keep=1)
    assert realised == counts
    assert prefill_multiplies(shape, counts, num_text_tokens) == counted

    counted, _ = counted_multiplies(model, plan, inputs)
    assert prefill_multiplies(shape, counts, num_text_tokens, num_logits=counts[-1] + num_text_tokens) == counted


def test_prefill_multiplies_with_as_many_key_heads_are_the_papers_flops_and_the_text():
    shape = DecoderShape(
        num_layers=32, num_heads=32, num_key_value_heads=32, head_dim=128, vocab_size=32000, **LLAVA_7B
    )
    counts = tokens_per_layer(BTP_RELEASED, 32, 576)
    head = 4096 * 32000
    assert prefill_multiplies(shape, counts, 0) == image_token_flops(counts, **LLAVA_7B) + head
    with_text = [count + 64 for count in counts]
    assert prefill_multiplies(shape, counts, 64) == image_token_flops(with_text, **LLAVA_7B) + head


def test_one_count_a_layer_is_demanded(llava):
    shape = shape_of(llava().config.text_config)
    with pytest.raises(PlanError, match="one a layer, 4, got 3"):
        prefill_multiplies(shape, (25,) * 3, 10)
    with pytest.raises(PlanError, match="one a layer, 4, got 5"):
        kv_cache_bytes(shape, (25,) * 5, 10, bytes_per_number=2)


def test_decoder_shape_refuses_illegal_windows(llava):
    config = llava().config.text_config
    with pytest.raises(UnsupportedModelError, match="one a layer, 4, got 2"):
        shape_of(config, windows=(None, 8))
    with pytest.raises(UnsupportedModelError, match="at least 2 tokens, got"):
        shape_of(config, windows=(None, 8, 1, None))


# ------------------------------------------------------------------------------------------------------ vision encoder


def clip_multiplies(num_layers, hidden, intermediate, num_patches, patch, text_hidden):
    tokens = num_patches + 1
    layer = 4 * tokens * hidden**2 + 2 * tokens**2 * hidden + 2 * tokens * hidden * intermediate
    projector = num_patches * (hidden * text_hidden + text_hidden**2)
    return num_layers * layer + patch**2 * 3 * hidden * num_patches + projector


def test_encoder_of_llava_7b_costs_what_its_sizes_say():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=1024,
            intermediate_size=4096,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=336,
            patch_size=14,
        ),
        text_config=LlamaConfig(hidden_size=4096, num_hidden_layers=1, intermediate_size=64, vocab_size=64),
        vision_feature_layer=-2,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
        inputs = {"pixel_values": torch.empty(1, 3, 336, 336), "input_ids": torch.zeros(1, 600, dtype=torch.long)}
    # LLaVA reads the last layer but one, but transformers runs all 24
    assert encoder_multiplies(model, inputs) == clip_multiplies(24, 1024, 4096, 576, 14, 4096) == 203_038_703_616


@pytest.mark.parametrize("kernel", ["eager", "sdpa", "flash_attention_2"])
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder_is_counted_the_same_under_every_kernel(llava, inputs_for, kernel, batch):
    model = copy.deepcopy(llava("sdpa"))
    tower = model.model.vision_tower
    tower.config._attn_implementation = kernel  # the flash-attn package is not needed: its kernel must not be run
    assert encoder_multiplies(model, inputs_for(batch)) == batch * clip_multiplies(2, 16, 32, 25, 4, 32)
    assert tower.config._attn_implementation == kernel
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_encoder_count_restores_the_kernels_after_an_error(llava):
    model = copy.deepcopy(llava("eager"))
    with pytest.raises(ValueError, match="doesn't match model"):
        encoder_multiplies(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})
    kernels = {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    assert kernels == {"eager"}
    assert model.config.vision_config._attn_implementation == "eager"


def test_encoder_count_refuses_a_model_without_images():
    with pytest.raises(UnsupportedModelError, match=r"must have get_image_features\(\), got Linear"):
        encoder_multiplies(torch.nn.Linear(2, 2), {})


# ------------------------------------------------------------------------------------------------------------ cache


def cache_bytes(cache):
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("plan", PLANS_OF_FOUR_LAYERS)
def test_cache_bytes_are_those_of_the_real_cache(llava, inputs_for, plan, batch, dtype, size):
    model, inputs = llava(), inputs_for(batch)
    if dtype != torch.float32:
        model = copy.deepcopy(model).to(dtype)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with torch.no_grad(), prune(model, plan):
        cache = model(**inputs, use_cache=True).past_key_values
    shape, counts = shape_of(model.config.text_config), tokens_per_layer(plan, 4, 25)
    num_text_tokens = inputs["input_ids"].shape[1] - 25
    expected = kv_cache_bytes(shape, counts, num_text_tokens, batch=batch, bytes_per_number=size)
    assert expected == cache_bytes(cache)


@pytest.mark.parametrize("num_tokens", [6, 7, 8, 9, 30])
def test_a_layer_with_a_sliding_window_keeps_one_token_less_than_it(num_tokens):
    config = MistralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        sliding_window=8,
    )
    cache = DynamicCache(config=config)
    with torch.no_grad():
        MistralForCausalLM(config)(torch.ones(2, num_tokens, dtype=torch.long), past_key_values=cache)
    shape = shape_of(config, windows=(8, 8))
    assert kv_cache_bytes(shape, (num_tokens - 5,) * 2, 5, batch=2, bytes_per_number=4) == cache_bytes(cache)


def test_layers_without_a_window_keep_every_token(llava):
    config = llava().config.text_config
    some, none = shape_of(config, windows=(None, 8, None, 8)), shape_of(config)
    one_layer = kv_cache_bytes(none, (20,) * 4, 10, bytes_per_number=2) // 4
    assert one_layer == 2 * 2 * 8 * 30 * 2  # keys and values, heads, head size, tokens, bytes
    assert kv_cache_bytes(some, (20,) * 4, 10, bytes_per_number=2) == 2 * one_layer + 2 * (one_layer * 7 // 30)
