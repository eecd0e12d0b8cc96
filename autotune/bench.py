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
from pathlib import Path
from typing import Any, Literal

import torch

from autotune import data, racing
from autotune.certify import Interval, ScoreTable
from autotune.config import AutotuneError, Limit, RunConfig
from autotune.data import Example
from autotune.evaluation import Evaluator, EvaluatorPool, Scores, load_model, prompt_inputs
from autotune.learn import Learned, learn
from autotune.measured import Measured
from autotune.reference import WEIGHTS
from autotune.schedule import flops_of
from autotune.scores import joined
from autotune.store import Database, Results
from btp.calibration import cosine_shift, stage_layers, withdrawal_layer
from btp.device_state import bearable_share
from btp.errors import PlanError
from btp.families import anatomy_of
from btp.intervals import percentile, ratio_interval
from btp.latency import device_key, measure
from btp.plan import Plan, round_half_up
from btp.profile import Profile, Workload

__all__ = ["Bench", "learn_file", "measure_file", "measure_ratio", "score_file"]

NUM_CALIBRATION = 64  # samples of BTP's calibration
NUM_WITHDRAWAL = 20  # samples of VTW's layer search
LEARNING_STEPS = 120
NUM_LEARNED = 3  # stages of a plan that is learned for a latency limit: FLOPs do not tell what a stage takes
BATCH_SIZE = 16
MODEL_FILES = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"}
MAX_ROUNDS, CLEAR, SHARP = 4, 0.02, 0.05
CONFIDENCE = 1 - 0.05 / MAX_ROUNDS  # of each look, so that all the looks together err one time in twenty
MIN_PAIRS_OF_A_TAIL = 60  # a 95th percentile of fewer is the maximum


def measure_ratio(
    model: Any,
    inputs: Mapping[str, Any],
    plan: Plan,
    limit: Limit,
    repeats: int,
    width: float | None = None,
    note: Callable[[Sequence[float], Sequence[float]], None] = lambda dense_ms, pruned_ms: None,
    pulse: Callable[[], None] = lambda: None,
) -> tuple[Interval, float]:
    """The plan's measured latency at the limit's metric and quantile: ratio to dense, and dense's milliseconds.

    Measures `repeats` pairs, and as many again, up to `MAX_ROUNDS` times, while the interval holds the limit and is
    wider than `CLEAR`: a quiet machine is done at once, a busy one is not taken at its first word. With a width, it
    goes on while the interval is wider than that, wherever the limit is. Others may use the cores that this process
    leaves free (`bearable_share`), which widens the interval; where they take more, raises BusyDeviceError. note: told
    the milliseconds of dense and of the plan, pair by pair, every time that some were measured. pulse: of `measure`.
    """
    dense_ms: list[float] = []
    pruned_ms: list[float] = []
    metric: Literal["prefill", "first_token"] = "first_token" if limit.metric == "ttft" else "prefill"
    max_others = bearable_share(torch.get_num_threads())
    repeats = repeats if limit.quantile == "p50" else max(repeats, MIN_PAIRS_OF_A_TAIL)
    for measured in range(1, MAX_ROUNDS + 1):
        least, most = (2, 6) if measured == 1 else (0, 0)
        blocks = measure(
            model,
            inputs,
            plan,
            repeats=repeats,
            max_others=max_others,
            min_warmup=least,
            max_warmup=most,
            pulse=pulse,
        )
        dense_ms += blocks.dense_ms(metric)
        pruned_ms += blocks.pruned_ms(metric)
        note(blocks.dense_ms(metric), blocks.pruned_ms(metric))
        interval = ratio_interval(dense_ms, pruned_ms, limit.share, CONFIDENCE)
        dense = percentile(dense_ms, 100 * limit.share)
        decided = width is None and not interval.low <= limit.ratio(dense) < interval.high
        if decided or interval.high - interval.low < (width or CLEAR):
            break
    return interval, dense


def measure_file(
    path: Path, model: str, questions: Path | None, limit: Limit, threads: int, repeats: int, device: str
) -> Measured:
    """The latency of the profile or plan in a file.

    model: empty for the reference VLM; questions: None for its data. A profile must fit the model, a plan need not say.
    """
    torch.set_num_threads(threads)
    plan = Plan.load(path)
    loaded, processor = load_model(model or str(WEIGHTS), device)
    if "schema_version" in json.loads(path.read_text(encoding="utf-8")):
        Profile.load(path).check_fits(anatomy_of(loaded).identity)
    inputs = prompt_inputs(processor, data.load_splits(questions)["calibrate"][:1], device)
    blocks: list[tuple[Sequence[float], Sequence[float]]] = []
    ratio, dense_ms = measure_ratio(loaded, inputs, plan, limit, repeats, note=lambda *block: blocks.append(block))
    return Measured.of(limit, ratio, dense_ms, blocks, asdict(device_key(loaded, inputs)))


def score_file(profile: Profile, model: str, questions: Path | None, device: str, answerers: int) -> float:
    """Macro accuracy of a profile's plan on `certify`, answered here and now.

    model: empty for the reference VLM; questions: None for its data. answerers: processes, on a CPU. The profile must
    fit the model, and model and questions must be those it was certified with, or AutotuneError says which is not.
    """
    source = model or str(WEIGHTS)
    examples = data.load_splits(questions)["certify"]
    here = {"model": _model_digest(source), "data": data.digest(examples)}
    told = {"model": profile.evidence.get("model_digest"), "data": profile.evidence.get("data", {}).get("certify")}
    for name, digest in here.items():
        if told[name] is not None and told[name] != digest:
            raise AutotuneError(
                f"--{name} must be what the profile was certified with, SHA-256 {told[name]}, got {digest}; "
                "hand in the same, or certify anew with autotune tune"
            )
    loaded, processor = load_model(source, device)
    profile.check_fits(anatomy_of(loaded).identity)
    if device == "cpu" and answerers > 1:
        scores = EvaluatorPool(source, {"certify": examples}, answerers)(profile.plan, "certify").scores
    else:
        scores = Evaluator(loaded, processor, examples)(profile.plan).scores
    table = ScoreTable([e.image_id for e in examples], [e.task for e in examples])
    return table.macro(scores).value


def learn_file(
    model: str,
    questions: Path | None,
    fraction: float,
    path: Path,
    *,
    threads: int,
    device: str,
    say: Callable[[str], None],
    **settings: Any,
) -> Learned:
    """Learn a plan at the FLOPs of a fraction of the image tokens in every layer, and write it to `path`.

    model: empty for the reference VLM; questions: None for its data. settings: of `learn`. Raises as `learn`.
    """
    torch.set_num_threads(threads)
    loaded, processor = load_model(model or str(WEIGHTS), device)
    examples = data.load_splits(questions)["calibrate"]
    anatomy = anatomy_of(loaded)
    num_tokens = int(anatomy.image_mask(prompt_inputs(processor, examples[:1], device)).sum())
    kept = max(1, round_half_up(fraction * num_tokens))
    budget = flops_of(anatomy.decoder, num_tokens)((kept,) * anatomy.decoder.num_layers)
    found = learn(loaded, processor, examples, budget, say=say, **settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    found.plan.save(path)
    return found


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
        self.model_digest = _model_digest(config.model)
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


def _model_digest(source: str) -> str:
    """SHA-256 of what a local folder's model is made of, or the hub id as it stands."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in MODEL_FILES):
        with path.open("rb") as file:
            sha.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()
