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


def _existence(scene: Scene, rng: np.random.Generator) -> Pair:
    names = {item.name for item in scene.items}
    if rng.random() < 0.5:
        name, answer = str(rng.choice(sorted(names))), "yes"
    else:
        # Half of the absent things are made of a colour and a kind that are both there, so neither alone tells.
        here = {(a.color, b.kind) for a in scene.items for b in scene.items}
        everywhere = {(color, kind) for color in COLORS for kind in (*SHAPES, "sign")}
        hard = sorted(f"{c} {k}" for c, k in here if f"{c} {k}" not in names)
        easy = sorted(f"{c} {k}" for c, k in everywhere if f"{c} {k}" not in names)
        name, answer = str(rng.choice(hard if hard and rng.random() < 0.5 else easy)), "no"
    return f"Is there a {name}?", answer


def _attribute(scene: Scene, rng: np.random.Generator) -> Pair | None:
    ask_color = rng.random() < 0.5
    unique = _unique(scene.items, (lambda i: i.kind) if ask_color else (lambda i: i.color))
    item = _pick(rng, [item for item in unique if item.kind != "sign"])  # signs are asked about by `reading`
    if item is None:
        return None
    return (f"What color is the {item.kind}?", item.color) if ask_color else (f"Which thing is {item.color}?", item.kind)


def _counting(scene: Scene, rng: np.random.Generator) -> Pair:
    key, words = [("kind", (*SHAPES, "sign")), ("color", tuple(COLORS))][int(rng.integers(2))]
    counts = Counter(getattr(item, key) for item in scene.items)
    # First the number, then a word with that number, so that small numbers do not crowd out the large ones.
    number = int(rng.choice(sorted({counts[word] for word in words})))
    word = str(rng.choice([word for word in words if counts[word] == number]))
    what = f"{word} things" if key == "color" else "crosses" if word == "cross" else f"{word}s"
    return f"How many {what} are there?", NUMBERS[number]


def _spatial(scene: Scene, rng: np.random.Generator) -> Pair | None:
    unique = _unique(scene.items, lambda i: i.name)
    if rng.random() < 0.25 and len({item.column for item in unique}) > 1:
        a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        while a.column == b.column:
            a, b = (unique[i] for i in rng.permutation(len(unique))[:2])
        return f"Is the {a.name} left of the {b.name}?", "yes" if a.column < b.column else "no"
    item = _pick(rng, unique)
    return item and (f"Where is the {item.name}?", f"{('top', 'bottom')[item.row // 2]} {('left', 'right')[item.column // 2]}")


def _reading(scene: Scene, rng: np.random.Generator) -> Pair | None:
    item = _pick(rng, [item for item in scene.items if item.kind == "sign"])
    return item and (f"What number is on the {item.color} sign?", item.text)


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
    return pair and Question(task, *pair)
