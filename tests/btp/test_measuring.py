"""Calibration and encoded prefixes: what surrounds pruning."""

import pytest
import torch

from btp import (
    Plan,
    PlanError,
    RealizationError,
    Stage,
    cosine_shift,
    encode_images,
    prune,
    stage_layers,
    withdrawal_layer,
)

PLAN = Plan(stages=(Stage(layer=1, keep=0.5),))


def test_cosine_shift_counts_the_tokens_a_layer_turns(llava, inputs_for):
    model = llava()
    batches = [inputs_for(2, padding="left"), inputs_for(1, seed=4)]
    for tau in (-1.0, 0.8, 1.1):
        assert cosine_shift(model, batches, tau=tau) == naive_shift(model, batches, tau)
    assert cosine_shift(model, batches, tau=1.1) == [75] * 4
    assert cosine_shift(model, batches, tau=-1.1) == [0] * 4


@torch.no_grad()
def naive_shift(model, batches, tau):
    """From the states that transformers gives out; the last layer's come before the final norm."""
    counts = [0] * 4
    norm = model.model.language_model.norm
    for batch in batches:
        last = []
        handle = norm.register_forward_pre_hook(lambda module, args, last=last: last.append(args[0]))
        states = [*model(**batch, output_hidden_states=True).hidden_states[:4], *last]
        handle.remove()
        is_image = batch["input_ids"] == 63
        for i in range(4):
            before, after = states[i][is_image].double(), states[i + 1][is_image].double()
            cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
            counts[i] += int((cosine < tau).sum())
    return counts


def test_withdrawal_is_the_earliest_layer_close_enough_to_dense(llava, inputs_for):
    model, batches = llava(), [inputs_for(2, padding="left"), inputs_for(1, seed=4)]
    divergence = {layer: naive_divergence(model, batches, layer) for layer in (1, 2, 3)}
    assert all(kl > 0 for kl in divergence.values())
    for limit in (*divergence.values(), max(divergence.values()) * 2, min(divergence.values()) / 2):
        near = [layer for layer, kl in divergence.items() if kl <= limit * (1 + 1e-4)]
        if near:
            assert withdrawal_layer(model, batches, limit * (1 + 1e-4)) == near[0]
        else:
            with pytest.raises(PlanError, match="none does; raise max_kl"):
                withdrawal_layer(model, batches, limit * (1 + 1e-4))


def test_calibration_needs_images_and_the_dense_model(llava, inputs_for):
    model, text = llava(), {"input_ids": torch.tensor([[1, 5, 9]])}
    for batches in ([], [text]):
        with pytest.raises(RealizationError, match="prompts with images"):
            cosine_shift(model, batches)
        with pytest.raises(RealizationError, match="prompts with images"):
            withdrawal_layer(model, batches)
    with prune(model, PLAN), pytest.raises(RealizationError, match="dense model"):
        cosine_shift(model, [inputs_for()])


@torch.no_grad()
def naive_divergence(model, batches, layer):
    """Mean over prompts of sum p log(p / q), in float64 over the vocabulary, from the whole logits."""
    divergences = []
    for batch in batches:
        dense = model(**batch).logits[:, -1].double().softmax(dim=-1)
        with prune(model, Plan(stages=(Stage(layer=layer, keep=0.0),))):
            blind = model(**batch).logits[:, -1].double().softmax(dim=-1)
        for p_V, q_V in zip(dense, blind, strict=True):
            divergences.append(sum(p * (p / q).log() for p, q in zip(p_V, q_V, strict=True)))
    return float(sum(divergences) / len(divergences))


@pytest.mark.parametrize(
    ("shifts", "num_stages", "layers"),
    [
        ([0, 5, 1, 3, 2, 9, 4], 2, (2, 6)),
        ([0, 5, 1, 3, 2, 9, 4], 3, (2, 4, 6)),
        ([0, 5, 1, 3, 2, 9, 4], 4, (2, 4, 5, 6)),  # no fourth peak: the highest of the rest
        ([9, 1, 1, 1], 1, (1,)),
        ([1, 2, 3, 9], 1, (3,)),  # nothing can be pruned after the last layer
        ([4, 4, 4, 4], 2, (1, 2)),
        ([1, 2], 0, ()),
    ],
)
def test_stages_come_right_after_the_peaks(shifts, num_stages, layers):
    assert stage_layers(shifts, num_stages) == layers


def test_more_stages_than_layers_are_refused():
    with pytest.raises(PlanError, match="one less than the model's 3 layers, got 3"):
        stage_layers([1, 2, 3], 3)


def test_encoded_images_replace_pixels(llava, inputs_for):
    model, inputs = llava(), inputs_for(2, padding="left")
    encoded = encode_images(model, inputs)
    if "mm_encoder_outputs" not in encoded:
        pytest.skip("this transformers takes no encoded images")
    assert "pixel_values" not in encoded
    with torch.no_grad():
        assert torch.equal(model(**encoded).logits, model(**inputs).logits)
        with prune(model, PLAN) as trace:
            assert torch.equal(model(**encoded).logits, model(**inputs).logits)
            text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(model.generate(**encoded, max_new_tokens=3, do_sample=False), text)
    assert trace.counts == (25, 13, 13, 13)


def test_without_pixels_or_support_inputs_stay(llava, inputs_for, monkeypatch):
    model = llava()
    assert encode_images(model, {"input_ids": 1}) == {"input_ids": 1}
    monkeypatch.setattr(model, "forward", lambda input_ids, pixel_values: None)
    inputs = inputs_for()
    assert encode_images(model, inputs) == inputs
