"""Procedural pictures of coloured shapes and numbered signs, and what lies under each patch of them.

A picture is 320x320 pixels, read by the vision tower as 16x16 patches of 20 pixels. Items sit in a 4x4 layout of cells
(4x4 patches each), so "reading order" - row by row, left to right - is well defined. Shapes are jittered freely inside
their cell; the digits of a sign are 18 pixels high, one per patch, jittered by a pixel.

Shape suffixes: H and W are pixels, G = 16 patches a side.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

__all__ = [
    "COLORS",
    "IMAGE_SIZE",
    "LABELS",
    "NUM_PATCHES",
    "PATCH_SIZE",
    "SHAPES",
    "Item",
    "Scene",
    "draw",
    "patch_labels",
    "sample",
]

IMAGE_SIZE = 320
PATCH_SIZE = 20
NUM_PATCHES = IMAGE_SIZE // PATCH_SIZE
NUM_CELLS = 4
CELL_SIZE = IMAGE_SIZE // NUM_CELLS
COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 142, 30),
    "yellow": (243, 217, 50),
    "green": (46, 150, 70),
    "blue": (40, 90, 205),
    "purple": (135, 60, 165),
    "pink": (245, 140, 185),
}
DARK = {"red", "green", "blue", "purple"}
SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")

# Groups of words that say what lies under a patch. Training ties the projected image features to these words.
LABELS: dict[str, tuple[str, ...]] = {
    "kind": ("nothing", *SHAPES, "sign"),
    "color": tuple(COLORS),
    "digit": tuple("0123456789"),
    "slot": ("start", "middle", "end"),
    "order": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh"),
    "half_row": ("top", "bottom"),
    "half_column": ("left", "right"),
}
IGNORED = -1
"""Label of a patch that a group does not speak of, or that an item only grazes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a picture; `text` is the number on a sign and empty for a shape."""

    kind: str
    color: str
    row: int
    column: int
    x: int
    y: int
    size: int
    text: str = ""

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Items in reading order on a shaded background drawn from `background_seed`."""

    items: tuple[Item, ...]
    background_seed: int


def sample(rng: np.random.Generator) -> Scene:
    """A scene of 3 to 5 shapes and 1 or 2 signs, rich enough that every task can be asked of it."""
    num_shapes, num_signs = int(rng.integers(3, 6)), int(rng.integers(1, 3))
    cells = rng.permutation(NUM_CELLS * NUM_CELLS)[: num_shapes + num_signs]
    # Few kinds and colours a scene, so that things repeat and counting is not always "one".
    shapes = rng.permutation(SHAPES)[: int(rng.integers(2, 5))]
    colors = rng.permutation(list(COLORS))[: int(rng.integers(2, 6))]
    sign_colors = rng.permutation(list(COLORS))[:num_signs]
    items = []
    for number, cell in enumerate(cells):
        row, column = divmod(int(cell), NUM_CELLS)
        if number < num_shapes:
            size = int(rng.choice((46, 52, 58)))
            slack = CELL_SIZE - size
            x, y = (column * CELL_SIZE + int(rng.integers(slack + 1)), row * CELL_SIZE + int(rng.integers(slack + 1)))
            items.append(Item(str(rng.choice(shapes)), str(rng.choice(colors)), row, column, x, y, size))
        else:
            x = column * CELL_SIZE + int(rng.integers(2)) * PATCH_SIZE
            y = row * CELL_SIZE + int(rng.integers(4)) * PATCH_SIZE
            text = "".join(str(d) for d in rng.integers(0, 10, 3))
            items.append(Item("sign", str(sign_colors[number - num_shapes]), row, column, x, y, PATCH_SIZE, text))
    items.sort(key=lambda item: (item.row, item.column))
    return Scene(tuple(items), int(rng.integers(2**31)))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, the same pixels for the same scene."""
    rng = np.random.default_rng(scene.background_seed)
    top, bottom = rng.integers(195, 252, (2, 3))
    slope = np.linspace(0, 1, IMAGE_SIZE)[:, None, None]
    shade = np.broadcast_to(top + slope * (bottom - top), (IMAGE_SIZE, IMAGE_SIZE, 3))
    picture = Image.fromarray(shade.astype(np.uint8))
    for item in scene.items:
        if item.kind == "sign":
            _draw_sign(picture, item, rng)
        else:
            picture.paste(COLORS[item.color], (item.x, item.y), _mask(item.kind, item.size))
    return picture


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Per label group a (G, G) int array of word indices into `LABELS[group]`, `IGNORED` where the group is silent."""
    grid = np.arange(NUM_PATCHES)
    labels = {name: np.full((NUM_PATCHES, NUM_PATCHES), IGNORED) for name in LABELS}
    labels["kind"][:] = 0
    labels["half_row"][:] = (grid // (NUM_PATCHES // 2))[:, None]
    labels["half_column"][:] = (grid // (NUM_PATCHES // 2))[None]
    for order, item in enumerate(scene.items):
        coverage = _coverage(item)
        here = coverage >= 0.3
        labels["kind"][(coverage > 0.02) & ~here] = IGNORED
        labels["kind"][here] = LABELS["kind"].index(item.kind)
        labels["color"][here] = LABELS["color"].index(item.color)
        labels["order"][here] = order
        for slot, digit in enumerate(item.text):
            at = (item.y // PATCH_SIZE, item.x // PATCH_SIZE + slot)
            labels["digit"][at] = int(digit)
            labels["slot"][at] = slot
    return labels


def _coverage(item: Item) -> np.ndarray:
    """Share of each patch's area that the item covers, (G, G)."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    if item.kind == "sign":
        canvas[item.y : item.y + PATCH_SIZE, item.x : item.x + 3 * PATCH_SIZE] = 255
    else:
        canvas[item.y : item.y + item.size, item.x : item.x + item.size] = np.asarray(_mask(item.kind, item.size))
    blocks = canvas.reshape(NUM_PATCHES, PATCH_SIZE, NUM_PATCHES, PATCH_SIZE)
    return np.asarray(blocks.mean((1, 3), dtype=np.float32) / 255)


def _draw_sign(picture: Image.Image, item: Item, rng: np.random.Generator) -> None:
    pen = ImageDraw.Draw(picture)
    frame = (item.x - 4, item.y - 3, item.x + 3 * PATCH_SIZE + 3, item.y + PATCH_SIZE + 2)
    pen.rounded_rectangle(frame, radius=4, fill=COLORS[item.color], outline=(60, 60, 60))
    ink = (255, 255, 255) if item.color in DARK else (20, 20, 20)
    for slot, digit in enumerate(item.text):
        dx, dy = rng.integers(-1, 2, 2)
        center = (item.x + slot * PATCH_SIZE + PATCH_SIZE // 2 + int(dx), item.y + PATCH_SIZE // 2 + int(dy))
        pen.text(center, digit, fill=ink, font=_font(), anchor="mm")


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=25)  # its digits are 18 pixels high


@functools.cache
def _mask(shape: str, size: int) -> Image.Image:
    """Anti-aliased silhouette of a shape, (size, size), 8 bit."""
    big = Image.new("L", (size * 4, size * 4))
    pen, last = ImageDraw.Draw(big), size * 4 - 1
    if shape == "circle":
        pen.ellipse((0, 0, last, last), fill=255)
    elif shape == "square":
        pen.rectangle((last * 0.08, last * 0.08, last * 0.92, last * 0.92), fill=255)
    elif shape == "cross":
        pen.rectangle((last * 0.33, 0, last * 0.67, last), fill=255)
        pen.rectangle((0, last * 0.33, last, last * 0.67), fill=255)
    else:
        pen.polygon([(px * last, py * last) for px, py in _outline(shape)], fill=255)
    return big.resize((size, size), Image.Resampling.BOX)


def _outline(shape: str) -> list[tuple[float, float]]:
    if shape == "triangle":
        return [(0.5, 0.03), (1.0, 0.95), (0.0, 0.95)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.92, 0.5), (0.5, 1.0), (0.08, 0.5)]
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 0.52, 0.22)
    return [(0.5 + r * np.sin(a), 0.53 - r * np.cos(a)) for a, r in zip(angles, radii, strict=True)]
