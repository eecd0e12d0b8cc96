"""Distances from the dense model, held against a loop in float64; and a picture prefilled once for its questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from autotune import evaluation, proxy, reference
from autotune.answering import Line, followed
from autotune.continuation import Continuation
from autotune.data import Example, from_dataset
from autotune.evaluation import Evaluator, load_model, prompt_inputs
from autotune.scores import Scores
from btp import Plan, Stage, presets, prune
from btp.prefix import DensePrefix, resume
from tests.btp.families import FAMILIES

NUM_EXAMPLES = 12
NUM_NAIVE = 6  # the questions about one picture
Places = list[list[float]]
DENSE = Plan(stages=())
PICTURE_PLANS = {
    "diversity": Plan(stages=(Stage(layer=0, keep=0.3, selector="diversity"),)),
    "k_center, reset": Plan(stages=(Stage(layer=2, keep=0.2, selector="k_center"),), positions="reset"),
    "uniform, then none": Plan(stages=(Stage(layer=1, keep=0.4, selector="uniform"), Stage(layer=5, keep=0.0))),
}
PLANS = {
    **PICTURE_PLANS,
    "btp_released": presets.btp_released(8),
    "conditional": Plan(stages=(Stage(layer=4, keep=0.0, attention_below=0.5),)),
    "no image": Plan(stages=(Stage(layer=0, keep=0.0),)),
}


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    torch.set_num_threads(1)
    return load_model(str(reference.WEIGHTS), "cpu")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return from_dataset(reference.dataset("select"), "")[:NUM_EXAMPLES]


@pytest.fixture(scope="module")
def evaluator(loaded: tuple[Any, Any], examples: list[Example]) -> Evaluator:
    return Evaluator(*loaded, examples)


def log_probabilities(model: Any, inputs: dict[str, Any], answer: Sequence[int], plan: Plan) -> Places:
    """Of every token of the vocabulary at each place of the answer, fed token by token, in float64."""
    places = []
    with torch.inference_mode(), prune(model, plan):
        output = model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        for token in answer:
            logits = output.logits[0, -1].double().tolist()
            total = max(logits) + math.log(math.fsum(math.exp(value - max(logits)) for value in logits))
            places.append([value - total for value in logits])
            mask = torch.cat((mask, torch.ones_like(mask[:, :1])), dim=1)
            output = model(
                input_ids=torch.tensor([[token]]),
                attention_mask=mask,
                past_key_values=output.past_key_values,
                use_cache=True,
            )
    return places


@pytest.fixture(scope="module")
def dense_ones(loaded: tuple[Any, Any], examples: list[Example]) -> list[tuple[dict[str, Any], list[int], Places]]:
    """Of the first picture's questions: the prompt, the dense answer and the dense log-probabilities."""
    (model, processor), found = loaded, []
    for e in examples[:NUM_NAIVE]:
        inputs = prompt_inputs(processor, [e], "cpu")
        ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer[-1] == model.generation_config.eos_token_id
        found.append((inputs, answer, log_probabilities(model, inputs, answer, DENSE)))
    return found


def naive(model: Any, inputs: dict[str, Any], answer: list[int], dense: Places, plan: Plan) -> tuple[float, float]:
    """KL to dense and negative log-likelihood over the dense answer, as one would first write it."""
    pruned = log_probabilities(model, inputs, answer, plan)
    kl = [
        math.fsum(math.exp(p) * (p - q) for p, q in zip(*rows, strict=True)) for rows in zip(dense, pruned, strict=True)
    ]
    nll = [-row[token] for row, token in zip(pruned, answer, strict=True)]
    return math.fsum(kl) / len(kl), math.fsum(nll) / len(nll)


@pytest.mark.parametrize("name", PLANS)
def test_distances_are_those_of_a_loop_in_float64(
    evaluator: Evaluator,
    loaded: tuple[Any, Any],
    dense_ones: list[tuple[dict[str, Any], list[int], Places]],
    name: str,
) -> None:
    expected = [naive(loaded[0], *dense, PLANS[name]) for dense in dense_ones]
    for _ in range(2):  # filling the prefixes, and resuming from them
        found = evaluator(PLANS[name])
        assert list(found.kl[:NUM_NAIVE]) == pytest.approx([kl for kl, _ in expected], rel=1e-3, abs=1e-5)
        assert list(found.nll[:NUM_NAIVE]) == pytest.approx([nll for _, nll in expected], rel=1e-3, abs=1e-5)


def test_dense_is_no_distance_from_itself_and_pruning_is(evaluator: Evaluator) -> None:
    dense = evaluator(DENSE)
    assert dense.kl == (0.0,) * NUM_EXAMPLES
    assert max(evaluator(Plan(stages=(Stage(layer=1, keep=1.0, selector="uniform"),))).kl) < 1e-5
    blind = evaluator(PLANS["no image"])
    assert min(blind.kl) > 0.0
    assert sum(blind.kl) > 100 * sum(evaluator(PLANS["diversity"]).kl)
    assert sum(blind.nll) > sum(dense.nll)


def test_expected_answers_change_no_distance(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    blank = [
        Example(e.image, e.image_id, e.question, "nothing of the kind, nor any other thing", e.task) for e in examples
    ]
    for plan in (PLANS["btp_released"], PLANS["diversity"]):
        found, usual = Evaluator(*loaded, blank)(plan), evaluator(plan)
        assert found.answers == usual.answers
        assert found.kl == pytest.approx(usual.kl, rel=1e-3, abs=1e-5)
        assert found.nll == pytest.approx(usual.nll, rel=1e-3, abs=1e-5)


def test_where_generate_decodes_the_distances_are_the_same(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    model, processor = loaded
    before = model.generation_config
    # the repeated words of captions are penalised, so take one-word answers
    few = [e for e in examples if e.task in ("existence", "attribute", "counting")]
    model.generation_config = type(before)(**{**before.to_dict(), "repetition_penalty": 1.0001})
    try:
        own = Evaluator(model, processor, few)
        found = {name: own(plan) for name, plan in PLANS.items()}
    finally:
        model.generation_config = before
    assert own.decodes_because is not None
    places = [examples.index(e) for e in few]
    for name, plan in PLANS.items():
        usual = evaluator(plan)
        assert list(found[name].answers) == [usual.answers[place] for place in places]
        assert list(found[name].kl) == pytest.approx([usual.kl[place] for place in places], rel=1e-3, abs=1e-5)


def whole(own: Evaluator, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Scores:
    """The scores without sharing pictures."""
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "PICTURE_ONLY", frozenset())
        assert own._kind(plan) == "whole"
        return own(plan)


@pytest.mark.parametrize("name", PICTURE_PLANS)
def test_sharing_a_picture_changes_nothing_but_the_work(
    loaded: tuple[Any, Any], examples: list[Example], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    own, plan = Evaluator(*loaded, examples), PICTURE_PLANS[name]
    own(DENSE)
    apart, together = whole(own, plan, monkeypatch), own(plan)
    assert (together.answers, together.realised) == (apart.answers, apart.realised)
    assert together.kl == pytest.approx(apart.kl, rel=1e-3, abs=1e-5)
    assert together.nll == pytest.approx(apart.nll, rel=1e-3, abs=1e-5)
    (batch,) = own._batches((0, NUM_EXAMPLES), "by picture")
    assert len(batch.inputs["input_ids"]) == len({e.image_id for e in examples}) < NUM_EXAMPLES
    assert sorted(sample for branch in batch.branches for sample in branch.samples) == list(range(NUM_EXAMPLES))


def test_prompts_that_part_before_the_picture_stay_whole(
    loaded: tuple[Any, Any], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = loaded
    template = "USER: {% for c in messages[0].content %}{% if c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}"
    monkeypatch.setattr(processor, "chat_template", template + " <image>\nASSISTANT:")
    own, plan = Evaluator(model, processor, examples), PICTURE_PLANS["diversity"]
    batches = own._batches((0, NUM_EXAMPLES), "by picture")
    assert [rest for batch in batches for branch in batch.branches for rest in branch.rests] == [[]] * NUM_EXAMPLES
    apart, together = whole(own, plan, monkeypatch), own(plan)
    assert together.answers == apart.answers
    assert together.kl == pytest.approx(apart.kl, rel=1e-3, abs=1e-5)


def stepwise(model: Any, inputs: dict[str, Tensor], answer_BT: Tensor) -> Tensor:
    """Logits before each token of the answers and after the last, by plain forwards of a token each. (B, 1 + T, V)"""
    output = model(**inputs, use_cache=True)
    logits, mask_BS = [output.logits[:, -1]], torch.ones_like(inputs["input_ids"])
    deltas_B1 = getattr(model.model, "rope_deltas", None)  # how far M-RoPE's positions are from the count of tokens
    for token_B1 in answer_BT.split(1, dim=1):
        position_B1 = mask_BS.sum(dim=1, keepdim=True)
        mask_BS = torch.cat((mask_BS, torch.ones_like(token_B1)), dim=1)
        output = model(
            input_ids=token_B1,
            attention_mask=mask_BS,
            position_ids=position_B1 if deltas_B1 is None else (position_B1 + deltas_B1).expand(3, -1, -1),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(output.logits[:, -1])
    return torch.stack(logits, dim=1)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FAMILIES)
def test_questions_go_on_from_one_prefilled_picture_in_every_family(name: str, kernel: str) -> None:
    torch.set_num_threads(1)
    model, inputs = FAMILIES[name].build(kernel), FAMILIES[name].inputs(3, "none", seed=1)
    ids_BS = inputs["input_ids"]
    length = int((ids_BS[0] == FAMILIES[name].image_token).nonzero().max()) + 2
    begun = {n: value[:, :length] if value.shape == ids_BS.shape else value for n, value in inputs.items()}
    answer_BT = torch.randint(2, 60, (3, 4), generator=torch.Generator().manual_seed(0))
    lines = [
        Line(answer, limit, rest=rest)
        for answer, limit, rest in zip(answer_BT.tolist(), (5, 2, 4), ids_BS[:, length:].tolist(), strict=True)
    ]
    prefix = DensePrefix()
    for stages, positions in (
        (((0, 0.5),), "keep"),
        (((0, 0.4), (2, 0.0)), "reset"),
        (((2, 0.4),), "keep"),
        ((), "keep"),
    ):
        cuts = tuple(Stage(layer=layer, keep=keep, selector="diversity") for layer, keep in stages)
        plan = Plan(stages=cuts, positions=positions)
        with torch.inference_mode(), prune(model, plan):
            plain_BTV = stepwise(model, inputs, answer_BT)
            with resume(model, plan, prefix):
                prompts = Continuation(model, begun)
                for rows in ([0, 0, 1, 2, 2], [2, 1]):  # the prefill serves as often as it is asked
                    found = followed(prompts.branch(rows), [lines[row] for row in rows])
                    for row, logits_TV in zip(rows, found, strict=True):
                        torch.testing.assert_close(logits_TV, plain_BTV[row, : lines[row].limit], rtol=1e-3, atol=1e-4)


def test_divergences_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = [[3, 1], [0], [2, 2, 4, 1]]
    dense, pruned = ([3 * torch.randn(len(t), 5, generator=generator) for t in tokens] for _ in range(2))
    kl, nll = proxy.divergences(dense, pruned, tokens)
    for one, other, own, found_kl, found_nll in zip(dense, pruned, tokens, kl, nll, strict=True):
        p, q = one.double().softmax(dim=1).tolist(), other.double().softmax(dim=1).tolist()
        per_place = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
        assert found_kl == pytest.approx(sum(per_place) / len(own), rel=1e-5)
        assert found_nll == pytest.approx(-sum(math.log(q[i][t]) for i, t in enumerate(own)) / len(own), rel=1e-5)


def test_only_the_answers_own_logits_are_kept(evaluator: Evaluator) -> None:
    evaluator(DENSE)
    for dense in evaluator._answers._dense.values():
        assert dense.logits_TV.untyped_storage().nbytes() == 4 * len(dense.tokens) * dense.logits_TV.shape[1]
