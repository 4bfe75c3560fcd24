"""Where a data set in COCO's layout keeps a split, and how it names photographs."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from implicit_slots.data.readers.listing import (
    LEVELS,
    child,
    list_folder,
    split_of,
    walk_folder,
    without_doubles,
)
from implicit_slots.data.readers.pictures import is_picture
from implicit_slots.data.source import DataError

# Folders of COCO 2017 come first where there are others too.
PREFERRED = "2017"
PUBLISHED = {"train": "train2017", "validation": "val2017", "test": "val2017"}
# Beside the photographs, as Roboflow exports it.
EXPORTED = "_annotations.coco.json"


class Place(NamedTuple):
    """Where a split is; names are relative to the data set's folder.

    Attributes:
      folder: of the photographs.
      annotations: the file, whether it is there or not.
    """

    folder: str
    annotations: str

    @property
    def segments(self) -> str:
        """Folder of the panoptic masks, which has the annotations' name."""
        return self.annotations.removesuffix(".json")


def find_split(root: Path, split: str, kind: str) -> Place:
    """The folder of a split's photographs, and its annotations.

    A test folder without annotations, as COCO's own, is none: the test split is then
    the validation split again.

    Args:
      root: of the data set.
      split: "train", "validation" or "test".
      kind: of annotations, "instances" or "panoptic".

    Raises:
      DataError: there is no such folder, or more than one.
    """
    below = child(root, "images")
    base = f"{below}/" if below and not _folders(root, "") else ""
    wanted = [split, "validation"] if split == "test" else [split]
    for name in wanted:
        found = [f for f in _folders(root, base) if split_of(f) == name]
        found = [f for f in found if PREFERRED in f] or found
        if len(found) > 1:
            raise DataError(
                f"{root / base} has several folders of the split '{name}', "
                f"{', '.join(found)}; move all but one of them away"
            )
        if found:
            place = Place(base + found[0], _annotations(root, base, found[0], kind))
            if name != "test" or os.path.isfile(root / place.annotations):
                return place
    raise DataError(
        f"there is no folder {root / base / PUBLISHED[split]}; unpack it there, or set "
        f"--config.data.path to the folder that holds {PUBLISHED[split]}"
    )


def _folders(root: Path, base: str) -> list[str]:
    """Names of the folders of splits."""
    names = list_folder(root / base)
    return [n for n in names if split_of(n) and os.path.isdir(root / base / n)]


def _annotations(root: Path, base: str, folder: str, kind: str) -> str:
    """The annotations of a split's folder; what they are called if there are none."""
    usual = f"annotations/{kind}_{folder}.json"
    if os.path.isfile(root / usual):
        return usual
    if os.path.isfile(root / base / folder / EXPORTED):
        return f"{base}{folder}/{EXPORTED}"
    fitting = []
    if os.path.isdir(root / "annotations"):
        for name in list_folder(root / "annotations"):
            start, _, rest = name.removesuffix(".json").partition("_")
            if start == kind and rest and split_of(rest) == split_of(folder):
                fitting += [f"annotations/{name}"] * name.endswith(".json")
    return fitting[0] if len(fitting) == 1 else usual


def list_photographs(root: Path, folder: str) -> list[str]:
    """The pictures in a folder at any depth, sorted, relative to the data set's.

    Raises:
      DataError: there is none.
    """
    files = without_doubles(walk_folder(root / folder, f"{folder}/"))
    names = [file.name for file in files if is_picture(file.name)]
    if not names:
        raise DataError(
            f"folder {root / folder} has no photographs; unpack COCO's images there"
        )
    return names


def describe(
    photographs: Sequence[str], described: Sequence[str], file: Path
) -> list[int | None]:
    """Which entry of the annotations each photograph is; None for none.

    By `file_name`, with its folders or without; else by its stem; else in any case.

    Args:
      photographs: their names.
      described: the `file_name` of each entry.
      file: the annotations, for the sentence.

    Raises:
      DataError: two entries are of one photograph.
    """
    entries: list[int | None] = [None] * len(photographs)
    rest = set(range(len(described)))
    for level in LEVELS:
        if None not in entries:
            break
        index: dict[str, list[int]] = {}
        for photograph, name in enumerate(photographs):
            if entries[photograph] is None:
                for end in _ends(name):
                    index.setdefault(level(end), []).append(photograph)
        for entry in sorted(rest):
            ends = (level(end) for end in _ends(described[entry].replace("\\", "/")))
            found = next((index[end] for end in ends if end in index), [])
            if len(found) != 1:
                continue
            before = entries[found[0]]
            if before is not None:
                raise DataError(
                    f"{file} describes {photographs[found[0]]} twice, as "
                    f"{described[before]} and {described[entry]}; leave one of them"
                )
            entries[found[0]] = entry
            rest.remove(entry)
    return entries


def _ends(name: str) -> Iterator[str]:
    """A path, and what is left of it without its first folders."""
    parts = name.split("/")
    return ("/".join(parts[start:]) for start in range(len(parts)))
