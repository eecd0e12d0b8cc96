"""A model with its processor, and the prompts and expected answers of examples in their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

from autotune.config import AutotuneError
from autotune.data import Example

__all__ = ["expected_text", "load_model", "prompt_inputs"]


def load_model(source: str, device: str) -> tuple[Any, Any]:
    """Model, in evaluation mode, float32 on CPU and its own dtype elsewhere, and processor of a folder or hub id."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = _first_line(error)
        raise AutotuneError(f"--device must be one that torch can use here, got {device!r}: {reason}") from error
    if source.startswith((".", "/", "~")) and not Path(source).is_dir():
        raise AutotuneError(f"--model must be a folder that is there, or a hub id, got {source}, which is no folder")
    try:
        processor = AutoProcessor.from_pretrained(source)
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.float32 if device == "cpu" else "auto"
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        kind = "folder" if Path(source).exists() else "folder or hub id"
        raise AutotuneError(
            f"--model must be a {kind} that transformers can load with its processor, got {source}: "
            f"{_first_line(error)}; save both with save_pretrained into one folder"
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise AutotuneError(f"the processor in {source} must have a chat template, got none; add chat_template.jinja")
    processor.tokenizer.padding_side = "left"
    return model.to(torch.device(device)).eval(), processor


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def prompt_inputs(processor: Any, examples: Sequence[Example], device: str) -> dict[str, Any]:
    """Left-padded model inputs of the examples' questions, pictures included."""
    batch = processor(
        images=[e.image for e in examples],
        text=[_prompt(processor, e.question) for e in examples],
        padding=True,
        return_tensors="pt",
    )
    return dict(batch.to(device))


def _prompt(processor: Any, question: str) -> str:
    return str(processor.apply_chat_template([_asked(question)], add_generation_prompt=True))


def _asked(question: str) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}


def expected_text(processor: Any, example: Example) -> str:
    """The expected answer as the chat template puts it after the prompt, less the end of the turn."""
    turn = {"role": "assistant", "content": [{"type": "text", "text": example.answer}]}
    whole, prompt = (
        str(processor.apply_chat_template([_asked(example.question), turn])),
        _prompt(processor, example.question),
    )
    before, answer, _ = whole.removeprefix(prompt).partition(example.answer)
    return before + answer if whole.startswith(prompt) and answer else example.answer
