"""The life cycle of `prune`: no trace left, no silent no-op, and errors that name the way out."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from btp import Plan, PlanError, RealizationError, Stage, UnsupportedModelError, prune
from btp.prefill import Prefill
from btp.selection import SELECTORS

PLAN = Plan(stages=(Stage(layer=1, keep=0.6), Stage(layer=3, keep=0.3)))


def num_hooks(model):
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "plan", [Plan(stages=()), Plan(stages=(Stage(layer=1, keep=1.0),)), Plan(stages=(Stage(layer=0, keep=0.99),))]
)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_keeping_all_tokens_is_bit_identical(llava, inputs_for, kernel, plan, padding):
    model, inputs = llava(kernel), inputs_for(2, padding=padding)
    dense, dense_text = logits_of(model, inputs), model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with prune(model, plan) as trace:
        assert torch.equal(logits_of(model, inputs), dense)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), dense_text)
    assert trace.counts == (25,) * 4


def test_a_stage_that_removes_nothing_asks_no_selector(llava, inputs_for, monkeypatch):
    monkeypatch.setitem(SELECTORS, "uniform", None)  # calling it would fail
    plan = Plan(stages=(Stage(layer=1, keep=1.0, selector="uniform"), Stage(layer=2, keep=0.99, selector="uniform")))
    with prune(llava(), plan) as trace:
        logits_of(llava(), inputs_for())
    assert trace.counts == (25,) * 4


def test_nothing_is_left_behind(llava, inputs_for):
    model, inputs = llava(), inputs_for(2, padding="left")
    before, hooks = logits_of(model, inputs), num_hooks(model)
    with prune(model, PLAN):
        assert logits_of(model, inputs).shape[1] < before.shape[1]
    assert num_hooks(model) == hooks
    assert torch.equal(logits_of(model, inputs), before)


def test_nothing_is_left_behind_by_an_exception(llava, inputs_for):
    model, inputs = llava(), inputs_for()
    before, hooks = logits_of(model, inputs), num_hooks(model)
    with pytest.raises(KeyError), prune(model, PLAN):
        raise KeyError
    with pytest.raises(RealizationError), prune(model, PLAN):
        model(**inputs, labels=inputs["input_ids"])
    assert num_hooks(model) == hooks
    assert torch.equal(logits_of(model, inputs), before)
    with prune(model, PLAN):  # and it can be pruned again
        logits_of(model, inputs)


def test_a_forward_that_fails_midway_does_not_spoil_the_next(llava, inputs_for, monkeypatch):
    model, inputs = llava(), inputs_for()

    def broken(tokens, num_keep, stage):
        raise ValueError("broken")

    with prune(model, PLAN) as trace:
        wanted = logits_of(model, inputs)
        with monkeypatch.context() as patch:
            patch.setitem(SELECTORS, "balanced", broken)
            with pytest.raises(ValueError, match="broken"):
                logits_of(model, inputs)
        assert torch.equal(logits_of(model, inputs), wanted)
    assert trace.counts == (25, 15, 15, 8)


def test_the_trace_tells_the_nested_survivors_of_the_latest_prefill(llava, inputs_for):
    model = llava()
    with prune(model, PLAN) as trace:
        logits_of(model, inputs_for(1))
        assert [tuple(alive.shape) for alive in trace.alive] == [(1, 25), (1, 15), (1, 15), (1, 8)]
        model.generate(**inputs_for(3), max_new_tokens=3)
    assert trace.num_image_tokens == 25
    assert trace.counts == (25, 15, 15, 8) == (25, *PLAN.num_kept(25)[:1] * 2, PLAN.num_kept(25)[1])
    for row in range(3):
        outer, inner = set(trace.alive[1][row].tolist()), set(trace.alive[3][row].tolist())
        assert inner < outer < set(range(25))
    assert all((alive.diff(dim=1) > 0).all() for alive in trace.alive)


def test_text_only_prompts_pass_untouched(llava):
    model, inputs = llava(), {"input_ids": torch.tensor([[1, 5, 9, 12]])}
    dense = logits_of(model, inputs)
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with prune(model, PLAN) as trace:
        assert torch.equal(logits_of(model, inputs), dense)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), text)
    assert trace.num_image_tokens == 0
    assert trace.counts == ()


def test_a_dense_cache_from_outside_decodes_densely(llava, inputs_for):
    model, inputs = llava(), inputs_for()
    token = torch.tensor([[7]])
    with torch.no_grad():
        first = model(**inputs, use_cache=True).past_key_values
        dense = model(input_ids=token, past_key_values=first).logits
        second = model(**inputs, use_cache=True).past_key_values
        with prune(model, PLAN):
            assert torch.equal(model(input_ids=token, past_key_values=second).logits, dense)


def test_two_generations_can_take_turns(llava, inputs_for):
    model, token = llava(), torch.tensor([[7]])
    prompts = [inputs_for(1, seed=seed) for seed in (1, 2)]

    def step(cache):
        return model(input_ids=token, past_key_values=cache, use_cache=True).logits

    with torch.no_grad(), prune(model, PLAN):
        alone = [step(model(**prompt, use_cache=True).past_key_values) for prompt in prompts]
        caches = [model(**prompt, use_cache=True).past_key_values for prompt in prompts]
        together = [step(cache) for cache in caches]
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_reset_positions_equal_a_prompt_without_gaps(llava, inputs_for):
    """From layer 0 on, dropped and renumbered is the same as never having been there."""
    model, inputs = llava(), inputs_for(2, padding="left")
    plan = Plan(stages=(Stage(layer=0, keep=0.4, selector="uniform"),), positions="reset")
    with torch.no_grad():
        with prune(model, plan) as trace:
            pruned = model.generate(
                **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        is_image = inputs["input_ids"] == 63
        features = torch.cat(model.get_image_features(inputs["pixel_values"]).pooler_output)
        embeds[is_image] = features
        kept = ~is_image
        for row in range(2):
            kept[row, is_image[row].nonzero().squeeze(1)[trace.alive[0][row]]] = True
        short = {
            "inputs_embeds": torch.stack([embeds[row][kept[row]] for row in range(2)]),
            "attention_mask": torch.stack([inputs["attention_mask"][row][kept[row]] for row in range(2)]),
        }
        plain = model.generate(
            **short, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    torch.testing.assert_close(torch.stack(pruned.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["none", "left"])
def test_reset_positions_decode_as_a_longer_prefill_does(llava, inputs_for, padding):
    """Decoding a text token equals having had it in the prompt: positions continue at every depth."""
    model, inputs = llava(), inputs_for(2, padding=padding)
    stages = (Stage(layer=1, keep=0.5, selector="uniform"), Stage(layer=3, keep=0.2, selector="uniform"))
    answer = torch.tensor([[5, 9], [40, 3]])
    longer = {**inputs, "input_ids": torch.cat((inputs["input_ids"], answer), dim=1)}
    if padding != "none":
        longer["attention_mask"] = torch.cat((inputs["attention_mask"], torch.ones_like(answer)), dim=1)
    with torch.no_grad(), prune(model, Plan(stages=stages, positions="reset")):
        whole = model(**longer).logits[:, -2:]
        cache = model(**inputs, use_cache=True).past_key_values
        parts = model(input_ids=answer, attention_mask=longer.get("attention_mask"), past_key_values=cache).logits
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), prune(model, Plan(stages=stages)):
        assert not torch.allclose(model(**longer).logits[:, -2:], whole, atol=1e-3)  # the option does something


def test_several_images_count_as_one_tall_grid(llava, inputs_for):
    model, one = llava(), inputs_for(1)
    ids = torch.cat((one["input_ids"], one["input_ids"][:, 1:]), dim=1)
    pixels = torch.cat((one["pixel_values"], one["pixel_values"] + 1))
    with prune(model, PLAN) as trace:
        logits_of(model, {"input_ids": ids, "pixel_values": pixels})
    assert trace.num_image_tokens == 50
    assert trace.counts == (50, 30, 30, 15)


def test_the_hidden_states_of_every_layer_are_given_out(llava, inputs_for):
    model, inputs = llava(), inputs_for(1)
    length = inputs["input_ids"].shape[1]
    with torch.no_grad(), prune(model, PLAN):
        lengths = [states.shape[1] for states in model(**inputs, output_hidden_states=True).hidden_states]
    assert lengths[-1] == length - 17
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_half_precision_runs_in_half_precision(kernel, llava, inputs_for):
    model = copy.deepcopy(llava(kernel)).to(torch.bfloat16)
    inputs = inputs_for(2, padding="left")
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    with torch.no_grad(), prune(model, PLAN) as trace:
        logits = model(**inputs).logits
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()
    assert trace.counts == (25, 15, 15, 8)


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_a_conditional_stage_is_carried_out_where_both_shares_are_low(llava, inputs_for, padding):
    model, inputs = llava("eager"), inputs_for(3, padding=padding)
    shares = naive_shares(model, inputs, layer=2)
    assert shares.min() > 0
    for limit in (shares.max() * 1.001, shares.max() * 0.999):
        drop = Stage(layer=2, keep=0.0, attention_below=float(limit))
        with prune(model, Plan(stages=(drop,))) as trace:
            logits_of(model, inputs)
            text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        due = bool((shares < limit).all())
        assert trace.counts == ((25, 25, 0, 0) if due else (25,) * 4)
        assert trace.dense is not due
        with prune(model, Plan(stages=(Stage(layer=2, keep=0.0),) if due else ())):
            assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), text)


def test_a_skipped_stage_leaves_the_later_ones_standing(llava, inputs_for):
    never = Stage(layer=1, keep=0.6, attention_below=0.0)
    with prune(llava(), Plan(stages=(never, Stage(layer=3, keep=0.3)))) as trace:
        logits_of(llava(), inputs_for())
    assert trace.counts == (25, 25, 25, 8)


@torch.no_grad()
def naive_shares(model, inputs, layer):
    """Text to image and image to text, from the attention matrices that the eager kernel gives out. (B, 2)"""
    weights = model(**inputs, output_attentions=True).attentions[layer].double().mean(dim=1)
    rows = []
    for row, ids in enumerate(inputs["input_ids"].tolist()):
        mask = inputs.get("attention_mask")
        real = [mask is None or bool(mask[row, place]) for place in range(len(ids))]
        image = [place for place, token in enumerate(ids) if token == 63]
        text = [place for place, token in enumerate(ids) if token != 63 and real[place]]
        asked = [place for place in text if place > image[-1]]
        to_image = [sum(float(weights[row, query, key]) for key in image) for query in asked]
        to_text = [sum(float(weights[row, query, key]) for key in text[1:]) for query in image]
        rows.append((sum(to_image) / len(asked), sum(to_text) / len(image)))
    return torch.tensor(rows)


@pytest.mark.gpu
@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_no_layer_waits_for_the_device(llava, inputs_for, monkeypatch, selector):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    model, inputs = llava(device="cuda"), inputs_for(2, padding="left", device="cuda")
    enter_layer = Prefill.enter_layer

    def strict(self, layer, hidden, kwargs):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return enter_layer(self, layer, hidden, kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    plan = Plan(stages=(Stage(layer=1, keep=0.6, selector=selector), Stage(layer=3, keep=0.3, selector=selector)))
    with prune(model, plan) as trace:
        logits_of(model, inputs)  # fills the per-grid tables
        monkeypatch.setattr(Prefill, "enter_layer", strict)
        logits_of(model, inputs)
    assert trace.counts == (25, 15, 15, 8)


class TestRefusals:
    def test_unknown_selectors_name_the_known(self, llava):
        plan = Plan(stages=(Stage(layer=1, keep=0.5, selector="magic"),))
        with pytest.raises(PlanError, match=r"balanced.*got 'magic'"), prune(llava(), plan):
            pass

    def test_layers_past_the_end(self, llava):
        with (
            pytest.raises(PlanError, match="below the model's 4 layers, got 4"),
            prune(llava(), Plan(stages=(Stage(layer=4, keep=0.5),))),
        ):
            pass

    def test_no_plan(self, llava):
        with (
            pytest.raises(PlanError, match=r"must be a btp\.Plan, a btp\.Profile, a path or a reference, got dict"),
            prune(llava(), {"stages": []}),
        ):
            pass

    def test_other_models(self):
        tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
        model = LlamaForCausalLM(tiny)
        with (
            pytest.raises(UnsupportedModelError, match=r"LlavaForConditionalGeneration.*got LlamaForCausalLM"),
            prune(model, PLAN),
        ):
            pass

    def test_nested_plans(self, llava):
        model = llava()
        with prune(model, PLAN), pytest.raises(RealizationError, match="one plan at a time"), prune(model, PLAN):
            pass
        with prune(model, PLAN):
            pass

    def test_labels(self, llava, inputs_for):
        inputs = inputs_for()
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="labels"):
            llava()(**inputs, labels=inputs["input_ids"])

    def test_logits_at_positions(self, llava, inputs_for):
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="logits_to_keep"):
            llava()(**inputs_for(), logits_to_keep=torch.tensor([1, 2]))

    def test_unequal_image_counts(self, llava, inputs_for):
        inputs = inputs_for(2)
        inputs["input_ids"][1, inputs["input_ids"][1] == 63] = 5
        inputs["pixel_values"] = inputs["pixel_values"][:1]
        with prune(llava(), PLAN), pytest.raises(RealizationError, match=r"equally many image tokens, got \[25, 0\]"):
            llava()(**inputs)

    def test_parts_of_an_image(self, llava):
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="whole images of 5 x 5, got 2"):
            llava()(input_ids=torch.tensor([[1, 63, 63, 4]]))

    def test_static_caches(self, llava, inputs_for):
        model = llava()
        cache = StaticCache(config=model.config.text_config, max_cache_len=64)
        with prune(model, PLAN), pytest.raises(RealizationError, match="StaticCache"):
            model(**inputs_for(), past_key_values=cache)

    def test_embeddings_without_ids(self, llava):
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="input_ids"):
            llava()(inputs_embeds=torch.zeros(1, 4, 32))

    def test_the_language_model_alone(self, llava):
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="whole model"):
            llava().model.language_model(inputs_embeds=torch.zeros(1, 4, 32))

    def test_images_in_a_second_turn(self, llava, inputs_for):
        model, inputs = llava(), inputs_for()
        with torch.no_grad(), prune(model, PLAN):
            cache = model(**inputs, use_cache=True).past_key_values
            with pytest.raises(RealizationError, match="one prefill"):
                model(**inputs, past_key_values=cache)

    def test_a_mask_of_the_pruned_length(self, llava, inputs_for):
        model, inputs = llava(), inputs_for(2, padding="left")
        with torch.no_grad(), prune(model, PLAN):
            cache = model(**inputs, use_cache=True).past_key_values
            mask = torch.zeros(2, 20, dtype=torch.long)
            with pytest.raises(RealizationError, match="whole unpruned sequence"):
                model(input_ids=torch.tensor([[3], [4]]), attention_mask=mask, past_key_values=cache)

    def test_a_cache_cut_unevenly(self, llava, inputs_for):
        model, inputs = llava(), inputs_for()
        with torch.no_grad(), prune(model, PLAN):
            cache = model(**inputs, use_cache=True).past_key_values
            cache.layers[0].crop(-3)
            with pytest.raises(RealizationError, match="every layer's cache"):
                model(input_ids=torch.tensor([[3]]), past_key_values=cache)

    @pytest.mark.parametrize("wrong", [torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 15)])
    def test_selectors_that_return_something_else(self, llava, inputs_for, monkeypatch, wrong):
        monkeypatch.setitem(SELECTORS, "balanced", lambda tokens, num_keep, stage: wrong)
        with prune(llava(), PLAN), pytest.raises(RealizationError, match="must return int64"):
            llava()(**inputs_for())

    @pytest.mark.parametrize(
        "wrong", [[0, 1, 1, *range(3, 15)], [1, 0, *range(2, 15)], [*range(14), 25], [-1, *range(14)]]
    )
    def test_selectors_that_break_their_promise(self, llava, inputs_for, monkeypatch, device, wrong):
        model, inputs = llava(device=device), inputs_for(device=device)
        chosen = torch.tensor([wrong], device=device)
        monkeypatch.setitem(SELECTORS, "balanced", lambda tokens, num_keep, stage: chosen)
        plan = Plan(stages=PLAN.stages[:1])
        with pytest.raises(RealizationError, match="distinct, sorted indices"), prune(model, plan):
            model(**inputs)

    def test_a_keep_that_rounds_to_nothing(self, llava, inputs_for):
        plan = Plan(stages=(Stage(layer=1, keep=0.01),))
        with prune(llava(), plan), pytest.raises(RealizationError, match=r"25 image tokens, or be 0, got 0\.01"):
            llava()(**inputs_for())

    def test_layers_that_are_bypassed(self, llava, inputs_for):
        model = llava()
        layers = model.model.language_model.layers
        with torch.no_grad(), prune(model, Plan(stages=(Stage(layer=3, keep=0.3),))):
            hooks, layers[3]._forward_pre_hooks = layers[3]._forward_pre_hooks, {}
            try:
                with pytest.raises(RealizationError, match="the plan's image tokens"):
                    model(**inputs_for())
            finally:
                layers[3]._forward_pre_hooks = hooks
