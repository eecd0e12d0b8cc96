"""Every family lives through the same life cycle: no trace left, the plan's counts, grids, decoding, refusals."""

import copy

import pytest
import torch

from btp import Plan, RealizationError, Stage, anatomy_of, prune
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES, IMAGE_TOKEN, VIDEO_TOKEN, WINDOW, decoder, decoder_layers

FLASH = "flash_attention_2"
PLAN = Plan(stages=(Stage(layer=1, keep=0.6), Stage(layer=3, keep=0.3)))
UNIFORM = Plan(stages=(Stage(layer=0, keep=0.6, selector="uniform"), Stage(layer=2, keep=0.3, selector="uniform")))
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}

every_family = pytest.mark.parametrize("name", FAMILIES)
both_kernels = pytest.mark.parametrize("kernel", ["sdpa", "eager"])


def num_hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def num_image_tokens_of(inputs):
    return int((inputs["input_ids"][0] == IMAGE_TOKEN).sum())


def generated(model, inputs, **settings):
    """Sequences and the logits behind them, so that equal means more than the same winners."""
    torch.manual_seed(3)
    output = model.generate(**inputs, max_new_tokens=4, output_logits=True, return_dict_in_generate=True, **settings)
    return output.sequences, torch.stack(output.logits)


@every_family
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_flash_attention_computes_what_eager_does(family_model, flash_convention, name, padding):
    """The naive flash attention is right, so that pruned runs with it can be held against eager ones."""
    inputs = FAMILIES[name].inputs(3, padding)
    inputs.pop("token_type_ids", None)  # Gemma 3: its images attend both ways, which no 2-D mask can tell
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    flash = logits_of(family_model(name, FLASH), inputs)[real]
    torch.testing.assert_close(flash, logits_of(family_model(name, "eager"), inputs)[real], **TOLERANCE)


@every_family
def test_the_picture_shows_in_the_answer(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(2)
    other = {**inputs, "pixel_values": inputs["pixel_values"] + 1}
    difference = (logits_of(model, inputs) - logits_of(model, other))[:, -1].abs().amax(dim=1)
    assert (difference > 0.1).all()


@every_family
@both_kernels
@pytest.mark.parametrize("padding", ["none", "left"])
def test_keeping_all_tokens_is_bit_identical(family_model, name, kernel, padding):
    model, inputs = family_model(name, kernel), FAMILIES[name].inputs(3, padding)
    dense, (tokens, logits) = logits_of(model, inputs), generated(model, inputs)
    with prune(model, Plan(stages=(Stage(layer=1, keep=1.0),))) as trace:
        assert torch.equal(logits_of(model, inputs), dense)
        pruned_tokens, pruned_logits = generated(model, inputs)
    assert torch.equal(pruned_tokens, tokens)
    assert torch.equal(pruned_logits, logits)
    assert trace.counts == (num_image_tokens_of(inputs),) * 4
    assert trace.dense


@every_family
def test_nothing_is_left_behind(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(3, "left")
    before, hooks, (tokens, _) = logits_of(model, inputs), num_hooks(model), generated(model, inputs)
    with prune(model, PLAN):
        assert logits_of(model, inputs).shape[1] < before.shape[1]
        generated(model, inputs)
    assert num_hooks(model) == hooks
    assert torch.equal(logits_of(model, inputs), before)
    assert torch.equal(generated(model, inputs)[0], tokens)


@every_family
def test_the_trace_and_each_layers_cache_hold_what_the_plan_keeps(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(3, "left")
    total = num_image_tokens_of(inputs)
    with torch.no_grad(), prune(model, PLAN) as trace:
        cache = model(**inputs, use_cache=True).past_key_values
    first, last = PLAN.num_kept(total)
    assert trace.counts == (total, first, first, last)
    assert not trace.dense
    windows = [getattr(layer.self_attn, "sliding_window", None) for layer in decoder_layers(model)]
    assert any(windows) == (name == "gemma3")
    for layer, (count, window) in enumerate(zip(trace.counts, windows, strict=True)):
        length = inputs["input_ids"].shape[1] - total + count
        assert cache.layers[layer].keys.shape[2] == (length if window is None else min(length, WINDOW - 1))


@every_family
@pytest.mark.parametrize("way", ["forward", "generate", "beams"])
@pytest.mark.parametrize("images", [1, 2])
def test_selectors_see_the_grids_and_each_tokens_place_on_them(family_model, monkeypatch, name, way, images):
    seen = []

    def spy(tokens, num_keep, stage):
        seen.append((tokens.grids, tokens.origin_BN, tokens.coordinates))
        return SELECTORS["uniform"](tokens, num_keep, stage)

    monkeypatch.setitem(SELECTORS, "spy", spy)
    model, inputs = family_model(name), FAMILIES[name].inputs(3, "left", images=images)
    stages = tuple(Stage(layer=layer, keep=keep, selector="spy") for layer, keep in ((0, 0.6), (2, 0.3)))
    with prune(model, Plan(stages=stages)):
        if way == "forward":
            logits_of(model, inputs)
        else:
            generated(model, inputs, num_beams=2 if way == "beams" else 1)
    expected = FAMILIES[name].grids(inputs)
    if way == "beams":
        expected = tuple(grids for grids in expected for _ in range(2))
    assert len(seen) == 2
    for grids, origin_BN, coordinates_BN2 in seen:
        assert grids == expected
        for row, origin_N, cell_N2 in zip(expected, origin_BN, coordinates_BN2, strict=True):
            assert torch.equal(cell_N2, torch.tensor(stacked_cells(row))[origin_N])


def stacked_cells(grids):
    """Rows of a grid go on where those of the one above end."""
    cells = []
    for rows, columns in grids:
        top = cells[-1][0] + 1 if cells else 0
        cells += [(top + row, column) for row in range(rows) for column in range(columns)]
    return cells


@every_family
@both_kernels
@pytest.mark.parametrize(
    "settings",
    [{"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}, {"use_cache": False}],
    ids=["sampling", "beams", "no cache"],
)
def test_generation_equals_masked_dense(family_model, masked_dense, name, kernel, settings):
    model, inputs = family_model(name, kernel), FAMILIES[name].inputs(2, "left")
    with prune(model, UNIFORM) as trace:  # the same survivors whatever is generated, so each step drops the same
        tokens, logits = generated(model, inputs, **settings)
    ids = inputs["input_ids"].repeat_interleave(len(trace.alive[0]) // 2, dim=0)
    with masked_dense(model, ids, trace.alive):
        dense_tokens, dense_logits = generated(model, inputs, **settings)
    assert torch.equal(tokens, dense_tokens)
    torch.testing.assert_close(logits, dense_logits, **TOLERANCE)


@every_family
def test_embeddings_do_in_place_of_ids(family_model, assert_equals_masked_dense, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(2)
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None  # Qwen: without ids, positions go on from those of the last prompt
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    trace = assert_equals_masked_dense(model, inputs, PLAN, input_ids=ids)
    total = int((ids[0] == IMAGE_TOKEN).sum())
    first, last = PLAN.num_kept(total)
    assert trace.counts == (total, first, first, last)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])  # whose generate() wants ids
def test_generation_from_embeddings_equals_masked_dense(family_model, masked_dense, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(2, "left")
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids).detach()
    with prune(model, PLAN) as trace:
        tokens, logits = generated(model, inputs)
    assert trace.counts[-1] == PLAN.num_kept(int((ids[0] == IMAGE_TOKEN).sum()))[-1]
    with masked_dense(model, ids, trace.alive):
        dense_tokens, dense_logits = generated(model, inputs)
    assert torch.equal(tokens, dense_tokens)
    torch.testing.assert_close(logits, dense_logits, **TOLERANCE)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, kernel) for name in FAMILIES for kernel in ("sdpa", "eager", FLASH) if (name, kernel) != ("gemma3", FLASH)],
)  # Gemma 3 is refused with flash attention
@pytest.mark.parametrize(("batch", "padding"), [(1, "none"), (3, "left")])
def test_two_images_with_text_between_equal_masked_dense(
    family_model, assert_equals_masked_dense, flash_convention, name, kernel, batch, padding
):
    model, inputs = family_model(name, kernel), FAMILIES[name].inputs(batch, padding, images=2)
    dense = family_model(name, "eager") if kernel == FLASH else model
    trace = assert_equals_masked_dense(model, inputs, PLAN, dense=dense)
    cells = sum(rows * columns for rows, columns in FAMILIES[name].grids(inputs)[0])
    assert trace.num_image_tokens == num_image_tokens_of(inputs) == cells


@every_family
@both_kernels
def test_half_precision_runs_in_half_precision(family_model, masked_dense, name, kernel):
    model, inputs = copy.deepcopy(family_model(name, kernel)).to(torch.bfloat16), FAMILIES[name].inputs(3)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with prune(model, PLAN) as trace:
        pruned = logits_of(model, inputs)[:, -1]
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    with masked_dense(model, inputs["input_ids"], trace.alive):
        dense = logits_of(model, inputs)[:, -1]
    assert pruned.dtype == torch.bfloat16
    assert (pruned - dense).float().norm() < 0.05 * dense.float().norm()


@every_family
def test_gradient_mode_changes_nothing(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(3, "left")
    with prune(model, PLAN) as trace:
        without = logits_of(model, inputs)
        alive = trace.alive
        logits = model(**inputs).logits
        weight = decoder_layers(model)[0].self_attn.k_proj.weight
        (gradient,) = torch.autograd.grad(logits[:, -1].square().sum(), weight)
    torch.testing.assert_close(logits.detach(), without, **TOLERANCE)
    assert all(torch.equal(one, other) for one, other in zip(trace.alive, alive, strict=True))
    assert gradient.isfinite().all()
    assert gradient.any()


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, "none") for name in FAMILIES]
    + [(name, "left") for name, family in FAMILIES.items() if family.types != "mm_token_type_ids"],
)  # a padded mask in decoding is for Qwen's generate() only
def test_reset_positions_decode_as_a_longer_prefill_does(family_model, name, padding):
    """Decoding a text token equals having had it in the prompt: positions continue at every depth."""
    model, inputs = family_model(name), FAMILIES[name].inputs(3, padding)
    answer = torch.tensor([[5, 9], [40, 3], [17, 8]])
    longer = {**inputs, "input_ids": torch.cat((inputs["input_ids"], answer), dim=1)}
    for key, value in (("attention_mask", 1), (FAMILIES[name].types, 0)):
        if key in inputs:
            longer[key] = torch.cat((inputs[key], torch.full_like(answer, value)), dim=1)
    with torch.no_grad(), prune(model, Plan(stages=UNIFORM.stages, positions="reset")):
        whole = model(**longer).logits[:, -2:]
        cache = model(**inputs, use_cache=True).past_key_values
        parts = model(input_ids=answer, attention_mask=longer.get("attention_mask"), past_key_values=cache).logits
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    with prune(model, UNIFORM):
        assert not torch.allclose(logits_of(model, longer)[:, -2:], whole, atol=1e-3)  # the option does something


@every_family
def test_prompts_without_images_run_densely(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(3, "left", images=0)
    dense, (tokens, _) = logits_of(model, inputs), generated(model, inputs)
    with prune(model, PLAN) as trace:
        logits_of(model, FAMILIES[name].inputs(1))  # of which nothing shall be left in the trace
        assert torch.equal(logits_of(model, inputs), dense)
        assert torch.equal(generated(model, inputs)[0], tokens)
    assert trace.num_image_tokens == 0
    assert trace.counts == ()
    assert trace.dense is True


@pytest.mark.parametrize("kernel", ["sdpa", "eager", FLASH])
@pytest.mark.parametrize(("batch", "padding"), [(1, "none"), (3, "left"), (3, "right")])
def test_deepstack_features_follow_the_survivors(
    family_model, assert_equals_masked_dense, flash_convention, kernel, batch, padding
):
    """Qwen3-VL adds visual features after layers 0 and 1; the cuts come before, between and after them."""
    model, inputs = family_model("qwen3_vl", kernel), FAMILIES["qwen3_vl"].inputs(batch, padding)
    stages = tuple(Stage(layer=layer, keep=keep) for layer, keep in ((0, 0.7), (1, 0.4), (2, 0.2)))
    dense = family_model("qwen3_vl", "eager") if kernel == FLASH else model
    trace = assert_equals_masked_dense(model, inputs, Plan(stages=stages), dense=dense)
    assert trace.counts == (17, 10, 5, 5)


@every_family
def test_the_identity_tells_class_and_sizes(family_model, name):
    model = family_model(name)
    identity = anatomy_of(model).identity
    assert identity.architecture == type(model).__name__
    assert (identity.num_layers, identity.hidden_size) == (4, 32)
    assert anatomy_of(model).layers == decoder_layers(model)
    assert anatomy_of(model).language_model is decoder(model)


class TestRefusals:
    @every_family
    def test_unequal_image_counts(self, family_model, name):
        model, inputs = family_model(name), FAMILIES[name].inputs(2, "left", images=(2, 1))
        counts = (inputs["input_ids"] == IMAGE_TOKEN).sum(dim=1)
        assert counts[0] != counts[1]
        logits_of(model, inputs)
        with prune(model, PLAN), pytest.raises(RealizationError, match="equally many image tokens"):
            logits_of(model, inputs)

    @every_family
    def test_prompts_that_end_with_an_image_token(self, family_model, name):
        model, inputs = family_model(name), FAMILIES[name].inputs(2)
        for key in {"input_ids", FAMILIES[name].types} & inputs.keys():
            inputs[key] = inputs[key][:, :-6]
        logits_of(model, inputs)
        with prune(model, PLAN), pytest.raises(RealizationError, match="end with text"):
            logits_of(model, inputs)


def video_inputs(name):
    """A prompt with a video: of 4 tokens, or for LLaVA-OneVision of 4 for each of 2 frames and a newline."""
    if name == "llava_onevision":
        num_tokens, video = 9, {"pixel_values_videos": torch.ones(1, 2, 3, 16, 16)}
    else:
        num_tokens = 4
        video = {"pixel_values_videos": torch.ones(16, 96), "video_grid_thw": torch.tensor([[1, 4, 4]])}
    ids = torch.tensor([[1, 5, *[VIDEO_TOKEN] * num_tokens, 9, 12]])
    types = {"mm_token_type_ids": 2 * (ids == VIDEO_TOKEN).long()} if name != "llava_onevision" else {}
    return {"input_ids": ids, **video, **types}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_a_second_turn_goes_on_from_the_cache_as_if_prefilled_at_once(family_model, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(1)
    plan = Plan(stages=(Stage(layer=1, keep=0.5, selector="uniform"), Stage(layer=3, keep=0.2, selector="uniform")))
    settings = {"max_new_tokens": 3, "do_sample": False}
    with prune(model, plan):
        first = model.generate(**inputs, **settings, return_dict_in_generate=True)
        asked = torch.cat((first.sequences, torch.tensor([[5, 9, 12]])), dim=1)
        whole = {**inputs, "input_ids": asked}
        for types in {"token_type_ids", "mm_token_type_ids"} & set(inputs):
            whole[types] = (asked == FAMILIES[name].image_token).long()
        carried = {n: t for n, t in whole.items() if n not in ("pixel_values", "image_grid_thw")}
        went_on = model.generate(**carried, past_key_values=first.past_key_values, **settings)
        assert torch.equal(went_on, model.generate(**whole, **settings))


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_reset_before_the_decoder_is_a_prompt_that_never_had_the_others(family_model, name, padding):
    """With M-RoPE renumbered tokens count up as text does, which is what embeddings without a picture get."""
    model, inputs = family_model(name), FAMILIES[name].inputs(2, padding=padding)
    plan = Plan(stages=(Stage(layer=0, keep=0.4, selector="uniform"),), positions="reset")
    is_image = inputs["input_ids"] == FAMILIES[name].image_token
    with torch.no_grad():
        with prune(model, plan) as trace:
            pruned = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"], return_dict=True)
        embeds[is_image] = torch.cat(list(features.pooler_output))
        kept = ~is_image
        for row in range(2):
            kept[row, is_image[row].nonzero().squeeze(1)[trace.alive[0][row]]] = True
        mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[kept].view(2, -1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0).expand(3, -1, -1)
        plain = model(
            inputs_embeds=embeds[kept].view(2, mask.shape[1], -1), attention_mask=mask, position_ids=positions
        ).logits
    torch.testing.assert_close(pruned[mask.bool()], plain[mask.bool()], rtol=1e-4, atol=1e-4)
