"""What a trial costs: a plain loop of `generate` against the evaluator, on the same plans and samples.

    python -m benchmarks.trials [--small] [--shape 7b --device cuda] [--samples N] [--plans N] [--out FILE]

The plain loop is what one would first write: a picture and a question at a time, processed, encoded, prefilled and
decoded anew for every plan. Answers and scores of both are compared sample by sample; a difference is counted and
named. What the evaluator does once, dense answers included, is its preparation. The 7B shape has random weights, so
that pruned answers hardly agree with dense ones and are decoded token by token: the worst case of verification. How
cost grows is measured on the evaluator alone, its prefixes filled.
"""

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

import btp
from autotune import reference
from autotune.data import Example, from_dataset
from autotune.evaluation import Evaluator, load_model, prompt_inputs
from autotune.space import SearchSpace, random_draw
from autotune.tasks import SCORERS
from benchmarks.machine import ROOT, default_path, setting
from benchmarks.shapes import SHAPES
from benchmarks.table import markdown
from btp import Plan, Stage, presets
from btp.cost import image_token_flops, tokens_per_layer
from btp.families import anatomy_of
from btp.latency import device_key

SHARE = 0.3  # of dense's image-token FLOPs that drawn plans spend
TOLERANCE = 0.05  # that they may spend less
SEED = 0
HAND_SET = ("btp_paper", "btp_released", "fastv", "pyramiddrop", "divprune", "cdpruner")
NUM_REPEATS = 3  # of each point of the growth curves
SPARE_TOKENS = 4  # as the evaluator allows
SMALL = ROOT / "runs" / "trials-small.json"


def drawn_plans(num_layers: int, num_image_tokens: int, hidden_size: int, intermediate_size: int) -> Iterator[Plan]:
    """Plans of the reference search space that spend `SHARE` of dense's FLOPs; draws that cannot are passed over."""
    space, rng = SearchSpace.load(ROOT / "search_spaces" / "reference.yaml"), random.Random(SEED)

    def share(plan: Plan) -> float:
        flops = [
            image_token_flops(tokens_per_layer(p, num_layers, num_image_tokens), hidden_size, intermediate_size)
            for p in (plan, Plan(stages=()))
        ]
        return flops[0] / flops[1]

    def can_be_realised(plan: Plan) -> bool:
        kept = plan.num_kept(num_image_tokens)
        return all(num > 0 or stage.keep == 0 for num, stage in zip(kept, plan.stages, strict=True))

    while True:
        schedule = space.schedule(random_draw(space.ranges, rng), num_layers)
        low, high = 0.0, 1.0
        while share(schedule(high)) > SHARE and high < 64:
            low, high = high, 2 * high
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if share(schedule(middle)) > SHARE else (low, middle)
        if SHARE - TOLERANCE < share(schedule(high)) <= SHARE and can_be_realised(schedule(high)):
            yield schedule(high)


def naive(model: Any, processor: Any, examples: Sequence[Example], plan: Plan) -> tuple[list[str], list[float]]:
    """Answers and scores of the plain loop."""
    longest: dict[str, int] = {}
    for e in examples:
        num_tokens = len(processor.tokenizer.encode(e.answer, add_special_tokens=False))
        longest[e.task] = max(longest.get(e.task, 0), num_tokens)
    answers = []
    with torch.inference_mode(), btp.prune(model, plan):
        for e in examples:
            inputs = of_dtype(prompt_inputs(processor, [e], str(model.device)), model.dtype)
            ids = model.generate(**inputs, max_new_tokens=longest[e.task] + SPARE_TOKENS, do_sample=False)
            new = ids[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip().lower())
    return answers, [SCORERS[e.task](answer, e.answer) for answer, e in zip(answers, examples, strict=True)]


def of_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def seconds_of(function: Any, *arguments: Any) -> tuple[float, Any]:
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def random_model(side: int, text: dict[str, Any], vision: dict[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A LLaVA of random weights with side x side image tokens, and the reference processor for its pictures."""
    model, processor = load_model(str(reference.WEIGHTS), "cpu")
    config = model.config
    patch = config.vision_config.patch_size
    config.vision_config.image_size, config.image_seq_length = side * patch, side**2
    for part, sizes in ((config.text_config, text), (config.vision_config, vision)):
        for name, value in sizes.items():
            setattr(part, name, value)
    config.text_config.max_position_embeddings = max(1024, 2 * side**2)
    config.text_config.num_key_value_heads = config.text_config.num_attention_heads
    config.text_config.head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    processor.image_processor.size = {"height": side * patch, "width": side * patch}
    processor.image_processor.crop_size = dict(processor.image_processor.size)
    torch.manual_seed(SEED)
    with torch.device(device):
        made = type(model)._from_config(config, dtype=dtype, attn_implementation="sdpa")
    made.generation_config = model.generation_config
    return made.eval(), processor


def prepared(model: Any, processor: Any, examples: Sequence[Example]) -> Evaluator:
    """An evaluator that knows the dense answers: what a study pays once, whatever number of trials follow."""
    evaluator = Evaluator(model, processor, examples)
    evaluator(Plan(stages=()))
    return evaluator


def compared(model: Any, processor: Any, examples: Sequence[Example], plans: dict[str, Plan]) -> dict[str, Any]:
    """Seconds a trial of both ways, in turns, and where they differ."""
    prepare_s, evaluator = seconds_of(prepared, model, processor, examples)
    rows = []
    for name, plan in plans.items():
        first_s, ours = seconds_of(evaluator, plan)
        naive_s, (answers, scores) = seconds_of(naive, model, processor, examples, plan)
        again_s, again = seconds_of(evaluator, plan)
        differing = [i for i, answer in enumerate(answers) if answer != ours.answers[i] or scores[i] != ours.scores[i]]
        rows.append(
            {
                "plan": name,
                "stages": plan.to_dict(),
                "naive_s": naive_s,
                "first_s": first_s,
                "again_s": again_s,
                "ratio_first": naive_s / first_s,
                "ratio_again": naive_s / again_s,
                "mean_score": sum(scores) / len(scores),
                "differing_samples": differing,
                "repeats_itself": again == ours,
            }
        )
        print(f"{name}: {naive_s:.1f} s, {first_s:.2f} s, {again_s:.2f} s", file=sys.stderr)
    naive_s, first_s, again_s = (sum(row[key] for row in rows) for key in ("naive_s", "first_s", "again_s"))
    return {
        "num_samples": len(examples),
        "prepare_s": prepare_s,
        "decodes_because": evaluator.decodes_because,
        "prefix_mib": evaluator.prefixes.held_bytes / 2**20,
        "trials": rows,
        "naive_trials_per_minute": 60 * len(rows) / naive_s,
        "trials_per_minute": 60 * len(rows) / first_s,
        "trials_per_minute_again": 60 * len(rows) / again_s,
        "ratio": naive_s / first_s,
        "ratio_with_preparation": naive_s / (first_s + prepare_s),
        "ratio_again": naive_s / again_s,
    }


def trial_s(model: Any, processor: Any, examples: Sequence[Example], plan: Plan) -> float:
    """Median seconds of a trial whose prefixes are there."""
    evaluator = Evaluator(model, processor, examples)
    evaluator(plan)
    return median(seconds_of(evaluator, plan)[0] for _ in range(NUM_REPEATS))


def grown(examples: Sequence[Example], model: Any, processor: Any, small: bool) -> dict[str, Any]:
    """Trial cost against samples, image tokens and stages, each with its slope."""
    half, tenth = len(examples) // 2, max(2, len(examples) // 8)
    plan = presets.btp_released(8)
    samples = {num: trial_s(model, processor, examples[:num], plan) for num in (tenth, half, len(examples))}
    few = examples[: 6 if small else 24]
    tokens = {}
    for side in (4, 6, 8) if small else (8, 12, 16, 24):
        tokens[side**2] = trial_s(*random_model(side, {}, {}, "cpu", torch.float32), few, plan)
    stages = {}
    for num in (1, 2, 3, 4):  # one share of dense's tokens from layer 1 on, cut in more and more steps
        cuts = [Stage(layer=1 + index, keep=0.3 - 0.001 * index, selector="joint") for index in range(num)]
        stages[num] = trial_s(model, processor, few, Plan(stages=tuple(cuts)))
    return {
        "samples": {"seconds": samples, "exponent": exponent(samples)},
        "image_tokens": {"seconds": tokens, "exponent": exponent(tokens)},
        "stages": {"seconds": stages, "seconds_a_stage": slope(list(stages), list(stages.values()))},
    }


def exponent(seconds: dict[int, float]) -> float:
    """b of the fitted seconds = a * size^b."""
    return slope([math.log(size) for size in seconds], [math.log(value) for value in seconds.values()])


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - mean_x) ** 2 for a in x)


def table(found: dict[str, Any]) -> str:
    run = found["compared"]
    lines = [
        [
            row["plan"],
            f"{row['naive_s']:.2f}",
            f"{row['first_s']:.2f}",
            f"{row['again_s']:.2f}",
            f"{row['ratio_first']:.1f}",
            f"{row['ratio_again']:.1f}",
            str(len(row["differing_samples"])),
        ]
        for row in run["trials"]
    ]
    text = markdown(["plan", "naive/s", "ours/s", "again/s", "ratio", "ratio again", "differing"], lines)
    text += (
        f"\n\n{run['num_samples']} samples, prepared in {run['prepare_s']:.1f} s; trials per minute: naive "
        f"{run['naive_trials_per_minute']:.2f}, ours {run['trials_per_minute']:.2f}, again "
        f"{run['trials_per_minute_again']:.2f}; ratio {run['ratio']:.1f}, again {run['ratio_again']:.1f}"
    )
    for name, curve in found.get("growth", {}).items():
        points = ", ".join(f"{size}: {value:.3f} s" for size, value in curve["seconds"].items())
        kind = "exponent" if "exponent" in curve else "seconds_a_stage"
        text += f"\n{name}: {points}; {kind.replace('_', ' ')} {curve[kind]:.3f}"
    return text


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a few samples and plans, for a smoke test")
    parser.add_argument("--shape", choices=("reference", "7b"), default="reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=None, help="by default the whole of `select`")
    parser.add_argument("--plans", type=int, default=None, help="drawn plans beside the hand-set ones, by default 6")
    parser.add_argument("--commit", default=None, help="the commit, where git cannot tell")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args(arguments)
    options.samples = options.samples or (12 if options.small else None)
    options.plans = (1 if options.small else 6) if options.plans is None else options.plans
    return options


def loaded(options: argparse.Namespace) -> tuple[Any, Any]:
    if options.shape == "reference":
        return load_model(str(reference.WEIGHTS), options.device)
    shape = SHAPES["7b"][0]
    vision = {**shape.vision, "image_size": 14 * shape.side}
    made: tuple[Any, Any] = random_model(shape.side, dict(shape.text), vision | PATCHES, options.device, torch.bfloat16)
    return made


PATCHES = {"image_size": 24 * 20}  # the reference processor's patches are 20 pixels wide


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    torch.set_num_threads(1)
    model, processor = loaded(options)
    examples = from_dataset(reference.dataset("select"), "select")[: options.samples]
    anatomy = anatomy_of(model)
    shape = anatomy.decoder
    assert anatomy.grid is not None
    drawn = drawn_plans(shape.num_layers, math.prod(anatomy.grid), shape.hidden_size, shape.intermediate_size)
    systems = HAND_SET[:2] if options.small else HAND_SET
    plans = {name: presets.SYSTEMS[name].plan(shape.num_layers) for name in systems}
    plans |= {f"drawn {number}": next(drawn) for number in range(options.plans)}
    found = {
        **setting("benchmarks.trials", arguments, options.commit),
        "device": device_key(model, of_dtype(prompt_inputs(processor, examples[:1], options.device), model.dtype)).name,
        "shape": options.shape,
        "threads": torch.get_num_threads(),
        "compared": compared(model, processor, examples, plans),
    }
    if options.shape == "reference":
        found["growth"] = grown(examples, model, processor, options.small)
    out = options.out or (SMALL if options.small else default_path("trials", found["device"]))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found))
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
