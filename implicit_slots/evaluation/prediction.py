"""A trained model on a user's own images: masks, slots and what is drawn of them."""

import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, UInt8
from PIL import Image

from implicit_slots.data.readers.listing import walk_folder
from implicit_slots.data.readers.pictures import read_image
from implicit_slots.data.readers.preprocessing import (
    Box,
    crop_box,
    resize_image,
    to_rgb,
)
from implicit_slots.data.source import DataError
from implicit_slots.drawing.grids import save_png, slot_colours
from implicit_slots.models.images import as_float
from implicit_slots.runtime.config import Config
from implicit_slots.runtime.errors import UserError

# Of a mask: pixels outside the crop that the model sees.
UNSEEN = 255
MOST_SLOTS = UNSEEN - 1
# How much of a mask's colour lies over the image.
OPACITY = 0.55


class Prediction(NamedTuple):
    """What a model makes of an image.

    Attributes:
      name: of the image, without its ending, relative to the folder.
      slots: the slots.
      attention: each slot's share of each cell of the model's grid.
      masks: the decoder's, at the model's resolution, where rendering makes them.
      image: as the model saw it.
      reconstruction: made from the slots; None where the model makes none.
    """

    name: str
    slots: Float[np.ndarray, "slots dim"]
    attention: Float[np.ndarray, "slots rows columns"]
    masks: Float[np.ndarray, "slots height width"] | None
    image: UInt8[np.ndarray, "height width 3"]
    reconstruction: Float[np.ndarray, "height width 3"] | None

    @property
    def shares(self) -> Float[np.ndarray, "slots rows columns"]:
        """What the masks are read from: the decoder's where there are some."""
        return self.attention if self.masks is None else self.masks


def find_images(paths: Sequence[str]) -> dict[str, pathlib.Path]:
    """Returns images by their names: files, and all files of folders that Pillow opens.

    Args:
      paths: of files and folders.

    Raises:
      UserError: nothing is there, there is no image, or two have one name.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind}
    found: dict[str, pathlib.Path] = {}
    for path in map(pathlib.Path, paths):
        path = path.expanduser()
        if path.is_dir():
            every = (path / name for name in sorted(walk_folder(path)))
            files = [file for file in every if file.suffix.lower() in endings]
            base = path
        elif path.is_file():
            files, base = [path], path.parent
        else:
            raise UserError(f"--images: there is no {path}")
        for file in files:
            name = file.relative_to(base).with_suffix("").as_posix()
            if name in found:
                raise UserError(
                    f"--images: {found[name]} and {file} would both be written as "
                    f"{name}; rename one, or predict them apart"
                )
            found[name] = file
    if not found:
        raise UserError(f"--images: there is no image in {', '.join(paths)}")
    return found


def predict(
    model: nnx.Module,
    config: Config,
    images: dict[str, pathlib.Path],
    out: pathlib.Path,
    *,
    batch_size: int = 16,
    starts: int = 1,
    say: Callable[[str], None] = print,
) -> list[Prediction]:
    """Writes what a model makes of images.

    For each image NAME: `NAME.masks.png` (a palette PNG of the image's own size whose
    values are slots, and `UNSEEN` outside the crop), `NAME.overlay.png` and `NAME.npz`
    with the arrays of `Prediction`.

    Args:
      model: as `load` returns it.
      config: of its run.
      images: by name, see `find_images`.
      out: the folder that is written to.
      batch_size: images at once.
      starts: initial slots that are tried; those that reconstruct an image best count.
      say: gets a line for each image that cannot be read, and one now and then.

    Returns:
      What was found, in the order of `images`.

    Raises:
      UserError: if no image can be read, or the model has too many slots for a PNG.
    """
    run = jax.jit(_runner(model, starts))
    crop = config.data.get("crop", "center")
    side = config.data.resolution
    if config.model.num_slots > MOST_SLOTS:
        raise UserError(f"masks are written for at most {MOST_SLOTS} slots")
    found: list[Prediction] = []
    for names in _chunks(list(images), batch_size):
        whole: dict[str, tuple[Image.Image, Box]] = {}
        for name in names:
            try:
                picture = to_rgb(read_image(images[name]))
                whole[name] = picture, crop_box(crop, *picture.size)
            except DataError as error:
                say(f"left out: {error}")
        if not whole:
            continue
        pixels = np.stack([resize_image(p, box, side) for p, box in whole.values()])
        padded = np.resize(pixels, (batch_size, *pixels.shape[1:]))
        arrays = jax.tree.map(np.asarray, run(padded, jax.random.key(config.seed)))
        for row, (name, (picture, box)) in enumerate(whole.items()):
            prediction = Prediction(
                name,
                arrays["slots"][row],
                arrays["attention"][row],
                arrays["masks"][row] if "masks" in arrays else None,
                pixels[row],
                arrays["reconstruction"][row] if "reconstruction" in arrays else None,
            )
            write(prediction, picture, box, out)
            found.append(prediction)
        say(f"{len(found)} of {len(images)} images")
    if not found:
        raise UserError("none of the images can be read")
    return found


def _runner(model: nnx.Module, starts: int) -> Callable[..., dict[str, jax.Array]]:
    """A pure function of (images, key): what `Prediction` has, by name."""
    graphdef, params = nnx.split(model)

    def run(pixels: jax.Array, key: jax.Array) -> dict[str, jax.Array]:
        whole: Any = nnx.merge(graphdef, params)
        image = as_float(pixels)

        def start(key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
            encoded = whole.encode(image, key=key)
            made = whole.reconstruct(image, key=key)
            arrays = {"slots": encoded.slots, "attention": encoded.attention}
            if made.masks is not None:
                arrays["masks"] = made.masks
            error = jnp.zeros(len(image))
            if made.slots is not None:
                arrays["reconstruction"] = made.slots
                error = ((made.slots - image) ** 2).mean((1, 2, 3))
            return error, arrays

        if starts == 1:
            return start(key)[1]
        errors, arrays = jax.lax.map(start, jax.random.split(key, starts))
        best = jnp.argmin(errors, axis=0)
        return jax.tree.map(lambda leaf: leaf[best, jnp.arange(len(image))], arrays)

    return run


def write(
    prediction: Prediction, picture: Image.Image, box: Box, out: pathlib.Path
) -> None:
    """Writes the three files of an image.

    Args:
      prediction: of the image.
      picture: the whole image, RGB.
      box: the part of it that the model saw: left, top, right, bottom.
      out: the folder that is written to.
    """
    path = out / prediction.name
    path.parent.mkdir(parents=True, exist_ok=True)
    left, top, right, bottom = box
    seen = slice(top, bottom), slice(left, right)
    ids = np.full((picture.height, picture.width), UNSEEN, np.uint8)
    ids[seen] = _argmax(prediction.shares, right - left, bottom - top)
    colours = slot_colours(len(prediction.slots))
    palette = np.zeros((256, 3), np.uint8)
    palette[: len(colours)] = colours
    masks = Image.fromarray(ids, mode="P")
    masks.putpalette(palette.tobytes())
    masks.save(path.with_name(f"{path.name}.masks.png"))
    drawn = np.array(picture, np.float32)
    drawn[seen] += OPACITY * (palette[ids[seen]] - drawn[seen])
    save_png(
        np.rint(drawn).astype(np.uint8), path.with_name(f"{path.name}.overlay.png")
    )
    arrays = prediction._asdict()
    del arrays["name"]
    np.savez(
        path.with_name(f"{path.name}.npz"),
        **{key: value for key, value in arrays.items() if value is not None},
    )


def _argmax(
    shares: Float[np.ndarray, "slots rows columns"], width: int, height: int
) -> UInt8[np.ndarray, "{height} {width}"]:
    """The slot of the largest share of each pixel; shares are interpolated."""
    best = np.full((height, width), -1.0, np.float32)
    ids = np.zeros((height, width), np.uint8)
    for slot, share in enumerate(shares):
        grown = Image.fromarray(np.asarray(share, np.float32)).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        share = np.asarray(grown)
        ids[share > best] = slot
        best = np.maximum(best, share)
    return ids


def _chunks(names: list[str], size: int) -> Iterator[list[str]]:
    for begin in range(0, len(names), size):
        yield names[begin : begin + size]
