"""A graphed prefill against an eager one, bit for bit; on the CPU with a tape in the place of CUDA's graph."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_map_only

from btp import Plan, RealizationError, Stage, encode_images, presets, prune
from btp.capture import CaptureError, Watch, standing_in
from btp.graphs import GraphedPrefill
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES, decoder
from tests.btp.tape import Tape, place

PLAN = Plan(stages=(Stage(layer=1, keep=0.6, selector="joint", seeds=0.2), Stage(layer=3, keep=0.3)))


@torch.inference_mode()
def eager(model, inputs, plan):
    with nullcontext() if plan is None else prune(model, plan) as trace:
        output = model(**inputs, use_cache=True, logits_to_keep=1)
    return output, [] if trace is None else [alive_BK.clone() for alive_BK in trace.alive]


def assert_same(found, wanted):
    assert torch.equal(found.logits, wanted.logits)
    for mine, theirs in zip(found.past_key_values.layers, wanted.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


def one_stage_each(selector):
    stage = {"selector": selector, "attention_weight": 0.5, "oversample": 1.5, "seeds": 0.2}
    return Plan(stages=(Stage(layer=1, keep=0.6, **stage), Stage(layer=2, keep=0.3, **stage)))


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_a_replay_is_an_eager_prefill(llava, selector):
    padding = ("none", "left", "right")[sorted(SELECTORS).index(selector) % 3]
    model, plan = llava(), one_stage_each(selector)
    graphed = GraphedPrefill(model, plan, capture=Tape)
    for seed in (1, 2):
        inputs = FAMILIES["llava"].inputs(2, padding, seed)
        wanted, alive = eager(model, inputs, plan)
        assert_same(graphed(**inputs), wanted)
        assert all(map(torch.equal, graphed.trace.alive, alive))
        assert graphed.trace.counts == (25, 15, 8, 8)
    assert graphed.fallback_because is None
    assert graphed.num_graphs == 1


@pytest.mark.parametrize(
    ("name", "kernel"), [*((name, "sdpa") for name in sorted(FAMILIES)), ("gemma3", "eager"), ("llava", "eager")]
)
def test_every_family_dense_and_pruned(family_model, name, kernel):
    model = family_model(name, kernel)
    pivot = Stage(layer=0, keep=0.5, selector="k_center")  # of the [CLS] attention, where there is one
    for plan in (None, Plan(stages=(pivot, *PLAN.stages[1:]), positions="reset")):
        graphed = GraphedPrefill(model, plan, capture=Tape)
        for seed in (1, 2):
            inputs = FAMILIES[name].inputs(2, "left", seed)
            assert_same(graphed(**inputs), eager(model, inputs, plan)[0])
            assert graphed.fallback_because is None
        assert graphed.num_graphs == 1


def test_a_prompt_without_pictures_and_one_without_pads_run_too(llava):
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    words = {"input_ids": torch.tensor([[1, 5, 9, 12]])}
    plain = FAMILIES["llava"].inputs(1)
    for inputs in (words, plain, plain | {"attention_mask": torch.ones_like(plain["input_ids"])}):
        assert_same(graphed(**inputs), eager(llava(), inputs, PLAN)[0])
        assert graphed.fallback_because is None
    assert graphed.num_graphs == 3


def test_the_model_is_left_as_it_was(llava):
    model, inputs = llava(), FAMILIES["llava"].inputs(2, "left")

    def everything():
        hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
        return hooks, {name: sorted(vars(module)) for name, module in model.named_modules()}

    before = everything()
    GraphedPrefill(model, PLAN, capture=Tape)(**inputs)
    assert everything() == before


# ---------------------------------------------------------------------------------------------------------- buckets


def test_another_place_of_the_picture_is_another_bucket(llava):
    inputs = FAMILIES["llava"].inputs(1)
    moved = inputs | {"input_ids": inputs["input_ids"].roll(1, dims=1)}
    other_words = inputs | {"input_ids": inputs["input_ids"].where(inputs["input_ids"] > 60, 7)}
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    for prompt, num_graphs in ((inputs, 1), (moved, 2), (other_words, 2), (inputs, 2)):
        assert_same(graphed(**prompt), eager(llava(), prompt, PLAN)[0])
        assert graphed.num_graphs == num_graphs


def test_other_pads_grids_and_kernels_are_other_buckets(family_model):
    model, inputs = family_model("qwen2_5_vl"), FAMILIES["qwen2_5_vl"].inputs(2, "left")
    mask = inputs["attention_mask"].clone()
    mask[1, :2] = 1 - mask[1, :2]
    turned = inputs | {"image_grid_thw": inputs["image_grid_thw"].flip(0)}  # as many patches, the other way round
    graphed = GraphedPrefill(model, one_stage_each("uniform"), capture=Tape)
    for count, prompt in enumerate((inputs, inputs | {"attention_mask": mask}, turned), start=1):
        assert_same(graphed(**prompt), eager(model, prompt, one_stage_each("uniform"))[0])
        assert graphed.num_graphs == count
    model.set_attn_implementation("eager")
    try:
        assert_same(graphed(**inputs), eager(model, inputs, one_stage_each("uniform"))[0])
    finally:
        model.set_attn_implementation("sdpa")
    assert graphed.num_graphs == 4


def test_the_latest_buckets_are_kept(llava):
    made = []
    graphed = GraphedPrefill(llava(), PLAN, max_graphs=2, capture=lambda device: made.append(Tape(device)) or made[-1])
    one, two, three = (FAMILIES["llava"].inputs(batch) for batch in (1, 2, 3))
    for inputs, recorded in ((one, 1), (two, 2), (one, 2), (three, 3), (one, 3), (two, 4)):
        graphed(**inputs)
        assert len(made) == recorded
    assert graphed.num_graphs == 2


def test_weights_that_moved_are_recorded_anew():
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs(1)
    graphed = GraphedPrefill(model, PLAN, capture=Tape)
    graphed(**inputs)
    layer = decoder(model).layers[2].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(2)  # in place
        assert_same(graphed(**inputs), eager(model, inputs, PLAN)[0])
        layer.weight.data = layer.weight.data * 2
    assert_same(graphed(**inputs), eager(model, inputs, PLAN)[0])
    assert graphed.num_graphs == 1


# ------------------------------------------------------------------------------------------------------- life cycle


def prompts(count=2):
    return [FAMILIES["llava"].inputs(2, "left", seed) for seed in range(count)]


def test_what_is_still_held_survives_the_next_replay(llava):
    first, second = prompts()
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    wanted, alive = eager(llava(), first, PLAN)
    output = graphed(**first)
    shallow, key, trace = copy.copy(output.past_key_values), output.past_key_values.layers[2].keys, graphed.trace
    place = key.data_ptr()
    assert_same(graphed(**second), eager(llava(), second, PLAN)[0])
    assert_same(output, wanted)
    assert torch.equal(shallow.layers[3].values, wanted.past_key_values.layers[3].values)
    assert all(map(torch.equal, trace.alive, alive))
    assert key.data_ptr() != place


def test_what_nobody_holds_is_not_copied(llava):
    first, second = prompts()
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    places = {graphed(**inputs).past_key_values.layers[0].keys.data_ptr() for inputs in (first, second, first)}
    assert len(places) == 1


def test_decoding_on_a_graphed_cache_is_decoding_on_an_eager_one(llava):
    model, token = llava(), torch.tensor([[7], [9]])
    first, second = prompts()
    graphed = GraphedPrefill(model, PLAN, capture=Tape)

    @torch.no_grad()
    def decoded(cache, mask):
        found = []
        with prune(model, PLAN):
            for step in range(1, 4):
                grown = torch.cat((mask, mask.new_ones(2, step)), dim=1)
                found.append(model(input_ids=token, past_key_values=cache, attention_mask=grown).logits)
        return torch.cat(found, dim=1)

    wanted = [decoded(eager(model, inputs, PLAN)[0].past_key_values, inputs["attention_mask"]) for inputs in prompts()]
    one = graphed(**first).past_key_values
    two = graphed(**second).past_key_values
    assert torch.equal(decoded(one, first["attention_mask"]), wanted[0])
    graphed(**first)
    assert torch.equal(decoded(two, second["attention_mask"]), wanted[1])


def test_a_broken_promise_is_told_by_the_next_call(llava, monkeypatch):
    def places_of_the_best(tokens, num_keep, stage):  # of distinct values: where all are equal, one place over and over
        low_BN = tokens.hidden.mean(dim=2)
        rank_BN = (low_BN.unsqueeze(2) > low_BN.unsqueeze(1)).sum(dim=2)
        return rank_BN.sort(dim=1).values[:, :num_keep]

    monkeypatch.setitem(SELECTORS, "ranked", places_of_the_best)
    plan = Plan(stages=(Stage(layer=0, keep=0.6, selector="ranked"),))
    inputs = FAMILIES["llava"].inputs(1)
    graphed = GraphedPrefill(llava(), plan, capture=Tape)
    graphed(**inputs)
    graphed.check()
    graphed(**inputs | {"pixel_values": inputs["pixel_values"] * torch.nan})
    with pytest.raises(RealizationError, match=r"distinct, sorted indices.*'ranked'"):
        graphed(**inputs)
    graphed(**inputs)
    graphed.check()


def test_a_recording_keeps_what_it_reads_alive(llava):
    """A graph knows addresses: a table that a cache drops must stay where it was."""
    graphed = GraphedPrefill(llava(), one_stage_each("random"), capture=Tape)
    inputs = FAMILIES["llava"].inputs(1)
    graphed(**inputs)
    ((_, graph),) = graphed._graphs
    held = {place(tensor) for tensor, _ in graph._weights}
    assert {place(parameter) for parameter in decoder(llava()).layers.parameters()} <= held
    assert graph._capture.read() <= held
    assert not held & {place(tensor) for tensor in graph._capture.made()}


# ----------------------------------------------------------------------------------------------------- no recording


def test_on_a_cpu_it_falls_back_and_says_why(llava):
    inputs = FAMILIES["llava"].inputs(2, "left")
    for plan in (None, PLAN):
        graphed = GraphedPrefill(llava(), plan)
        for _ in range(2):
            assert_same(graphed(**inputs), eager(llava(), inputs, plan)[0])
            assert graphed.fallback_because == "only a CUDA device has graphs, and the model is on cpu"
        assert graphed.num_graphs == 0


def asks(tokens, num_keep, stage):
    first = int(tokens.hidden.sum(dim=2).argmax(dim=1)[0]) * 0
    return torch.arange(first, first + num_keep).expand(len(tokens.hidden), -1)


def counts(tokens, num_keep, stage):
    some = tokens.hidden[:, :, 0] < torch.inf
    return some.nonzero()[:, 1].view(len(some), -1)[:, :num_keep]


def masks(tokens, num_keep, stage):
    some = tokens.hidden[:, :, 0] < torch.inf
    return torch.arange(some.shape[1]).expand_as(some)[some].view(len(some), -1)[:, :num_keep]


@pytest.mark.parametrize(
    ("selector", "reason"), [(asks, "_local_scalar_dense"), (counts, "nonzero"), (masks, "aten.index.Tensor")]
)
def test_a_selector_that_waits_for_the_device_is_launched_eagerly(llava, monkeypatch, selector, reason):
    monkeypatch.setitem(SELECTORS, "waits", selector)
    plan = Plan(stages=(Stage(layer=1, keep=0.6, selector="waits"),))
    made = []
    graphed = GraphedPrefill(llava(), plan, capture=lambda device: made.append(Tape(device)) or made[-1])
    for _ in range(2):
        inputs = FAMILIES["llava"].inputs(1)
        assert_same(graphed(**inputs), eager(llava(), inputs, plan)[0])
        assert reason in graphed.fallback_because
        assert graphed.trace.counts == (25, 15, 15, 15)
    assert len(made) == 1  # it is not tried again
    assert not made[0].calls  # found out before the recording


def test_other_reasons_are_named(llava):
    inputs = FAMILIES["llava"].inputs(2, "left")
    embeds = {**inputs, "inputs_embeds": llava().get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    conditional = Plan(stages=(Stage(layer=2, keep=0.0, attention_below=0.9),))
    for plan, prompt, reason in (
        (conditional, inputs, "the stage before layer 2 is conditional"),
        (PLAN, embeds, "told by input_ids"),
    ):
        graphed = GraphedPrefill(llava(), plan, capture=Tape)
        assert_same(graphed(**prompt), eager(llava(), prompt, plan)[0])
        assert reason in graphed.fallback_because
    length = inputs["input_ids"].shape[1]
    ready = inputs | {"attention_mask": torch.ones(2, 1, length, length, dtype=torch.bool).tril()}
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    assert_same(graphed(**ready), eager(llava(), ready, PLAN)[0])
    assert "only a mask of pads" in graphed.fallback_because


def test_calls_that_are_no_prefill_are_refused(llava):
    inputs = FAMILIES["llava"].inputs(1)
    graphed = GraphedPrefill(llava(), PLAN, capture=Tape)
    with prune(llava(), PLAN), pytest.raises(RealizationError, match=r"outside of prune\(\)"):
        graphed(**inputs)
    with pytest.raises(RealizationError, match="got labels with it"):
        graphed(**inputs, labels=inputs["input_ids"])
    assert graphed.num_graphs == 0


# -------------------------------------------------------------------------------------------------- no host, no data


def run_fake(model, inputs, plan):
    """The language model's forward under `prune`, everything it is given made fake. Returns what it gave out."""
    found, forward = [], decoder(model).forward

    def fake_forward(*args, **kwargs):
        kwargs["attention_mask"] = None
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            args, kwargs = tree_map_only(torch.Tensor, mode.from_tensor, (args, kwargs))
            found.append(forward(*args, **kwargs))
        raise CaptureError("seen")

    given = encode_images(model, inputs)
    with torch.no_grad(), prune(model, plan):
        eager_once(model, given)
        with standing_in(decoder(model), fake_forward), pytest.raises(CaptureError, match="seen"):
            eager_once(model, given)
    return found[0]


def eager_once(model, inputs):
    model(**inputs, use_cache=True, logits_to_keep=1)


@pytest.mark.parametrize("selector", sorted(SELECTORS))
def test_nothing_recorded_needs_a_value(llava, selector):
    output = run_fake(llava(), FAMILIES["llava"].inputs(2), one_stage_each(selector))
    assert isinstance(output.last_hidden_state, torch._subclasses.FakeTensor)
    keys = [layer.keys.shape[2] for layer in output.past_key_values.layers]
    assert [length - keys[-1] for length in keys] == [17, 7, 0, 0]


@pytest.mark.parametrize(
    ("selector", "error"), [(asks, DataDependentOutputException), (counts, DynamicOutputShapeException)]
)
def test_the_fake_run_would_tell(llava, monkeypatch, selector, error):
    monkeypatch.setitem(SELECTORS, "waits", selector)
    with pytest.raises(error):
        run_fake(llava(), FAMILIES["llava"].inputs(2), Plan(stages=(Stage(layer=1, keep=0.6, selector="waits"),)))


def test_the_watch_tells_copies_between_devices():
    with Watch(), pytest.raises(CaptureError, match="_to_copy"):
        torch.ones(3).to("meta")
    with Watch() as watch:
        one = torch.ones(3)
        one.masked_fill(one > 2, 0.0)[torch.arange(2)].cpu()
    assert watch.outside == []


# ------------------------------------------------------------------------------------------------------------- CUDA


@pytest.mark.gpu
class TestOnCuda:
    @pytest.fixture(autouse=True)
    def _needs_cuda(self):
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device on this machine")

    @pytest.mark.parametrize("padding", ["none", "left"])
    @pytest.mark.parametrize("system", sorted(presets.SYSTEMS))
    def test_a_replay_is_an_eager_prefill(self, llava, system, padding):
        model, plan = llava(device="cuda"), presets.SYSTEMS[system].plan(4)
        graphed = GraphedPrefill(model, plan)
        for seed in (1, 2, 3):
            inputs = FAMILIES["llava"].inputs(2, padding, seed, device="cuda")
            wanted, alive = eager(model, inputs, plan)
            assert_same(graphed(**inputs), wanted)
            assert all(map(torch.equal, graphed.trace.alive, alive))
        conditional = any(stage.attention_below is not None for stage in plan.stages)
        assert (graphed.fallback_because is None) == (not conditional)

    def test_replays_take_no_more_memory(self, llava):
        inputs = FAMILIES["llava"].inputs(2, "left")
        graphed = GraphedPrefill(llava(device="cuda"), PLAN)
        for _ in range(3):
            graphed(**inputs)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        for _ in range(50):
            graphed(**inputs)
        torch.cuda.synchronize()
        assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
