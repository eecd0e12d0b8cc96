"""Questions and answers over a scene of everyday things: the six tasks of the small reference VLM, in other words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np

from autotune.reference.questions import Question
from autotune.reference.scenes import COLORS
from autotune.reference_135m.scenes import SHAPES, Item, Scene
from autotune.reference_135m.sprites import KINDS

__all__ = ["TASKS", "ask", "plural"]

NUMBERS = ("zero", "one", "two", "three", "four")
NAMES = (*KINDS, *(f"{color} {shape}" for color in COLORS for shape in SHAPES))
Pair = tuple[str, str]


def plural(noun: str) -> str:
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "x", "ch", "sh", "tomato")) else f"{noun}s"


def _place(item: Item) -> str:
    return f"{('top', 'bottom')[item.row // 2]} {('left', 'right')[item.column // 2]}"


def _unique(items: tuple[Item, ...], key: Callable[[Item], str]) -> list[Item]:
    counts = Counter(key(item) for item in items)
    return [item for item in items if counts[key(item)] == 1]


def _pick(rng: np.random.Generator, items: list[Item]) -> Item | None:
    return items[int(rng.integers(len(items)))] if items else None


def _existence(scene: Scene, rng: np.random.Generator) -> Pair:
    here = {item.name for item in scene.items if item.kind != "sign"}
    there = rng.random() < 0.5
    asked = str(rng.choice(sorted(here if there else set(NAMES) - here)))
    return f"Is there a {asked}?", "yes" if there else "no"


def _attribute(scene: Scene, rng: np.random.Generator) -> Pair | None:
    colored = _pick(rng, [item for item in _unique(scene.items, lambda item: item.kind) if item.color])
    if colored is not None and rng.random() < 0.4:
        return f"What color is the {colored.kind}?", colored.color
    alone = _pick(rng, _unique(scene.items, _place))
    return None if alone is None else (f"What is at the {_place(alone)}?", alone.name)


def _counting(scene: Scene, rng: np.random.Generator) -> Pair:
    counts = Counter(item.kind for item in scene.items)
    words = (*KINDS, *SHAPES, "sign")
    # First the number, then a word with that number, so that small numbers do not crowd out the large ones.
    number = int(rng.choice(sorted({counts[word] for word in words})))
    word = str(rng.choice([word for word in words if counts[word] == number]))
    return f"How many {plural(word)} are there?", NUMBERS[number]


def _spatial(scene: Scene, rng: np.random.Generator) -> Pair | None:
    unique = _unique(scene.items, lambda item: item.name)
    apart = [(a, b) for a in unique for b in unique if a.column != b.column]
    if apart and rng.random() < 0.15:
        a, b = apart[int(rng.integers(len(apart)))]
        return f"Is the {a.name} left of the {b.name}?", "yes" if a.column < b.column else "no"
    item = _pick(rng, unique)
    return None if item is None else (f"Where is the {item.name}?", _place(item))


def _reading(scene: Scene, rng: np.random.Generator) -> Pair | None:
    item = _pick(rng, [item for item in scene.items if item.kind == "sign"])
    return None if item is None else (f"What does the {item.color} sign say?", item.text)


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
