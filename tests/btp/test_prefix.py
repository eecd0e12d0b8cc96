"""A resumed prefill is the plain one, bit by bit, and the layers before the first stage do not run again."""

from contextlib import contextmanager

import pytest
import torch

from btp import Plan, RealizationError, Stage, prune
from btp.prefix import DensePrefix, cache_of_rows, encode_images, resume
from tests.btp.families import FAMILIES, NUM_LAYERS, decoder_layers

NUM_TOKENS = 4


def plan_of(*stages, selector="balanced", positions="keep"):
    made = (Stage(layer=layer, keep=keep, selector=selector, oversample=1.5) for layer, keep in stages)
    return Plan(stages=tuple(made), positions=positions)


PLANS = (
    plan_of((3, 0.5)),
    plan_of((1, 0.5), (3, 0.2)),
    plan_of((2, 0.0)),
    plan_of((2, 0.4), positions="reset"),
    plan_of((0, 0.5), (2, 0.2)),
    plan_of((2, 0.5), selector="joint"),
    plan_of(),
)


def logits_of(model, inputs):
    """Of every greedy step. (steps, B, V)"""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return torch.stack(model.generate(**inputs, max_new_tokens=NUM_TOKENS, **settings).logits)


@contextmanager
def counted_layers(model):
    """Which layers ran, by number, in a list that grows."""
    ran = []
    handles = [
        layer.self_attn.register_forward_hook(lambda *_, number=number: ran.append(number))
        for number, layer in enumerate(decoder_layers(model))
    ]
    try:
        yield ran
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_resuming_changes_no_bit(family_model, name, kernel, padding):
    model, inputs, prefix = family_model(name, kernel), FAMILIES[name].inputs(3, padding, seed=1), DensePrefix()
    for plan in PLANS * 2:  # deeper than what is kept, shallower, and the second time all of it
        with torch.inference_mode(), prune(model, plan) as trace:
            plain = logits_of(model, inputs)
            alive = trace.alive
            with resume(model, plan, prefix):
                resumed = logits_of(model, inputs)
        assert torch.equal(plain, resumed)
        assert all(torch.equal(one, other) for one, other in zip(alive, trace.alive, strict=True))
    assert prefix.depths == (1, 2, 3)


def test_resuming_changes_no_bit_under_flash_attention(family_model, flash_convention):
    model, inputs, prefix = (
        family_model("llava", "flash_attention_2"),
        FAMILIES["llava"].inputs(3, "left"),
        DensePrefix(),
    )
    for plan in PLANS:
        with torch.inference_mode(), prune(model, plan):
            plain = logits_of(model, inputs)
            with resume(model, plan, prefix):
                assert torch.equal(plain, logits_of(model, inputs))


def test_each_layer_before_the_first_stage_runs_once(llava, inputs_for):
    model, inputs, prefix = llava("sdpa"), inputs_for(2), DensePrefix()

    def ran(plan):
        with torch.inference_mode(), prune(model, plan), resume(model, plan, prefix), counted_layers(model) as numbers:
            model(**inputs, use_cache=True)
        return numbers

    assert ran(plan_of((2, 0.5))) == [0, 1, 2, 3]
    assert ran(plan_of((2, 0.3))) == [2, 3]
    assert ran(plan_of((3, 0.5))) == [2, 3]
    assert ran(plan_of((3, 0.2))) == [3]
    assert ran(plan_of((1, 0.5))) == [0, 1, 2, 3]  # what entered layer 1 was not kept, as no plan had asked for it
    assert ran(plan_of((1, 0.5))) == [1, 2, 3]
    assert ran(plan_of()) == [3]
    assert ran(plan_of((0, 0.5))) == [0, 1, 2, 3]
    assert prefix.depths == (1, 2, 3)


def test_a_saved_prefix_is_the_same(llava, inputs_for, tmp_path):
    model, inputs, prefix, plan = llava("sdpa"), inputs_for(2), DensePrefix(), plan_of((2, 0.5))
    with torch.inference_mode(), prune(model, plan):
        with resume(model, plan, prefix):
            logits = logits_of(model, inputs)
        prefix.save(tmp_path / "prefix.pt")
        loaded = DensePrefix.load(tmp_path / "prefix.pt", "cpu")
        with resume(model, plan, loaded), counted_layers(model) as ran:
            assert torch.equal(logits, logits_of(model, inputs))
    assert ran[:2] == [2, 3]
    assert loaded.num_bytes == prefix.num_bytes > 0
    assert loaded.depths == (2,)


def test_other_inputs_are_refused(llava, inputs_for):
    model, prefix, plan = llava("sdpa"), DensePrefix(), plan_of((2, 0.5))
    with torch.inference_mode(), prune(model, plan), resume(model, plan, prefix):
        model(**inputs_for(2), use_cache=True)
    with (
        torch.inference_mode(),
        prune(model, plan),
        resume(model, plan, prefix),
        pytest.raises(RealizationError, match="a DensePrefix of its own"),
    ):
        model(**inputs_for(3), use_cache=True)
    earlier = plan_of((1, 0.5))
    with (
        torch.inference_mode(),
        prune(model, earlier),
        resume(model, plan, prefix),
        pytest.raises(RealizationError, match="the same plan"),
    ):
        model(**inputs_for(2), use_cache=True)


def test_a_forward_without_a_cache_runs_every_layer(llava, inputs_for):
    model, inputs, prefix, plan = llava("sdpa"), inputs_for(2), DensePrefix(), plan_of((2, 0.5))
    with torch.inference_mode(), prune(model, plan), resume(model, plan, prefix), counted_layers(model) as ran:
        model(**inputs, use_cache=True)
        model(**inputs, use_cache=False)
    assert ran == [*range(NUM_LAYERS)] * 2


def test_no_trace_is_left(llava, inputs_for):
    model, inputs, plan = llava("sdpa"), inputs_for(2), plan_of((2, 0.5))
    layers = decoder_layers(model)
    layers[0].forward = original = layers[0].forward  # as if someone else had shadowed it before
    try:
        with pytest.raises(KeyError), torch.inference_mode(), prune(model, plan), resume(model, plan, DensePrefix()):
            raise KeyError
        assert vars(layers[0])["forward"] is original
        assert not any("forward" in vars(layer) for layer in layers[1:])
    finally:
        del layers[0].forward
    with torch.no_grad():
        model(**inputs)


@pytest.mark.parametrize("positions", ["keep", "reset"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_rows_taken_from_a_cache_go_on_alike_and_leave_it_as_it_is(llava, inputs_for, padding, positions):
    model, inputs, rows = llava("sdpa"), inputs_for(3, padding=padding), [2, 0, 0, 1]
    plan = plan_of((0, 0.6), (2, 0.3), positions=positions)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))

    def after(cache, rows, token):
        seen = torch.cat((mask[rows], torch.ones(len(rows), 1, dtype=mask.dtype)), dim=1)
        position = seen.sum(dim=1, keepdim=True) - 1
        fed = {"input_ids": torch.full((len(rows), 1), token), "attention_mask": seen, "position_ids": position}
        return model(**fed, past_key_values=cache, use_cache=True).logits[:, -1]

    with torch.inference_mode(), prune(model, plan):
        cache = model(**inputs, use_cache=True).past_key_values
        taken = cache_of_rows(cache, rows, NUM_LAYERS)
        same = cache_of_rows(cache, [0, 1, 2], NUM_LAYERS)
        other = after(taken, rows, 7)
        plain = after(same, [0, 1, 2], 5)
        assert cache.get_seq_length(0) == same.get_seq_length(0) - 1
        assert torch.equal(after(cache, [0, 1, 2], 5), plain)
        again = model(**inputs, use_cache=True).past_key_values
        torch.testing.assert_close(other, after(again, [0, 1, 2], 7)[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_resuming_changes_no_bit_on_cuda(family_model):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    model = family_model("llava", "sdpa", "cuda")
    inputs, prefix = encode_images(model, FAMILIES["llava"].inputs(3, "left", device="cuda")), DensePrefix()
    for plan in PLANS * 2:
        with torch.inference_mode(), prune(model, plan):
            plain = logits_of(model, {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})
            with resume(model, plan, prefix):
                resumed = logits_of(model, {**inputs, "mm_encoder_outputs": dict(inputs["mm_encoder_outputs"])})
        assert torch.equal(plain, resumed)
