"""The reference VLM and its questions: the same every time, nothing shared between splits, and it needs its eyes."""

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autotune import data, reference
from autotune.certify import ScoreTable
from autotune.evaluation import Evaluator, EvaluatorPool, load_model
from autotune.reference import questions, scenes
from btp import presets
from btp.errors import PlanError
from btp.plan import Plan, Stage


def hashes(split: str, seed: int | None = None) -> set[str]:
    return {hashlib.sha256(row["image"].tobytes()).hexdigest() for row in reference.dataset(split, seed)}


def test_the_certify_split_is_large_and_shares_no_picture() -> None:
    ids = {split: hashes(split) for split in reference.SPLITS}
    assert sum(map(len, ids.values())) == len(set().union(*ids.values()))
    certify = reference.dataset("certify")
    assert len(certify) >= 2000
    assert set(Counter(certify["task"])) == set(questions.TASKS)
    assert sorted(certify.column_names) == ["answer", "image", "question", "task"]


def test_a_split_is_the_same_every_time_and_a_seed_gives_fresh_scenes() -> None:
    assert hashes("calibrate") == hashes("calibrate")
    assert not hashes("calibrate") & hashes("calibrate", seed=1)
    assert hashes("calibrate", seed=1) == hashes("calibrate", seed=1)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate, select, certify"):
        reference.dataset("test")


def test_yes_and_no_are_balanced() -> None:
    rng = np.random.default_rng(5)
    asked = [questions.ask(scenes.sample(rng), "existence", rng) for _ in range(2000)]
    share = np.mean([q is not None and q.answer == "yes" for q in asked])
    assert 0.45 < share < 0.57


def test_patch_labels_say_what_the_picture_shows() -> None:
    rng = np.random.default_rng(6)
    for _ in range(20):
        scene = scenes.sample(rng)
        pixels = np.asarray(scenes.draw(scene)).astype(int)
        labels = scenes.patch_labels(scene)
        for item in scene.items:
            if item.kind == "sign":
                row, column = item.y // scenes.PATCH_SIZE, item.x // scenes.PATCH_SIZE
                assert [str(labels["digit"][row, column + slot]) for slot in range(3)] == list(item.text)
            else:
                x, y = item.x + item.size // 2, item.y + item.size // 2
                assert tuple(pixels[y, x]) == scenes.COLORS[item.color]
                patch = y // scenes.PATCH_SIZE, x // scenes.PATCH_SIZE
                assert scenes.LABELS["kind"][labels["kind"][patch]] == item.kind


def test_prompts_and_answers_go_through_generate() -> None:
    model, processor = reference.load()
    row = reference.dataset("calibrate")[0]
    content = [{"type": "image"}, {"type": "text", "text": row["question"]}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=row["image"], text=text, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert new[-1] == model.config.text_config.eos_token_id
    assert model.config.image_seq_length == 256
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 256


def test_it_sees_and_is_lost_without_sight() -> None:
    examples = data.from_dataset(reference.dataset("select"), "select")
    evaluator = Evaluator(*load_model(str(reference.WEIGHTS), "cpu"), examples)
    table = ScoreTable([e.image_id for e in examples], [e.task for e in examples])
    dense = table.by_task(evaluator(Plan(stages=())).scores)
    blind = table.macro(evaluator(Plan(stages=(Stage(layer=0, keep=0.0),))).scores)
    assert np.mean(list(dense.values())) >= 0.85
    assert min(dense.values()) >= 0.7
    assert blind.value < 0.45


def test_several_processes_answer_like_one() -> None:
    examples = data.from_dataset(reference.dataset("calibrate"), "calibrate")[:48]
    plan = presets.btp_released(8)
    pool = EvaluatorPool(str(reference.WEIGHTS), {"few": examples}, 2)
    pooled = pool(plan, "few")
    alone = Evaluator(*load_model(str(reference.WEIGHTS), "cpu"), examples)(plan)
    assert (pooled.answers, pooled.scores, pooled.realised) == (alone.answers, alone.scores, alone.realised)
    assert pooled.kl == pytest.approx(alone.kl, abs=1e-5)  # other batches add up in another order
    assert pooled.nll == pytest.approx(alone.nll, abs=1e-5)
    bad = Plan(stages=(Stage(layer=99, keep=0.5),))
    with pytest.raises(PlanError, match="below the model's 8 layers"):
        pool(bad, "few")
    assert pool(plan, "few") == pooled


def test_the_card_speaks_of_these_weights() -> None:
    card = (reference.WEIGHTS / "MODEL_CARD.md").read_text()
    figures = json.loads(card.rpartition("<!-- ")[2].partition(" -->")[0])
    assert figures["weights"] == hashlib.sha256((reference.WEIGHTS / "model.safetensors").read_bytes()).hexdigest()
    assert figures["dense"]["macro"][0] >= 0.85
    assert min(value for task, value in figures["dense"].items() if task != "macro") >= 0.7
    assert figures["blind"]["macro"][0] < 0.45
    assert sum(path.stat().st_size for path in reference.WEIGHTS.iterdir()) < 25e6


def test_training_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    from autotune.reference.train import Trainer

    torch.set_num_threads(1)
    for stage, steps in (("vision", 1), ("language", 1), ("vision", 2), ("align", 1), ("joint", 1)):
        trainer = Trainer(tmp_path, stage, steps, batch=2, lr=1e-3, device="cpu", seed=0)
        assert trainer.step == (1 if (stage, steps) == ("vision", 2) else 0)
        trainer.run(report_every=1)
        assert trainer.step == steps
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("vision", 1),
        ("language", 1),
        ("vision", 2),
        ("align", 1),
        ("joint", 1),
    ]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_pictures_reach_the_model_as_training_showed_them() -> None:
    from autotune.reference.batches import pixels_of

    scene = scenes.sample(np.random.default_rng(0))
    _, processor = reference.load()
    image = scenes.draw(scene)
    assert isinstance(image, Image.Image)
    ours = pixels_of([scene])
    theirs = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
