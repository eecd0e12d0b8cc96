"""Pictures of everyday things in two drawing styles, rendered once into a sheet a style.

Only training and the making of the shipped splits need them. Styles, and where they come from:

- `noto`, Noto Color Emoji (SIL OFL 1.1): `apt-get install fonts-noto-color-emoji`
- `fluent`, Fluent Emoji 3D (MIT): `npm pack @lobehub/fluent-emoji-3d`, unpacked. Held out from training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from autotune.reference_135m.cache import cache_folder

__all__ = ["KINDS", "SPRITE_SIZE", "STYLES", "build_sheet", "load_sheet"]

SPRITE_SIZE = 96
NOTO_SIZE = 109
"""The one size, in pixels, that the font's bitmaps have."""

# fmt: off
KINDS = {
    "dog": "1f415", "cat": "1f408", "horse": "1f40e", "cow": "1f404", "pig": "1f416", "lion": "1f981",
    "tiger": "1f405", "bear": "1f43b", "panda": "1f43c", "monkey": "1f412", "elephant": "1f418", "rabbit": "1f407",
    "frog": "1f438", "turtle": "1f422", "snake": "1f40d", "penguin": "1f427", "owl": "1f989", "duck": "1f986",
    "shark": "1f988", "octopus": "1f419", "crab": "1f980", "butterfly": "1f98b", "bee": "1f41d", "spider": "1f577",
    "camel": "1f42a", "giraffe": "1f992", "zebra": "1f993", "apple": "1f34e", "banana": "1f34c", "lemon": "1f34b",
    "pear": "1f350", "strawberry": "1f353", "watermelon": "1f349", "pineapple": "1f34d", "tomato": "1f345",
    "carrot": "1f955", "mushroom": "1f344", "bread": "1f35e", "cheese": "1f9c0", "egg": "1f95a", "pizza": "1f355",
    "burger": "1f354", "donut": "1f369", "cookie": "1f36a", "cake": "1f382", "car": "1f697", "bus": "1f68c",
    "truck": "1f69a", "train": "1f686", "bicycle": "1f6b2", "airplane": "2708", "rocket": "1f680", "boat": "26f5",
    "tractor": "1f69c", "house": "1f3e0", "tent": "26fa", "tree": "1f333", "cactus": "1f335", "sunflower": "1f33b",
    "rose": "1f339", "umbrella": "2602", "book": "1f4d5", "pencil": "270f", "key": "1f511", "hammer": "1f528",
    "clock": "23f0", "phone": "1f4f1", "camera": "1f4f7", "laptop": "1f4bb", "guitar": "1f3b8", "drum": "1f941",
    "soccer ball": "26bd", "basketball": "1f3c0", "trophy": "1f3c6", "crown": "1f451", "hat": "1f3a9",
    "shoe": "1f45f", "shirt": "1f455", "cup": "2615", "chair": "1fa91", "door": "1f6aa", "bell": "1f514",
    "gift": "1f381", "balloon": "1f388", "candle": "1f56f", "bucket": "1faa3", "anchor": "2693", "robot": "1f916",
    "snowman": "26c4", "moon": "1f319",
}
# fmt: on
"""What can lie in a scene, and the code point of its emoji."""


def _noto(source: Path, code: str) -> Image.Image:
    picture = Image.new("RGBA", (136, 128))
    font = ImageFont.truetype(source, NOTO_SIZE)
    ImageDraw.Draw(picture).text((0, 0), chr(int(code, 16)), font=font, embedded_color=True)
    return picture


def _fluent(source: Path, code: str) -> Image.Image:
    name = code if (source / f"{code}.webp").exists() else f"{code}-fe0f"
    return Image.open(source / f"{name}.webp").convert("RGBA")


STYLES: dict[str, Callable[[Path, str], Image.Image]] = {"noto": _noto, "fluent": _fluent}


def build_sheet(style: str, source: Path, folder: Path | None = None) -> Path:
    """Render every kind of a style into one PNG, SPRITE_SIZE wide, kinds from top to bottom in the order of KINDS.

    source: the font file (noto) or the folder of webp files (fluent). Raises OSError where it is not there.
    """
    sheet = Image.new("RGBA", (SPRITE_SIZE, SPRITE_SIZE * len(KINDS)))
    for number, code in enumerate(KINDS.values()):
        picture = STYLES[style](source, code)
        picture = picture.crop(picture.getbbox())
        scale = SPRITE_SIZE / max(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS
        )
        corner = (SPRITE_SIZE - picture.width) // 2, (SPRITE_SIZE - picture.height) // 2
        sheet.paste(picture, (corner[0], number * SPRITE_SIZE + corner[1]))
    folder = folder or cache_folder("sprites")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{style}.png"
    sheet.save(path.with_suffix(".tmp"), "PNG")
    return path.with_suffix(".tmp").replace(path)


@functools.cache
def load_sheet(style: str, folder: Path | None = None) -> dict[str, Image.Image]:
    """Per kind its RGBA picture, SPRITE_SIZE a side. Raises FileNotFoundError where the sheet was not built."""
    path = (folder or cache_folder("sprites")) / f"{style}.png"
    if not path.exists():
        raise FileNotFoundError(
            f"drawing scenes needs the sheet of style {style!r}, got no {path}; build it with "
            f"`python -m autotune.reference_135m.make_splits --sheets`"
        )
    pixels = np.asarray(Image.open(path)).reshape(len(KINDS), SPRITE_SIZE, SPRITE_SIZE, 4)
    return {kind: Image.fromarray(picture) for kind, picture in zip(KINDS, pixels, strict=True)}
