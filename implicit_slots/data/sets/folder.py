"""Images in a folder, with masks and attributes where there are some."""

import functools
import os
from collections.abc import Collection, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, read_json
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.listing import split_of
from implicit_slots.data.readers.pictures import read_turned, turn_along
from implicit_slots.data.sets import folder_files
from implicit_slots.data.sets.folder_masks import MODES, read_objects
from implicit_slots.data.source import DataError, pack_objects


class ImageFolder(FileSource):
    """Pictures below a folder, in any depth.

    Layout: `images/…` (or the images directly), optional `masks/…` with the same
    names, optional `scenes.json`. README.md has what a folder may look like, and
    `folder_masks.read_objects` what a mask.

    Attributes:
      files: the images of this split, relative to `images/`, in order.
    """

    mask_modes = MODES

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
        ignore_id: int = 255,
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
          max_objects: length of the arrays of attributes, and most objects in a mask.
          skip_unreadable: leave out files that cannot be read instead of refusing.
            Every file is looked into here then, which takes its time.
          ignore_id: what masks store where no metric is to count; −1 for none.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is wrong with the folder, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self.root = data_folder(path, "images")
        self._ignore_id = ignore_id
        if not (0 <= validation_fraction <= 1 - test_fraction <= 1):
            raise DataError(
                f"validation_fraction = {validation_fraction} and test_fraction = "
                f"{test_fraction} are no shares of the images; set "
                "--config.data.validation_fraction and --config.data.test_fraction to "
                "numbers from 0 on whose sum is at most 1"
            )
        fractions = {"validation": validation_fraction, "test": test_fraction}
        listing = folder_files.list_images(self.root)
        chosen, notes = folder_files.choose(listing, split, fractions)
        self.images = [file.name for file in chosen]
        self.notes = [*listing.notes, *notes]
        if listing.masks is not None:
            masks = [file.name for file in listing.masks]
            self.masks = folder_files.find_masks(self.images, masks, self.root)
        if skip_unreadable:
            self._leave_out_broken()
        if not self.images:
            raise DataError(
                f"split '{split}' of folder {self.root} is empty, out of "
                f"{len(listing.images)} images; add images or change "
                "--config.data.validation_fraction and --config.data.test_fraction"
            )
        self.files = [folder_files.key(name) for name in self.images]
        if os.path.isfile(self.root / "scenes.json"):
            self.annotations = ["scenes.json"]

    def read(self, index: int) -> Frame:
        """Reads one image and what belongs to it."""
        image, turn = read_turned(self.root / self.images[index])
        objects = None
        if self.wants("objects") and self._objects:
            objects = self._objects[index]
        if not self.masks or not self.wants("segmentation"):
            return Frame(image, None, objects)
        mask = self._read_mask(index)
        most, count = int(mask.max()), self.max_objects
        if objects is not None and most > (count := int(objects["present"].sum())):
            raise DataError(
                f"mask {self.root / self.masks[index]} has object {most}, but "
                f"{self.annotations[0]} describes {count}; make them fit each other"
            )
        if most > count:
            raise DataError(
                f"mask {self.root / self.masks[index]} has {most} objects, more than "
                f"max_objects = {count}; set --config.data.max_objects={most} or more, "
                "or save it without smoothing if most of them are edges"
            )
        return Frame(image, turn_along(mask, image.size, turn), objects)

    def check(self, progress: Progress) -> None:
        """Looks into every file; decodes no PNG and no JPEG.

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
        if not self.masks:
            return super().count_objects(progress)

        def count(index: int) -> int:
            return max(int(self._read_mask(index).max()), 0)

        with ThreadPool(os.cpu_count()) as pool:
            counts = pool.imap(count, range(len(self)), chunksize=16)
            counts = progress(counts, total=len(self), desc="counting objects")
            return np.array(list(counts), np.int64)

    def _read_mask(self, index: int) -> Int32[np.ndarray, "height width"]:
        return read_objects(
            self.root / self.masks[index], self._ignore_id, bool(self.annotations)
        )

    def _leave_out_broken(self) -> None:
        """Forgets images that cannot be read, or whose masks cannot."""
        broken = self._find_broken(self.images, self.masks, lambda files, **_: files)
        whole = sorted(set(range(len(self.images))) - set(broken))
        if broken:
            names = [self.images[index] for index in broken]
            self.notes = [
                *self.notes,
                f"{name_some(names, len(self.images))} in {self.root} cannot be read "
                "and are left out",
            ]
        self.images = [self.images[i] for i in whole]
        self.masks = [self.masks[i] for i in whole] if self.masks else []

    @functools.cached_property
    def _objects(self) -> list[dict[str, np.ndarray]]:
        """Attributes of each image's objects; empty without `scenes.json`."""
        if not self.annotations:
            return []
        file = self.root / self.annotations[0]
        return _read_scenes(file, self.files, self.max_objects)


def _names(file: str) -> list[Any]:
    """What an image may be called in `scenes.json`, the clearest first."""
    name, split = PurePosixPath(file).name, folder_files.split_of_image(file)
    if split is None:
        return [file, name]
    below = "/".join(part for part in file.split("/") if split_of(part) != split)
    return [file, (split, below), (split, name), name]


def _first(names: Sequence[Any], among: Collection[Any]) -> Any:
    """The first name that is among others, or else the last."""
    return next((name for name in names if name in among), names[-1])


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
            if split is not None:
                objects_of[f"{split}/{name}"] = scene["objects"]
                objects_of[split_of(split), name] = scene["objects"]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a list of scenes as CLEVR's ({error!r}); write "
            '{"scenes": [{"image_filename": …, "objects": […]}, …]} or remove it'
        ) from error
    keys = [_first(_names(file), objects_of) for file in files]
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
