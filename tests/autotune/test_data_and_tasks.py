"""Reading a user's examples: what is wrong is named by row, and no picture is in two splits."""

import json
from pathlib import Path

import pytest
from PIL import Image

from autotune import data
from autotune.config import AutotuneError, Limit
from autotune.tasks import SCORERS


def write(folder: Path, rows: list[object]) -> Path:
    (folder / "pictures").mkdir(exist_ok=True)
    for number in range(12):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(folder / "pictures" / f"{number}.png")
    path = folder / "data.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def row(number: int = 0, **changes: object) -> dict[str, object]:
    return {
        "image": f"pictures/{number}.png",
        "question": "what?",
        "answer": "red",
        "task": "attribute",
        **changes,
    }


def test_pictures_are_never_in_two_splits(tmp_path: Path) -> None:
    examples = data.load(write(tmp_path, [row(n % 12, question=f"what {n}?") for n in range(36)]))
    splits = data.split(examples)
    ids = {name: {e.image_id for e in part} for name, part in splits.items()}
    assert sum(len(part) for part in splits.values()) == 36
    assert all(ids.values())
    assert not ids["calibrate"] & ids["select"]
    assert not ids["select"] & ids["certify"]
    assert not ids["calibrate"] & ids["certify"]


def test_the_order_of_rows_does_not_move_a_picture(tmp_path: Path) -> None:
    rows = [row(n) for n in range(12)]
    forward = data.split(data.load(write(tmp_path, rows)))
    backward = data.split(data.load(write(tmp_path, rows[::-1])))
    for name in data.SPLITS:
        assert {e.image_id for e in forward[name]} == {e.image_id for e in backward[name]}


def test_equal_pictures_under_two_names_are_one(tmp_path: Path) -> None:
    path = write(tmp_path, [row(0), row(image="copy.png")])
    Image.new("RGB", (8, 8), (0, 0, 0)).save(tmp_path / "copy.png")
    first, second = data.load(path)
    assert first.image_id == second.image_id


def test_a_dataset_folder_reads_like_the_file(tmp_path: Path) -> None:
    import datasets

    rows = [row(n) for n in range(12)]
    path = write(tmp_path, rows)
    pictures = [data.load(path)[n].image for n in range(12)]
    columns = {"image": pictures, **{key: [r[key] for r in rows] for key in ("question", "answer", "task")}}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "folder"))
    assert data.digest(data.load(tmp_path / "folder")) == data.digest(data.load(path))


@pytest.mark.parametrize(
    ("bad", "named"),
    [
        (row(task="poetry"), "unknown task 'poetry'"),
        (row(image="pictures/none.png"), "pictures/none.png"),
        ("{not json", "JSON object"),
        ("[1, 2]", "got list"),
        (row(answer=""), "'answer' must be a non-empty text"),
        ({"image": "pictures/0.png", "question": "what?", "task": "attribute"}, "no 'answer'"),
        (row(image="data.jsonl"), "must be readable"),
        (row(image="no\0name.png"), "must be readable"),
        (row(task=["attribute"]), "unknown task"),
        (row(question=["what?"]), "'question' must be a non-empty text"),
    ],
)
def test_a_bad_row_is_named_by_number(tmp_path: Path, bad: object, named: str) -> None:
    with pytest.raises(AutotuneError, match="row 2") as raised:
        data.load(write(tmp_path, [row(), bad]))
    assert named in str(raised.value)


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(AutotuneError, match="UTF-8 JSONL"):
        data.load(tmp_path / "data.jsonl")


def test_a_task_that_a_split_would_lack_is_refused(tmp_path: Path) -> None:
    rows = [row(n) for n in range(12)] + [row(3, task="counting", answer="two")]
    with pytest.raises(AutotuneError, match=r"at least 2 pictures in each split, got . for 'counting'"):
        data.split(data.load(write(tmp_path, rows)))


def test_numbers_are_answers_too(tmp_path: Path) -> None:
    (example,) = data.load(write(tmp_path, [row(answer=3, task="counting")]))
    assert example.answer == "3"


def test_too_few_pictures_to_split(tmp_path: Path) -> None:
    with pytest.raises(AutotuneError, match="at least 10 different pictures"):
        data.split(data.load(write(tmp_path, [row()])))


@pytest.mark.parametrize(
    ("task", "answer", "reference", "expected"),
    [
        ("existence", "Yes ", "yes", 1.0),
        ("reading", "471", "417", 0.0),
        ("caption", "red circle, blue star", "red circle, blue star", 1.0),
        ("caption", "blue star, red circle", "red circle, blue star", 0.5),
        ("caption", "red circle", "red circle, blue star, green sign", 0.5),
        ("caption", "", "red circle", 0.0),
    ],
)
def test_scores(task: str, answer: str, reference: str, expected: float) -> None:
    assert SCORERS[task](answer, reference) == pytest.approx(expected)


def test_limits_read_as_written() -> None:
    assert Limit.parse("prefill_p50<=0.7x") == Limit("prefill", "p50", 0.7, "x")
    assert Limit.parse(" ttft_p95 <= 50ms ").ratio(dense_ms=100.0) == 0.5
    assert str(Limit.parse("ttft_p95<=50ms")) == "ttft_p95<=50ms"


@pytest.mark.parametrize(
    "text", ["", "prefill<=0.7x", "prefill_p50<0.7x", "prefill_p50<=0x", "prefill_p50<=-1x", "p<=nanx"]
)
def test_a_limit_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(AutotuneError, match="a limit reads"):
        Limit.parse(text)
