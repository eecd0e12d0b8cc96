"""Trials give what a plain loop of `generate` gives, sample by sample, and stay within their memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from autotune import evaluation, reference
from autotune.answering import Line, generated, verified, why_not_verified
from autotune.config import AutotuneError
from autotune.continuation import Continuation
from autotune.data import Example, from_dataset
from autotune.evaluation import Evaluator, EvaluatorPool, load_model, prompt_inputs
from autotune.prefix_store import PrefixStore
from autotune.prompts import expected_text
from autotune.scores import Scores, joined
from autotune.tasks import SCORERS
from btp import Plan, Stage, presets, prune
from btp.prefix import DensePrefix, resume
from btp.selection import SELECTORS
from tests.btp.families import FAMILIES

NUM_EXAMPLES = 12
DENSE = Plan(stages=())
KEEP = {"dpp": 0.2}  # above, the determinant is down to rounding, and picks change with the mere size of a batch
PLANS = {
    "dense": DENSE,
    "keep 0 before layer 0": Plan(stages=(Stage(layer=0, keep=0.0),)),
    "btp_released": presets.btp_released(8, drop_last=True),
    "pyramiddrop": presets.pyramiddrop(8),
    "reset from layer 0": Plan(stages=(Stage(layer=0, keep=0.3, selector="uniform"),), positions="reset"),
    **{
        name: Plan(
            stages=(
                Stage(layer=number % 4, keep=KEEP.get(name, 0.3), selector=name, oversample=1.2),
                Stage(layer=5, keep=0.12, selector=name),
            )
        )
        for number, name in enumerate(sorted(SELECTORS))
    },
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


def naive(model: Any, processor: Any, examples: list[Example], plan: Plan) -> list[str]:
    """The answers, as one would first write it."""
    longest: dict[str, int] = {}
    for e in examples:
        num_tokens = len(processor.tokenizer.encode(e.answer, add_special_tokens=False))
        longest[e.task] = max(longest.get(e.task, 0), num_tokens)
    answers = []
    with torch.inference_mode(), prune(model, plan):
        for e in examples:
            inputs = prompt_inputs(processor, [e], "cpu")
            ids = model.generate(**inputs, max_new_tokens=longest[e.task] + 4, do_sample=False)
            text = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers.append(text.strip().lower())
    return answers


@pytest.mark.parametrize("name", PLANS)
def test_answers_and_scores_are_those_of_a_plain_loop(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example], name: str
) -> None:
    plain = naive(*loaded, examples, PLANS[name])
    for _ in range(2):  # filling the prefixes, and resuming from them
        found = evaluator(PLANS[name])
        assert list(found.answers) == plain
        assert list(found.scores) == [SCORERS[e.task](a, e.answer) for a, e in zip(plain, examples, strict=True)]
        assert sum(num for _, num in found.realised) == NUM_EXAMPLES


def test_these_plans_lead_to_right_and_to_wrong_answers(evaluator: Evaluator) -> None:
    assert 0.0 in evaluator(PLANS["keep 0 before layer 0"]).scores
    assert 1.0 in evaluator(DENSE).scores


@contextmanager
def fed(model: Any) -> Iterator[list[tuple[int, int]]]:
    """The shapes of the tokens of every forward, in a list that grows."""
    shapes: list[tuple[int, int]] = []
    handle = model.register_forward_hook(lambda *args: shapes.append(args[2]["input_ids"].shape), with_kwargs=True)
    try:
        yield shapes
    finally:
        handle.remove()


@pytest.mark.parametrize("selector", ["attention", "diversity"])
def test_answers_that_dense_gives_as_well_take_two_forwards(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example], selector: str
) -> None:
    plan = Plan(stages=(Stage(layer=4, keep=0.5, selector=selector),))
    dense, pruned = evaluator(DENSE).answers, evaluator(plan).answers
    alike = [e for e, one, other in zip(examples, dense, pruned, strict=True) if one == other]
    assert len(alike) > NUM_EXAMPLES // 2
    own = Evaluator(*loaded, alike)
    own(DENSE)
    with fed(loaded[0]) as shapes:
        own(plan)
    batches = own._batches((0, len(alike)), own._kind(plan))
    assert len(shapes) == len(batches) + sum(len(batch.branches) for batch in batches)


def test_expected_answers_are_guessed_in_the_models_own_tokens(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    processor = loaded[1]
    assert expected_text(processor, examples[0]) == f" {examples[0].answer}"
    template, processor.chat_template = processor.chat_template, "{{ messages | length }}"
    try:  # where the template does not put the answer after the prompt, the bare answer has to do
        assert expected_text(processor, examples[0]) == examples[0].answer
    finally:
        processor.chat_template = template


def test_settings_of_generation_are_honoured(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    model, processor = loaded
    examples = examples[:6]
    plan, before = PLANS["btp_released"], model.generation_config
    usual = evaluator(plan).answers[:6]
    number = next(answer for answer, e in zip(usual, examples, strict=True) if e.task == "reading")
    first = processor.tokenizer.encode(f" {number}")[0]  # of several, a digit each
    changes: dict[str, dict[str, Any]] = {
        "suppressed": {"suppress_tokens": [first]},
        "two ends": {"eos_token_id": [2, first]},
        "no end": {"eos_token_id": None},
        "penalty": {"repetition_penalty": 5.0},
    }
    for name, change in changes.items():
        model.generation_config = type(before)(**{**before.to_dict(), **change})
        try:
            own = Evaluator(model, processor, examples)
            found = own(plan).answers
            assert list(found) == naive(model, processor, examples, plan), name
            assert found != usual, name
            assert (own.decodes_because is None) == (name != "penalty")
        finally:
            model.generation_config = before


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "gemma3"])
def test_any_guess_leads_to_the_same_answer(name: str, kernel: str, padding: str) -> None:
    torch.set_num_threads(1)
    model, inputs, limits = FAMILIES[name].build(kernel), FAMILIES[name].inputs(3, padding, seed=1), [7, 5, 3]
    assert why_not_verified(model) is None
    prefix = DensePrefix()
    for stages, positions in (
        (((0, 0.5),), "keep"),
        (((0, 0.4), (2, 0.0)), "reset"),
        (((2, 0.4),), "keep"),
        ((), "keep"),
    ):
        plan = Plan(stages=tuple(Stage(layer=layer, keep=keep) for layer, keep in stages), positions=positions)
        with torch.inference_mode(), prune(model, plan), resume(model, plan, prefix):
            plain = generated(model, inputs, limits)
            assert [len(row) for row in plain] == limits
            early, late = [[5, *row[1:]] for row in plain], [[*row[:2], 5, *row[3:]] for row in plain]
            for guesses in (plain, early, late, [[], plain[1] * 3, plain[2][:1]], [[], [], []]):
                lines = [Line(guess, limit) for guess, limit in zip(guesses, limits, strict=True)]
                assert verified(model, Continuation(model, inputs), lines)[0] == plain


def test_a_sliding_window_is_decoded_and_the_reason_told() -> None:
    reason = why_not_verified(FAMILIES["gemma3"].build())
    assert reason is not None
    assert "sliding windows" in reason


def test_prefixes_over_the_bound_go_to_disk_and_come_back(
    loaded: tuple[Any, Any], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluation, "BATCH_SIZE", 4)
    plan = Plan(stages=(Stage(layer=3, keep=0.3, selector="attention"),))
    roomy = Evaluator(*loaded, examples)
    expected = roomy(plan)
    assert roomy.prefixes.num_spilled == 0
    num_batches, total = roomy.prefixes.num_held, roomy.prefixes.held_bytes
    tight = Evaluator(*loaded, examples, prefix_bytes=total // 2)
    for _ in range(3):
        assert tight(plan) == expected
        assert tight.prefixes.held_bytes <= total // 2
        assert tight.prefixes.num_held + tight.prefixes.num_spilled == num_batches
        assert tight.prefixes.num_spilled > 0


def test_a_bound_that_holds_no_batch_is_refused(loaded: tuple[Any, Any], examples: list[Example]) -> None:
    small = Evaluator(*loaded, examples, prefix_bytes=1000)
    small(Plan(stages=(Stage(layer=0, keep=0.3),)))  # nothing is dense before layer 0
    with pytest.raises(AutotuneError, match=r"one batch must fit .* use fewer --workers"):
        small(Plan(stages=(Stage(layer=1, keep=0.3),)))


def use(store: PrefixStore, key: str) -> bool:
    """Borrow a prefix and fill it with 1,000 bytes; whether it was there."""
    with store.borrowed(key) as prefix:
        was_there = bool(prefix.depths)
        prefix._output_BSD = {1: torch.zeros(1000, dtype=torch.uint8)}
    return was_there


def test_the_least_recently_used_leave_memory_and_then_the_disk() -> None:
    store = PrefixStore("cpu", memory_bytes=2500, disk_bytes=8000)
    assert not use(store, "a")
    assert not use(store, "b")
    assert use(store, "a")
    assert not use(store, "c")  # b is the oldest
    assert (store.num_held, store.num_spilled) == (2, 1)
    (file,) = store.folder.iterdir()
    assert use(store, "b")
    assert not file.exists()
    assert (store.num_held, store.num_spilled) == (2, 1)
    for key in "defghijk":
        assert not use(store, key)
    assert store.spilled_bytes <= 8000
    assert not use(store, "a")  # gone from the disk as well
    folder = store.folder
    assert any(folder.iterdir())
    del store
    assert not folder.exists()


def test_without_disk_prefixes_are_dropped() -> None:
    store = PrefixStore("cpu", memory_bytes=1500, disk_bytes=0)
    assert not use(store, "a")
    assert not use(store, "b")
    assert (store.num_held, store.num_spilled) == (1, 0)
    assert list(store.folder.iterdir()) == []
    assert not use(store, "a")


def about(few: Scores, many: Scores) -> None:
    """The same, but for rounding."""
    assert (few.answers, few.scores, few.realised) == (many.answers, many.scores, many.realised)
    assert few.kl == pytest.approx(many.kl, rel=1e-3, abs=1e-5)
    assert few.nll == pytest.approx(many.nll, rel=1e-3, abs=1e-5)


def test_a_pool_answers_alike_and_in_parts(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    plan, steps = PLANS["btp_released"], (5, 8)  # a picture is cut in two
    pool = EvaluatorPool(str(reference.WEIGHTS), {"few": examples}, 2, steps={"few": steps})
    about(pool(plan, "few"), evaluator(plan))
    about(pool(plan, "few", 5, 8), Evaluator(*loaded, examples, steps)(plan, 5, 8))
    with pytest.raises(AutotuneError, match="one of 0, 5, 8, 12, got 3 and 12"):
        pool(plan, "few", 3)


@pytest.mark.parametrize("selector", ["attention", "diversity"])
def test_parts_between_steps_are_together_the_whole(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example], selector: str
) -> None:
    plan = Plan(stages=(Stage(layer=1, keep=0.1, selector=selector),))
    own = Evaluator(*loaded, examples, steps=(4, 10, 96))
    with fed(loaded[0]) as shapes:
        first = own(plan, 0, 4)
    assert len(first.answers) == 4
    assert sum(rows for rows, _ in shapes) < 4 * NUM_EXAMPLES  # nothing is done for those not asked for
    rest = own(plan, 4)
    assert (rest, own(plan, 4, 4).answers) == (joined([own(plan, 4, 10), own(plan, 10)]), ())
    assert joined([first, rest]) == own(plan)
    about(own(plan), evaluator(plan))
    for start, stop in ((0, 5), (3, None), (10, 4)):
        with pytest.raises(AutotuneError, match=r"one of 0, 4, 10, 12, got"):
            own(plan, start, stop)


def test_conditional_plans_keep_no_prefix(
    evaluator: Evaluator, loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    own = Evaluator(*loaded, examples[:4])
    plan = Plan(stages=(Stage(layer=4, keep=0.0, attention_below=1.0),))
    sure = replace(plan, stages=(Stage(layer=4, keep=0.0),))
    assert own(plan).answers == evaluator(sure).answers[:4]
    assert own.prefixes.num_held == 0


def test_a_shard_lets_answers_become_as_long_as_the_whole_split_does(
    loaded: tuple[Any, Any], examples: list[Example]
) -> None:
    caption = next(e for e in examples if e.task == "caption")
    short, plan = [replace(caption, answer="red")], PLANS["btp_released"]
    alone, shard = (
        Evaluator(*loaded, short)(plan),
        Evaluator(*loaded, short, expected={("caption", caption.answer)})(plan),
    )
    whole = Evaluator(*loaded, [caption])(plan)
    assert shard.answers == whole.answers
    assert alone.answers != whole.answers
