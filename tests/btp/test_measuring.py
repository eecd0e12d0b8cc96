"""Calibration, encoded prefixes and latency: what surrounds pruning."""

import pytest
import torch

from btp import (
    Plan,
    PlanError,
    RealizationError,
    Stage,
    cosine_shift,
    device_key,
    encode_images,
    measure,
    prune,
    stage_layers,
    withdrawal_layer,
)
from btp.latency import LatencyBlocks, percentile

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


def test_measure_returns_pairs_and_leaves_the_model_alone(llava, inputs_for, device):
    model, inputs = llava(device=device), inputs_for(2, padding="left", device=device)
    with torch.no_grad():
        before = model(**inputs).logits
        blocks = measure(model, inputs, PLAN, repeats=4, warmup=1)
        assert torch.equal(model(**inputs).logits, before)
    assert len(blocks.dense_ms) == len(blocks.pruned_ms) == len(blocks.ratios) == len(blocks.first_token_ratios) == 4
    assert len(blocks.dense_prefill_ms) == len(blocks.dense_first_token_ms) == 5
    assert all(value > 0 for value in (*blocks.dense_ms, *blocks.pruned_ms))
    assert all(whole > part for whole, part in zip(blocks.pruned_first_token_ms, blocks.pruned_prefill_ms, strict=True))
    assert blocks.dense_p50_ms <= blocks.dense_p95_ms
    assert blocks.pruned_p50_ms <= blocks.pruned_p95_ms


def test_pairs_are_with_the_dense_neighbours():
    blocks = LatencyBlocks(
        dense_prefill_ms=(10.0, 20.0, 40.0),
        pruned_prefill_ms=(15.0, 15.0),
        dense_first_token_ms=(20.0, 20.0, 20.0),
        pruned_first_token_ms=(10.0, 30.0),
    )
    assert blocks.dense_ms == (15.0, 30.0)
    assert blocks.ratios == (1.0, 0.5)
    assert blocks.first_token_ratios == (0.5, 1.5)
    assert blocks.ratio_p50 == 0.75
    assert blocks.dense_p50_ms == 20.0


def test_percentiles_interpolate():
    assert percentile((3.0, 1.0, 2.0), 50) == 2.0
    assert percentile((1.0, 2.0), 95) == pytest.approx(1.95)
    assert percentile((7.0,), 95) == 7.0


def test_measure_refuses_no_repeats(llava, inputs_for):
    with pytest.raises(PlanError, match="repeats must be at least 1"):
        measure(llava(), inputs_for(), PLAN, repeats=0)


def test_the_device_key_names_the_workload(llava, inputs_for):
    inputs = inputs_for(2)
    key = device_key(llava("eager"), inputs)
    assert (key.attention, key.dtype, key.batch_size, key.image_tokens) == ("eager", "float32", 2, 25)
    assert key.prompt_tokens == inputs["input_ids"].shape[1]
    assert key.torch == str(torch.__version__)
    assert (key.cuda, key.driver) == ("none", "none")
    assert key.slug != "unknown-device"
