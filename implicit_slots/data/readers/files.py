"""Files of data sets: found, told apart and read as JSON; errors as sentences."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from implicit_slots.data.source import DataError
from implicit_slots.runtime.files import expand

# What Pillow raises for broken files.
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


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


def name_some(names: Sequence[str], total: int) -> str:
    """The first few of some images and their number, for a sentence."""
    few = ", ".join(map(readable, names[:3])) + (", …" if len(names) > 3 else "")
    return f"{len(names)} of {total} images ({few})"


def readable(name: str) -> str:
    """Text with files' names that can be printed: bytes of no UTF-8 as numbers."""
    return os.fsencode(name).decode(errors="backslashreplace")


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words that do not name it again."""
    if isinstance(error, UnidentifiedImageError):
        return "not a picture"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than Pillow reads; scale it down"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
