"""Every published system on every family, end to end; and what a family's decoder costs, against torch's count."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from btp import Plan, Stage, anatomy_of, presets, prune
from btp.cost import kv_cache_bytes, prefill_multiplies, tokens_per_layer
from tests.btp.families import FAMILIES

NAMES = {name: "text_model" if name in ("idefics3", "smolvlm") else "language_model" for name in FAMILIES}
UNIFORM = Plan(stages=(Stage(layer=1, keep=0.6, selector="uniform"), Stage(layer=3, keep=0.3, selector="uniform")))


@pytest.mark.parametrize("system", sorted(presets.SYSTEMS))
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_system_answers_on_every_family(family_model, name, system):
    model, inputs = family_model(name), FAMILIES[name].inputs(2, padding="left")
    plan = presets.SYSTEMS[system].plan(4)
    with torch.no_grad(), prune(model, plan) as trace:
        text = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert text.shape[1] == inputs["input_ids"].shape[1] + 3
    num_tokens = trace.num_image_tokens
    as_planned = {tokens_per_layer(plan, 4, num_tokens, conditional=carried_out) for carried_out in (True, False)}
    assert trace.counts in as_planned
    assert trace.dense == (system == "dense")


@pytest.mark.parametrize("plan", [Plan(stages=()), UNIFORM, presets.vtw(4)], ids=["dense", "two stages", "vtw"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_familys_decoder_costs_what_its_shape_says(family_model, name, plan):
    model, inputs = family_model(name, "eager"), FAMILIES[name].inputs(1)
    shape, counter = anatomy_of(model).decoder, FlopCounterMode(display=False)
    with torch.no_grad(), prune(model, plan) as trace, counter:
        cache = model(**inputs, logits_to_keep=1).past_key_values
    num_text = inputs["input_ids"].shape[1] - trace.num_image_tokens
    by_module = counter.get_flop_counts()
    parts = [module for module in by_module if module.endswith((".lm_head", f".{NAMES[name]}"))]
    counted = sum(sum(by_module[module].values()) for module in parts) // 2
    said = prefill_multiplies(shape, trace.counts, num_text)
    assert len(parts) == 2
    assert abs(counted - said) <= 0.01 * said
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert kv_cache_bytes(shape, trace.counts, num_text, bytes_per_number=4) == real
