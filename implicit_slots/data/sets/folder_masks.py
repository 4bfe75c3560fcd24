"""Masks as people save them: ids of any size, grey levels, colours, void."""

from pathlib import Path

import numpy as np
from jaxtyping import Int, Int32
from PIL import Image

from implicit_slots.data.readers.pictures import (
    COLOUR_MODES,
    ID_MODES,
    check_mask,
    read_stored,
)
from implicit_slots.data.sets.coco_shapes import number_segments
from implicit_slots.data.source import IGNORED, DataError

WHITE = 255
WIDEST = 65_535  # of 16 bits
MODES = (*ID_MODES, "LA", *COLOUR_MODES)


def read_objects(
    file: Path, ignore_id: int, numbered: bool
) -> Int32[np.ndarray, "height width"]:
    """A mask's objects by number, 0 for background and `IGNORED` for void.

    Of one channel, or of three that are equal, the values are ids, of a palette the
    indices, and 0 is the background; of colours each is an object, but black. What is
    transparent is background.

    Args:
      file: the mask.
      ignore_id: the id of void, of masks that are not in colours; negative for none.
        255 is void of 8 bits alone, and not where the mask's values are levels of grey
        at equal distances, as 0 and 255, or 0, 85, 170 and 255: those are objects.
      numbered: whether ids are the objects' own numbers, which stay as they are. Else
        objects are numbered from 1 on, in the order of the values that the mask has.

    Raises:
      DataError: it cannot be read, or its pixels are no ids.
    """
    image = read_stored(file)
    check_mask(file, image, MODES)
    values, in_colour = _values(image)
    if values.min() < 0:
        raise DataError(
            f"mask {file} has ids from {values.min()} to {values.max()}; renumber them "
            "to 0 (background) and more"
        )
    if numbered and in_colour:
        raise DataError(
            f"mask {file} is in colours, which do not tell which object of scenes.json "
            "is meant; save ids in one channel, k + 1 for the k-th object"
        )
    found, places = _distinct(values)
    void = (found == ignore_id) & (not in_colour)
    is_wide = image.mode.startswith("I")
    if ignore_id == WHITE and (is_wide or _are_levels(found[found > 0])):
        void[:] = False
    numbers = found if numbered else np.cumsum((found > 0) & ~void)
    numbers = np.where(void, IGNORED, numbers).astype(np.int32)
    return numbers[places]


def _distinct(
    values: Int[np.ndarray, "height width"],
) -> tuple[Int[np.ndarray, " found"], Int[np.ndarray, "height width"]]:
    """The values that there are, sorted, and for each pixel which of them it has."""
    if values.max() > WIDEST:
        found, places = np.unique(values, return_inverse=True)
        return found, places.reshape(values.shape)
    # Five times as fast as sorting.
    found = np.flatnonzero(np.bincount(values.ravel()))
    place_of = np.zeros(found[-1] + 1, np.intp)
    place_of[found] = np.arange(len(found))
    return found, place_of[values]


def _are_levels(values: Int[np.ndarray, " values"]) -> bool:
    """Whether sorted values divide what is from 0 to 255 evenly, but for rounding."""
    even = np.linspace(0, WHITE, len(values) + 1)[1:]
    return bool(np.all(np.abs(values - even) <= 1))


def _values(image: Image.Image) -> tuple[Int[np.ndarray, "height width"], bool]:
    """A number for each pixel, 0 for the background, and whether it is a colour's."""
    if image.format == "GIF":
        image = image.convert("RGB")  # In what order its palette is, its writer chose.
    pixels = np.asarray(image).astype(np.int32)
    if pixels.ndim == 2:
        return pixels, False
    hidden = pixels[..., -1] == 0 if image.mode in ("LA", "RGBA") else False
    colours = pixels[..., :3] if image.mode in COLOUR_MODES else pixels[..., :1]
    in_colour = bool(np.any(colours != colours[..., :1]))
    values = colours[..., 0]
    if in_colour:
        values = number_segments(colours.astype(np.uint8))
    return np.where(hidden, 0, values), in_colour
