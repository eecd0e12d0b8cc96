"""Seeded scenes of everyday things, coloured shapes and signs, and what lies under each patch of them.

A picture is 224x224 pixels, read by the vision tower as 14x14 patches of 16 pixels. Items sit in a 4x4 layout of cells,
so reading order (row by row, left to right) is well defined. Things and shapes are jittered inside their cell, turned,
mirrored and recoloured a little; the digits of a sign are one a patch, jittered by a pixel.

Shape suffixes: G = 14 patches a side.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFont

from autotune.reference.scenes import COLORS
from autotune.reference_135m.sprites import KINDS, load_sheet

__all__ = [
    "IMAGE_SIZE",
    "LABELS",
    "NUM_PATCHES",
    "PATCH_SIZE",
    "SHAPES",
    "WORDS",
    "Item",
    "Scene",
    "draw",
    "patch_labels",
    "sample",
]

IMAGE_SIZE = 224
PATCH_SIZE = 16
NUM_PATCHES = IMAGE_SIZE // PATCH_SIZE
NUM_CELLS = 4
CELL_SIZE = IMAGE_SIZE // NUM_CELLS
SIGN_SIZE = 3 * PATCH_SIZE, PATCH_SIZE
SHAPES = {"circle": (40, 1.0), "triangle": (3, 1.0), "square": (4, 1.0), "hexagon": (6, 1.0), "star": (5, 0.42)}
"""Corners, and how far the points between them lie from the centre."""
# fmt: off
WORDS = (
    "bank", "cold", "exit", "free", "help", "home", "hot", "jazz", "left", "milk", "new", "open", "park", "salt",
    "stop", "taxi",
)
# fmt: on

LABELS: dict[str, tuple[str, ...]] = {
    "kind": ("nothing", *KINDS, *SHAPES, "sign"),
    "color": tuple(COLORS),
    "digit": tuple("0123456789"),
    "word": WORDS,
    "order": ("first", "second", "third", "fourth", "fifth", "sixth", "seventh"),
    "half_row": ("top", "bottom"),
    "half_column": ("left", "right"),
}
"""Groups of words that say what lies under a patch. Training ties the projected image features to these words."""
IGNORED = -1
"""Label of a patch that a group does not speak of, or that an item only grazes."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing in a picture. `color` is empty but for shapes and signs, `text` but for signs; `turn` is in degrees."""

    kind: str
    row: int
    column: int
    x: int
    y: int
    size: int
    color: str = ""
    text: str = ""
    turn: int = 0
    mirrored: bool = False

    @property
    def name(self) -> str:
        return f"{self.color} {self.kind}".strip()


@dataclass(frozen=True, slots=True)
class Scene:
    """Items in reading order, in one drawing style, on a textured background drawn from `background_seed`."""

    items: tuple[Item, ...]
    background_seed: int
    style: str = "noto"


def sample(rng: np.random.Generator, style: str = "noto") -> Scene:
    """A scene of 3 to 7 items: 2 to 4 things, up to 2 shapes, 1 or 2 signs (never 2 where that would make 8)."""
    num_things, num_shapes = int(rng.integers(2, 5)), int(rng.integers(3))
    num_signs = 1 if num_things + num_shapes > 5 else int(rng.integers(1, 3))
    cells = [
        divmod(int(cell), NUM_CELLS) for cell in rng.permutation(NUM_CELLS**2)[: num_things + num_shapes + num_signs]
    ]
    # Few kinds a scene, so that things repeat and counting is not always "one".
    kinds = rng.choice(list(KINDS), int(rng.integers(1, num_things + 1)), replace=False)
    colors = rng.permutation(list(COLORS))
    items = [_thing(rng, str(rng.choice(kinds)), *cell) for cell in cells[:num_things]]
    for cell in cells[num_things : num_things + num_shapes]:
        items.append(_thing(rng, str(rng.choice(list(SHAPES))), *cell, color=str(rng.choice(colors))))
    for cell, color in zip(cells[num_things + num_shapes :], colors[:num_signs], strict=True):
        items.append(_sign(rng, *cell, color=str(color)))
    items.sort(key=lambda item: (item.row, item.column))
    return Scene(tuple(items), int(rng.integers(2**31)), style)


def _thing(rng: np.random.Generator, kind: str, row: int, column: int, color: str = "") -> Item:
    size = int(rng.integers(42, 55))
    x, y = (cell * CELL_SIZE + int(rng.integers(CELL_SIZE - size + 1)) for cell in (column, row))
    turn, mirrored = int(rng.integers(-12, 13)), bool(rng.random() < 0.5)
    return Item(kind, row, column, x, y, size, color, turn=turn, mirrored=mirrored)


def _sign(rng: np.random.Generator, row: int, column: int, color: str) -> Item:
    x, y = (-(-cell * CELL_SIZE // PATCH_SIZE) * PATCH_SIZE for cell in (column, row))
    y += int(rng.integers(3)) * PATCH_SIZE
    number = "".join(str(digit) for digit in rng.integers(0, 10, int(rng.integers(2, 4))))
    text = number if rng.random() < 0.6 else str(rng.choice(WORDS))
    return Item("sign", row, column, x, y, SIGN_SIZE[0], color, text)


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, the same pixels for the same scene. Needs the sheet of the scene's style."""
    rng = np.random.default_rng(scene.background_seed)
    picture = _background(rng)
    for item in scene.items:
        if item.kind == "sign":
            _draw_sign(picture, item, rng)
            continue
        sprite = _sprite(item, scene.style)
        if item.kind in KINDS:
            sprite = ImageEnhance.Color(sprite).enhance(rng.uniform(0.75, 1.25))
            sprite = ImageEnhance.Brightness(sprite).enhance(rng.uniform(0.85, 1.12))
        picture.paste(sprite, (item.x, item.y), sprite)
    return picture


def patch_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Per label group a (G, G) int array of word indices into `LABELS[group]`, `IGNORED` where the group is silent."""
    grid = np.arange(NUM_PATCHES)
    labels = {name: np.full((NUM_PATCHES, NUM_PATCHES), IGNORED) for name in LABELS}
    labels["kind"][:] = 0
    labels["half_row"][:] = (grid // (NUM_PATCHES // 2))[:, None]
    labels["half_column"][:] = (grid // (NUM_PATCHES // 2))[None]
    for order, item in enumerate(scene.items):
        coverage = _coverage(item, scene.style)
        here = coverage >= 0.3
        labels["kind"][(coverage > 0.02) & ~here] = IGNORED
        labels["kind"][here] = LABELS["kind"].index(item.kind)
        labels["order"][here] = order
        if item.color:
            labels["color"][here] = LABELS["color"].index(item.color)
        if item.text.isdigit():
            row, column = item.y // PATCH_SIZE, item.x // PATCH_SIZE
            labels["digit"][row, column : column + len(item.text)] = [int(digit) for digit in item.text]
        elif item.text:
            labels["word"][here] = WORDS.index(item.text)
    return labels


def _coverage(item: Item, style: str) -> np.ndarray:
    """Share of each patch's area that the item covers, (G, G)."""
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    if item.kind == "sign":
        canvas[item.y : item.y + SIGN_SIZE[1], item.x : item.x + SIGN_SIZE[0]] = 255
    else:
        canvas[item.y : item.y + item.size, item.x : item.x + item.size] = np.asarray(_sprite(item, style))[..., 3]
    blocks = canvas.reshape(NUM_PATCHES, PATCH_SIZE, NUM_PATCHES, PATCH_SIZE)
    return np.asarray(blocks.mean((1, 3), dtype=np.float32) / 255)


def _background(rng: np.random.Generator) -> Image.Image:
    """Soft blotches of two similar tones, a faint weave, and grain."""
    tone = rng.uniform(110, 240, 3)
    blotches = rng.normal(0, 14, (*rng.integers(2, 12, 2), 3))
    smooth = [
        np.asarray(
            Image.fromarray(channel.astype(np.float32)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        )
        for channel in np.moveaxis(blotches, 2, 0)
    ]
    angle, pitch = rng.uniform(0, math.pi), rng.uniform(3, 20)
    rows, columns = np.mgrid[:IMAGE_SIZE, :IMAGE_SIZE]
    weave = rng.uniform(0, 8) * np.sin((rows * math.sin(angle) + columns * math.cos(angle)) * 2 * math.pi / pitch)
    grain = rng.normal(0, rng.uniform(0, 5), (IMAGE_SIZE, IMAGE_SIZE))
    pixels = tone + np.stack(smooth, 2) + (weave + grain)[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _sprite(item: Item, style: str) -> Image.Image:
    """Picture of a thing or a shape, RGBA, `item.size` pixels a side."""
    picture = load_sheet(style)[item.kind] if item.kind in KINDS else _shape(item.kind, item.color)
    if item.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    picture = picture.rotate(item.turn, Image.Resampling.BILINEAR)
    return picture.resize((item.size, item.size), Image.Resampling.BOX, reducing_gap=None)


@functools.cache
def _shape(kind: str, color: str) -> Image.Image:
    corners, inner = SHAPES[kind]
    center, radius = 48, 46
    turn = math.pi / 4 if kind == "square" else 0.0
    points = []
    for number in range(2 * corners):
        reach = radius * (1.0 if number % 2 == 0 else inner if kind == "star" else math.cos(math.pi / corners))
        angle = number * math.pi / corners + turn
        points.append((center + reach * math.sin(angle), center - reach * math.cos(angle)))
    picture = Image.new("RGBA", (96, 96))
    ImageDraw.Draw(picture).polygon(points, fill=(*COLORS[color], 255), outline=(40, 40, 40, 255))
    return picture


def _draw_sign(picture: Image.Image, item: Item, rng: np.random.Generator) -> None:
    """A coloured frame around white paper with dark type, so that reading does not depend on the colour."""
    pen = ImageDraw.Draw(picture)
    width, height = SIGN_SIZE
    frame = (item.x - 3, item.y - 3, item.x + width + 2, item.y + height + 2)
    pen.rounded_rectangle(frame, radius=3, fill=COLORS[item.color], outline=(60, 60, 60))
    pen.rectangle((item.x, item.y + 1, item.x + width - 1, item.y + height - 2), fill=(250, 250, 250))
    dx, dy = (int(jitter) for jitter in rng.integers(-1, 2, 2))
    middle = item.y + height // 2 + dy
    if item.text.isdigit():
        for slot, digit in enumerate(item.text):
            center = item.x + slot * PATCH_SIZE + PATCH_SIZE // 2 + dx
            pen.text((center, middle), digit, fill=(20, 20, 20), font=_font(19), anchor="mm")
    else:
        pen.text((item.x + width // 2 + dx, middle), item.text.upper(), fill=(20, 20, 20), font=_font(16), anchor="mm")


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)
