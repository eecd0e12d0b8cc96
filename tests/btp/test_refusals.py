"""What cannot be pruned is refused by name: kernels, decoders, videos, late pictures, broken caches."""

import pytest
import torch
import transformers as hf
from transformers import DynamicCache

from btp import Plan, PlanError, RealizationError, Stage, UnsupportedModelError, anatomy_of, prune
from btp.families import _feature_layer
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES, decoder
from tests.btp.test_families import video_inputs

PLAN = Plan(stages=(Stage(layer=1, keep=0.6, selector="uniform"),))
BEFORE_DECODER = Plan(stages=(Stage(layer=0, keep=0.8, selector="uniform"),))
TAKES_VIDEO = [name for name, family in FAMILIES.items() if family.takes_video]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_other_attention_kernels(name):
    model = FAMILIES[name].build()
    decoder(model).config._attn_implementation_internal = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"one of eager, sdpa.*got flex_attention.*'sdpa'"):
        anatomy_of(model)


def test_other_decoders(family_model):
    model = FAMILIES["llava"].build()
    model.model.language_model = hf.FalconModel(
        hf.FalconConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
    )
    with pytest.raises(UnsupportedModelError, match=r"must be one of Gemma3TextModel.*got FalconModel"):
        anatomy_of(model)


def test_towers_without_one_square_view():
    model = FAMILIES["llava"].build()
    model.config.vision_config = hf.PixtralVisionConfig(image_size=20, patch_size=4)
    with pytest.raises(UnsupportedModelError, match="one square view size, got vision tower pixtral"):
        anatomy_of(model)


def test_cls_tokens_among_the_image_tokens():
    model = FAMILIES["llava"].build()
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(UnsupportedModelError, match="patches alone"):
        anatomy_of(model)


@pytest.mark.parametrize(("chosen", "layer"), [(-1, 3), (-2, 2), (4, 3), (2, 1), ([-2, 1, 3], 2)])
def test_cls_attention_is_of_the_last_feature_layer(chosen, layer):
    config = hf.LlavaConfig(vision_config=hf.CLIPVisionConfig(num_hidden_layers=4), vision_feature_layer=chosen)
    assert _feature_layer(config) == layer


@pytest.mark.parametrize(("name", "needed"), [("qwen2_vl", "image_grid_thw"), ("llava_next", "image_sizes")])
def test_pictures_whose_sizes_are_not_told(family_model, name, needed):
    picture_grids = anatomy_of(family_model(name)).picture_grids
    with pytest.raises(RealizationError, match=f"{needed} must come with the prompt"):
        picture_grids({})


@pytest.mark.parametrize("call", ["forward", "generate"])
@pytest.mark.parametrize("name", TAKES_VIDEO)
def test_videos(family_model, name, call):
    model, inputs = family_model(name), video_inputs(name)
    with prune(model, PLAN), pytest.raises(RealizationError, match="pictures only, got a video"):
        model(**inputs) if call == "forward" else model.generate(**inputs, max_new_tokens=2)


@pytest.mark.parametrize("how", ["ids", "embeddings"])
def test_pictures_on_a_filled_cache(family_model, how):
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    again = dict(inputs)
    if how == "embeddings":
        again["inputs_embeds"] = model.get_input_embeddings()(again.pop("input_ids"))
    with torch.no_grad(), prune(model, PLAN):
        cache = model(**inputs).past_key_values
        with pytest.raises(RealizationError, match="one prefill into an empty cache"):
            model(**again, past_key_values=cache)


@pytest.mark.parametrize("num_after", [1, 30])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "internvl"])
def test_a_second_turn_of_generate_after_a_stage_before_the_decoder(family_model, name, num_after):
    """It feeds the tokens that look uncached again: text alone, or pictures too, depending on what comes after them."""
    model, inputs = family_model(name), FAMILIES[name].inputs(1)
    with prune(model, BEFORE_DECODER):
        first = model.generate(**inputs, max_new_tokens=num_after, do_sample=False, return_dict_in_generate=True)
        carried = {n: t for n, t in inputs.items() if n not in ("pixel_values", "image_grid_thw", "input_ids")}
        asked = torch.cat((first.sequences, torch.tensor([[5, 9, 12]])), dim=1)
        for types in {"token_type_ids", "mm_token_type_ids"} & set(carried):
            carried[types] = (asked == FAMILIES[name].image_token).long()
        with pytest.raises(RealizationError, match=r"the new\s+tokens\s+alone"):
            model.generate(input_ids=asked, **carried, past_key_values=first.past_key_values, max_new_tokens=2)


def test_a_mask_of_ones_that_is_too_short(family_model):
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    with torch.no_grad(), prune(model, PLAN):
        cache = model(**inputs).past_key_values
        with pytest.raises(RealizationError, match="whole unpruned sequence"):
            model(input_ids=torch.tensor([[3]]), attention_mask=torch.ones(1, 7), past_key_values=cache)


def test_assisted_generation_which_crops_the_cache(family_model):
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    inputs["input_ids"][0, -6:] = torch.tensor([7, 8, 7, 8, 7, 8])  # something to look up
    settings = {"max_new_tokens": 20, "do_sample": False, "prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 1}
    with prune(model, PLAN), pytest.raises(RealizationError, match="assisted generation"):
        model.generate(**inputs, **settings)


def test_a_pruned_cache_without_its_record(family_model):
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    with torch.no_grad(), prune(model, PLAN):
        cache = model(**inputs).past_key_values
        rebuilt = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
        with pytest.raises(RealizationError, match="no record of it"):
            model(input_ids=torch.tensor([[3]]), past_key_values=rebuilt)


def test_a_cache_that_was_emptied_is_dense_again_after_a_dense_prefill(family_model):
    """The record of an earlier pruned prefill goes with it."""
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    token = torch.tensor([[3]])
    with torch.no_grad():
        dense = model(input_ids=token, past_key_values=model(**inputs).past_key_values).logits
        with prune(model, PLAN):
            cache = model(**inputs).past_key_values
        cache.crop(0)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        with prune(model, Plan(stages=())):
            model(**inputs, past_key_values=cache)
            torch.testing.assert_close(model(input_ids=token, past_key_values=cache).logits, dense)


def test_a_conditional_stage_that_stays_off_does_not_stop_the_next(family_model):
    """Both stages round to the same count; the second still has something to remove."""
    model, inputs = family_model("llava"), FAMILIES["llava"].inputs(1)
    never = Stage(layer=1, keep=0.31, selector="uniform", attention_below=0.0)
    with torch.no_grad(), prune(model, Plan(stages=(never, Stage(layer=3, keep=0.3, selector="uniform")))) as trace:
        model(**inputs)
    assert trace.counts == (25, 25, 25, 8)


def test_a_selector_that_returns_a_list(family_model, monkeypatch):
    monkeypatch.setitem(SELECTORS, "mine", lambda tokens, num_keep, stage: [0, 1])
    plan = Plan(stages=(Stage(layer=1, keep=0.5, selector="mine"),))
    with prune(family_model("llava"), plan), pytest.raises(RealizationError, match=r"int64 indices.*got list"):
        family_model("llava")(**FAMILIES["llava"].inputs(1))


@pytest.mark.parametrize("selector", [None, 3, "", "two words"])
def test_selectors_without_a_name(selector):
    with pytest.raises(PlanError, match="selector must be a name"):
        Stage(layer=0, keep=0.5, selector=selector)
