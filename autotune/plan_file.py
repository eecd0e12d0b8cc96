"""What the plan or the profile in a file comes to: its latency, its score; and a plan that is learned into a file.

Nothing of this needs a study, a database or a registry.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from autotune import data
from autotune.certify import Interval, ScoreTable
from autotune.config import AutotuneError, Limit
from autotune.evaluation import Evaluator, EvaluatorPool, load_model, prompt_inputs
from autotune.learn import Learned, learn
from autotune.measured import Measured
from autotune.reference import WEIGHTS
from autotune.schedule import flops_of
from btp.device_state import bearable_share
from btp.families import anatomy_of
from btp.intervals import percentile, ratio_interval
from btp.latency import device_key, measure
from btp.plan import Plan, round_half_up
from btp.profile import Profile

__all__ = ["learn_file", "measure_file", "measure_ratio", "model_digest", "score_file"]

MODEL_FILES = {".json", ".safetensors", ".bin", ".jinja", ".model", ".txt"}
MAX_ROUNDS, CLEAR = 4, 0.02
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
    here = {"model": model_digest(source), "data": data.digest(examples)}
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


def model_digest(source: str) -> str:
    """SHA-256 of what a local folder's model is made of, or the hub id as it stands."""
    folder = Path(source)
    if not folder.is_dir():
        return source
    sha = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in MODEL_FILES):
        with path.open("rb") as file:
            sha.update(f"{path.name}:{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return sha.hexdigest()
