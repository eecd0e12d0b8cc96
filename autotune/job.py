"""The tuning job: dense baseline, calibration, search, certification, registration, and the pull that proves it.

Each step can be killed; running the job again with the same settings takes up where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import btp
from autotune import data
from autotune.certify import Interval, ScoreTable, latency_ratio
from autotune.config import AutotuneError, JobConfig, Limit
from autotune.data import Example
from autotune.evaluation import Evaluator, Scores, load_model, prompt_inputs
from autotune.latency_model import LatencyModel
from autotune.objective import Told
from autotune.registry import Registry, Version
from autotune.report import write_front
from autotune.space import SearchSpace, rescale
from autotune.study import Study
from btp import presets
from btp.anatomy import anatomy_of
from btp.calibration import cosine_shift, stage_layers
from btp.cost import image_token_flops, tokens_per_layer
from btp.latency import LatencyBlocks, device_key, measure, percentile
from btp.plan import Plan, Stage
from btp.profile import Profile, Workload

__all__ = ["Outcome", "Progress", "Row", "measure_ratio", "run"]

Progress = Callable[[str, int, int, float | None], None]
"""Told of every step: what is going on, trials done, trials in all, best feasible score so far."""

DENSE = Plan(stages=())
FASTEST = Plan(stages=(Stage(layer=0, keep=0.0, selector="uniform"),))
NUM_FINALISTS = 5
NUM_CALIBRATION = 64  # samples of the paper's calibration
HEADROOM = 0.95  # of the limit, for the fixed plans that are scaled to it


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the final table. FLOPs count the image tokens alone, in billions; latency is the ratio to dense."""

    name: str
    plan: Plan
    image_gflops: float
    latency: Interval
    macro: Interval
    worst_task: str
    worst: Interval
    to_dense: Interval
    by_task: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_dict()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a finished job found, where it wrote it, and whether the pulled profile did what the study said."""

    study: str
    limit: str
    num_trials: int
    rows: tuple[Row, ...]
    tuned_minus: Mapping[str, Interval]
    version: str
    alias: str
    fresh_ratio: Interval
    reproduced: bool
    paths: Mapping[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rows": [row.to_dict() for row in self.rows]}


def measure_ratio(
    model: Any, inputs: Mapping[str, Any], plan: Plan, limit: Limit, repeats: int
) -> tuple[Interval, float, LatencyBlocks]:
    """The plan's measured latency at the limit's metric and quantile: ratio to dense, dense milliseconds, raw blocks."""
    blocks = measure(model, inputs, plan, repeats=repeats, warmup=2)
    dense, pruned = blocks.dense_prefill_ms, blocks.pruned_prefill_ms
    if limit.metric == "ttft":
        dense, pruned = blocks.dense_first_token_ms, blocks.pruned_first_token_ms
    return latency_ratio(dense[1:], pruned, limit.share), percentile(dense, 100 * limit.share), blocks


def run(config: JobConfig, splits: Mapping[str, Sequence[Example]], progress: Progress) -> Outcome:
    """Tune `config.model` on the splits. Raises AutotuneError, BTPError or RegistryError for what a user can mend."""
    return _Job(config, splits, progress).run()


class _Job:
    """The state of one run of the job: model, data and study. The steps are its methods, in the order of `run`."""

    def __init__(self, config: JobConfig, splits: Mapping[str, Sequence[Example]], progress: Progress) -> None:
        self.began = time.monotonic()
        self.config, self.splits, self.report = config, splits, progress
        self.space = SearchSpace.load(config.space) if config.space else None
        self._say("loading the model")
        self.model, self.processor = load_model(config.model, config.device)
        self.inputs = prompt_inputs(self.processor, splits["calibrate"][:1], config.device)
        self.identity = anatomy_of(self.model).identity
        self.key = device_key(self.model, self.inputs)
        self.alias = config.alias or f"champion-{self.key.slug}"
        self.study: Study | None = None
        self.latency: LatencyModel | None = None

    def _say(self, what: str) -> None:
        told = self.study.told() if getattr(self, "study", None) else []
        best = max((t.score for t in told if t.feasible), default=None)
        self.report(what, len(told), self.config.num_trials, best)

    def _ratio(self, plan: Plan, effort: int = 1) -> tuple[Interval, float]:
        """Measured ratio to dense, and dense's milliseconds, with `effort` times the usual pairs."""
        repeats = effort * self.config.repeats
        ratio, dense_ms, _ = measure_ratio(self.model, self.inputs, plan, self.config.limit, repeats)
        return ratio, dense_ms

    # Before the search ------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        config = self.config
        if config.fresh:
            shutil.rmtree(config.out, ignore_errors=True)
        limit = self._prepare()
        self._search(limit)
        champion = self._champion(limit)
        rows, minus = self._certify(champion)
        return self._deliver(rows, minus, champion)

    def _study_name(self) -> str:
        parts = [_model_digest(self.config.model), str(self.config.limit), str(self.space), str(self.config.seed)]
        parts += [data.digest(self.splits[name]) for name in data.SPLITS] + [json.dumps(asdict(self.key))]
        return f"{self.config.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:10]}"

    def _prepare(self) -> float:
        """Probe the device, refuse a limit that nothing can meet, open the study. Returns the limit as a ratio."""
        self._say("measuring dense and the fastest plan")
        fastest, dense_ms = self._ratio(FASTEST)
        limit = self.config.limit.ratio(dense_ms)
        if fastest.value > limit:
            raise AutotuneError(
                f"some plan must meet the limit {self.config.limit}, got {fastest.value:.2f}x of dense "
                f"({fastest.value * dense_ms:.1f} ms) from the fastest one, which drops every image token at once; "
                "raise the limit"
            )
        num_layers, num_tokens = self.identity.num_layers, self.identity.num_image_tokens
        hand_set = presets.btp(num_layers)
        name = self._study_name()
        storage = self.config.out / "study.db"
        if storage.exists():
            self.study = Study(storage, name, self.config.seed)
        if self.study is None or "floor" not in self.study.notes:
            probed, _ = self._ratio(hand_set)
            fitted = LatencyModel.fit([(FASTEST, fastest.value), (hand_set, probed.value)], num_layers, num_tokens)
            self._say("calibrating stage layers")
            few = list(self.splits["calibrate"])[:NUM_CALIBRATION]
            batches = [prompt_inputs(self.processor, few[i : i + 16], self.config.device) for i in range(0, len(few), 16)]
            layers = stage_layers(cosine_shift(self.model, batches), 3)
            self.study = self.study or Study(storage, name, self.config.seed)
            self.study.note("calibrated_layers", layers)
            self.study.note("limit", limit)
            self.study.note("floor", fitted.floor)
        notes = self.study.notes
        self.latency = LatencyModel(notes["floor"], num_layers, num_tokens)
        for name, plan in self._baselines(hand_set, notes["calibrated_layers"], notes["limit"]).items():
            self.study.enqueue(name, plan)
        return float(notes["limit"])

    def _baselines(self, hand_set: Plan, calibrated: Sequence[int], limit: float) -> dict[str, Plan]:
        """The fixed plans every study tries: the paper's as it stands, and scaled to the limit with its controls."""
        assert self.latency is not None
        at_limit = self.latency.solve(rescale(hand_set), HEADROOM * limit)
        found = presets.btp(self.identity.num_layers, layers=calibrated)
        return {
            "hand-set": hand_set,
            "hand-set at limit": at_limit,
            "hand-set, calibrated layers": self.latency.solve(rescale(found), HEADROOM * limit),
            "random": presets.random_control(at_limit),
            "uniform": presets.uniform_control(at_limit),
        }

    # The search -------------------------------------------------------------------------------------------------

    def _search(self, limit: float) -> None:
        assert self.study is not None
        self._say("encoding the pictures of `select`")
        self.select = self.splits["select"]
        self.evaluator = Evaluator(self.model, self.processor, self.select)
        self.table = ScoreTable([e.image_id for e in self.select], [e.task for e in self.select])
        space = self.space or SearchSpace.load(default_space())
        assert self.latency is not None
        while self.study.num_done < self.config.num_trials:
            self._say("searching")
            number, name, asked = self.study.ask(space)
            if isinstance(asked, Plan):
                plan = asked
            else:
                schedule = space.schedule(asked, self.identity.num_layers)
                plan = self.latency.solve(schedule, asked["budget"] * limit)
            self._try(number, name, plan, limit)

    def _try(self, number: int, name: str, plan: Plan, limit: float) -> None:
        assert self.study is not None
        ratio, _ = self._ratio(plan)
        scores = self._scores(plan, self.evaluator, "select").scores
        by_task = self.table.by_task(scores)
        told = Told(
            number=number,
            name=name,
            plan=plan,
            score=sum(by_task.values()) / len(by_task),
            by_task=by_task,
            ratio=ratio.value,
            ratio_low=ratio.low,
            ratio_high=ratio.high,
            limit=limit,
        )
        self.study.tell(told)

    def _scores(self, plan: Plan, evaluator: Evaluator, split: str) -> Scores:
        """Scores of a plan on a split, kept on disk so that nothing is computed twice."""
        folder = self.config.out / "evaluations"
        folder.mkdir(parents=True, exist_ok=True)
        key = hashlib.sha256((self._study_name() + split + plan.digest).encode()).hexdigest()[:20]
        path = folder / f"{key}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            return Scores(tuple(kept["answers"]), tuple(kept["scores"]))
        found = evaluator.complete(plan)
        path.with_suffix(".tmp").write_text(json.dumps(asdict(found)))
        path.with_suffix(".tmp").replace(path)
        return found

    def _champion(self, limit: float) -> Told:
        """The best plan that meets the limit when it is measured again with three times the pairs."""
        assert self.study is not None
        candidates = [t for t in self.study.told() if not t.name.startswith(("random", "uniform"))]
        ranked = sorted((t for t in candidates if t.feasible), key=lambda t: (-t.score, t.ratio))
        for told in ranked[:NUM_FINALISTS]:
            self._say(f"measuring {told.name} again")
            ratio, _ = self._ratio(told.plan, 3)
            if ratio.high <= limit:
                return told
        fastest = min(self.study.told(), key=lambda t: t.ratio)
        raise AutotuneError(
            f"some plan must meet the limit {self.config.limit}, got {fastest.ratio:.2f}x of dense from the fastest "
            f"trial, {fastest.name!r}; raise the limit, or run more trials with --trials"
        )

    # The proof --------------------------------------------------------------------------------------------------

    def _certify(self, champion: Told) -> tuple[tuple[Row, ...], dict[str, Interval]]:
        """Score dense, the fixed plans and the champion on held-out pictures; rows, and the champion minus each."""
        examples = self.splits["certify"]
        self._say("encoding the pictures of `certify`")
        evaluator = Evaluator(self.model, self.processor, examples)
        table = ScoreTable([e.image_id for e in examples], [e.task for e in examples])
        plans = {"dense": DENSE, **self._rivals(champion), "tuned": champion.plan}
        scores = {}
        for name, plan in plans.items():
            self._say(f"certifying {name}")
            scores[name] = self._scores(plan, evaluator, "certify")
        self.certified = {name: found.scores for name, found in scores.items()}
        self._say("measuring the certified plans")
        rows = tuple(self._row(name, plan, table) for name, plan in plans.items())
        tuned = self.certified["tuned"]
        minus = {name: table.difference(tuned, other) for name, other in self.certified.items() if name != "tuned"}
        return rows, minus

    def _rivals(self, champion: Told) -> dict[str, Plan]:
        """The fixed plans; as random and uniform, the better on `select` of the paper's schedule and the champion's."""
        assert self.study is not None
        told = {t.name: t for t in self.study.told()}
        rivals = {name: told[name].plan for name in ("hand-set", "hand-set at limit")}
        for name, control in (("random", presets.random_control), ("uniform", presets.uniform_control)):
            self._say(f"scoring {name} on the champion's schedule")
            own = control(champion.plan)
            by_task = self.table.by_task(self._scores(own, self.evaluator, "select").scores)
            rivals[name] = own if sum(by_task.values()) / len(by_task) > told[name].score else told[name].plan
        return rivals

    def _row(self, name: str, plan: Plan, table: ScoreTable) -> Row:
        scores, dense = self.certified[name], self.certified["dense"]
        counts = tokens_per_layer(plan, self.identity.num_layers, self.identity.num_image_tokens)
        anatomy = anatomy_of(self.model)
        flops = image_token_flops(counts, anatomy.hidden_size, anatomy.intermediate_size)
        worst, interval = table.worst_task(scores, dense)
        return Row(
            name=name,
            plan=plan,
            image_gflops=flops / 1e9,
            latency=self._ratio(plan, 2)[0] if plan.stages else Interval(1.0, 1.0, 1.0),
            macro=table.macro(scores),
            worst_task=worst,
            worst=interval,
            to_dense=table.difference(scores, dense),
            by_task=table.by_task(scores),
        )

    # The delivery -----------------------------------------------------------------------------------------------

    def _deliver(self, rows: tuple[Row, ...], minus: dict[str, Interval], champion: Told) -> Outcome:
        """Write profile and evidence, register them, pull them back by alias, and check that they do what was said."""
        assert self.study is not None
        config, out = self.config, self.config.out
        self._say("registering")
        self._write(rows, minus)
        registry = Registry(config.tracking_uri or f"sqlite:///{out / 'mlflow.db'}")
        version = self._register(registry, rows)
        pulled = registry.pull(config.name, self.alias, out / "pulled.json")
        self._say("applying the pulled profile")
        profile = Profile.load(pulled)
        profile.check_fits(self.identity)
        again = self.evaluator.complete(profile.plan).scores
        reproduced = self.table.by_task(again) == dict(champion.by_task)
        self._say("measuring the pulled profile in a fresh process")
        fresh = self._fresh_ratio(pulled)
        names = ("profile.json", "evidence.parquet", "trials.json", "front.png", "front.html", "study.db")
        return Outcome(
            study=self.study.name,
            limit=str(config.limit),
            num_trials=self.study.num_done,
            rows=rows,
            tuned_minus=minus,
            version=version.uri,
            alias=f"models:/{config.name}@{self.alias}",
            fresh_ratio=fresh,
            reproduced=reproduced,
            paths={name: str(out / name) for name in names},
            seconds=time.monotonic() - self.began,
        )

    def _write(self, rows: tuple[Row, ...], minus: Mapping[str, Interval]) -> None:
        assert self.study is not None
        out, examples = self.config.out, self.splits["certify"]
        by_name = {row.name: row for row in rows}
        workload = Workload(
            image_tokens=self.key.image_tokens,
            prompt_tokens=self.key.prompt_tokens,
            batch_size=self.key.batch_size,
            dtype=self.key.dtype,
            attention=self.key.attention,
        )
        evidence = {
            "study": self.study.name,
            "limit": str(self.config.limit),
            "data": {name: data.digest(self.splits[name]) for name in data.SPLITS},
            "rows": [row.to_dict() for row in rows],
            "tuned_minus": {name: interval.to_dict() for name, interval in minus.items()},
        }
        profile = Profile(
            plan=by_name["tuned"].plan, model=self.identity, workload=workload, device=self.key, evidence=evidence
        )
        profile.save(out / "profile.json")
        columns: dict[str, Sequence[Any]] = {
            "image_id": [e.image_id for e in examples],
            "task": [e.task for e in examples],
            "question": [e.question for e in examples],
            "answer": [e.answer for e in examples],
        }
        data.write_parquet(out / "evidence.parquet", {**columns, **self.certified})
        trials = [{**asdict(told), "plan": told.plan.to_dict()} for told in self.study.told()]
        (out / "trials.json").write_text(json.dumps(trials, indent=1))
        write_front(self.study.told(), by_name["tuned"].plan, str(self.config.limit), out)

    def _register(self, registry: Registry, rows: tuple[Row, ...]) -> Version:
        assert self.study is not None
        by_name = {row.name: row for row in rows}
        tuned, dense = by_name["tuned"], by_name["dense"]
        out = self.config.out
        retention = tuned.macro.value / max(dense.macro.value, 1e-9)
        worst = tuned.worst.value / max(dense.by_task[tuned.worst_task], 1e-9)
        return registry.register(
            name=self.config.name,
            profile_path=out / "profile.json",
            evidence={n: out / n for n in ("evidence.parquet", "trials.json", "front.png", "front.html")},
            tags={
                "study": self.study.name,
                "device": self.key.name,
                "limit": str(self.config.limit),
                "latency_ratio": f"{tuned.latency.value:.4f}",
                "macro_retention": f"{retention:.4f}",
                "worst_task_retention": f"{worst:.4f}",
            },
            metrics={
                "macro": tuned.macro.value,
                "macro_retention": retention,
                "worst_task_retention": worst,
                "latency_ratio": tuned.latency.value,
            },
            params={"limit": str(self.config.limit), "seed": str(self.config.seed), "model": self.config.model},
            experiment=self.config.name,
            alias=self.alias,
        )

    def _fresh_ratio(self, profile: Path) -> Interval:
        """Measure the pulled profile in a process of its own, by the command a user would type."""
        command = [sys.executable, "-m", "autotune.cli", "measure", str(profile), "--model", self.config.model, "--json"]
        command += ["--limit", str(self.config.limit), "--repeats", str(3 * self.config.repeats)]
        command += ["--threads", str(self.config.threads), "--device", self.config.device]
        if self.config.data is not None:
            command += ["--data", str(self.config.data)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AutotuneError(f"measuring {profile} in a fresh process must succeed, got: {done.stderr.strip()}")
        found = json.loads(done.stdout)["ratio"]
        return Interval(found["value"], found["low"], found["high"])


def default_space() -> Path:
    """The search space that comes with the project, in a checkout or in an installed wheel."""
    inside = Path(__file__).parent / "search_spaces" / "reference.yaml"
    return inside if inside.exists() else Path(__file__).parents[1] / "search_spaces" / "reference.yaml"


def _model_digest(source: str) -> str:
    """SHA-256 of a local folder's files, or the hub id as it stands."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sha.update(path.name.encode() + path.read_bytes())
    return sha.hexdigest()
