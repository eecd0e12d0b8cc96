"""The reference VLM's tokenizer: byte-level BPE, so any text can be asked, with the task's words as single tokens."""

from __future__ import annotations

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from autotune.reference import questions, scenes

__all__ = ["CHAT_TEMPLATE", "build_processor", "word_ids"]

CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{{ ' ' if not loop.first }}{{ message['role'].upper() }}:"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{{ ' <image>\n' if part['type'] == 'image' else (part['text'] if loop.index0 else ' ' + part['text']) }}"
    "{% endfor %}{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' }}"
    "{% endfor %}{{ ' ASSISTANT:' if add_generation_prompt }}"
)


def build_processor(vocab_size: int = 640, num_scenes: int = 2000) -> LlavaProcessor:
    """Train the BPE on questions of seeded scenes and wrap it, with CLIP's pixel statistics, as a `LlavaProcessor`."""
    bpe = Tokenizer(models.BPE())
    digits = pre_tokenizers.Split(Regex(r"\d"), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(num_scenes), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    size = {"height": scenes.IMAGE_SIZE, "width": scenes.IMAGE_SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=scenes.PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the tower's [CLS], which "default" leaves out
        chat_template=CHAT_TEMPLATE,
    )


def word_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, list[int]]:
    """Token id of every word of every label group; a ValueError where a word is not one token."""
    ids = {}
    for group, words in scenes.LABELS.items():
        pieces = [
            tokenizer.encode(word if group == "digit" else f" {word}", add_special_tokens=False) for word in words
        ]
        if any(len(piece) != 1 for piece in pieces):
            raise ValueError(f"every word of {group!r} must be one token, got {pieces}; raise vocab_size")
        ids[group] = [piece[0] for piece in pieces]
    return ids


def _corpus(num_scenes: int) -> list[str]:
    rng = np.random.default_rng(0)
    lines = [f" {word}" for words in scenes.LABELS.values() for word in words for _ in range(500)]
    for _ in range(num_scenes):
        scene = scenes.sample(rng)
        for task in questions.TASKS:
            if (asked := questions.ask(scene, task, rng)) is not None:
                lines.append(f"USER: \n{asked.question} ASSISTANT: {asked.answer}")
    return lines
