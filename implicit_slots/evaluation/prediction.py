"""A trained model on a user's own images: masks, slots and what is drawn of them."""

import glob
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from implicit_slots.data.readers.files import readable
from implicit_slots.data.readers.listing import walk_folder
from implicit_slots.data.readers.pictures import is_picture, read_image
from implicit_slots.data.readers.preprocessing import (
    Box,
    crop_box,
    resize_image,
    to_rgb,
)
from implicit_slots.data.source import DataError
from implicit_slots.drawing.grids import slot_colours
from implicit_slots.evaluation.steps import best_start, judge, starts_of
from implicit_slots.models.images import as_float
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError
from implicit_slots.runtime.files import expand

# Of a mask: pixels outside the crop that the model sees.
UNSEEN = 255
# How much of a mask's colour lies over the image.
OPACITY = 0.55
BATCH = 16


class Prediction(NamedTuple):
    """What a model makes of an image.

    Attributes:
      kind: which masks the model is read by: "decoder" or "attention".
      slots: the slots.
      attention: slot attention's share of each cell of the model's grid, by slot.
      image: as the model saw it.
      decoder: the decoder's masks, where there is a decoder.
      reconstruction: the image rendered from the slots, in [0, 1], where there is one.
    """

    kind: str
    slots: Float[np.ndarray, "slots dim"]
    attention: Float[np.ndarray, "slots rows columns"]
    image: UInt8[np.ndarray, "height width 3"]
    decoder: Float[np.ndarray, "slots decoder_rows decoder_columns"] | None = None
    reconstruction: Float[np.ndarray, "height width 3"] | None = None

    @property
    def masks(self) -> Float[np.ndarray, "slots rows columns"]:
        """Each slot's share of each cell, of the kind."""
        return getattr(self, self.kind)


def find_images(paths: Iterable[str]) -> dict[str, Path]:
    """Returns images by the names that what is made of them gets.

    A name is the file's without its ending, below the folder that was named; with the
    ending where two would have the same.

    Args:
      paths: of files, of folders, all pictures of which count, and patterns (`*.png`).

    Raises:
      UserError: one of them is not there, there is no image, or two have one name.
    """
    named: dict[str, list[tuple[str, Path]]] = {}
    for path in paths:
        for name, file in _below(path):
            known = named.setdefault(name.rsplit(".", 1)[0], [])
            if file not in (other for _, other in known):
                known.append((name, file))
    found: dict[str, Path] = {}
    for short, files in named.items():
        for name, file in files:
            name = short if len(files) == 1 else name
            if (other := found.setdefault(name, file)) != file:
                raise UserError(
                    f"--images: {other} and {file} would both be written as {name}; "
                    "rename one, or take them with two commands"
                )
    if not found:
        raise UserError(f"--images: there is no picture in {', '.join(paths)}")
    return found


def _below(text: str) -> Iterator[tuple[str, Path]]:
    """The images that a path stands for, and their names with endings."""
    path = expand(text)
    if path.is_dir():
        names = sorted(file.name for file in walk_folder(path))
        yield from ((readable(n), path / n) for n in names if is_picture(n))
    elif path.exists():
        yield readable(path.name), path
    else:
        # As a shell leaves it behind the "=" of a flag.
        files = sorted(glob.glob(str(path)))
        if not files:
            raise UserError(f"--images: there is no {text}")
        for file in files:
            yield from _below(file)


def predict(
    model: nnx.Module,
    config: Config,
    images: dict[str, Path],
    leave_out: Callable[[str, DataError], None],
) -> Iterator[tuple[str, Prediction]]:
    """Yields what a model makes of each image, by name, in their order.

    Every image gets the same initial slots (of `config.seed`), so that nothing depends
    on what lies beside it.

    Args:
      model: as `load` returns it.
      config: of its run. `evaluation.masks.starts` initial slots are tried for each
        image; those that reconstruct it best count.
      images: by name, see `find_images`.
      leave_out: is told of each image that cannot be read, and why.
    """
    run, params = _program(model, starts_of(config))
    key = jax.random.key(config.seed)
    kind = "decoder" if hasattr(model, "mix") else "attention"
    side = config.data.resolution
    names = list(images)
    for begin in range(0, len(names), BATCH):
        seen: dict[str, np.ndarray] = {}
        for name in names[begin : begin + BATCH]:
            try:
                picture = read_image(images[name])
                seen[name] = resize_image(picture, box_of(config, picture), side)
            except DataError as error:
                leave_out(name, error)
        if not seen:
            continue
        pixels = np.stack(list(seen.values()))
        batch = np.resize(pixels, (BATCH, *pixels.shape[1:]))  # One program for all
        arrays = jax.tree.map(np.asarray, run(params, batch, key))
        for row, name in enumerate(seen):
            of_row = {array: value[row] for array, value in arrays.items()}
            yield name, Prediction(kind, image=pixels[row], **of_row)


def box_of(config: Config, picture: Image.Image) -> Box:
    """The part of a picture that a model sees: left, top, right, bottom."""
    return crop_box(config.data.get("crop", "center"), *picture.size)


def _program(model: nnx.Module, starts: int) -> tuple[Callable[..., Any], Any]:
    """A compiled function of (parameters, images, key), and the parameters.

    It returns the arrays of `Prediction` by their names.
    """
    graphdef, params = nnx.split(model)

    def of_one(params: Any, pixels: jax.Array, key: jax.Array) -> dict[str, Any]:
        whole: Any = nnx.merge(graphdef, params)
        image = as_float(pixels[None])

        def find(key: jax.Array) -> tuple[Any, ...]:
            encoded = whole.encode(image, key=key)
            return encoded.slots, *judge(whole, image, encoded)

        slots, masks, *_ = best_start(find, key, starts)
        found = {"slots": slots, **masks}
        if hasattr(whole, "render"):
            found["reconstruction"] = whole.render(slots)
        return {name: value[0] for name, value in found.items()}

    return jax.jit(jax.vmap(of_one, in_axes=(None, 0, None))), params


def write(
    prediction: Prediction, picture: Image.Image, box: Box, path: Path
) -> Image.Image:
    """Writes the three files of an image: `.masks.png`, `.overlay.png`, `.npz`.

    The masks are a palette PNG of the image's own size whose values are the slots, and
    `UNSEEN` outside the crop.

    Args:
      prediction: of the image.
      picture: the whole image.
      box: the part of it that the model saw.
      path: of the files, without their endings.

    Returns:
      The overlay.

    Raises:
      OSError: they cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    left, top, right, bottom = box
    ids = np.full((picture.height, picture.width), UNSEEN, np.uint8)
    ids[top:bottom, left:right] = largest(prediction.masks, right - left, bottom - top)
    palette = np.zeros((UNSEEN + 1, 3), np.uint8)
    palette[:UNSEEN] = slot_colours(UNSEEN)
    masks = Image.fromarray(ids)
    masks.putpalette(palette.tobytes())
    masks.save(f"{path}.masks.png")
    overlay = to_rgb(picture).copy()
    coloured = Image.blend(overlay.crop(box), masks.convert("RGB").crop(box), OPACITY)
    overlay.paste(coloured, box)
    overlay.save(f"{path}.overlay.png")
    arrays = {
        n: value for n, value in prediction._asdict().items() if value is not None
    }
    del arrays["kind"]
    np.savez(f"{path}.npz", **arrays)
    return overlay


def largest(
    shares: Float[np.ndarray, "slots rows columns"], width: int, height: int
) -> UInt8[np.ndarray, "{height} {width}"]:
    """The slot of the largest share of each pixel; shares are brought there bilinearly.

    Pixel centres are at halves, the first slot counts on a tie: as masks are scored.
    """
    best = np.full((height, width), -np.inf, np.float32)
    ids = np.zeros((height, width), np.uint8)
    # Slot by slot: a photograph's pixels times the slots need not fit into memory.
    for slot, share in enumerate(np.asarray(shares, np.float32)):
        resized = Image.fromarray(share).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        share = np.asarray(resized)
        ids[share > best] = slot
        best = np.maximum(best, share)
    return ids
