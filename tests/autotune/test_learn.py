"""Learning sees what pruning does: masks against pruning, gradients against differences, plans against budgets."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.nn.functional import kl_div

from autotune import reference
from autotune.config import AutotuneError
from autotune.data import Example, from_dataset
from autotune.learn import learn
from autotune.prompts import load_model, prompt_inputs
from autotune.schedule import Schedule, flops_of
from autotune.teaching import lessons
from btp import Plan, RealizationError, Stage, UnsupportedModelError, prune
from btp.families import anatomy_of
from btp.relaxed import RelaxedStage, relaxed, soft_top
from tests.btp.families import FAMILIES, IMAGE_TOKEN, decoder_layers

STAGES = ((0, 0.8, 0.0), (1, 0.5, 0.3), (3, 0.2, 0.7))  # layer, share, lambda
FEW = ((1, 0.45, 0.4),)
STEP = 1e-6


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return load_model(str(reference.WEIGHTS), "cpu")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return from_dataset(reference.dataset("calibrate"), "")[:4]


def plan_of(stages: Any, attention: Any = "softmax") -> Plan:
    return Plan(
        stages=tuple(
            Stage(layer=layer, keep=share, selector="joint", attention_weight=weight, attention=attention)
            for layer, share, weight in stages
        )
    )


def scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def relaxed_of(stages: Any, attention: Any = "softmax") -> list[RelaxedStage]:
    return [RelaxedStage(layer, scalar(share), scalar(weight), attention) for layer, share, weight in stages]


def exact(model: Any) -> Any:
    """In float64 throughout: the models' norms compute in float32 whatever they are given."""

    def norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
        mean = hidden.square().mean(dim=-1, keepdim=True)
        weighed: torch.Tensor = module.weight * hidden / (mean + module.variance_epsilon).sqrt()
        return weighed

    for module in model.double().modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(norm, module)
    return model


def last_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The place of each row's last real token. (B, 1)"""
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return (real * torch.arange(real.shape[1])).argmax(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("name", "padding", "kernel", "attention"),
    [(name, "left", "sdpa", "softmax") for name in FAMILIES]
    + [("llava", padding, "eager", "logits") for padding in ("none", "left", "right")]
    + [("gemma3", "none", "eager", "softmax"), ("llava", "none", "sdpa", "softmax")],
)
def test_hard_masks_give_the_logits_of_pruning(name: str, padding: str, kernel: str, attention: str) -> None:
    model, inputs = FAMILIES[name].build(kernel), FAMILIES[name].inputs(3, padding)
    last_B1 = last_of(inputs)
    with torch.no_grad(), prune(model, plan_of(STAGES, attention)) as trace:
        pruned = model(**inputs).logits
    image_mask = inputs["input_ids"] == IMAGE_TOKEN
    with relaxed(model, relaxed_of(STAGES, attention), image_mask, last_B1, temperature=0.5):
        masked = model(**inputs).logits
    dropped = inputs["input_ids"].shape[1] - pruned.shape[1]
    assert dropped == trace.num_image_tokens - trace.counts[-1] > 0
    rows = torch.arange(3)
    for back in range(4):  # all text tokens after the picture
        here = last_B1[:, 0] - back
        torch.testing.assert_close(masked[rows, here], pruned[rows, here - dropped], rtol=1e-4, atol=1e-4)


def test_a_row_s_soft_memberships_sum_to_the_count_with_the_right_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(2, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.rand(2, 9, dtype=torch.float64, generator=generator, requires_grad=True)
    count, temperature = scalar(2.3), torch.full((2, 1), 0.1, dtype=torch.float64)
    member = soft_top(score, weight, count, temperature)
    torch.testing.assert_close((member * weight).sum(dim=1), count.detach().expand(2))
    assert bool((member.argsort(dim=1) == score.argsort(dim=1)).all())
    assert torch.autograd.gradcheck(lambda *given: soft_top(*given, temperature), (score, weight, count))


@pytest.mark.parametrize("parameter", ["share", "attention_weight"])
def test_soft_gradients_are_those_of_differences(parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The width of the slope follows the spread of the scores, but no gradient flows through it.
    monkeypatch.setattr(torch.Tensor, "std", lambda score_BA, **_: torch.full_like(score_BA[:, :1], 0.1))
    model, inputs = exact(FAMILIES["llava"].build()), FAMILIES["llava"].inputs(2, "left")

    def loss(**changed: torch.Tensor) -> torch.Tensor:
        given = {"share": scalar(0.45), "attention_weight": scalar(0.4), **changed}
        stages = [RelaxedStage(1, given["share"], given["attention_weight"])]
        image_mask = inputs["input_ids"] == IMAGE_TOKEN
        with relaxed(model, stages, image_mask, last_of(inputs), temperature=0.7, hard=False):
            return model(**inputs).logits[:, -3:].square().mean()

    at = scalar({"share": 0.45, "attention_weight": 0.4}[parameter])
    loss(**{parameter: at}).backward()
    above, below = (float(loss(**{parameter: at.detach() + step}).detach()) for step in (STEP, -STEP))
    assert at.grad is not None
    assert float(at.grad) == pytest.approx((above - below) / (2 * STEP), rel=1e-3)
    assert abs(float(at.grad)) > 1e-3


def test_hard_slopes_weigh_what_letting_each_token_in_or_out_a_little_would_do() -> None:
    model, inputs = exact(FAMILIES["llava"].build()), FAMILIES["llava"].inputs(1)
    stage = RelaxedStage(1, scalar(0.45), scalar(0.4))
    image_mask, last_B1 = inputs["input_ids"] == IMAGE_TOKEN, last_of(inputs)
    with relaxed(model, [stage], image_mask, last_B1, temperature=0.7):
        model(**inputs).logits[:, -3:].square().mean().backward()
    with prune(model, plan_of(FEW)) as trace, torch.no_grad():
        model(**inputs)
    kept = torch.zeros(25, dtype=torch.float64).index_fill(0, trace.alive[-1][0], 1.0)

    def loss(mask_N: torch.Tensor) -> float:
        handles = [layer.register_forward_pre_hook(partial(weigh, mask_N), with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                return float(model(**inputs).logits[:, -3:].square().mean())
        finally:
            for handle in handles:
                handle.remove()

    def weigh(mask_N: torch.Tensor, module: Any, args: Any, kwargs: Any) -> Any:
        length = inputs["input_ids"].shape[1]
        bias = torch.zeros(length, length, dtype=torch.float64).masked_fill(
            ~torch.ones(length, length).tril().bool(), -1e300
        )
        bias[:, image_mask[0]] += mask_N.clamp(min=1e-12).log()
        return args, {**kwargs, "attention_mask": bias[None, None]}

    def soft(share: float) -> torch.Tensor:
        masks: list[torch.Tensor] = []
        soft_stage = RelaxedStage(1, scalar(share), scalar(0.4))
        with relaxed(model, [soft_stage], image_mask, last_B1, temperature=0.7, hard=False):
            note = layers[-1].register_forward_pre_hook(
                lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
            model(**inputs)
            note.remove()
        return masks[0][0, 0, -1, image_mask[0]].exp().detach()

    layers = decoder_layers(model)[1:]
    rate_N = (soft(0.45 + 1e-4) - soft(0.45 - 1e-4)) / 2e-4
    expected = 0.0
    for token in range(25):
        step = STEP if kept[token] == 0 else -STEP
        changed = kept.clone()
        changed[token] += step
        expected += float(rate_N[token]) * (loss(changed) - loss(kept)) / step
    assert stage.share.grad is not None
    assert float(stage.share.grad) == pytest.approx(expected, rel=1e-2)


def test_lambda_rises_where_what_is_attended_to_is_what_matters() -> None:
    """Before the last layer nothing else can matter to the last token: it sees a token by its attention there."""
    model, inputs = FAMILIES["llava"].build(), FAMILIES["llava"].inputs(8)
    model.requires_grad_(False)
    with torch.no_grad():
        for layer in decoder_layers(model)[-1:]:
            layer.self_attn.q_proj.weight *= 2  # few tokens are attended to, and those strongly
        dense = model(**inputs).logits[:, -1].log_softmax(dim=-1)
    logit = scalar(-2.0)
    optimiser = torch.optim.Adam([logit], lr=0.2)
    losses = []
    for _ in range(25):
        stage = RelaxedStage(3, scalar(0.3), logit.sigmoid())
        image_mask = inputs["input_ids"] == IMAGE_TOKEN
        with relaxed(model, [stage], image_mask, last_of(inputs), temperature=0.5):
            masked = model(**inputs).logits[:, -1].log_softmax(dim=-1)
        loss = kl_div(masked, dense, reduction="batchmean", log_target=True)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert float(logit.detach().sigmoid()) > 0.5
    assert losses[-1] < 0.7 * losses[0]


def test_divergence_is_that_of_answering_under_pruning(loaded: tuple[Any, Any], examples: list[Example]) -> None:
    model, processor = loaded
    (lesson,) = lessons(model, processor, examples, batch_size=4)
    stages = ((0, 0.5, 0.2), (4, 0.1, 0.6))
    with (
        torch.no_grad(),
        relaxed(model, relaxed_of(stages), lesson.image_mask_BS, lesson.last_B1, temperature=0.3),
    ):
        found = lesson.divergence(model)
    for example, value in zip(examples, found.tolist(), strict=True):
        prompt = prompt_inputs(processor, [example], "cpu")
        answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)[:, prompt["input_ids"].shape[1] :]
        dense = answer_log_probs(model, prompt, answer)
        with prune(model, plan_of(stages)):
            pruned = answer_log_probs(model, prompt, answer)
        expected = kl_div(pruned, dense, reduction="none", log_target=True).sum(dim=1).mean()
        assert value == pytest.approx(float(expected), rel=1e-3, abs=1e-5)


@torch.no_grad()
def answer_log_probs(model: Any, prompt: dict[str, Any], answer: torch.Tensor) -> torch.Tensor:
    """Before each token of the answer, fed one by one. (T, V)"""
    output = model(**prompt, use_cache=True, logits_to_keep=1)
    logits = [output.logits[0, -1]]
    for token in answer[0, :-1]:
        output = model(input_ids=token.view(1, 1), past_key_values=output.past_key_values, use_cache=True)
        logits.append(output.logits[0, -1])
    return torch.stack(logits).log_softmax(dim=-1)


def schedule_of(seed: int, num_tokens: int = 256, layers: tuple[int, ...] = tuple(range(8))) -> Schedule:
    generator = torch.Generator().manual_seed(seed)
    numbers = [2 * torch.randn(len(layers), dtype=torch.float64, generator=generator) + 1 for _ in range(2)]
    pass_C, weight_C = (number.requires_grad_() for number in numbers)
    return Schedule(layers, 8, num_tokens, "softmax", pass_C, weight_C)


@pytest.mark.parametrize("budget", [0.5, 0.29, 0.12])
@pytest.mark.parametrize("seed", range(6))
def test_keep_ratios_fall_and_the_budget_is_spent_to_a_percent(loaded: Any, seed: int, budget: float) -> None:
    cost = flops_of(anatomy_of(loaded[0]).decoder, 256)
    schedule = schedule_of(seed)
    keep, _ = schedule.values()
    assert list(keep) == sorted(keep, reverse=True)
    thinned = schedule.thinned(4, cost, budget)
    assert 1 <= len(thinned.layers) <= 4
    assert set(thinned.layers) <= set(schedule.layers)
    plan = thinned.plan(cost, budget)
    assert len(plan.stages) <= 4
    one_token_more = replace(
        plan, stages=(*plan.stages[:-1], replace(last := plan.stages[-1], keep=last.keep + 1 / 256))
    )
    assert cost(thinned.counts_of(plan)) <= budget
    assert cost(thinned.counts_of(plan)) >= 0.99 * budget or cost(thinned.counts_of(one_token_more)) > budget


@pytest.mark.parametrize("budget", [0.9, 0.29, 0.05])
def test_fitting_keeps_the_order_of_the_ratios_and_meets_the_budget(loaded: Any, budget: float) -> None:
    cost = flops_of(anatomy_of(loaded[0]).decoder, 256)
    schedule = schedule_of(2)
    before = torch.tensor(schedule.values()[0]).log()
    schedule.fit(cost, budget)
    assert 0.97 * budget <= cost(schedule.counts()) <= budget
    after = torch.tensor(schedule.values()[0]).log()
    torch.testing.assert_close(after / after[-1], before / before[-1], rtol=1e-3, atol=1e-4)


def test_stages_that_hardly_drop_give_their_drop_to_those_beside_them(loaded: Any) -> None:
    """By hand: 10 % before 0, 1 % before 1, half before 2, nothing to speak of before 5, half before 6."""
    cost = flops_of(anatomy_of(loaded[0]).decoder, 256)
    stay = torch.tensor([0.9, 0.99, 0.5, 0.999, 0.5], dtype=torch.float64)
    weight = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    schedule = Schedule((0, 1, 2, 5, 6), 8, 256, "softmax", stay.logit(), weight)
    thinned = schedule.thinned(4, cost, 0.9)
    assert thinned.layers == (0, 2, 6)
    torch.testing.assert_close(thinned.values()[0], (0.9, 0.891 / 2, stay.prod().item()))
    assert thinned.weight_C.tolist() == [-2.0, 0.0, 2.0]
    assert schedule.thinned(1, cost, 0.12).layers == (0,)  # nothing else is within that budget
    assert schedule.thinned(1, cost, 0.5).layers == (2,)


def test_the_cost_and_its_slope_are_those_of_the_counts(loaded: Any) -> None:
    cost = flops_of(anatomy_of(loaded[0]).decoder, 256)
    schedule = schedule_of(1)
    relaxed_cost = schedule.relaxed_cost(cost)
    assert float(relaxed_cost.detach()) == cost(schedule.counts())
    relaxed_cost.backward()
    assert schedule.pass_C.grad is not None
    for place in range(8):
        above, below = (cost(schedule_moved(schedule, place, step)) for step in (1e-4, -1e-4))
        assert float(schedule.pass_C.grad[place]) == pytest.approx((above - below) / 2e-4, rel=0.02, abs=1e-4)


def schedule_moved(schedule: Schedule, place: int, step: float) -> list[float]:
    """Unrounded tokens of each layer, one logit moved."""
    numbers, alive, tokens = schedule.pass_C.tolist(), 256.0, []
    numbers[place] += step
    for number in numbers:
        alive /= 1 + math.exp(-number)
        tokens.append(alive)
    return tokens


def test_learning_gives_the_same_plan_twice_and_leaves_no_trace(loaded: Any, examples: list[Example]) -> None:
    model, processor = loaded
    asked = [parameter.requires_grad for parameter in model.parameters()]
    settings = {"seed": 3, "steps": 4, "max_stages": 2, "layers": (0, 2, 5), "batch_size": 2}
    first, again = (learn(model, processor, examples, 0.2, **settings) for _ in range(2))
    assert first.plan == again.plan
    assert first.history == again.history
    assert len(first.history) == 4
    assert 0.198 <= first.cost <= 0.2
    assert all(0.19 <= step.cost <= 0.2 for step in first.history)
    assert [len(step.layers) for step in first.history] == [3, 3, 2, 2]
    assert {stage.selector for stage in first.plan.stages} <= {"joint", "diversity"}
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert not any(layer._forward_pre_hooks for layer in anatomy_of(model).layers)
    assert learn(model, processor, examples, 0.2, **{**settings, "seed": 4}).history != first.history


@pytest.mark.parametrize(
    ("budget", "settings", "reason"),
    [
        (1.0, {}, "under 1"),
        (0.001, {}, "at least"),
        (0.3, {"layers": (4, 6)}, "at least"),
        (0.3, {"layers": (3, 8)}, "rise and lie"),
        (0.3, {"steps": 3}, "4 steps"),
    ],
)
def test_bad_budgets_and_settings_are_refused(
    loaded: Any, examples: list[Example], budget: float, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(AutotuneError, match=reason):
        learn(*loaded, examples[:1], budget, seed=0, **settings)


def test_kernels_and_numbers_that_cannot_be_relaxed_are_refused() -> None:
    inputs = FAMILIES["llava"].inputs(1)
    image_mask = inputs["input_ids"] == IMAGE_TOKEN
    given = relaxed_of(FEW), image_mask, last_of(inputs)
    refused = {"sdpa": FAMILIES["llava"].build("flash_attention_2"), "float32": FAMILIES["llava"].build().half()}
    for way_out, model in refused.items():
        with pytest.raises(UnsupportedModelError, match=way_out), relaxed(model, *given, temperature=1.0):
            pass
    model = FAMILIES["llava"].build()
    with prune(model, plan_of(FEW)), pytest.raises(RealizationError, match="leave the `with`"):
        relaxed(model, *given, temperature=1.0).__enter__()
    uneven = torch.cat((image_mask, image_mask & (image_mask.cumsum(dim=1) > 1)))
    with (
        pytest.raises(RealizationError, match=r"\[25, 24\]"),
        relaxed(model, given[0], uneven, given[2], temperature=1.0),
    ):
        pass
