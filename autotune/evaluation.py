"""Answers and scores of a model under a plan, on examples whose pictures are encoded once."""

from __future__ import annotations

import multiprocessing as mp
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging as transformers_logging

import btp
from autotune.config import AutotuneError
from autotune.data import Example
from autotune.tasks import SCORERS
from btp.encoding import join_pictures, split_pictures
from btp.families import anatomy_of
from btp.plan import Plan
from btp.prefix import encode_images

__all__ = ["Evaluator", "EvaluatorPool", "Scores", "is_conditional", "load_model", "prompt_inputs"]

BATCH_SIZE = 24
IMAGES_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Scores:
    """Per-sample answers and scores in [0, 1], in the order of the examples.

    realised: the image tokens by layer that prefills had, each with the number of samples that had them.
    """

    answers: tuple[str, ...]
    scores: tuple[float, ...]
    realised: tuple[tuple[tuple[int, ...], int], ...]


def is_conditional(plan: Plan) -> bool:
    """Whether what the plan drops depends on the prompt."""
    return any(stage.attention_below is not None for stage in plan.stages)


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
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return str(processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True))


class Evaluator:
    """Scores plans on a fixed list of examples; prompts and encoded pictures are prepared once and kept.

    Examples are batched by task and prompt length, so that short answers do not wait for long ones. A conditional
    stage is carried out for a whole batch or not at all, so plans that have one are answered prompt by prompt.
    """

    def __init__(self, model: Any, processor: Any, examples: Sequence[Example]) -> None:
        self._model, self._processor, self.examples = model, processor, tuple(examples)
        self._device = str(model.device)
        longest = {e.task: 0 for e in examples}
        for e in examples:
            num_tokens = len(processor.tokenizer.encode(e.answer, add_special_tokens=False))
            longest[e.task] = max(longest[e.task], num_tokens)
        self._max_new_tokens = {task: num_tokens + 4 for task, num_tokens in longest.items()}
        self._encoded: dict[str, Any] = {}  # by picture; empty where the model takes none, or they do not come apart
        self._num_image_tokens: dict[str, int] = {}  # by picture
        self._encode_images()
        self._batches = cache(self._prepare)
        self._batches(BATCH_SIZE)

    def _prepare(self, batch_size: int) -> list[tuple[list[int], dict[str, Any]]]:
        groups: list[list[int]] = []
        for index in sorted(range(len(self.examples)), key=self._batch_key):
            alike = groups and self._batch_key(groups[-1][0])[:2] == self._batch_key(index)[:2]
            if alike and len(groups[-1]) < batch_size:
                groups[-1].append(index)
            else:
                groups.append([index])
        return [(group, self._batch([self.examples[i] for i in group])) for group in groups]

    def _batch_key(self, index: int) -> tuple[str, int, int, int]:
        """Rows of a batch need one task and equally many image tokens."""
        example = self.examples[index]
        return example.task, self._num_image_tokens[example.image_id], len(example.question), index

    def _encode_images(self) -> None:
        """Each picture once, however often it is asked about."""
        firsts = list({e.image_id: e for e in self.examples}.values())
        anatomy = anatomy_of(self._model)
        for start in range(0, len(firsts), IMAGES_AT_ONCE):
            chunk = firsts[start : start + IMAGES_AT_ONCE]
            names = [e.image_id for e in chunk]
            inputs = prompt_inputs(self._processor, chunk, self._device)
            self._num_image_tokens.update(zip(names, anatomy.image_mask(inputs).sum(dim=1).tolist(), strict=True))
            with torch.inference_mode():
                encoded = encode_images(self._model, inputs).get("mm_encoder_outputs")
            pictures = None if encoded is None else split_pictures(encoded["image"])
            if pictures is not None:
                self._encoded.update(zip(names, pictures, strict=True))

    def _batch(self, examples: Sequence[Example]) -> dict[str, Any]:
        inputs = prompt_inputs(self._processor, examples, self._device)
        if not self._encoded:
            return inputs
        pictures = join_pictures([self._encoded[e.image_id] for e in examples])
        kept = {name: value for name, value in inputs.items() if name not in ("pixel_values", "pixel_attention_mask")}
        return {**kept, "mm_encoder_outputs": {"image": pictures}}

    def __call__(self, plan: Plan) -> Scores:
        """All scores of a plan, in the order of the examples."""
        answers = [""] * len(self.examples)
        realised: Counter[tuple[int, ...]] = Counter()
        batches = self._batches(1 if is_conditional(plan) else BATCH_SIZE)
        with btp.prune(self._model, plan) as trace:
            for group, inputs in batches:
                for index, answer in zip(group, self._generate(inputs, self.examples[group[0]].task), strict=True):
                    answers[index] = answer
                realised[trace.counts] += len(group)
        scores = (SCORERS[e.task](answer, e.answer) for answer, e in zip(answers, self.examples, strict=True))
        return Scores(tuple(answers), tuple(scores), tuple(sorted(realised.items())))

    def _generate(self, inputs: dict[str, Any], task: str) -> list[str]:
        with torch.inference_mode():
            # Copies, since `generate` fills the dictionary of encoder outputs it is handed.
            own = {name: dict(value) if isinstance(value, dict) else value for name, value in inputs.items()}
            ids = self._model.generate(**own, max_new_tokens=self._max_new_tokens[task], do_sample=False)
        new = ids[:, inputs["input_ids"].shape[1] :]
        return [text.strip().lower() for text in self._processor.batch_decode(new, skip_special_tokens=True)]


class EvaluatorPool:
    """The same scores from several CPU processes, one thread each, all questions about a picture in one of them.

    Two single-threaded processes beat one with two threads, and do not fall over when something else needs a core.
    Each holds one copy of the model and prepares a split when it is first asked for. They idle while nobody asks, so a
    latency measured in between is undisturbed, and end with this process, however it ends.
    """

    def __init__(self, source: str, splits: Mapping[str, Sequence[Example]], num_workers: int) -> None:
        self._shards = {name: _shards(examples, num_workers) for name, examples in splits.items()}
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        for worker in range(num_workers):
            ours, theirs = context.Pipe()
            own = {name: [splits[name][i] for i in shards[worker]] for name, shards in self._shards.items()}
            context.Process(target=_serve, args=(theirs, source, own), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def __call__(self, plan: Plan, split: str) -> Scores:
        """All scores of a plan on a split, in the order of its examples. Raises what a worker raised."""
        shards = self._shards[split]
        found: dict[int, tuple[str, float]] = {}
        realised: Counter[tuple[int, ...]] = Counter()
        try:
            for pipe in self._pipes:
                pipe.send((plan, split))
            parts = [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise AutotuneError(
                "a worker process must live until the job ends, but one died; if memory ran out, use fewer --workers, "
                "and run the same command again to resume"
            ) from error
        for shard, part in zip(shards, parts, strict=True):
            if isinstance(part, Exception):
                raise part
            found.update(zip(shard, zip(part.answers, part.scores, strict=True), strict=True))
            realised.update(dict(part.realised))
        answers, scores = zip(*(found[index] for index in range(len(found))), strict=True)
        return Scores(answers, scores, tuple(sorted(realised.items())))


def _shards(examples: Sequence[Example], num_workers: int) -> list[list[int]]:
    """Indices of the examples that each worker answers."""
    images = {image_id: number for number, image_id in enumerate(dict.fromkeys(e.image_id for e in examples))}
    return [[i for i, e in enumerate(examples) if images[e.image_id] % num_workers == w] for w in range(num_workers)]


def _serve(pipe: Connection, source: str, splits: Mapping[str, Sequence[Example]]) -> None:
    """One worker: score the plans that come through the pipe until its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end closes the pipe
    torch.set_num_threads(1)
    loaded = cache(lambda: load_model(source, "cpu"))
    evaluator = cache(lambda split: Evaluator(*loaded(), splits[split]))
    try:
        while True:
            plan, split = pipe.recv()
            try:
                pipe.send(evaluator(split)(plan))
            except Exception as error:  # the trial boundary: whatever went wrong here is raised by the asker
                pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
