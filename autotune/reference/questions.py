"""Questions and answers over a scene, six tasks that need different tokens of the picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from autotune.reference.scenes import COLORS, SHAPES, Item, Scene

__all__ = ["TASKS", "Question", "ask"]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven")
Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Question:
    task: str
    question: str
    answer: str


def _unique(items: tuple[Item, ...], key: Callable[[Item], str]) -> list[Item]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def _pick(rng: np.random.Generator, items: list[Item]) -> Item | None:
    return items[int(rng.integers(len(items)))] if items else None


def _way_of_naming(rng: np.random.Generator) -> Callable[[Item], str]:
    """How a question speaks of a thing: by kind, by colour, or, one time in five, by both."""
    ways: tuple[Callable[[Item], str], ...] = (lambda i: i.kind, lambda i: f"{i.color} thing", lambda i: i.name)
    return ways[int(rng.choice(3, p=(0.4, 0.4, 0.2)))]


def _existence(scene: Scene, rng: np.random.Generator) -> Pair:
    name = _way_of_naming(rng)
    here = {name(item) for item in scene.items}
    everywhere = {name(Item(kind, color, 0, 0, 0, 0, 0)) for color in COLORS for kind in (*SHAPES, "sign")}
    there = rng.random() < 0.5 or here == everywhere
    asked = str(rng.choice(sorted(here if there else everywhere - here)))
    return f"Is there a {asked}?", "yes" if there else "no"


def _attribute(scene: Scene, rng: np.random.Generator) -> Pair | None:
    ask_color = rng.random() < 0.5
    unique = _unique(scene.items, (lambda i: i.kind) if ask_color else (lambda i: i.color))
    item = _pick(rng, [item for item in unique if item.kind != "sign"])  # signs are asked about by `reading`
    if item is None:
        return None
    return (
        (f"What color is the {item.kind}?", item.color) if ask_color else (f"Which thing is {item.color}?", item.kind)
    )


def _counting(scene: Scene, rng: np.random.Generator) -> Pair:
    key, words = [("kind", (*SHAPES, "sign")), ("color", tuple(COLORS))][int(rng.integers(2))]
    counts = Counter(getattr(item, key) for item in scene.items)
    # First the number, then a word with that number, so that small numbers do not crowd out the large ones.
    number = int(rng.choice(sorted({counts[word] for word in words})))
    word = str(rng.choice([word for word in words if counts[word] == number]))
    what = f"{word} things" if key == "color" else "crosses" if word == "cross" else f"{word}s"
    return f"How many {what} are there?", NUMBERS[number]


def _spatial(scene: Scene, rng: np.random.Generator) -> Pair | None:
    name = _way_of_naming(rng)
    unique = _unique(scene.items, name)
    if rng.random() < 0.15 and len({item.column for item in unique}) > 1:
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        while a.column == b.column:
            a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        return f"Is the {name(a)} left of the {name(b)}?", "yes" if a.column < b.column else "no"
    item = _pick(rng, unique)
    if item is None:
        return None
    return f"Where is the {name(item)}?", f"{('top', 'bottom')[item.row // 2]} {('left', 'right')[item.column // 2]}"


def _reading(scene: Scene, rng: np.random.Generator) -> Pair | None:
    item = _pick(rng, [item for item in scene.items if item.kind == "sign"])
    return None if item is None else (f"What number is on the {item.color} sign?", item.text)


def _caption(scene: Scene, rng: np.random.Generator) -> Pair:
    return "List what is in the picture.", ", ".join(item.name for item in scene.items)


_ASK: dict[str, Callable[[Scene, np.random.Generator], Pair | None]] = {
    "existence": _existence,
    "attribute": _attribute,
    "counting": _counting,
    "spatial": _spatial,
    "reading": _reading,
    "caption": _caption,
}
TASKS = tuple(_ASK)


def ask(scene: Scene, task: str, rng: np.random.Generator) -> Question | None:
    """One question of a task, or None where this scene does not allow it (nothing unique to ask about)."""
    pair = _ASK[task](scene, rng)
    return None if pair is None else Question(task, *pair)
