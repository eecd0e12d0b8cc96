"""The evidence: published systems, tuned and learned plans at equal measured latency, judged on held-out questions.

    python -m benchmarks.evidence [--models reference] [--limits 0.8,0.6,0.5] [--seeds 0,1,2,3,4] [--trials 40]
    python -m benchmarks.evidence --small           # one limit and seed on a few pictures, into runs/evidence-small
    python -m benchmarks.evidence --report-only     # write the report again from the raw numbers
    python -m benchmarks.evidence --seeds 5,6 --results runs/again --docs runs/again    # do its claims hold again?

At every limit on the median prefill, each published system's keep fractions and layers are scaled by one factor until
its measured latency is within 2 % under the limit; a study for each seed finds its champion on `select`; a plan is
learned by gradient on `calibrate`. All are then judged on `certify`. Each step can be killed; the same command resumes.
Writes benchmarks/results/evidence-MODEL-DEVICE.json, and docs/evidence.md with its pictures from all such files.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from autotune import data, reference
from autotune.bench import LEARNING_STEPS, Bench
from autotune.config import AutotuneError, JobConfig, Limit
from autotune.data import Example
from autotune.search import CONTROLS, DENSE
from autotune.space import SearchSpace
from benchmarks.evidence_experiments import CROSSED, MAX_DEPTHS, crossing, depth_scores
from benchmarks.evidence_judge import Judge
from benchmarks.evidence_pace import Pace
from benchmarks.evidence_plans import HAND_SET, TOLERANCE, AtLimit, Lab
from benchmarks.evidence_report import write_report
from benchmarks.machine import RESULTS, ROOT, default_path, setting
from btp.presets import SYSTEMS

__all__ = ["SUBJECTS", "Options", "Subject", "gather", "main"]

Splits = dict[str, list[Example]]
SPACE = ROOT / "search_spaces" / "reference.yaml"
SCHEDULES = ("btp_paper", HAND_SET, "fastv", "pyramiddrop")  # crossed with the selectors, beside two champions'
NUM_CROSSED_CHAMPIONS = 2
SMALL_SYSTEMS = ("btp_paper", HAND_SET, "vtw", "random", "uniform")
NUM_PROBES = 15
SMALL_PICTURES, SMALL_SPEED = 4, 0.1  # of each split; of the time that steps on whole splits take


def _second() -> tuple[str, Splits]:
    from autotune import reference_135m

    names = data.SPLITS
    return str(reference_135m.model_folder()), {n: data.from_dataset(reference_135m.dataset(n), n) for n in names}


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to gather evidence on: where it lies and its splits, and how many seeds it is searched with."""

    load: Callable[[], tuple[str, Splits]]
    num_seeds: int


SUBJECTS = {
    "reference": Subject(lambda: (str(reference.WEIGHTS), data.load_splits(None)), 5),
    "reference-135m": Subject(_second, 2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is gathered. systems: names of published systems, None for all; selectors: crossed with the schedules."""

    limits: tuple[float, ...]
    seeds: tuple[int, ...]
    trials: int
    learning_steps: int = LEARNING_STEPS
    systems: tuple[str, ...] | None = None
    selectors: tuple[str, ...] = CROSSED

    @property
    def steps(self) -> Counter[str]:
        """How many steps of each kind there will be, at most."""
        num_limits, num_systems, num_seeds = len(self.limits), len(self.systems or SYSTEMS), len(self.seeds)
        num_schedules = sum(name in (self.systems or SYSTEMS) for name in SCHEDULES)
        num_schedules += min(num_seeds, NUM_CROSSED_CHAMPIONS)
        return Counter(
            probe=num_limits * NUM_PROBES,
            system=num_limits * num_systems,
            trial=num_limits * num_seeds * self.trials,
            learned=num_limits,
            row=num_limits * (2 + num_systems + num_seeds),
            crossing=num_limits * num_schedules * len(self.selectors),
            depth=MAX_DEPTHS,
        )


def gather(config: JobConfig, splits: Mapping[str, Sequence[Example]], options: Options, pace: Pace) -> dict[str, Any]:
    """All raw numbers of one model, as plain data. config: the limit and the seed in it are of no matter."""
    space = SearchSpace.load(config.space)
    found: dict[str, Any] = {}
    at_limits = []
    for bound in options.limits:
        limit = Limit.parse(f"prefill_p50<={bound:g}x")
        bench = Bench(config, splits, limit)
        found = found or _setting(bench)
        lab = Lab(replace(config, limit=limit), bench, space, options.seeds[0], pace)
        at_limits.append(_at_limit(lab, options, pace))
        if "depth" not in found:
            found["depth"] = depth_scores(bench, pace)
        del bench, lab
        gc.collect()  # the worker processes of its evaluators end with it
    asked = {"seeds": options.seeds, "trials": options.trials, "learning_steps": options.learning_steps}
    return {**found, **asked, "tolerance": TOLERANCE, "limits": at_limits}


def _setting(bench: Bench) -> dict[str, Any]:
    examples = bench.splits["certify"]
    pictures = {image: number for number, image in enumerate(dict.fromkeys(e.image_id for e in examples))}
    return {
        "device": bench.key.name,
        "key": asdict(bench.key),
        "model_digest": bench.model_digest,
        "data_digests": bench.data_digests,
        "num_layers": bench.anatomy.decoder.num_layers,
        "num_questions": len(examples),
        "num_pictures": len(pictures),
        "tasks": " ".join(e.task for e in examples),
        "pictures": " ".join(str(pictures[e.image_id]) for e in examples),
    }


def _at_limit(lab: Lab, options: Options, pace: Pace) -> dict[str, Any]:
    """Everything at one limit: rows judged on `certify`, the studies, the learned plan, the crossing on `select`."""
    judge = Judge(lab.bench, pace)
    judge.row("dense", "dense", AtLimit(plan=DENSE, measured=lab.measure(DENSE), rounds=(), reached=True))
    systems = lab.presets(options.systems)
    for name, at_limit in systems.items():
        judge.row(name, "control" if name in CONTROLS else "published", at_limit)
    studies, champions = [], {}
    for seed in options.seeds:
        told, study = lab.champion(seed)
        studies.append(lab.study_summary(study, seed, told))
        champions[f"tuned, seed {seed}"] = told.plan
        measured = lab.measure(told.plan)
        at_limit = AtLimit(plan=told.plan, measured=measured, rounds=(), reached=measured.value <= lab.limit)
        judge.row(f"tuned, seed {seed}", "tuned", at_limit, seed)
    learned, learning = lab.learned(options.learning_steps)
    judge.row("learned", "learned", learned)
    crossed = dict(list(champions.items())[:NUM_CROSSED_CHAMPIONS])
    crossed |= {name: systems[name].plan for name in SCHEDULES if name in systems}
    return {
        "limit": lab.limit,
        "latency_error": lab.notes["latency"]["error"],
        "calibrated_layers": lab.notes["calibrated_layers"],
        **judge.judged(),
        "studies": studies,
        "learned": learning,
        "crossing": crossing(lab.bench, crossed, options.selectors, pace),
    }


def _few(splits: Mapping[str, Sequence[Example]], num_pictures: int) -> dict[str, list[Example]]:
    """The questions about the first pictures of every split."""
    found = {}
    for name, examples in splits.items():
        first = list(dict.fromkeys(e.image_id for e in examples))[:num_pictures]
        found[name] = [e for e in examples if e.image_id in first]
    return found


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(float(word) for word in text.split(","))


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="reference", help=f"some of {', '.join(SUBJECTS)}, separated by commas")
    parser.add_argument("--limits", type=_numbers, default=(0.8, 0.6, 0.5), help="of dense's median prefill")
    parser.add_argument("--seeds", default="", help="of the searches; default: 0 to 4, or 0 and 1 for a larger model")
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--report-only", action="store_true")
    parser.add_argument("--out", type=Path, default=None, help="folder of the studies and kept scores")
    parser.add_argument("--results", type=Path, default=None, help="folder of the raw numbers")
    parser.add_argument("--docs", type=Path, default=None, help="folder of the report")
    parser.add_argument("--commit", default=None, help="the commit, where git cannot tell")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.models.split(",")) - set(SUBJECTS)):
        parser.error(f"--models must be some of {', '.join(SUBJECTS)}, got {', '.join(unknown)}")
    options.out = options.out or ROOT / "runs" / ("evidence-small" if options.small else "evidence")
    options.results = options.results or (options.out if options.small else RESULTS)
    options.docs = options.docs or (options.out if options.small else ROOT / "docs")
    return options


def _of(model: str, given: argparse.Namespace) -> tuple[JobConfig, Splits, Options]:
    source, splits = SUBJECTS[model].load()
    seeds = tuple(map(int, given.seeds.split(","))) if given.seeds else tuple(range(SUBJECTS[model].num_seeds))
    options = Options(limits=given.limits, seeds=seeds, trials=given.trials)
    config = JobConfig(
        model=source,
        data=None,
        out=given.out,
        answerers=given.workers,
        limit=Limit.parse("prefill_p50<=1x"),
        name=model,
        num_trials=given.trials,
        space=SPACE,
        learn=not given.small,
    )
    if not given.small:
        return config, splits, options
    options = replace(options, limits=(0.6,), seeds=seeds[:1], trials=8, learning_steps=4, systems=SMALL_SYSTEMS)
    config = replace(config, num_trials=8, answerers=1, repeats=4)
    return config, _few(splits, SMALL_PICTURES), replace(options, selectors=CROSSED[:2])


def _run(model: str, given: argparse.Namespace, arguments: Sequence[str] | None) -> Path:
    """Gather one model's raw numbers and write them; where to."""
    config, splits, options = _of(model, given)
    began = time.monotonic()
    speed = SMALL_SPEED if given.small else 1.0
    pace = Pace(options.steps, lambda line: print(line, file=sys.stderr, flush=True), speed)
    found = {"model": model, **setting("benchmarks.evidence", arguments, given.commit)}
    found |= gather(config, splits, options, pace)
    found["seconds"] = time.monotonic() - began
    given.results.mkdir(parents=True, exist_ok=True)
    path: Path = given.results / default_path(f"evidence-{model}", found["device"]).name
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    given = _arguments(arguments)
    try:
        if not given.report_only:
            for model in given.models.split(","):
                print(_run(model, given, arguments))
        for path in write_report(given.results, given.docs):
            print(path)
    except AutotuneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
