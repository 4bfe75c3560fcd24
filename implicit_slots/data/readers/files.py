"""Files of data sets: folders listed, pictures and JSON read, errors as sentences."""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Integer
from PIL import Image, UnidentifiedImageError

from implicit_slots.data.readers.frame_source import MOST_OBJECTS, Progress
from implicit_slots.data.source import DataError
from implicit_slots.runtime.files import expand

# What Pillow raises for broken files.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
ID_MODES = ("1", "L", "P", "I;16", "I;16B", "I")
COLOUR_MODES = ("RGB", "RGBA")


def data_folder(path: str, contents: str) -> Path:
    """The folder that a user named as a data set's.

    Args:
      path: what the user said; `~` is the home folder.
      contents: what is looked for there, in a sentence.

    Raises:
      DataError: none is named, or it does not exist.
    """
    if not path:
        raise DataError(
            f"no folder of {contents} is named; set it with --config.data.path=FOLDER"
        )
    root = expand(path)
    if not os.path.isdir(root):
        raise DataError(
            f"there is no folder {root} to read {contents} from; set "
            "--config.data.path=FOLDER"
        )
    return root


def list_folder(folder: Path) -> list[str]:
    """Sorted names of what lies in a folder.

    Raises:
      DataError: it does not exist or may not be read.
    """
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError as error:
        raise DataError(
            f"there is no folder {folder}; unpack it there, or set --config.data.path "
            f"to the folder that holds {folder.name}"
        ) from error
    except OSError as error:
        raise DataError(
            f"folder {folder} cannot be listed ({reason(error)}); it belongs to the "
            "data set at --config.data.path"
        ) from error


def walk_folder(root: Path, without: str = "") -> Iterator[str]:
    """Relative names of the files in a folder, at any depth; hidden ones are left out.

    Args:
      root: the folder.
      without: a folder directly in it that is left out as well.

    Raises:
      DataError: a folder may not be read.
    """

    def refuse(error: OSError):
        raise DataError(
            f"folder {error.filename} cannot be listed ({reason(error)}); change its "
            "permissions or take it out of the data set"
        ) from error

    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=True):
        here = Path(folder).relative_to(root)
        if folder == str(root) and without in folders:
            folders.remove(without)
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from ((here / n).as_posix() for n in names if not n.startswith("."))


def digest(root: Path, names: Sequence[str]) -> dict[str, Any]:
    """Number of files, and a hash of their names and sizes; opens none.

    Args:
      root: their folder.
      names: the files, relative to it.

    Raises:
      DataError: one is no longer there.
    """
    sha = hashlib.sha256()
    for name in sorted(names):
        try:
            size = os.stat(root / name).st_size
        except OSError as error:
            raise unreadable(root / name, error) from error
        sha.update(f"{name}\0{size}\n".encode(errors="surrogateescape"))
    return {"files": len(names), "sha256": sha.hexdigest()}


def unreadable(file: Path, error: Exception) -> DataError:
    """The sentence for a file that cannot be read, to be raised."""
    return DataError(
        f"file {file} cannot be read ({reason(error)}); put a whole, readable copy in "
        "its place"
    )


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
      DataError: there is none, or it is not JSON.
    """
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from error


def read_objects(file: Path, remedy: str) -> list[dict[str, Any]]:
    """The list of objects of a scene's JSON file.

    Args:
      file: the scene's.
      remedy: what to do without one, for the sentence.

    Raises:
      DataError: it cannot be read, or has no such list.
    """
    match read_json(file):
        case {"objects": list() as objects}:
            return objects
    raise DataError(f"scene {file} has no list of objects; {remedy}")


def read_image(file: Path) -> Image.Image:
    """A picture with its pixels, in the mode in which it is stored.

    Raises:
      DataError: there is none, or it is cut off or not a picture.
    """
    try:
        with Image.open(file) as image:
            image.load()
            return image
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
      Ids [height, width], at most 255, or colours [height, width, 3 or 4].

    Raises:
      DataError: it cannot be read, or holds something else.
    """
    image = read_image(file)
    check_mask(file, image, colour)
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


def name_some(names: Sequence[str], total: int) -> str:
    """The first few of some images and their number, for a sentence."""
    few = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"{len(names)} of {total} images ({few})"


def verify(file: Path) -> Image.Image:
    """A picture without its pixels, after a look at whether they are all there.

    Raises:
      OSError, or another of `BROKEN`: the file is not a whole picture.
    """
    with Image.open(file) as image:
        if image.format != "JPEG":
            image.verify()  # Reads every chunk of a PNG and checks its sum.
        elif not _ends_as_jpeg(file):
            image.load()  # Some programs leave bytes behind the end: decode to know.
        return image


def _ends_as_jpeg(file: Path) -> bool:
    """Whether the end-of-image marker is there; a truncated JPEG has lost it."""
    with file.open("rb") as stream:
        stream.seek(-2, os.SEEK_END)
        return stream.read() == b"\xff\xd9"


def check_mask(file: Path, image: Image.Image, colour: bool) -> None:
    """Refuses masks whose pixels are not what they should be."""
    if image.format == "JPEG":
        raise DataError(
            f"mask {file} is a JPEG, which does not keep ids exactly; save it as PNG"
        )
    if image.mode not in (COLOUR_MODES if colour else ID_MODES):
        content = (
            "ids as colours in RGB"
            if colour
            else "object ids in one channel, 0 for background"
        )
        raise DataError(
            f"mask {file} has pixels of mode {image.mode}; it must hold {content}"
        )


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words that do not name it again."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
