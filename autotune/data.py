"""Examples to tune on: read, checked row by row, and split so that no picture is in two splits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from autotune.config import AutotuneError
from autotune.tasks import SCORERS

__all__ = ["SPLITS", "Example", "digest", "from_dataset", "load", "load_splits", "split", "write_parquet"]

SPLITS = ("calibrate", "select", "certify")
SHARES = {"calibrate": 0.1, "select": 0.3, "certify": 0.6}
COLUMNS = ("image", "question", "answer", "task")
TEXTS = ("question", "answer")


@dataclass(frozen=True, slots=True)
class Example:
    """One question; `image_id` is the SHA-256 of the picture's pixels, shared by all questions about it."""

    image: Image.Image
    image_id: str
    question: str
    answer: str
    task: str


def load(path: Path) -> list[Example]:
    """Examples from a JSONL file (image paths relative to it) or from any folder `datasets.load_dataset` reads.

    Raises AutotuneError naming the row and what is wrong with it.
    """
    if not path.exists():
        raise AutotuneError(f"--data must be a JSONL file or a dataset folder, got {path}, which does not exist")
    rows = _jsonl_rows(path) if path.is_file() else _folder_rows(path)
    examples = _examples(rows, path)
    if not examples:
        raise AutotuneError(f"--data needs at least one row, got none in {path}; each row has {', '.join(COLUMNS)}")
    return examples


def from_dataset(rows: Iterable[Mapping[str, Any]], where: str) -> list[Example]:
    """Examples from rows whose `image` is a PIL picture."""
    return _examples(enumerate(rows, start=1), Path(where))


def load_splits(path: Path | None) -> dict[str, list[Example]]:
    """The splits of the user's examples; without a path, the reference VLM's own."""
    from autotune import reference

    if path is not None:
        return split(load(path))
    return {name: from_dataset(reference.dataset(name), name) for name in SPLITS}


def split(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """Calibrate, select and certify sets of whole pictures, 10, 30 and 60 % of them, by hash: order is no matter."""
    by_hash = {hashlib.sha256(f"split:{e.image_id}".encode()).digest(): e.image_id for e in examples}
    images = [by_hash[key] for key in sorted(by_hash)]
    if len(images) < 10:
        raise AutotuneError(
            f"a tuning set needs at least 10 different pictures to split, got {len(images)}; add pictures"
        )
    edges = [0, round(SHARES["calibrate"] * len(images)), round((1 - SHARES["certify"]) * len(images)), len(images)]
    home = {image: name for k, name in enumerate(SPLITS) for image in images[edges[k] : edges[k + 1]]}
    splits = {name: [e for e in examples if home[e.image_id] == name] for name in SPLITS}
    for name in ("select", "certify"):
        for task in dict.fromkeys(e.task for e in examples):
            num_pictures = len({e.image_id for e in splits[name] if e.task == task})
            if num_pictures < 2:
                raise AutotuneError(
                    f"every task needs questions about at least 2 pictures in each split, got {num_pictures} "
                    f"for {task!r} in {name!r}; add such questions, or leave the task out"
                )
    return splits


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over pictures, questions, answers and tasks, in order."""
    sha = hashlib.sha256()
    for e in examples:
        sha.update(json.dumps([e.image_id, e.question, e.answer, e.task]).encode())
    return sha.hexdigest()


def write_parquet(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write equally long columns as one Parquet file."""
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(dict(columns)).to_parquet(str(path))


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise AutotuneError(f"--data must be a UTF-8 JSONL file or a dataset folder, got {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise AutotuneError(f"{path}, row {number}: every line must be a JSON object, got {error}") from error
            if not isinstance(row, dict):
                raise AutotuneError(f"{path}, row {number}: every line must be a JSON object, got {type(row).__name__}")
            yield number, row


def _folder_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import datasets

    try:
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            loaded = datasets.load_from_disk(str(path))
            loaded = datasets.concatenate_datasets(list(loaded.values())) if isinstance(loaded, dict) else loaded
        else:
            loaded = datasets.load_dataset(str(path), split="all")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise AutotuneError(f"--data must be a folder that `datasets` can load, got {path}: {error}") from error
    yield from enumerate(loaded, start=1)


def _examples(rows: Iterable[tuple[int, Mapping[str, Any]]], path: Path) -> list[Example]:
    known: dict[Any, tuple[Image.Image, str]] = {}
    examples = []
    for number, row in rows:
        where = f"{path}, row {number}"
        if missing := [name for name in COLUMNS if name not in row]:
            raise AutotuneError(f"{where}: a row needs {', '.join(COLUMNS)}, got no {missing[0]!r}")
        if not isinstance(row["task"], str) or row["task"] not in SCORERS:
            raise AutotuneError(
                f"{where}: unknown task {row['task']!r}; known are {', '.join(SCORERS)} ('exact' for any other)"
            )
        texts = {name: str(row[name]) if type(row[name]) in (int, float) else row[name] for name in TEXTS}
        for name, text in texts.items():
            if not isinstance(text, str) or not text.strip():
                raise AutotuneError(f"{where}: {name!r} must be a non-empty text, got {text!r}")
        image, image_id = _picture(row["image"], path, where, known)
        examples.append(Example(image, image_id, texts["question"], texts["answer"], row["task"]))
    return examples


def _picture(value: Any, path: Path, where: str, known: dict[Any, tuple[Image.Image, str]]) -> tuple[Image.Image, str]:
    """The RGB picture and its id, opened and hashed once per file."""
    if isinstance(value, str) and value in known:
        return known[value]
    if isinstance(value, Image.Image):
        image = value.convert("RGB")
    else:
        file = (path if path.is_dir() else path.parent) / str(value)
        try:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
        except FileNotFoundError as error:
            raise AutotuneError(f"{where}: the image must exist, got {file}; paths are relative to the file") from error
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise AutotuneError(f"{where}: the image must be readable, got {file}: {error}") from error
    image_id = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    known[image_id] = known.get(image_id, (image, image_id))  # one copy of a picture, however often it is asked about
    if isinstance(value, str):
        known[value] = known[image_id]
    return known[image_id]
