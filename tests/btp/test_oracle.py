"""Removing equals masking: what pruning computes is what the dense model computes with the dropped tokens masked."""

import copy

import pytest
import torch

from btp import Plan, Stage, UnsupportedModelError, prune
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES, IMAGE_TOKEN, WINDOW

FLASH = "flash_attention_2"
KERNELS = ("eager", "sdpa", FLASH)
CELLS = [(name, kernel) for name in FAMILIES for kernel in KERNELS if (name, kernel) != ("gemma3", FLASH)]  # refused
# Qwen's own forward takes a padded mask in decoding only together with the positions, as generate() hands them over.
MROPE = [name for name, family in FAMILIES.items() if family.types == "mm_token_type_ids"]
LOOPS = [("left", "generate"), ("none", "by hand"), ("left", "by hand"), ("left", "by hand, positions given")]
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def plan_of(selector="balanced", layers=(1, 3), keep=(0.6, 0.3), positions="keep"):
    stages = (
        Stage(layer=layer, keep=share, selector=selector, attention_weight=0.5, oversample=1.5)
        for layer, share in zip(layers, keep, strict=True)
    )
    return Plan(stages=tuple(stages), positions=positions)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("batch", "padding"), [(1, "none"), (3, "none"), (3, "left"), (3, "right")])
def test_prefill_logits_equal_masked_dense(
    family_model, assert_equals_masked_dense, flash_convention, device, selector, kernel, name, batch, padding
):
    model, plan = family_model(name, kernel, device), plan_of(selector)
    if name == "gemma3" and kernel == FLASH:  # a sliding window over the survivors would be another window
        with pytest.raises(UnsupportedModelError, match="sdpa"), prune(model, plan):
            pass
        return
    inputs = FAMILIES[name].inputs(batch, padding, device=device)
    dense = family_model(name, "eager", device) if kernel == FLASH else model  # it masks per query, flash cannot
    trace = assert_equals_masked_dense(model, inputs, plan, dense=dense)
    num_image_tokens = int((inputs["input_ids"][0] == IMAGE_TOKEN).sum())
    first, last = plan.num_kept(num_image_tokens)
    assert trace.counts == (num_image_tokens, first, first, last)


@pytest.mark.parametrize("layers_keep", [((0, 2), (0.5, 0.2)), ((1,), (0.0,))])
@pytest.mark.parametrize(
    ("name", "kernel", "padding", "loop"),
    [(*cell, *loop) for cell in CELLS for loop in LOOPS if cell[0] not in MROPE or loop != ("left", "by hand")],
)
def test_greedy_decoding_of_every_family_equals_masked_dense(
    family_model, masked_dense, flash_convention, name, kernel, padding, loop, layers_keep
):
    model, inputs = family_model(name, kernel), FAMILIES[name].inputs(3, padding, seed=1)
    steps = WINDOW + 2 if name == "gemma3" else 5  # until the prompt has left the sliding windows
    with torch.no_grad(), prune(model, plan_of("balanced", *layers_keep)) as trace:
        pruned_tokens, pruned_logits = decode(model, inputs, loop, steps)
    dense = family_model(name, "eager") if kernel == FLASH else model
    with torch.no_grad(), masked_dense(dense, inputs["input_ids"], trace.alive):
        dense_tokens, dense_logits = decode(dense, inputs, loop, steps)
    assert torch.equal(pruned_tokens, dense_tokens)
    torch.testing.assert_close(pruned_logits, dense_logits, **TOLERANCE)


@pytest.mark.parametrize(
    "layers_keep", [((0,), (0.4,)), ((0, 2), (0.5, 0.0)), ((1, 2, 3), (0.8, 0.4, 0.1)), ((2,), (0.0,))]
)
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(("batch", "padding"), [(1, "none"), (3, "left")])
@pytest.mark.parametrize("loop", ["generate", "by hand", "by hand, positions given", "copied cache"])
def test_greedy_decoding_equals_masked_dense(
    llava, inputs_for, masked_dense, layers_keep, kernel, batch, padding, loop
):
    model, inputs = llava(kernel), inputs_for(batch, padding=padding)
    with torch.no_grad(), prune(model, plan_of("balanced", *layers_keep)) as trace:
        pruned_tokens, pruned_logits = decode(model, inputs, loop)
    with torch.no_grad(), masked_dense(model, inputs["input_ids"], trace.alive):
        dense_tokens, dense_logits = decode(model, inputs, loop)
    assert torch.equal(pruned_tokens, dense_tokens)
    torch.testing.assert_close(pruned_logits, dense_logits, **TOLERANCE)


def decode(model, inputs, loop, steps=5):
    """Greedy tokens (B, steps) and the logits behind them (B, steps, V)."""
    if loop == "generate":
        output = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        return output.sequences[:, -steps:], torch.stack(output.logits, dim=1)
    mask = inputs.get("attention_mask")
    extra, given = {}, loop == "by hand, positions given"
    known = torch.ones_like(inputs["input_ids"]) if mask is None else mask
    positions = (known.cumsum(dim=1) - 1).clamp(min=0)
    mrope = hasattr(model.model, "rope_deltas")  # three positions a token, which the prefill works out
    if given and not mrope:
        extra = {"position_ids": positions}
    output = model(**inputs, **extra, use_cache=True, logits_to_keep=1)
    if mrope:
        positions = (positions + model.model.rope_deltas).expand(3, -1, -1)
    logits = [output.logits[:, -1]]
    while len(logits) < steps:
        token = logits[-1].argmax(dim=-1, keepdim=True)
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(token)), dim=1)
        if given:
            positions = positions[..., -1:] + 1
            extra = {"position_ids": positions}
        cache = output.past_key_values
        cache = copy.deepcopy(cache) if loop == "copied cache" else cache
        output = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True, **extra)
        logits.append(output.logits[:, -1])
    stacked = torch.stack(logits, dim=1)
    return stacked.argmax(dim=-1), stacked


@pytest.mark.parametrize(
    ("name", "kernel", "padding"),
    [(*cell, padding) for cell in CELLS for padding in ("none", "left", "right") if cell[0] not in MROPE]
    + [(name, kernel, "none") for name in MROPE for kernel in KERNELS],
)
@pytest.mark.parametrize("layers_keep", [((0, 2), (0.5, 0.2)), ((1, 3), (0.5, 0.2))])
def test_several_new_tokens_at_once_equal_masked_dense(
    family_model, masked_dense, flash_convention, name, kernel, padding, layers_keep
):
    model, inputs = family_model(name, kernel), FAMILIES[name].inputs(2, padding)
    dense = family_model(name, "eager") if kernel == FLASH else model
    answer = torch.tensor([[5, 9, 17], [40, 3, 8]])

    def answer_logits(model):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        mask = inputs.get("attention_mask")
        if mask is not None:
            mask = torch.cat((mask, torch.ones_like(answer)), dim=1)
        return model(input_ids=answer, attention_mask=mask, past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), prune(model, plan_of("balanced", *layers_keep)) as trace:
        pruned = answer_logits(model)
    with torch.no_grad(), masked_dense(dense, inputs["input_ids"], trace.alive):
        torch.testing.assert_close(pruned, answer_logits(dense), **TOLERANCE)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_beams_and_cacheless_generation_equal_masked_dense(llava, inputs_for, masked_dense, kernel, use_cache):
    model, inputs = llava(kernel), inputs_for(2, padding="left")
    plan = plan_of("uniform")  # the same survivors whatever the last token is, so that each step drops the same
    settings = {"max_new_tokens": 4, "do_sample": False, "use_cache": use_cache, "num_beams": 3 if use_cache else 1}
    with prune(model, plan) as trace:
        pruned = model.generate(**inputs, **settings)
    repeated = inputs["input_ids"].repeat_interleave(settings["num_beams"], dim=0)
    with masked_dense(model, repeated, trace.alive):
        assert torch.equal(pruned, model.generate(**inputs, **settings))


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_ready_4d_mask_is_sliced_too(llava, inputs_for, masked_dense, hidden_of, kernel):
    model, inputs = llava(kernel), inputs_for(2, padding="left")
    padding = inputs.pop("attention_mask").bool()
    length = padding.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & padding[:, None, None, :]
    visible |= torch.eye(length, dtype=torch.bool)
    mask = (
        visible
        if kernel == "sdpa"
        else torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    )
    with torch.no_grad(), prune(model, plan_of()) as trace:
        pruned = model(**inputs, attention_mask=mask).logits
    with torch.no_grad(), masked_dense(model, inputs["input_ids"], trace.alive):
        dense = model(**inputs, attention_mask=mask).logits
    survives = ~hidden_of(inputs["input_ids"], trace.alive)[-1]
    for row in range(2):
        torch.testing.assert_close(pruned[row], dense[row][survives[row]], **TOLERANCE)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_two_images_with_text_between_equal_masked_dense(llava, inputs_for, masked_dense, hidden_of, kernel, selector):
    model, one = llava(kernel), inputs_for(2)
    ids = torch.cat((one["input_ids"], one["input_ids"][:, 1:]), dim=1)
    inputs = {"input_ids": ids, "pixel_values": one["pixel_values"].repeat(2, 1, 1, 1)}
    with torch.no_grad(), prune(model, plan_of(selector)) as trace:
        pruned = model(**inputs).logits
    assert trace.counts == (50, 30, 30, 15)
    with torch.no_grad(), masked_dense(model, ids, trace.alive):
        dense = model(**inputs).logits
    survives = ~hidden_of(ids, trace.alive)[-1]
    torch.testing.assert_close(pruned, torch.stack([dense[row][survives[row]] for row in range(2)]), **TOLERANCE)
