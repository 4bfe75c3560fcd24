"""Which files of a folder are images and masks, of which split, and which is whose."""

import collections
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from implicit_slots.data.readers.files import name_some, readable
from implicit_slots.data.readers.listing import (
    LEVELS,
    File,
    child,
    list_folder,
    split_of,
    walk_folder,
    without_doubles,
)
from implicit_slots.data.readers.pictures import is_picture
from implicit_slots.data.source import DataError

# Which image falls into which split never changes, whatever the seed of the run.
CARVING_KEY = 20240229
IMAGES, MASKS = "images", "masks"
# A folder's own files, which are no pictures and not meant to be.
OWN_FILES = frozenset({"scenes.json"})


class Listing(NamedTuple):
    """What lies in a folder of images.

    Attributes:
      images: the pictures.
      masks: pictures in folders called masks; None where there is no such folder.
      where: the folder of the images, for sentences.
      notes: sentences on what is left out.
    """

    images: list[File]
    masks: list[File] | None
    where: Path
    notes: list[str]


def key(name: str, folder: str = IMAGES) -> str:
    """A file's name without the first folder called so: of an image and its mask alike.

    `images/train/a.png` and `train/images/a.png` are both `train/a.png`.
    """
    parts = name.split("/")
    lower = [part.lower() for part in parts[:-1]]
    if folder in lower:
        del parts[lower.index(folder)]
    return "/".join(parts)


def list_images(root: Path) -> Listing:
    """Finds the images of a folder and their masks.

    Images are those in its folder images, or else all that are in no folder masks.

    Raises:
      DataError: a folder may not be read, or there is no image.
    """
    images, masks = child(root, IMAGES), child(root, MASKS)
    if images is not None:
        files = list(walk_folder(root / images, f"{images}/"))
        files += [] if masks is None else walk_folder(root / masks, f"{masks}/")
    else:
        files = list(walk_folder(root))
    is_mask = [MASKS in file.name.lower().split("/")[:-1] for file in files]
    others = [f for f, of in zip(files, is_mask, strict=True) if not of]
    found = [file for file in others if is_picture(file.name)]
    where = root / (images or "")
    notes = []
    left = [file.name for file in others if not is_picture(file.name)]
    kinds = _some(
        os.path.splitext(name)[1].lower() or "no ending"
        for name in left
        if name not in OWN_FILES
    )
    if not found:
        raise DataError(
            f"folder {where} has no pictures{kinds and ', but files: '}{kinds}; set "
            "--config.data.path to one that has, in PNG, JPEG, WebP, BMP, TIFF or GIF"
        )
    if kinds:
        notes.append(
            f"{where} has files that are not read as pictures and are left out: {kinds}"
        )
    if images is not None and masks is None:
        beside = [n for n in list_folder(root) if os.path.isdir(root / n)]
        beside = [n for n in beside if n != images and not n.startswith(".")]
        if beside:
            notes.append(
                f"{root} has no folder masks beside {images}; those that are there, "
                f"{', '.join(map(readable, beside[:6]))}, are not read"
            )
    pictures = None
    if any(is_mask) or masks is not None:
        pictures = [f for f, of in zip(files, is_mask, strict=True) if of]
        pictures = sorted(file for file in pictures if is_picture(file.name))
    return Listing(found, pictures, where, notes)


def split_of_image(name: str) -> str | None:
    """The split that the first of an image's folders with a split's name means."""
    means = map(split_of, name.split("/")[:-1])
    return next((split for split in means if split is not None), None)


def choose(
    listing: Listing, split: str, fractions: Mapping[str, float]
) -> tuple[list[File], list[str]]:
    """The images of one split: its own folders', or a share carved out of the rest.

    A file that several names lead to is one image.

    Args:
      listing: of the folder.
      split: "train", "validation" or "test".
      fractions: of the images to be carved out, for "validation" and "test".

    Returns:
      The images in order of their keys, and sentences on what is left out.

    Raises:
      DataError: there are none.
    """
    groups: dict[str | None, list[File]] = {}
    for file in listing.images:
        groups.setdefault(split_of_image(file.name), []).append(file)
    notes, rest = [], groups.pop(None, [])
    if "train" not in groups:
        groups["train"] = rest
    elif rest:
        notes.append(
            f"{listing.where} has images in no split, which are left out: "
            f"{_some(map(_folder_of, rest))}; a folder is called train, validation or "
            "test (or training, val, train2017 and so on, in any case)"
        )
    once = {name: _in_order(without_doubles(files)) for name, files in groups.items()}
    if doubles := sum(map(len, groups.values())) - sum(map(len, once.values())):
        notes.append(
            f"{listing.where} has {doubles} links to images that are there under "
            "another name, which are left out"
        )
    real = [{file.real for file in files} for files in once.values()]
    if shared := sum(map(len, real)) - len(set().union(*real)):
        notes.append(
            f"{listing.where} has links by which {shared} images are in more than one "
            "split"
        )
    if split != "train" and split in once:
        return once[split], notes
    if not once["train"]:
        raise DataError(
            f"there are no images for split '{split}': all are in folders of other "
            "splits, and none is called 'train'"
        )
    carved = {name: f for name, f in fractions.items() if name not in once}
    return _carve(once["train"], split, carved), notes


def _carve(pool: list[File], split: str, fractions: Mapping[str, float]) -> list[File]:
    """A split's share; each is a stretch of one permutation, so all are disjoint."""
    bits = np.random.Philox(key=CARVING_KEY).random_raw(len(pool))
    order = np.argsort(bits, kind="stable")
    start = 0
    for name, fraction in fractions.items():
        stop = start + round(fraction * len(pool))
        if name == split:
            return [pool[i] for i in sorted(order[start:stop])]
        start = stop
    return [pool[i] for i in sorted(order[start:])]


def _in_order(files: list[File]) -> list[File]:
    return sorted(files, key=lambda file: (key(file.name), file.name))


def _folder_of(file: File) -> str:
    """The first folder of an image below that of all, for a sentence."""
    folder, slash, _ = key(file.name).partition("/")
    return f"{folder}/" if slash else "no folder"


def _some(kinds: Iterable[str]) -> str:
    """The commonest kinds with their counts, for a sentence."""
    counts = collections.Counter(kinds)
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    some = [f"{readable(kind)} ({count})" for kind, count in common[:6]]
    return ", ".join(some) + (", …" if len(counts) > 6 else "")


def find_masks(images: Sequence[str], masks: Sequence[str], root: Path) -> list[str]:
    """The mask of each image: of its name, or else of its stem, or that in any case.

    Accents count as the same however they are encoded: systems differ in that.

    Args:
      images: names below the root.
      masks: the same of the masks.
      root: their folder.

    Raises:
      DataError: an image has none, or not one of its own.
    """
    found, lacking = [], []
    by_level = [_index(masks, level) for level in LEVELS]
    for image in images:
        for level, index in zip(LEVELS, by_level, strict=True):
            fitting = index.get(level(key(image)), [])
            if len(fitting) > 1:
                raise DataError(
                    f"{len(fitting)} masks fit image {image} in {root}: "
                    f"{', '.join(fitting[:3])}; leave one of them there"
                )
            if fitting:
                found += fitting
                break
        else:
            lacking.append(image)
    if lacking:
        raise DataError(
            f"{name_some(lacking, len(images))} in {root} have no mask of the same "
            "name in the folder masks; add the masks or move that folder away"
        )
    twice = [m for m, count in collections.Counter(found).items() if count > 1]
    if twice:
        owners = [i for i, m in zip(images, found, strict=True) if m == twice[0]]
        raise DataError(
            f"images {owners[0]} and {owners[1]} in {root} have the same mask "
            f"{twice[0]}; rename one of them, and give it a mask of its own"
        )
    return found


def _index(masks: Sequence[str], level: Callable[[str], str]) -> dict[str, list[str]]:
    index: dict[str, list[str]] = {}
    for mask in masks:
        index.setdefault(level(key(mask, MASKS)), []).append(mask)
    return index
