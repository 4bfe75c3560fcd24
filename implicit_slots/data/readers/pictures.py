"""Picture files: read upright, looked into, and masks that store ids or colours."""

import functools
import io
import os
from collections.abc import Collection, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Integer
from PIL import ExifTags, Image

from implicit_slots.data.readers.files import BROKEN, unreadable
from implicit_slots.data.readers.frame_source import MOST_OBJECTS, Progress
from implicit_slots.data.source import DataError

# Of Pillow's formats those that photographs, renders and masks come in.
FORMATS = frozenset(
    {"AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI"}
    | {"TGA", "TIFF", "WEBP"}
)
ID_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
COLOUR_MODES = ("RGB", "RGBA")
Turn = Image.Transpose
# What makes a picture upright, by its orientation in EXIF.
TURNS: Mapping[int, Turn] = {
    2: Turn.FLIP_LEFT_RIGHT,
    3: Turn.ROTATE_180,
    4: Turn.FLIP_TOP_BOTTOM,
    5: Turn.TRANSPOSE,
    6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE,
    8: Turn.ROTATE_90,
}
LYING = (Turn.TRANSPOSE, Turn.ROTATE_270, Turn.TRANSVERSE, Turn.ROTATE_90)


class Header(NamedTuple):
    """What a picture's file says of it.

    Attributes:
      size: (width, height) of the upright picture.
      turn: what made, or makes, it upright; None for nothing.
      mode: Pillow's.
      format: Pillow's.
    """

    size: tuple[int, int]
    turn: Turn | None
    mode: str
    format: str | None


@functools.cache
def suffixes() -> frozenset[str]:
    """The endings of the files that are read, in lower case, with a dot."""
    known = Image.registered_extensions()
    return frozenset(suffix for suffix, name in known.items() if name in FORMATS)


def is_picture(name: str) -> bool:
    """Whether a file's name ends as a picture's."""
    return os.path.splitext(name)[1].lower() in suffixes()


def read_image(file: Path) -> Image.Image:
    """A picture with its pixels, upright, in the mode in which it is stored.

    Of several pictures in a file the first.

    Raises:
      DataError: there is none, or it is cut off or not a picture.
    """
    return read_turned(file)[0]


def read_turned(file: Path) -> tuple[Image.Image, Turn | None]:
    """A picture as `read_image` does, and what made it upright."""
    try:
        image, turn = decode(file)
        check_pixels(image)
    except BROKEN as error:
        raise unreadable(file, error) from error
    return image, turn


def decode(file: Path | io.BytesIO) -> tuple[Image.Image, Turn | None]:
    """A picture of any pixels, upright, and what made it so.

    Raises:
      OSError, or another of `BROKEN`: it is not a whole picture.
    """
    with Image.open(file) as image:
        before = _turn(image)
        image.load()
        after = _turn(image)
    # Pillow turns a TIFF while it reads it, and leaves all others as they are.
    if after is None:
        return image, before
    turned = image.transpose(after)
    turned.format = image.format
    return turned, after


def check_pixels(image: "Image.Image | Header") -> None:
    """Refuses pixels of which nobody knows how bright they are.

    Raises:
      ValueError: saying what they are, to be put in a sentence.
    """
    if image.mode in ("F", "La") or (image.mode == "I" and image.format == "TIFF"):
        raise ValueError(
            f"pixels of mode {image.mode} have no range; save it with 8 bits a channel"
        )


def turn_along(
    mask: Integer[np.ndarray, "height width"],
    size: tuple[int, int],
    turn: Turn | None,
) -> Integer[np.ndarray, "..."]:
    """A mask that was made for a picture as it is stored, turned with the picture.

    Only its size tells: of a square picture masks are taken for upright.

    Args:
      mask: ids.
      size: (width, height) of the upright picture.
      turn: what made it upright.
    """
    if turn is None or turn not in LYING:
        return mask
    if mask.shape != size or mask.shape == size[::-1]:
        return mask
    return np.array(Image.fromarray(mask.astype(np.int32)).transpose(turn))


def _turn(image: Image.Image) -> Turn | None:
    """What makes a picture upright, as far as is known without its pixels."""
    if image.format == "PNG" and "exif" not in image.info:
        return None  # Pillow would read all of it to look for EXIF behind the pixels.
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Broken EXIF is an error of any kind; the pixels may be whole.
        return None


def look(file: Path) -> Header:
    """What a picture's file says, after a look at whether all of it is there.

    Decodes no PNG and no JPEG.

    Raises:
      OSError, or another of `BROKEN`: the file is not a whole picture.
    """
    with Image.open(file) as image:
        turn = _turn(image)
        if image.format == "PNG":
            image.verify()  # Reads every chunk and checks its sum.
        elif image.format not in ("JPEG", "MPO") or not _ends_as_jpeg(file):
            image.load()  # Some programs leave bytes behind the end: decode to know.
        width, height = image.size
        if turn in LYING and image.format != "TIFF":
            width, height = height, width
        return Header((width, height), turn, image.mode, image.format)


def _ends_as_jpeg(file: Path) -> bool:
    """Whether the end-of-image marker is there; a truncated JPEG has lost it."""
    with file.open("rb") as stream:
        stream.seek(-2, os.SEEK_END)
        return stream.read() == b"\xff\xd9"


def read_stored(file: Path) -> Image.Image:
    """A picture as `read_image` does, whatever its pixels are: for masks.

    Raises:
      DataError: there is none, or it is cut off or not a picture.
    """
    try:
        return decode(file)[0]
    except BROKEN as error:
        raise unreadable(file, error) from error


def read_mask(
    file: Path, colour: bool = False
) -> Integer[np.ndarray, "height width *channels"]:
    """The numbers that a mask stores: palette indices, not the colours they stand for.

    Args:
      file: a picture whose compression keeps every number.
      colour: whether it holds colours; ids in one channel otherwise.

    Returns:
      Ids [height, width], at most `MOST_OBJECTS`, or colours [height, width, 3 or 4].

    Raises:
      DataError: it cannot be read, or holds something else.
    """
    image = read_stored(file)
    check_mask(file, image, COLOUR_MODES if colour else ID_MODES)
    mask = np.asarray(image)
    if mask.dtype == np.bool_:
        return mask.astype(np.uint8)
    if not colour and (mask.max() > MOST_OBJECTS or mask.min() < 0):
        raise DataError(
            f"mask {file} has ids from {mask.min()} to {mask.max()}; renumber them to "
            f"0 (background) … {MOST_OBJECTS}"
        )
    return mask


def count_ids(
    root: Path, masks: Sequence[str], progress: Progress
) -> Int[np.ndarray, " masks"]:
    """Number of ids but 0 in each mask, counted in threads.

    Args:
      root: the masks' folder.
      masks: files of ids in one channel, relative to it.
      progress: wraps an iterable to show how far it is, as `tqdm` does.

    Raises:
      DataError: a mask cannot be read.
    """

    def count(name: str) -> int:
        return int(np.count_nonzero(np.unique(read_mask(root / name))))

    with ThreadPool(os.cpu_count()) as pool:
        counts = pool.imap(count, masks, chunksize=16)
        counts = progress(counts, total=len(masks), desc="counting objects")
        return np.array(list(counts), np.int64)


def check_mask(file: Path, image: Image.Image | Header, modes: Collection[str]) -> None:
    """Refuses masks whose pixels are not what they should be."""
    if image.format in ("JPEG", "MPO"):
        raise DataError(
            f"mask {file} is a JPEG, which does not keep ids exactly; save it as PNG"
        )
    if image.mode not in modes:
        content = (
            "object ids in one channel, 0 for background"
            if "L" in modes
            else "ids as colours in RGB"
        )
        raise DataError(
            f"mask {file} has pixels of mode {image.mode}; it must hold {content}"
        )
