"""What selectors get to read beyond hidden states: [CLS] attention, keys, text; and encoded pictures that keep it."""

import inspect

import pytest
import torch
from torch.nn.functional import avg_pool2d
from transformers import LlavaForConditionalGeneration
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from btp import Plan, RealizationError, Stage, encode_images, prune
from btp.encoding import join_pictures, notes_of, split_pictures
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES

TAKES_ENCODED = "mm_encoder_outputs" in inspect.signature(LlavaForConditionalGeneration.forward).parameters
takes_encoded = pytest.mark.skipif(not TAKES_ENCODED, reason="this transformers takes no encoded pictures")
PLAN = Plan(stages=(Stage(layer=1, keep=0.6, selector="spy"), Stage(layer=2, keep=0.2, selector="spy")))


@pytest.fixture
def views(monkeypatch):
    """What a selector that keeps the last tokens was shown, a stage each."""
    seen = []

    def spy(tokens, num_keep, stage):
        seen.append(tokens)
        tokens.hidden, tokens.attention, tokens.key_norm, tokens.text, tokens.cls_attention  # noqa: B018  (read now)
        num_tokens = tokens.origin_BN.shape[1]
        return torch.arange(num_tokens - num_keep, num_tokens).expand(len(tokens.origin_BN), -1)

    monkeypatch.setitem(SELECTORS, "spy", spy)
    return seen


def naive_cls(name, model, inputs):
    """The encoder's own attention weights, from [CLS] to the patches, in the order of the image tokens. (B, N)"""
    pixels = inputs["pixel_values"]
    if name == "llava_next":
        counts = [image_size_to_num_patches(size, [[16, 32], [48, 16]], 16) for size in inputs["image_sizes"]]
        pixels = torch.cat([views[:count] for views, count in zip(pixels, counts, strict=True)])
    attentions = model.model.vision_tower(pixels, output_attentions=True).attentions
    layer = {"llava": -1, "llava_next": -2, "internvl": -1}[name]
    weight = attentions[layer].mean(dim=1)[:, 0, 1:]
    if name == "internvl":
        weight = avg_pool2d(weight.view(-1, 1, 6, 6), 2)
    if name == "llava_next":
        weight = torch.cat(
            [
                stitched(part, size)
                for part, size in zip(weight.split(counts), inputs["image_sizes"].tolist(), strict=True)
            ]
        )
    return weight.reshape(len(inputs["input_ids"]), -1)


def stitched(weight, size):
    """Base view, then the tiles side by side, cut to the picture, a newline's zero after every row."""
    down, across = {(16, 32): (1, 2), (48, 8): (3, 1)}[tuple(size)]
    rows = []
    for row in range(4 * down):
        tiles = [weight[1 + row // 4 * across + tile].view(4, 4)[row % 4] for tile in range(across)]
        line = torch.cat(tiles)
        rows.append(torch.cat((line[1:-1] if tuple(size) == (48, 8) else line, torch.zeros(1))))
    return torch.cat((weight[0], *rows))


@pytest.mark.parametrize("how", ["forward", "generate", "beams", "encoded", "encoded and generated"])
@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl"])
def test_cls_attention_is_the_encoders_own(family_model, views, name, how):
    model, inputs = family_model(name, "eager"), FAMILIES[name].inputs(2, padding="left")
    with torch.no_grad():
        wanted = naive_cls(name, model, inputs)
        given = encode_images(model, inputs) if how.startswith("encoded") else inputs
        with prune(model, PLAN) as trace:
            if how in ("forward", "encoded"):
                model(**given)
            else:
                model.generate(**given, max_new_tokens=2, do_sample=False, num_beams=3 if how == "beams" else 1)
    assert trace.counts[0] == wanted.shape[1]
    if how == "beams":
        wanted = wanted.repeat_interleave(3, dim=0)
    for view in views:
        torch.testing.assert_close(view.cls_attention, wanted.gather(1, view.origin_BN), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_5_vl", "gemma3", "smolvlm"])
def test_an_encoder_without_cls_says_so(family_model, views, name):
    with prune(family_model(name), PLAN):
        family_model(name)(**FAMILIES[name].inputs(2))
    assert [view.cls_attention for view in views] == [None, None]


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_keys_and_text_are_the_layers_own(family_model, views, name, padding):
    """Key norms against a dense cache, which holds the rotated keys; text against the ids."""
    model, inputs = family_model(name), FAMILIES[name].inputs(3, padding=padding)
    stage = Stage(layer=1, keep=0.6, selector="spy")
    with torch.no_grad():
        key_norm = model(**inputs).past_key_values.layers[1].keys.abs().sum(dim=(1, 3))
        with prune(model, Plan(stages=(stage,))):
            model(**inputs)
    (view,), is_image = views, inputs["input_ids"] == FAMILIES[name].image_token
    torch.testing.assert_close(view.key_norm, key_norm[is_image].view(3, -1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(view.text.key_norm_BT, key_norm[~is_image].view(3, -1), rtol=1e-4, atol=1e-4)
    for row in range(3):
        after = int(is_image[row].nonzero().max())
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row].bool()
        wanted = [place > after and bool(real[place]) for place in range(len(real)) if not is_image[row, place]]
        assert view.text.instruction_BT[row].tolist() == wanted


@takes_encoded
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_encoded_pictures_prune_as_pixels_do(family_model, views, name):
    model, inputs = family_model(name), FAMILIES[name].inputs(2)
    with torch.no_grad(), prune(model, PLAN):
        wanted = model(**inputs).logits
        encoded = encode_images(model, inputs)
        assert "pixel_values" not in encoded
        assert torch.equal(model(**encoded).logits, wanted)
    assert [view.grids for view in views[:2]] == [view.grids for view in views[2:]]
    assert "get_image_features" not in vars(model.model)


@takes_encoded
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_pictures_come_apart_and_together_again(family_model, views, name):
    model, family = family_model(name), FAMILIES[name]
    inputs = family.inputs(2)
    with torch.no_grad(), prune(model, PLAN):
        wanted = model(**inputs).logits
        encoded = encode_images(model, inputs)
        pictures = split_pictures(encoded["mm_encoder_outputs"]["image"])
        if name in ("gemma3", "internvl", "qwen3_vl"):  # one tensor of all pictures, or more to them than features
            assert pictures is None
            return
        assert len(pictures) == 2
        encoded["mm_encoder_outputs"] = {"image": join_pictures(pictures)}
        assert torch.equal(model(**encoded).logits, wanted)
    for before, after in zip(views[:2], views[2:], strict=True):
        assert before.grids == after.grids
        assert (before.cls_attention is None) == (after.cls_attention is None)
        if before.cls_attention is not None:
            assert torch.equal(before.cls_attention, after.cls_attention)


@takes_encoded
def test_pictures_encoded_out_of_sight_are_refused_where_their_grids_vary(family_model, views):
    model, inputs = family_model("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(2)
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values"), inputs["image_grid_thw"], return_dict=True)
        assert notes_of(features) is None
        with prune(model, PLAN), pytest.raises(RealizationError, match=r"btp\.encode_images"):
            model(**inputs, mm_encoder_outputs={"image": features})


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_attention_is_what_the_layer_gives_out(family_model, views, name, padding):
    """Against the eager kernel's own weights, in a sliding and in a full layer."""
    model, inputs = family_model(name, "eager"), FAMILIES[name].inputs(3, padding=padding)
    for layer in (1, 2):
        with torch.no_grad():
            weights = model(**inputs, output_attentions=True).attentions[layer]
            with prune(model, Plan(stages=(Stage(layer=layer, keep=0.6, selector="spy"),))):
                model(**inputs)
        is_image = inputs["input_ids"] == FAMILIES[name].image_token
        for row in range(3):
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[row]
            last = int(mask.nonzero().max())
            wanted = weights[row, :, last].mean(dim=0)[is_image[row]]
            torch.testing.assert_close(views[-1].attention.softmax[row], wanted, rtol=1e-4, atol=1e-5)
