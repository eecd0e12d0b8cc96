"""Answers and scores of a model under a plan, on examples whose pictures are encoded once."""

from __future__ import annotations

import multiprocessing as mp
import signal
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import torch

import btp
from autotune.answering import generated, verified, why_not_verified
from autotune.config import AutotuneError
from autotune.data import Example
from autotune.prefix_store import MEMORY_SHARE, PrefixStore, free_bytes
from autotune.prompts import expected_text, load_model, prompt_inputs
from autotune.tasks import SCORERS
from btp.encoding import join_pictures, split_pictures
from btp.families import anatomy_of
from btp.plan import Plan
from btp.prefix import encode_images, resume

__all__ = ["Evaluator", "EvaluatorPool", "Scores", "is_conditional", "load_model", "prompt_inputs"]

BATCH_SIZE = 16
IMAGES_AT_ONCE = 8
NUM_SPARE_TOKENS = 4  # that an answer may be longer than the longest expected one of its task


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


class Evaluator:
    """Scores plans on a fixed list of examples, each at a fraction of a `generate` call; the answers are the same.

    Pictures are encoded once. The dense layers before a plan's first stage run once a batch and are resumed from by
    every later plan (`btp.prefix.resume`). Answers are found by verifying the expected ones (`autotune.answering`);
    where that is impossible, `generate` decodes them, and `decodes_because` says why; it is None otherwise.

    Rows of a batch have equally many image tokens, and prompts of one length wherever that fills half a batch. A
    conditional stage is carried out for a whole batch or not at all, so plans that have one are answered prompt by
    prompt, without kept prefixes. prefix_bytes: memory for those; None for a share of what is free.
    """

    def __init__(
        self, model: Any, processor: Any, examples: Sequence[Example], prefix_bytes: int | None = None
    ) -> None:
        self._model, self._processor, self.examples = model, processor, tuple(examples)
        self._device = str(model.device)
        self.decodes_because = why_not_verified(model)
        self._prepare_text()
        self._encoded: dict[str, Any] = {}  # by picture; empty where the model takes none, or they do not come apart
        self._num_image_tokens: dict[str, int] = {}  # by picture
        self._encode_images()
        self._batches = cache(self._prepare)
        self._batches(BATCH_SIZE)
        self._backwards = False
        self.prefixes = PrefixStore(self._device, prefix_bytes)

    def _prepare_text(self) -> None:
        """The expected answers in the tokens the model would say them in, and how long each task's may become."""
        encode = partial(self._processor.tokenizer.encode, add_special_tokens=False)
        self._guesses = [encode(expected_text(self._processor, e)) for e in self.examples]
        longest: dict[str, int] = {}
        for e in self.examples:
            longest[e.task] = max(longest.get(e.task, 0), len(encode(e.answer)))
        self._limits = [longest[e.task] + NUM_SPARE_TOKENS for e in self.examples]
        self._lengths = [len(encode(e.question)) for e in self.examples]

    def _prepare(self, batch_size: int) -> list[tuple[list[int], dict[str, Any]]]:
        groups: list[list[int]] = []
        for index in sorted(range(len(self.examples)), key=self._batch_key):
            if groups and self._belongs(index, groups[-1], batch_size):
                groups[-1].append(index)
            else:
                groups.append([index])
        return [(group, self._batch([self.examples[i] for i in group])) for group in groups]

    def _batch_key(self, index: int) -> tuple[int, int, int, int]:
        num_image_tokens = self._num_image_tokens[self.examples[index].image_id]
        return num_image_tokens, self._lengths[index], len(self._guesses[index]), index

    def _belongs(self, index: int, group: Sequence[int], batch_size: int) -> bool:
        """Whether the next example goes into the group: equally many image tokens, and padding only to fill it."""
        (num_image_tokens, length, *_), (own_num, own_length, *_) = self._batch_key(group[0]), self._batch_key(index)
        fits = num_image_tokens == own_num and len(group) < batch_size
        return fits and (length == own_length or 2 * len(group) < batch_size)

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
        """All scores of a plan, in the order of the examples. Raises AutotuneError where memory is too small."""
        answers = [""] * len(self.examples)
        realised: Counter[tuple[int, ...]] = Counter()
        conditional = is_conditional(plan)
        batches = list(enumerate(self._batches(1 if conditional else BATCH_SIZE)))
        self._backwards = not self._backwards  # so that the prefixes used last, which are in memory, are used first
        with torch.inference_mode(), btp.prune(self._model, plan) as trace:
            for number, (group, inputs) in reversed(batches) if self._backwards else batches:
                with ExitStack() as resumed:
                    if not conditional:
                        prefix = resumed.enter_context(self.prefixes.borrowed(number))
                        resumed.enter_context(resume(self._model, plan, prefix))
                    for index, answer in zip(group, self._answer(group, inputs), strict=True):
                        answers[index] = answer
                realised[trace.counts] += len(group)
        scores = (SCORERS[e.task](answer, e.answer) for answer, e in zip(answers, self.examples, strict=True))
        return Scores(tuple(answers), tuple(scores), tuple(sorted(realised.items())))

    def _answer(self, group: Sequence[int], inputs: dict[str, Any]) -> list[str]:
        limits = [self._limits[index] for index in group]
        if self.decodes_because is None:
            tokens = verified(self._model, inputs, [self._guesses[index] for index in group], limits)
        else:
            tokens = generated(self._model, inputs, limits)
        return [text.strip().lower() for text in self._processor.batch_decode(tokens, skip_special_tokens=True)]


class EvaluatorPool:
    """The same scores from several CPU processes, one thread each, all questions about a picture in one of them.

    Two single-threaded processes beat one with two threads, and do not fall over when something else needs a core.
    Each holds one copy of the model and prepares a split when it is first asked for. They idle while nobody asks, so a
    latency measured in between is undisturbed, and end with this process, however it ends.
    """

    def __init__(self, source: str, splits: Mapping[str, Sequence[Example]], num_workers: int) -> None:
        self._shards = {name: _shards(examples, num_workers) for name, examples in splits.items()}
        prefix_bytes = int(MEMORY_SHARE * free_bytes("cpu")) // (num_workers * len(splits))
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        for worker in range(num_workers):
            ours, theirs = context.Pipe()
            own = {name: [splits[name][i] for i in shards[worker]] for name, shards in self._shards.items()}
            context.Process(target=_serve, args=(theirs, source, own, prefix_bytes), daemon=True).start()
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


def _serve(pipe: Connection, source: str, splits: Mapping[str, Sequence[Example]], prefix_bytes: int) -> None:
    """One worker: score the plans that come through the pipe until its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end closes the pipe
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as at any exit, spilled prefixes are removed
    torch.set_num_threads(1)
    loaded = cache(lambda: load_model(source, "cpu"))
    evaluator = cache(lambda split: Evaluator(*loaded(), splits[split], prefix_bytes))
    try:
        while True:
            plan, split = pipe.recv()
            try:
                pipe.send(evaluator(split)(plan))
            except Exception as error:  # the trial boundary: whatever went wrong here is raised by the asker
                pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
