"""Render the sprite sheets and the shipped splits: `python -m autotune.reference_135m.make_splits`.

Needs the sources that `sprites` names. The same sources give the same files; training draws from other random streams,
and `data/DATA_CARD.md`, written here, has the digest of every split.
"""

from __future__ import annotations

import argparse
import hashlib
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autotune.reference_135m import DATA, SPLITS, questions, scenes, sprites

__all__ = ["NUM_SCENES", "STREAMS", "main", "majority_share", "rows_of"]

STREAMS = 20250602  # first entropy word of the splits' streams; training draws from streams that begin with its --seed
NUM_SCENES = {"calibrate": 64, "select": 48, "certify": 200, "fluent": 100}
QUALITY = 88  # of webp
SOURCES = {
    "noto": Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"),
    "fluent": Path("package/assets"),
}
CARD = """# Pictures and questions of reference-135m

Drawn by `python -m autotune.reference_135m.make_splits`: seeded scenes of 3 to 7 items ({num_kinds} kinds of things,
{num_shapes} coloured shapes, signs with a number or a word) on textured backgrounds, {size} pixels a side, webp. Every
picture has one question of each of the six tasks. No picture is in two splits; training draws others.

The pictures of things are from [Noto Color Emoji](https://github.com/googlefonts/noto-emoji) (SIL Open Font License
1.1), and in the split `fluent` from [Fluent Emoji 3D](https://github.com/microsoft/fluentui-emoji) (MIT, Microsoft
Corporation), a style that training never saw. Shapes, signs, backgrounds and questions: Apache-2.0, like the code.

| split | style | pictures | questions | SHA-256 |
|---|---|---|---|---|
{splits}

Always giving the most frequent answer of the task, on `certify`:

| task | share right |
|---|---|
{majority}
"""


def rows_of(split: str) -> Iterator[dict[str, Any]]:
    """Per picture of a split its webp bytes and its questions, one of every task."""
    rng = np.random.default_rng((STREAMS, list(SPLITS).index(split)))
    found = 0
    while found < NUM_SCENES[split]:
        scene = scenes.sample(rng, SPLITS[split])
        asked = [question for task in questions.TASKS if (question := questions.ask(scene, task, rng)) is not None]
        if len(asked) < len(questions.TASKS):  # nothing unique to ask about
            continue
        found += 1
        file = io.BytesIO()
        scenes.draw(scene).save(file, "WEBP", quality=QUALITY, method=6)
        entries = [{"question": each.question, "answer": each.answer, "task": each.task} for each in asked]
        yield {"image": file.getvalue(), "asked": entries}


def majority_share(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Per task the share of questions whose answer is the task's most frequent one."""
    answers: dict[str, Counter[str]] = {task: Counter() for task in questions.TASKS}
    for row in rows:
        for asked in row["asked"]:
            answers[asked["task"]][asked["answer"]] += 1
    return {task: counts.most_common(1)[0][1] / counts.total() for task, counts in answers.items()}


def _write(folder: Path) -> None:
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    lines, majority = [], {}
    for split, style in SPLITS.items():
        rows, path = list(rows_of(split)), folder / f"{split}.parquet"
        datasets.Dataset.from_list(rows).to_parquet(path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        num_questions = sum(len(row["asked"]) for row in rows)
        lines.append(f"| {split} | {style} | {len(rows)} | {num_questions} | `{digest}` |")
        if split == "certify":
            majority = majority_share(rows)
    card = CARD.format(
        num_kinds=len(sprites.KINDS),
        num_shapes=len(scenes.SHAPES),
        size=scenes.IMAGE_SIZE,
        splits="\n".join(lines),
        majority="\n".join(f"| {task} | {share:.3f} |" for task, share in majority.items()),
    )
    (folder / "DATA_CARD.md").write_text(card)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sheets", action="store_true", help="only the sprite sheets, which training needs too")
    parser.add_argument("--noto", type=Path, default=SOURCES["noto"], help="the font file")
    parser.add_argument("--fluent", type=Path, default=SOURCES["fluent"], help="the folder of webp files")
    parser.add_argument("--out", type=Path, default=DATA)
    options = parser.parse_args()
    for style in sprites.STYLES:
        print(sprites.build_sheet(style, getattr(options, style)))
    if not options.sheets:
        _write(options.out)


if __name__ == "__main__":
    main()
