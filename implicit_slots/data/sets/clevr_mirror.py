"""CLEVR-Mirror: CLEVR's scenes with a mirror, as published with SLATE."""

import os
from collections.abc import Collection
from typing import Any

import numpy as np
from jaxtyping import Int

from implicit_slots.data.readers.file_source import FileSource
from implicit_slots.data.readers.files import data_folder, name_some, read_objects
from implicit_slots.data.readers.frame_source import Frame, Progress
from implicit_slots.data.readers.listing import list_folder
from implicit_slots.data.readers.pictures import read_image
from implicit_slots.data.source import DataError, pack_objects

# Where each split begins and ends, in hundredths of the sorted images.
SHARES = {"train": (0, 70), "validation": (70, 85), "test": (85, 100)}


class ClevrMirror(FileSource):
    """CLEVR-Mirror (Singh et al. 2022) in its folders.

    Its authors do not document the layout. This reads what third parties read:
    `images/*.png` and, optionally, `scenes/*.json`, one file of CLEVR's attributes
    for each image and of the same stem. Sorted by name, the first 70 % of the images
    are for training, the next 15 % for validation and the last 15 % for testing. There
    are no masks.
    """

    def __init__(
        self,
        *,
        path: str,
        split: str,
        resolution: int,
        crop: str = "none",
        max_objects: int = 10,
        keys: Collection[str] | None = None,
    ):
        """Lists the folders; opens no file.

        Args:
          path: the folder that holds `images`.
          split: "train", "validation" or "test".
          resolution: height and width of the examples, in pixels.
          crop: what part of a frame is kept, see `crop_box`.
          max_objects: length of the arrays of attributes.
          keys: what `batch` returns; None for all there is.

        Raises:
          DataError: what is missing, in one sentence.
        """
        super().__init__(
            resolution=resolution, crop=crop, max_objects=max_objects, keys=keys
        )
        self.root = data_folder(path, "CLEVR-Mirror")
        stems = [
            name.removesuffix(".png")
            for name in list_folder(self.root / "images")
            if name.endswith(".png") and not name.startswith(".")
        ]
        first, last = (share * len(stems) // 100 for share in SHARES[split])
        stems_here = stems[first:last]
        if not stems_here:
            raise DataError(
                f"split '{split}' of {self.root / 'images'} is empty, out of "
                f"{len(stems)} PNG images; unpack CLEVR-Mirror there"
            )
        self.images = [f"images/{stem}.png" for stem in stems_here]
        if os.path.isdir(self.root / "scenes"):
            there = set(list_folder(self.root / "scenes"))
            lacking = [stem for stem in stems if f"{stem}.json" not in there]
            if lacking:
                raise DataError(
                    f"{name_some(lacking, len(stems))} have no JSON file in "
                    f"{self.root / 'scenes'}; unpack all, or move that folder away to "
                    "do without attributes"
                )
            self.annotations = [f"scenes/{stem}.json" for stem in stems_here]

    def read(self, index: int) -> Frame:
        """Reads one image and its scene."""
        image = read_image(self.root / self.images[index])
        if not self.annotations or not self.wants("objects"):
            return Frame(image)
        objects = self._read_objects(index)
        file = f"scene {self.root / self.annotations[index]}"
        return Frame(image, objects=pack_objects(objects, self.max_objects, file))

    def count_objects(self, progress: Progress) -> Int[np.ndarray, " examples"]:
        """Number of objects of each scene, out of its JSON file."""
        if not self.annotations:
            return super().count_objects(progress)
        indices = progress(range(len(self)), desc="counting objects")
        return np.array([len(self._read_objects(i)) for i in indices], np.int64)

    def _read_objects(self, index: int) -> list[dict[str, Any]]:
        """The objects as the scene's file lists them."""
        return read_objects(
            self.root / self.annotations[index],
            "unpack it again, or move the folder of scenes away to do without "
            "attributes",
        )
