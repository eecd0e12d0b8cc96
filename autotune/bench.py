"""A model on this device with its examples: what a plan's latency and answers are, each plan answered once."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch

from autotune import data, racing
from autotune.certify import Interval, ScoreTable
from autotune.config import Limit, RunConfig
from autotune.data import Example
from autotune.evaluation import Evaluator, EvaluatorPool, Scores, load_model, prompt_inputs
from autotune.learn import learn
from autotune.plan_file import measure_ratio, model_digest
from autotune.scores import joined
from autotune.store import Database, Results
from btp.calibration import cosine_shift, stage_layers, withdrawal_layer
from btp.cost import image_token_flops, kv_cache_bytes
from btp.errors import PlanError
from btp.families import anatomy_of
from btp.latency import device_key
from btp.plan import Plan
from btp.profile import Workload

__all__ = ["Bench"]

NUM_CALIBRATION = 64  # samples of BTP's calibration
NUM_WITHDRAWAL = 20  # samples of VTW's layer search
LEARNING_STEPS = 120
NUM_LEARNED = 3  # stages of a plan that is learned for a latency limit: FLOPs do not tell what a stage takes
BATCH_SIZE = 16
SHARP = 0.05  # width of an interval that is kept


class Bench:
    """Loads the model once; prepares a split's prompts and pictures when it is first scored; keeps what it found.

    splits: as handed in, but `select` in the order in which trials race over it. looks: after how many of its samples.
    pulse: called from time to time while it works, for whoever wants a sign of life; what it raises ends the work.
    """

    def __init__(self, config: RunConfig, splits: Mapping[str, Sequence[Example]], limit: Limit) -> None:
        self._config, self._limit = config, limit
        select = splits["select"]
        order = racing.order([e.task for e in select], [e.image_id for e in select], seed=0)
        self.splits = {**splits, "select": [select[index] for index in order]}
        self.looks = racing.looks(len(select))
        torch.set_num_threads(config.threads)
        self.model, self._processor = load_model(config.model, config.device)
        self._inputs = prompt_inputs(self._processor, splits["calibrate"][:1], config.device)
        self.anatomy = anatomy_of(self.model)
        self.key = device_key(self.model, self._inputs)
        self.data_digests = {name: data.digest(splits[name]) for name in data.SPLITS}
        self.model_digest = model_digest(config.model)
        identity = [self.model_digest, *self.data_digests.values(), str(self.key)]
        self.digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.database = Database(config.database)
        self.results = Results(self.database, self.digest)
        self.pulse: Callable[[], None] = lambda: None
        self._in_memory: dict[str, Scores] = {}
        self._evaluate = cache(self._make_evaluator)
        self.table = cache(self._make_table)

    @property
    def workload(self) -> Workload:
        """What is run here: the part of the device's key that a profile is made for."""
        return Workload(**{field.name: getattr(self.key, field.name) for field in fields(Workload)})

    @property
    def image_processor(self) -> Any:
        return self._processor.image_processor

    def inputs_of(self, example: Example) -> dict[str, Any]:
        """Model inputs of one question about its picture."""
        return prompt_inputs(self._processor, [example], self._config.device)

    def cost_of(self, tokens: Sequence[int]) -> tuple[float, float]:
        """Of image tokens by layer, in the prompt that latency is measured with: their GFLOPs, and the cache's MiB."""
        decoder, num_text_tokens = self.anatomy.decoder, self.key.prompt_tokens - self.key.image_tokens
        gflops = image_token_flops(tokens, decoder.hidden_size, decoder.intermediate_size) / 1e9
        size = self.model.dtype.itemsize
        return gflops, kv_cache_bytes(decoder, tokens, num_text_tokens, bytes_per_number=size) / 2**20

    def ratio(self, plan: Plan, effort: int = 1) -> tuple[Interval, float]:
        """Measured latency ratio to dense, and dense's milliseconds, with `effort` times the usual pairs."""
        return self._measured(plan, effort * self._config.repeats)

    def kept_ratio(self, plan: Plan) -> tuple[Interval, float]:
        """The measured latency ratio to a width of `SHARP`, and dense's milliseconds; measured once, also over runs."""

        def compute() -> dict[str, Any]:
            ratio, dense_ms = self._measured(plan, self._config.repeats, SHARP)
            return {"ratio": asdict(ratio), "dense_ms": dense_ms}

        found = self.results.once(f"latency-{self._limit}-{self._config.repeats}-{plan.digest[:20]}", compute)
        return Interval(**found["ratio"]), found["dense_ms"]

    def _measured(self, plan: Plan, repeats: int, width: float | None = None) -> tuple[Interval, float]:
        def note(dense_ms: Sequence[float], pruned_ms: Sequence[float]) -> None:
            if self.database.exists:  # an SQLite file is not made for what is measured before there is a study
                self.results.measured(asdict(self.key), plan.digest, str(self._limit), dense_ms, pruned_ms)

        return measure_ratio(self.model, self._inputs, plan, self._limit, repeats, width, note, lambda: self.pulse())

    def calibrated_layers(self, num_stages: int) -> tuple[int, ...]:
        """Stage layers right after the peaks of the cosine shift on `calibrate`, as BTP finds them."""
        # One question a picture: image tokens come before the question, so all about one picture say the same.
        once = list({e.image_id: e for e in self.splits["calibrate"]}.values())
        return stage_layers(cosine_shift(self.model, self._batches(once, NUM_CALIBRATION, BATCH_SIZE)), num_stages)

    def withdrawal_layer(self) -> int | None:
        """The layer before which VTW's search on `calibrate` drops every image token; None where it finds none."""
        try:
            return withdrawal_layer(self.model, self._batches(self.splits["calibrate"], NUM_WITHDRAWAL, 1))
        except PlanError:
            return None

    def learned(self, budget: float, say: Callable[[str], None], steps: int = LEARNING_STEPS) -> dict[str, Any]:
        """The plan learned by gradient on `calibrate` at a share of dense's FLOPs; learned once, also over runs.

        As "plan", its "cost" as such a share, and the "seconds" that it took.
        """

        def say_alive(what: str) -> None:
            self.pulse()
            say(what)

        def compute() -> dict[str, Any]:
            found = learn(
                self.model,
                self._processor,
                self.splits["calibrate"],
                budget,
                seed=self._config.seed,
                steps=steps,
                max_stages=NUM_LEARNED,
                say=say_alive,
            )
            return {"plan": found.plan.to_dict(), "cost": found.cost, "seconds": found.seconds}

        return self.results.once(f"learned-{self._config.seed}-{NUM_LEARNED}-{steps}-{budget:.3f}", compute)

    def _batches(self, examples: Sequence[Example], num_samples: int, size: int) -> Iterator[dict[str, Any]]:
        """Model inputs of examples drawn by the seed, in the order they came."""
        drawn = random.Random(self._config.seed).sample(range(len(examples)), min(num_samples, len(examples)))
        few = [examples[index] for index in sorted(drawn)]
        for start in range(0, len(few), size):
            yield prompt_inputs(self._processor, few[start : start + size], self._config.device)

    def num_text_tokens(self, split: str) -> int:
        """Text tokens of the split's median prompt, by the length of its question."""
        ordered = sorted(self.splits[split], key=lambda e: len(self._processor.tokenizer.encode(e.question)))
        inputs = prompt_inputs(self._processor, [ordered[len(ordered) // 2]], self._config.device)
        key = device_key(self.model, inputs)
        return key.prompt_tokens - key.image_tokens

    def scores(self, plan: Plan, split: str) -> Scores:
        """Scores of a plan on a whole split; computed once, also over several runs of the job."""
        *_, whole = self.running_scores(plan, split)
        return whole

    def running_scores(self, plan: Plan, split: str) -> Iterator[Scores]:
        """Scores on ever more of a split, look after look; what was computed once is not computed again."""
        parts: list[Scores] = []
        for start, stop in self._parts(split):
            parts.append(self._part(plan, split, start, stop))
            yield joined(parts)

    def answers(self, plan: Plan) -> dict[str, Any]:
        """The plan's scores on `select` as plain data, by the number of the sample that a part begins with."""
        return {str(start): asdict(self._part(plan, "select", start, stop)) for start, stop in self._parts("select")}

    def adopt(self, plan: Plan, answers: Mapping[str, Any]) -> None:
        """Keep what `answers` gave elsewhere for the same weights and questions, as if the plan had answered here.

        Parts that were cut otherwise, as by a version that looks after other numbers of samples, are left out.
        """
        for start, stop in self._parts("select"):
            part = answers.get(str(start), {})
            if len(part.get("scores", ())) == stop - start:
                self.results.answers(_part_name(plan, "select", start), partial(_scores, part))

    def scores_anew(self, plan: Plan, split: str) -> Scores:
        """Scores of a plan on a split, whatever is kept."""
        return self._evaluate()(plan, split, 0, None)

    def _part(self, plan: Plan, split: str, start: int, stop: int) -> Scores:
        name = _part_name(plan, split, start)
        if name not in self._in_memory:
            self._in_memory[name] = self.results.answers(name, lambda: self._answered(plan, split, start, stop))
        return self._in_memory[name]

    def _answered(self, plan: Plan, split: str, start: int, stop: int) -> Scores:
        scores = self._evaluate()(plan, split, start, stop)
        broken = [
            index
            for index, (kl, nll) in enumerate(zip(scores.kl, scores.nll, strict=True))
            if not math.isfinite(kl + nll)
        ]
        if broken:
            question = self.splits[split][start + broken[0]].question
            raise ArithmeticError(
                f"KL divergence and log-likelihood must be numbers, got {scores.kl[broken[0]]} on {len(broken)} of "
                f"{len(scores.kl)} questions of {split}, such as {question!r}; the model overflows in {self.key.dtype}"
            )
        return scores

    def _parts(self, split: str) -> list[tuple[int, int]]:
        """The samples that are answered together: from which number to before which."""
        return list(pairwise((0, *(self.looks if split == "select" else (len(self.splits[split]),)))))

    def macro(self, plan: Plan, split: str) -> tuple[float, dict[str, float]]:
        """Mean over the tasks, and each task's mean."""
        by_task = self.table(split).by_task(self.scores(plan, split).scores)
        return sum(by_task.values()) / len(by_task), by_task

    def _make_evaluator(self) -> Callable[[Plan, str, int, int | None], Scores]:
        """Several processes on a CPU; on a GPU, or for one worker, the model that is here already."""
        steps = {"select": self.looks}
        if self._config.device == "cpu" and self._config.answerers > 1:
            return EvaluatorPool(self._config.model, self.splits, self._config.answerers, steps, lambda: self.pulse())

        @cache
        def prepared(split: str) -> Evaluator:
            examples = self.splits[split]
            return Evaluator(self.model, self._processor, examples, steps.get(split, ()), pulse=lambda: self.pulse())

        return lambda plan, split, start, stop: prepared(split)(plan, start, stop)

    def _make_table(self, split: str) -> ScoreTable:
        examples = self.splits[split]
        return ScoreTable([e.image_id for e in examples], [e.task for e in examples])


def _scores(kept: Mapping[str, Any]) -> Scores:
    """Out of plain data, as a registered profile has it."""
    realised = tuple((tuple(counts), num) for counts, num in kept["realised"])
    columns = {name: tuple(kept[name]) for name in ("answers", "scores", "kl", "nll")}
    return Scores(realised=realised, **columns)


def _part_name(plan: Plan, split: str, start: int) -> str:
    return f"{split}-{start}-{plan.digest[:20]}"
