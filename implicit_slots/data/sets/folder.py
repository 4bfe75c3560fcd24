"""Images in a folder, with masks and attributes where there are some."""

import functools
import os
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import (
    count_ids,
    data_folder,
    name_some,
    read_image,
    read_json,
    read_mask,
    walk_folder,
)
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.source import DataError, pack_objects

SUFFIXES = (".png", ".jpg", ".jpeg")
SPLIT_FOLDERS = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test",),
}
# Which image falls into which split never changes, whatever the seed of the run.
CARVING_KEY = 20240229


class ImageFolder(FileSource):
    """PNG and JPEG images below a folder, in any depth.

    Layout: `images/…` (or the images directly), optional `masks/…` with the same
    names (ids in one channel, 0 background), optional `scenes.json`. See README.md for
    the splits.

    Attributes:
      files: the images of this split, relative to `images/`, in order.
    """

    remedy = (
        "repair or remove them, or leave them out with "
        "--config.data.skip_unreadable=True"
    )

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "center",
        validation_fraction: float = 0.05,
        test_fraction: float = 0.05,
        max_objects: int = 10,
        skip_unreadable: bool = False,
        keys: Collection[str] | None = None,
    ):
        """Lists the split's files; looks into none unless told to skip some.

        Args:
          path: the folder.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          validation_fraction: share of the images to carve out for validation where
            there is no such folder.
          test_fraction: the same for the test split.
          max_objects: length of the arrays of attributes, and largest id in a mask.
          skip_unreadable: leave out files that cannot be read instead of refusing.
            Every file is looked into here then, which takes its time.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is wrong with the folder, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self.root = data_folder(path, "images")
        self._folder = "images/" if os.path.isdir(self.root / "images") else ""
        images = self.root / self._folder
        listed = sorted(
            name
            for name in walk_folder(images, without="masks")
            if name.lower().endswith(SUFFIXES)
        )
        if not listed:
            raise DataError(
                f"folder {images} has no PNG or JPEG images; set "
                "--config.data.path to one that has"
            )
        self.files = _split(listed, split, validation_fraction, test_fraction)
        self.masks = self._find_masks()
        if skip_unreadable:
            images = [self._folder + file for file in self.files]
            broken = self._find_broken(images, self.masks, lambda files, **_: files)
            whole = sorted(set(range(len(self.files))) - set(broken))
            self.files = [self.files[i] for i in whole]
            self.masks = [self.masks[i] for i in whole] if self.masks else []
        if not self.files:
            raise DataError(
                f"split '{split}' of folder {self.root} is empty, out of "
                f"{len(listed)} images; add images or change "
                "--config.data.validation_fraction and --config.data.test_fraction"
            )
        self.images = [self._folder + file for file in self.files]
        if os.path.isfile(self.root / "scenes.json"):
            self.annotations = ["scenes.json"]

    def read(self, index: int) -> Frame:
        """Reads one image and what belongs to it."""
        image = read_image(self.root / self.images[index])
        mask = None
        if self.masks and self.wants("segmentation"):
            mask = read_mask(self.root / self.masks[index])
        objects = None
        if self.wants("objects") and self._objects:
            objects = self._objects[index]
        return Frame(image, mask, objects)

    def check(self, progress: Progress) -> None:
        """Looks into every file, without decoding it.

        Raises:
          DataError: some cannot be read, or do not fit each other or the crop.
        """
        if self.wants("objects"):
            _ = self._objects
        super().check(progress)

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of each scene, or of ids in its mask."""
        if self._objects:
            return np.array([o["present"].sum() for o in self._objects], np.int64)
        if self.masks:
            return count_ids(self.root, self.masks, progress)
        return super().count_objects(progress)

    @functools.cached_property
    def _objects(self) -> list[dict[str, np.ndarray]]:
        """Attributes of each image's objects; empty without `scenes.json`."""
        if not self.annotations:
            return []
        file = self.root / self.annotations[0]
        return _read_scenes(file, self.files, self.max_objects)

    def _find_masks(self) -> list[str]:
        """The mask of each image: of the same name, or of the same stem as PNG."""
        folder = self.root / "masks"
        if not os.path.isdir(folder):
            return []
        there = set(walk_folder(folder))
        masks, lacking = [], []
        for file in self.files:
            either = (file, str(PurePosixPath(file).with_suffix(".png")))
            found = [f"masks/{name}" for name in either if name in there]
            masks += found[:1]
            lacking += [] if found else [file]
        if lacking:
            raise DataError(
                f"{name_some(lacking, len(self.files))} in "
                f"{self.root / self._folder} have no mask of the same name in "
                f"{folder}; add the masks or move that folder away"
            )
        return masks


def _split(
    files: list[str], split: str, validation_fraction: float, test_fraction: float
) -> list[str]:
    """The files of one split: its own folder's, or a share carved out of the rest."""
    own = {
        name: [f for f in files if f.split("/")[0] in folders and "/" in f]
        for name, folders in SPLIT_FOLDERS.items()
    }
    if split != "train" and own[split]:
        return own[split]
    with_folder = {f for files_of_split in own.values() for f in files_of_split}
    pool = own["train"] or [f for f in files if f not in with_folder]
    if not pool:
        raise DataError(
            f"there are no images for split '{split}': all are in folders of other "
            "splits, and none is called 'train'"
        )
    if not (0 <= validation_fraction <= 1 - test_fraction <= 1):
        raise DataError(
            f"validation_fraction = {validation_fraction} and test_fraction = "
            f"{test_fraction} are no shares of the images; set "
            "--config.data.validation_fraction and --config.data.test_fraction to "
            "numbers from 0 on whose sum is at most 1"
        )
    # Each share is a stretch of one fixed permutation, so that shares are disjoint.
    fractions = {"validation": validation_fraction, "test": test_fraction}
    bits = np.random.Philox(key=CARVING_KEY).random_raw(len(pool))
    order = np.argsort(bits, kind="stable")
    start = 0
    for name, fraction in fractions.items():
        if own[name]:
            continue
        stop = start + round(fraction * len(pool))
        if name == split:
            return [pool[i] for i in sorted(order[start:stop])]
        start = stop
    return [pool[i] for i in sorted(order[start:])]


def _folders(split: str | None) -> tuple[str, ...]:
    """The folders in which images of a split in `scenes.json` may lie."""
    for folders in SPLIT_FOLDERS.values():
        if split in folders:
            return folders
    return () if split is None else (split,)


def _read_scenes(
    path: Path, files: Sequence[str], max_objects: int
) -> list[dict[str, np.ndarray]]:
    """Attributes of each file's objects from CLEVR's `scenes.json`."""
    try:
        scenes = read_json(path)["scenes"]
        objects_of, ambiguous = {}, set()
        for scene in scenes:
            # The same name may occur in several splits, but then only with the split
            # it tells which image is meant.
            name, split = scene["image_filename"], scene.get("split")
            ambiguous |= {name} & objects_of.keys()
            objects_of[name] = scene["objects"]
            for folder in _folders(split):
                objects_of[f"{folder}/{name}"] = scene["objects"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of scenes as CLEVR's ({error!r}); write "
            '{"scenes": [{"image_filename": …, "objects": […]}, …]} or remove it'
        ) from error
    keys = [file if file in objects_of else Path(file).name for file in files]
    if unclear := sorted(ambiguous & set(keys)):
        raise DataError(
            f"{path} describes {unclear[0]} more than once; give each scene its split, "
            "or its image's path below images/ as image_filename"
        )
    lacking = [f for f, key in zip(files, keys, strict=True) if key not in objects_of]
    if lacking:
        raise DataError(
            f"{name_some(lacking, len(files))} are not described in {path}; add them "
            "or remove that file"
        )
    return [
        pack_objects(objects_of[key], max_objects, f"{path}: {file}")
        for file, key in zip(files, keys, strict=True)
    ]
