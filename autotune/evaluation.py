"""Answers and scores of a model under a plan, on examples whose pictures are encoded once."""

from __future__ import annotations

import multiprocessing as mp
import signal
import sys
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any, Literal

import torch

import btp
from autotune.batches import Batch, Branch, Prompts
from autotune.config import AutotuneError
from autotune.continuation import Continuation
from autotune.data import Example
from autotune.prefix_store import MEMORY_SHARE, PrefixStore, free_bytes
from autotune.prompts import load_model, prompt_inputs
from autotune.proxy import DenseAnswers, Outcome
from autotune.scores import Realised, Scores, in_order, joined
from autotune.tasks import SCORERS
from btp.device_lock import computing
from btp.plan import Plan
from btp.prefix import resume
from btp.selection import PICTURE_ONLY

__all__ = ["AnswererDiedError", "Evaluator", "EvaluatorPool", "Scores", "is_conditional", "load_model", "prompt_inputs"]

BATCH_SIZE = 16
PULSE_S = 1.0
STOP = None  # sent to a worker that is to stop after its batch
NUM_SPARE_TOKENS = 4  # that an answer may be longer than the longest expected one of its task

Segment = tuple[int, int]  # examples from one step to the next
_Kind = Literal["whole", "by picture", "one by one"]
_Answer = Callable[[Batch, Branch, Continuation], list[Outcome]]


def is_conditional(plan: Plan) -> bool:
    """Whether what the plan drops depends on the prompt."""
    return any(stage.attention_below is not None for stage in plan.stages)


class Evaluator:
    """Scores plans on a fixed list of examples, each at a fraction of a `generate` call; the answers are the same.

    The dense model answers once. Every plan is then fed these answers, which tells how far it moves the model from
    them and verifies them as its own (`autotune.proxy`); where the two part, the rest is decoded. Where verifying is
    impossible `generate` decodes all, and `decodes_because` says why; it is None otherwise.

    Pictures are encoded once. The dense layers before a plan's first stage run once a batch and are resumed from by
    every later plan (`btp.prefix.resume`). Under a plan that looks at the picture alone, a picture is prefilled once
    for all questions about it. A conditional stage is carried out for a whole batch or not at all, so plans that have
    one are answered prompt by prompt, without kept prefixes.

    steps: where a call may start and stop; no batch reaches over one. prefix_bytes: memory for kept prefixes; None for
    a share of what is free. expected: (task, answer) of all examples where these are but some of them; the longest
    answer of a task says how long an answer may become.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        examples: Sequence[Example],
        steps: Sequence[int] = (),
        prefix_bytes: int | None = None,
        expected: Collection[tuple[str, str]] = (),
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._pulse = pulse
        self._model, self._processor, self.examples = model, processor, tuple(examples)
        self._steps = _all_steps(steps, len(self.examples))
        self._prompts = Prompts(model, processor, self.examples)
        self._answers = DenseAnswers(model, self._prompts.guesses, _limits(processor, self.examples, expected))
        self.decodes_because = self._answers.decodes_because
        self._batches = cache(self._make_batches)
        for segment in pairwise(self._steps):
            self._batches(segment, "whole")
        self._dense = cache(self._score_dense)
        self._backwards = False
        self.prefixes = PrefixStore(str(model.device), prefix_bytes)

    def __call__(self, plan: Plan, start: int = 0, stop: int | None = None) -> Scores:
        """The scores of examples[start:stop], in their order; both must be 0, a step, or the end.

        Raises AutotuneError for another start or stop, and where memory is too small for a dense prefix.
        """
        segments = _segments(self._steps, start, stop)
        self._backwards = not self._backwards  # so that the prefixes used last, which are in memory, are used first
        found = {}
        for segment in reversed(segments) if self._backwards else segments:
            dense = self._dense(segment)
            found[segment] = self._scored(plan, segment, self._answers.compare) if plan.stages else dense
        return joined([found[segment] for segment in segments])

    def _score_dense(self, segment: Segment) -> Scores:
        return self._scored(Plan(stages=()), segment, self._answers.find)

    def _scored(self, plan: Plan, segment: Segment, answer: _Answer) -> Scores:
        outcomes: dict[int, Outcome] = {}
        realised: Realised = Counter()
        kind = self._kind(plan)
        batches = list(enumerate(self._batches(segment, kind)))
        with torch.inference_mode(), btp.prune(self._model, plan) as trace:
            for number, batch in reversed(batches) if self._backwards else batches:
                self._pulse()
                with ExitStack() as resumed:
                    resumed.enter_context(computing(self._model.device, waiting=self._pulse))
                    if plan.stages and kind != "one by one":
                        prefix = resumed.enter_context(self.prefixes.borrowed((segment, kind, number)))
                        resumed.enter_context(resume(self._model, plan, prefix))
                    prompts = Continuation(self._model, batch.inputs)
                    realised[trace.counts] += batch.num_samples
                    for branch in batch.branches:
                        outcomes.update(zip(branch.samples, answer(batch, branch, prompts), strict=True))
        return self._scores(segment, [outcomes[sample] for sample in range(*segment)], realised)

    def _kind(self, plan: Plan) -> _Kind:
        if is_conditional(plan):
            return "one by one"
        picture_alone = all(stage.keep == 0.0 or stage.selector in PICTURE_ONLY for stage in plan.stages)
        return "by picture" if picture_alone and self.decodes_because is None else "whole"

    def _make_batches(self, segment: Segment, kind: _Kind) -> list[Batch]:
        if kind == "by picture":
            return self._prompts.by_picture(self._batches(segment, "whole"), BATCH_SIZE)
        return self._prompts.whole(range(*segment), BATCH_SIZE if kind == "whole" else 1)

    def _scores(self, segment: Segment, outcomes: Sequence[Outcome], realised: Realised) -> Scores:
        texts = self._processor.batch_decode([o.tokens for o in outcomes], skip_special_tokens=True)
        answers = tuple(text.strip().lower() for text in texts)
        examples = self.examples[slice(*segment)]
        return Scores(
            answers=answers,
            scores=tuple(SCORERS[e.task](answer, e.answer) for answer, e in zip(answers, examples, strict=True)),
            realised=tuple(sorted(realised.items())),
            kl=tuple(o.kl for o in outcomes),
            nll=tuple(o.nll for o in outcomes),
        )


def _limits(processor: Any, examples: Sequence[Example], expected: Collection[tuple[str, str]]) -> list[int]:
    """The most new tokens of each answer, by the longest expected one of its task."""
    longest: dict[str, int] = {}
    for task, answer in {*expected, *((e.task, e.answer) for e in examples)}:
        num_tokens = len(processor.tokenizer.encode(answer, add_special_tokens=False))
        longest[task] = max(longest.get(task, 0), num_tokens)
    return [longest[e.task] + NUM_SPARE_TOKENS for e in examples]


def _all_steps(steps: Sequence[int], num_examples: int) -> list[int]:
    """The steps that there are, with the first example and the end among them."""
    return sorted({0, num_examples, *(step for step in steps if 0 < step < num_examples)})


def _segments(steps: Sequence[int], start: int, stop: int | None) -> list[Segment]:
    stop = steps[-1] if stop is None else stop
    if start not in steps or stop not in steps or start > stop:
        raise AutotuneError(
            f"an evaluation must start and stop at one of {', '.join(map(str, steps))}, got {start} and {stop}; name "
            "others in `steps`"
        )
    return list(pairwise(steps[steps.index(start) : steps.index(stop) + 1]))


class AnswererDiedError(AutotuneError):
    """A process that answered questions is gone, most likely for want of memory."""


class _Stop(Exception):
    """Whoever asked wants the answer no more."""


class EvaluatorPool:
    """The same scores from several CPU processes, one thread each, all questions about a picture in one of them.

    Two single-threaded processes beat one with two threads, and do not fall over when something else needs a core.
    Each holds one copy of the model and prepares a split when it is first asked for. They idle while nobody asks, so a
    latency measured in between is undisturbed, and end with this process, however it ends. steps: as an `Evaluator`'s,
    by split; none for a split that is not there. pulse: called every second or so, as an `Evaluator`'s.
    """

    def __init__(
        self,
        source: str,
        splits: Mapping[str, Sequence[Example]],
        num_workers: int,
        steps: Mapping[str, Sequence[int]] = MappingProxyType({}),
        pulse: Callable[[], None] = lambda: None,
    ) -> None:
        self._pulse = pulse
        self._shards = {name: _shards(examples, num_workers) for name, examples in splits.items()}
        self._steps = {name: _all_steps(steps.get(name, ()), len(examples)) for name, examples in splits.items()}
        prefix_bytes = int(MEMORY_SHARE * free_bytes("cpu")) // (num_workers * len(splits))
        context = mp.get_context("spawn")
        self._pipes: list[Connection] = []
        expected = {name: frozenset((e.task, e.answer) for e in examples) for name, examples in splits.items()}
        for worker in range(num_workers):
            ours, theirs = context.Pipe()
            own = {}
            for name, examples in splits.items():
                shard = self._shards[name][worker]
                own_steps = [bisect_left(shard, step) for step in self._steps[name]]
                own[name] = _Shard([examples[i] for i in shard], own_steps, prefix_bytes, expected[name])
            context.Process(target=_serve, args=(theirs, source, own), daemon=True).start()
            theirs.close()
            self._pipes.append(ours)

    def __call__(self, plan: Plan, split: str, start: int = 0, stop: int | None = None) -> Scores:
        """As `Evaluator.__call__`, on a split. Raises what a worker raised."""
        _segments(self._steps[split], start, stop)
        asked = range(start, self._steps[split][-1] if stop is None else stop)
        bounds = [[bisect_left(shard, end) for end in (asked.start, asked.stop)] for shard in self._shards[split]]
        try:
            for pipe, own in zip(self._pipes, bounds, strict=True):
                pipe.send((plan, split, *own))
            parts = self._received()
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise AnswererDiedError(
                "a worker process must live until the job ends, but one died; if memory ran out, use fewer --workers, "
                "and run the same command again to resume"
            ) from error
        for part in parts:
            if isinstance(part, Exception):
                raise part
        shards = [shard[slice(*own)] for shard, own in zip(self._shards[split], bounds, strict=True)]
        return in_order(parts, [sample for shard in shards for sample in shard])

    def _received(self) -> list[Any]:
        """What every worker sends. Where the pulse raises, they stop after their batch: the next call gets its own."""
        try:
            for pipe in self._pipes:
                while not pipe.poll(PULSE_S):
                    self._pulse()
        except BaseException:
            for pipe in self._pipes:
                pipe.send(STOP)
            for pipe in self._pipes:
                pipe.recv()
            raise
        return [pipe.recv() for pipe in self._pipes]


@dataclass(frozen=True, slots=True)
class _Shard:
    """What a worker needs to make its evaluator of a split."""

    examples: list[Example]
    steps: list[int]
    prefix_bytes: int
    expected: frozenset[tuple[str, str]]

    def evaluator(self, model: Any, processor: Any, pulse: Callable[[], None]) -> Evaluator:
        return Evaluator(model, processor, self.examples, self.steps, self.prefix_bytes, self.expected, pulse)


def _shards(examples: Sequence[Example], num_workers: int) -> list[list[int]]:
    """Indices of the examples that each worker answers, rising."""
    images = {image_id: number for number, image_id in enumerate(dict.fromkeys(e.image_id for e in examples))}
    return [[i for i, e in enumerate(examples) if images[e.image_id] % num_workers == w] for w in range(num_workers)]


def _serve(pipe: Connection, source: str, splits: Mapping[str, _Shard]) -> None:
    """One worker: score the plans that come through the pipe until its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end closes the pipe
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # as at any exit, spilled prefixes are removed
    torch.set_num_threads(1)
    loaded = cache(lambda: load_model(source, "cpu"))

    def pulse() -> None:
        if pipe.poll():
            raise _Stop

    evaluator = cache(lambda split: splits[split].evaluator(*loaded(), pulse))
    try:
        while True:
            asked = pipe.recv()
            if asked is STOP:
                continue
            plan, split, start, stop = asked
            try:
                pipe.send(evaluator(split)(plan, start, stop))
            except Exception as error:  # the trial boundary: whatever went wrong here is raised by the asker
                pipe.send(error)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
