r"""Draws a folder of sprites with masks: a data set that is no CLEVR, for `folder.py`.

    python -m experiments.examples.sprites --out=runs/sprites
    python -m implicit_slots.main --config=configs/folder.py \
        --config.data.path=runs/sprites --config.data.max_objects=4 \
        --config.model.num_slots=5

As in Multi-dSprites (Kabra et al. 2019), "coloured on coloured": ellipses, rectangles
and triangles of any colour, size and direction, in front of one another, before a
ground of any colour. With --textured sprites and grounds are striped in two shades, so
that no object has one colour.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from implicit_slots.runtime.files import expand

SIDE = 48
SPLITS = {"train": 4_000, "validation": 200, "test": 200}
MAX_OBJECTS = 4
SHAPES = ("ellipse", "rectangle", "triangle")


def draw(
    generator: np.random.Generator, *, textured: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Draws an image and its mask.

    Args:
      generator: source of everything.
      textured: whether sprites and ground are striped.

    Returns:
      uint8 [48, 48, 3], and uint8 [48, 48] with 0 for the ground; sprite k is before
      all smaller ids and has at least 20 pixels to be seen.
    """
    while True:
        line = (np.arange(SIDE) + 0.5) / SIDE
        rows, columns = np.meshgrid(line, line, indexing="ij")
        image = paint(generator, rows, columns, textured)
        mask = np.zeros((SIDE, SIDE), np.uint8)
        count = generator.integers(2, MAX_OBJECTS + 1)
        for index in range(1, count + 1):
            inside = shape(generator, rows, columns)
            image = np.where(
                inside[..., None], paint(generator, rows, columns, textured), image
            )
            mask[inside] = index
        if np.bincount(mask.ravel(), minlength=count + 1)[1:].min() >= 20:
            return (255 * image).astype(np.uint8), mask


def shape(
    generator: np.random.Generator, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Draws which pixels a sprite covers."""
    y, x = generator.uniform(0.12, 0.88, 2)
    angle = generator.uniform(0, 2 * np.pi)
    height, width = generator.uniform(0.09, 0.2, 2)
    along = np.cos(angle) * (columns - x) + np.sin(angle) * (rows - y)
    across = np.cos(angle) * (rows - y) - np.sin(angle) * (columns - x)
    u, v = along / width, across / height
    kind = SHAPES[generator.integers(len(SHAPES))]
    if kind == "ellipse":
        return u**2 + v**2 <= 1
    if kind == "rectangle":
        return np.maximum(abs(u), abs(v)) <= 1
    return (v <= 1) & (abs(u) <= (1 + v) / 2)


def paint(
    generator: np.random.Generator,
    rows: np.ndarray,
    columns: np.ndarray,
    textured: bool,
) -> np.ndarray:
    """Draws a colour for every pixel, in [0, 1]: one, or stripes of two shades."""
    colour = generator.uniform(0.1, 0.9, 3)
    if not textured:
        return np.broadcast_to(colour, (*rows.shape, 3))
    angle, period = generator.uniform(0, np.pi), generator.uniform(0.08, 0.16)
    phase = np.cos(angle) * columns + np.sin(angle) * rows
    dark = (phase / period) % 1 < 0.5
    return np.where(dark[..., None], 0.6 * colour, colour)


def write(folder: Path, *, textured: bool, sizes: dict[str, int]) -> None:
    """Writes images/SPLIT/ and masks/SPLIT/, as `folder.py` reads them.

    Args:
      folder: which may exist.
      textured: see `draw`.
      sizes: images of each split.
    """
    for number, (split, size) in enumerate(sizes.items()):
        generator = np.random.default_rng(number)
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for index in range(size):
            for kind, pixels in zip(
                ("images", "masks"), draw(generator, textured=textured), strict=True
            ):
                Image.fromarray(pixels).save(folder / kind / split / f"{index:05}.png")


def main(arguments: list[str] | None = None) -> None:
    """Draws and writes."""
    parser = argparse.ArgumentParser(description="Draws sprites with masks.")
    parser.add_argument("--out", type=expand, default=Path("runs/sprites"))
    parser.add_argument("--textured", action="store_true")
    options = parser.parse_args(arguments)
    write(options.out, textured=options.textured, sizes=SPLITS)
    print(f"{sum(SPLITS.values()):,} images: {options.out}")


if __name__ == "__main__":
    main()
