"""Folders listed: the files in them through links, and which split a name means."""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from implicit_slots.data.readers.files import reason
from implicit_slots.data.source import DataError

# What systems and programs leave behind, beside hidden files.
OF_SYSTEMS = frozenset(
    {
        "__macosx",
        "@eadir",
        "#recycle",
        "$recycle.bin",
        "system volume information",
        "lost+found",
        "thumbs.db",
        "ehthumbs.db",
        "desktop.ini",
    }
)
SPLIT_WORDS = {
    "train": ("train", "training", "trainset", "trainingset"),
    "validation": ("validation", "valid", "val", "dev", "validationset", "valset"),
    "test": ("test", "testing", "testset"),
}
# They say nothing of the split: train_images, test-set.
FILLERS = frozenset({"set", "data", "split", "image", "images", "img", "imgs"})


class File(NamedTuple):
    """A file in a folder.

    Attributes:
      name: below the folder, with /.
      links: how many of them this name goes through.
      real: the file that it is, without links: equal for names of one file.
    """

    name: str
    links: int
    real: str


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


def walk_folder(root: Path, prefix: str = "") -> Iterator[File]:
    """The files in a folder, at any depth, links followed, in no order.

    Left out are hidden files, `OF_SYSTEMS`, what is no file (pipes, devices), and links
    to a folder that they lie in, which have no end.

    Args:
      root: the folder.
      prefix: what names begin with.

    Raises:
      DataError: a folder may not be read.
    """
    real = os.path.realpath(root)
    around = {real, *map(str, Path(real).parents)}
    yield from _walk(File(prefix, 0, real), str(root), frozenset(around))


def _walk(of: File, folder: str, around: frozenset[str]) -> Iterator[File]:
    """See `walk_folder`; `around` are the real folders that this one lies in."""
    try:
        with os.scandir(folder) as listed:
            entries = list(listed)
    except OSError as error:
        raise DataError(
            f"folder {error.filename} cannot be listed ({reason(error)}); change its "
            "permissions or take it out of the data set"
        ) from error
    for entry in entries:
        if entry.name.startswith(".") or entry.name.lower() in OF_SYSTEMS:
            continue
        is_link = entry.is_symlink()
        real = os.path.join(of.real, entry.name)
        file = File(
            of.name + entry.name,
            of.links + is_link,
            os.path.realpath(real) if is_link else real,
        )
        # Not the entry's own answer, which for a link to itself is an error.
        if os.path.isdir(entry.path) if is_link else entry.is_dir():
            if file.real not in around:
                below = file._replace(name=f"{file.name}/")
                yield from _walk(below, entry.path, around | {file.real})
        elif is_link or entry.is_file():
            yield file


def without_doubles(files: Iterable[File]) -> list[File]:
    """Sorted files, each once: of several names that through the fewest links."""
    once: dict[str, File] = {}
    for file in sorted(files, key=lambda file: (file.links, file.name)):
        once.setdefault(file.real, file)
    return sorted(once.values())


def split_of(folder: str) -> str | None:
    """Which split the name of a folder means, in any case and with any number.

    `Train`, `training_set`, `train2017`, `valid`, `TEST`; None for other names.
    """
    words = [w for w in re.findall("[a-z]+", folder.lower()) if w not in FILLERS]
    for split, names in SPLIT_WORDS.items():
        if len(words) == 1 and words[0] in names:
            return split
    return None


def stem(name: str) -> str:
    """A file's name without its ending."""
    return str(PurePosixPath(name).with_suffix(""))


def alike(name: str) -> str:
    """A stem in any case, and however accents are encoded: systems differ in that."""
    return unicodedata.normalize("NFC", stem(name)).casefold()


# How names of files that belong together are alike, the surest first.
LEVELS: tuple[Callable[[str], str], ...] = (str, stem, alike)


def child(folder: Path, name: str) -> str | None:
    """The folder of this name in a folder, whatever its case; exactly this one first.

    Raises:
      DataError: the folder may not be read.
    """
    found = [n for n in list_folder(folder) if n.lower() == name]
    found = [n for n in found if os.path.isdir(folder / n)]
    return min(found, key=lambda n: (n != name, n), default=None)
